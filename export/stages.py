"""The stages of an export: how far they are, what they took, and what a run that was killed has left of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lobit.memory import peak_rss_bytes
from lobit.quant_recipes.apply import Progress

Count = Callable[[int, int], None]
"""(done, of how many) within a stage"""
WHOLE = 1000
"""Steps of the progress of all stages together."""


class Stages:
    """Seconds and peak memory of each stage, in order.

    Args:
        expected: seconds that each stage should take; the progress of all stages together goes by them.
        progress: told how far all stages are.
    """

    def __init__(self, expected: Mapping[str, float], progress: Progress | None = None) -> None:
        self.expected, self.progress = expected, progress
        self.rows: list[dict[str, Any]] = []
        self._before = 0.0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Count]:
        """Times what happens inside; yields what is told how far the stage is."""

        def count(done: int, total: int) -> None:
            if self.progress:
                share = (self._before + self.expected[name] * done / max(total, 1)) / sum(self.expected.values())
                self.progress(name, min(round(WHOLE * share), WHOLE), WHOLE)

        count(0, 1)
        begin = time.perf_counter()
        yield count
        self.rows.append({"name": name, "seconds": round(time.perf_counter() - begin, 3), "peak_rss_bytes": peak_rss_bytes()})
        count(1, 1)
        self._before += self.expected[name]


class Kept:
    """What is finished of an export, in a folder beside it: a run that is killed goes on from there.

    Args:
        folder: made where it is missing; emptied where it is of another export.
        key: what the export is made from.
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
    """What an export is made from, in one word.

    Args:
        source: the model's folder; a file counts as another one where its size or time is another.
        settings: all else that the result depends on.
    """
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(source.iterdir()) if path.is_file()]
    text = json.dumps([str(source.resolve()), files, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
