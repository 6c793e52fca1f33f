"""What long work has finished, in a folder beside its result, and what it was made from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Kept:
    """What is finished of long work, in a folder beside its result: a run that is killed goes on from there.

    Args:
        folder: made where it is missing; emptied where it is of other work.
        key: what the work is made from.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        mark = folder / "key"
        if not mark.is_file() or mark.read_text(encoding="utf-8", errors="replace") != key:
            self.remove()
            folder.mkdir()
            mark.write_text(key, encoding="utf-8")

    @contextlib.contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """A path to write a file or folder to; it is kept as `name` when all of it is there."""
        new = self.folder / f"{name}.new"
        if new.is_dir():
            shutil.rmtree(new)
        yield new
        new.replace(self.folder / name)

    def has(self, name: str) -> Path | None:
        """A file or folder that is finished, or None."""
        path = self.folder / name
        return path if path.exists() else None

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def key_of(source: Path, **settings: Any) -> str:
    """What work is made from, in one word.

    Args:
        source: the model's folder; a file counts as another one where its size or time is another.
        settings: all else that the result depends on.
    """
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(source.iterdir()) if path.is_file()]
    text = json.dumps([str(source.resolve()), files, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
