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


def _bar() -> Progress:
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def counting() -> Iterator[Callable[[str, int, int], None]]:
    """A function (what, done, of how many) that moves one bar."""
    with _bar() as bar:
        task = bar.add_task("", total=None, visible=False)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total, visible=done < total)

        yield advance


@contextlib.contextmanager
def staging() -> Iterator[Callable[[str, float], None]]:
    """A function (stage, seconds it should take); the bar of the stage follows the clock and waits at 99 % for its end."""
    with _bar() as bar:
        task, stop = bar.add_task("", total=None, visible=False), threading.Event()
        current: list[float] = [0.0, 1.0]

        def begin(stage: str, expected: float) -> None:
            current[:] = [time.monotonic(), max(expected, TICK)]
            bar.reset(task, description=stage, total=current[1], visible=expected >= 1)

        def tick() -> None:
            while not stop.wait(TICK):
                bar.update(task, completed=min(time.monotonic() - current[0], 0.99 * current[1]))

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield begin
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
