"""What each model family adds to a plain Llama block: a reader of its config.json and the names of its tensors.

Adding a family is one reader function and one entry in `FAMILIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lobit.errors import ModelError, listed
from lobit.model import Config, Layer, LinearScaling, Llama3Scaling, Rope

LARGEST_SIZE = 1 << 24
"""No real config.json holds a larger width, depth or vocabulary; a larger one is a damaged file."""


class Fields:
    """A config.json being read: every missing or absurd value is noted, none stops the reading."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.problems: list[str] = []

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number; 1 in its place where it is not usable."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_SIZE:
            return value
        self.problems.append(f"{name} is {value!r}: a whole number from 1 to {LARGEST_SIZE} is needed")
        return 1

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number; 1 in its place where it is not usable."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf:
            return float(value)
        self.problems.append(f"{name} is {value!r}: a positive number is needed")
        return 1.0

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.values.get(name)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.problems.append(f"{name} is {value!r}: true or false is needed")
        return default

    def numbers(self, name: str, length: int) -> list[Any] | None:
        """A list of `length` entries, or None where the file has none."""
        value = self.values.get(name)
        if value is None or (isinstance(value, list) and len(value) == length):
            return value
        self.problems.append(f"{name} has {len(value) if isinstance(value, list) else value!r}: {length} entries are needed")
        return None

    def nested(self, name: str) -> Fields:
        """The object under `name`; problems are noted here."""
        value = self.values.get(name)
        inner = Fields(value if isinstance(value, dict) else {})
        inner.problems = self.problems
        return inner


