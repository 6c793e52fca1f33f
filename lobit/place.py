"""Folders that appear when they are finished, or not at all, and that one process at a time writes."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from lobit.errors import BundleError

if sys.platform != "win32":
    import fcntl
    import resource

WRITER = ".writer"
"""In an unfinished folder: says which process writes there."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system says where there is no space, or no more is allowed."""
TRIES = 100
"""To take the lock, while other processes finish and their folder goes away."""


def check_place(out: Path) -> None:
    """Refuses to write where something is.

    Raises:
        BundleError: `out` exists, its parent is no folder, or its name is not Unicode.
    """
    if os.fsencode(out) != str(out).encode("utf-8", "replace"):
        raise BundleError(f"{out} is not Unicode, and a bundle tells its name: choose another place with -o")
    if out.exists() or out.is_symlink():
        raise BundleError(f"{out} is already there and is left as it is: remove it, or choose another place with -o")
    if not out.parent.is_dir():
        raise BundleError(f"{out.parent} is no folder: make it first, or choose another place with -o")


@contextlib.contextmanager
def new_folder(out: Path, resume: bool = False) -> Iterator[Path]:
    """`out`.partial to write into; it becomes `out` at the end.

    It is made at once, so that a place that cannot be written to is found before any slow work.

    Args:
        out: where the folder appears.
        resume: what an earlier run left in `out`.partial is kept, and so is what is in it when something fails; without it both
            are removed.

    Raises:
        BundleError: as `check_place`; the place cannot be written to or is full, or another process writes there.
    """
    check_place(out)
    partial = out.with_name(out.name + ".partial")
    with _held(partial):
        try:
            check_place(out)  # again: another process may have finished just before
            if not resume:
                _clear(partial)
            yield partial
            check_place(out)
            (partial / WRITER).unlink(missing_ok=True)
            partial.rename(out)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # gives back what the work held: there may be no memory left
            told = _told(error, partial)
            if not resume or not _contents(partial):
                shutil.rmtree(partial, ignore_errors=True)
            else:
                told.add_note(f"what is finished is kept in {partial}: the same command goes on from there")
            if told is error:
                raise
            raise told from None


def _contents(partial: Path) -> list[Path]:
    return [path for path in partial.glob("*") if path.name != WRITER]


def _clear(partial: Path) -> None:
    for path in _contents(partial):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _held(partial: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it; the system lets them in when this one ends, however it ends."""
    try:
        if partial.is_symlink():
            raise OSError(errno.EEXIST, "it is a link")
        descriptor = _lock(partial)
    except OSError as error:
        raise BundleError(f"{partial} cannot be made ({error.strerror}): choose a place that can be written to with -o") from None
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(partial: Path) -> int | None:
    """Makes the folder and locks it: the descriptor holds the lock. None on Windows, where it would be in the way of renaming."""
    for _ in range(TRIES):
        with contextlib.suppress(FileExistsError):
            partial.mkdir()
        if sys.platform == "win32":
            return None
        with contextlib.suppress(FileNotFoundError):  # another process has just finished, and the folder is gone
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
            try:
                _take(descriptor, partial)
                if os.path.samestat(os.fstat(descriptor), partial.stat()):
                    (partial / WRITER).write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
    raise OSError(errno.EAGAIN, f"it went away {TRIES} times")


def _take(descriptor: int, partial: Path) -> None:
    """Takes the lock.

    Raises:
        BundleError: another process has it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        writer = "another process"
        with contextlib.suppress(OSError):
            writer = (partial / WRITER).read_text(encoding="utf-8", errors="replace") or writer
        raise BundleError(f"{partial} is being written by {writer}: wait until it is done, or choose another place with -o") from None
    except OSError:  # a file system that locks no folders, such as NFS
        pass


def _told(error: BaseException, partial: Path) -> BaseException:
    """The error; of a full disk with the numbers, which the system does not tell."""
    if not isinstance(error, OSError):
        return error
    place = Path(str(error.filename2 or error.filename or partial))
    if error.errno not in FULL:
        error.filename = str(place)
        return error
    written = sum(path.lstat().st_size for path in partial.rglob("*") if path.is_file())
    limit = "" if sys.platform == "win32" else _largest_file()
    return BundleError(
        f"{place} cannot be written ({error.strerror}): {written} bytes of {partial.name} are written and "
        f"{shutil.disk_usage(partial.parent).free} are free there{limit}: make space, or choose another place with -o"
    )


def _largest_file() -> str:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return "" if limit == resource.RLIM_INFINITY else f", a file may have {limit} (ulimit -f)"
