"""`lobit bench`: makes a table like llama-bench's, and measures each row in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import lobit
from lobit.errors import InputError, LobitError
from lobit.progress_callback import Progress
from lobit.runtime.bench_row import Answer, Request, Workload
from lobit.runtime.bench_table import bench_table as bench_table
from lobit.runtime.bundle import Bundle, open_bundle
from lobit.runtime.engine import default_threads
from lobit.runtime.host import cpu, memory_bandwidth
from lobit.runtime.manifest import CacheInfo, Manifest
from lobit.targets import TARGETS

READ_BY_ROW = {"embedding", "embedding scales", "tables"}
"""Kinds of weights of which each token reads only one row."""
VERSIONED = ("torch", *(package for target in TARGETS.values() for package in target.packages))
WHAT = (
    "ppN: a prompt of N tokens is read at once; tgN: N tokens are read one by one; @dD: with D tokens in the cache before. "
    "Timed: the engine's prefill or decode calls, until the logits are in Python. Not timed: loading, one warm-up, tokenizing, "
    "sampling, filling the cache to its depth. Tokens are pseudo-random and always the same. Each row ran in a fresh process; "
    "its peak memory is the whole process's (base_rss_bytes: before the model was loaded). first_token_ms: from the start of the "
    "prompt until the likeliest token is chosen. gigabytes_per_second: the weights and the filled part of the cache that a token "
    "must read, over its time; bandwidth_share: that over the memory bandwidth measured in the same run with as many threads, "
    "above 1 where the processor's caches hold the model."
)


def bench(
    bundles: Sequence[Path | str],
    prompts: Sequence[int] = (128,),
    generates: Sequence[int] = (64,),
    depths: Sequence[int] = (0,),
    threads: int | None = None,
    repetitions: int = 5,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Times every bundle. The bundles take turns at each test, so that a drift of the machine's speed affects all alike.

    Args:
        bundles: the bundles' folders.
        prompts: lengths of prompts in tokens, may be empty.
        generates: numbers of generated tokens, may be empty.
        depths: tokens in the cache before the timed ones.
        threads: number of the runtime's threads; None: what each bundle says, or one per core.
        repetitions: timed samples of each row.
        progress: called before each row and at the end.

    Returns:
        `{"kind", "rows", "skipped", "what", "device", "cpu", "memory_bandwidth_gb_s", "memory_bandwidth", "versions"}`. The rows
        are those of `row_of`, in the order of the bundles; `skipped` names each test that does not fit a bundle's context, and why.

    Raises:
        InputError: a number is out of range, nothing is to be timed, or two bundles have the same name.
        BundleError: a bundle is not as export wrote it.
        LobitError: a row's process failed; the message comes from that process.
    """
    works = workloads(prompts, generates, depths)
    if (threads is not None and threads < 1) or repetitions < 1:
        raise InputError(f"{threads} threads and {repetitions} repetitions: give at least 1 of each")
    opened = [open_bundle(folder) for folder in bundles]
    check_names(opened)
    rows_to_run, skipped = fitting(opened, works)
    counts = [threads or default_threads(bundle) for bundle in opened]
    host, bandwidth = cpu(), memory_bandwidth(max(counts))
    measured: list[tuple[int, dict[str, Any]]] = []
    for done, (number, work) in enumerate(rows_to_run):
        bundle = opened[number]
        if progress:
            progress(f"{bundle.manifest.name} {work.name}", done, len(rows_to_run))
        answer = run_row(Request(str(bundle.folder), work, counts[number], repetitions))
        measured.append((number, row_of(bundle.manifest, work, answer, counts[number], bandwidth.gb_s)))
    if progress:
        progress("all rows", len(rows_to_run), len(rows_to_run))
    return {
        "kind": "bench",
        "rows": [row for _, row in sorted(measured, key=lambda entry: entry[0])],
        "skipped": skipped,
        "what": WHAT,
        "device": f"host: {host['name']}",
        "cpu": host,
        "memory_bandwidth_gb_s": bandwidth.gb_s,
        "memory_bandwidth": asdict(bandwidth),
        "versions": _versions(),
    }


def workloads(prompts: Sequence[int], generates: Sequence[int], depths: Sequence[int]) -> list[Workload]:
    """The tests: every length of a prompt and every length of a generated text, at every depth.

    Raises:
        InputError: a length below 1, a depth below 0, or no test at all.
    """
    wrong = [str(n) for n in (*prompts, *generates) if n < 1] + [f"depth {depth}" for depth in depths if depth < 0]
    if wrong:
        raise InputError(f"{', '.join(wrong)} cannot be timed: lengths are at least 1, depths at least 0")
    works = [Workload("pp", n, depth) for depth in depths for n in prompts]
    works += [Workload("tg", n, depth) for depth in depths for n in generates]
    if not works:
        raise InputError("there is nothing to time: give lengths of prompts (-p) or of generated texts (-n), and depths (-d)")
    return list(dict.fromkeys(works))


