"""Progress on stderr, with the time left: a bar where there is a terminal, nothing where there is none."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """One bar: it counts what is done."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._task = bar, bar.add_task("", total=None, visible=False)

    def count(self, what: str, done: int, total: int) -> None:
        """Shows that `done` of `total` are done."""
        self._bar.update(self._task, description=what, completed=done, total=total, visible=done < total)


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
        yield Bar(progress)


@contextlib.contextmanager
def announce() -> Iterator[Callable[[str], None]]:
    """A function that prints a line per step, with the seconds since the beginning."""
    console, start = Console(file=sys.stderr, highlight=False), time.monotonic()

    def step(what: str) -> None:
        console.print(f"[dim]{time.monotonic() - start:5.0f} s[/dim]  {what}")

    yield step
    console.print(f"[dim]{time.monotonic() - start:5.0f} s[/dim]  done")
