"""Target `onnx`: a graph for ONNX Runtime, in its own fast operators or in standard ones; onnxruntime-genai can read the folder too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from lobit.export.eager import EagerGraph
from lobit.export.onnx.arithmetic import arithmetic as arithmetic
from lobit.export.onnx.emit import emit
from lobit.export.onnx.fused import in_place, inner_ropes, slots_name
from lobit.export.onnx.weights import SMALLEST_BLOCK, Form, form_of, rounds_inputs
from lobit.export.size_groups import Tally, stored_as
from lobit.export.stages import Count
from lobit.export.target import Costs, Lowered, Needs, Reader, Spec, foreign_options
from lobit.model import Config, Transformer
from lobit.quant_recipes.apply import LayerPlan, layer_plans
from lobit.quant_recipes.recipe import Rule
from lobit.quant_recipes.sizes import kind_of
from lobit.runtime.manifest import CacheInfo, Delegation, FileEntry, Method, Port, State, TensorGroup
from lobit.runtime.onnx_ports import DATA_FILE, FLOAT_INPUTS, GRAPH_FILE, LOGITS, POSITIONS, PROVIDER, TOKENS, UNTILED_SLOTS, cache_names
from lobit.stage_cache import StageCache

GENAI_FILE = "genai_config.json"
SLACK = 64
"""Slots of a layer's cache beyond its window: the entries are moved up when these are full, not with every token."""
STEP = 256
"""The most tokens that one call reads, however large `chunk` is: 2 to 8 % faster than 512, whose scores leave the processor's cache."""
ROLES = {TOKENS: "tokens", POSITIONS: "positions", LOGITS: "logits"}
"""Roles of ports by their names; all other ports are states."""
DTYPES: dict[int, str] = {TensorProto.INT64: "int64", TensorProto.FLOAT: "float32"}
COSTS = Costs(
    imports_seconds=3.0,
    imports_bytes=710_000_000,  # mostly PyTorch
    model_copies=1.1,
    head_copies=5.2,  # the widest layer, while it is quantized
    seconds_per_parameter={"quantize": 11e-9, "lower": 1e-9, "write": 6e-9},
    seconds_per_part=0.1,
)
CHUNK = 512
OPERATOR_ERROR = 0.0
SLOW_GRAPH = False
WORKSPACE = 40
"""Bytes of memory for each token of a chunk and each element of the widest activation."""
PACKED = 1.1
"""Memory that a packed weight takes in ONNX Runtime's arena, as a multiple of its own size."""


def versions() -> dict[str, str]:
    """Version of ONNX, by whose schemas the graph is made."""
    return {"onnx": metadata.version("onnx")}


def graph(model: Transformer, spec: Spec) -> EagerGraph | None:
    """See `Target.graph`: standard operators are run by PyTorch as `EagerGraph`; for ONNX Runtime's own there is no such program."""
    return EagerGraph(model, spec.all_logits) if spec.portable else None


def floor(model: Transformer, spec: Spec) -> tuple[Reader, Reader] | None:
    """See `Target.floor`: `arithmetic` says what the program computes."""
    return None


def check(spec: Spec, config: Config) -> list[str]:
    """Every reason why ONNX Runtime's operators cannot hold the model under the recipe."""
    groups = {row.rule.weights.group_size for row in layer_plans(config, spec.recipe) if row.rule and row.name != "embedding"} - {None}
    odd = sorted(size for size in groups if size and size & -size < SMALLEST_BLOCK)
    problems = foreign_options(spec, "onnx")
    if spec.portable or not odd:
        return problems
    told = f"group_size={', '.join(map(str, odd))}: ONNX Runtime's products need a multiple of {SMALLEST_BLOCK}"
    return [*problems, f"{told}: choose such a size, or --portable"]


def step(spec: Spec) -> int:
    """See `Target.step`."""
    return min(spec.chunk, STEP)


def options(spec: Spec) -> dict[str, str | int | bool]:
    """See `Target.options`: `provider` is the execution provider that runs the graph."""
    return {"provider": PROVIDER, "portable": spec.portable}


def slots(spec: Spec, config: Config) -> list[int]:
    """Number of positions that each layer's cache keeps."""
    inside = in_place(spec, config)
    return [min(layer.window + SLACK, spec.context) if inside and layer.window else spec.context for layer in config.layers]


