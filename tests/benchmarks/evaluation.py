"""How fast `lobit eval` answers, beside lm-evaluation-harness's Hugging Face backend, in one run.

`python tests/benchmarks/evaluation.py MODEL BUNDLE... --tasks FILE...`, in an environment with `lobit[harness]`. Every round times each
way once on the same items, one after the other, so that what else the machine does falls on all of them. What is timed: likelihoods from
tokens, without loading and without tokenizing. Prints a table, with each round's figure.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM

from lobit.runtime.engine import Engine
from lobit.runtime.eval_requests import Encoder, Query, queries
from lobit.runtime.eval_run import Column
from lobit.runtime.eval_scoring import Reader
from lobit.runtime.eval_tasks import Task, read_task
from lobit.verbs.evaluate import STAGES, columns_of

BATCHES = (1, 16)
"""Sequences that the harness's backend computes at once."""
CONTEXT = 1024
Way = Callable[[Sequence[Query]], None]
"""Computes the likelihoods of items."""


def by_harness(model: str, batch: int) -> Way:
    """The harness's own backend, in float32."""
    lm = HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=batch, max_length=CONTEXT)

    def run(items: Sequence[Query]) -> None:
        requests = [(None, list(asked.context), list(asked.continuation)) for item in items for asked in item.asked]
        lm._loglikelihood_tokens(requests, disable_tqdm=True)

    return run


def by_engine(engine: Engine) -> Way:
    """A lobit engine, as `lobit eval` asks it."""

    def run(items: Sequence[Query]) -> None:
        reader = Reader(engine)
        for item in items:
            reader.score(item.asked)

    return run


def label(column: Column) -> str:
    """A column's name with its stage or target."""
    return f"lobit, {column.name}, {column.target or column.stage}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a float model's folder")
    parser.add_argument("bundles", nargs="*")
    parser.add_argument("--tasks", type=Path, nargs="+", required=True)
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    columns = columns_of([arguments.model, *arguments.bundles], None, STAGES, arguments.threads)
    encoder = Encoder(columns[0].tokenizer, min(CONTEXT, *(column.context for column in columns)))
    ways = {f"lm-eval's hf backend, batch {batch}": by_harness(arguments.model, batch) for batch in BATCHES}
    ways |= {label(column): by_engine(column.open(encoder.context)) for column in columns}
    print(f"| items a second | {' | '.join(path.stem for path in arguments.tasks)} | rounds |")
    print("|---" + "|--:" * len(arguments.tasks) + "|---|")
    found = [_timed(read_task(path).first(arguments.items), encoder, ways, arguments.rounds) for path in arguments.tasks]
    for name in ways:
        means = [f"{statistics.median(of_task[name]):.2f}" for of_task in found]
        rounds = "; ".join(", ".join(f"{value:.2f}" for value in of_task[name]) for of_task in found)
        print(f"| {name} | {' | '.join(means)} | {rounds} |")


def _timed(task: Task, encoder: Encoder, ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Items a second of each way in each round, after a first item that is not timed."""
    items = queries(task, encoder)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(items[:1])
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way(items)
            speeds[name].append(len(items) / (time.perf_counter() - start))
    return speeds


if __name__ == "__main__":
    main()
