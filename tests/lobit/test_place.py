"""A folder appears when it is finished, or not at all, and one process at a time writes it."""

import errno
import os
from pathlib import Path

import pytest

from lobit.errors import BundleError
from lobit.place import new_folder


def test_a_folder_appears_only_when_it_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_nothing_is_left_of_work_that_failed(failure: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(failure), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        raise failure
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(BundleError, match="already there"), new_folder(out):
        pass
    assert out.read_text() == "mine"


def test_remains_of_a_killed_run_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half").write_text("x")
    with new_folder(tmp_path / "out") as folder:
        assert not (folder / "half").exists()


def test_a_place_that_cannot_be_written_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be made"), new_folder(Path("/proc/out")):
        pass
    with pytest.raises(BundleError, match="is no folder"), new_folder(tmp_path / "missing" / "out"):
        pass
    (tmp_path / "file.partial").write_text("mine")
    (tmp_path / "link.partial").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(BundleError, match="cannot be made"), new_folder(tmp_path / name):
            pass
    assert (tmp_path / "file.partial").read_text() == "mine"


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), BundleError("no")], ids=repr)
def test_what_is_finished_is_kept_for_the_next_run(failure: BaseException, tmp_path: Path) -> None:
    with pytest.raises((BundleError, KeyboardInterrupt)) as raised, new_folder(tmp_path / "out", resume=True) as folder:
        (folder / "stage").write_text("x")
        raise failure
    assert "the same command goes on from there" in raised.value.__notes__[0]
    with new_folder(tmp_path / "out", resume=True) as folder:
        assert (folder / "stage").read_text() == "x"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["stage"]


def test_nothing_is_kept_where_nothing_was_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", resume=True):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_one_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        for resume in (False, True):
            told = rf"out\.partial is being written by process {os.getpid()} on .*choose another place"
            with pytest.raises(BundleError, match=told), new_folder(tmp_path / "out", resume):
                pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_a_full_disk_is_told_with_the_numbers(tmp_path: Path) -> None:
    told = r"out\.partial/file cannot be written \(No space.*\): \d+ bytes of out\.partial are written and \d+ are free"
    with pytest.raises(BundleError, match=told), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x" * 1000)
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "file"))
    assert not list(tmp_path.iterdir())


def test_an_error_without_a_file_gets_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"out\.partial"), new_folder(tmp_path / "out"):
        raise OSError(errno.EIO, "Input/output error")
