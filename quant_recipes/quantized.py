"""The quantized checkpoint: integers, scales and the recipe verbatim. The only thing that exporters read.

A folder with `model.safetensors` (integers packed as `packing` says, layers that stay floats at the recipe's bits), `recipe.json`,
and the model's own config.json and tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lobit.checkpoint import COMPANIONS, copy_companions, open_tensors, read_json, write_tensors
from lobit.errors import InputError, ModelError, listed, shown, shown_name
from lobit.families import read_config
from lobit.model import Config, Transformer, bias_of, weight_of
from lobit.quant_recipes.apply import check, layers_of, skeleton
from lobit.quant_recipes.grid import round_scale
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear
from lobit.quant_recipes.packing import Layout, layout_of
from lobit.quant_recipes.recipe import Recipe, WeightGrid

CONFIG_FILE = "config.json"
RECIPE_FILE = "recipe.json"
WEIGHTS_FILE = "model.safetensors"
HEADER = "lobit"
"""The entry of the file's metadata with layout and seal: one entry, since the library writes several in random order."""
LAYOUT = "packed-2"
"""Integers of each width lie in the layout that `packing.layout_of` returns, those of 8 bits as int8."""


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a quantized checkpoint rather than a float model."""
    return (folder / RECIPE_FILE).is_file()


def check_float(folder: Path) -> None:
    """Refuses a quantized checkpoint where a float model is needed.

    Raises:
        InputError: the folder holds a quantized checkpoint.
    """
    if is_checkpoint(folder):
        raise InputError(f"{folder} is quantized already: give the float model that it was made from")


def _tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor once, in the order of names, without a head that is shared."""
    head_is_shared = model.config.tied
    for name, tensor in sorted(model.state_dict().items()):
        if not (head_is_shared and name.startswith("head.")):
            yield name, tensor


