"""Target `qnn`: an ExecuTorch program for Qualcomm's neural processor (HTP), compiled and proved without a phone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lobit.export.composed import ropes, windows
from lobit.export.qnn.builder import EagerHtpBuilder, QnnBuilder
from lobit.export.qnn.compiling import compile_variants
from lobit.export.qnn.graph import Graph, Value, Weights
from lobit.export.qnn.ops import HtpBuilder, HtpOps
from lobit.export.qnn.program import BACKEND, write_pte
from lobit.export.qnn.weights import HtpLinear, program_bytes, stored_bits, table_bits, table_bytes, write_table
from lobit.export.size_groups import Tally, stored_as
from lobit.export.stages import Count
from lobit.export.target import Costs, Lowered, Needs, Spec, foreign_options, with_rules
from lobit.export.walk import walk
from lobit.model import Config, Transformer, replace_layers, twin
from lobit.quant_recipes.apply import LayerPlan, layer_plans
from lobit.quant_recipes.integer import IntegerLinear
from lobit.quant_recipes.precision import computing
from lobit.quant_recipes.recipe import Recipe
from lobit.quant_recipes.sizes import kind_of, norms_and_biases
from lobit.runtime.client import CachedProgram, Ports
from lobit.runtime.manifest import (
    CacheInfo,
    ClientInputs,
    Delegation,
    FileEntry,
    Lookup,
    Mask,
    Method,
    Port,
    Rotary,
    State,
    TensorGroup,
)
from lobit.runtime.qnn_libraries import PACKAGE, library_folder
from lobit.runtime.qnn_ports import EMBEDDINGS, LAST, LOGITS, cache_names, mask_name, rotary_names
from lobit.stage_cache import StageCache

PROGRAM_FILE, EMULATED_FILE, TABLE_FILE = "model.pte", "emulated.pte", "embedding.safetensors"
SOCS = ("SM8650", "SM8450", "SM8550", "SM8750", "SM8850")
"""Chips that programs are compiled for; the first is the default. The others of ExecuTorch's list fail or were not tried."""
FAILING = ("SM8350", "QCM6490")
"""Chips without half floats: the compiler refuses a model for them."""
HIDDEN = -10_000.0
"""What masks add to the score of an entry that a token must not see."""
DTYPE = "float16"
COSTS = Costs(
    imports_seconds=6.0,
    imports_bytes=2_600_000_000,  # PyTorch and ExecuTorch, and two processes with Qualcomm's compiler
    model_copies=16,  # most of them in the compilers, which are not run side by side where there is too little memory
    head_copies=0,
    seconds_per_parameter={"quantize": 11e-9, "lower": 250e-9, "write": 10e-9},
    seconds_per_part=1.0,
)
PER_OPERATOR, COMPILED_SHARE = 390, 0.0282
"""Bytes of the program that are not weights: for each operator of both methods, and for each byte of weights, fitted to models of 2, 125
and 1 084 million parameters."""
CHUNK = 32
OPERATOR_ERROR = 2e-3
"""Softmax has the largest, 1.1e-3 to 1.5e-3 on the emulator (its shares add up to 0.999); rounding to half floats alone makes 2e-4."""
SLOW_GRAPH = True


def versions() -> dict[str, str]:
    """Versions of ExecuTorch, to whose release a program is tied, and of the package with Qualcomm's compiler.

    Raises:
        MissingPartError: the package is missing, or in a version that does not work.
    """
    library_folder()
    return {name: metadata.version(name) for name in ("executorch", PACKAGE)}


def soc_of(spec: Spec) -> str:
    """The chip that a program is compiled for."""
    return spec.soc or SOCS[0]


def arithmetic(model: Transformer, spec: Spec) -> tuple[Transformer, Recipe]:
    """See `Target.arithmetic`: inputs are half floats, whatever the recipe rounds them to, as are keys, values and all else."""
    rules = tuple(replace(rule, activation_bits=None) for rule in spec.recipe.rules)
    recipe = replace(spec.recipe, rules=rules, kv_bits=16, compute_bits=16)
    return with_rules(model, lambda rule: replace(rule, activation_bits=None)), recipe