def check_names(bundles: Sequence[Bundle]) -> None:
    """Refuses bundles of the same name: the name is all that tells their rows apart."""
    names = [bundle.manifest.name for bundle in bundles]
    if not names:
        raise InputError("there is no bundle to time: give the folder of at least one")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{len(names)} bundles, and more than one is named {', '.join(twice)}: time them in separate runs")


def fitting(bundles: Sequence[Bundle], works: Sequence[Workload]) -> tuple[list[tuple[int, Workload]], list[dict[str, str]]]:
    """Returns the rows to run as (index of the bundle, test), and the rows that are longer than the bundle's context."""
    rows, skipped = [], []
    for work in works:
        for number, bundle in enumerate(bundles):
            needed, context = work.depth + work.tokens, bundle.manifest.context
            if needed <= context:
                rows.append((number, work))
            else:
                why = f"{needed} tokens are more than the context of {context}"
                skipped.append({"model": bundle.manifest.name, "test": work.name, "why": why})
    return rows, skipped


def run_row(request: Request) -> Answer:
    """Measures one row in a fresh process.

    Raises:
        LobitError: the measurement failed, or its process ended without an answer.
    """
    paths = [str(Path(lobit.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lobit.runtime.bench_row"],
        input=json.dumps(asdict(request)),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        check=False,
    )
    try:
        values = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.strip().splitlines()[-3:]
        raise LobitError(
            f"{request.work.name} of {request.bundle} ended without an answer, exit code {done.returncode} (-9: mostly no memory "
            "left): try a shorter one, or a smaller model\n" + "\n".join(f"  {line}" for line in last)
        ) from None
    if "error" in values:
        raise LobitError(values["error"])
    return Answer(**values)


def row_of(manifest: Manifest, work: Workload, answer: Answer, threads: int, bandwidth: float) -> dict[str, Any]:
    """A row of the result.

    Args:
        manifest: the bundle's manifest.
        work: what was timed.
        answer: what was measured.
        threads: number of the runtime's threads.
        bandwidth: memory bandwidth in GB/s.
    """
    speeds = [work.tokens / nanoseconds * 1e9 for nanoseconds in answer.samples_ns]
    speed = statistics.fmean(speeds)
    read = bytes_per_token(manifest, work) * speed / 1e9 if work.phase == "tg" else None
    first = answer.first_token_ns
    return {
        "model": manifest.name,
        "model_bytes": manifest.program_bytes,
        "params": manifest.model.parameters,
        "target": manifest.target,
        "recipe": manifest.recipe.get("name"),
        "threads": threads,
        "test": work.name,
        "tokens": work.tokens,
        "depth": work.depth,
        "samples_ns": answer.samples_ns,
        "tokens_per_second": speed,
        "stddev": statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
        "first_token_ms": statistics.fmean(first) / 1e6 if first else None,
        "load_seconds": answer.load_seconds,
        "base_rss_bytes": answer.base_rss_bytes,
        "peak_rss_bytes": answer.peak_rss_bytes,
        "kv_cache_bytes": manifest.cache.bytes,
        "gigabytes_per_second": read,
        "bandwidth_share": None if read is None else read / bandwidth,
    }


def bytes_per_token(manifest: Manifest, work: Workload) -> float:
    """Bytes that decoding a token must read from memory: the mean over the test's tokens.

    Every weight is read once. Of an embedding and of tables only one row is read, which is not counted; where the bundle has no
    weights of kind `head`, the embedding is the head and is read whole, without the scales that only its rows need. The keys and
    values of every token that the new one sees are read too, itself included, in each layer at most as many as it has slots. A
    runtime that reads more (a whole cache, weights twice) uses more of the bandwidth than this shows.
    """
    tied = all(group.kind != "head" for group in manifest.weights)
    by_row = READ_BY_ROW - {"embedding"} if tied else READ_BY_ROW
    weights = sum(group.bytes for group in manifest.weights if group.kind not in by_row)
    positions = range(work.depth + 1, work.depth + work.tokens + 1)
    return weights + statistics.fmean(_cache_bytes(manifest.cache, position) for position in positions)


def _cache_bytes(cache: CacheInfo, tokens: int) -> float:
    """Bytes of the keys, values and scales of `tokens` tokens; a slot has the same size in all layers."""
    slots = sum(cache.slots)
    return cache.bytes * sum(min(tokens, size) for size in cache.slots) / slots if slots else 0.0


def _versions() -> Mapping[str, str]:
    """Versions of Python, lobit and the runtimes that are installed."""
    found = {"python": sys.version.split()[0], "lobit": lobit.__version__}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
