"""What a recipe is: plain values that say what is quantized, where, and by which rule the scales are chosen."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

from lobit.errors import RecipeError, listed, shown, shown_name
from lobit.from_json import build

ScaleRule = Literal["least_squares", "range", "learned", "absmean", "row_norm", "exact"]
Turn = Literal["stream", "heads"]
TURNS: tuple[Turn, ...] = ("stream", "heads")
NAMES = {1: "binary", 2: "ternary"}
KVCache = Literal["int8", "half", "float"]
Activations = Literal["half", "float"]
KV_BITS: dict[KVCache, Literal[8, 16] | None] = {"int8": 8, "half": 16, "float": None}
COMPUTE_BITS: dict[Activations, Literal[16, 32]] = {"half": 16, "float": 32}
LATER: dict[str, Any] = {"rotate": [], "compute_bits": 32}
"""Fields that recipes were given later, and what recipes from before mean by their absence."""


@dataclass(frozen=True)
class WeightGrid:
    """Symmetric integers with one scale per group of weights along the input axis."""

    bits: Literal[1, 2, 3, 4, 6, 8]
    """1: the integers are -1 and 1; 2: they are -1, 0 and 1 (1.58 bits); else -2^(bits-1) to 2^(bits-1) - 1."""
    group_size: int | None
    """Weights that share a scale; None: a whole output channel (row)."""
    scale_rule: ScaleRule = "least_squares"
    """How a weight chooses its scales, each then rounded as `grid.round_scale` says.

    `least_squares`: those that round it with the least squared error, found before training and then kept as shares of the largest
    weights; `range`: max(-w_min, w_max) / ((2^bits - 1) / 2) [MobileLLM-Pro eq. 4]; `learned`: the same of a w_min and w_max
    for every output channel that training learns [section 7.1]; `absmean`: mean |w| [BitNet b1.58 eq. 3; Spectra Table 1, TriLM and
    BiLM]; `row_norm`: a magnitude for every row over the norm of its integers [Bonsai eq. 1]; `exact`: the scales of
    a checkpoint that was quantized before, not rounded.
    """
    shards: int | None = None
    """Equal blocks of rows whose weights share one scale [Spectra section A.4], 1: the whole matrix; None: rows do not share scales."""

    @property
    def q_min(self) -> int:
        """Smallest integer."""
        return -1 if self.bits <= 2 else -(1 << (self.bits - 1))

    @property
    def q_max(self) -> int:
        """Largest integer."""
        return 1 if self.bits <= 2 else (1 << (self.bits - 1)) - 1

    @property
    def is_computed(self) -> bool:
        """Whether the scales of its integers are computed from the weight: GPTQ can round to such grids."""
        return self.bits > 2 and self.scale_rule in ("least_squares", "range")

    @property
    def divisor(self) -> str:
        """What must divide a layer's size, for messages."""
        return f"shards={self.shards}" if self.shards else f"group_size={self.group_size or 0}"

    def misfit(self, out: int, inner: int) -> str | None:
        """Why a weight [out, inner] cannot have this grid, or None."""
        if self.group_size and inner % self.group_size:
            return f"in={inner}"
        return f"out={out}" if self.shards and out % self.shards else None

    def __str__(self) -> str:
        if self.shards:
            where = "per matrix" if self.shards == 1 else f"in {self.shards} shards"
        else:
            where = "per channel" if self.group_size is None else f"group {self.group_size}"
        return f"{NAMES.get(self.bits) or f'int{self.bits}'} {where}"


@dataclass(frozen=True)
class Rule:
    """Quantizes every linear or embedding whose name matches one of the patterns."""

    match: tuple[str, ...]
    """Shell patterns on names such as `layers.0.mlp.down`, `embedding`, `head`."""
    weights: WeightGrid
    activation_bits: Literal[8] | None = None
    """8: the input is quantized per token at run time; None: the input stays in floating point."""
    activation_rule: Literal["range", "absmax"] = "range"
    """The input's grid in training: `range` has a zero point [MobileLLM-Pro eq. 3], `absmax` has none [BitNet b1.58 section 2]."""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """`gptq`: after training, each weight makes up for the rounding of those before it on a calibration text (`gptq.py`)."""


