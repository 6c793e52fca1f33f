"""Folders that appear when they are finished, or not at all, and that one process at a time writes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import platform
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lobit.errors import BundleError, shown

if sys.platform != "win32":
    import fcntl
    import resource

WRITER, OWNER = ".writer", ".unfinished.json"
"""Files in an unfinished folder: the first names the process that writes there, the second the work that it does."""
OURS = (WRITER, OWNER, f"{OWNER}.new")
LONGEST_OWNER = 1 << 20
"""Bytes above which the file `OWNER` is not read."""
MOST_DIFFERENCES = 3
"""Differing settings that a message names at most."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error numbers of a write where there is no space, or a quota or size limit is reached."""
CANNOT_TELL = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM}
"""Error numbers where the system cannot wait until a file is on the disk; they are ignored."""
TRIES = 100
"""How often the lock is tried while other processes finish and their folder goes away."""


def check_place(out: Path) -> None:
    """Refuses an output place that is taken or not usable.

    Raises:
        BundleError: `out` exists, its parent is no folder, or its name is not Unicode.
    """
    if os.fsencode(out) != str(out).encode("utf-8", "replace"):
        raise BundleError(f"{out} is not Unicode, and a bundle tells its name: choose another place with -o")
    if out.exists() or out.is_symlink():
        raise BundleError(f"{out} is already there and is left as it is: remove it, or choose another place with -o")
    if not out.parent.is_dir():
        raise BundleError(f"{out.parent} is no folder: make it first, or choose another place with -o")


@dataclasses.dataclass(frozen=True)
class Work:
    """The work that an unfinished folder is for: only the same work may go on there, or begin again.

    Attributes:
        verb: the subcommand, such as `export`.
        settings: everything that the result depends on, as JSON values.
        command: the command line as the user gave it; empty where a program calls.
        resumes: whether the work goes on from what an earlier run has finished; otherwise it begins again.
    """

    verb: str
    settings: Mapping[str, Any]
    command: str = ""
    resumes: bool = False


@contextlib.contextmanager
def new_folder(out: Path, work: Work) -> Iterator[Path]:
    """Yields the folder `out`.partial to write into, which is renamed to `out` at the end.

    It is made at once, so that a place that cannot be written to is found before any slow work. Files that other work has left in
    `out`.partial are never touched. If the work resumes, files of an earlier run are kept at the start, and files of this run are kept
    when something fails; otherwise both are removed.

    Args:
        out: where the finished folder appears.
        work: the work that writes into it.

    Raises:
        BundleError: as `check_place`; the place cannot be written to or is full, another process writes there, or other work has left
            files there.
    """
    check_place(out)
    partial = out.with_name(out.name + ".partial")
    with _held(partial):
        asked = json.loads(json.dumps({"verb": work.verb, "command": work.command, "settings": work.settings}))
        _check_owner(partial, asked)
        try:
            check_place(out)  # again: another process may have finished just before
            if not work.resumes:
                _clear(partial)
            _own(partial, asked)
            yield partial
            check_place(out)
            for name in OURS:
                (partial / name).unlink(missing_ok=True)
            publish(partial, out)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # frees the memory that the work used: there may be none left
            told = _told(error, partial)
            if not work.resumes:
                shutil.rmtree(partial, ignore_errors=True)
            elif _has_files(partial):
                told.add_note(f"what is finished is kept in {partial}: the same command goes on from there")
            if told is error:
                raise
            raise told from None


def publish(new: Path, place: Path) -> None:
    """Renames a file or folder to `place` once all of it is on the disk: after a crash of the machine it is there whole, or not at all."""
    for path in (new, *new.rglob("*")):
        if not path.is_symlink():
            _sync(path)
    new.replace(place)
    _sync(place.parent)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk; does not wait on file systems that do not support it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if sys.platform != "win32" and error.errno not in CANNOT_TELL:
            raise


def _check_owner(partial: Path, asked: dict[str, Any]) -> None:
    """Refuses a folder that holds files of other work.

    Raises:
        BundleError: the message names that work and the command that goes on with it, where they are known.
    """
    if not _has_files(partial):
        return
    there = _owner(partial / OWNER)
    if there is None:
        raise BundleError(
            f"{partial} holds files that no unfinished command of lobit is known to have left: look into it and remove it, or choose "
            "another place with -o"
        )
    if there["verb"] != asked["verb"] or there["settings"] != asked["settings"]:
        raise BundleError(_refusal(partial, there, asked))


def _own(partial: Path, asked: dict[str, Any]) -> None:
    """Records in the folder which work it is for."""
    new = partial / f"{OWNER}.new"
    new.write_text(json.dumps(asked, indent=1), encoding="utf-8")
    publish(new, partial / OWNER)


