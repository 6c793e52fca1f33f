"""Progress where there is no terminal: few lines, each with what is done and what is left, and none for short work."""

import re
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobit.progress import BETWEEN, QUIET, SHARE, Lines, bar


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Log:
    """What is written, and when."""

    def __init__(self) -> None:
        self.clock, self.times, self.lines = Clock(), list[float](), list[str]()
        self.shown = Lines(self._write, self.clock)

    def _write(self, line: str) -> None:
        self.times.append(self.clock.now - 1000)
        self.lines.append(line)

    def work(self, what: str, steps: int, seconds: float, start: int = 0) -> None:
        """Counts the steps after `start`, each after so many seconds."""
        for done in range(start + 1, steps + 1):
            self.clock.now += seconds
            self.shown.count(what, done, steps)


def test_short_work_is_silent() -> None:
    log = Log()
    log.work("layers", 99, (QUIET - 1) / 99)
    assert log.lines == []


def test_a_line_tells_the_time_the_share_what_and_the_time_left() -> None:
    log = Log()
    log.work("layers", 211, 1.0)
    assert log.lines[0] == " 0:00:10    4 %  layers, 0:03:21 left"
    assert log.times == [10 + 30 * i for i in range(7)]


def test_long_work_has_a_line_for_every_twentieth() -> None:
    log = Log()
    log.work("step", 1000, 60.0)
    assert len(log.lines) == pytest.approx(1 / SHARE, abs=1)
    assert all(later - earlier >= 1000 * SHARE * 60 for earlier, later in pairwise(log.times))
    assert re.fullmatch(r"15:\d\d:00   9\d %  step, 0:\d\d:00 left", log.lines[-1])


def test_work_that_follows_begins_its_own_time_left() -> None:
    log = Log()
    log.work("training", 10, 100.0)
    log.work("measuring", 8, 40.0)
    measuring = [line for line in log.lines if "measuring" in line]
    assert measuring[0] == " 0:17:20   12 %  measuring", "nothing is known of its speed yet"
    assert measuring[1] == " 0:18:00   25 %  measuring, 0:04:00 left"
    assert len(measuring) == 7


def test_what_was_done_before_is_not_taken_for_speed() -> None:
    log = Log()
    log.work("step", 1000, 15.0, start=500)
    assert log.lines[0].endswith("50 %  step")
    assert log.lines[1].endswith("55 %  step, 1:52:15 left"), "449 steps of 15 seconds"


def test_stages_of_one_work_share_its_time_left() -> None:
    log = Log()
    for done, what in enumerate(("quantize", "lower", "write"), 1):
        log.clock.now += 60
        log.shown.count(what, done * 100, 1000)
    assert [line.split("  ")[-1] for line in log.lines] == ["quantize", "lower, 0:08:00 left", "write, 0:07:00 left"]


@given(st.lists(st.tuples(st.floats(0, 400), st.integers(0, 50), st.integers(1, 50)), max_size=60))
def test_lines_are_never_close_whatever_is_counted(counts: list[tuple[float, int, int]]) -> None:
    log = Log()
    for seconds, done, total in counts:
        log.clock.now += seconds
        log.shown.count("work", done, total)
    assert all(time >= QUIET for time in log.times)
    assert all(later - earlier >= BETWEEN - 1e-6 for earlier, later in pairwise(log.times))


def test_without_a_terminal_lines_go_to_stderr_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lobit.progress.QUIET", 0.0)
    with bar() as shown:
        shown.count("layers", 1, 2)
    told = capsys.readouterr()
    assert told.out == ""
    assert re.fullmatch(r" 0:00:00   50 %  layers\n", told.err)


def test_a_stderr_that_takes_nothing_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """As /dev/full."""

        def write(self, text: str) -> None:
            raise OSError("no space left")

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr("lobit.progress.QUIET", 0.0)
    monkeypatch.setattr(sys, "stderr", Full())
    with bar() as shown:
        shown.count("layers", 1, 2)
