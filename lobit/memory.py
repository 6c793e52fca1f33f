"""How much memory this process has needed, how much there is, and how much it may have."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from lobit.errors import LobitError

LEAST_ADDRESS_SPACE = 4 << 30
"""Bytes that PyTorch and a target's exporter map before any work, and a reserve; with less they fail, some of them without a message."""


def peak_rss_bytes(process: int | None = None) -> int:
    """The most resident memory that a process has held, shared libraries and mapped files included.

    Args:
        process: the id of another process, which Linux and Windows tell of, elsewhere 0; None: this one.
    """
    if sys.platform == "linux":
        # ru_maxrss also counts what the parent held when it started this process; VmHWM begins anew.
        status = Path(f"/proc/{process or 'self'}/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process(process).memory_info().peak_wset)
    if process is not None:
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def address_space() -> float:
    """Bytes of address space that this process may have; infinite where nothing limits it."""
    if sys.platform == "win32":
        return math.inf
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


def check_address_space() -> None:
    """Refuses a limit under which the libraries cannot start.

    Raises:
        LobitError: fewer than `LEAST_ADDRESS_SPACE` bytes are allowed.
    """
    if address_space() < LEAST_ADDRESS_SPACE:
        raise LobitError(
            f"there is not enough memory: this process may have {address_space()} bytes of address space, its libraries need "
            f"{LEAST_ADDRESS_SPACE}: allow more (ulimit -v)"
        )


def _machine() -> tuple[int, int]:
    """Bytes of memory that are free for programs, and in all; on Linux without a package, because there may be no memory to load one."""
    if sys.platform == "linux":
        lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        sizes = {words[0]: int(words[1]) << 10 for words in lines}
        return sizes["MemAvailable:"], sizes["MemTotal:"]
    import psutil

    system = psutil.virtual_memory()
    return system.available, system.total


def describe() -> str:
    """How much this process has needed, how much there is, and how much it may have."""
    free, total = _machine()
    told = f"this process has needed {peak_rss_bytes()} bytes, {free} of the machine's {total} are free"
    return told if address_space() == math.inf else f"{told}, {address_space()} of address space are allowed (ulimit -v)"
