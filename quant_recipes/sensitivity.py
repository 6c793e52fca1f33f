"""How far each layer's rounding alone moves a model, and which layers to give a wider grid.

The figures of single layers do not sum to that of all of them, errors add up and cancel: a proposal is chosen by the sum, as an
approximation, and then measured. Layers whose rule is GPTQ are rounded to nearest here, which needs no calibration text.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lobit.errors import RecipeError
from lobit.model import CausalAttention, Transformer, bias_of, rotary_tables, weight_of
from lobit.quant_recipes.apply import Fate, Progress, check, convert, fates
from lobit.quant_recipes.corpus import Corpus
from lobit.quant_recipes.figures import AT_ONCE, Figures, figures
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear, quantize_linear
from lobit.quant_recipes.recipe import GRIDS, Recipe, Rule
from lobit.quant_recipes.sizes import size_of

SHARE = 0.5
"""Of the sum over all layers: what a proposal leaves of it, were wider layers exact."""


@dataclass(frozen=True)
class Row:
    """One layer quantized, the rest of the model float."""

    layers: tuple[str, ...]
    """Its name; of an embedding that is the head too, both names."""
    rule: Rule
    parameters: int
    bytes_saved: int
    """Of the checkpoint, against the layer in floating point as the recipe keeps it."""
    bytes_wider: int
    """That the `wider` grid adds to the checkpoint."""
    kl: float
    """KL(float || model), nats a token."""

    @property
    def wider(self) -> str:
        """The next grid: INT8 per channel, of 8 bits floating point."""
        return _wider(self.rule)


def _wider(rule: Rule) -> str:
    return "int8" if rule.weights.bits < 8 else "float"


def sensitivity(model: Transformer, recipe: Recipe, corpus: Corpus, progress: Progress | None = None) -> list[Row]:
    """Every layer that the recipe quantizes, the most sensitive first.

    One pass of the float model over the text, then for each layer a pass that begins at its block. Memory: the model, and of the
    text the stream and the float model's log-probabilities, 4 bytes for every token and entry of the vocabulary.

    Args:
        model: float. Single layers are replaced in it meanwhile.
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
    walk, rows = _Walk(model, corpus), []
    for done, unit in enumerate(units, 1):
        walk.advance(unit[0].name)
        with _quantized(model, unit):
            kl = walk.kl()
        rows.append(_row(unit, recipe, kl))
        if progress:
            progress("sensitivity", done, len(units))
    return sorted(rows, key=lambda row: row.kl, reverse=True)


def _units(model: Transformer, recipe: Recipe) -> list[list[Fate]]:
    """Layers that are quantized together, in the order of execution: each alone, but a shared head with its embedding."""
    ruled = [fate for fate in fates(model.config, recipe) if fate.rule]
    return [[fate, *(head for head in ruled if head.shared_with == fate.name)] for fate in ruled if not fate.shared_with]


def _row(unit: Sequence[Fate], recipe: Recipe, kl: float) -> Row:
    fate, rule = unit[0], cast(Rule, unit[0].rule)
    grid = GRIDS.get(_wider(rule))
    grids = rule, replace(rule, weights=grid) if grid else None, None
    now, wide, floats = (size_of(replace(fate, rule=other), recipe).bytes for other in grids)
    names = tuple(fate.name for fate in unit)
    return Row(names, rule, fate.shape[0] * fate.shape[1], floats - now, wide - now, kl)


@contextlib.contextmanager
def _quantized(model: Transformer, unit: Sequence[Fate]) -> Iterator[None]:
    """The model with one layer of integers."""
    before = {fate.name: model.get_submodule(fate.name) for fate in unit}
    rule = cast(Rule, unit[0].rule)
    integers, scale = quantize_linear(weight_of(before[unit[0].name]).detach(), rule.weights)
    try:
        for name, module in before.items():
            if name == "embedding":
                model.embedding = IntegerEmbedding(integers, scale, rule)
            else:
                model.set_submodule(name, IntegerLinear(integers, scale, bias_of(module), rule))
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


class _Walk:
    """A text on its way through the float model; from where it is, to the end of the model with one layer changed.

    Places on the way: 0 before the embedding, 1 before the first layer that is executed, and so on to the head.
    """

    @torch.inference_mode()
    def __init__(self, model: Transformer, corpus: Corpus) -> None:
        self.model, self.place, self.tokens = model, 0, len(corpus) * corpus.length
        self.tables = rotary_tables(model.config, torch.arange(corpus.length))
        self.attend = CausalAttention(model.config)
        few = max(1, AT_ONCE // (corpus.length * model.config.vocab_size))
        self.streams = list(corpus.sequences[:, :-1].long().split(few))
        self.reference = [self._log_probabilities(x) for x in self.streams]

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
        pairs = zip(self.streams, self.reference, strict=True)
        total = sum(F.kl_div(self._log_probabilities(x), told, reduction="sum", log_target=True).item() for x, told in pairs)
        return total / self.tokens

    def _log_probabilities(self, x: Tensor) -> Tensor:
        """Of each next token [B, T, V]."""
        return self.model.logits(self._through(x, 1 + len(self.model.config.layers))).float().log_softmax(-1)

    def _through(self, x: Tensor, end: int) -> Tensor:
        """A stream from its place to another."""
        config = self.model.config
        if self.place == 0 < end:
            x = self.model.embedding(x) * config.embedding_scale
        for layer in range(max(self.place, 1) - 1, end - 1):
            x = self.model.layers[layer // config.repeats](x, layer, self.tables, self.attend)
        return x


def proposal(rows: Sequence[Row], share: float = SHARE) -> list[str]:
    """Wider grids for few layers, as `Recipe.with_changes` takes them: first those whose KL is largest for the bytes they would add.

    Args:
        rows: of all layers.
        share: of the rows' summed KL that may stay.
    """
    left = sum(row.kl for row in rows)
    most, chosen = share * left, []
    for row in sorted(rows, key=lambda row: row.kl / max(row.bytes_wider, 1), reverse=True):
        if left <= most:
            break
        left -= row.kl
        chosen += [f"{name}={row.wider}" for name in row.layers]
    return chosen


def measured(model: Transformer, recipe: Recipe, corpus: Corpus) -> Figures:
    """A recipe's figures with all its layers quantized, and its key-value cache; the model stays as it is.

    Raises:
        RecipeError: the recipe does not fit the model, or a weight is not finite.
    """
    nearest = replace(recipe, rules=tuple(replace(rule, rounding="nearest") for rule in recipe.rules))
    # new parameters over the same memory: nothing but integers is allocated
    shared: dict[int, object] = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    return figures(convert(copy.deepcopy(model, shared), nearest), corpus, recipe, model)
