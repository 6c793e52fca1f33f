"""Layers that hold the integers and scales that ship."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lobit.quant_recipes.grid import choose_scale, dequantize, fake_quantize_tokens, quantize
from lobit.quant_recipes.recipe import Rule, WeightGrid

ROWS = 1024
"""Rows that are rounded at once: few enough that the temporary tensors stay in the processor's cache."""


def quantize_linear(weight: Tensor, grid: WeightGrid) -> tuple[Tensor, Tensor]:
    """Integers [out, in], int8, and scales [out, groups], float32, of a float weight."""
    integers, scales = torch.empty(weight.shape, dtype=torch.int8), []
    together = len(weight) // grid.shards if grid.shards else ROWS
    one = replace(grid, shards=1) if grid.shards else grid
    for start in range(0, len(weight), together):
        rows = weight[start : start + together].float()
        scales.append(choose_scale(rows, one))
        integers[start : start + together] = quantize(rows, scales[-1], one)
    return integers, torch.cat(scales)


class IntegerLinear(nn.Module):
    """A linear layer of integers [out, in] int8 and scales [out, groups] float32."""

    integers: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, integers: Tensor, scale: Tensor, bias: Tensor | None, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] that the integers stand for."""
        return dequantize(self.integers, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        x = fake_quantize_tokens(x, self.rule.activation_rule) if self.rule.activation_bits else x
        return F.linear(x, self.weight, self.bias)


class IntegerEmbedding(nn.Module):
    """An embedding of integers [vocabulary, hidden] int8 and scales [vocabulary, groups] float32."""

    integers: Tensor
    scale: Tensor

    def __init__(self, integers: Tensor, scale: Tensor, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        """The table [vocabulary, hidden] that the integers stand for."""
        return dequantize(self.integers, self.scale)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = dequantize(self.integers[tokens.flatten()], self.scale[tokens.flatten()])
        return rows.reshape(*tokens.shape, -1)