ENDS = ("embedding", "head")
GRIDS: dict[str, WeightGrid] = {
    "binary": WeightGrid(1, None, "absmean"),
    "ternary": WeightGrid(2, None, "absmean"),
    "int3": WeightGrid(3, None),
    "int4": WeightGrid(4, None),
    "int6": WeightGrid(6, None),
    "int8": WeightGrid(8, None),
}
"""Grids by their names in mixed precision, each with one scale per output channel."""
_MIXED = re.compile(r"([^=]+)=(?:(float|binary|ternary)|(int[3468])(?::([1-9]\d{0,7}))?)", re.ASCII)
"""PATTERN=GRID, where integers may have a group size."""


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized; written verbatim into checkpoints and bundles."""

    name: str
    summary: str
    rules: tuple[Rule, ...]
    """The first rule that matches a layer decides; a layer without one stays in floating point."""
    exclude: tuple[str, ...] = ()
    """Patterns of layers that stay in floating point whatever the rules say."""
    kv_bits: Literal[8, 16] | None = None
    """8: keys and values are cached as INT8, asymmetric, one scale per token and head; 16: in half precision; None: as float32."""
    compute_bits: Literal[16, 32] = 32
    """Bits of the floats that are computed: 16: what every operation gives is rounded to half precision (`precision.py`). Training
    computes in the precision that it is told, whatever this says."""
    untied: bool = False
    """The head gets integers of its own where the model shares the embedding with it."""
    float_bits: Literal[16, 32] = 32
    """Bits of the layers that stay in floating point; 16: they are rounded once to half precision. Norms and biases keep 32."""
    rotate: tuple[Turn, ...] = ()
    """What is rotated before anything is rounded, so that outliers are spread (`rotate.py`): the stream, the values of each head."""
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
        self,
        exclude: tuple[str, ...] = (),
        group_size: int | None = None,
        kv_cache: KVCache | None = None,
        mixed: Sequence[str] = (),
        scale_rule: Literal["least_squares", "range"] | None = None,
        rotate: Sequence[str] = (),
        activations: Activations | None = None,
    ) -> Recipe:
        """The recipe with more exclusions, another group size, key-value cache, precision or rule for scales, mixed precision, or rotated.

        Args:
            exclude: further patterns that stay in floating point.
            group_size: weights per scale, in every rule that has groups.
            kv_cache: overrides how keys and values are cached.
            mixed: `PATTERN=GRID` such as `layers.0.mlp.down=int8`, `embedding=int4:32` (in groups) or `head=float`: grids that replace
                the recipe's. The first that matches a layer decides, but floating point before all. Inputs are rounded as the
                recipe's last rule says. GPTQ rounds these layers where that rule has it, unless the pattern matches embedding or head.
            scale_rule: how scales are computed from weights, in every rule that does so.
            rotate: names in `TURNS`, besides what the recipe itself rotates; a rotated stream unties the head.
            activations: overrides the precision of the floats that are computed.

        Raises:
            RecipeError: a group size for a recipe without groups, or below 1; a scale rule for a recipe without computed scales; an
                entry of `mixed` that is malformed or never reached; a name in `rotate` that is not in `TURNS`.
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
        entries = _entries(mixed)
        exclude = (*exclude, *(pattern for pattern, grid in entries if grid is None))
        _check_reached(entries, self.exclude + exclude)
        rules = (*(self._rule(pattern, grid) for pattern, grid in entries if grid), *rules)
        if scale_rule is not None:
            if not any(rule.weights.is_computed for rule in rules):
                raise RecipeError(f"recipe {self.name} has no scales that rule {scale_rule} could choose: leave --scale-rule out")
            rules = tuple(
                replace(rule, weights=replace(rule.weights, scale_rule=scale_rule)) if rule.weights.is_computed else rule for rule in rules
            )
        kv_bits = self.kv_bits if kv_cache is None else KV_BITS[kv_cache]
        compute_bits = self.compute_bits if activations is None else COMPUTE_BITS[activations]
        changed = replace(self, rules=rules, exclude=self.exclude + exclude, kv_bits=kv_bits, compute_bits=compute_bits)
        return changed._rotated(rotate)

    def _rotated(self, rotate: Sequence[str]) -> Recipe:
        """The recipe with more rotations, in the order of `TURNS`."""
        wrong = [shown(turn) for turn in rotate if turn not in TURNS]
        if wrong:
            raise RecipeError(f"{', '.join(wrong)} cannot be rotated: choose of {', '.join(TURNS)}, or both with a comma between them")
        turns = tuple(turn for turn in TURNS if turn in (*self.rotate, *rotate))
        return replace(self, rotate=turns, untied=self.untied or "stream" in turns)

    def _rule(self, pattern: str, grid: WeightGrid) -> Rule:
        """A rule with another grid, otherwise like the recipe's last rule."""
        own = self.rules[-1] if self.rules else Rule((), grid)
        calibrated = own.rounding == "gptq" and grid.is_computed and not any(fnmatchcase(end, pattern) for end in ENDS)
        return replace(own, match=(pattern,), weights=grid, rounding="gptq" if calibrated else "nearest")

    @property
    def is_calibrated(self) -> bool:
        """Whether layers are rounded on a calibration text."""
        return any(rule.rounding == "gptq" for rule in self.rules)

    def to_nearest(self) -> Recipe:
        """The recipe without a calibration text: every layer rounded to nearest."""
        return replace(self, rules=tuple(replace(rule, rounding="nearest") for rule in self.rules))

    def calibrated(self) -> Recipe:
        """The recipe with GPTQ for all integers whose scales are computed from the weight."""
        rules = (replace(rule, rounding="gptq") if rule.weights.is_computed else rule for rule in self.rules)
        return replace(self, rules=tuple(rules))

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values, without the fields of `LATER` that say nothing, so that recipes from before stay the same."""
        values = cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(self))))
        return {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_json`.

        Raises:
            RecipeError: fields are missing, unknown or of the wrong kind.
        """
        try:
            recipe: Recipe = build(Recipe, {**LATER, **values}, "the recipe")
            json.dumps(values, ensure_ascii=False).encode()  # refuses half of a surrogate pair, which no manifest could contain
        except ValueError as error:
            raise RecipeError(f"{error}: quantize the model again") from None
        if any(rule.weights.group_size == 0 for rule in recipe.rules):
            raise RecipeError("the recipe has groups of 0 weights: quantize the model again")
        return recipe


