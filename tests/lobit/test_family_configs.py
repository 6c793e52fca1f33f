"""What config.json says of each family: old and new spellings mean the same, and what is not known is refused with every reason."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lobit.checkpoint import load_config, load_model, read_json
from lobit.errors import ModelError
from lobit.families import FAMILIES, read_config
from lobit.model import Config, Layer
from lobit.rope import LongRopeScaling
from tests import small_models as zoo
from tests.oracles import CONTEXT, SMALL, WINDOW
from tests.small_models import oracle_logits

SmallModels = Callable[[str], tuple[Path, nn.Module]]
"""The fixture of tests/conftest.py: folder and oracle of a family's small model."""
FULL, SLIDING = "full_attention", "sliding_attention"


def in_transformers_4s_words(values: dict[str, Any]) -> dict[str, Any]:
    """The same config.json as transformers 4 wrote it."""
    old = {key: value for key, value in values.items() if key not in ("rope_parameters", "dtype")}
    old["torch_dtype"] = values["dtype"]
    rope = dict(values["rope_parameters"])
    if FULL in rope:
        del old["layer_types"]
        local, rope = rope[SLIDING], dict(rope[FULL])
        old |= {"rope_local_base_freq": local["rope_theta"], "sliding_window_pattern": 6}
    old["rope_theta"] = rope.pop("rope_theta")
    old["partial_rotary_factor"] = rope.pop("partial_rotary_factor", 1.0)
    if values["model_type"] == "phi3":
        rope.pop("original_max_position_embeddings", None)
        rope["type"] = rope.pop("rope_type")
    old["rope_scaling"] = None if "default" in rope.values() else rope
    return old


BY_TRANSFORMERS = [name for name in zoo.FAMILIES if name not in ("mobilellm", "mobilellm-ls", "mobilellm-pro")]


@pytest.mark.parametrize("name", BY_TRANSFORMERS)
def test_transformers_4_and_5_spell_the_same_config(name: str, small_models: SmallModels) -> None:
    values = read_json(small_models(name)[0] / "config.json")
    assert read_config(in_transformers_4s_words(values)) == read_config(values)


def config_of(family: str, **values: Any) -> Config:
    return read_config({**SMALL, "model_type": family, **values})


def test_what_transformers_leaves_out_of_a_file_is_its_classes_default() -> None:
    smollm3, gemma3 = config_of("smollm3"), config_of("gemma3_text", num_hidden_layers=6)
    assert smollm3.tied
    assert [layer.rope is None for layer in smollm3.layers] == [False, False, False, True]
    assert smollm3.layers[0].rope is not None
    assert smollm3.layers[0].rope.theta == 2e6
    assert gemma3.tied
    assert gemma3.head_dim == gemma3.scale**-2 == 256
    assert [layer.window for layer in gemma3.layers] == [4096] * 5 + [None]
    assert [layer.rope.theta for layer in gemma3.layers if layer.rope] == [1e4] * 5 + [1e6]
    assert config_of("mistral").layers == (Layer(4096, config_of("llama").layers[0].rope),) * 4
    assert config_of("phi3").layers[0].window is None


def test_qwen_has_windows_only_where_they_are_used() -> None:
    windows = {"sliding_window": WINDOW, "max_window_layers": 3}
    for family in ("qwen2", "qwen3"):
        assert [layer.window for layer in config_of(family, **windows).layers] == [None] * 4
        assert [layer.window for layer in config_of(family, **windows, use_sliding_window=True).layers] == [None] * 3 + [WINDOW]


def test_a_list_of_layers_may_be_longer_than_the_model() -> None:
    """MobileLLM-R1-140M and -360M have the 22 entries of -950M."""
    dense = {"moe_layers": [], "attention_chunk_size": CONTEXT, "attn_temperature_tuning": False}
    config = config_of("llama4_text", **dense, no_rope_layers=[1] * 22)
    assert [layer.rope is None for layer in config.layers] == [False] * 4


