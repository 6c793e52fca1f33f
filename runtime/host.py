"""The machine that a measurement runs on: its processor and the speed of its memory."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil

INSTRUCTION_SETS = (
    *("avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "sme"),
)
"""Instruction sets that the kernels of small models use, under Linux's names."""
BLOCK = 1 << 30
PASSES = 5
SYSTEM = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Logical processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu() -> dict[str, Any]:
    """`{"name", "instruction_sets", "cores", "threads", "load_average"}`: `cores` are physical, `threads` usable logical processors.

    `load_average` is the number of busy processors over the last minute (None on Windows): it shows what else ran on the machine.
    """
    fields = _cpuinfo()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "name": fields.get("model name") or _other_name(fields),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cores": psutil.cpu_count(logical=False) or usable_cores(),
        "threads": usable_cores(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor in Linux's /proc/cpuinfo; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _other_name(fields: dict[str, str]) -> str:
    """The processor's name where /proc/cpuinfo has none: on macOS, and on Linux on Arm, where it has numbers instead."""
    if sys.platform == "darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    parts = [f"{key} {fields[key]}" for key in ("CPU implementer", "CPU part") if key in fields]
    return " ".join([platform.processor() or platform.machine(), *parts])


@dataclass(frozen=True)
class Bandwidth:
    """How fast memory is read."""

    gb_s: float
    """10⁹ bytes a second; the median of several passes."""
    block_bytes: int
    """Bytes that are read in each pass."""
    threads: int
    samples: list[float]


def memory_bandwidth(threads: int, block_bytes: int | None = None) -> Bandwidth:
    """Measures how fast a block much larger than the caches is read, one part of it by each thread.

    Args:
        threads: number of threads that read at the same time.
        block_bytes: None: 1 GiB, or four times the last-level caches where that is more, but at most a quarter of the free memory.
    """
    if block_bytes is None:
        wanted = max(BLOCK, -(-4 * last_level_cache_bytes() // BLOCK) * BLOCK)
        block_bytes = min(wanted, psutil.virtual_memory().available // 4)
    words = np.empty(max(block_bytes // 8, threads), dtype=np.uint64)
    parts = np.array_split(words, threads)
    samples = []
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: part.fill(1), parts))  # pages that were never written are all the same page of zeros
        for _ in range(PASSES):
            start = perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))  # releases the lock, and its arithmetic is not slower than memory
            samples.append(words.nbytes / (perf_counter() - start) / 1e9)
    return Bandwidth(statistics.median(samples), words.nbytes, threads, samples)


def last_level_cache_bytes() -> int:
    """Size of all last-level caches together; 0 where the system does not say."""
    sizes = {}
    for folder in SYSTEM.glob("cpu[0-9]*/cache/index[3-4]"):
        try:
            text = (folder / "size").read_text().strip()
            shared = (folder / "shared_cpu_list").read_text().strip()
            sizes[folder.name, shared] = int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)
        except (OSError, ValueError):
            continue
    return sum(sizes.values())
