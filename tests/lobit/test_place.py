"""A folder appears when it is finished, or not at all."""

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
        assert not list(folder.iterdir())


def test_a_place_that_cannot_be_written_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be made"), new_folder(Path("/proc/out")):
        pass
    with pytest.raises(BundleError, match="is no folder"), new_folder(tmp_path / "missing" / "out"):
        pass
