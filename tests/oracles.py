"""Small random models of transformers, and what writes them as the Hugging Face folders of a family.

Where transformers has no class, the oracle is its nearest one with the difference written out here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.bitnet import WeightQuant, pack_weights

VOCABULARY = 256
"""Bytes."""
CONTEXT = 128
WINDOW = 16
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LAYERS_OF_WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def randomize(model: nn.Module, seed: int = 0, norm: float = 1.0) -> None:
    """Weights, norms and biases large enough that every part of the model matters.

    Args:
        model: changed in place.
        seed: of the noise.
        norm: what a norm's weight is near to; 0 where norms multiply by 1 + w.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = norm + 0.2 * noise if "norm" in name else 0.15 * noise


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of the blocks."""
    for name, module in model.named_modules():
        if name.endswith(LAYERS_OF_WEIGHTS) and isinstance(module, nn.Linear):
            yield name, module


def write_folder(folder: Path, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A folder of a family that transformers does not write."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def of_class(config: transformers.PreTrainedConfig, norm: float = 1.0) -> Callable[[Path], nn.Module]:
    """Writes the folder of a class that transformers has."""

    def write(folder: Path) -> nn.Module:
        oracle = transformers.AutoModelForCausalLM.from_config(config).eval()
        randomize(oracle, norm=norm)
        oracle.save_pretrained(folder)
        return oracle  # type: ignore[no-any-return]

    return write


# --- MobileLLM --------------------------------------------------------------------------------------------------------------------


def mobilellm(repeats: int) -> Callable[[Path], nn.Module]:
    """MobileLLM: a Llama whose head is its embedding; each block's weights are those of `repeats` layers in a row."""

    def write(folder: Path) -> nn.Module:
        oracle = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)).eval()
        randomize(oracle)
        layers = oracle.model.layers
        for i, layer in enumerate(layers):
            layer.load_state_dict(layers[i // repeats * repeats].state_dict())
        tensors = {name: tensor for name, tensor in oracle.model.state_dict().items() if not name.startswith("layers.")}
        for i, layer in enumerate(layers[::repeats]):
            tensors |= {f"layers.{i}.{name}": tensor for name, tensor in layer.state_dict().items()}
        values = {
            **SMALL,
            "model_type": "mobilellm",
            "num_hidden_layers": len(layers) // repeats,
            "layer_sharing": repeats == 2,
            "share_embedding": True,
            "tie_word_embeddings": False,
        }
        write_folder(folder, values, {f"model.{name}": tensor for name, tensor in tensors.items()})
        return oracle

    return write


MOBILELLM_PRO = {
    **SMALL,
    "model_type": "mobilellm_p1",
    "num_hidden_layers": 5,
    "head_dim": 32,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "use_qk_norm": True,
    "layer_types": ["full_attention", *["sliding_attention"] * 3, "full_attention"],
    "sliding_window": WINDOW,
}


class Llama4WithWindows(transformers.Llama4ForCausalLM):
    """Llama 4's text model is MobileLLM-Pro's block (interleaved RoPE, weightless norm of q and k); here its local layers slide over
    the last tokens instead of attending in chunks."""

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
        def narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            length = args[0].shape[1] if args else kwargs["hidden_states"].shape[1]
            distance = torch.arange(length)[:, None] - torch.arange(length)[None]
            hidden = (distance < 0) | (distance >= window)
            mask = torch.zeros(1, 1, length, length).masked_fill(hidden, torch.finfo(torch.float32).min)
            return args, {**kwargs, "attention_mask": mask}

        return narrow


def mobilellm_pro(folder: Path) -> nn.Module:
    """MobileLLM-Pro with full attention in its first and last layer."""
    oracle = Llama4WithWindows(MOBILELLM_PRO).eval()
    randomize(oracle)
    tensors = {name: tensor for name, tensor in oracle.state_dict().items() if name != "lm_head.weight"}
    write_folder(folder, MOBILELLM_PRO, tensors)
    return oracle


# --- ternary weights --------------------------------------------------------------------------------------------------------------


def ternary_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ternary values [out, in] and one scale that bfloat16 holds [1]."""
    scale = weight.abs().mean().to(torch.bfloat16).float()
    return (weight / scale).round().clamp(-1, 1), scale.reshape(1)


def trilm(folder: Path) -> nn.Module:
    """TriLM: a Llama in float16 whose weights have three values."""
    oracle = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 4})).eval()
    randomize(oracle)
    for _, linear in linears(oracle):
        values, scale = ternary_parts(linear.weight.data)
        linear.weight.data = values * scale
    for parameter in oracle.parameters():
        parameter.data = parameter.data.half().float()
    copy.deepcopy(oracle).half().save_pretrained(folder)  # converting back would leave the rotary frequencies rounded
    return oracle


class ChannelScaledTernary(nn.Linear):
    """y = scales · (round(clamp(W, -1, 1)) x) + b: Bonsai's linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.scales = nn.Parameter(torch.ones(linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.clamp(-1, 1).round()) * self.scales
        return y if self.bias is None else y + self.bias


def bonsai(folder: Path) -> nn.Module:
    """Bonsai: a Llama of Danube3's shape with ternary linear layers."""
    oracle = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, attention_bias=True)).eval()
    for name, linear in list(linears(oracle)):
        oracle.set_submodule(name, ChannelScaledTernary(linear))
    randomize(oracle)
    for _, linear in linears(oracle):
        linear.weight.data *= 5  # some round to each of -1, 0, 1, some lie beyond
    oracle.save_pretrained(folder)
    return oracle


def bitnet(
    config: transformers.PreTrainedConfig, linear_class: str = "autobitlinear", mode: str = "offline"
) -> Callable[[Path], nn.Module]:
    """Ternary weights as transformers' `bitnet` quantization keeps them; the oracle holds what they stand for.

    Args:
        config: of the model.
        linear_class: `autobitlinear` multiplies with the scale, `bitlinear` divides by it.
        mode: `online` keeps float weights that are rounded on use.
    """

    def write(folder: Path) -> nn.Module:
        oracle = transformers.AutoModelForCausalLM.from_config(config).eval()
        randomize(oracle)
        stored = {}
        for name, linear in linears(oracle):
            if mode == "online":
                stored[f"{name}.weight"] = linear.weight.data
                with torch.compiler.set_stance("force_eager"):
                    linear.weight.data = WeightQuant.apply(linear.weight.data)
                continue
            values, scale = ternary_parts(linear.weight.data)
            stored[f"{name}.weight"] = pack_weights(values.clone())
            stored[f"{name}.weight_scale"] = scale if linear_class == "autobitlinear" else 1 / scale
            linear.weight.data = values * scale
        quantization = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": mode}
        tensors = oracle.state_dict() | stored
        if config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        write_folder(folder, {**config.to_dict(), "quantization_config": quantization}, tensors)
        return oracle  # type: ignore[no-any-return]

    return write