def _entries(mixed: Sequence[str]) -> list[tuple[str, WeightGrid | None]]:
    """Pattern and grid of each `PATTERN=GRID`; a grid of None stands for floating point."""
    found = [_MIXED.fullmatch(entry) for entry in mixed]
    wrong = [shown(entry) for entry, match in zip(mixed, found, strict=True) if not match]
    if wrong:
        grids = f"float, {', '.join(GRIDS)}"
        raise RecipeError(
            listed(wrong, f"mixed precision is PATTERN=GRID, with a grid of {grids}, or integers in groups such as int4:32; these are not:")
        )
    return [(match[1], _grid(match)) for match in found if match]


def _grid(match: re.Match[str]) -> WeightGrid | None:
    _, plain, integers, group = match.groups()
    grid = GRIDS.get(plain or integers)
    return replace(grid, group_size=int(group)) if grid and group else grid


def _check_reached(entries: Sequence[tuple[str, WeightGrid | None]], floats: Sequence[str]) -> None:
    """Refuses entries that are never reached, since an earlier pattern or floating point decides for their layers."""
    taken, late = list(floats), []
    for pattern in (pattern for pattern, grid in entries if grid):
        plain = set("*?[").isdisjoint(pattern)
        late += [(pattern, other) for other in taken if pattern == other or (plain and fnmatchcase(pattern, other))][:1]
        taken.append(pattern)
    if late:
        told = [f"{shown_name(pattern)}: {shown_name(other)} decides for it" for pattern, other in late]
        raise RecipeError(
            listed(told, "in mixed precision the first pattern that matches decides, floating point before all; put these first or out:")
        )
