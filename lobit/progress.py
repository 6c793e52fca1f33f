"""Progress on stderr, with the time left: a bar where there is a terminal, nothing where there is none."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

TICK = 0.5
"""Seconds between two movements of a bar that follows the clock."""


class Bar:
    """One bar: it counts what is done, or follows the clock where a library does all of a stage's work in one call."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._task = bar, bar.add_task("", total=None, visible=False)
        self._started = self._expected = 0.0

    def count(self, what: str, done: int, total: int) -> None:
        """Shows that `done` of `total` are done."""
        self._expected = 0.0
        self._bar.update(self._task, description=what, completed=done, total=total, visible=done < total)

    def stage(self, what: str, expected: float) -> None:
        """Begins a stage that should take `expected` seconds; the bar waits at 99 % for its end."""
        self._started, self._expected = time.monotonic(), expected
        self._bar.reset(self._task, description=what, total=max(expected, TICK), visible=expected >= 1)

    def tick(self) -> None:
        """Moves the bar of a stage on."""
        if self._expected:
            self._bar.update(self._task, completed=min(time.monotonic() - self._started, 0.99 * self._expected))


@contextlib.contextmanager
def bar() -> Iterator[Bar]:
    """A bar for long work."""
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        shown, stop = Bar(progress), threading.Event()

        def tick() -> None:
            while not stop.wait(TICK):
                shown.tick()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield shown
        finally:
            stop.set()
            thread.join()


@contextlib.contextmanager
def announce() -> Iterator[Callable[[str], None]]:
    """A function that prints a line per step, with the seconds since the beginning."""
    console, start = Console(file=sys.stderr, highlight=False), time.monotonic()

    def step(what: str) -> None:
        console.print(f"[dim]{time.monotonic() - start:5.0f} s[/dim]  {what}")

    yield step
    console.print(f"[dim]{time.monotonic() - start:5.0f} s[/dim]  done")
