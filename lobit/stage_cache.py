"""Keeps finished stages of long work in a folder beside its result, and tells whether a model's files have changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

CHECKSUM = ".sha256"
"""Suffix of the file that holds the checksum of a finished file or folder."""


class StageCache:
    """The finished stages of long work, in a folder beside its result: the run after one that was killed goes on from there.

    Args:
        folder: where the stages are; made where it is missing. It lies in the unfinished folder of the work (`atomic_folder.Work`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """Yields a path to write a file or folder to; when the `with` block ends without an error, it is kept as `name`."""
        new = self.folder / f"{name}.new"
        for path in (new, self.folder / name):
            _remove(path)
        yield new
        self._checksum(name).write_text(_checksum(new), encoding="utf-8")  # reveals what a crash cut short: no write waits for the disk
        new.replace(self.folder / name)

    def has(self, name: str) -> Path | None:
        """The path of a finished file or folder that is as it was written, or None."""
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
    """A hash of the files of a model's folder, which changes with the folder's path and with any file's name, size or modification time."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir()) if path.is_file()]
    return hashlib.sha256(json.dumps([str(folder.resolve()), files]).encode()).hexdigest()
