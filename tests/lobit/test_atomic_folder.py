"""A folder appears when it is finished, or not at all, and one process at a time writes it."""

import contextlib
import errno
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lobit import atomic_folder
from lobit.atomic_folder import OWNER, WRITER, Work, new_folder
from lobit.errors import BundleError

ONCE, RESUMING = Work("quantize", {"model": "a"}), Work("export", {"model": "a", "spec": {"context": 64}}, "lobit export a", resumes=True)


def test_a_folder_appears_only_when_it_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out, ONCE) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_nothing_is_left_of_work_that_failed(failure: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(failure), new_folder(tmp_path / "out", ONCE) as folder:
        (folder / "file").write_text("x")
        raise failure
    assert not list(tmp_path.iterdir())


class Interrupting:
    """A trace function that interrupts `atomic_folder` once, before a line: the how-manieth is counted from 1."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame: FrameType, event: str, _: Any) -> "Interrupting":
        if frame.f_code.co_filename == atomic_folder.__file__ and event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("work", [ONCE, RESUMING], ids=["once", "resuming"])
def test_an_interruption_before_any_line_leaves_all_or_nothing(work: Work, tmp_path: Path) -> None:
    out, line, outcomes = tmp_path / "out", 0, set()
    while True:
        line += 1
        interrupting, before = Interrupting(line), sys.gettrace()
        with contextlib.suppress(KeyboardInterrupt):
            try:
                sys.settrace(interrupting)
                with new_folder(out, work) as folder:
                    (folder / "stages").mkdir()
            finally:
                sys.settrace(before)
        left = {path.name: sorted(inner.name for inner in path.iterdir()) for path in tmp_path.iterdir()}
        assert left in ({}, {"out": ["stages"]}), f"interrupted before line {line}"
        outcomes.add(bool(left))
        if interrupting.left > 0:
            break
        shutil.rmtree(out, ignore_errors=True)
    assert outcomes == {True, False} and line > 50


def test_what_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(BundleError, match="already there"), new_folder(out, ONCE):
        pass
    assert out.read_text() == "mine"


def killed(out: Path, work: Work) -> Path:
    """Leaves what a process leaves that is killed in the midst of work."""
    (partial := out.with_name(f"{out.name}.partial")).mkdir()
    told = {"verb": work.verb, "command": work.command, "settings": work.settings}
    (partial / OWNER).write_text(json.dumps(told), encoding="utf-8")
    (partial / WRITER).write_text("process 1 on elsewhere", encoding="utf-8")
    (partial / "half").write_text("x", encoding="utf-8")
    return partial


def test_remains_of_the_same_work_are_no_obstacle(tmp_path: Path) -> None:
    killed(tmp_path / "out", ONCE)
    with new_folder(tmp_path / "out", ONCE) as folder:
        assert not (folder / "half").exists()
    killed(tmp_path / "again", RESUMING)
    with new_folder(tmp_path / "again", RESUMING) as folder:
        assert (folder / "half").exists()


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (ONCE, r"holds an unfinished `lobit export`: go on with it \(lobit export a\), choose another place with -o, or remove it"),
        (replace(RESUMING, settings={"model": "a", "spec": {"context": 32}}), r"other settings \(spec\.context: 64 there, 32 now\): go on"),
        (replace(RESUMING, settings={str(i): i for i in range(9)}), r"\(0: None there, 0 now; .* and 8 more\)"),
    ],
    ids=["verb", "setting", "settings"],
)
def test_what_other_work_left_is_refused_and_never_touched(other: Work, told: str, tmp_path: Path) -> None:
    partial = killed(tmp_path / "out", RESUMING)
    with pytest.raises(BundleError, match=told), new_folder(tmp_path / "out", other):
        pass
    assert (partial / "half").read_text(encoding="utf-8") == "x"
    with new_folder(tmp_path / "out", RESUMING) as folder:
        assert (folder / "half").exists()


@pytest.mark.parametrize("owner", ["", "{", "[]", '{"verb": "export"}', "[" * 100_000, None], ids=repr)
def test_files_of_an_unknown_owner_are_left_as_they_are(owner: str | None, tmp_path: Path) -> None:
    partial = killed(tmp_path / "out", ONCE)
    (partial / OWNER).unlink() if owner is None else (partial / OWNER).write_text(owner, encoding="utf-8")
    with pytest.raises(BundleError, match="no unfinished command of lobit is known"), new_folder(tmp_path / "out", ONCE):
        pass
    assert (partial / "half").exists()


def test_the_owner_is_told_while_work_goes_on_and_not_shipped(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", RESUMING) as folder:
        assert json.loads((folder / OWNER).read_text(encoding="utf-8")) == {
            "verb": "export",
            "command": "lobit export a",
            "settings": RESUMING.settings,
        }
        (folder / "file").write_text("x", encoding="utf-8")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, move = atomic_folder._sync, Path.replace
    monkeypatch.setattr(atomic_folder, "_sync", lambda path: (steps.append(f"sync {path.name}"), sync(path))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (steps.append(f"rename {self.name}"), move(self, to))[1])
    (tmp_path / "new" / "inner").mkdir(parents=True)
    (tmp_path / "new" / "inner" / "file").write_text("x", encoding="utf-8")
    atomic_folder.publish(tmp_path / "new", tmp_path / "out")
    assert steps == ["sync new", "sync inner", "sync file", "rename new", f"sync {tmp_path.name}"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_disk_that_cannot_tell_is_let_be_and_one_that_fails_is_not(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "new").write_text("x", encoding="utf-8")
    if number == errno.EIO:
        with pytest.raises(OSError, match="error"):
            atomic_folder.publish(tmp_path / "new", tmp_path / "out")
    else:
        atomic_folder.publish(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out").exists() == (number != errno.EIO)


def test_a_place_that_cannot_be_written_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be made"), new_folder(Path("/proc/out"), ONCE):
        pass
    with pytest.raises(BundleError, match="is no folder"), new_folder(tmp_path / "missing" / "out", ONCE):
        pass
    (tmp_path / "file.partial").write_text("mine")
    (tmp_path / "link.partial").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(BundleError, match="cannot be made"), new_folder(tmp_path / name, ONCE):
            pass
    assert (tmp_path / "file.partial").read_text() == "mine"


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), BundleError("no")], ids=repr)
def test_what_is_finished_is_kept_for_the_next_run(failure: BaseException, tmp_path: Path) -> None:
    with pytest.raises((BundleError, KeyboardInterrupt)) as raised, new_folder(tmp_path / "out", RESUMING) as folder:
        (folder / "stage").write_text("x")
        raise failure
    assert "the same command goes on from there" in raised.value.__notes__[0]
    with new_folder(tmp_path / "out", RESUMING) as folder:
        assert (folder / "stage").read_text() == "x"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["stage"]


def test_nothing_is_kept_where_nothing_was_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", RESUMING) as folder:
        (folder / "stages").mkdir()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_one_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", ONCE) as folder:
        (folder / "file").write_text("x")
        for work in (ONCE, RESUMING):
            told = rf"out\.partial is being written by process {os.getpid()} on .*choose another place"
            with pytest.raises(BundleError, match=told), new_folder(tmp_path / "out", work):
                pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_a_full_disk_is_told_with_the_numbers(tmp_path: Path) -> None:
    told = r"out\.partial/file cannot be written \(No space.*\): \d+ bytes of out\.partial are written and \d+ are free"
    with pytest.raises(BundleError, match=told), new_folder(tmp_path / "out", ONCE) as folder:
        (folder / "file").write_text("x" * 1000)
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "file"))
    assert not list(tmp_path.iterdir())


def test_an_error_without_a_file_gets_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"out\.partial"), new_folder(tmp_path / "out", ONCE):
        raise OSError(errno.EIO, "Input/output error")
