"""Progress on stderr, with the time left: a bar where there is a terminal, a line now and then where there is none."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET = 10.0
"""Seconds before the first line: short work needs none."""
BETWEEN = 30.0
"""Fewest seconds between two lines: a log of some minutes can then be read at a glance."""
SHARE = 0.05
"""Least share of the work between two lines: work of a whole night then prints about twenty."""


class Shown(Protocol):
    """Shows how much of some work is done."""

    def count(self, what: str, done: int, total: int) -> None:
        """Shows that `done` of `total` are done; another total, or fewer done than before, means that other work has begun."""


class Bar:
    """Shows progress as one bar."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._task = bar, bar.add_task("", total=None, visible=False)

    def count(self, what: str, done: int, total: int) -> None:
        """See `Shown`."""
        self._bar.update(self._task, description=what, completed=done, total=total, visible=done < total)


class Lines:
    """Shows progress as plain lines, the first after `QUIET` seconds, each with the time since the beginning, the share, and the time left.

    Args:
        write: called with each line.
        clock: returns the time in seconds, which never decreases.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._start, self._due = clock(), clock() + QUIET
        self._total = self._done = 0
        self._first, self._told = (0.0, 0), 0.0

    def count(self, what: str, done: int, total: int) -> None:
        """See `Shown`."""
        now, share = self._clock(), done / max(total, 1)
        if total != self._total or done < self._done:
            self._total, self._first, self._told = total, (now, done), -SHARE
        self._done = done
        if now < self._due or share < self._told + SHARE or done >= total:
            return
        self._due, self._told = now + BETWEEN, share
        self._write(f"{_clock_time(now - self._start):>8}  {int(100 * share):3} %  {what}{self._left(now)}")

    def _left(self, now: float) -> str:
        """The time left, by the speed since the work was first counted; what an earlier run of a training did is left out of the speed."""
        begun, before = self._first
        if self._done <= before:
            return ""
        return f", {_clock_time((now - begun) / (self._done - before) * (self._total - self._done))} left"


def _clock_time(seconds: float) -> str:
    """Seconds as a text such as `0:01:05`."""
    return str(timedelta(seconds=round(seconds)))


def _print(line: str) -> None:
    with contextlib.suppress(OSError):  # progress that cannot be printed must not end the work
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar() -> Iterator[Shown]:
    """Yields what shows the progress of long work: a bar on a terminal, otherwise lines."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield Lines(_print)
        return
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress)


@contextlib.contextmanager
def announce() -> Iterator[Callable[[str], None]]:
    """Yields a function that prints a line for each step, with the seconds since the beginning."""
    console, start = Console(file=sys.stderr, highlight=False), time.monotonic()

    def step(what: str) -> None:
        console.print(f"[dim]{time.monotonic() - start:5.0f} s[/dim]  {what}")

    yield step
    console.print(f"[dim]{time.monotonic() - start:5.0f} s[/dim]  done")
