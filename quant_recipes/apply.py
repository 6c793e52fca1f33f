"""The one place where a recipe meets a model: says what happens to each layer, prepares a model for training, converts it for shipping."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from lobit.checkpoint import Weights
from lobit.errors import MOST_LISTED, RecipeError, listed, shown_name
from lobit.model import Config, Transformer, bias_of, weight_of
from lobit.progress_callback import Progress
from lobit.quant_recipes.fake_quant import FakeQuantizedEmbedding, FakeQuantizedLinear
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear, quantize_linear
from lobit.quant_recipes.quantizers import Searched
from lobit.quant_recipes.recipe import Recipe, Rule
from lobit.quant_recipes.rotate import Read, rotate, rotated
from lobit.quant_recipes.rotate import problems as rotation_problems

MOST_WORKERS = 8
"""Layers that are quantized at the same time; meanwhile each needs some ten bytes of memory per weight."""
HALF = torch.finfo(torch.float16)
Integers = tuple[torch.Tensor, torch.Tensor]
"""The integers [out, in], int8, and scales [out, groups] of a layer."""


@dataclass(frozen=True)
class LayerPlan:
    """What a recipe does to one layer."""

    name: str
    shape: tuple[int, int]
    """[out, in] of a linear layer, [vocabulary, hidden] of an embedding."""
    rule: Rule | None
    why: str
    """The rule's grid, or why the layer stays in floating point."""
    shared_with: str | None = None
    """The layer whose integers this one uses."""

    @property
    def problem(self) -> str | None:
        """Why the recipe cannot be applied to this layer, or None."""
        misfit = self.rule.weights.misfit(*self.shape) if self.rule else None
        return f"{self.name} ({misfit})" if misfit else None


def layers_of(model: Transformer) -> Iterator[tuple[str, nn.Module]]:
    """Every linear and embedding, in the order of execution."""
    yield "embedding", model.embedding
    for i, block in enumerate(model.blocks):
        for part in "qkvo":
            yield f"layers.{i}.attention.{part}", getattr(block.attention, part)
        for part in ("gate", "up", "down"):
            yield f"layers.{i}.mlp.{part}", getattr(block.mlp, part)
    yield "head", model.head


def skeleton(config: Config) -> Transformer:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return Transformer(config)


def layer_plans(config: Config, recipe: Recipe) -> list[LayerPlan]:
    """What the recipe does to each layer, in the order of execution."""
    rows = []
    for name, module in layers_of(skeleton(config)):
        out, inner = weight_of(module).shape
        rule, excluded = recipe.rule_for(name), recipe.excluded_by(name)
        kept = " (half)" if recipe.float_bits == 16 else ""
        why = f"excluded by {excluded}{kept}" if excluded else str(rule.weights) if rule else f"no rule{kept}"
        shared = "embedding" if name == "head" and config.tied and not recipe.untied else None
        rows.append(LayerPlan(name, (out, inner), rule, why, shared))
    return rows


def problems(config: Config, recipe: Recipe) -> list[str]:
    """Every reason why the recipe does not fit the model, each with what to do about it."""
    rows = layer_plans(config, recipe)
    found = []
    misfits = [(row, row.problem) for row in rows if row.problem and row.rule]
    if misfits:
        divisors = sorted({row.rule.weights.divisor for row, _ in misfits if row.rule})
        patterns = sorted({_pattern(row.name) for row, _ in misfits})
        exclusion = " ".join(f"--except '{pattern}'" for pattern in patterns)
        named = ", ".join(text for _, text in misfits[:MOST_LISTED] if text)
        named += f" … and {len(misfits) - MOST_LISTED} more" if len(misfits) > MOST_LISTED else ""
        found.append(
            f"{len(misfits)} layers do not divide by {', '.join(divisors)}: {named}; "
            f"keep them in floating point with {exclusion}, take another --group-size, or a recipe without groups such as 8da8w"
        )
    by_name = {row.name: row for row in rows}
    embedding, head = by_name["embedding"], by_name["head"]
    if head.shared_with and _elsewhere(head.rule) != _elsewhere(embedding.rule):
        found.append(
            f"head ({head.why}) and embedding ({embedding.why}) share one tensor but not one grid: give both the same, or untie them"
        )
    unused = [pattern for pattern in recipe.exclude if not any(recipe.excluded_by(row.name) == pattern for row in rows)]
    found += [f"the exclusion '{shown_name(pattern)}' matches no layer: names are such as {rows[-2].name}" for pattern in unused]
    patterns = [pattern for rule in recipe.rules for pattern in rule.match]
    idle = [pattern for pattern in patterns if not any(fnmatchcase(row.name, pattern) for row in rows)]
    found += [f"the pattern '{shown_name(pattern)}' matches no layer: names are such as {rows[-2].name}" for pattern in idle]
    return found + rotation_problems(config, recipe)


