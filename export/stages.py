"""The stages of an export: how long each took, how much memory it needed, how long it should take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lobit.memory import peak_rss_bytes

OnStage = Callable[[str, float], None]
"""(stage, seconds that it should take), called as each begins."""


@dataclass
class Stages:
    """Seconds and peak memory of each stage, in order."""

    on_stage: OnStage | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def stage(self, name: str, expected: float) -> Iterator[None]:
        """Times what happens inside.

        Args:
            name: of the stage.
            expected: seconds that it should take.
        """
        if self.on_stage:
            self.on_stage(name, expected)
        begin = time.perf_counter()
        yield
        self.rows.append({"name": name, "seconds": round(time.perf_counter() - begin, 3), "peak_rss_bytes": peak_rss_bytes()})
