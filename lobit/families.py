"""What each model family adds to a plain Llama block: a reader of its config.json, and its checkpoints' names of lobit's modules.

Adding a family is one reader function and one entry in `FAMILIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from lobit.config_fields import FULL, LARGEST_SIZE, SLIDING, Fields, layers_with_rope, long_rope, only_rope, read_rope, read_windows
from lobit.errors import ModelError, listed, shown
from lobit.model import Config, Layer
from lobit.rope import Rope, YarnScaling

ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh", "relu2"]] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
"""transformers' names of the activations, and lobit's."""


OF_THE_WHOLE = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
"""Fields that a model of images and text has outside of its `text_config`, and that hold for its text model too."""


def _common(fields: Fields, width: str = "intermediate_size", act: str = "hidden_act") -> dict[str, Any]:
    """The fields that every family has, under the names of `Config`.

    Args:
        fields: of config.json.
        width: the family's field for the width of the feed-forward.
        act: the family's field for the activation.
    """
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)
    if fields.values.get("head_dim") is None and hidden % heads:
        fields.problems.append(f"hidden_size {hidden} does not divide by num_attention_heads {heads}, and head_dim is missing")
    if heads % kv_heads:
        fields.problems.append(f"num_attention_heads {heads} does not divide by num_key_value_heads {kv_heads}")
    activation = fields.values.get(act, "silu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        fields.problems.append(f"{act} is {shown(activation)}: {', '.join(ACTIVATIONS)} are known")
    return {
        "family": fields.values["model_type"],
        "vocab_size": fields.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.size(width),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": fields.size("head_dim", max(hidden // heads, 1)),
        "max_context": fields.size("max_position_embeddings"),
        "norm_eps": fields.number("rms_norm_eps", 1e-6, largest=0.1),
        "tied": fields.flag("tie_word_embeddings"),
        "activation": ACTIVATIONS.get(str(activation), "silu"),
        "ternary": _ternary(fields),
    }


def _ternary(fields: Fields) -> Literal["none", "multiply", "divide", "online"]:
    """How the checkpoint keeps the layers' weights (`Config.ternary`), from transformers' `BitNetQuantConfig`."""
    quantization = fields.nested("quantization_config")
    if not quantization.values:
        return "none"
    method, kept = quantization.values.get("quant_method"), quantization.values.get("modules_to_not_convert")
    if method == "torchao":
        return "none"  # the metadata of the weights' files describe each tensor
    linear, mode = (quantization.values.get(*pair) for pair in (("linear_class", "bitlinear"), ("quantization_mode", "offline")))
    if method != "bitnet":
        fields.problems.append(f"quantization_config is of {shown(method)}: bitnet, torchao and floats are read, take the float checkpoint")
    elif kept not in (None, ["lm_head"]):
        fields.problems.append(f"modules_to_not_convert is {shown(kept)}: ternary layers with all but lm_head converted are read")
    elif quantization.flag("use_rms_norm"):
        fields.problems.append("use_rms_norm is true: norms inside of ternary layers are not known")
    elif (linear, mode) == ("autobitlinear", "online"):
        return "online"
    elif mode != "offline" or linear not in ("autobitlinear", "bitlinear"):
        fields.problems.append(f"linear_class is {shown(linear)} in mode {shown(mode)}: autobitlinear, or bitlinear offline, is known")
    return "multiply" if linear == "autobitlinear" else "divide"


def _read_llama(fields: Fields) -> Config:
    """Llama 2 and 3, TinyLlama, SmolLM2, Danube3, TriLM, Bonsai (transformers `LlamaConfig`), and MobileLLM.

    MobileLLM has its own field for a head that shares the embedding, and may run each block twice in a row (facebookresearch/MobileLLM,
    utils/modeling_llama.py).
    """
    common = _common(fields)
    common["tied"] |= fields.flag("share_embedding")
    repeats = 2 if fields.flag("layer_sharing") else 1
    if fields.flag("rope_interleaved"):
        fields.problems.append("rope_interleaved is true: this family's rotary embedding pairs halves")
    layer, bias = Layer(rope=only_rope(fields, common["head_dim"])), fields.flag("attention_bias")
    layers = (layer,) * fields.size("num_hidden_layers") * repeats
    return Config(**common, layers=layers, qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias"), repeats=repeats)


def _qwen_layers(fields: Fields, head_dim: int) -> tuple[Layer, ...]:
    """The layers of Qwen: where windows are used at all, those from `max_window_layers` on have one."""
    depth, full = fields.size("num_hidden_layers"), fields.values.get("max_window_layers")
    used = fields.flag("use_sliding_window") and fields.values.get("sliding_window") is not None
    if not isinstance(full, int) or full < 0:
        fields.problems.append(f"max_window_layers is {shown(full)}: a number of layers is needed")
        full = depth
    windows = read_windows(fields, [SLIDING if used and i >= full else FULL for i in range(depth)])
    if not used and any(windows):
        fields.problems.append(f"layer_types has {SLIDING}, and use_sliding_window or sliding_window says that there are no windows")
    rope = only_rope(fields, head_dim)
    return tuple(Layer(window, rope) for window in windows)


def _read_qwen2(fields: Fields) -> Config:
    """Qwen2 and Qwen2.5: biases on q, k and v alone (transformers `Qwen2Config`)."""
    common = _common(fields)
    return Config(**common, layers=_qwen_layers(fields, common["head_dim"]), qkv_bias=True)


def _read_qwen3(fields: Fields) -> Config:
    """Qwen3: a weighted norm on every head of q and k (transformers `Qwen3Config`)."""
    common, bias = _common(fields), fields.flag("attention_bias")
    layers = _qwen_layers(fields, common["head_dim"])
    return Config(**common, layers=layers, qkv_bias=bias, o_bias=bias, qk_norm="weighted")


def _read_smollm3(fields: Fields) -> Config:
    """SmolLM3: every fourth layer is without rotary embedding (transformers `SmolLM3Config`)."""
    common, bias = _common(fields), fields.flag("attention_bias")
    turned = layers_with_rope(fields, fields.size("num_hidden_layers"))
    windowed = fields.flag("use_sliding_window") and fields.values.get("sliding_window") is not None
    windows = read_windows(fields, [SLIDING if windowed and not turn else FULL for turn in turned])
    rope = only_rope(fields, common["head_dim"])
    layers = tuple(Layer(window, rope if turn else None) for window, turn in zip(windows, turned, strict=True))
    return Config(**common, layers=layers, qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias"))


def _one_window(fields: Fields) -> int | None:
    """The one window of all layers, or None."""
    if fields.values.get("layer_types") is not None:
        fields.problems.append("layer_types is given: this family has one window for all layers, or none")
    return None if fields.values.get("sliding_window") is None else fields.size("sliding_window")


def _read_mistral(fields: Fields) -> Config:
    """Mistral, Danube2: all layers have a window, or none (transformers `MistralConfig`)."""
    common = _common(fields)
    layer = Layer(_one_window(fields), only_rope(fields, common["head_dim"]))
    return Config(**common, layers=(layer,) * fields.size("num_hidden_layers"))


def _read_phi3(fields: Fields) -> Config:
    """Phi-3-mini, Phi-4-mini: fused projections, rotary embedding on a part of each head, longrope (transformers `Phi3Config`)."""
    common = _common(fields)
    rope, common["max_context"] = long_rope(fields, common["head_dim"], common["max_context"])
    layer = Layer(_one_window(fields), rope)
    return Config(**common, layers=(layer,) * fields.size("num_hidden_layers"))


def _read_gemma3(fields: Fields) -> Config:
    """Gemma 3: norms also after attention and feed-forward, two rotary bases, windows (transformers `Gemma3TextConfig`)."""
    common, bias = _common(fields, act="hidden_activation"), fields.flag("attention_bias")
    depth, pattern = fields.size("num_hidden_layers"), fields.size("sliding_window_pattern")
    if fields.flag("use_bidirectional_attention"):
        fields.problems.append("use_bidirectional_attention is true: a model that sees what follows cannot generate")
    if fields.values.get("attn_logit_softcapping") is not None:
        fields.problems.append("attn_logit_softcapping is given: Gemma 3 does not cap its attention scores, transformers ignores it")
    cap = fields.values.get("final_logit_softcapping")
    ropes = _gemma3_ropes(fields, common["head_dim"])
    windows = read_windows(fields, [SLIDING if (i + 1) % pattern else FULL for i in range(depth)])
    return Config(
        **common,
        layers=tuple(Layer(window, ropes[FULL if window is None else SLIDING]) for window in windows),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="weighted",
        post_norms=True,
        embedding_scale=_embedding_scale(fields, common["hidden_size"]),
        attention_scale=fields.number("query_pre_attn_scalar") ** -0.5,
        logits_softcap=None if cap is None else fields.number("final_logit_softcapping"),
    )


def _gemma3_ropes(fields: Fields, head_dim: int) -> dict[str, Rope]:
    """The rotary embedding of each kind of layer; transformers 4's `rope_scaling` applies to full attention only."""
    nested = fields.nested("rope_parameters")
    flat = sorted(map(shown, set(nested.values) - {FULL, SLIDING}))
    if flat:
        fields.problems.append(f"rope_parameters has {', '.join(flat[:9])}: {FULL} and {SLIDING} are needed, each with its own")
    full, sliding, context = nested.nested(FULL), nested.nested(SLIDING), fields.size("max_position_embeddings")
    full.values = {**full.values, **fields.nested("rope_scaling").values}
    return {
        FULL: read_rope(full, head_dim, fields.number("rope_theta", least=1), context),
        SLIDING: read_rope(sliding, head_dim, fields.number("rope_local_base_freq", least=1), context),
    }