def fingerprint(model: Transformer) -> str:
    """sha256 of all integers, scales and floats of a converted model, with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in _tensors(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _packing(recipe: Recipe, name: str) -> Layout | None:
    """The layout in which a tensor of the model is packed, or None."""
    rule = recipe.rule_for(name.removesuffix(".integers")) if name.endswith(".integers") else None
    return layout_of(rule.weights.bits) if rule else None


def _is_half(recipe: Recipe, name: str) -> bool:
    """Whether a tensor is stored in half precision: the weight of a layer that stays in floating point."""
    return recipe.float_bits == 16 and name.endswith(".weight") and "norm" not in name


def _stored(tensor: Tensor, name: str, recipe: Recipe) -> Tensor:
    """A tensor of the model as the file stores it."""
    packing = _packing(recipe, name)
    if packing is not None:
        return packing.pack(tensor)
    return tensor.detach().half() if _is_half(recipe, name) else tensor.detach()


def _seal(model: Transformer, recipe: Recipe, config: Mapping[str, Any]) -> str:
    """sha256 of a checkpoint's weights, recipe and config, which a change to any of them changes."""
    told = json.dumps([fingerprint(model), recipe.to_json(), config], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def save_checkpoint(model: Transformer, recipe: Recipe, source: Path, folder: Path) -> None:
    """Writes a converted model.

    Args:
        source: the float model's folder, for its config.json and tokenizer.
        folder: must exist.
    """
    packed = {name: _stored(tensor, name, recipe).contiguous() for name, tensor in _tensors(model)}
    (folder / RECIPE_FILE).write_text(json.dumps(recipe.to_json(), indent=2) + "\n", encoding="utf-8")
    sha256 = _seal(model, recipe, read_json(source / CONFIG_FILE))
    write_tensors(packed, folder / WEIGHTS_FILE, {HEADER: f"{LAYOUT} {sha256}"})
    shutil.copymode(folder / RECIPE_FILE, folder / WEIGHTS_FILE)  # safetensors gives access to the owner only
    copy_companions(source, folder, [CONFIG_FILE, *COMPANIONS])


def load_recipe(folder: Path) -> Recipe:
    """The recipe of a checkpoint."""
    return Recipe.from_json(read_json(folder / RECIPE_FILE))


def load_checkpoint(folder: Path) -> tuple[Transformer, Recipe]:
    """The converted model and the recipe.

    Raises:
        ModelError: the folder is no checkpoint or has changed, or tensors are missing, misshapen or left over; all are named.
        RecipeError: the recipe does not fit the config.
    """
    if not is_checkpoint(folder):
        raise ModelError(f"{folder} has no {RECIPE_FILE}: make a quantized checkpoint with `lobit quantize`")
    path, recipe, config = folder / WEIGHTS_FILE, load_recipe(folder), read_json(folder / CONFIG_FILE)
    model = empty_model(read_config(config), recipe)
    state, sha256 = _read(path, model, recipe)
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tied:
        _share_head(model)
    if _seal(model, recipe, config) != sha256:
        raise ModelError(
            f"{folder} has changed since it was written: the sha256 of its weights, {RECIPE_FILE} and {CONFIG_FILE} is not "
            f"{shown(sha256)}: quantize the model again"
        )
    return model.eval().requires_grad_(False), recipe


def empty_model(config: Config, recipe: Recipe) -> Transformer:
    """The converted model with the shapes of its tensors, but no memory for them."""
    check(config, recipe)
    model = skeleton(replace(config, tied=config.tied and not recipe.untied))
    for name, module in list(layers_of(model)):
        rule = recipe.rule_for(name)
        if rule is None:
            continue
        out, inner = weight_of(module).shape
        integers = torch.empty(out, inner, dtype=torch.int8, device="meta")
        scale = torch.empty(out, inner // (rule.weights.group_size or inner), device="meta")
        layer: nn.Module
        if name == "embedding":
            layer = IntegerEmbedding(integers, scale, rule)
        else:
            layer = IntegerLinear(integers, scale, bias_of(module), rule)
        model.set_submodule(name, layer)
    if model.config.tied:
        _share_head(model)
    return model


def _share_head(model: Transformer) -> None:
    if isinstance(model.embedding, IntegerEmbedding):
        model.head = IntegerLinear(model.embedding.integers, model.embedding.scale, None, model.embedding.rule)
    else:
        model.head.weight = weight_of(model.embedding)


def _read(path: Path, model: Transformer, recipe: Recipe) -> tuple[dict[str, Tensor], str]:
    """Reads and checks the tensors; returns them, unpacked, and the seal."""
    wanted = dict(_tensors(model))
    if not path.is_file():
        raise ModelError(f"{path} is missing: quantize the model again")
    with open_tensors(path) as file:
        found, _, sha256 = (file.metadata() or {}).get(HEADER, "").partition(" ")
        if found != LAYOUT:
            raise ModelError(f"{path} is in layout {shown(found)}, {LAYOUT} is read: quantize the model again")
        names = set(file.keys())
        problems = [f"{name} is missing" for name in wanted if name not in names]
        problems += [f"{shown_name(name)} is not used" for name in sorted(names - set(wanted))]
        state = {name: file.get_tensor(name) for name in wanted if name in names}
    for name, tensor in state.items():
        rows, *rest = wanted[name].shape
        packing = _packing(recipe, name)
        kind, shape = (torch.uint8, [rows, packing.width(rest[0])]) if packing else (wanted[name].dtype, [rows, *rest])
        kind = torch.float16 if _is_half(recipe, name) else kind
        if tensor.dtype != kind or list(tensor.shape) != shape:
            problems.append(f"{name} is {tensor.dtype} {shown(list(tensor.shape))}: {kind} {shape} is needed")
        elif packing:
            state[name] = packing.unpack(tensor, rest[0])
        elif not tensor.isfinite().all():
            problems.append(f"{name} has values that are not finite")
        elif name.endswith(".scale") and not _is_exact(recipe, name) and not tensor.equal(round_scale(tensor)):
            problems.append(f"{name} has scales that not every runtime holds")
        elif kind == torch.float16:
            state[name] = tensor.float()
    if problems:
        raise ModelError(
            listed(problems, f"{path} does not fit its config and recipe, {len(problems)} problems (quantize the model again):")
        )
    return state, sha256


def _is_exact(recipe: Recipe, name: str) -> bool:
    """Whether a layer's scales were taken unchanged from an earlier quantization."""
    rule = recipe.rule_for(name.removesuffix(".scale"))
    return rule is not None and rule.weights.scale_rule == "exact"


def integer_layers(model: Transformer) -> Iterator[tuple[str, Tensor, Tensor, WeightGrid]]:
    """Name, integers [out, in], scales [out, groups] and grid of every quantized layer, in the order of execution."""
    for name, module in layers_of(model):
        if isinstance(module, (IntegerLinear, IntegerEmbedding)):
            yield name, module.integers, module.scale, module.rule.weights

