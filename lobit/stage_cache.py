"""What long work has finished, in a folder beside its result, and the files that it was made from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

CHECKSUM = ".sha256"
"""The ending of the file that says what is in a finished file or folder."""


class StageCache:
    """What is finished of long work, in a folder beside its result: a run that is killed goes on from there.

    Args:
        folder: made where it is missing. It lies in an unfinished folder, whose owner is the work (`atomic_folder.Work`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """A path to write a file or folder to; it is kept as `name` when all of it is there."""
        new = self.folder / f"{name}.new"
        for path in (new, self.folder / name):
            _remove(path)
        yield new
        self._checksum(name).write_text(_checksum(new), encoding="utf-8")  # tells what a crash cut short, so that none waits for the disk
        new.replace(self.folder / name)

    def has(self, name: str) -> Path | None:
        """A file or folder that is finished and as it was written, or None."""
        path, told = self.folder / name, self._checksum(name)
        if path.exists() and told.is_file() and told.read_text(encoding="utf-8", errors="replace") == _checksum(path):
            return path
        return None

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _checksum(self, name: str) -> Path:
        return self.folder / f"{name}{CHECKSUM}"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _checksum(path: Path) -> str:
    """The sha256 of a file's bytes, or of all names and bytes in a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(f"{file.relative_to(path)} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def files_of(folder: Path) -> str:
    """A word for the files of a model's folder: it is another one when a file's name, size or time is another."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir()) if path.is_file()]
    return hashlib.sha256(json.dumps([str(folder.resolve()), files]).encode()).hexdigest()
