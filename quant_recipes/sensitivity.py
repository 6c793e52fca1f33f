"""How far each layer's rounding alone moves a model, and which layers to give a finer grid.

The figures of single layers do not sum to the figure of all of them, since errors add up and cancel: a proposal is chosen by the sum,
as an approximation, and then measured. Layers whose rule is GPTQ are rounded to nearest here, which needs no calibration text.

Products are computed in float32. bfloat16 is twice as fast, but SmolLM2 then differs from itself by 2e-4 nats a token, by 6e-4 with the
head's product in bfloat16 too, and layers.0.attention.q under `8da4w-g32` by 3e-4 instead of 4e-5: that ranks the products' rounding.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lobit.errors import RecipeError
from lobit.model import CausalAttention, Transformer, bias_of, rotary_tables, weight_of
from lobit.progress_callback import Progress
from lobit.quant_recipes.apply import LayerPlan, check, convert, layer_plans
from lobit.quant_recipes.corpus import Corpus
from lobit.quant_recipes.grid import dequantize
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear, quantize_linear
from lobit.quant_recipes.metrics import AT_ONCE, Figures, figures
from lobit.quant_recipes.recipe import GRIDS, Recipe, Rule, WeightGrid
from lobit.quant_recipes.sizes import size_of

GROUP = 32
"""Weights that share a scale in the grids that are proposed for layers whose scales are per output channel."""
IN_CACHE = 1 << 20
"""Logits that are compared at once: their temporaries stay in the processor's cache."""


@dataclass(frozen=True)
class Wider:
    """A finer grid for a layer than the recipe's."""

    grid: str
    """Its name for `Recipe.with_changes`: `int8`, `int4:32`, `float`."""
    bytes: int
    """Bytes that it adds to the checkpoint."""
    kl: float
    """The KL that is expected to stay, nats a token: the same share of the layer's KL as of its weights' squared error."""


@dataclass(frozen=True)
class Row:
    """The figures with one layer quantized and the rest of the model float."""

    layers: tuple[str, ...]
    """The layer's name; for an embedding that is also the head, both names."""
    rule: Rule
    parameters: int
    bytes_saved: int
    """How much smaller the checkpoint is than with the layer in floating point, as the recipe keeps floats."""
    kl: float
    """KL(float || model), nats a token."""
    wider: tuple[Wider, ...]
    """Finer grids. Below 8 bits: INT8 per channel and, if 3 bits or more are per channel, the same bits in groups. At 8 bits: floats."""


def sensitivity(model: Transformer, recipe: Recipe, corpus: Corpus, progress: Progress | None = None) -> list[Row]:
    """Measures every layer that the recipe quantizes; the most sensitive comes first.

    The float model passes over the text once, then for each layer there is a pass that begins at its block. Memory: the model, the
    text's stream and the float model's log-probabilities, 4 bytes for every token and entry of the vocabulary.

    Args:
        model: float; single layers are replaced in it meanwhile.
        recipe: what is quantized; its key-value cache stays float here.
        corpus: the text.
        progress: called after each layer.

    Raises:
        RecipeError: the recipe does not fit the model, or quantizes nothing.
    """
    check(model.config, recipe)
    units = _units(model, recipe)
    if not units:
        raise RecipeError(f"recipe {recipe.name} quantizes no layer of this model: choose another (`lobit recipes` lists them)")
    layers, rows = _LayerByLayer(model, corpus), []
    for done, unit in enumerate(units, 1):
        layers.advance(unit[0].name)
        weight = weight_of(model.get_submodule(unit[0].name)).detach()
        with _quantized(model, unit) as error:
            kl = layers.kl()
        rows.append(_row(unit, recipe, kl, error, weight))
        if progress:
            progress("sensitivity", done, len(units))
    return sorted(rows, key=lambda row: row.kl, reverse=True)


def _units(model: Transformer, recipe: Recipe) -> list[list[LayerPlan]]:
    """The layers to quantize, in the order of execution: each alone, except a shared head, which goes with its embedding."""
    ruled = [layer_plan for layer_plan in layer_plans(model.config, recipe) if layer_plan.rule]
    return [[row, *(head for head in ruled if head.shared_with == row.name)] for row in ruled if not row.shared_with]


def _row(unit: Sequence[LayerPlan], recipe: Recipe, kl: float, error: float, weight: Tensor) -> Row:
    first, rule = unit[0], cast(Rule, unit[0].rule)
    now, floats = size_of(first, recipe).bytes, size_of(replace(first, rule=None), recipe).bytes
    wider = []
    for name, grid in _finer(rule.weights, first.shape[1]):
        size = size_of(replace(first, rule=replace(rule, weights=grid) if grid else None), recipe).bytes
        stays = 0.0 if grid is None else 1.0
        if grid and error:
            stays = min(1.0, _squared_error(weight, *quantize_linear(weight, grid)) / error)
        wider.append(Wider(name, size - now, stays * kl))
    return Row(tuple(row.name for row in unit), rule, first.shape[0] * first.shape[1], floats - now, kl, tuple(wider))


def _finer(grid: WeightGrid, inner: int) -> Iterator[tuple[str, WeightGrid | None]]:
    """Names and grids that round less; a grid of None stands for floating point."""
    if grid.bits == 8:
        yield "float", None
        return
    if grid.bits > 2 and grid.group_size is None and inner % GROUP == 0:
        yield f"int{grid.bits}:{GROUP}", replace(GRIDS[f"int{grid.bits}"], group_size=GROUP)
    yield "int8", GRIDS["int8"]