def _rope(fields: Fields, head_dim: int, default_theta: float = 10000.0) -> Rope:
    """RoPE from transformers 5's `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    parameters = fields.nested("rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling")
    theta = parameters.number("rope_theta", fields.number("rope_theta", default_theta))
    kind = parameters.values.get("rope_type", parameters.values.get("type", "default"))
    scaling: Llama3Scaling | LinearScaling | None = None
    if kind == "llama3":
        scaling = Llama3Scaling(
            parameters.number("factor"),
            parameters.number("low_freq_factor"),
            parameters.number("high_freq_factor"),
            parameters.size("original_max_position_embeddings"),
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            fields.problems.append("rope scaling llama3: low_freq_factor must be below high_freq_factor")
    elif kind == "linear":
        scaling = LinearScaling(parameters.number("factor"))
    elif kind != "default":
        fields.problems.append(f"rope_type is {kind!r}: default, linear and llama3 are known for this family")
    if head_dim % 2:
        fields.problems.append(f"head_dim is {head_dim}: rotary embedding needs an even one")
    return Rope(theta, head_dim, scaling)


def _common(fields: Fields, family: str) -> dict[str, Any]:
    """The fields that every family has, under the names of `Config`."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)
    if fields.values.get("head_dim") is None and hidden % heads:
        fields.problems.append(f"hidden_size {hidden} does not divide by num_attention_heads {heads}, and head_dim is missing")
    if heads % kv_heads:
        fields.problems.append(f"num_attention_heads {heads} does not divide by num_key_value_heads {kv_heads}")
    if fields.values.get("hidden_act", "silu") != "silu":
        fields.problems.append(f"hidden_act is {fields.values['hidden_act']!r}: {family} has silu")
    if fields.values.get("quantization_config"):
        fields.problems.append("quantization_config: quantized checkpoints are not read, take the float one")
    return {
        "family": family,
        "vocab_size": fields.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.size("intermediate_size"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": fields.size("head_dim", max(hidden // heads, 1)),
        "max_context": fields.size("max_position_embeddings"),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tied": fields.flag("tie_word_embeddings"),
    }


def _read_llama(fields: Fields) -> Config:
    """Llama 2, Llama 3.x, TinyLlama, SmolLM2 (transformers `LlamaConfig`)."""
    common = _common(fields, "llama")
    layer = Layer(rope=_rope(fields, common["head_dim"]))
    attention_bias = fields.flag("attention_bias")
    return Config(
        **common,
        layers=(layer,) * fields.size("num_hidden_layers"),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias"),
    )


def _read_qwen3(fields: Fields) -> Config:
    """Qwen3: a weighted norm on every head of q and k (transformers `Qwen3Config`)."""
    fields.values = {"head_dim": 128, **fields.values}
    common = _common(fields, "qwen3")
    bias = fields.flag("attention_bias")
    if fields.flag("use_sliding_window"):
        fields.problems.append("use_sliding_window is true: Qwen3 is known without it")
    layer = Layer(rope=_rope(fields, common["head_dim"]))
    layers = (layer,) * fields.size("num_hidden_layers")
    return Config(**common, layers=layers, qkv_bias=bias, o_bias=bias, qk_norm="weighted")


def _read_mobilellm_pro(fields: Fields) -> Config:
    """MobileLLM-Pro: three local layers to a global one, q and k normed without weights (report, Table 1; Llama 4's keys)."""
    common = _common(fields, "mobilellm_p1")
    if fields.values.get("intermediate_size_mlp") is not None:
        common["intermediate_size"] = fields.size("intermediate_size_mlp")
    depth = fields.size("num_hidden_layers")
    kinds = fields.numbers("layer_types", depth) or ["full_attention"] * depth
    unknown = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"})
    if unknown:
        fields.problems.append(f"layer_types has {', '.join(unknown)}: full_attention and sliding_attention are known")
    window = fields.size("sliding_window") if "sliding_attention" in kinds else None
    if 0 in (fields.numbers("no_rope_layers", depth) or []):
        fields.problems.append("no_rope_layers has layers without RoPE: MobileLLM-Pro has none")
    rope = _rope(fields, common["head_dim"])
    layers = tuple(Layer(window if kind == "sliding_attention" else None, rope) for kind in kinds)
    return Config(**common, layers=layers, qk_norm="weightless" if fields.flag("use_qk_norm") else "none")


@dataclass(frozen=True)
class Family:
    """How a family's folder is read."""

    read: Callable[[Fields], Config]
    mlp: str = "mlp"
    """What the family calls its feed-forward module."""
    interleaved: bool = False
    """Rotary embedding pairs neighbours (Llama 4) instead of halves: rows of q and k are permuted on reading."""


FAMILIES: dict[str, Family] = {
    "llama": Family(_read_llama),
    "qwen3": Family(_read_qwen3),
    "mobilellm_p1": Family(_read_mobilellm_pro, mlp="feed_forward", interleaved=True),
}
"""config.json's `model_type` and how it is read."""


def read_config(values: Mapping[str, Any]) -> Config:
    """The `Config` of a parsed config.json.

    Raises:
        ModelError: the family is unknown, or fields are missing or absurd; all are named.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelError(f"model_type {kind!r} is not a family that lobit knows: {', '.join(sorted(FAMILIES))}")
    fields = Fields(values)
    config = FAMILIES[kind].read(fields)
    if fields.problems:
        raise ModelError(listed(fields.problems, f"config.json of a {kind} model has {len(fields.problems)} unusable fields:"))
    return config


def tensor_names(config: Config) -> dict[str, str]:
    """Our name of every tensor of the model, and the family's name in its checkpoints."""
    mlp = FAMILIES[config.family].mlp
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not config.tied:
        names["head.weight"] = "lm_head.weight"
    for i in range(len(config.layers) // config.repeats):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        names[f"{ours}attention_norm.weight"] = f"{theirs}input_layernorm.weight"
        names[f"{ours}mlp_norm.weight"] = f"{theirs}post_attention_layernorm.weight"
        for part in "qkvo":
            bias = config.o_bias if part == "o" else config.qkv_bias
            for kind in ("weight", "bias") if bias else ("weight",):
                names[f"{ours}attention.{part}.{kind}"] = f"{theirs}self_attn.{part}_proj.{kind}"
        for part in ("gate", "up", "down"):
            for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
                names[f"{ours}mlp.{part}.{kind}"] = f"{theirs}{mlp}.{part}_proj.{kind}"
        if config.qk_norm == "weighted":
            for part in "qk":
                names[f"{ours}attention.{part}_norm.weight"] = f"{theirs}self_attn.{part}_norm.weight"
    return names


def _is_paired(config: Config, name: str) -> bool:
    part = name.rpartition(".")[0]
    return FAMILIES[config.family].interleaved and part.endswith(("attention.q", "attention.k"))


def from_checkpoint(config: Config, name: str, tensor: Tensor) -> Tensor:
    """A tensor as our model holds it: of interleaved families, the even rows of each head of q and k first, then the odd."""
    if not _is_paired(config, name):
        return tensor
    heads = tensor.reshape(-1, config.head_dim // 2, 2, *tensor.shape[1:])
    return heads.transpose(1, 2).reshape(tensor.shape)


def to_checkpoint(config: Config, name: str, tensor: Tensor) -> Tensor:
    """The inverse of `from_checkpoint`."""
    if not _is_paired(config, name):
        return tensor
    heads = tensor.reshape(-1, 2, config.head_dim // 2, *tensor.shape[1:])
    return heads.transpose(1, 2).reshape(tensor.shape)