def cache(spec: Spec, config: Config) -> CacheInfo:
    """The key-value cache, which is of floats: ONNX Runtime's attention takes INT8 entries only with scales that are fixed beforehand."""
    kept = slots(spec, config)
    return CacheInfo("float32", kept, 2 * sum(kept) * config.kv_heads * config.head_dim * 4, 0)


def weights(spec: Spec, config: Config) -> list[TensorGroup]:
    """The bytes of each kind of weights in the data file, integers and scales together.

    A format names the recipe's grid, and what the graph has instead where that is different.
    """
    tally = Tally()
    for layer_plan in layer_plans(config, spec.recipe):
        (out, inner), again = layer_plan.shape, layer_plan.shared_with is not None
        if not (again and _shares(layer_plan, spec)):
            tally.add(kind_of(layer_plan.name), _format(layer_plan, spec), 0 if again else out * inner, _bytes(layer_plan, spec))
    tally.add_norms_and_biases(config)
    if in_place(spec, config):
        for rope in inner_ropes(config):
            tally.add("tables", "float32", 0, spec.context * rope.dim * 4)
    return tally.groups()


def _form(layer_plan: LayerPlan, rule: Rule, spec: Spec) -> Form:
    return form_of(rule.weights, layer_plan.shape[1], rows=layer_plan.name == "embedding", fused=not spec.portable)


def _format(layer_plan: LayerPlan, spec: Spec) -> str:
    """Names a layer's grid in the recipe, and what the graph has instead where that is different."""
    if layer_plan.rule is None:
        return f"float{spec.recipe.float_bits}"
    form = _form(layer_plan, layer_plan.rule, spec)
    rounded = form.block and layer_plan.name != "embedding" and rounds_inputs(layer_plan.rule)
    return stored_as(layer_plan.rule.weights, form.bits) + (f", inputs int8 in blocks of {form.block}" if rounded else "")


def _bytes(layer_plan: LayerPlan, spec: Spec) -> int:
    """Bytes of a layer's weights and scales."""
    out, inner = layer_plan.shape
    if layer_plan.rule is None:
        return out * inner * spec.recipe.float_bits // 8
    form = _form(layer_plan, layer_plan.rule, spec)
    return -(-out * form.columns * form.bits // 8) + out * form.scales * 4


def _shares(layer_plan: LayerPlan, spec: Spec) -> bool:
    """Whether a head that is the embedding has the same stored bytes as the embedding."""
    if spec.portable or layer_plan.rule is None:
        return not spec.portable
    head, embedding = (form_of(layer_plan.rule.weights, layer_plan.shape[1], rows=rows, fused=True) for rows in (False, True))
    return head == embedding


def needs(model: Transformer, spec: Spec) -> Needs:
    """What the graph will take: the file's bytes, which are exact, and memory for weights, caches and the activations of a chunk.

    Attention has scores for every slot of the longest cache, unless that has more than `UNTILED_SLOTS`. Where attention is composed, it
    has them some three times, and the caches twice: before and after a call.
    """
    written, config = emit(model, spec), model.config
    padding = written.data_bytes - sum(region.bytes for region in written.regions.values())
    chunk, widest = step(spec), max(config.intermediate_size, config.heads * config.head_dim)
    work = WORKSPACE * chunk * widest + 4 * config.vocab_size * (chunk if spec.all_logits else 1)
    caches, longest = cache(spec, config).bytes, max(slots(spec, config))
    scores = 4 * config.heads * chunk * longest
    if not in_place(spec, config):
        work += caches + 3 * scores
    elif longest <= UNTILED_SLOTS:
        work += scores
    work += sum(_packing_bytes(layer_plan, spec) for layer_plan in layer_plans(config, spec.recipe) if layer_plan.name != "embedding")
    return Needs(1, written.model().ByteSize() + padding, written.data_bytes + caches + work)


def _packing_bytes(layer_plan: LayerPlan, spec: Spec) -> int:
    """Memory that a product's weights take beyond their bytes in the file.

    Weights are packed when the graph is loaded: half floats as float32, integers whose inputs are INT8 together with their scales and
    the sums of their blocks. Of the bytes in the file, only scales and the weights of a head that is the embedding stay in memory.
    """
    out, inner = layer_plan.shape
    stored, packed = _bytes(layer_plan, spec), 4 * out * inner
    if layer_plan.rule is not None:
        form = _form(layer_plan, layer_plan.rule, spec)
        stored = packed = stored - 4 * out * form.scales
        packed += 2 * 4 * out * form.scales if form.block and rounds_inputs(layer_plan.rule) else 0
    return round(PACKED * packed) - (0 if layer_plan.shared_with and _shares(layer_plan, spec) else stored)


def lower(model: Transformer, spec: Spec, kept: StageCache, count: Count) -> Lowered:
    """The graph; its weights are still the model's own tensors, which `write` stores."""
    graph = emit(model, spec)
    left = Counter[str]() if spec.portable else _operators(graph.composed)
    taken = _operators(graph.nodes) - left
    ranges: dict[str, int | str] = {"tokens": f"1..{step(spec)}", "past": f"0..{spec.context - 1}", "total": f"1..{spec.context}"}
    ranges |= {slots_name(layer.window): size for layer, size in zip(model.config.layers, slots(spec, model.config), strict=True)}
    inputs, outputs = ([_port(value, ranges) for value in ports] for ports in (graph.inputs, graph.outputs))
    delegation = Delegation(PROVIDER, 1, dict(sorted(taken.items())), dict(sorted(left.items())), {})
    return Lowered((graph, spec, model.config), [Method("main", "step", inputs, outputs)], states(spec, model.config), delegation)


def _operators(nodes: Sequence[onnx.NodeProto]) -> Counter[str]:
    return Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in nodes)