def _embedding_scale(fields: Fields, hidden: int) -> float:
    """√hidden rounded to the dtype of the weights, as in transformers' `Gemma3TextScaledWordEmbedding`."""
    name = fields.values.get("dtype") or fields.values.get("torch_dtype") or "bfloat16"
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if not isinstance(name, str) or name not in dtypes:
        fields.problems.append(f"dtype is {shown(name)}: {', '.join(dtypes)} are known")
        return 1.0
    return float(torch.tensor(hidden**0.5).to(dtypes[name]))


def _dense_width(fields: Fields) -> str:
    """Llama 4's field for the width of a dense feed-forward; where there are two, `intermediate_size` is the width of its experts."""
    return "intermediate_size" if fields.values.get("intermediate_size_mlp") is None else "intermediate_size_mlp"


def _read_llama4(fields: Fields) -> Config:
    """MobileLLM-R1: Llama 4's text model without experts, q and k normed without weights (transformers `Llama4TextConfig`)."""
    common, bias = _common(fields, _dense_width(fields)), fields.flag("attention_bias")
    turned, normed = layers_with_rope(fields, fields.size("num_hidden_layers")), fields.flag("use_qk_norm")
    if fields.values.get("moe_layers") != []:
        fields.problems.append(f"moe_layers is {shown(fields.values.get('moe_layers'))}: experts are not known, dense models have []")
    if not all(turned) and (normed or fields.flag("attn_temperature_tuning")):
        fields.problems.append(
            f"{turned.count(False)} layers are without rotary embedding, and use_qk_norm or attn_temperature_tuning is true: "
            "norms and temperatures that differ from layer to layer are not known"
        )
    _check_chunks(fields, turned, common["max_context"])
    rope = only_rope(fields, common["head_dim"])
    layers = tuple(Layer(rope=rope if turn else None) for turn in turned)
    return Config(**common, layers=layers, qkv_bias=bias, o_bias=bias, qk_norm="weightless" if normed else "none")


