"""Runs the compiler on the graphs of a model, once for a phone and once for the emulator, side by side."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from lobit.errors import TargetError
from lobit.export.qnn.compiler import CONTEXT, OPTIONS, WEIGHTS_FILE
from lobit.export.qnn.graph import Graph, write_graphs
from lobit.export.stages import Count
from lobit.runtime.qnn_libraries import library_folder
from lobit.stage_cache import StageCache

GRAPHS = "graphs"
SHARED, COPIED = "shared", "copied"
VARIANTS = {SHARED: True, COPIED: False}
"""Names of the variants, and whether methods share their weights: what ships does, and the emulator cannot load it."""
SUMMARY, LOG = "summary.json", "log"
COMPILER_BYTES, COMPILER_COPIES = 1_000_000_000, 9
"""Memory that the compiler takes, and for each byte of the weights' file; 10.3 GB were measured for one of 1.09 GB."""
WAIT = 0.1
"""Seconds between two looks at the compilers."""
READ = re.compile(r"DDR bandwidth summary =+.*?read_total_bytes=(\d+)", re.DOTALL)
REFUSED = re.compile(r"<E>\s*(.+)|\b(?:\w*Error|terminating with[^:]*): (.+)|^(QNN (?:gave|did).+)")
"""Lines of the compiler's log that say why it refuses a graph."""
TOLD = 3
"""Lines of the log that a message shows."""


@dataclass(frozen=True)
class Compiled:
    """A context binary and what came with it."""

    folder: Path

    @property
    def context(self) -> Path:
        """The context binary."""
        return self.folder / CONTEXT

    @property
    def options(self) -> bytes:
        """What ExecuTorch's delegate is opened with."""
        return (self.folder / OPTIONS).read_bytes()

    @property
    def read_bytes(self) -> list[int]:
        """Bytes that each graph reads from memory in a call, as the compiler estimates it."""
        found: list[int] = json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))
        return found


def compile_variants(
    graphs: Mapping[str, Graph], soc: str, kept: StageCache, count: Count = lambda done, total: None, names: Sequence[str] = tuple(VARIANTS)
) -> list[Compiled]:
    """The graphs, compiled in some variants; what an earlier run has finished is taken from there.

    Args:
        graphs: the graphs by the names of their methods.
        soc: the chip to compile for.
        kept: where the work is done, and what is finished is kept.
        count: called with how many variants are finished, and how many there are.
        names: of the variants (`VARIANTS`).

    Raises:
        MissingPartError: Qualcomm's libraries are not installed.
        TargetError: the compiler refuses the graphs; the message has what it said.
    """
    library_folder()
    missing = [name for name in names if not kept.has(name)]
    if missing:
        with kept.making(GRAPHS) as folder:
            folder.mkdir()
            write_graphs(graphs, folder)
        half = next(iter(graphs.values())).encodings is None
        _compile(kept, {name: options(soc, VARIANTS[name], half) for name in missing}, count)
    return [Compiled(kept.folder / name) for name in names]


def _compile(kept: StageCache, names: Mapping[str, bytes], count: Count) -> None:
    """Compiles variants, by their names and options, in a process each, side by side where there is memory; keeps each that ends well."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    waiting = list(names)
    folders = {name: kept.folder / f"{name}.compiling" for name in names}
    needed = COMPILER_BYTES + COMPILER_COPIES * (kept.folder / GRAPHS / WEIGHTS_FILE).stat().st_size
    side_by_side = len(names) * needed < psutil.virtual_memory().available
    try:
        while running or waiting:
            while waiting and (side_by_side or not running):
                name = waiting.pop(0)
                folders[name].mkdir(exist_ok=True)
                (folders[name] / OPTIONS).write_bytes(names[name])
                command = [sys.executable, "-m", "lobit.export.qnn.compiler", str(kept.folder / GRAPHS), str(folders[name])]
                with (folders[name] / LOG).open("wb") as log:
                    running[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            count(len(names) - len(running) - len(waiting), len(names))
            ended = [name for name, process in running.items() if process.poll() is not None]
            for name in ended:
                _take(folders[name], running.pop(name).returncode, kept, name)
            time.sleep(0 if ended else WAIT)
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def _take(folder: Path, code: int, kept: StageCache, name: str) -> None:
    """Keeps what a compiler has written.

    Raises:
        TargetError: it has failed.
    """
    log = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    if code or not (folder / CONTEXT).is_file():
        said = [next(filter(None, found.groups())).strip() for line in log.splitlines() if (found := REFUSED.search(line))]
        told = "; ".join(dict.fromkeys(said[:TOLD])) or f"it ended with code {code}"
        raise TargetError(f"Qualcomm's compiler does not take this model ({told}): choose another recipe, chip or context")
    (folder / SUMMARY).write_text(json.dumps([int(found) for found in READ.findall(log)]), encoding="utf-8")
    with kept.making(name) as made:
        folder.rename(made)


def options(soc: str, shared: bool, half: bool) -> bytes:
    """What ExecuTorch's delegate is opened with, as it keeps it in a program (`QnnExecuTorchOptions`).

    Args:
        soc: the chip's name, one of `QcomChipset`.
        shared: whether methods share their weights.
        half: whether values are half floats.
    """
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.utils.utils import generate_htp_compiler_spec, generate_qnn_executorch_compiler_spec

    backend = generate_htp_compiler_spec(use_fp16=half, use_weight_sharing=shared)
    (spec,) = generate_qnn_executorch_compiler_spec(soc_model=getattr(QcomChipset, soc), backend_options=backend)
    return bytes(spec.value)
