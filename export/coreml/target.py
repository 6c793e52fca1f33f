"""Target `coreml`: a package for Apple's Core ML (iOS 18, macOS 15), written and proved without a Mac."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from lobit.errors import TargetError
from lobit.export.composed import ropes
from lobit.export.coreml.builder import EagerMilBuilder, MilBuilder
from lobit.export.coreml.mil import Blobs, Function, Value
from lobit.export.coreml.ops import CoreMlBuilder, CoreMlOps, rounded_up, slots
from lobit.export.coreml.package import model as model_message
from lobit.export.coreml.package import write_package
from lobit.export.coreml.weights import form_of, inexact, stored_bytes
from lobit.export.size_groups import Tally, stored_as
from lobit.export.stages import Count
from lobit.export.target import Costs, Lowered, Needs, Reader, Spec, float_inputs, foreign_options
from lobit.export.walk import walk
from lobit.model import Config, Transformer
from lobit.quant_recipes.apply import LayerPlan, layer_plans
from lobit.quant_recipes.precision import computing
from lobit.quant_recipes.recipe import Recipe
from lobit.quant_recipes.sizes import kind_of, norms_and_biases
from lobit.runtime.client import Ports, keep
from lobit.runtime.coreml_ports import LAST, LOGITS, MANIFEST_FILE, POSITION, SPEC_FILE, TOKENS, WEIGHTS_FILE, cache_names, row_names
from lobit.runtime.manifest import CacheInfo, Delegation, FileEntry, Method, Port, State, TensorGroup
from lobit.stage_cache import StageCache

BACKEND = "Core ML"
PROGRAM_FILE = "model.pte"
ROLES = {TOKENS: "tokens", POSITION: "position", LAST: "last", LOGITS: "logits"}
"""Roles of ports by their names; all other ports are states."""
DTYPES = {"fp16": "float16", "fp32": "float32", "int32": "int32"}
COSTS = Costs(
    imports_seconds=2.0,
    imports_bytes=710_000_000,  # mostly PyTorch
    model_copies=1.3,
    head_copies=5.2,  # the widest layer, while it is quantized
    seconds_per_parameter={"quantize": 11e-9, "lower": 1e-9, "write": 6e-9},
    seconds_per_part=0.2,
)
CHUNK = 32
OPERATOR_ERROR = 0.0
SLOW_GRAPH = True


def versions() -> dict[str, str]:
    """Versions of coremltools, whose messages a package consists of, and of ExecuTorch, where it is installed, which writes programs."""
    found = {name: _version(name) for name in ("coremltools", "executorch")}
    return {name: version for name, version in found.items() if version}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def arithmetic(model: Transformer, spec: Spec) -> tuple[Transformer, Recipe]:
    """See `Target.arithmetic`: inputs are floats, whatever the recipe rounds them to; states are half floats always."""
    model, recipe = float_inputs(model, spec.recipe)
    return model, replace(recipe, kv_bits=None if _cache_dtype(spec) == "float32" else 16, compute_bits=32 if spec.float32 else 16)


def _cache_dtype(spec: Spec) -> str:
    return "float32" if spec.float32 and _explicit(spec) else "float16"


def _explicit(spec: Spec) -> bool:
    """Whether caches are inputs and outputs: always in a program for ExecuTorch."""
    return spec.explicit_cache or spec.executorch


def check(spec: Spec, config: Config) -> list[str]:
    """Every reason why Core ML cannot hold the model under the recipe."""
    problems, rows = foreign_options(spec, "coreml"), layer_plans(config, spec.recipe)
    if spec.executorch and _version("executorch") is None:
        problems.append("--executorch needs a package that is not installed: pip install 'lobit[xnnpack]'")
    exact = [row.name for row in rows if row.rule and row.rule.weights.scale_rule == "exact"]
    if exact and not spec.float32:
        problems.append(
            f"{len(exact)} layers have scales of an earlier quantization ({exact[0]}, …), and Core ML would round them to half precision: "
            "add --float32, or quantize the float model with a recipe of lobit"
        )
    full = [row.name for row in rows if row.rule is None]
    if full and spec.recipe.float_bits == 32 and not spec.float32:
        told = f"{len(full)} layers have float32 weights ({full[0]}, …), and half precision would round them"
        problems.append(f"{told}: add --float32, or take recipe fp16")
    return problems


def step(spec: Spec) -> int:
    """See `Target.step`: the tokens that `prefill` has room for."""
    return spec.chunk


def options(spec: Spec) -> dict[str, str | int | bool]:
    """See `Target.options`."""
    return {"float32": spec.float32, "explicit_cache": _explicit(spec), "executorch": spec.executorch}


def weights(spec: Spec, config: Config) -> list[TensorGroup]:
    """The bytes of each kind of weights; scales, norms, biases and tables are of the floats that are computed."""
    tally, size, name = Tally(), 4 if spec.float32 else 2, "float32" if spec.float32 else "float16"
    for row in layer_plans(config, spec.recipe):
        if row.shared_with is None:
            tally.add(kind_of(row.name), _format(row, name), row.shape[0] * row.shape[1], stored_bytes(row, size))
    for kind, count in norms_and_biases(config):
        tally.add(kind, name, count, size * count)
    tally.add("tables", name, 0, sum(rope.dim * (spec.context + spec.chunk) * size for rope in ropes(config)))
    return tally.groups()


def _format(row: LayerPlan, floats: str) -> str:
    if row.rule is None:
        return floats
    form = form_of(row.rule.weights)
    return str(row.rule.weights) + " as codes" if form.startswith("u") else stored_as(row.rule.weights, int(form[-1]))


def cache(spec: Spec, config: Config) -> CacheInfo:
    """The size of the key-value cache: states have room for a whole call behind the context, rings for one behind the window."""
    kept, width = slots(config, spec.context, spec.chunk, _explicit(spec)), config.kv_heads * config.head_dim
    width = width if _explicit(spec) else rounded_up(width)
    size = 4 if _cache_dtype(spec) == "float32" else 2
    return CacheInfo(_cache_dtype(spec), [min(count, spec.context) for count in kept], 2 * sum(kept) * width * size, 0)


def _rooms(spec: Spec) -> dict[str, int]:
    """Names of the functions, and the tokens that each has room for."""
    return {"prefill": spec.chunk, "decode": 1} if spec.chunk > 1 else {"decode": 1}


def functions(model: Transformer, spec: Spec) -> tuple[dict[str, Function], Blobs]:
    """The program's functions, and the arrays that they share."""
    blobs, found = Blobs(), {}
    for name, room in _rooms(spec).items():
        found[name] = Function(blobs, "fp32" if spec.float32 else "fp16")
        build = cast(CoreMlBuilder[Value], MilBuilder(found[name]))  # it has what these operations need
        walk(model, CoreMlOps(build, model.config, spec.context, room, spec.all_logits, spec.chunk, _explicit(spec)))
    return found, blobs