def _owner(path: Path) -> dict[str, Any] | None:
    """The verb, command and settings recorded in an unfinished folder, or None where there is no record that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.stat().st_size <= LONGEST_OWNER:
            there = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(there, dict) and {"verb", "command", "settings"} <= there.keys():
                return there
    return None


def _refusal(partial: Path, there: dict[str, Any], asked: dict[str, Any]) -> str:
    found = list(_differences(there["settings"], asked["settings"])) if there["verb"] == asked["verb"] else []
    more = f" and {len(found) - MOST_DIFFERENCES} more" if len(found) > MOST_DIFFERENCES else ""
    settings = f" with other settings ({'; '.join(found[:MOST_DIFFERENCES])}{more})" if found else ""
    command = there["command"] or f"the same `lobit {there['verb']}`"
    return (
        f"{partial} holds an unfinished `lobit {there['verb']}`{settings}: go on with it ({command}), choose another place with -o, or "
        "remove it"
    )


def _differences(there: Any, asked: Any, name: str = "") -> Iterator[str]:
    """Describes each setting that differs, by its dotted name."""
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in sorted({*there, *asked}):
            yield from _differences(there.get(key), asked.get(key), f"{name}.{key}" if name else key)
    elif there != asked:
        yield f"{name}: {shown(there)} there, {shown(asked)} now"


def _has_files(partial: Path) -> bool:
    """Whether the work has written any file; empty folders do not count."""
    return any(path.name not in OURS for path in partial.rglob("*") if path.is_symlink() or not path.is_dir())


def _clear(partial: Path) -> None:
    for path in [path for path in partial.glob("*") if path.name not in OURS]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _held(partial: Path) -> Iterator[None]:
    """Makes the folder and locks it against other processes; the system releases the lock when this one ends, however it ends.

    When something fails, an interruption at any moment included, a folder in which nothing was written is removed again.

    Raises:
        BundleError: the folder cannot be made, or another process holds the lock.
    """
    lock = _Lock(partial)
    try:
        lock.take()
        yield
    except BaseException:
        if lock.taken and not _has_files(partial):
            shutil.rmtree(partial, ignore_errors=True)
        elif lock.made:
            with contextlib.suppress(OSError):  # another process writes there by now
                partial.rmdir()
        raise
    finally:
        lock.close()


class _Lock:
    """The right to write in a folder.

    Attributes:
        made: whether this process may have made the folder.
        taken: whether this process has the right to write there.
    """

    def __init__(self, partial: Path) -> None:
        self.partial = partial
        self.made = self.taken = False
        self._descriptor: int | None = None
        """The folder's file descriptor, which holds the lock. None on Windows, where an open one would prevent renaming."""

    def take(self) -> None:
        """Makes the folder and takes the lock.

        Raises:
            BundleError: the folder cannot be made, or another process holds the lock.
        """
        try:
            if self.partial.is_symlink():
                raise OSError(errno.EEXIST, "it is a link")
            for _ in range(TRIES):
                if self._try():
                    return
                self.close()
            raise OSError(errno.EAGAIN, f"it went away {TRIES} times")
        except OSError as error:
            told = f"{self.partial} cannot be made ({error.strerror}): choose a place that can be written to with -o"
            raise BundleError(told) from None

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def _try(self) -> bool:
        """Tries once; returns False where another process has finished in the meantime and its folder is gone."""
        try:
            self.made = not self.partial.exists()
            self.partial.mkdir(exist_ok=True)
            if sys.platform == "win32":
                self.taken = True
                return True
            self._descriptor = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY)
            self._flock(self._descriptor)
            self.taken = os.path.samestat(os.fstat(self._descriptor), self.partial.stat())
            if self.taken:
                (self.partial / WRITER).write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        except FileNotFoundError:
            self.taken = False
        return self.taken

    def _flock(self, descriptor: int) -> None:
        """Takes the system's lock; goes without it on file systems that cannot lock folders, such as NFS.

        Raises:
            BundleError: another process holds the lock.
        """
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.made = False
            writer = "another process"
            with contextlib.suppress(OSError):
                writer = (self.partial / WRITER).read_text(encoding="utf-8", errors="replace") or writer
            told = f"{self.partial} is being written by {writer}: wait until it is done, or choose another place with -o"
            raise BundleError(told) from None
        except OSError:
            pass


def _told(error: BaseException, partial: Path) -> BaseException:
    """The error to raise: for a full disk one with the bytes written and free, which the system's error lacks."""
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
