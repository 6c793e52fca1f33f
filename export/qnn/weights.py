"""Weights as the HTP keeps them: integers of 2, 4 or 8 bits with a scale for every row, floats in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lobit.model import weight_of
from lobit.quant_recipes.apply import LayerPlan
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear
from lobit.quant_recipes.packing import layout_of
from lobit.quant_recipes.recipe import WeightGrid

HALF, SCALE_BYTES = 2, 4
"""Bytes of a half float, and of a scale."""

MULTIPLES: dict[int, int] = {2: 16, 4: 8, 8: 1}
"""What the number of inputs must be a multiple of, by the bits of the weights: otherwise the HTP computes something else, silently."""
WIDE, WIDE_MOST = 16, (1 << 15) - 1
"""Bits of the integers that floats become where a program has no floats, and the largest of them."""
SMALLEST_SCALE = 1e-20
"""Of a row of zeros."""


def stored_bits(grid: WeightGrid) -> Literal[2, 4, 8]:
    """Bits in which the HTP stores a grid's integers; their values do not change."""
    return 2 if grid.bits <= 2 else 4 if grid.bits <= 4 else 8


def padding(grid: WeightGrid, inner: int) -> int:
    """Zeros at the end of every row of `inner` weights, and of every input, so that the HTP computes the product right."""
    return -inner % MULTIPLES[stored_bits(grid)]


class HtpLinear(nn.Module):
    """A linear layer whose integers [out, in] have one scale [out] float32 for every row; rows are filled up with zeros.

    Args:
        linear: integers with a scale for every row or for several rows together; or floats, which become integers of 16 bits.
    """

    def __init__(self, linear: IntegerLinear | nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        if isinstance(linear, nn.Linear):
            weight = linear.weight.detach().float()
            self.bits, self.extra = WIDE, 0
            self.scale: Tensor = weight.abs().amax(1).clamp(min=SMALLEST_SCALE) / WIDE_MOST
            self.integers: Tensor = (weight / self.scale[:, None]).round().to(torch.int16)
            return
        rows, grid = len(linear.integers), linear.rule.weights
        self.bits, self.extra = stored_bits(grid), padding(grid, linear.integers.shape[1])
        self.integers = F.pad(linear.integers, (0, self.extra)) if self.extra else linear.integers
        self.scale = linear.scale.repeat_interleave(rows // len(linear.scale), 0).flatten()


def program_bytes(layer_plan: LayerPlan) -> int:
    """Bytes of a product's weights and scales in the compiled program."""
    (out, inner), rule = layer_plan.shape, layer_plan.rule
    if rule is None:
        return HALF * out * inner
    return out * (inner + padding(rule.weights, inner)) * stored_bits(rule.weights) // 8 + SCALE_BYTES * out


def table_bits(layer_plan: LayerPlan) -> Literal[4, 8, 16]:
    """Bits of an entry of the embedding in its file: integers as 4 or 8, floats as halves."""
    if layer_plan.rule is None:
        return 16
    return 4 if layer_plan.rule.weights.bits <= 4 and layer_plan.shape[1] % 2 == 0 else 8


def table_bytes(layer_plan: LayerPlan) -> int:
    """Bytes of the embedding and its scales in their file."""
    (out, inner), rule = layer_plan.shape, layer_plan.rule
    scales = SCALE_BYTES * out * (inner // (rule.weights.group_size or inner)) if rule else 0
    return out * inner * table_bits(layer_plan) // 8 + scales


def write_table(embedding: nn.Module, path: Path, bits: int) -> None:
    """Writes the embedding [vocabulary, hidden] as `manifest.Lookup` describes it."""
    if not isinstance(embedding, IntegerEmbedding):
        save_file({"weight": weight_of(embedding).detach().half().contiguous()}, path)
        return
    packed = layout_of(4)
    integers = packed.pack(embedding.integers) if bits == 4 and packed else embedding.integers
    save_file({"weight": integers.contiguous(), "scale": embedding.scale.float().contiguous()}, path)