def _check_chunks(fields: Fields, turned: Sequence[bool], context: int) -> None:
    """Accepts attention in chunks only if the context is no longer than a chunk: then it is full attention."""
    chunked = "chunked_attention"
    kinds = fields.numbers("layer_types", len(turned)) or [chunked if turn else FULL for turn in turned]
    unknown = [shown(kind) for kind in kinds if kind not in (FULL, chunked)]
    if unknown:
        fields.problems.append(f"layer_types has {', '.join(unknown[:9])}: {FULL} and {chunked} are known")
    chunk = fields.size("attention_chunk_size") if chunked in kinds else context
    if chunk < context:
        fields.problems.append(
            f"attention_chunk_size is {chunk}, max_position_embeddings {context}: attention in chunks is not known; in the first chunk "
            f"it is full attention, so write {chunk} for max_position_embeddings to use the model up to there"
        )


def _read_mobilellm_pro(fields: Fields) -> Config:
    """MobileLLM-Pro: three local layers to a global one, q and k normed without weights (report, Table 1; Llama 4's keys)."""
    common, depth = _common(fields, _dense_width(fields)), fields.size("num_hidden_layers")
    windows = read_windows(fields, [FULL] * depth)
    if fields.values.get("no_rope_layers") is not None and not all(layers_with_rope(fields, depth)):
        fields.problems.append("no_rope_layers has layers without RoPE (not 1): MobileLLM-Pro has none")
    rope = only_rope(fields, common["head_dim"])
    layers = tuple(Layer(window, rope) for window in windows)
    return Config(**common, layers=layers, qk_norm="weightless" if fields.flag("use_qk_norm") else "none")


def _read_bitnet(fields: Fields) -> Config:
    """BitNet b1.58 2B4T: norms before the output and down products, squared ReLU (transformers `BitNetConfig`)."""
    common, bias = _common(fields), fields.flag("attention_bias")
    layer = Layer(rope=only_rope(fields, common["head_dim"]))
    layers = (layer,) * fields.size("num_hidden_layers")
    return Config(**common, layers=layers, qkv_bias=bias, o_bias=bias, sub_norms=True)


@dataclass(frozen=True)
class Family:
    """How a family's folder is read."""

    read: Callable[[Fields], Config]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of the fields that its config.json may leave out, where its transformers class differs from Llama's."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Its names of lobit's modules, where they differ from Llama's (`layout.LLAMA`); modules of one name are fused, one after the other."""
    interleaved: bool = False
    """Rotary embedding pairs neighbours (Llama 4) instead of halves: rows of q and k are permuted on reading."""
    shifted_norms: bool = False
    """Its norms multiply by 1 + w, and not by w."""


