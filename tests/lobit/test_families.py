"""Every family computes what transformers computes, and a folder that does not fit is refused with every reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lobit.checkpoint import load_config, load_model, read_json, save_model
from lobit.errors import ModelError
from lobit.families import FAMILIES, read_config
from lobit.layout import from_checkpoint, layout, to_checkpoint, write
from lobit.model import Transformer
from lobit.prequantized import unpack_ternary
from tests import small_models as zoo
from tests.oracles import MOBILELLM_PRO, SMALL, WINDOW, of_class, pack_weights, randomize
from tests.small_models import oracle_logits

SmallModels = Callable[[str], tuple[Path, nn.Module]]
"""The fixture of tests/conftest.py: folder and oracle of a family's small model."""
LENGTHS = (1, 7, 40, 128)
"""Tokens; the last two are longer than every window here."""
RELATIVE = 2e-5
"""Of the largest logit: sums of float32 in another order give 1e-6 to 4e-6 on these models."""
FULL, SLIDING = "full_attention", "sliding_attention"
SHIFTED = 1e-6
"""What 1 + w loses of a small w in float32."""
VARIANTS: dict[str, transformers.PreTrainedConfig] = {
    "llama, linear scaling": transformers.LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "llama, biases": transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama, heads wider than the stream": transformers.LlamaConfig(**SMALL, head_dim=32),
    "llama, three heads": transformers.LlamaConfig(
        **{**SMALL, "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 96}, tie_word_embeddings=True
    ),
    "llama, odd widths": transformers.LlamaConfig(**{**SMALL, "vocab_size": 97, "intermediate_size": 41}),
    "llama, tanh GELU": transformers.LlamaConfig(**SMALL, hidden_act="gelu_pytorch_tanh"),
    "qwen2, windows from the second layer on": transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3, windows where the file says": transformers.Qwen3Config(
        **SMALL, head_dim=32, use_sliding_window=True, sliding_window=WINDOW, layer_types=[SLIDING, FULL, SLIDING, FULL]
    ),
    "smollm3, windows where no rotary embedding is": transformers.SmolLM3Config(
        **SMALL, no_rope_layers=[0, 1, 0, 1], use_sliding_window=True, sliding_window=WINDOW, attention_bias=True, mlp_bias=True
    ),
    "mistral, no window": transformers.MistralConfig(**SMALL, sliding_window=None, head_dim=32),
    "phi3, whole heads": transformers.Phi3Config(**SMALL),
    "phi3, factor of its own": transformers.Phi3Config(
        **SMALL, original_max_position_embeddings=128, rope_parameters={**zoo.LONGROPE, "factor": 8.0}
    ),
    "gemma3, capped logits": transformers.Gemma3TextConfig(
        **SMALL,
        head_dim=32,
        sliding_window=WINDOW,
        final_logit_softcapping=3.0,
        attention_bias=True,
        layer_types=[FULL, SLIDING, SLIDING, FULL],
        tie_word_embeddings=False,
        rope_parameters={
            FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "llama4, layers without rotary embedding": transformers.Llama4TextConfig(
        **SMALL,
        intermediate_size_mlp=128,
        moe_layers=[],
        head_dim=16,
        no_rope_layers=[1, 0, 1, 0],
        use_qk_norm=False,
        attn_temperature_tuning=False,
    ),
    "bitnet, biases": transformers.BitNetConfig(**SMALL, attention_bias=True),
}
"""What the models of tests/small_models.py leave out."""


def assert_same_logits(ours: Transformer, oracle: nn.Module) -> None:
    for length in LENGTHS:
        tokens = torch.randint(0, ours.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(length))
        expected, found = oracle_logits(oracle, tokens), ours(tokens)
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        assert error < RELATIVE, f"{length} tokens: relative error {error:.1e}"


def test_every_family_has_a_small_model(small_models: SmallModels) -> None:
    assert {load_config(small_models(name)[0]).family for name in zoo.FAMILIES} == set(FAMILIES)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_logits_equal_those_of_the_reference(name: str, small_models: SmallModels) -> None:
    folder, oracle = small_models(name)
    assert_same_logits(load_model(folder), oracle)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_variants_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    norm = 0.0 if name.startswith("gemma3") else 1.0
    oracle = of_class(VARIANTS[name], norm)(tmp_path)
    assert_same_logits(load_model(tmp_path), oracle)


def test_a_window_changes_only_what_lies_beyond_it() -> None:
    model = Transformer(read_config(MOBILELLM_PRO))
    wide = Transformer(read_config({**MOBILELLM_PRO, "sliding_window": 100}))
    randomize(model)
    wide.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    difference = (model(tokens) - wide(tokens)).abs().amax(dim=2)[0]
    assert difference[:WINDOW].max() < 1e-5
    assert difference[WINDOW:].max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama, biases", "phi3, whole heads"])
def test_sharded_and_narrow_checkpoints_load_to_the_same_values(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    oracle = transformers.AutoModelForCausalLM.from_config(VARIANTS[name]).eval().to(dtype)
    oracle.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tensors = {key: tensor for path in tmp_path.glob("*.safetensors") for key, tensor in load_file(path).items()}
    for key, tensor in write(load_model(tmp_path)).items():
        assert torch.equal(tensor, tensors[key].float()), key


# --- what is written --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_saved_model_is_read_back_unchanged(name: str, small_models: SmallModels, tmp_path: Path) -> None:
    folder, _ = small_models(name)
    model = load_model(folder)
    save_model(model, read_json(folder / "config.json"), tmp_path, torch.float32)
    assert "quantization_config" not in read_json(tmp_path / "config.json")
    for key, tensor in load_model(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


FLOAT = [name for name in zoo.FAMILIES if name not in ("bonsai", "bitnet", "bitnet-masters", "llama-bitnet")]


@pytest.mark.parametrize("name", FLOAT)
def test_a_float_checkpoint_is_written_as_it_was(name: str, small_models: SmallModels) -> None:
    folder, _ = small_models(name)
    tensors, written = load_file(folder / "model.safetensors"), write(load_model(folder))
    tied = {"lm_head.weight"} if load_config(folder).tied else set()
    assert set(written) == set(tensors) - tied
    for key, tensor in written.items():
        assert (tensor - tensors[key].float()).abs().max() <= (SHIFTED if name == "gemma3" else 0), key


@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31))
def test_what_is_read_is_the_inverse_of_what_is_written(family: str, heads: int, half: int, seed: int) -> None:
    values = {**SMALL, "model_type": family, "num_attention_heads": 2 * heads, "num_key_value_heads": heads, "head_dim": 2 * half}
    values |= {"moe_layers": [], "no_rope_layers": [1] * 4, "attn_temperature_tuning": False, "attention_chunk_size": 128}
    config = read_config(values)
    model, generator = Transformer(config), torch.Generator().manual_seed(seed)
    for ours, tensor in model.state_dict().items():
        stored = torch.randint(-512, 512, tensor.shape, generator=generator) / 256  # so that adding 1 rounds nothing
        assert torch.equal(to_checkpoint(config, ours, from_checkpoint(config, ours, stored)), stored)
        assert torch.equal(from_checkpoint(config, ours, to_checkpoint(config, ours, stored)), stored)


# --- ternary weights --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_codes_unpack_to_what_transformers_packed(rows: int, width: int, seed: int) -> None:
    values = torch.randint(-1, 2, (4 * rows, width), generator=torch.Generator().manual_seed(seed)).float()
    assert torch.equal(unpack_ternary(pack_weights(values.clone()), "w"), values)


def their_layer(linear_class: str, packed: Tensor, scale: Tensor) -> nn.Module:
    """transformers' own layer of ternary weights."""
    from transformers.integrations.bitnet import AutoBitLinear, BitLinear, unpack_weights

    out, inner = 4 * packed.shape[0], packed.shape[1]
    layer: nn.Module
    if linear_class == "autobitlinear":
        layer = AutoBitLinear(inner, out, bias=False)
        layer.weight.data = unpack_weights(packed, torch.float32)
    else:
        layer = BitLinear(inner, out, bias=False, dtype=torch.float32)
        layer.weight.data = packed
    layer.weight_scale.data = scale
    return layer


@pytest.mark.parametrize(("name", "linear_class"), [("bitnet", "autobitlinear"), ("llama-bitnet", "bitlinear")])
def test_codes_and_scale_stand_for_what_transformers_multiplies_with(name: str, linear_class: str, small_models: SmallModels) -> None:
    folder, _ = small_models(name)
    tensors, ours = load_file(folder / "model.safetensors"), load_model(folder).blocks[1].mlp.down.weight
    packed, scale = (tensors[f"model.layers.1.mlp.down_proj.{part}"] for part in ("weight", "weight_scale"))
    x = torch.randint(-126, 127, (5, ours.shape[1]), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = 127  # so that rounding the activations to INT8 changes nothing
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        expected = their_layer(linear_class, packed, scale)(x)
    assert torch.allclose(x @ ours.T, expected, rtol=1e-5, atol=1e-4)


def test_codes_that_are_none_are_refused(small_models: SmallModels, tmp_path: Path) -> None:
    folder, _ = small_models("bitnet")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = 0b01110000
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"1 of 8192 codes in model\.layers\.1\.mlp\.down_proj\.weight are 3"):
        load_model(tmp_path)


@pytest.mark.parametrize(("name", "suffix"), [("bitnet", "weight_scale"), ("bonsai", "scales")])
def test_every_ternary_layer_needs_its_scales(name: str, suffix: str, small_models: SmallModels, tmp_path: Path) -> None:
    folder, _ = small_models(name)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.2.mlp.up_proj.{suffix}"]
    tensors[f"model.layers.1.mlp.up_proj.{suffix}"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ModelError) as error:
        load_model(tmp_path)
    assert f"layers.2.mlp.up_proj.{suffix} is missing" in str(error.value)
    assert f"layers.1.mlp.up_proj.{suffix} has shape [3]" in str(error.value)


def test_codes_without_a_word_of_them_in_the_config_are_refused(small_models: SmallModels, tmp_path: Path) -> None:
    folder, _ = small_models("bitnet")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    values = read_json(folder / "config.json")
    del values["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ModelError, match="is U8"):
        load_model(tmp_path)


# --- folders that do not fit ------------------------------------------------------------------------------------------------------


def broken_folder(tmp_path: Path, **changes: Any) -> Path:
    values = {**SMALL, "model_type": "llama", "tie_word_embeddings": True, **changes}
    model = Transformer(read_config({**SMALL, "model_type": "llama", "tie_word_embeddings": True}))
    save_model(model, values, tmp_path)
    return tmp_path


def test_missing_misshapen_and_unused_tensors_are_named_in_one_error(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["model.layers.2.mlp.down_proj.weight"] = tensors["model.layers.2.mlp.down_proj.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError) as error:
        load_model(folder)
    for part in ("model.norm.weight is missing", "[3, 5]", "q_proj.bias is not used", "down_proj.weight is I8"):
        assert part in str(error.value)


def test_a_fused_tensor_that_does_not_fit_is_named_once(small_models: SmallModels, tmp_path: Path) -> None:
    folder, _ = small_models("phi3")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.qkv_proj.weight"] = torch.zeros(64, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ModelError, match="1 tensors") as error:
        load_model(tmp_path)
    assert "qkv_proj.weight has shape [64, 64]: [128, 64] is needed" in str(error.value)


def test_a_layout_names_every_tensor_once(small_models: SmallModels) -> None:
    for name in zoo.FAMILIES:
        model = Transformer(load_config(small_models(name)[0]))
        rows: dict[str, int] = {}
        for ours, stored in layout(model).items():
            assert (stored.first, stored.last - stored.first) == (rows.get(stored.name, 0), len(model.state_dict()[ours]))
            rows[stored.name] = stored.last


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin would have to be unpickled"):
        load_model(folder)


def test_an_index_that_points_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(ModelError, match="outside"):
        load_model(folder)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        load_model(folder)


def test_stories260k_tells_its_story(stories: Path) -> None:
    from tokenizers import Tokenizer

    model, tokenizer = load_model(stories), Tokenizer.from_file(str(stories / "tokenizer.json"))
    assert load_config(stories).tied
    tokens = tokenizer.encode("Once upon a time").ids
    for _ in range(30):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert ", there was a little girl named Lily." in tokenizer.decode(tokens)