def check(spec: Spec, config: Config) -> list[str]:
    """Every reason why the HTP cannot hold the model under the recipe."""
    recipe = spec.recipe
    problems = foreign_options(spec, "qnn")
    if soc_of(spec) in FAILING:
        problems.append(f"{soc_of(spec)} has no half floats, its compiler refuses the model: choose one of {', '.join(SOCS)}")
    elif soc_of(spec) not in SOCS:
        problems.append(f"there is no chip {soc_of(spec)!r} here: choose one of {', '.join(SOCS)}")
    rows = [row for row in layer_plans(config, recipe) if row.rule and row.name != "embedding"]
    grouped = [row for row in rows if row.rule and row.rule.weights.group_size]
    if grouped:
        problems.append(
            f"{len(grouped)} layers have scales for groups of weights ({grouped[0].name}, …), the HTP has one for every row: choose "
            "w4-channel, w4-channel-learned, 8da8w, or a ternary recipe"
        )
    return problems


def step(spec: Spec) -> int:
    """See `Target.step`: the tokens that `prefill` has room for."""
    return spec.chunk


def options(spec: Spec) -> dict[str, str | int | bool]:
    """See `Target.options`: the chip, which a compiled program does not tell itself."""
    return {"soc": soc_of(spec)}


def weights(spec: Spec, config: Config) -> list[TensorGroup]:
    """The bytes of each kind of weights: products in the program, the embedding in a file of its own; scales are float32."""
    tally = Tally()
    for row in layer_plans(config, spec.recipe):
        if row.name == "embedding":
            tally.add("embedding", _format(row, table_bits(row)), row.shape[0] * row.shape[1], table_bytes(row))
        else:
            again = row.shared_with is not None
            tally.add(kind_of(row.name), _format(row, 0), 0 if again else row.shape[0] * row.shape[1], program_bytes(row))
    for kind, count in norms_and_biases(config):
        tally.add(kind, DTYPE, count, 2 * count)
    return tally.groups()


def _format(row: LayerPlan, bits: int) -> str:
    if row.rule is None:
        return DTYPE
    return stored_as(row.rule.weights, bits or stored_bits(row.rule.weights))


def cache(spec: Spec, config: Config) -> CacheInfo:
    """The size of the key-value cache: a layer with a window keeps as many positions as that, the others keep the context."""
    slots = config.cache_slots(spec.context)
    return CacheInfo(DTYPE, slots, 2 * sum(slots) * config.kv_heads * config.head_dim * 2, 0)


def graphs(model: Transformer, spec: Spec) -> dict[str, Graph]:
    """The graphs of the two methods, which share their weights."""
    model, shared = _prepared(model), Weights()
    found = {}
    for name, tokens in _rooms(spec).items():
        found[name] = Graph(shared)
        build = cast(HtpBuilder[Value], QnnBuilder(found[name]))  # it has what these operations need
        walk(model, HtpOps(build, model.config, spec.context, tokens, spec.all_logits))
    return found


def _prepared(model: Transformer) -> Transformer:
    """The model with its products as the HTP has them."""
    model = twin(model).eval()
    replace_layers(model, IntegerLinear, HtpLinear)
    return model


def _rooms(spec: Spec) -> dict[str, int]:
    """Names of the methods, and the tokens that each has room for."""
    return {"prefill": spec.chunk, "decode": 1} if spec.chunk > 1 else {"decode": 1}


def methods(config: Config, graphs: dict[str, Graph]) -> list[Method]:
    """The methods with their ports, in the order in which the program takes and gives them."""
    caches = {name for layer in range(len(config.layers)) for pair in cache_names(layer) for name in pair}

    def port(graph: Graph, name: str) -> Port:
        role = "logits" if name == LOGITS else "state" if name in caches else "client"
        return Port(name, role, [*graph.shape(name)], DTYPE)

    return [
        Method(name, name, [port(graph, each) for each in graph.inputs], [port(graph, each) for each in graph.outputs])
        for name, graph in graphs.items()
    ]


def states(spec: Spec, config: Config) -> list[State]:
    """Keys and values [1, K, slots, E] of every layer, of which a call gives its own rows."""
    return [
        State(before, rows, DTYPE, [1, config.kv_heads, slots, config.head_dim], 2, config.layers[layer].window, False, True)
        for layer, slots in enumerate(config.cache_slots(spec.context))
        for before, rows in cache_names(layer)
    ]


