"""What a recipe is: plain values that say what is quantized, where, and by which rule the scales are chosen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

from lobit.errors import RecipeError
from lobit.typed import build

KEPT_IN_FLOAT = "float"


@dataclass(frozen=True)
class WeightGrid:
    """Symmetric integers with one scale per group of weights along the input axis."""

    bits: Literal[4, 8]
    group_size: int | None
    """Weights that share a scale; None: a whole output channel (row)."""
    scale_rule: Literal["range"] = "range"
    """`range`: max(-w_min, w_max) / ((2^bits - 1) / 2) [MobileLLM-Pro eq. 4], rounded as `grid.round_scale` says."""

    @property
    def q_min(self) -> int:
        """Smallest integer."""
        return -(1 << (self.bits - 1))

    @property
    def q_max(self) -> int:
        """Largest integer."""
        return (1 << (self.bits - 1)) - 1

    def __str__(self) -> str:
        return f"int{self.bits} " + ("per channel" if self.group_size is None else f"group {self.group_size}")


@dataclass(frozen=True)
class Rule:
    """Quantizes every linear or embedding whose name matches one of the patterns."""

    match: tuple[str, ...]
    """Shell patterns on names such as `layers.0.mlp.down`, `embedding`, `head`."""
    weights: WeightGrid
    activation_bits: Literal[8] | None = None
    """8: the input is quantized per token, asymmetric, at run time; None: the input stays in floating point."""


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized; written verbatim into checkpoints and bundles."""

    name: str
    summary: str
    rules: tuple[Rule, ...]
    """The first rule that matches a layer decides; a layer without one stays in floating point."""
    exclude: tuple[str, ...] = ()
    """Patterns of layers that stay in floating point whatever the rules say."""
    kv_bits: Literal[8] | None = None
    """8: keys and values are cached as INT8, asymmetric, one scale per token and head; None: in floating point."""
    untied: bool = False
    """The head gets integers of its own where the model shares the embedding with it."""
    source: str = ""
    """Where the recipe comes from."""

    def rule_for(self, name: str) -> Rule | None:
        """The rule that quantizes layer `name`, or None."""
        if self.excluded_by(name):
            return None
        return next((rule for rule in self.rules if any(fnmatchcase(name, pattern) for pattern in rule.match)), None)

    def excluded_by(self, name: str) -> str | None:
        """The exclusion that keeps layer `name` in floating point, or None."""
        return next((pattern for pattern in self.exclude if fnmatchcase(name, pattern)), None)

    def with_changes(
        self, exclude: tuple[str, ...] = (), group_size: int | None = None, kv_cache: Literal["int8", "float"] | None = None
    ) -> Recipe:
        """The recipe with more exclusions, another group size or another key-value cache.

        Args:
            exclude: further patterns that stay in floating point.
            group_size: weights per scale, in every rule that has groups.
            kv_cache: overrides how keys and values are cached.

        Raises:
            RecipeError: a group size for a recipe without groups, or below 1.
        """
        rules = self.rules
        if group_size is not None:
            if group_size < 1 or all(rule.weights.group_size is None for rule in rules):
                raise RecipeError(f"recipe {self.name} has no groups that could be of size {group_size}: leave --group-size out")
            rules = tuple(
                rule
                if rule.weights.group_size is None
                else replace(rule, weights=replace(rule.weights, group_size=group_size))
                for rule in rules
            )
        kv_bits: Literal[8] | None = self.kv_bits if kv_cache is None else 8 if kv_cache == "int8" else None
        return replace(self, rules=rules, exclude=self.exclude + exclude, kv_bits=kv_bits)

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        return cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(self))))

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_json`.

        Raises:
            RecipeError: fields are missing, unknown or of the wrong kind.
        """
        try:
            recipe: Recipe = build(Recipe, values, "the recipe")
            json.dumps(values, ensure_ascii=False).encode()  # no half of a surrogate pair, which no manifest could hold
        except ValueError as error:
            raise RecipeError(f"{error}: quantize the model again") from None
        if any(rule.weights.group_size == 0 for rule in recipe.rules):
            raise RecipeError("the recipe has groups of 0 weights: quantize the model again")
        return recipe
