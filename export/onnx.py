"""Target `onnx`: a graph for ONNX Runtime, in its own fast operators or in standard ones; a folder for onnxruntime-genai too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from lobit.export.onnx_fused import slots_name, turns_inside, writes_in_place
from lobit.export.onnx_graph import emit
from lobit.export.onnx_weights import SMALLEST_BLOCK, product_bits, product_block, rounds_inputs, row_block
from lobit.export.stages import Count
from lobit.export.target import Costs, Lowered, Needs, Spec
from lobit.kept import Kept
from lobit.model import Config, Transformer
from lobit.quant_recipes.apply import Fate, fates, skeleton
from lobit.quant_recipes.sizes import kind_of
from lobit.runtime.manifest import CacheInfo, Delegation, FileEntry, Port, TensorGroup
from lobit.runtime.onnx_ports import DATA_FILE, FLOAT_INPUTS, GRAPH_FILE, LOGITS, POSITIONS, TOKENS, cache_names

PROVIDER = "CPUExecutionProvider"
GENAI_FILE = "genai_config.json"
SLACK = 64
"""Slots of a layer's cache beyond its window: it is moved up when they are full, not with every token."""
NAMES: dict[int, str] = {TensorProto.INT64: "int64", TensorProto.FLOAT: "float32"}
COSTS = Costs(
    imports_seconds=3.0,
    imports_bytes=710_000_000,  # PyTorch above all
    model_copies=1.1,
    head_copies=5.2,  # the widest layer, while it is quantized
    seconds_per_parameter={"quantize": 11e-9, "lower": 1e-9, "write": 6e-9},
    seconds_per_part=0.1,
)
WORKSPACE = 40
"""Bytes for each token and feed-forward element of a chunk."""


def versions() -> dict[str, str]:
    """Of ONNX, whose schemas a graph is made by."""
    return {"onnx": metadata.version("onnx")}


def check(spec: Spec, config: Config) -> list[str]:
    """Every reason why ONNX Runtime's operators cannot hold the model under the recipe."""
    groups = {fate.rule.weights.group_size for fate in fates(config, spec.recipe) if fate.rule} - {None}
    odd = sorted(size for size in groups if size and size & -size < SMALLEST_BLOCK)
    if spec.portable or not odd:
        return []
    told = f"group_size={', '.join(map(str, odd))}: ONNX Runtime's products need a multiple of {SMALLEST_BLOCK}"
    return [f"{told}: choose such a size, or --portable"]


def slots(spec: Spec, config: Config) -> list[int]:
    """Positions that each layer's cache keeps."""
    if spec.portable or not writes_in_place(config):
        return [spec.context] * len(config.layers)
    return [min(layer.window + SLACK, spec.context) if layer.window else spec.context for layer in config.layers]


def cache(spec: Spec, config: Config) -> CacheInfo:
    """The key-value cache, of floats: ONNX Runtime's attention has INT8 entries with scales that are fixed beforehand alone."""
    kept = slots(spec, config)
    return CacheInfo("float32", kept, 2 * sum(kept) * config.kv_heads * config.head_dim * 4, 0)


def weights(spec: Spec, config: Config) -> list[TensorGroup]:
    """The bytes of each kind of weights in the data file, integers and scales together.

    A format says what the recipe has, and what the graph has where that is another.
    """
    groups: dict[tuple[str, str], list[int]] = {}

    def add(kind: str, format: str, parameters: int, size: int) -> None:
        group = groups.setdefault((kind, format), [0, 0])
        group[0] += parameters
        group[1] += size

    for fate in fates(config, spec.recipe):
        format, size = _held(fate, spec)
        again = fate.shared_with is not None
        if not (again and _shares(fate, spec)):
            add(kind_of(fate.name), format, 0 if again else fate.shape[0] * fate.shape[1], size)
    for name, tensor in skeleton(config).named_parameters():
        if name.rpartition(".")[2] == "bias" or "norm" in name:
            add("biases" if name.endswith("bias") else "norms", "float32", tensor.numel(), tensor.numel() * 4)
    if not spec.portable and writes_in_place(config):
        inside = [rope for rope in {layer.rope for layer in config.layers if layer.rope} if turns_inside(config, rope)]
        for rope in inside:
            add("tables", "float32", 0, spec.context * rope.dim * 4)
    return [TensorGroup(kind, format, *sizes) for (kind, format), sizes in groups.items()]


