"""What a compiled program holds: its compiler keeps the integers, and made the program from them.

A compiled program cannot be taken apart. So two things are shown, and together they say that the checkpoint's integers are in it:

1. Products with the checkpoint's integers are compiled alone, with half floats, and run on the emulator with inputs that are 1 in one
   place: what they give are the integers of one column times their scales.
2. The whole model is compiled anew from the checkpoint. The compiler is deterministic: the result must be the bundle's own file, byte
   for byte, but for the number that it gives each of its runs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from lobit.errors import BundleError
from lobit.export.qnn.builder import QnnBuilder
from lobit.export.qnn.compiling import COPIED, compile_variants
from lobit.export.qnn.graph import Graph, Weights
from lobit.export.qnn.methods import SOCS, WITHOUT_HALF, graphs, soc_of
from lobit.export.qnn.probe import PROBE
from lobit.export.qnn.program import write_pte
from lobit.export.qnn.target import EMULATED_FILE, PROGRAM_FILE
from lobit.export.qnn.weights import HtpLinear
from lobit.export.target import Spec
from lobit.model import Transformer, weight_of
from lobit.progress_callback import Progress
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear
from lobit.runtime.bundle import Bundle
from lobit.runtime.client import Table
from lobit.runtime.manifest import Method, Port
from lobit.runtime.stored import StoredLayer
from lobit.runtime.verify import compare
from lobit.stage_cache import StageCache

RUN_NUMBER = slice(4, 12)
"""Bytes of a context binary that differ between two runs of the compiler."""
COLUMNS = 64
"""Columns of a sampled layer that are read."""
TOGETHER = 8
"""Products that one probe has."""
NEAR = 2e-3
"""How far the product of an integer and its scale may be from the half float that comes back, relative to it."""


def read_back(
    bundle: Bundle, model: Transformer, spec: Spec, every: bool, progress: Progress | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Compares a bundle with the converted model that it should hold.

    Args:
        bundle: the bundle.
        model: the converted model.
        spec: what the bundle was made for.
        every: whether all columns of all products are read back; otherwise `COLUMNS` columns of one product of each kind.
        progress: told of the probes and of the compiler.

    Returns:
        Rows as `runtime.verify` has them for the layers that were read back, and `{"file", "bytes", "differing_bytes"}` for each file
        that was compiled anew.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, IntegerLinear)]
    if not every:
        layers = list({name.rpartition(".")[2]: (name, module) for name, module in reversed(layers)}.values())
    rows, soc = [_embedding_row(bundle, model)], SOCS[0] if soc_of(spec) in WITHOUT_HALF else soc_of(spec)
    with tempfile.TemporaryDirectory() as scratch:
        for start in range(0, len(layers), TOGETHER):
            if progress:
                progress("probes", start, len(layers))
            rows += _probe(layers[start : start + TOGETHER], every, soc, Path(scratch) / f"{start}")
        if progress:
            progress("compiler", 0, 1)
        return rows, _compiled_anew(bundle, model, spec, Path(scratch) / "again")


def _embedding_row(bundle: Bundle, model: Transformer) -> dict[str, Any]:
    """Compares the table that the client reads, integer by integer."""
    assert bundle.manifest.client is not None
    table = Table(bundle.folder / bundle.manifest.client.embedding.file, bundle.manifest.client.embedding)
    values, scale = table.stored(slice(None))
    embedding = model.embedding
    if isinstance(embedding, IntegerEmbedding):
        return compare(StoredLayer("embedding", embedding.integers.numpy(), embedding.scale.numpy()), values, scale)
    return compare(StoredLayer("embedding", weight_of(embedding).detach().float().numpy(), None), values, None)


def _probe(layers: Sequence[tuple[str, IntegerLinear]], every: bool, soc: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Compiles products alone, and compares the integers that come back with the layers'."""
    folder.mkdir()
    graph = Graph(Weights())
    builder, inputs, chosen = QnnBuilder(graph), {}, []
    for name, linear in layers:
        inner = linear.integers.shape[1]
        columns = np.arange(inner) if every or inner <= COLUMNS else np.linspace(0, inner - 1, COLUMNS).astype(int)
        chosen.append(columns)
        inputs[f"one.{name}"] = functional.one_hot(torch.from_numpy(columns), inner)[None]
        bare = HtpLinear(IntegerLinear(linear.integers, linear.scale, None, linear.rule))
        with graph.scope(name):
            builder.output(builder.product(bare, builder.input(f"one.{name}", 1, len(columns), inner)), name)
    found = run_alone(graph, inputs, soc, folder)
    for (name, linear), columns in zip(layers, chosen, strict=True):
        yield _read_back(name, linear, found[name][0].float().numpy().T, columns)


