"""Target `xnnpack`: an ExecuTorch program for the CPU, its products on the XNNPACK delegate."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lobit.errors import TargetError, listed
from lobit.export.pte import write_program
from lobit.export.size_groups import Tally
from lobit.export.stages import Count, halves
from lobit.export.target import Costs, Lowered, Needs, Reader, Spec, foreign_options, with_rules
from lobit.export.xnnpack.attention import Caches
from lobit.export.xnnpack.delegated import DelegatedLinear, DelegatedNorm, DelegatedTurn, PackedEmbedding, SharedHead
from lobit.export.xnnpack.link import Linker
from lobit.export.xnnpack.lowering import LoweredPart, lower_part, trace_part, without_collection
from lobit.export.xnnpack.parts import Interpreter, Parts, Step
from lobit.export.xnnpack.program import build
from lobit.export.xnnpack.weights import form_of, format_of, layer_form
from lobit.model import Config, RMSNorm, Transformer, replace_layers, twin
from lobit.quant_recipes.apply import layer_plans
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear
from lobit.quant_recipes.recipe import Recipe
from lobit.quant_recipes.sizes import kind_of
from lobit.rope import RotateHalf
from lobit.runtime.manifest import CacheInfo, Delegation, FileEntry, Method, Port, TensorGroup
from lobit.stage_cache import StageCache

PROGRAM_FILE = "model.pte"
OVERHEAD, PER_ARGUMENT, PER_PART = 20_000, 69, 1_800
PER_LAYER, PER_INTEGER_LAYER, PER_INTEGER_CACHE = 3_000, 2_200, 1_300
"""Bytes of the file that are not weights: its header, values and instructions, small graphs, and a graph for each layer's products."""
COSTS = Costs(
    imports_seconds=9.0,
    imports_bytes=830_000_000,  # PyTorch and ExecuTorch
    model_copies=1.6,  # the model itself, and what is packed to be kept or written
    head_copies=9,  # random weights, packed ones, and what ExecuTorch's serializer holds of them
    seconds_per_parameter={"quantize": 11e-9, "lower": 12e-9, "write": 6e-9},
    seconds_per_part=0.85,
)
CHUNK = 512
OPERATOR_ERROR = 0.0
SLOW_GRAPH = True
WORKSPACE = 16
"""Bytes of memory for each token of a chunk and each element of the feed-forward."""


def versions() -> dict[str, str]:
    """Version of ExecuTorch, to whose release a program is tied."""
    return {"executorch": metadata.version("executorch")}


def arithmetic(model: Transformer, spec: Spec) -> tuple[Transformer, Recipe]:
    """See `Target.arithmetic`: XNNPACK's INT8 inputs have a zero point, also where the recipe has none, and its floats are float32."""
    recipe = replace(spec.recipe, kv_bits=8 if spec.recipe.kv_bits == 8 else None, compute_bits=32)
    return with_rules(model, lambda rule: replace(rule, activation_rule="range")), recipe


def floor(model: Transformer, spec: Spec) -> tuple[Reader, Reader] | None:
    """See `Target.floor`: `arithmetic` says what the program computes."""
    return None


def check(spec: Spec, config: Config) -> list[str]:
    """Every reason why XNNPACK through ExecuTorch cannot hold the model under the recipe."""
    recipe = spec.recipe
    problems = foreign_options(spec, "xnnpack")
    rows = [layer_plan for layer_plan in layer_plans(config, recipe) if layer_plan.rule]
    weight_only = [row.name for row in rows if row.rule and not row.rule.activation_bits and row.name != "embedding"]
    if weight_only:
        problems.append(
            f"{len(weight_only)} layers have quantized weights and float activations ({weight_only[0]}, …): XNNPACK's int4 and int8 "
            "products need INT8 activations; choose 8da4w-g32 or 8da8w here, bitnet for ternary weights, or another target for this recipe"
        )
    groups = {layer_plan.rule.weights.group_size for layer_plan in rows if layer_plan.rule} - {None}
    odd = sorted(size for size in groups if size is not None and size % 32)
    if odd:
        problems.append(f"group_size={', '.join(map(str, odd))}: XNNPACK's blockwise INT4 needs a multiple of 32")
    wide = [row.name for row in rows if row.rule and row.rule.weights.bits > 4 and row.rule.weights.group_size]
    if wide:
        problems.append(f"{wide[0]}: XNNPACK has INT8 per channel only, not in groups: leave the groups out, or choose 4 bits or fewer")
    exact = [row for row in rows if row.rule and row.rule.weights.scale_rule == "exact" and row.rule.weights.group_size]
    rounded = [layer_plan.name for layer_plan in exact if layer_plan.name != "embedding"]
    if rounded:
        problems.append(
            f"{len(rounded)} layers have scales of an earlier quantization ({rounded[0]}, …): XNNPACK rounds those of groups to bfloat16; "
            "quantize the float model with 8da4w-g32, or choose another target"
        )
    if config.attention_softcap is not None:
        problems.append("the model caps its attention scores, which this target does not: take a model without attn_logit_softcapping")
    return problems