LLAMA4_NAMES = {f"mlp.{part}": f"feed_forward.{part}_proj" for part in ("gate", "up", "down")}
FAMILIES: dict[str, Family] = {
    "llama": Family(_read_llama),
    "mobilellm": Family(_read_llama),
    "qwen2": Family(_read_qwen2, {"max_window_layers": 28, "sliding_window": 4096}),
    "qwen3": Family(_read_qwen3, {"head_dim": 128, "max_window_layers": 28, "sliding_window": 4096}),
    "smollm3": Family(_read_smollm3, {"rope_theta": 2e6, "tie_word_embeddings": True}),
    "mistral": Family(_read_mistral, {"sliding_window": 4096}),
    "phi3": Family(
        _read_phi3,
        {"rms_norm_eps": 1e-5},
        {
            **{f"attention.{part}": "self_attn.qkv_proj" for part in "qkv"},
            **{f"mlp.{part}": "mlp.gate_up_proj" for part in ("gate", "up")},
        },
    ),
    "gemma3_text": Family(
        _read_gemma3,
        {
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 1e4,
            "rope_theta": 1e6,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "tie_word_embeddings": True,
        },
        {
            "post_attention_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "post_mlp_norm": "post_feedforward_layernorm",
        },
        shifted_norms=True,
    ),
    "llama4_text": Family(
        _read_llama4,
        {
            "attention_chunk_size": 8192,
            "attn_temperature_tuning": True,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "use_qk_norm": True,
        },
        LLAMA4_NAMES,
        interleaved=True,
    ),
    "mobilellm_p1": Family(_read_mobilellm_pro, names=LLAMA4_NAMES, interleaved=True),
    "bitnet": Family(
        _read_bitnet,
        {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "rope_theta": 5e5},
        {"attention.sub_norm": "self_attn.attn_sub_norm", "mlp.sub_norm": "mlp.ffn_sub_norm"},
    ),
}
"""How a folder is read, by the `model_type` in its config.json."""


def read_config(values: Mapping[str, Any]) -> Config:
    """The `Config` of a parsed config.json.

    Raises:
        ModelError: the family is unknown, or fields are missing or absurd; the message lists them.
    """
    values, inner = text_values(values), ""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        if isinstance(values.get("text_config"), dict):
            inner = f" with a text model of model_type {shown(values['text_config'].get('model_type'))}"
        raise ModelError(f"model_type {shown(kind)}{inner} is not a family that lobit knows: {', '.join(sorted(FAMILIES))}")
    fields = Fields({**FAMILIES[kind].defaults, **values})
    config = FAMILIES[kind].read(fields)
    problems = list(dict.fromkeys(fields.problems)) or _absurd(config)
    if problems:
        raise ModelError(listed(problems, f"config.json of a {kind} model has {len(problems)} unusable fields:"))
    return replace(config, max_context=max(config.max_context, *(_reach(layer.rope) for layer in config.layers)))


def text_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a parsed config.json; for a model of images and text, those of its text model if that is of a known family.

    Source: transformers `Gemma3Config` and others with a `text_config`, whose fields take precedence.
    """
    inner = values.get("text_config")
    if not isinstance(inner, dict) or _is_family(values) or not _is_family(inner):
        return values
    return {**{name: values[name] for name in OF_THE_WHOLE if name in values}, **inner}


def _is_family(values: Mapping[str, Any]) -> bool:
    kind = values.get("model_type")
    return isinstance(kind, str) and kind in FAMILIES


def _reach(rope: Rope | None) -> int:
    """Positions up to which YaRN stretches a rotary embedding; 0 for other kinds. Model cards add YaRN without changing the context."""
    scaling = rope.scaling if rope else None
    return min(int(scaling.factor * scaling.original_context), LARGEST_SIZE) if isinstance(scaling, YarnScaling) else 0


def _absurd(config: Config) -> list[str]:
    """Problems of a config that cannot be computed although every field is usable by itself."""
    found = []
    for rope in {layer.rope for layer in config.layers if layer.rope}:
        if usable := rope.dim % 2 == 0 and 0 < rope.dim <= config.head_dim:
            frequencies, factor = rope.frequencies()
            usable = bool(frequencies.isfinite().all() and frequencies.gt(0).all()) and 0 < factor < math.inf
        if not usable:
            found.append(f"rotary embedding of {rope.dim} of {config.head_dim} entries, theta {rope.theta:g}, has no usable frequencies")
    if len(config.layers) % config.repeats:
        found.append(f"{len(config.layers)} layers do not divide by {config.repeats} repeats")
    factors = (config.embedding_scale, config.attention_scale, config.attention_softcap, config.logits_softcap)
    wrong = [factor for factor in factors if factor is not None and not 0 < factor < math.inf]
    return found + [f"a scale or cap of the model is {factor}: a positive number is needed" for factor in wrong]
