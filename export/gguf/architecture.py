"""Which of llama.cpp's architectures computes a model, and what it must be told.

It is chosen by what the model computes, not by the model's name: a Qwen2 is a Llama with biases, MobileLLM-R1 a Qwen3 whose norms of q
and k are ones. Source: llama.cpp `src/models/`, of the version in `runtime/llama_library.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lobit.layout import gguf_name
from lobit.model import Config, Layer
from lobit.rope import LinearScaling, Rope, YarnScaling
from lobit.runtime.gguf_ports import PAIRED

NEVER = -1e30
"""Logit of an attention sink that takes no share of the attention: `granite_swa` has sinks."""
NOPE_STEP = 4
"""`smollm3` leaves every fourth layer without rotary embedding, whatever the file says."""
GEMMA3_27B = 62
"""Number of layers by which llama.cpp tells the Gemma 3 whose attention has another scale."""
SCALE_ERROR = 0.01
"""How far an embedding's scale may be from the square root of the width: transformers rounds it to bfloat16, llama.cpp does not."""
OTHER = "take target xnnpack or onnx"
"""The way out where llama.cpp has no architecture for a model."""


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp and what a file says of the model."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    """Hyperparameters besides those that every architecture has, without the architecture's name before them."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that are not the model's own, float32, by their names in the file."""
    weightless: bool = False
    """Whether norms of q and k are written that the model has not: ones."""

    @property
    def is_paired(self) -> bool:
        """Whether rows of q and k are written in another order."""
        return self.name in PAIRED

    @property
    def is_fused(self) -> bool:
        """Whether q, k and v, and gate and up, are one tensor each."""
        return self.name == "phi3"


@dataclass(frozen=True)
class Kind:
    """What an architecture can compute."""

    build: Callable[[Config, tuple[Layer, ...]], Architecture]
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    """Those of `qkv_bias`, `o_bias` and `mlp_bias` that it has."""
    qk_norm: bool = False
    post_norms: bool = False
    sub_norms: bool = False
    rope: Callable[[Rope, Config], str | None] = lambda rope, config: None
    """Why it cannot turn by a rotary embedding, or None."""
    square: bool = False
    """Whether all heads together must be as wide as the model."""


def layers_within(config: Config, context: int) -> tuple[Layer, ...]:
    """The layers as a context sees them: a window that holds all of it is none. Gemma 3 keeps its own, on which its rotary bases hang."""
    if config.post_norms:
        return config.layers
    return tuple(replace(layer, window=None) if layer.window and layer.window >= context else layer for layer in config.layers)


def choose(config: Config, context: int) -> tuple[Architecture, list[str]]:
    """The architecture for a model within a context, and every reason why llama.cpp would not compute the model with it."""
    layers = layers_within(config, context)
    name = _name(config, layers)
    kind = KINDS[name]
    problems = list(_problems(config, layers, kind, name))
    return (Architecture("") if problems else kind.build(config, layers)), problems


def _name(config: Config, layers: tuple[Layer, ...]) -> str:
    if config.sub_norms:
        return "bitnet"
    if config.post_norms:
        return "gemma3"
    if config.qk_norm != "none":
        return "qwen3"
    ropes = [layer.rope for layer in layers]
    plain = not any(layer.window for layer in layers) and not (config.qkv_bias or config.o_bias or config.mlp_bias)
    if plain and [rope is None for rope in ropes] == [(i + 1) % NOPE_STEP == 0 for i in range(len(ropes))] and None in ropes:
        return "smollm3"
    if any(layer.window for layer in layers):
        return "granite_swa"
    return "phi3" if any(rope and rope.dim < config.head_dim for rope in ropes) else "llama"


def _problems(config: Config, layers: tuple[Layer, ...], kind: Kind, name: str) -> Iterator[str]:
    told = f"llama.cpp's {name}, the nearest of its architectures,"
    if config.activation != kind.activation:
        yield f"{told} has {kind.activation} where the model has {config.activation}: {OTHER}"
    for bias in ("qkv_bias", "o_bias", "mlp_bias"):
        if getattr(config, bias) and bias not in kind.biases:
            yield f"{told} has no {bias}: {OTHER}"
    for what, has in (("sub_norms", kind.sub_norms), ("post_norms", kind.post_norms)):
        if getattr(config, what) != has:
            yield f"{told} {'has' if has else 'has no'} {what}: {OTHER}"
    if (config.qk_norm != "none") != kind.qk_norm or (config.qk_norm == "weightless" and config.post_norms):
        yield f"{told} {'has' if kind.qk_norm else 'has no'} norms of q and k: {OTHER}"
    if config.attention_softcap is not None or (config.logits_softcap is not None and name != "gemma3"):
        yield f"{told} caps no scores: {OTHER}"
    if kind.square and config.heads * config.head_dim != config.hidden_size:
        yield f"{told} has heads of {config.hidden_size} entries together, the model {config.heads * config.head_dim}: {OTHER}"
    if name not in ("gemma3", "granite_swa") and any(layer.window for layer in layers):
        smallest = min(layer.window for layer in layers if layer.window)
        yield f"{told} has no windows: {OTHER}, or --context {smallest}, which every window holds"
    yield from _rope_problems(config, layers, kind, told, name)
    if name == "gemma3":
        yield from _gemma3_problems(config, layers, told)
    elif config.embedding_scale != 1 or config.attention_scale not in (None, config.head_dim**-0.5):
        yield f"{told} has no scales of its own for embedding and attention: {OTHER}"
    if name == "bitnet" and not config.tied:
        yield f"{told} has the embedding as its head: {OTHER}"


def _rope_problems(config: Config, layers: tuple[Layer, ...], kind: Kind, told: str, name: str) -> Iterator[str]:
    ropes = {layer.rope for layer in layers}
    if None in ropes and name not in ("smollm3", "granite_swa"):
        yield f"{told} turns every layer, and {sum(layer.rope is None for layer in layers)} have no rotary embedding: {OTHER}"
    if len(ropes - {None}) > 1 and name != "gemma3":
        yield f"{told} has one rotary embedding for all layers: {OTHER}"
    for rope in sorted(filter(None, ropes), key=str):
        why = kind.rope(rope, config)
        if why:
            yield f"{told} {why}: {OTHER}"


def _gemma3_problems(config: Config, layers: tuple[Layer, ...], told: str) -> Iterator[str]:
    exact = math.sqrt(config.hidden_size)
    if abs(config.embedding_scale / exact - 1) > SCALE_ERROR:
        yield f"{told} multiplies embeddings by {exact:g}, the model by {config.embedding_scale:g}: {OTHER}"
    own = (config.hidden_size // config.heads if len(layers) == GEMMA3_27B else config.head_dim) ** -0.5
    if not math.isclose(config.scale, own, rel_tol=1e-6):
        yield f"{told} scales attention by {own:g}, the model by {config.scale:g}: {OTHER}"
    if len({layer.window for layer in layers} - {None}) > 1 or _period(layers) is None:
        yield f"{told} has a window on all layers but every n-th: {OTHER}"
    for windowed in (False, True):
        if len({layer.rope for layer in layers if bool(layer.window) == windowed}) > 1:
            yield f"{told} has one rotary embedding for all layers with a window, and one for the others: {OTHER}"
    if any(layer.window and layer.rope and layer.rope.scaling for layer in layers):
        yield f"{told} scales the rotary embedding of layers without a window alone: {OTHER}"


def _period(layers: tuple[Layer, ...]) -> int | None:
    """The n for which every n-th layer alone has no window; None: there is none."""
    found = [layer.window is not None for layer in layers]
    if not any(found):
        return 1
    return next((n for n in range(2, len(layers) + 2) if found == [(i + 1) % n != 0 for i in range(len(found))]), None)


def _whole(rope: Rope, config: Config) -> str | None:
    if rope.dim < config.head_dim:
        return f"turns whole heads, the model {rope.dim} of {config.head_dim} entries"
    return None


def _unscaled(rope: Rope, config: Config) -> str | None:
    if rope.scaling is not None and not isinstance(rope.scaling, LinearScaling):
        return f"has no {type(rope.scaling).__name__} of the rotary embedding"
    return _whole(rope, config)


def _yarn(rope: Rope, config: Config) -> str | None:
    return _whole(rope, config) if isinstance(rope.scaling, YarnScaling) and rope.scaling.truncate else _unscaled(rope, config)


def _turning(rope: Rope) -> dict[str, Any]:
    """Fields of a rotary embedding for architectures that know no factors for single frequencies."""
    fields: dict[str, Any] = {"rope.freq_base": float(rope.theta), "rope.dimension_count": rope.dim}
    match rope.scaling:
        case LinearScaling(factor):
            fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(factor)}
        case YarnScaling() as yarn:
            fields |= {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": float(yarn.factor),
                "rope.scaling.original_context_length": yarn.original_context,
                "rope.scaling.yarn_beta_fast": float(yarn.beta_fast),
                "rope.scaling.yarn_beta_slow": float(yarn.beta_slow),
                "rope.scaling.attn_factor": yarn.attention_factor / (1 + 0.1 * math.log(yarn.factor)),
            }
    return fields


def _by_factors(rope: Rope, *names: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields and tensors of a rotary embedding of any kind: one factor for each frequency."""
    fields = _turning(replace(rope, scaling=None))
    if rope.scaling is None:
        return fields, {}
    frequencies, factor = rope.frequencies()
    plain, _ = replace(rope, scaling=None).frequencies()
    return {**fields, "rope.scaling.attn_factor": factor}, dict.fromkeys(names, plain / frequencies)