def run_alone(graph: Graph, inputs: Mapping[str, Tensor], soc: str, folder: Path) -> dict[str, Tensor]:
    """What the emulator gives for one graph, by the names of its outputs, in their types.

    Args:
        graph: the graph.
        inputs: its inputs by name; they are rounded to the types of the ports.
        soc: the chip to compile for.
        folder: an empty folder to work in.

    Raises:
        TargetError: the compiler refuses the graph.
        BundleError: the emulator ended.
    """
    (copied,) = compile_variants({PROBE: graph}, soc, StageCache(folder / "stages"), names=[COPIED])
    ports = [[Port(name, "client", [*graph.shape(name)], graph.dtype(name)) for name in names] for names in (graph.inputs, graph.outputs)]
    write_pte([Method(PROBE, PROBE, *ports)], copied.context, copied.options, folder / "probe.pte")
    given = (inputs[name].to(getattr(torch, graph.dtype(name))).contiguous() for name in graph.inputs)
    save_file({f"{index:04}": tensor for index, tensor in enumerate(given)}, folder / "inputs")
    command = [sys.executable, "-m", "lobit.export.qnn.probe", *(str(folder / name) for name in ("probe.pte", "inputs", "outputs"))]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise BundleError(f"the emulator ended with code {done.returncode} while it read integers: install what `lobit doctor qnn` names")
    found = load_file(folder / "outputs")
    return {name: found[f"{index:04}"] for index, name in enumerate(graph.outputs)}


def _read_back(name: str, linear: IntegerLinear, products: NDArray[np.float32], columns: NDArray[np.int64]) -> dict[str, Any]:
    """Compares columns [out, n] of what a product gave with the integers times the scales."""
    integers = linear.integers.numpy()[:, columns].astype(np.float32)
    scale = np.repeat(linear.scale.numpy(), len(integers) // len(linear.scale), axis=0)
    back = np.rint(products / scale)
    far = np.abs(products - integers * scale) > NEAR * np.abs(integers * scale)
    row = dict.fromkeys(("integers", "differing_integers", "scales", "differing_scales", "floats", "differing_floats"), 0)
    differing = {"differing_integers": int((back != integers).sum()), "differing_scales": int(far.any(axis=1).sum())}
    return {**row, "name": name, "integers": integers.size, "scales": len(integers), **differing}


def _compiled_anew(bundle: Bundle, model: Transformer, spec: Spec, folder: Path) -> list[dict[str, Any]]:
    """Compiles the model again, and counts the bytes in which the bundle's files are others."""
    folder.mkdir()
    compiled = compile_variants(graphs(model, spec), soc_of(spec), StageCache(folder / "stages"))
    rows = []
    for name, each in zip((PROGRAM_FILE, EMULATED_FILE), compiled, strict=True):
        write_pte(bundle.manifest.methods, each.context, each.options, folder / name)
        begin = (folder / name).stat().st_size - each.context.stat().st_size
        number = slice(begin + RUN_NUMBER.start, begin + RUN_NUMBER.stop)
        theirs, ours = (np.memmap(path / name, np.uint8, "r") for path in (bundle.folder, folder))
        if len(theirs) != len(ours):
            differing = max(len(theirs), len(ours))
        else:
            differing = sum(int((theirs[part] != ours[part]).sum()) for part in (slice(number.start), slice(number.stop, None)))
        rows.append({"file": name, "bytes": len(theirs), "differing_bytes": differing})
    return rows

