"""`lobit bench --device emulated-arm64`: counts the instructions that the phone's library executes for a token, in an emulator."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lobit.errors import BundleError
from lobit.progress_callback import Progress
from lobit.runtime import bench
from lobit.runtime.bench_row import Workload, tokens_to_read
from lobit.runtime.bundle import Bundle, open_bundle
from lobit.runtime.executorch_android import Server
from lobit.targets import Device

MORE = 2
"""How often a test runs in the longer of two processes beyond the shorter one: what loading takes is then in neither figure."""
WHAT = (
    "Instructions that one thread of the phone's arm64 library executes for a token, counted in an emulator: the difference of two runs, "
    "over the tokens by which they differ. The figure does not depend on the machine. It includes the Java side of each call, and says "
    "nothing of how long a phone takes: an instruction may multiply one number or 64, and waiting for memory is none."
)
COUNTED = re.compile(rb"instructions: (\d+)")


def bench_instructions(
    bundles: Sequence[Path | str],
    device: Device,
    prompts: Sequence[int] = (128,),
    generates: Sequence[int] = (64,),
    depths: Sequence[int] = (0,),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Counts for every bundle and test.

    Args:
        bundles: the bundles' folders.
        device: kind `emulated-arm64`, with the processor to emulate.
        prompts: lengths of prompts in tokens, may be empty.
        generates: numbers of generated tokens, may be empty.
        depths: tokens in the cache before.
        progress: called before each row and at the end.

    Returns:
        `{"kind": "instructions", "rows": [{"model", "recipe", "test", "tokens", "depth", "instructions_per_token"}], "skipped", "device",
        "what"}`.

    Raises:
        InputError: a number is out of range, nothing is to be counted, or two bundles have the same name.
        BundleError: a bundle is not as export wrote it, or the library refuses it.
        MissingPartError: something that is needed to run it is missing.
    """
    works = bench.workloads(prompts, generates, depths)
    opened = [open_bundle(folder) for folder in bundles]
    bench.check_names(opened)
    fitting, skipped = bench.fitting(opened, works)
    rows = []
    for done, (number, work) in enumerate(fitting):
        manifest = opened[number].manifest
        if progress:
            progress(f"{manifest.name} {work.name}", done, len(fitting))
        once, more = (instructions(opened[number], work, device, times) for times in (1, 1 + MORE))
        told = {"model": manifest.name, "recipe": manifest.recipe.get("name"), "test": work.name}
        counted = {"tokens": work.tokens, "depth": work.depth, "instructions_per_token": (more - once) / (MORE * work.tokens)}
        rows.append({**told, **counted})
    if progress:
        progress("all rows", len(fitting), len(fitting))
    return {"kind": "instructions", "rows": rows, "skipped": skipped, "device": str(device), "what": WHAT}


def instructions(bundle: Bundle, work: Workload, device: Device, times: int) -> int:
    """Instructions of a process that loads a bundle, fills the cache to the test's depth and runs the test some times at that depth.

    Raises:
        BundleError: the emulator told no count.
    """
    server, chunk, end = Server(bundle, 1, device, count=True), bundle.manifest.chunk, work.depth + work.tokens
    tokens = tokens_to_read(bundle.manifest.model.vocab_size, end)

    def read(start: int, stop: int, length: int) -> None:
        for position in range(start, stop, length):
            server.step(tokens[position : min(position + length, stop)], position)

    read(0, work.depth, chunk)
    for _ in range(times):
        read(work.depth, end, chunk if work.phase == "pp" else 1)
    server.close()
    assert server.process.stderr is not None
    said = server.process.stderr.read()
    found = COUNTED.search(said)
    if found is None:
        last = said[-200:].decode("utf-8", "replace")
        raise BundleError(f"the emulator told no count of instructions ({last}): is it qemu-user 7.2 or later?")
    return int(found[1])
