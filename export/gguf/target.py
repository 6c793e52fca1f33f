"""Target `gguf`: one file for llama.cpp, with the checkpoint's integers as they are."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from lobit.errors import MissingPartError
from lobit.export.gguf.architecture import choose, fields_of
from lobit.export.gguf.arithmetic import arithmetic as arithmetic
from lobit.export.gguf.file import entries
from lobit.export.gguf.file import write as write_file
from lobit.export.gguf.vocabulary import fields_of as vocabulary_fields
from lobit.export.gguf.vocabulary import problems_of
from lobit.export.gguf.weights import form, misfit, pattern_of
from lobit.export.size_groups import Tally
from lobit.export.stages import Count
from lobit.export.target import Costs, Lowered, Needs, Reader, RunGraph, Spec, foreign_options
from lobit.model import Config, Transformer
from lobit.quant_recipes.apply import LayerPlan, layer_plans
from lobit.quant_recipes.sizes import FLOAT, kind_of, norms_and_biases
from lobit.runtime.gguf_ports import GGUF_FILE, WEIGHTLESS
from lobit.runtime.manifest import CacheInfo, Delegation, FileEntry, Method, Port, TensorGroup
from lobit.stage_cache import StageCache

COSTS = Costs(
    imports_seconds=3.0,
    imports_bytes=700_000_000,  # mostly PyTorch
    model_copies=1.1,
    head_copies=5.2,  # the widest layer, while it is quantized
    seconds_per_parameter={"quantize": 11e-9, "lower": 1e-9, "write": 12e-9},
    seconds_per_part=0.1,
)
CHUNK = 512
OPERATOR_ERROR = 2.0**-11
"""Queries and the shares of attention are rounded to half precision before their products."""
SLOW_GRAPH = False
VOCABULARY_BYTES = 34
"""Bytes of the file for each token of the vocabulary, its merge included: 36 for SmolLM2, 17 for a small one without merges."""
FIXED_BYTES, TENSOR_BYTES = 2048, 80
"""Bytes of the fields, and of a tensor's entry in the list with what fills it up to 32."""
PADDED = 256
"""Positions of llama.cpp's cache come in multiples of this."""
WORKSPACE = 40
"""Bytes of memory for each token of a chunk and each element of the widest activation."""
PACKED = 1.1
"""Memory that weights take when they are loaded, as a multiple of their size: some are put into another order."""


def versions() -> dict[str, str]:
    """Versions of the package that writes the file, and of llama.cpp, which proves the vocabulary.

    Raises:
        MissingPartError: one of them is not installed.
    """
    try:
        return {name: metadata.version(name) for name in ("gguf", "xllamacpp")}
    except metadata.PackageNotFoundError as error:
        raise MissingPartError(f"target gguf needs a package that is not installed ({error}): pip install 'lobit[gguf]'") from None


def floor(model: Transformer, spec: Spec) -> tuple[Reader, Reader] | None:
    """See `Target.floor`: `arithmetic` says what the program computes."""
    return None


def graph(model: Transformer, spec: Spec) -> RunGraph | None:
    """See `Target.graph`: there is no graph, the file has weights alone."""
    return None


def check(spec: Spec, config: Config) -> list[str]:
    """Every reason why llama.cpp cannot hold the model under the recipe."""
    architecture, reasons = choose(config, spec.context)
    problems = foreign_options(spec, "gguf") + reasons
    plans = layer_plans(config, spec.recipe)
    found = {pattern_of(row.name): why for row in plans if row.rule and (why := misfit(row.rule, row.shape[1]))}
    if found:
        told = ", ".join(f"{name} ({why})" for name, why in found.items())
        exclusion = " ".join(f"--except '{name}'" for name in found)
        problems.append(f"{told}: GGUF has blocks of 32 weights; keep these in floating point with {exclusion}, or another --group-size")
    if architecture.is_fused:
        problems += _unlike(plans, spec)
    return problems


def check_tokenizer(config: Config, folder: Path) -> list[str]:
    """See `target.problems_of`: why llama.cpp does not cut texts as the model's tokenizer does, or end them where it does."""
    return problems_of(folder, config.vocab_size)


