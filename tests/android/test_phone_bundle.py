"""Bundles on their way into lobit's app: what is sent, what is in place, and what is said where that fails."""

from dataclasses import replace

import pytest

from lobit.errors import LobitError
from lobit.runtime.adb import find_phone
from lobit.runtime.phone_bundle import folder_name, send_bundle
from tests.android.phone_bundles import content, write_bundle


def sent(phone) -> int:
    """Number of files that were pushed since the last call."""
    count = len(phone.pushed)
    phone.pushed.clear()
    return count


def test_a_bundle_arrives_whole_and_nothing_is_left_on_the_way(phone, tmp_path):
    bundle = write_bundle(tmp_path / "story", {"more/config.json": b"{}"})
    assert send_bundle(find_phone(None), bundle) == "story"
    assert content(phone.bundle("story")) == content(bundle.folder)
    assert [path.name for path in phone.bundle("").iterdir()] == ["story"]
    assert list(phone.tmp.iterdir()) == []


def test_what_an_emulator_alone_needs_is_not_sent(phone, tmp_path):
    """A program for target qnn has a twin for the emulator, which is larger than itself."""
    bundle = write_bundle(tmp_path / "story", {"emulated.pte": b"twin" * 1000})
    files = [replace(entry, role="emulated") if entry.path == "emulated.pte" else entry for entry in bundle.manifest.files]
    bundle = replace(bundle, manifest=replace(bundle.manifest, files=files))
    send_bundle(find_phone(None), bundle)
    there = content(phone.bundle("story"))
    assert "emulated.pte" not in there and "model.bin" in there
    sent(phone)
    send_bundle(find_phone(None), bundle)
    assert sent(phone) == 0


def test_an_unchanged_bundle_is_not_sent_again(phone, tmp_path):
    bundle = write_bundle(tmp_path / "story")
    send_bundle(find_phone(None), bundle)
    assert sent(phone) == 3
    send_bundle(find_phone(None), bundle)
    assert sent(phone) == 0


def test_of_a_changed_bundle_only_what_changed_is_sent(phone, tmp_path):
    send_bundle(find_phone(None), write_bundle(tmp_path / "story"))
    sent(phone)
    changed = write_bundle(tmp_path / "story", {"tokenizer.json": b"[]"})
    send_bundle(find_phone(None), changed)
    assert sent(phone) == 2, "the tokenizer and the manifest"
    assert content(phone.bundle("story")) == content(changed.folder)


def test_a_file_that_was_changed_on_the_phone_is_sent_again(phone, tmp_path):
    bundle = write_bundle(tmp_path / "story")
    send_bundle(find_phone(None), bundle)
    sent(phone)
    (phone.bundle("story") / "model.bin").write_bytes(b"something else")
    send_bundle(find_phone(None), bundle)
    assert sent(phone) == 1
    assert content(phone.bundle("story")) == content(bundle.folder)


def test_a_bundle_that_was_half_sent_is_not_in_place_and_goes_on(connect, tmp_path):
    phone, _ = connect()
    phone.add_app()
    bundle = write_bundle(tmp_path / "story", {"weights.bin": bytes(2_000_000)})
    phone.lost_after = 500_000
    with pytest.raises(LobitError, match=r"Pixel 8 .* was lost in the middle: plug it in again and repeat the command"):
        send_bundle(find_phone(None), bundle)
    assert not phone.bundle("story").exists() and sent(phone) == 3
    phone.lost_after = None
    connect(again=phone)
    send_bundle(find_phone(None), bundle)
    assert sent(phone) == 2, "what was cut off, and the manifest"
    assert content(phone.bundle("story")) == content(bundle.folder)


def test_the_bundle_before_stays_until_the_next_is_whole(phone, tmp_path):
    before = write_bundle(tmp_path / "story")
    send_bundle(find_phone(None), before)
    kept = content(before.folder)
    phone.lost_after = 500_000
    with pytest.raises(LobitError, match="was lost in the middle"):
        send_bundle(find_phone(None), write_bundle(tmp_path / "story", {"weights.bin": bytes(2_000_000)}))
    assert content(phone.bundle("story")) == kept


def test_leftovers_of_another_bundle_do_not_come_along(phone, tmp_path):
    bundle = write_bundle(tmp_path / "story")
    partial = phone.bundle("story.partial")
    partial.mkdir(parents=True)
    for name in ("model.bin", "stray.bin"):
        (partial / name).write_bytes(b"left by an earlier export")
    send_bundle(find_phone(None), bundle)
    assert content(phone.bundle("story")) == content(bundle.folder)


def test_what_arrives_otherwise_than_it_was_sent_is_never_in_place(phone, tmp_path):
    phone.garbles = True
    with pytest.raises(LobitError, match=r"these files did not arrive on Pixel 8 as they were sent; repeat(.|\n)*model.bin"):
        send_bundle(find_phone(None), write_bundle(tmp_path / "story"))
    assert not phone.bundle("story").exists()


def test_a_bundle_that_does_not_fit_is_refused_with_the_numbers(phone, tmp_path):
    bundle = write_bundle(tmp_path / "story", {"weights.bin": bytes(4_000_000)})
    phone.free = 7_000_000
    with pytest.raises(LobitError, match="story needs 8 MB while it is copied, and 7 MB are free on Pixel 8: remove"):
        send_bundle(find_phone(None), bundle)
    assert sent(phone) == 0


def test_progress_goes_up_to_all_bytes(phone, tmp_path):
    bundle, seen = write_bundle(tmp_path / "story"), []
    send_bundle(find_phone(None), bundle, lambda what, done, total: seen.append((done, total)))
    total = sum(len(data) for data in content(bundle.folder).values())
    assert seen[-1] == (total, total) and sorted(seen) == seen


@pytest.mark.parametrize(
    ("name", "folder"),
    [("story-8da4w", "story-8da4w"), ("a b/ü;'", "a-b----"), ("..", "bundle"), ("x.partial", "x-partial"), ("-rf", "rf")],
)
def test_a_folders_name_on_the_phone_is_plain(name, folder):
    assert folder_name(name) == folder
