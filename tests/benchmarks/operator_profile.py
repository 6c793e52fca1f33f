"""A program alone in a process: how fast it reads and writes tokens, or which operators its time goes to.

    python tests/benchmarks/operator_profile.py PTE [-p 512] [-n 32] [-d 0] [-t THREADS]       milliseconds of each kind of operator
    python tests/benchmarks/operator_profile.py PTE --speeds [-p 128,512] [-n 32] [-d 0]       tokens a second
    ... --json                                                                                one object

PTE is any program whose `forward` is that of ExecuTorch's runners: tokens [1, T] and the position of the first [1], both INT64.
`--speeds` takes bundles of every target too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # lobit need not be installed

from lobit.quiet import quiet_native, quiet_python  # noqa: E402
from lobit.runtime.bench_row import tokens_to_read  # noqa: E402
from lobit.runtime.bundle import open_bundle  # noqa: E402
from lobit.runtime.engine import SteppingEngine, open_engine  # noqa: E402
from lobit.runtime.executorch import import_runtime  # noqa: E402

CHUNK = 512
"""That the programs are made with."""
ALL, BESIDE, BETWEEN = "all", "delegate, beside its operators", "between the calls"
"""Rows that are no operator: the whole of `forward`; what a delegate does besides computing; the program's own instructions."""


class Timed(ABC):
    """What reads tokens, timed."""

    vocab_size: int
    chunk = CHUNK
    """Most tokens in one call."""

    @abstractmethod
    def step(self, tokens: list[int], position: int) -> object:
        """Reads a chunk of tokens from a position on."""

    def read(self, tokens: list[int], position: int) -> None:
        """Reads tokens from a position on, in chunks."""
        for start in range(0, len(tokens), self.chunk):
            self.step(tokens[start : start + self.chunk], position + start)

    def prefill(self, count: int, depth: int) -> float:
        """Seconds to read a prompt at a depth."""
        tokens = tokens_to_read(self.vocab_size, count)
        start = perf_counter()
        self.read(tokens, depth)
        return perf_counter() - start

    def decode(self, count: int, depth: int) -> float:
        """Seconds to read tokens one by one from a depth on."""
        tokens = tokens_to_read(self.vocab_size, count)
        start = perf_counter()
        for i, token in enumerate(tokens):
            self.read([token], depth + i)
        return perf_counter() - start


class BundleProgram(Timed):
    """A bundle of any target, by its engine."""

    def __init__(self, folder: Path, threads: int) -> None:
        engine = open_engine(open_bundle(folder, hashes=False), threads)
        assert isinstance(engine, SteppingEngine)
        self.engine, self.vocab_size, self.chunk = engine, engine.vocab_size, engine.chunk

    def step(self, tokens: list[int], position: int) -> object:
        """See `Timed.step`."""
        return self.engine.step(tokens, position)


class Program(Timed):
    """A `.pte` and its thread pool.

    Args:
        path: of the file.
        threads: of the pool.
        profiled: keeps the time of each operator; ExecuTorch's profiler is slower than none.
    """

    def __init__(self, path: Path, threads: int, profiled: bool = False) -> None:
        native = import_runtime()
        with quiet_native():
            native._unsafe_reset_threadpool(threads)
            self.module = native._load_for_executorch(str(path), enable_etdump=profiled)
            (self.vocab_size,) = self.module.run_method("get_vocab_size", ())

    def step(self, tokens: list[int], position: int) -> object:
        """See `Timed.step`."""
        import torch

        return self.module.forward((torch.tensor([tokens]), torch.tensor([position])))

    def events(self) -> list[Any]:
        """The profiler's blocks since the last call: runs of the same instructions share one."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "profile.etdp"
            self.module.write_etdump_result_to_file(str(path), "")
            with quiet_python(), warnings.catch_warnings(action="ignore"):
                from executorch.devtools import Inspector

                return list(Inspector(etdump_path=str(path)).event_blocks)


def speeds(path: Path, threads: int, prompts: list[int], generate: int, depth: int) -> dict[str, float]:
    """Tokens a second of every test at a depth, one sample each: `{"pp128": …, "tg32": …}`.

    Loading, a first call of the longest prompt and of a single token, and filling the cache are not timed. Every test begins at
    `depth` anew: what it finds in the cache behind is overwritten, or of no meaning, which changes no time.
    """
    program = BundleProgram(path, threads) if path.is_dir() else Program(path, threads)
    program.prefill(depth or max(prompts), 0)
    if depth:
        program.prefill(max(prompts), depth)
    found = {f"pp{n}": n / program.prefill(n, depth) for n in prompts}
    program.decode(1, depth)
    return found | {f"tg{generate}": generate / program.decode(generate, depth)}


def profile(path: Path, threads: int, prompt: int, generate: int, depth: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each kind of operator, for a whole prompt and for a token: `{"pp512": {kind: …}, "token": {…}}`."""
    program = Program(path, threads, profiled=True)
    program.prefill(depth or prompt, 0)
    if depth:
        program.prefill(prompt, depth)
    program.events()  # the first calls are left out
    program.prefill(prompt, depth)
    found = {f"pp{prompt}": _by_kind(program.events(), 1)}
    program.decode(1, depth)
    program.events()
    program.decode(generate, depth)
    return found | {"token": _by_kind(program.events(), generate)}