def _unlike(plans: list[LayerPlan], spec: Spec) -> list[str]:
    """Products that are one tensor in the file and have weights of several forms."""
    found = []
    for parts in ("qkv", ("gate", "up")):
        rows = [row for row in plans if row.name.rpartition(".")[2] in parts]
        layers = {row.name.split(".")[1] for row in rows}
        for layer in sorted(layers, key=int):
            kinds = {(form(row, spec), row.rule and row.rule.weights) for row in rows if row.name.split(".")[1] == layer}
            if len(kinds) > 1:
                found.append(f"{', '.join(parts)} of layer {layer} are one tensor in llama.cpp and have several grids: give them one")
    return found


def step(spec: Spec) -> int:
    """See `Target.step`."""
    return spec.chunk


def options(spec: Spec) -> dict[str, str | int | bool]:
    """See `Target.options`: whether ternary weights take the fewest bytes. How the file is run is left to apps."""
    return {"smallest": spec.smallest}


def cache(spec: Spec, config: Config) -> CacheInfo:
    """The key-value cache in half precision. Layers with a window keep all positions too, so that an engine can be rewound."""
    slots = [spec.context] * len(config.layers)
    return CacheInfo("float16", slots, 2 * 2 * sum(slots) * config.kv_heads * config.head_dim, 0)


def weights(spec: Spec, config: Config) -> list[TensorGroup]:
    """The bytes of each kind of weights, integers and scales together. A format names the recipe's grid and GGUF's type."""
    tally = Tally()
    for row in layer_plans(config, spec.recipe):
        if row.shared_with is None:
            times = config.repeats if row.name.startswith("layers.") else 1
            out, inner = row.shape
            tally.add(kind_of(row.name), _format(row, spec), out * inner, times * out * form(row, spec).row_bytes(inner))
    for kind, count in norms_and_biases(config):
        tally.add(kind, "float32", count, FLOAT * count)
    architecture, _ = choose(config, spec.context)
    extra = sum(vector.numel() for vector in architecture.vectors.values())
    if extra:
        tally.add("tables", "float32", 0, FLOAT * extra)
    return tally.groups()


def _format(row: LayerPlan, spec: Spec) -> str:
    """Names a layer's grid in the recipe, GGUF's type, and how llama.cpp rounds the inputs."""
    kept = form(row, spec)
    if row.rule is None:
        return f"float{spec.recipe.float_bits}"
    rounded = "" if row.name == "embedding" else f", inputs int8 in blocks of {kept.block}"
    return f"{row.rule.weights} as {kept.type.name}{rounded}"


def needs(model: Transformer, spec: Spec) -> Needs:
    """What the file takes besides weights, and what running it takes: weights, cache, and the activations and scores of a chunk."""
    config = model.config
    architecture, _ = choose(config, spec.context)
    tensors = entries(model, architecture, spec)
    overhead = FIXED_BYTES + TENSOR_BYTES * len(tensors) + VOCABULARY_BYTES * config.vocab_size
    widest = max(config.intermediate_size, config.heads * config.head_dim)
    padded = -(-spec.context // PADDED) * PADDED
    work = step(spec) * (WORKSPACE * widest + 4 * config.heads * padded) + 4 * config.vocab_size
    kept = round(PACKED * sum(entry.bytes for entry in tensors))
    return Needs(1, overhead, kept + cache(spec, config).bytes * padded // spec.context + work)


def lower(model: Transformer, spec: Spec, kept: StageCache, count: Count) -> Lowered:
    """The file's tensors, which are still the model's own; `write` puts them into blocks one by one."""
    architecture, _ = choose(model.config, spec.context)
    tensors, chunk = entries(model, architecture, spec), f"1..{step(spec)}"
    inputs = [Port("token", "tokens", [1, chunk], "int32"), Port("pos", "positions", [1, chunk], "int32")]
    scored: int | str = chunk if spec.all_logits else 1
    outputs = [Port("logits", "logits", [1, scored, model.config.vocab_size], "float32")]
    delegation = Delegation(f"llama.cpp, {architecture.name}", 1, {}, {}, {})
    return Lowered((architecture, tensors, spec, model.config), [Method("llama_decode", "step", inputs, outputs)], [], delegation)


def write(lowered: Lowered, folder: Path, count: Count) -> list[FileEntry]:
    """Writes the file. The tokenizer is that of the folder."""
    architecture, tensors, spec, config = lowered.payload
    fields = {
        "general.quantization_version": 2,
        WEIGHTLESS: architecture.weightless,
        **fields_of(config, architecture, spec.context),
        **vocabulary_fields(folder, config.vocab_size, spec.bos, spec.stop),
    }
    write_file(folder / GGUF_FILE, architecture.name, fields, tensors, count)
    return [FileEntry.of(folder, GGUF_FILE, "program")]