def _port(value: onnx.ValueInfoProto, ranges: Mapping[str, int | str]) -> Port:
    kind = value.type.tensor_type
    sizes = [ranges[size.dim_param] if size.dim_param else size.dim_value for size in kind.shape.dim]
    return Port(value.name, ROLES.get(value.name, "state"), sizes, DTYPES[kind.elem_type])


def states(spec: Spec, config: Config) -> list[State]:
    """The states: keys and values [1, K, positions, E] of every layer."""
    inside, sizes = in_place(spec, config), slots(spec, config)
    return [
        State(before, after, "float32", [1, config.kv_heads, sizes[layer], config.head_dim], 2, config.layers[layer].window, inside, False)
        for layer in range(len(config.layers))
        for before, after in cache_names(layer)
    ]


def write(lowered: Lowered, folder: Path, count: Count) -> list[FileEntry]:
    """Writes the graph, its weights and the configuration for onnxruntime-genai."""
    graph, spec, config = lowered.payload
    graph.write(folder, count)
    (folder / GENAI_FILE).write_text(json.dumps(genai_config(spec, config), indent=2) + "\n", encoding="utf-8")
    roles = {GRAPH_FILE: "program", DATA_FILE: "weights", GENAI_FILE: "config"}
    return [FileEntry.of(folder, name, role) for name, role in roles.items()]


def genai_config(spec: Spec, config: Config) -> dict[str, Any]:
    """The contents of `GENAI_FILE`, which onnxruntime-genai reads."""
    shared = in_place(spec, config)
    (keys, keys_after), (values, values_after) = ((name.replace(".0.", ".%d.") for name in pair) for pair in cache_names(0))
    inputs = {"input_ids": TOKENS, "past_key_names": keys, "past_value_names": values} | ({"position_ids": POSITIONS} if shared else {})
    options = (FLOAT_INPUTS if spec.portable else {}) | ({"intra_op_num_threads": spec.threads} if spec.threads else {})
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **options},
        "filename": GRAPH_FILE,
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "inputs": inputs,
        "outputs": {"logits": LOGITS, "present_key_names": keys_after, "present_value_names": values_after},
        "num_attention_heads": config.heads,
        "num_hidden_layers": len(config.layers),
        "num_key_value_heads": config.kv_heads,
    }
    end = spec.stop[0] if spec.stop else 0
    model = {
        # The one of its model types that has nothing but a decoder.
        "type": "llama",
        "bos_token_id": end if spec.bos is None else spec.bos,
        "eos_token_id": list(spec.stop),
        "pad_token_id": end,
        "context_length": spec.context,
        "vocab_size": config.vocab_size,
        "decoder": decoder,
    }
    return {"model": model, "search": {"do_sample": False, "max_length": spec.context, "past_present_share_buffer": shared}}
