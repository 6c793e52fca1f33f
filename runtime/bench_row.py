"""Measures one row of a benchmark, in a process of its own for the sake of its peak memory: `python -m lobit.runtime.bench_row`.

The request is read as JSON from stdin, and the answer is written as JSON to stdout; everything that a runtime prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from time import perf_counter, perf_counter_ns
from typing import Any, Literal

import numpy as np

from lobit.errors import LobitError
from lobit.memory import peak_rss_bytes
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import Engine, import_runtime, open_engine


@dataclass(frozen=True)
class Workload:
    """A test: what is timed."""

    phase: Literal["pp", "tg"]
    """`pp`: a prompt is read; `tg`: tokens are read one by one, as in generation."""
    tokens: int
    """Number of tokens that are timed."""
    depth: int = 0
    """Number of tokens in the cache before them."""

    @property
    def name(self) -> str:
        """The test's name as llama-bench writes it: `pp128`, `tg64@d2048`."""
        return f"{self.phase}{self.tokens}" + (f"@d{self.depth}" if self.depth else "")


@dataclass(frozen=True)
class Request:
    """A row to measure."""

    bundle: str
    work: Workload
    threads: int
    repetitions: int


@dataclass(frozen=True)
class Answer:
    """A row measured."""

    samples_ns: list[int]
    """Each repetition's time for all timed tokens."""
    first_token_ns: list[int] | None
    """Each repetition's time until the first new token is chosen; None where no prompt is read."""
    load_seconds: float
    """Time to open the engine when its Python modules are imported (`import_runtime`) and the files are in the system's cache."""
    base_rss_bytes: int
    """The process's peak before the engine was opened: Python and the runtime's modules."""
    peak_rss_bytes: int
    """The process's peak at the end, and that of the process in which the program runs, where this is another."""


def measure(request: Request) -> Answer:
    """Opens the bundle's engine and times the test.

    Raises:
        BundleError: the bundle cannot be opened or run.
        MissingPartError: the runtime is not installed.
    """
    bundle = open_bundle(request.bundle, hashes=False)
    import_runtime(bundle)
    base = peak_rss_bytes()
    start = perf_counter()
    engine = open_engine(bundle, request.threads)
    load_seconds = perf_counter() - start
    times = [_sample(engine, request.work) for _ in range(1 + request.repetitions)][1:]  # the first one warms up
    return Answer(
        samples_ns=[timed for timed, _ in times],
        first_token_ns=[first for _, first in times] if request.work.phase == "pp" else None,
        load_seconds=load_seconds,
        base_rss_bytes=base,
        peak_rss_bytes=peak_rss_bytes() + (peak_rss_bytes(engine.served_by) if engine.served_by else 0),
    )


def _sample(engine: Engine, work: Workload) -> tuple[int, int]:
    """Nanoseconds for the test's tokens, and for these and the choice of the next token; filling the cache is not timed."""
    tokens = tokens_to_read(engine.vocab_size, work.depth + work.tokens)
    before, timed = tokens[: work.depth], tokens[work.depth :]
    engine.reset()
    if before:
        engine.prefill(before)
    start = perf_counter_ns()
    if work.phase == "pp":
        logits = engine.prefill(timed)
    else:
        for token in timed:
            logits = engine.decode(token)
    end = perf_counter_ns()
    logits.argmax()
    return end - start, perf_counter_ns() - start


def tokens_to_read(vocab_size: int, count: int) -> list[int]:
    """Pseudo-random tokens, always the same ones: no dense runtime is faster for some tokens than for others."""
    return [int(token) for token in np.random.default_rng(0).integers(0, vocab_size, size=count)]


def answer(text: str) -> dict[str, Any]:
    """Measures what a request in JSON asks for. Returns the fields of an `Answer`, or `{"error"}` with the message of a `LobitError`."""
    values = json.loads(text)
    request = Request(**{**values, "work": Workload(**values["work"])})
    try:
        return asdict(measure(request))
    except LobitError as error:
        return {"error": str(error)}


def main() -> None:
    """Reads one request, writes one answer."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # what native code prints is no part of the answer
        json.dump(answer(sys.stdin.read()), out)


if __name__ == "__main__":
    main()
