"""One row of a benchmark in a process of its own, so that its peak of memory is its own: `python -m lobit.runtime.bench_row`.

A request comes as JSON on stdin, the answer goes as JSON to stdout; everything that a runtime prints goes to stderr.
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
    """What is timed."""

    phase: Literal["pp", "tg"]
    """`pp`: a prompt is read; `tg`: tokens are read one by one, as in generation."""
    tokens: int
    """That are timed."""
    depth: int = 0
    """Tokens in the cache before."""

    @property
    def name(self) -> str:
        """As llama-bench has it: `pp128`, `tg64@d2048`."""
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
    """Of prompts: until the first new token is chosen."""
    load_seconds: float
    """To open the engine, its Python modules already imported (`import_runtime`) and the files in the system's cache."""
    base_rss_bytes: int
    """The process's peak before the engine was opened: Python and the runtime's modules."""
    peak_rss_bytes: int
    """The process's peak at the end."""


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
        peak_rss_bytes=peak_rss_bytes(),
    )


def _sample(engine: Engine, work: Workload) -> tuple[int, int]:
    """Nanoseconds for the test's tokens, and until a token was chosen after the last; filling the cache is not timed."""
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
    """Always the same pseudo-random tokens: no dense runtime is faster for some than for others."""
    return [int(token) for token in np.random.default_rng(0).integers(0, vocab_size, size=count)]


def answer(text: str) -> dict[str, Any]:
    """The answer to a request in JSON: an `Answer`, or `{"error"}` with the message of a `LobitError`."""
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
