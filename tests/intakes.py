"""Folders that were quantized before, and what tests ask of each that is taken in."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lobit.checkpoint import load_config, load_model
from lobit.layout import to_checkpoint
from lobit.model import Transformer, weight_of
from lobit.quant_recipes.apply import layers_of
from lobit.quant_recipes.import_prequantized import take_in
from lobit.quant_recipes.quantized import fingerprint, load_checkpoint, save_checkpoint
from lobit.quant_recipes.recipe import Recipe
from tests.oracles import SMALL

SmallModels = Callable[[str], tuple[Path, nn.Module]]
"""The fixture of tests/conftest.py: folder and oracle of a family's small model."""
RELATIVE = 2e-5
"""Of the largest logit: sums of float32 in another order."""
TOKENS = torch.randint(0, SMALL["vocab_size"], (32, 5), generator=torch.Generator().manual_seed(0))
LLAMA = transformers.LlamaConfig(**SMALL)
LLAMA4 = transformers.Llama4TextConfig(
    **SMALL, intermediate_size_mlp=128, moe_layers=[], head_dim=16, no_rope_layers=[1] * 4, attn_temperature_tuning=False
)
"""Interleaved rotary pairs: rows of q and k are permuted on reading."""
PHI3 = transformers.Phi3Config(**SMALL)
"""Fused rows."""


def taken(folder: Path) -> tuple[Transformer, Recipe]:
    found = take_in(folder, load_config(folder))
    assert found is not None
    return found


def copied(folder: Path, place: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A folder with its tensors changed."""
    place.mkdir()
    shutil.copyfile(folder / "config.json", place / "config.json")
    tensors, metadata = load_file(folder / "model.safetensors"), metadata_of(folder)
    change(tensors)
    save_file(tensors, place / "model.safetensors", metadata=metadata)
    return place


def metadata_of(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.metadata() or {}


def assert_exact(folder: Path, place: Path) -> tuple[Transformer, Recipe]:
    """Weights are those of the float model bit for bit, and a checkpoint gives them back."""
    model, recipe = taken(folder)
    whole = load_model(folder)
    for (name, ours), (_, theirs) in zip(layers_of(model), layers_of(whole), strict=True):
        assert torch.equal(weight_of(ours), weight_of(theirs)), name
    place.mkdir()
    save_checkpoint(model, recipe, folder, place)
    again, found = load_checkpoint(place)
    assert found == recipe
    assert fingerprint(again) == fingerprint(model)
    assert torch.equal(again(TOKENS), model(TOKENS))
    return model, recipe


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def equal_share(found: Tensor, expected: Tensor) -> float:
    """The share of sequences with the same logits.

    An input that lies between two INT8 levels may be rounded to either, which changes what follows it in its sequence.
    """
    errors = (found - expected).abs().amax((1, 2)) / expected.abs().max()
    return float((errors < RELATIVE).float().mean())


def with_float_inputs(model: Transformer) -> Transformer:
    """The model without the rounding of activations."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "rule"):
            module.rule = replace(module.rule, activation_bits=None)
    return model


def stored_rows(model: Transformer, name: str, tensor: Tensor) -> Tensor:
    """Rows of ours in the order of the checkpoint."""
    return to_checkpoint(model.config, f"{name}.weight", tensor.float())


def our_rows(key: str) -> dict[str, slice]:
    """Our layers in a tensor of a small model's checkpoint, and their rows."""
    if key in ("lm_head.weight", "model.embed_tokens.weight"):
        return {"head" if key.startswith("lm_head") else "embedding": slice(None)}
    _, _, number, _, module, _ = key.split(".")
    part = module.removesuffix("_proj")
    fused = {"qkv": {"q": slice(0, 64), "k": slice(64, 96), "v": slice(96, 128)}, "gate_up": {"gate": slice(0, 128), "up": slice(128, 256)}}
    parts = fused.get(part, {part: slice(None)})
    return {f"layers.{number}.{'attention' if name in 'qkvo' else 'mlp'}.{name}": rows for name, rows in parts.items()}
