"""The stages of an export: their progress, seconds and peak memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lobit.memory import peak_rss_bytes
from lobit.progress_callback import Progress

Count = Callable[[int, int], None]
"""Called with how much of a stage is done, and how much there is."""
WHOLE = 1000
"""Number of steps in which the progress of all stages together is counted."""


def halves(count: Count) -> tuple[Count, Count]:
    """The functions to call with the progress of the two halves of a stage."""
    return lambda done, total: count(done, 2 * total), lambda done, total: count(total + done, 2 * total)


class Stages:
    """Measures the seconds and peak memory of each stage, in order.

    Args:
        expected: seconds that each stage should take; they decide its share of the progress of all stages together.
        progress: called with the name of a stage and the progress of all stages together.
    """

    def __init__(self, expected: Mapping[str, float], progress: Progress | None = None) -> None:
        self.expected, self.progress = expected, progress
        self.rows: list[dict[str, Any]] = []
        self._before = 0.0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Count]:
        """Times the `with` block; yields the function to call with the stage's progress."""

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