def _by_kind(blocks: list[Any], runs: int) -> dict[str, float]:
    """Milliseconds a run, the longest first; operators of a delegate go by the names that XNNPACK gives them, without their number."""
    total: Counter[str] = Counter()
    for event in (event for block in blocks for event in block.events if event.perf_data is not None):
        name = re.sub(r" #\d+$", "", event.name)
        total["delegate: " + name if event.is_delegated_op else name] += sum(event.perf_data.raw) / runs
    whole, delegates = total.pop("Method::execute"), total.pop("DELEGATE_CALL", 0.0)
    total.pop("OPERATOR_CALL", None)  # encloses the operators, as DELEGATE_CALL does the delegates'
    found = {name.removeprefix("native_call_").removesuffix(".out").removesuffix("_out"): ms for name, ms in total.most_common()}
    inside = sum(ms for name, ms in found.items() if name.startswith("delegate: "))
    outside = sum(found.values()) - inside
    return {ALL: whole, **found, BESIDE: delegates - inside, BETWEEN: whole - delegates - outside}


def profile_table(found: dict[str, dict[str, float]], least: float = 0.01) -> list[str]:
    """The profile in Markdown; kinds that take less than `least` of every test share a row."""
    tests = list(found)
    kinds = list(dict.fromkeys(kind for test in tests for kind in found[test]))
    shares = {kind: [found[test].get(kind, 0.0) / found[test][ALL] for test in tests] for kind in kinds}
    small = [kind for kind in kinds if max(shares[kind]) < least]
    shown = sorted((kind for kind in kinds if kind not in small), key=lambda kind: -shares[kind][0])
    lines = [f"| operator | {' | '.join(f'{test}, ms | share' for test in tests)} |", "|---" * (1 + 2 * len(tests)) + "|"]
    for title, row in [*((kind, [kind]) for kind in shown), (f"{len(small)} kinds below {least:.0%}", small)]:
        sums = [sum(found[test].get(kind, 0.0) for kind in row) for test in tests]
        cells = (f"{ms:.2f} | {ms / found[test][ALL]:.0%}" for test, ms in zip(tests, sums, strict=True))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def numbers(text: str) -> list[int]:
    """`128,512` as a list."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("program", type=Path)
    parser.add_argument("-p", "--prompts", type=numbers, default=[512])
    parser.add_argument("-n", "--generate", type=int, default=32)
    parser.add_argument("-d", "--depth", type=int, default=0)
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--speeds", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # what native code prints is no part of the result
        if given.speeds:
            with quiet_native():  # logs in every call
                found: dict[str, Any] = speeds(given.program, given.threads, given.prompts, given.generate, given.depth)
            lines = [f"{test}: {speed:.1f} tokens/s" for test, speed in found.items()]
        else:
            found = profile(given.program, given.threads, given.prompts[-1], given.generate, given.depth)
            lines = profile_table(found)
        out.write(json.dumps(found) if given.json else "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
