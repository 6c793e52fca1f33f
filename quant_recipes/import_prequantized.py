"""Imports models that were quantized before, with exactly the integers and scales that they have.

Weights that a file marks as quantized are read as `lobit.prequantized` describes. Floats whose values are ternary times a scale (Spectra's
unpacked TriLM, Bonsai folded) are recognised from the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lobit.checkpoint import Weights
from lobit.errors import ModelError, listed
from lobit.model import Config, Transformer, weight_of
from lobit.prequantized import Kind, Quantized
from lobit.progress_callback import Progress
from lobit.quant_recipes.apply import layers_of
from lobit.quant_recipes.quantized import empty_model
from lobit.quant_recipes.recipe import Recipe, Rule, WeightGrid

BITNET = ("bitnet", "transformers' bitnet quantization; BitNet b1.58, eq. 1 to 3")
SOURCES: dict[Kind | Literal["values"], tuple[str, str]] = {
    "multiply": BITNET,
    "divide": BITNET,
    "online": BITNET,
    "channels": ("bonsai", "Bonsai, eq. 1 and 2"),
    "torchao": ("torchao", "torchao's IntxUnpackedToInt8Tensor"),
    "learned": ("learned-ranges", "torchao's QAT with learned ranges; MobileLLM-Pro, section 7.1 and eq. 4"),
    "values": ("ternary", "floats that are ternary times a scale; Spectra, section A.4; Bonsai, eq. 2"),
}
"""By kind of checkpoint: the recipe's name after `taken-in`, and where such checkpoints come from."""
MOST_SHARDS = 8
"""Most blocks of rows or columns, each with its own scale, that are looked for in a matrix; Spectra's largest model has 6 [section A.4]."""
FEWEST_WEIGHTS = 32
"""The fewest columns of a block: fewer weights of a row may have one magnitude by chance."""
ROWS = 64
"""Rows of a matrix that are examined together."""
SMALLEST = torch.finfo(torch.float32).tiny
"""The smallest scale that runtimes can multiply with."""


def take_in(source: Path, config: Config, progress: Progress | None = None) -> tuple[Transformer, Recipe] | None:
    """The converted model of a folder whose weights were quantized before, and its recipe; None if the folder holds a float model.

    Args:
        source: a Hugging Face folder.
        config: as `load_config` gives it.
        progress: called after each tensor.

    Raises:
        ModelError: the folder cannot be read, or its weights are not exactly integers times scales; all layers are named.
    """
    weights = Weights(source, config)
    recipe = taken_recipe(weights)
    if recipe is None:
        return None
    model, state = empty_model(config, recipe), {}
    layers = {name for name, _ in layers_of(model)}
    for done, name in enumerate(weights.places, 1):
        layer, _, part = name.rpartition(".")
        rule = recipe.rule_for(layer) if part == "weight" and layer in layers else None
        if rule is None:
            state[name] = weights.read(name)
        else:
            state[f"{layer}.integers"], state[f"{layer}.scale"] = _integers(weights, name, rule.weights)
        if progress:
            progress("take in", done, len(weights.places))
    if model.config.tied:
        state |= {name.replace("embedding.", "head."): tensor for name, tensor in state.items() if name.startswith("embedding.")}
    model.load_state_dict(state, assign=True)
    if model.config.tied and "head.weight" in state:
        model.head.weight = weight_of(model.embedding)
    return model.eval().requires_grad_(False), recipe


def is_taken_in(recipe: Recipe) -> bool:
    """Whether a recipe describes an imported model; it cannot quantize another one."""
    return any(rule.weights.scale_rule == "exact" for rule in recipe.rules)


def taken_recipe(weights: Weights) -> Recipe | None:
    """The recipe of a folder whose weights were quantized before; None if it holds a float model.

    Values are examined only where no weight is marked as quantized, and to tell whether float16 holds the other layers exactly.

    Raises:
        ModelError: some layers are ternary, others are not; all of the latter are named.
    """
    kept = {name: weights.places[place].quantized for name, place in _places(weights).items()}
    rules = {name: _rule(how) for name, how in kept.items() if how}
    kinds: set[Kind | Literal["values"]] = {how.kind for how in kept.values() if how}
    if not rules:
        rules, kinds = {name: Rule((), grid) for name, grid in _ternary_grids(weights).items()}, {"values"}
    if not rules:
        return None
    name, source = (", ".join(dict.fromkeys(SOURCES[kind][i] for kind in sorted(kinds))) for i in (0, 1))
    floats = {place for layer, place in _places(weights).items() if layer not in rules}
    return Recipe(
        name=f"taken-in {name}",
        summary="Integers and scales as the checkpoint had them; the KV cache float.",
        rules=_grouped(rules, list(kept)),
        untied=weights.untied,
        float_bits=16 if all(_fits_half(weights, place) for place in floats) else 32,
        source=source,
    )


def _places(weights: Weights) -> dict[str, str]:
    """The name of every layer's weight; that of the embedding for a head that shares it."""
    layers = [name for name, _ in layers_of(weights.model)]
    return {name: f"{'embedding' if name == 'head' and weights.config.tied else name}.weight" for name in layers}


def _rule(kept: Quantized) -> Rule:
    """The rule of a layer, without the pattern that matches its name."""
    grid = WeightGrid(kept.bits, kept.group_size, "exact", 1 if kept.one_scale and kept.bits == 2 else None)
    if kept.kind in ("multiply", "divide", "online"):
        return Rule((), grid, activation_bits=8, activation_rule="absmax")
    return Rule((), grid, activation_bits=8 if kept.dynamic_input else None)