def step(spec: Spec) -> int:
    """See `Target.step`: the whole chunk that was asked for."""
    return spec.chunk


def options(spec: Spec) -> dict[str, str | int | bool]:
    """See `Target.options`: there are none."""
    return {}


def weights(spec: Spec, config: Config) -> list[TensorGroup]:
    """The bytes of each kind of weights in the file: scales of groups are bfloat16 there, of rows float32, of the embedding float16.

    A format names the recipe's grid, and what the program has instead where that is different: integers of few bits are INT4, activations
    have a zero point, floats are float32. An embedding that is the head too is stored once, with two sets of scales where it is integers.
    """
    tally = Tally()
    for layer_plan in layer_plans(config, spec.recipe):
        (out, inner), form, format = layer_plan.shape, layer_form(layer_plan), format_of(layer_plan, spec.recipe)
        kind = kind_of(layer_plan.name)
        if layer_plan.shared_with is None:
            tally.add(kind, format, out * inner, out * inner * (form.grid.bits if form else 32) // 8)
        if form:
            tally.add(f"{kind} scales" if kind in ("embedding", "head") else kind, format, 0, out * form.scales * form.scale_bytes)
    tally.add_norms_and_biases(config)
    return tally.groups()


def cache(spec: Spec, config: Config) -> CacheInfo:
    """The size of the key-value cache: a layer with a window keeps as many positions as that, the others keep the context.

    INT8 entries have a float32 scale and an int8 zero point per token and head, for keys and for values.
    """
    slots = config.cache_slots(spec.context)
    heads = 2 * sum(slots) * config.kv_heads
    if spec.recipe.kv_bits == 8:
        return CacheInfo("int8", slots, heads * config.head_dim, heads * 5)
    return CacheInfo("float32", slots, heads * config.head_dim * 4, 0)


def program(model: Transformer, spec: Spec) -> Parts:
    """Builds the model in parts: its layers are in the delegate's operators, its caches are written in place."""
    model = twin(model).eval()
    config, head = model.config, model.head
    if config.tied and isinstance(head, IntegerLinear) and form_of(head.rule.weights, config.hidden_size).grid.bits == 4:
        model.head = SharedHead(head)
    replace_layers(model, IntegerLinear, DelegatedLinear)
    replace_layers(model, IntegerEmbedding, PackedEmbedding)
    replace_layers(model, RMSNorm, DelegatedNorm)
    replace_layers(model, RotateHalf, lambda turn: DelegatedTurn(turn, config.head_dim))
    return build(model, Caches(config, spec.recipe.kv_bits, spec.context, spec.chunk), spec.all_logits)


def needs(model: Transformer, spec: Spec) -> Needs:
    """What lowering and running the program will take.

    In memory there are: the embedding, mapped from the file; all other weights, as XNNPACK packs them anew; caches and the values that
    parts hand to each other; and what the largest part needs inside, which is the attention of a whole chunk over the whole context:
    its scores before and after the softmax, keys and values as floats.
    """
    config = model.config
    stored = sum(group.bytes for group in weights(spec, config))
    # A head that is the embedding is in the file once, but packed anew for the head.
    bits = form_of(model.head.rule.weights, config.hidden_size).grid.bits if isinstance(model.head, IntegerLinear) else 32
    head = config.vocab_size * config.hidden_size * bits // 8 if config.tied else 0
    parts = program(model, spec)
    handed = sum(parts.places(spec.chunk).values())
    slots = max(config.cache_slots(spec.context))
    scores = 2 * config.heads * spec.chunk * slots * 4
    floats = 4 * slots * config.kv_heads * config.head_dim * 4
    steps, distinct = list(parts.every_step()), parts.distinct()
    arguments = sum(len(step.inputs) + len(step.outputs) for step in steps)
    layer = PER_LAYER + (PER_INTEGER_LAYER if spec.recipe.rules else 0) + (PER_INTEGER_CACHE if spec.recipe.kv_bits == 8 else 0)
    overhead = OVERHEAD + PER_ARGUMENT * arguments + PER_PART * len(distinct) + layer * len(config.layers)
    return Needs(len(distinct), overhead, stored + head + handed + max(scores + floats, WORKSPACE * spec.chunk * config.intermediate_size))


def graph(model: Transformer, spec: Spec) -> Interpreter:
    """The program's parts, traced for 1 to `chunk` tokens, run by PyTorch with the weights of each layer."""
    parts = program(model, spec)
    modules = {name: trace_part(step, parts, spec.chunk).module(check_guards=False) for name, step in parts.distinct().items()}

    def run_traced(step: Step, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        result = torch.func.functional_call(modules[parts.part_of(step)], step.module.state_dict(), tuple(inputs))
        return result if isinstance(result, (tuple, list)) else (result,)

    return Interpreter(parts, run_traced)


def lower(model: Transformer, spec: Spec, kept: StageCache, count: Count) -> Lowered:
    """Lowers each part to an ExecuTorch program, with its products on XNNPACK.

    The constant methods are those that ExecuTorch's `TextLLMRunner` reads.

    Raises:
        TargetError: an operator outside the delegate is not in the Android library.
    """
    parts, vocabulary = program(model, spec), model.config.vocab_size
    methods = {
        "get_max_seq_len": spec.chunk,
        "get_max_context_len": spec.context,
        "get_vocab_size": vocabulary,
        "get_eos_ids": list(spec.stop),
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
        "use_sdpa_with_kv_cache": True,
    } | ({} if spec.bos is None else {"get_bos_id": spec.bos})
    lowered: dict[str, LoweredPart] = {}
    steps = parts.distinct()
    for name, step in steps.items():
        count(len(lowered), len(steps))
        # The first part has the constant methods of the whole program.
        lowered[name] = _kept_part(step, parts, spec.chunk, {} if lowered else methods, kept)
    check_operators(
        f"{op.name}.{op.overload}" if op.overload else op.name
        for part in lowered.values()
        for op in part.program.execution_plan[0].operators
    )
    inputs = [Port("tokens", "tokens", [1, f"1..{spec.chunk}"], "int64"), Port("input_pos", "position", [1], "int64")]
    outputs = [Port("logits", "logits", [1, f"1..{spec.chunk}" if spec.all_logits else 1, vocabulary], "float32")]
    return Lowered((parts, lowered, spec.chunk), [Method("forward", "step", inputs, outputs)], [], _delegation(parts, lowered))


def _kept_part(step: Step, parts: Parts, chunk: int, methods: dict[str, Any], kept: StageCache) -> LoweredPart:
    """A lowered part, which is taken from an earlier run, or made now and kept for a later one."""
    name = hashlib.sha256(f"{parts.part_of(step)}\n{chunk}\n{methods}".encode()).hexdigest()[:16] + ".part"
    if not kept.has(name):
        with without_collection(), kept.making(name) as path:
            path.write_bytes(lower_part(step, trace_part(step, parts, chunk), methods).to_bytes())
    return LoweredPart.from_bytes((kept.folder / name).read_bytes())


def _delegation(parts: Parts, lowered: Mapping[str, LoweredPart]) -> Delegation:
    """Counts the operators on the delegate and outside of it, over all steps of the program."""
    delegated: Counter[str] = Counter()
    left: Counter[str] = Counter()
    partitions = 0
    for step in parts.every_step():
        part = lowered[parts.part_of(step)]
        delegated.update(part.delegated)
        left.update(part.left)
        partitions += len(part.program.execution_plan[0].delegates)
    return Delegation("XnnpackBackend", partitions, dict(sorted(delegated.items())), dict(sorted(left.items())), {})


def write(lowered: Lowered, folder: Path, count: Count) -> list[FileEntry]:
    """Joins the parts to one program and writes `model.pte`."""
    parts, pieces, chunk = lowered.payload
    (first, *_) = pieces.values()
    linking, writing = halves(count)
    linked = Linker(parts, pieces, chunk).link(first.program.execution_plan[1:], linking)
    write_program(linked, folder / PROGRAM_FILE, writing)
    return [FileEntry.of(folder, PROGRAM_FILE, "program")]


def android_operators() -> set[str]:
    """The operators that ExecuTorch's Android library registers, from `android_operators.txt`."""
    text = (resources.files("lobit.export.xnnpack") / "android_operators.txt").read_text(encoding="utf-8")
    return {line for line in text.splitlines() if line and not line.startswith("#")}


def check_operators(names: Iterable[str]) -> None:
    """Refuses a program that a phone could not load.

    Raises:
        TargetError: with every operator that is missing there.
    """
    missing = sorted(set(names) - android_operators())
    if missing:
        raise TargetError(listed(missing, f"the Android library of ExecuTorch 1.3 lacks {len(missing)} operators of this program:"))