def _held(fate: Fate, spec: Spec) -> tuple[str, int]:
    """A layer's numbers, and their bytes with scales."""
    (out, inner), recipe = fate.shape, spec.recipe
    if fate.rule is None:
        return f"float{recipe.float_bits}", out * inner * recipe.float_bits // 8
    rule, grid, found = fate.rule, fate.rule.weights, fate.name == "embedding"
    block = row_block(grid, inner) if found else product_block(grid, inner)
    if spec.portable or block is None:
        bits = 8 if found or grid.bits > 4 else 4
        scales, columns = inner // (grid.group_size or inner), inner
    else:
        bits = product_bits(grid)
        scales = -(-inner // block)
        columns = scales * block
    format = str(grid) if grid.bits == bits else f"{grid} as int{bits}"
    if not found and not spec.portable and rounds_inputs(rule):
        format += f", inputs int8 in blocks of {block}"
    return format, -(-out * columns * bits // 8) + out * scales * 4


def _shares(fate: Fate, spec: Spec) -> bool:
    """Whether a head that is the embedding is the same bytes as the embedding is stored in."""
    if spec.portable or fate.rule is None:
        return not spec.portable
    grid, inner = fate.rule.weights, fate.shape[1]
    return row_block(grid, inner) == product_block(grid, inner)


def needs(model: Transformer, spec: Spec) -> Needs:
    """What the graph will take: the file's bytes exactly; in memory the weights, caches, and what a chunk needs on its way."""
    graph, config = emit(model, spec), model.config
    padding = graph.data_bytes - sum(region.bytes for region in graph.regions.values())
    work = WORKSPACE * spec.chunk * max(config.intermediate_size, config.heads * config.head_dim) + 4 * config.vocab_size
    return Needs(1, graph.model().ByteSize() + padding, graph.data_bytes + cache(spec, config).bytes + work)


def graph(model: Transformer, spec: Spec) -> None:
    """There is none before the file."""


def lower(model: Transformer, spec: Spec, kept: Kept, count: Count) -> Lowered:
    """The graph; its weights are still those of the model."""
    graph = emit(model, spec)
    left = _operators(graph.composed)
    taken = _operators(graph.nodes) - left
    ranges: dict[str, int | str] = {"tokens": f"1..{spec.chunk}", "past": f"0..{spec.context - 1}", "total": f"1..{spec.context}"}
    ranges |= {slots_name(layer.window): size for layer, size in zip(model.config.layers, slots(spec, model.config), strict=True)}
    inputs, outputs = ([_port(value, ranges) for value in ports] for ports in (graph.inputs, graph.outputs))
    delegation = Delegation(PROVIDER, 1, dict(sorted(taken.items())), dict(sorted(left.items())))
    return Lowered((graph, spec, model.config), inputs, outputs, delegation)


def _operators(nodes: Sequence[onnx.NodeProto]) -> Counter[str]:
    return Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in nodes)


def _port(value: onnx.ValueInfoProto, ranges: Mapping[str, int | str]) -> Port:
    kind = value.type.tensor_type
    sizes = [ranges[size.dim_param] if size.dim_param else size.dim_value for size in kind.shape.dim]
    return Port(value.name, sizes, NAMES[kind.elem_type])


def write(lowered: Lowered, folder: Path, count: Count) -> list[FileEntry]:
    """Writes the graph, its weights, and what onnxruntime-genai wants to know."""
    graph, spec, config = lowered.payload
    graph.write(folder, count)
    (folder / GENAI_FILE).write_text(json.dumps(genai_config(spec, config), indent=2) + "\n", encoding="utf-8")
    roles = {GRAPH_FILE: "program", DATA_FILE: "weights", GENAI_FILE: "config"}
    return [FileEntry.of(folder, name, role) for name, role in roles.items()]


def genai_config(spec: Spec, config: Config) -> dict[str, Any]:
    """What onnxruntime-genai reads of a folder."""
    in_place = not spec.portable and writes_in_place(config)
    (keys, keys_after), (values, values_after) = ((name.replace(".0.", ".%d.") for name in pair) for pair in cache_names(0))
    inputs = {"input_ids": TOKENS, "past_key_names": keys, "past_value_names": values} | ({"position_ids": POSITIONS} if in_place else {})
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **(FLOAT_INPUTS if spec.portable else {})},
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
        # Of its model types the one that has nothing beside a decoder.
        "type": "llama",
        "bos_token_id": end if spec.bos is None else spec.bos,
        "eos_token_id": list(spec.stop),
        "pad_token_id": end,
        "context_length": spec.context,
        "vocab_size": config.vocab_size,
        "decoder": decoder,
    }
    return {"model": model, "search": {"do_sample": False, "max_length": spec.context, "past_present_share_buffer": in_place}}