def _squared_error(weight: Tensor, integers: Tensor, scale: Tensor) -> float:
    """The squared error summed over all weights."""
    return F.mse_loss(dequantize(integers, scale), weight.float(), reduction="sum").item()


@contextlib.contextmanager
def _quantized(model: Transformer, unit: Sequence[LayerPlan]) -> Iterator[float]:
    """Replaces a layer of the model by its integers meanwhile; yields the squared error of its weights."""
    before = {layer_plan.name: model.get_submodule(layer_plan.name) for layer_plan in unit}
    rule = cast(Rule, unit[0].rule)
    weight = weight_of(before[unit[0].name]).detach()
    integers, scale = quantize_linear(weight, rule.weights)
    try:
        for name, module in before.items():
            if name == "embedding":
                model.embedding = IntegerEmbedding(integers, scale, rule)
            else:
                model.set_submodule(name, IntegerLinear(integers, scale, bias_of(module), rule))
        yield _squared_error(weight, integers, scale)
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


class _LayerByLayer:
    """Takes a text through the float model layer by layer, and from any place to the end of the model with one layer changed.

    Place 0 is before the embedding, 1 before the first layer that is executed, and so on to the head.
    """

    @torch.inference_mode()
    def __init__(self, model: Transformer, corpus: Corpus) -> None:
        self.model, self.place, self.tokens = model, 0, len(corpus) * corpus.length
        self.tables = rotary_tables(model.config, torch.arange(corpus.length))
        self.attend = CausalAttention(model.config)
        few = max(1, AT_ONCE // (corpus.length * model.config.vocab_size))
        self.streams = list(corpus.sequences[:, :-1].long().split(few))
        self.reference = [self._scores(x).float().log_softmax(1) for x in self.streams]

    @torch.inference_mode()
    def advance(self, name: str) -> None:
        """Takes the streams, tokens [B, T] and then [B, T, D], to where layer `name` is used first."""
        number = next((int(part) for part in name.split(".") if part.isdigit()), len(self.model.blocks))
        place = 0 if name == "embedding" else 1 + number * self.model.config.repeats
        self.streams = [self._through(x, place) for x in self.streams]
        self.place = place

    @torch.inference_mode()
    def kl(self) -> float:
        """KL(float || model as it is now), nats a token."""
        rows, total = max(1, IN_CACHE // self.model.config.vocab_size), 0.0
        for x, told in zip(self.streams, self.reference, strict=True):
            for scores, reference in zip(self._scores(x).split(rows), told.split(rows), strict=True):
                total += F.kl_div(scores.float().log_softmax(1), reference, reduction="sum", log_target=True).item()
        return total / self.tokens

    def _scores(self, x: Tensor) -> Tensor:
        """Logits of all next tokens [B·T, V]."""
        return self.model.score(self._through(x, 1 + len(self.model.config.layers))).flatten(0, 1)

    def _through(self, x: Tensor, end: int) -> Tensor:
        """Runs a stream from the current place to another."""
        if self.place == 0 < end:
            x = self.model.embed(x)
        return self.model.run(x, self.tables, self.attend, range(max(self.place, 1) - 1, end - 1))


@dataclass(frozen=True)
class _Step:
    """A step from a layer's grid to a finer one."""

    row: Row
    before: Wider | None
    after: Wider

    @property
    def bytes(self) -> int:
        return self.after.bytes - (self.before.bytes if self.before else 0)

    @property
    def worth(self) -> float:
        """The KL that the step removes per byte."""
        goes = (self.before.kl if self.before else self.row.kl) - self.after.kl
        return math.inf if goes > 0 >= self.bytes else goes / max(self.bytes, 1)


def proposal(rows: Sequence[Row], budget: int) -> list[str]:
    """Finer grids for few layers, as `Recipe.with_changes` takes them: first those that remove most KL per byte.

    A step that no longer fits is left out, and the ones after it are tried. A larger budget never leaves more of the summed KL: a step
    that it newly allows is worth more per byte than all steps that it displaces, which together have fewer bytes.

    Args:
        rows: those of all layers.
        budget: bytes that the checkpoint may grow by, at least 0.
    """
    chosen: dict[tuple[str, ...], Wider] = {}
    left = budget
    for step in sorted((step for row in rows for step in _steps(row)), key=lambda step: step.worth, reverse=True):
        if step.bytes <= left and chosen.get(step.row.layers) == step.before:
            chosen[step.row.layers] = step.after
            left -= step.bytes
    return [f"{name}={wider.grid}" for layers, wider in chosen.items() for name in layers]


def _steps(row: Row) -> Iterator[_Step]:
    """The steps from grid to grid, each time the one that is worth most, so that each is worth less than the one before."""
    before = None
    while True:
        steps = [_Step(row, before, wider) for wider in row.wider if wider != before]
        best = max(steps, key=lambda step: step.worth, default=None)
        if best is None or best.worth <= 0:
            return
        yield best
        before = best.after


def measured(model: Transformer, recipe: Recipe, corpus: Corpus) -> Figures:
    """A recipe's figures with all its layers rounded to nearest, and its key-value cache; the model stays as it is.

    Raises:
        RecipeError: the recipe does not fit the model, or a weight is not finite.
    """
    nearest = recipe.to_nearest()
    # the copy has new parameters over the same memory, so that only integers are allocated
    shared: dict[int, object] = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    return figures(convert(copy.deepcopy(model, shared), nearest), corpus, recipe, model)