def _elsewhere(rule: Rule | None) -> Rule | None:
    """The rule without its patterns: what it does to a layer, whichever layers it matches."""
    return rule and replace(rule, match=())


def _pattern(name: str) -> str:
    """The pattern that matches a layer of this name in every block: layers.3.mlp.down -> layers.*.mlp.down."""
    parts = name.split(".")
    return ".".join("*" if part.isdigit() else part for part in parts)


def check(config: Config, recipe: Recipe) -> None:
    """Refuses a recipe that does not fit the model.

    Raises:
        RecipeError: the recipe does not fit; the message lists all reasons.
    """
    found = problems(config, recipe)
    if found:
        raise RecipeError(listed(found, f"recipe {recipe.name} does not fit this {config.family} model:"))


def _check_chooses(recipe: Recipe) -> None:
    """Refuses a recipe that has no rule by which to choose scales.

    Raises:
        RecipeError: the recipe describes a model that was quantized before.
    """
    if any(rule.weights.scale_rule == "exact" for rule in recipe.rules):
        raise RecipeError(f"recipe {recipe.name} is that of a model that was quantized before: take one of `lobit recipes`")


def arrange(model: Transformer, recipe: Recipe) -> None:
    """Gives a float model the parameters that the recipe quantizes: an untied head, a rotated basis. In place; idempotent.

    Raises:
        RecipeError: the recipe does not fit the model.
    """
    check(model.config, recipe)
    _check_chooses(recipe)
    if recipe.untied and model.config.tied:
        untie(model)
    rotate(model, recipe)


def prepare(model: Transformer, recipe: Recipe) -> Transformer:
    """Puts fake-quantized layers in place of those that the recipe quantizes; the weights stay trainable floats. In place.

    Layers that ship in half precision begin rounded to it and train in float32: rounding them again at the end moves a weight by
    at most 2^-11 of itself.

    Raises:
        RecipeError: the recipe does not fit the model.
    """
    arrange(model, recipe)
    for name, module in list(layers_of(model)):
        rule = recipe.rule_for(name)
        if rule is None:
            _to_floats(module, recipe, name)
        else:
            wrap = FakeQuantizedEmbedding if name == "embedding" else FakeQuantizedLinear
            model.set_submodule(name, wrap(module, rule))
    head, embedding = model.head, model.embedding
    if model.config.tied and isinstance(head, FakeQuantizedLinear) and isinstance(embedding, FakeQuantizedEmbedding):
        head.weight, head.quantizer = embedding.weight, embedding.quantizer
    return model


@torch.no_grad()
def begin_at(model: Transformer, start: Transformer) -> list[str]:
    """Lets a prepared model begin at the integers of a converted one, in place; returns the names of the layers that do.

    Layers whose grid is another, or whose scales are not searched, begin as `prepare` left them.

    Raises:
        RecipeError: no layer has the grid of the converted model.
    """
    begun = list[str]()
    for (name, layer), (_, other) in zip(layers_of(model), layers_of(start), strict=True):
        if (name == "head" and model.config.tied) or not isinstance(other, (IntegerLinear, IntegerEmbedding)):
            continue
        if isinstance(layer, (FakeQuantizedLinear, FakeQuantizedEmbedding)) and layer.rule.weights == other.rule.weights:
            quantizer = layer.quantizer
            if isinstance(quantizer, Searched):
                layer.weight.copy_(quantizer.begin_at(layer.weight, other.integers, other.scale))
                begun.append(name)
    if not begun:
        raise RecipeError("no layer of the checkpoint to begin at has the recipe's grid: quantize the model with this recipe")
    return begun