def test_mobilellms_sharing_counts_under_llamas_name_too() -> None:
    config = config_of("llama", share_embedding=True, layer_sharing=True)
    assert (config.tied, config.repeats, len(config.layers)) == (True, 2, 8)
    assert replace(config, family="mobilellm") == config_of("mobilellm", share_embedding=True, layer_sharing=True)


# --- longrope ---------------------------------------------------------------------------------------------------------------------


def test_longrope_has_short_factors_and_ends_where_they_end(small_models: SmallModels) -> None:
    config = load_config(small_models("phi4")[0])
    assert config.max_context == CONTEXT
    scaling = config.layers[0].rope and config.layers[0].rope.scaling
    assert isinstance(scaling, LongRopeScaling)
    assert scaling.factors == tuple(zoo.LONGROPE["short_factor"])
    assert scaling.attention_factor == math.sqrt(1 + math.log(32) / math.log(CONTEXT))


def test_transformers_takes_other_factors_one_token_later(small_models: SmallModels) -> None:
    folder, oracle = small_models("phi4")
    tokens = torch.randint(0, 256, (1, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    ours = load_model(folder)(tokens)
    within, beyond = oracle_logits(oracle, tokens[:, :-1]), oracle_logits(oracle, tokens)
    assert (ours[:, :-1] - within).abs().max() < 1e-4
    assert (ours - beyond).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("given", "expected"), [({"attention_factor": 1.5}, 1.5), ({"factor": 4.0}, math.sqrt(1 + 1 / 3)), ({"factor": 0.5}, 1.0)]
)
def test_longropes_own_numbers_go_first(given: dict[str, float], expected: float) -> None:
    config = config_of("phi3", rope_scaling={**zoo.LONGROPE, **given}, original_max_position_embeddings=64)
    rope = config.layers[0].rope
    assert rope is not None
    assert rope.frequencies()[1] == pytest.approx(expected)


# --- YaRN, and what changes nothing -----------------------------------------------------------------------------------------------

YARN = {
    "as Qwen3's card has it": ({"factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
    "in transformers' words of old": ({"type": "yarn", "rope_type": None, "factor": 2.0}, 81920),
    "with all that it may say": (
        {
            "factor": 8.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
        40960,
    ),
    "with its own factor on cosine and sine": ({"factor": 4.0, "attention_factor": 1.25}, 163840),
}


@pytest.mark.parametrize("name", YARN)
def test_yarn_is_that_of_transformers_and_reaches_as_far_as_it_stretches(name: str) -> None:
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given, reach = YARN[name]
    scaling = {key: value for key, value in {"rope_type": "yarn", **given}.items() if value is not None}
    values = {"head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1e6}
    theirs = Qwen3Config(**{**SMALL, **values}, rope_scaling={"rope_theta": 1e6, **scaling})
    config = config_of("qwen3", **values, rope_scaling=scaling)
    rope = config.layers[0].rope
    assert rope is not None
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    torch.testing.assert_close(rope.frequencies()[0], frequencies, rtol=1e-6, atol=0)
    assert rope.frequencies()[1] == pytest.approx(factor)
    assert config.max_context == reach


def test_gemmas_yarn_stretches_the_models_own_context() -> None:
    config = config_of("gemma3_text", num_hidden_layers=6, rope_scaling={"rope_type": "yarn", "factor": 2.0})
    assert config.max_context == 2 * CONTEXT


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "default", "factor": 1.0, "attention_factor": 1.0, "finetuned": True},
        {"type": "default", "original_max_position_embeddings": 64},
    ],
    ids=str,
)
def test_scaling_that_changes_nothing_inside_of_the_context_is_taken(scaling: dict[str, Any]) -> None:
    assert config_of("llama", rope_scaling=scaling) == config_of("llama")


# --- text models of larger ones ---------------------------------------------------------------------------------------------------


def test_the_text_model_of_a_larger_one_is_read() -> None:
    inner = {**SMALL, "model_type": "gemma3_text", "num_hidden_layers": 6}
    assert read_config({"model_type": "gemma3", "text_config": inner, "vision_config": {}}) == config_of("gemma3_text", num_hidden_layers=6)
    untied = read_config({"model_type": "gemma3", "text_config": inner, "tie_word_embeddings": False})
    assert not untied.tied, "what the text model leaves out may stand beside it"


def test_the_text_model_is_named_where_it_is_of_no_family() -> None:
    with pytest.raises(ModelError, match=r"model_type 'llava' with a text model of model_type 'opt' is not a family"):
        read_config({"model_type": "llava", "text_config": {"model_type": "opt"}})


# --- Gemma's scaled embedding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", 33.941126), ("float16", 33.9375), ("bfloat16", 34.0), (None, 34.0)]
)
def test_gemmas_embedding_is_scaled_in_the_type_of_its_weights(dtype: str | None, expected: float) -> None:
    for key in ("dtype", "torch_dtype"):
        config = config_of("gemma3_text", hidden_size=1152, **{key: dtype})
        assert config.embedding_scale == pytest.approx(expected, rel=1e-7)


def test_transformers_scales_in_the_type_of_the_weights_too(small_models: SmallModels, tmp_path: Path) -> None:
    folder, oracle = small_models("gemma3")
    values = {**read_json(folder / "config.json"), "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    scale: Tensor = oracle.model.embed_tokens.embed_scale  # type: ignore[union-attr, assignment]
    assert load_config(tmp_path).embedding_scale == float(scale.to(torch.bfloat16)) == 9.8125
    assert load_config(folder).embedding_scale == float(scale)


# --- what is refused --------------------------------------------------------------------------------------------------------------

LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
REFUSED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "sizes": (
        "llama",
        {"hidden_size": -3, "num_hidden_layers": "four", "rms_norm_eps": 0, "hidden_act": "gelu"},
        ["hidden_size", "num_hidden_layers", "rms_norm_eps", "hidden_act is 'gelu': silu, gelu_pytorch_tanh, relu2"],
    ),
    "rotary embedding": (
        "llama",
        {"rope_interleaved": True, "rope_scaling": {"type": "su", "factor": 4.0}, "layer_sharing": 2, "share_embedding": "yes"},
        [
            "rope_interleaved is true",
            "rope_type is 'su': default, dynamic, linear, llama3, yarn",
            "layer_sharing is 2",
            "share_embedding is 'yes'",
        ],
    ),
    "rotary fields": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mscale": 0.7, "partial_rotary_factor": 0.5}},
        ["rope_type linear has 'mscale'", "partial_rotary_factor is below 1"],
    ),
    "yarn without frequencies": ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "rope_theta": 1.0}}, ["rope_theta is 1: yarn"]),
    "half of each head": (
        "qwen2",
        {"partial_rotary_factor": 0.5, "rope_theta": 0.5},
        ["partial_rotary_factor is below 1", "rope_theta is 0.5"],
    ),
    "sharing": ("mobilellm", {"layer_sharing": "twice", "vocab_size": 0}, ["layer_sharing is 'twice'", "vocab_size is 0"]),
    "qwen2's windows": (
        "qwen2",
        {"max_window_layers": -1, "layer_types": [SLIDING] * 4},
        ["max_window_layers is -1", "layer_types has sliding_attention, and use_sliding_window"],
    ),
    "qwen3's kinds": (
        "qwen3",
        {"layer_types": [FULL, "linear_attention", {}, FULL], "head_dim": "wide"},
        ["'linear_attention', {}: full_attention and sliding_attention are known", "head_dim is 'wide'"],
    ),
    "smollm3's lists": (
        "smollm3",
        {"no_rope_layers": [1, 1, 0], "layer_types": [FULL] * 3},
        ["no_rope_layers is [1, 1, 0]", "4 layers", "layer_types has 3: 4 entries"],
    ),
    "smollm3's interval": ("smollm3", {"no_rope_layer_interval": 0, "mlp_bias": 1}, ["no_rope_layer_interval is 0", "mlp_bias is 1"]),
    "mistral's window": (
        "mistral",
        {"sliding_window": 0, "layer_types": [FULL] * 4},
        ["sliding_window is 0", "layer_types is given: this family has one window"],
    ),
    "phi3's factors": (
        "phi3",
        {"rope_scaling": {**LONG, "short_factor": [1.0, -1.0, "2"] + [1.0] * 5, "short_mscale": 1.2}},
        ["'short_mscale'", "short_factor, entry 1 is -1.0", "short_factor, entry 2 is '2'"],
    ),
    "phi3's number of factors": (
        "phi3",
        {"rope_scaling": {**LONG, "partial_rotary_factor": 0.75}, "sliding_window": "all"},
        ["short_factor has 8: 6 entries", "sliding_window is 'all'"],
    ),
    "phi3's scaling": ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_type is 'linear': default, longrope"]),
    "gemma3": (
        "gemma3_text",
        {
            "use_bidirectional_attention": True,
            "attn_logit_softcapping": 50.0,
            "hidden_activation": "gelu",
            "dtype": "int8",
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
            "final_logit_softcapping": -1,
        },
        [
            "use_bidirectional_attention is true",
            "attn_logit_softcapping is given",
            "hidden_activation is 'gelu'",
            "dtype is 'int8'",
            "rope_parameters has 'rope_theta', 'rope_type'",
            "final_logit_softcapping is -1",
        ],
    ),
    "llama4": (
        "llama4_text",
        {"no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 16},
        [
            "moe_layers is None",
            "1 layers are without rotary embedding",
            "attention_chunk_size is 16, max_position_embeddings 128",
            "write 16 for max_position_embeddings",
        ],
    ),
    "llama4's experts": (
        "llama4_text",
        {"moe_layers": [1, 3], "no_rope_layers": [1] * 4, "layer_types": [SLIDING] * 4, "intermediate_size_mlp": 0},
        ["moe_layers is [1, 3]", "'sliding_attention': full_attention and chunked_attention are known", "intermediate_size_mlp is 0"],
    ),
    "mobilellm-pro": (
        "mobilellm_p1",
        {"no_rope_layers": [1, 0, 1, 1], "layer_types": ["chunked_attention"] * 4, "use_qk_norm": 1},
        ["no_rope_layers has layers without RoPE", "'chunked_attention'", "use_qk_norm is 1"],
    ),
    "bitnet's layers": (
        "bitnet",
        {"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["mlp"]}, "attention_bias": "no"},
        ["modules_to_not_convert is ['mlp']", "attention_bias is 'no'"],
    ),
    "bitnet's mode": (
        "bitnet",
        {"quantization_config": {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "online"}},
        ["linear_class is 'bitlinear' in mode 'online'"],
    ),
    "bitnet's norms": (
        "bitnet",
        {"quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}, "rms_norm_eps": 2},
        ["use_rms_norm is true", "rms_norm_eps is 2"],
    ),
    "another quantization": (
        "llama",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}, "head_dim": 0},
        ["quantization_config is of 'gptq'", "take the float checkpoint", "head_dim is 0"],
    ),
}
"""Family, what is changed in its config.json, and the parts of the one message."""


@pytest.mark.parametrize("name", REFUSED)
def test_all_that_is_not_known_is_named_at_once(name: str) -> None:
    family, changes, parts = REFUSED[name]
    with pytest.raises(ModelError) as error:
        config_of(family, **changes)
    for part in parts:
        assert part in str(error.value)
    assert f"has {len(str(error.value).splitlines()) - 1} unusable fields" in str(error.value)


def test_every_family_refuses_something() -> None:
    assert {family for family, _, _ in REFUSED.values()} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_nothing_is_refused_with_all_that_is_missing(family: str) -> None:
    with pytest.raises(ModelError) as error:
        read_config({"model_type": family})
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings"):
        assert name in str(error.value)


@pytest.mark.parametrize(("kind", "named"), [("mamba", "'mamba'"), (None, "None"), (["llama"], "['llama']")])
def test_an_unknown_family_is_refused_with_the_known_ones(kind: Any, named: str) -> None:
    with pytest.raises(ModelError) as error:
        read_config({"model_type": kind})
    for part in (named, *FAMILIES):
        assert part in str(error.value)
