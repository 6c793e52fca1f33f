"""Interruptions, kills, and two commands in one place: one message, the exit code, nothing half-written."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ENVIRONMENT, PATIENCE, assert_one_message, ended, lobit_command


def _heed_signals() -> None:
    """Whoever started the tests may have had them ignored (nohup, a shell's background)."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def running(out: Path, *arguments: Any, before: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """A command at work: its unfinished folder is there."""
    command = [*before, *lobit_command(*arguments, "-o", out)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd="/",
        start_new_session=True,
        preexec_fn=_heed_signals,
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not (out.with_name(out.name + ".partial") / ".writer").is_file():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_an_interruption_is_one_line_and_leaves_what_was_finished(number: signal.Signals, slow_model: Path, tmp_path: Path) -> None:
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "file").write_text("x")
    with running(tmp_path / "out", "quantize", slow_model, "--recipe", "8da4w-g32") as process:
        os.killpg(process.pid, number)
        done = finish(process)
    assert_one_message(done, "interrupted", code=128 + number)
    assert [path.name for path in tmp_path.iterdir()] == ["finished"]
    assert (tmp_path / "finished" / "file").read_text() == "x"


DROPPED = """
import signal, sys, time
from lobit.exit_messages import one_message

class Finalized:
    def __del__(self):
        signal.raise_signal(int(sys.argv[1]))

with one_message():
    Finalized()
    for _ in range(600):
        time.sleep(0.1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_an_interruption_in_a_finalizer_is_not_lost(number: signal.Signals) -> None:
    """Python drops what is raised there, and PyTorch's exporter is full of such callbacks."""
    done = ended([sys.executable, "-c", DROPPED, str(int(number))], preexec_fn=_heed_signals)
    assert_one_message(done, "interrupted", code=128 + number)


IN_CPLUSPLUS = """
import logging, signal, sys, torch
from lobit.exit_messages import one_message

class Size:
    def is_int(self):
        signal.raise_signal(int(sys.argv[1]))

with one_message():
    try:
        torch.empty_strided((1, torch.SymInt(Size())), (1, 1))
    except TypeError:
        logging.getLogger("torch").exception("fake tensor raised TypeError")  # as PyTorch's exporter does
        raise
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_an_interruption_that_pytorch_tells_as_another_error_is_one(number: signal.Signals) -> None:
    """Its C++ calls Python for symbolic sizes, and raises a TypeError of what it finds raised there."""
    done = ended([sys.executable, "-c", IN_CPLUSPLUS, str(int(number))], preexec_fn=_heed_signals)
    assert_one_message(done, "interrupted", code=128 + number)


def test_a_signal_that_is_ignored_stays_ignored(slow_model: Path, tmp_path: Path) -> None:
    """As `nohup` has it."""
    ignoring = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    with running(tmp_path / "out", "quantize", slow_model, "--recipe", "8da4w-g32", before=ignoring) as process:
        os.killpg(process.pid, signal.SIGHUP)
        assert finish(process).returncode == 0


def test_of_two_in_one_place_the_second_is_refused_and_the_first_finishes(slow_model: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", ("quantize", slow_model, "--recipe", "8da4w-g32")
    with running(out, *work) as first:
        first.send_signal(signal.SIGSTOP)
        second = ended(lobit_command("quantize", "demo", "--recipe", "fp", "-o", out))
        assert_one_message(second, f"{out}.partial is being written by process {first.pid} on ", "wait until it is done")
        first.send_signal(signal.SIGCONT)
        assert finish(first).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "recipe.json"]


def test_what_a_killed_process_leaves_is_no_obstacle(slow_model: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", ("quantize", slow_model, "--recipe", "8da4w-g32")
    with running(out, *work) as process:
        process.kill()
        process.wait()
        assert (tmp_path / "out.partial").is_dir()
    assert ended(lobit_command(*work, "-o", out)).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_an_interrupted_export_goes_on_or_begins_anew(tmp_path: Path) -> None:
    out, work = tmp_path / "out", ("export", "demo", "--recipe", "8da4w-g32", "--target", "xnnpack", "--context", "64")
    for seconds in (0.0, 2.0, 4.0):
        (tmp_path / "out.partial" / ".writer").unlink(missing_ok=True)  # of the run before
        with running(out, *work) as process:
            time.sleep(seconds)
            os.killpg(process.pid, signal.SIGINT)
            done = finish(process)
        if out.is_dir():
            break
        assert_one_message(done, "interrupted", code=130)
        assert not (tmp_path / "out.partial").exists() or "the same command goes on from there" in done.stderr
    if not out.is_dir():
        assert ended(lobit_command(*work, "-o", out)).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert ended(lobit_command("verify", out, "demo")).returncode == 0
