"""`lobit bench` for programs that an emulator runs here: what is true of them without a device, and no times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lobit.errors import InputError
from lobit.runtime.bundle import Bundle, open_bundle
from lobit.targets import TARGETS

NOTHING = "nothing is timed: the speed of what stands for the device here says nothing of a phone."
READ = (
    "A call reads so many bytes from memory, as the device's compiler expects: divided by the memory's bandwidth, that is a bound on the "
    "time of a token which no device has confirmed."
)


def bench_compiled(folders: Sequence[Path | str]) -> dict[str, Any]:
    """The sizes of programs, and the bytes that each of their methods reads.

    Returns:
        `{"kind": "compiled", "rows": [{"model", "target", "recipe", "soc", "method", "tokens", "read_bytes", "operators", "delegates",
        "program_bytes", "cache_bytes"}], "device", "what"}`, a row for each method.

    Raises:
        InputError: some bundles are for a target that is timed here.
    """
    opened = [open_bundle(folder) for folder in folders]
    timed = [bundle.manifest.name for bundle in opened if not TARGETS[bundle.manifest.target].emulated]
    if timed:
        raise InputError(f"{', '.join(timed)} can be timed here and the others cannot: measure these in a call of their own")
    rows = [row for bundle in opened for row in _rows(bundle)]
    what = f"{NOTHING} {READ}" if any(row["read_bytes"] for row in rows) else NOTHING
    devices = dict.fromkeys(str(TARGETS[bundle.manifest.target].emulated) for bundle in opened)
    return {"kind": "compiled", "rows": rows, "device": ", ".join(devices), "what": what}


def is_compiled(folder: Path | str) -> bool:
    """Whether a bundle's program runs in an emulator here."""
    target = open_bundle(folder, hashes=False).manifest.target
    return target in TARGETS and TARGETS[target].emulated is not None


def _rows(bundle: Bundle) -> list[dict[str, Any]]:
    manifest = bundle.manifest
    common = {"model": manifest.name, "target": manifest.target, "recipe": manifest.recipe["name"], "soc": manifest.options.get("soc")}
    sizes = {
        "operators": sum(manifest.delegation.delegated.values()),
        "delegates": manifest.delegation.partitions,
        "program_bytes": manifest.program_bytes,
        "cache_bytes": manifest.cache.bytes,
    }
    return [
        {
            **common,
            "method": method.name,
            "tokens": manifest.chunk if method.role == "prefill" else 1,
            "read_bytes": manifest.delegation.read_bytes.get(method.name),
            **sizes,
        }
        for method in manifest.methods
    ]
