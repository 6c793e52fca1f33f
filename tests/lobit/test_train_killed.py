"""`lobit train` killed at any step goes on to the same bits; several processes train as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.nn import functional as F

from lobit.checkpoint import load_model
from lobit.quant_recipes.quantized import load_checkpoint
from lobit.verbs.learn import STEPS
from tests.lobit.test_train_command import losses, same_weights

DONE = 0
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
STAGE = 20
"""Steps of the first stage; of Bonsai 30 more follow."""
PROGRAM = """
from dataclasses import replace
from lobit import cli
from lobit.quant_recipes import schedule

schedule.RECIPES["bonsai"] = replace(schedule.RECIPES["bonsai"], tuning_samples=8, tuning_epochs=30)
cli.main()
"""
"""The command, its second stage shorter than the recipe's."""


@pytest.fixture
def process(stories: Path, sample: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """`process(recipe, out, processes=1, *options)`: a training in processes of its own, a checkpoint after every step."""
    program, text = tmp_path / "program.py", tmp_path / "text.txt"
    program.write_text(PROGRAM, encoding="utf-8")
    text.write_text(sample.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    told = ["--text", text, "--length", 16, "--batch", 4, "--steps", STAGE, "--precision", "float32", "--checkpoint-minutes", 0, "--json"]

    def start(recipe: str, out: Path, processes: int = 1, *options: Any) -> subprocess.Popen[str]:
        several = [*TORCHRUN, processes] if processes > 1 else []
        command = [sys.executable, *several, program, "train", stories, "--recipe", recipe, "-o", out, *told, *options]
        return subprocess.Popen([str(part) for part in command], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def finished(running: subprocess.Popen[str]) -> None:
    _, err = running.communicate(timeout=300)
    assert running.returncode == DONE, err


def kill(running: subprocess.Popen[str], steps: Path, after: int) -> int:
    """Kills a training with all its processes when more than `after` steps are kept; the steps that are."""
    while running.poll() is None:
        kept = [int(path.name[5:]) for path in steps.glob("step-*") if path.suffix == ""]
        if max(kept, default=0) > after:
            for each in [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]:
                each.kill()
            running.communicate()
            assert running.returncode == -signal.SIGKILL
            return max(kept)
        time.sleep(0.002)
    raise AssertionError(running.communicate()[1])


def check_killed(process: Any, tmp_path: Path, recipe: str, after: tuple[int, ...], processes: int = 1) -> None:
    """A run that is killed after each of these steps ends as an undisturbed one."""
    finished(process(recipe, tmp_path / "undisturbed", processes))
    out, seen = tmp_path / "out", [0]
    for steps in after:
        seen.append(kill(process(recipe, out, processes), tmp_path / "out.partial" / STEPS, max(steps, seen[-1])))
        assert not out.exists()
    assert seen == sorted(set(seen))
    finished(process(recipe, out, processes))
    assert same_weights(out, tmp_path / "undisturbed")
    assert losses(out) == losses(tmp_path / "undisturbed")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "undisturbed", "program.py", "text.txt"}


def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(process: Any, tmp_path: Path) -> None:
    check_killed(process, tmp_path, "w4-channel-learned", (1,))


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "after"), [("8da8w", (0, 5, 12)), ("bonsai", (2, STAGE + 1, STAGE + 8))], ids=["8da8w", "bonsai"])
def test_a_run_killed_again_and_again_ends_with_the_same_bits(recipe: str, after: tuple[int, ...], process: Any, tmp_path: Path) -> None:
    """Bonsai in its second stage too."""
    check_killed(process, tmp_path, recipe, after)


# --- several processes ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp", "8da8w", "w4-channel-learned", "bitnet", "bonsai"])
def test_two_processes_train_as_one(recipe: str, process: Any, tmp_path: Path, stories: Path) -> None:
    """Sums in another order end in other last bits; with a low rate none of them turns an integer."""
    for processes, name in ((1, "one"), (2, "two")):
        finished(process(recipe, tmp_path / name, processes, "--learning-rate", 1e-4, "--steps", 8))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
    read = load_model if recipe == "fp" else lambda folder: load_checkpoint(folder)[0]
    tokens = torch.arange(1, 65)[None]
    one, two = (read(tmp_path / name)(tokens).flatten(0, 1).log_softmax(1) for name in ("one", "two"))
    assert F.kl_div(two, one, log_target=True, reduction="batchmean") < 0.01
    records = [json.loads((tmp_path / name / "training.json").read_text(encoding="utf-8")) for name in ("one", "two")]
    assert [record["settings"]["run"]["micro_batch"] for record in records] == [4, 2]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(path.name for path in (tmp_path / "one").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "after"), [("8da8w", (1, 5)), ("bonsai", (STAGE + 1,))], ids=["8da8w", "bonsai"])
def test_two_processes_that_are_killed_go_on(recipe: str, after: tuple[int, ...], process: Any, tmp_path: Path) -> None:
    check_killed(process, tmp_path, recipe, after, processes=2)


@pytest.mark.slow
def test_two_processes_refuse_a_batch_of_odd_size(stories: Path, sample: Path, tmp_path: Path) -> None:
    told = ["--text", sample, "--length", 16, "--batch", 3, "--steps", 2, "-o", tmp_path / "out", "--recipe", "fp"]
    command = [sys.executable, *TORCHRUN, 2, "-m", "lobit.cli", "train", stories, *told]
    done = subprocess.run([str(part) for part in command], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != DONE
    assert "--batch 3 is no multiple of 2 processes times --micro-batch 1: take 4" in done.stderr
    assert list(tmp_path.iterdir()) == []