def methods(made: dict[str, Function]) -> list[Method]:
    """The functions with their ports; states have none, as Core ML keeps them."""

    def port(value: Value) -> Port:
        return Port(value.name, ROLES.get(value.name, "state"), [*value.shape], DTYPES[value.dtype])

    return [
        Method(name, name, [port(value) for value in function.inputs], [port(value) for value in function.outputs])
        for name, function in made.items()
    ]


def states(spec: Spec, config: Config) -> list[State]:
    """Keys and values [1, slots, K · E] of every layer, where the client keeps them."""
    if not _explicit(spec):
        return []
    width = config.kv_heads * config.head_dim
    return [
        State(before, rows, _cache_dtype(spec), [1, count, width], 1, config.layers[layer].window, False, True)
        for layer, count in enumerate(config.cache_slots(spec.context))
        for before, rows in zip(cache_names(layer), row_names(layer), strict=True)
    ]


def needs(model: Transformer, spec: Spec) -> Needs:
    """What writing and running the package will take: the bytes of the files are exact."""
    made, blobs = functions(model, spec)
    stored = sum(group.bytes for group in weights(spec, model.config))
    overhead = model_message(made, "decode").ByteSize() + blobs.end - stored
    work = 4 * model.config.vocab_size * (spec.chunk if spec.all_logits else 1)
    return Needs(1, overhead, stored + overhead + cache(spec, model.config).bytes + work)


def floor(model: Transformer, spec: Spec) -> tuple[Reader, Reader] | None:
    """See `Target.floor`: `arithmetic` says what the program computes."""
    return None


def graph(model: Transformer, spec: Spec) -> EagerProgram:
    """The program's operations, run by PyTorch one by one."""
    return EagerProgram(model, spec)


class EagerProgram:
    """Runs the functions by PyTorch (`target.RunGraph`).

    Args:
        model: the converted model.
        spec: what the program is made for.
    """

    def __init__(self, model: Transformer, spec: Spec) -> None:
        self.model, self.spec, self.recipe = model, spec, arithmetic(model, spec)[1]
        self.states: dict[str, Tensor] = {}
        self.told = states(spec, model.config)
        self.caches: Ports = {state.input: np.zeros(state.shape, np.float32) for state in self.told}

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        config, spec, count = self.model.config, self.spec, tokens.shape[1]
        room = 1 if count == 1 else spec.chunk
        ports = {
            TOKENS: torch.nn.functional.pad(tokens, (0, room - count)),
            POSITION: input_pos,
            LAST: torch.tensor([count - 1]),
        } | {name: torch.from_numpy(cache) for name, cache in self.caches.items()}
        builder = EagerMilBuilder(ports, self.states)
        ops = CoreMlOps(builder, config, spec.context, room, spec.all_logits, spec.chunk, _explicit(spec))
        with computing(self.recipe):
            walk(self.model, ops)
        for state in self.told:
            keep(self.caches, state, builder.outputs[state.output].numpy(), int(input_pos), count)
        return builder.outputs[LOGITS][:, :count]


def lower(model: Transformer, spec: Spec, kept: StageCache, count: Count) -> Lowered:
    """The functions; their weights are still the model's own tensors, which `write` stores.

    Raises:
        TargetError: half precision does not hold all scales.
    """
    rounded = sum(inexact(module) for module in model.modules())
    if rounded and not spec.float32:
        raise TargetError(f"{rounded} scales are not values of half precision, and Core ML would round them: add --float32")
    made, blobs = functions(model, spec)
    counts = sum((function.counts for function in made.values()), Counter[str]())
    delegation = Delegation(BACKEND, len(made), dict(sorted(counts.items())), {}, {})
    return Lowered((made, blobs, spec), methods(made), states(spec, model.config), delegation)


def write(lowered: Lowered, folder: Path, count: Count) -> list[FileEntry]:
    """Writes the package, or the ExecuTorch program with the package inside."""
    made, blobs, spec = lowered.payload
    write_package(made, "decode", blobs, folder, count)
    roles = {SPEC_FILE: "program", WEIGHTS_FILE: "weights", MANIFEST_FILE: "config"}
    if spec.executorch:
        from lobit.export.coreml.executorch import write_pte

        write_pte(lowered.methods, folder, folder / PROGRAM_FILE, spec.float32, count)
        roles = {PROGRAM_FILE: "program"}
    return [FileEntry.of(folder, name, role) for name, role in roles.items()]