def client(spec: Spec, config: Config) -> ClientInputs:
    """What the client computes for a call."""
    row = next(row for row in layer_plans(config, spec.recipe) if row.name == "embedding")
    rotary = []
    for index, rope in enumerate(ropes(config)):
        frequencies, factor = rope.frequencies()
        rotary.append(Rotary(*rotary_names(index), frequencies.tolist(), float(factor)))
    masks = [Mask(mask_name(index), window, HIDDEN) for index, window in enumerate(windows(config))]
    lookup = Lookup(EMBEDDINGS, TABLE_FILE, table_bits(row), float(config.embedding_scale))
    return ClientInputs(lookup, rotary, masks, None if spec.all_logits or spec.chunk == 1 else LAST)


def needs(model: Transformer, spec: Spec) -> Needs:
    """What compiling and running the program will take."""
    groups = weights(spec, model.config)
    stored = sum(group.bytes for group in groups)
    compiled = sum(group.bytes for group in groups if group.kind != "embedding")
    operators = sum(len(graph.operators) for graph in graphs(model, spec).values())
    overhead = PER_OPERATOR * operators + round(COMPILED_SHARE * compiled)
    return Needs(2, overhead, stored + overhead + cache(spec, model.config).bytes)


def graph(model: Transformer, spec: Spec) -> EagerProgram:
    """The program's operators, run by PyTorch one by one in half precision."""
    return EagerProgram(model, spec)


class EagerProgram:
    """Runs the methods by PyTorch (`target.RunGraph`), with a client that keeps the caches.

    Args:
        model: the converted model.
        spec: what the program is made for.
    """

    def __init__(self, model: Transformer, spec: Spec) -> None:
        self.model, self.spec = _prepared(model), spec
        self.recipe = arithmetic(model, spec)[1]
        config, ports = model.config, methods(model.config, graphs(model, spec))
        self.program = CachedProgram(ports, states(spec, config), client(spec, config), self._row, self._run)

    def __call__(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        return torch.from_numpy(self.program.step(tokens[0].tolist(), int(input_pos)))[None]

    @torch.inference_mode()
    def _row(self, token: int) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self.model.embed(torch.tensor([token]))[0].float().numpy()
        return row

    def _run(self, name: str, inputs: Ports) -> Ports:
        with torch.inference_mode(), computing(self.recipe):
            builder = EagerHtpBuilder({port: torch.from_numpy(array).float() for port, array in inputs.items()})
            room = _rooms(self.spec)[name]
            walk(self.model, HtpOps(builder, self.model.config, self.spec.context, room, self.spec.all_logits))
        return {port: value.numpy() for port, value in builder.outputs.items()}


def lower(model: Transformer, spec: Spec, kept: StageCache, count: Count) -> Lowered:
    """Compiles the graphs twice: with weights that the methods share, for a phone, and with a copy for each, for the emulator.

    Raises:
        TargetError: Qualcomm's compiler refuses the graphs.
    """
    config = model.config
    made = graphs(model, spec)
    shared, copied = compile_variants(made, soc_of(spec), kept, count)
    told = sum((each.counts() for each in made.values()), Counter[str]())
    read = dict(zip(made, shared.read_bytes, strict=False))
    delegation = Delegation(BACKEND, len(made), dict(sorted(told.items())), {}, read)
    ports = methods(config, made)
    return Lowered(((shared, copied), model, ports), ports, states(spec, config), delegation, client(spec, config))


def write(lowered: Lowered, folder: Path, count: Count) -> list[FileEntry]:
    """Writes the program for a phone, its twin for the emulator, and the embedding."""
    (shared, copied), model, ports = lowered.payload
    write_pte(ports, shared.context, shared.options, folder / PROGRAM_FILE, lambda done, total: count(done, 3 * total))
    write_pte(ports, copied.context, copied.options, folder / EMULATED_FILE, lambda done, total: count(total + done, 3 * total))
    assert lowered.client is not None
    write_table(model.embedding, folder / TABLE_FILE, lowered.client.embedding.bits)
    roles = {PROGRAM_FILE: "program", EMULATED_FILE: "emulated", TABLE_FILE: "embedding"}
    return [FileEntry.of(folder, name, role) for name, role in roles.items()]