def _grouped(rules: Mapping[str, Rule], layers: list[str]) -> tuple[Rule, ...]:
    """Merges rules of single layers into rules with patterns, none of which matches a layer that has another rule or none."""
    matches: dict[Rule, dict[str, None]] = {}
    for name, rule in rules.items():
        pattern = next(
            pattern for pattern in _patterns(name) if all(rules.get(other) == rule for other in layers if fnmatchcase(other, pattern))
        )
        matches.setdefault(rule, {})[pattern] = None
    return tuple(replace(rule, match=tuple(patterns)) for rule, patterns in matches.items())


def _patterns(name: str) -> list[str]:
    """Patterns that match a layer, the widest first: layers.*, layers.*.mlp.up, layers.0.mlp.up."""
    first, *rest = name.split(".")
    return [f"{first}.*", ".".join([first, "*", *rest[1:]]), name] if rest else [name]


def _fits_half(weights: Weights, place: str) -> bool:
    """Whether float16 holds every value of a weight."""
    values = weights.read(place, None)
    return values.dtype == torch.float16 or all(rows.half().float().equal(rows.float()) for rows in values.split(ROWS))


def _integers(weights: Weights, place: str, grid: WeightGrid) -> tuple[Tensor, Tensor]:
    """Integers [out, in], int8, and scales [out, groups] of a layer."""
    if weights.places[place].quantized:
        integers, scale = weights.integers(place)
    else:
        values = weights.read(place)
        integers, scale = values.sign().to(torch.int8), ternary_scale(values, grid)
    wrong = int((~scale.isfinite() | (scale < SMALLEST)).sum())
    if wrong:
        raise ModelError(
            f"{wrong} of {scale.numel()} scales of {weights.places[place].name} are not positive numbers from {SMALLEST:g} on, which "
            "runtimes need: quantize the float values anew with --recipe"
        )
    return integers, scale


# --- floats that are ternary ------------------------------------------------------------------------------------------------------


def magnitudes(weight: Tensor, groups: int) -> Tensor | None:
    """The only magnitude besides 0 in each group of each row of a weight [out, in], or 0: [out, groups]; None if a group has several."""
    found = []
    for rows in weight.split(ROWS):
        parts = rows.float().abs().reshape(len(rows), groups, -1)
        found.append(parts.amax(2))
        if not ((parts == found[-1][:, :, None]) | (parts == 0)).all():
            return None
    return torch.cat(found)


def ternary_grid(weight: Tensor) -> WeightGrid | None:
    """The coarsest grid that holds a weight [out, in] exactly, with one scale a matrix, a shard, or a row; None if it is not ternary.

    Shards are equal blocks of rows, or of columns where the devices that trained the model each held a part of the input.
    """
    out, inner = weight.shape
    for groups in range(1, MOST_SHARDS + 1):
        if groups > 1 and (inner % groups or inner // groups < FEWEST_WEIGHTS):
            continue
        found = magnitudes(weight, groups)
        if found is not None:
            blocks = (blocks for blocks in range(1, MOST_SHARDS + 1) if groups == 1 and out % blocks == 0)
            return WeightGrid(2, None if groups == 1 else inner // groups, "exact", next((n for n in blocks if _agree(found, n)), None))
    return None


def _agree(found: Tensor, blocks: int) -> bool:
    """Whether all rows of each of the equal blocks have the same magnitude, or 0."""
    parts = found.reshape(blocks, -1)
    return bool(((parts == parts.amax(1, keepdim=True)) | (parts == 0)).all())


def ternary_scale(weight: Tensor, grid: WeightGrid) -> Tensor:
    """Scales [out, groups] of a ternary weight: its magnitudes. A group of zeros gets the scale of its shard, or else 1."""
    found = magnitudes(weight, weight.shape[1] // (grid.group_size or weight.shape[1]))
    assert found is not None
    if grid.shards:
        blocks = found.reshape(grid.shards, -1)
        found = blocks.amax(1, keepdim=True).expand(blocks.shape).reshape(found.shape)
    return torch.where(found == 0, 1.0, found)


def _ternary_grids(weights: Weights) -> dict[str, WeightGrid]:
    """The grid of every linear layer; empty for a float model, where most layers are not ternary, or those that are hold zeros only.

    Raises:
        ModelError: some layers are ternary, some are not.
    """
    grids, others, zeros = {}, [], 0
    layers = [name for name in _places(weights) if name.startswith("layers.")]
    for name in layers:
        weight = weights.read(f"{name}.weight", None)
        grid = ternary_grid(weight)
        if grid:
            grids[name] = grid
            zeros += not weight.any()
        else:
            others.append(name)
        if 2 * len(others) > len(layers):
            return {}
    if len(grids) == zeros:
        return {}
    if others:
        problems = [f"{name}: {_told(weights.read(f'{name}.weight'))}" for name in others]
        heading = (
            f"{len(others)} of {len(layers)} layers of {weights.folder} are not ternary times a scale, the others are: fetch the file "
            "again, or quantize its floats anew with --recipe trilm (one scale a matrix) or --recipe bonsai (one a row):"
        )
        raise ModelError(listed(problems, heading))
    return grids


def _told(weight: Tensor) -> str:
    """Why a weight is not ternary."""
    ordered = weight.abs().sort(1).values
    counts = (ordered.diff(dim=1) != 0).sum(1) + (ordered[:, 0] != 0)
    several, most = int((counts > 1).sum()), int(counts.argmax())
    return f"{several} of {len(weight)} rows have more than one magnitude besides 0, row {most} has {int(counts[most])}"