def _only_rope(layers: tuple[Layer, ...]) -> Rope:
    return next(layer.rope for layer in layers if layer.rope)


def _plain(name: str) -> Callable[[Config, tuple[Layer, ...]], Architecture]:
    return lambda config, layers: Architecture(name, _turning(_only_rope(layers)))


def _llama(config: Config, layers: tuple[Layer, ...]) -> Architecture:
    return Architecture("llama", *_by_factors(_only_rope(layers), "rope_freqs.weight"))


def _phi3(config: Config, layers: tuple[Layer, ...]) -> Architecture:
    fields, vectors = _by_factors(_only_rope(layers), "rope_factors_long.weight", "rope_factors_short.weight")
    return Architecture("phi3", fields, vectors)


def _granite(config: Config, layers: tuple[Layer, ...]) -> Architecture:
    fields, vectors = _by_factors(_only_rope(layers), "rope_freqs.weight")
    windowed = [layer.window is not None for layer in layers]
    fields |= {
        "logit_scale": 1.0,
        "attention.sliding_window": next(layer.window for layer in layers if layer.window),
        "attention.sliding_window_pattern": windowed,
        "attention.rope_pattern": [layer.rope is not None for layer in layers],
    }
    vectors |= {f"blk.{i}.attn_sinks.weight": torch.full((config.heads,), NEVER) for i in range(len(layers))}
    return Architecture("granite_swa", fields, vectors)


