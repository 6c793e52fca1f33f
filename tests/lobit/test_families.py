"""Every family computes what transformers computes, and a folder that does not fit is refused with every reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lobit.checkpoint import load_config, load_model, save_model
from lobit.errors import ModelError
from lobit.families import FAMILIES, read_config
from lobit.model import Transformer

LENGTHS = (1, 7, 40)
"""Tokens; the last is longer than every window here."""
RELATIVE = 1e-4
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ORACLES: dict[str, Any] = {
    "llama2": transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama3": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "llama-linear-rope": transformers.LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "llama-biases": transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "smollm2": transformers.LlamaConfig(
        **{**SMALL, "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 96}, tie_word_embeddings=True
    ),
    "llama-wide-heads": transformers.LlamaConfig(**SMALL, head_dim=32),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True),
}


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that every part of the model matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * noise if "norm" in name else 0.15 * noise


def assert_same_logits(ours: Transformer, oracle: torch.nn.Module, vocabulary: int = 97) -> None:
    for length in LENGTHS:
        tokens = torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.inference_mode():
            expected, found = oracle(tokens).logits, ours(tokens)
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        assert error < RELATIVE, f"{length} tokens: relative error {error:.1e}"


@pytest.mark.parametrize("name", ORACLES)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    oracle = transformers.AutoModelForCausalLM.from_config(ORACLES[name]).eval()
    randomize(oracle)
    oracle.save_pretrained(tmp_path)
    assert_same_logits(load_model(tmp_path), oracle)


def mobilellm_pro(window: int = 16, layers: int = 5) -> dict[str, Any]:
    """A small config.json of MobileLLM-Pro: full attention at every fourth layer and at the last."""
    kinds = ["full_attention" if i % 4 == 0 or i == layers - 1 else "sliding_attention" for i in range(layers)]
    return {
        **SMALL,
        "model_type": "mobilellm_p1",
        "num_hidden_layers": layers,
        "head_dim": 16,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "use_qk_norm": True,
        "layer_types": kinds,
        "sliding_window": window,
    }


class Llama4WithWindows(transformers.Llama4ForCausalLM):
    """Llama 4's text model is MobileLLM-Pro's block (interleaved RoPE, weightless norm of q and k); here its local layers
    slide over the last tokens instead of attending in chunks."""

    def __init__(self, values: dict[str, Any]) -> None:
        layers, kinds = values["num_hidden_layers"], values["layer_types"]
        super().__init__(
            transformers.Llama4TextConfig(
                **{name: values[name] for name in SMALL},
                intermediate_size_mlp=values["intermediate_size"],
                head_dim=values["head_dim"],
                rope_parameters={"rope_type": "default", "rope_theta": values["rope_theta"]},
                rms_norm_eps=values["rms_norm_eps"],
                use_qk_norm=True,
                tie_word_embeddings=True,
                moe_layers=[],
                no_rope_layers=[1] * layers,
                attn_temperature_tuning=False,
                layer_types=["full_attention"] * layers,
                attn_implementation="eager",
            )
        )
        for layer, kind in zip(self.model.layers, kinds, strict=True):
            if kind == "sliding_attention":
                layer.register_forward_pre_hook(self._windowed(values["sliding_window"]), with_kwargs=True)

    @staticmethod
    def _windowed(window: int) -> Any:
        def narrow(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            length = args[0].shape[1] if args else kwargs["hidden_states"].shape[1]
            distance = torch.arange(length)[:, None] - torch.arange(length)[None]
            hidden = (distance < 0) | (distance >= window)
            mask = torch.zeros(1, 1, length, length).masked_fill(hidden, torch.finfo(torch.float32).min)
            return args, {**kwargs, "attention_mask": mask}

        return narrow


def test_mobilellm_pro_equals_llama_4_blocks_with_sliding_windows(tmp_path: Path) -> None:
    values = mobilellm_pro()
    oracle = Llama4WithWindows(values).eval()
    randomize(oracle)
    state = {name: tensor.contiguous() for name, tensor in oracle.state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert_same_logits(load_model(tmp_path), oracle)


def test_a_window_changes_only_what_lies_beyond_it(tmp_path: Path) -> None:
    model = Transformer(read_config(mobilellm_pro(window=16)))
    wide = Transformer(read_config(mobilellm_pro(window=200)))
    randomize(model)
    wide.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    difference = (model(tokens) - wide(tokens)).abs().amax(dim=2)[0]
    assert difference[:16].max() < 1e-5
    assert difference[16:].max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sharded_and_narrow_checkpoints_load_to_the_same_values(dtype: torch.dtype, tmp_path: Path) -> None:
    oracle = transformers.AutoModelForCausalLM.from_config(ORACLES["llama2"]).eval().to(dtype)
    oracle.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_logits(load_model(tmp_path), oracle.float())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_is_read_back_unchanged(name: str, tmp_path: Path) -> None:
    values = {**mobilellm_pro(), "model_type": name}
    model = Transformer(read_config(values))
    randomize(model)
    save_model(model, values, tmp_path, torch.float32)
    for key, tensor in load_model(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


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


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"mamba.*llama"):
        read_config({"model_type": "mamba"})


def test_all_absurd_fields_of_a_config_are_named_at_once() -> None:
    values = {**SMALL, "model_type": "llama", "hidden_size": -3, "num_hidden_layers": "four", "rms_norm_eps": 0, "hidden_act": "gelu"}
    with pytest.raises(ModelError) as error:
        read_config(values)
    for name in ("hidden_size", "num_hidden_layers", "rms_norm_eps", "hidden_act"):
        assert name in str(error.value)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin would have to be unpickled"):
        load_model(folder)


def test_an_index_that_points_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path)
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