def convert(
    model: Transformer,
    recipe: Recipe,
    progress: Progress | None = None,
    weights: Weights | None = None,
    calibrated: Mapping[str, Integers] | None = None,
) -> Transformer:
    """Puts integers and scales in place of the weights that the recipe quantizes. In place, so that memory use shrinks layer by layer.

    Args:
        model: a float model, which is rotated where the recipe says so, or one that `prepare` made and training changed.
        progress: called after each layer.
        weights: the weights of a model without memory (`Weights.model`), read as each layer is quantized; None: the model has its own.
        calibrated: the integers and scales of layers whose rule rounds on a calibration text.

    Raises:
        RecipeError: the recipe does not fit the model, needs a calibration, or a weight is not finite.
    """
    arrange(model, recipe)
    names = [name for name, _ in layers_of(model)]

    def converted(name: str) -> nn.Module:
        module, rule = model.get_submodule(name), recipe.rule_for(name)
        if weights:
            _fill(module, name, _reader(weights, recipe, None if rule else torch.float32))
        elif rule:
            _check_finite(name, weight_of(module).detach())
        if rule is None:
            return _to_floats(module, recipe, name)
        return _to_integers(model, name, module, rule, (calibrated or {}).get(name))

    shares = model.config.tied and recipe.rule_for("head") is not None
    with _one_thread_each(), ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_WORKERS)) as pool:
        for done, (name, layer) in enumerate(zip(names, pool.map(converted, names[:-1] if shares else names), strict=False), 1):
            model.set_submodule(name, layer)
            if progress:
                progress("quantize", done, len(names))
    if shares:
        model.set_submodule("head", converted("head"))
    if weights:
        _fill(model, "", _reader(weights, recipe, torch.float32))
        if model.config.tied and not isinstance(model.head, IntegerLinear):
            model.head.weight = weight_of(model.embedding)
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Runs PyTorch's operators on one thread each: layers in parallel scale better than rows in parallel, and waiting threads spin."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _reader(weights: Weights, recipe: Recipe, dtype: torch.dtype | None) -> Read:
    """Reads parameters as the recipe rotates them; biases always in float32."""
    return rotated(weights.config, recipe, lambda path: weights.read(path, dtype if path.endswith(".weight") else torch.float32))


def _fill(module: nn.Module, name: str, read: Read) -> None:
    """Reads the parameters of a module that have no memory yet."""
    for path, parameter in list(module.named_parameters(name)):
        if parameter.is_meta:
            owner = module.get_submodule(path.removeprefix(f"{name}.").rpartition(".")[0])
            part = path.rpartition(".")[2]
            setattr(owner, part, nn.Parameter(read(path), requires_grad=False))


def _check_finite(name: str, weight: torch.Tensor) -> None:
    """Refuses weights that are infinite or NaN, such as failed training leaves; `Weights` checks those that it reads."""
    if not weight.isfinite().all():
        raise RecipeError(f"{name} has {int((~weight.isfinite()).sum())} weights that are not finite: train with a lower learning rate")


def _to_floats(module: nn.Module, recipe: Recipe, name: str) -> nn.Module:
    """The layer, its weight rounded to the precision in which the recipe keeps floats."""
    if recipe.float_bits == 16:
        weight = weight_of(module)
        beyond = 0 if weight.is_meta else int((weight.data.abs() > HALF.max).sum())
        if beyond:
            raise RecipeError(
                f"{beyond} of {weight.numel()} weights of {name} are beyond {HALF.max:g}, the largest that 16 bits hold, and recipe "
                f"{recipe.name} keeps it so: take one that rounds it to integers (8da4w-g32), or fp"
            )
        weight.data = weight.data.half().float()
    return module


def _to_integers(model: Transformer, name: str, module: nn.Module, rule: Rule, calibrated: Integers | None) -> nn.Module:
    if name == "head" and model.config.tied and isinstance(model.embedding, IntegerEmbedding):
        return IntegerLinear(model.embedding.integers, model.embedding.scale, None, rule)
    weight = weight_of(module).detach()
    if isinstance(module, (FakeQuantizedLinear, FakeQuantizedEmbedding)):
        integers, scale = module.integers()
    elif rule.rounding == "gptq":
        if calibrated is None:
            raise RecipeError(f"{name} is rounded on a calibration text: give it with --calibration FILE, or the checkpoint that it made")
        integers, scale = calibrated
    else:
        integers, scale = quantize_linear(weight, rule.weights)
    if name == "embedding":
        return IntegerEmbedding(integers, scale, rule)
    return IntegerLinear(integers, scale, bias_of(module), rule)


def untie(model: Transformer) -> None:
    """Gives the head a weight of its own."""
    shared = weight_of(model.head)
    model.head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    model.config = replace(model.config, tied=False)