def _qwen3(config: Config, layers: tuple[Layer, ...]) -> Architecture:
    weightless = config.qk_norm == "weightless"
    names = [gguf_name(f"layers.{i}.attention.{part}_norm.weight") for i in range(len(layers)) for part in "qk"]
    vectors = {name: torch.ones(config.head_dim) for name in names} if weightless else {}
    return Architecture("qwen3", _turning(_only_rope(layers)), vectors, weightless)


def _gemma3(config: Config, layers: tuple[Layer, ...]) -> Architecture:
    period = _period(layers)
    ropes = {bool(layer.window): layer.rope for layer in layers}
    full, local = ropes.get(False), ropes.get(True)
    fields = _turning(full or _only_rope(layers))
    if local:
        fields |= {
            "attention.sliding_window": next(layer.window for layer in layers if layer.window),
            "attention.sliding_window_pattern": period,
            "rope.freq_base_swa": float(local.theta),
        }
    if config.logits_softcap is not None:
        fields["final_logit_softcapping"] = config.logits_softcap
    return Architecture("gemma3", fields)


ALL = ("qkv_bias", "o_bias", "mlp_bias")
KINDS = {
    "llama": Kind(_llama, biases=ALL, rope=_whole),
    "granite_swa": Kind(_granite, biases=ALL, rope=_whole),
    "qwen3": Kind(_qwen3, biases=("qkv_bias",), qk_norm=True, rope=_yarn),
    "smollm3": Kind(_plain("smollm3"), rope=_yarn),
    "phi3": Kind(_phi3, square=True),
    "gemma3": Kind(_gemma3, "gelu_tanh", biases=("qkv_bias",), qk_norm=True, post_norms=True, rope=_unscaled),
    "bitnet": Kind(_plain("bitnet"), sub_norms=True, rope=_unscaled, square=True),
}
"""What each of the architectures that are used can compute."""


def fields_of(config: Config, architecture: Architecture, context: int) -> dict[str, Any]:
    """All hyperparameters of a file, with the architecture's name before them.

    The context of a model with windows that the file leaves out is the one that they hold, so that no app reads more.
    """
    dropped = layers_within(config, context) != config.layers
    values = {
        "context_length": context if dropped else config.max_context,
        "embedding_length": config.hidden_size,
        "block_count": len(config.layers),
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "vocab_size": config.vocab_size,
        **architecture.fields,
    }
    return {f"{architecture.name}.{name}": value for name, value in values.items()}
