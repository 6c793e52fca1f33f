"""Weights as ExecuTorch programs for XNNPACK store them: integers of 4 or 8 bits, scales of three widths, floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lobit.export.size_groups import stored_as
from lobit.quant_recipes.apply import LayerPlan
from lobit.quant_recipes.recipe import Recipe, WeightGrid

BFLOAT16, FLOAT16, FLOAT32 = 2, 2, 4
"""Bytes of a scale, in this order: of a group; of an embedding; of an output channel or of an earlier quantization."""


@dataclass(frozen=True)
class Form:
    """How a layer's integers [out, in] are stored."""

    grid: WeightGrid
    """The program's grid: INT4 or INT8 in the recipe's groups; the integers' values do not change."""
    scales: int
    """Number of scales in a row."""
    scale_bytes: int


def form_of(grid: WeightGrid, inner: int, rows: bool = False) -> Form:
    """How the integers of a layer are stored.

    Rows of odd length are INT8: XNNPACK's INT4 products give wrong sums for them (google/XNNPACK issue 5935; so in ExecuTorch 1.5.1).

    Args:
        grid: the grid of its weights.
        inner: number of weights in a row.
        rows: whether it is an embedding, whose rows are looked up.
    """
    bits: Literal[4, 8] = 4 if grid.bits <= 4 and inner % 2 == 0 else 8
    if grid.scale_rule == "exact":
        width = FLOAT32
    elif rows:
        width = FLOAT16
    else:
        width = BFLOAT16 if grid.group_size else FLOAT32
    return Form(WeightGrid(bits, grid.group_size), inner // (grid.group_size or inner), width)


def layer_form(layer_plan: LayerPlan) -> Form | None:
    """How a layer is stored; None: as float32."""
    if layer_plan.rule is None:
        return None
    return form_of(layer_plan.rule.weights, layer_plan.shape[1], rows=layer_plan.name == "embedding")


def format_of(layer_plan: LayerPlan, recipe: Recipe) -> str:
    """Names a layer's grid in the recipe, and what the program has instead where that is different."""
    form = layer_form(layer_plan)
    if layer_plan.rule is None or form is None:
        return "half as float32" if recipe.float_bits == 16 else "float32"
    weights = stored_as(layer_plan.rule.weights, form.grid.bits)
    absmax = layer_plan.rule.activation_bits and layer_plan.rule.activation_rule == "absmax" and layer_plan.name != "embedding"
    return f"{weights}, inputs with zero point" if absmax else weights
