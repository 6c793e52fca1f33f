"""How a weight in training becomes the one that ships: what is learned besides it, and how gradients reach both.

Each quantizer takes the weight and what is learned as arguments, so that a product can do the rounding again in its backward pass
instead of keeping a rounded copy of every weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lobit.quant_recipes.grid import (
    best_range,
    choose_scale,
    grouped,
    quantize,
    range_scale,
    round_scale,
    rounded,
    row_norm_scale,
    straight_through,
    ternary_sign,
)
from lobit.quant_recipes.integer import ROWS
from lobit.quant_recipes.recipe import WeightGrid

INSIDE = 0.25
"""How far from its integer a weight may begin, in steps of the grid. Nearer to a half, the first few updates undo what calibration found:
on SmolLM2 from 0.49 the loss rose from 0.27 to 0.36 in 20 steps."""


def best_shares(weight: Tensor, grid: WeightGrid) -> Tensor:
    """`grid.best_range` [out, groups] of a weight [out, in], some rows at a time: all at once would take five times its memory."""
    return torch.cat([best_range(rows.float(), grid) for rows in weight.detach().split(ROWS)])


class Quantizer(nn.Module):
    """Scales computed from the weight on every call; its gradient goes straight through [Spectra Table 1, backward pass]."""

    def __init__(self, weight: Tensor, grid: WeightGrid) -> None:
        super().__init__()
        self.grid = grid

    @staticmethod
    def start(weight: Tensor) -> Tensor:
        """What is trained in the place of the float weight [out, in]."""
        return weight

    def learned(self) -> list[Tensor]:
        """The tensors besides the weight that decide the integers, each with a row for every output channel; most are learned."""
        return list(self.parameters())

    def forward(self, weight: Tensor, *learned: Tensor) -> Tensor:
        """The weight [out, in] that ships."""
        detached = weight.detach()
        return straight_through(weight, rounded(detached, choose_scale(detached, self.grid), self.grid))

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Integers [out, in], int8, and scales [out, groups] that ship."""
        scale = choose_scale(weight, self.grid)
        return quantize(weight, scale, self.grid), scale


class Searched(Quantizer):
    """Scales from a share of each group's largest weight: the share that rounded the group with the least squared error at the start.

    So training begins with the integers of rounding to nearest, and the scales follow the weights [MobileLLM-Pro eq. 4] without a
    search in every step.
    """

    share: Tensor

    def __init__(self, weight: Tensor, grid: WeightGrid) -> None:
        super().__init__(weight, grid)
        self.register_buffer("share", best_shares(weight, grid))

    def learned(self) -> list[Tensor]:
        """The shares [out, groups], which no gradient reaches."""
        return [self.share]

    def begin_at(self, weight: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
        """Returns the weight nearest to `weight` that lies within `INSIDE` of given integers, and sets the shares to give the scales.

        Args:
            weight: [out, in], float.
            integers: [out, in].
            scale: [out, groups].
        """
        codes, steps = grouped(integers, self.grid).float(), scale[:, :, None]
        low = torch.where(codes > self.grid.q_min, codes - INSIDE, -torch.inf) * steps
        high = torch.where(codes < self.grid.q_max, codes + INSIDE, torch.inf) * steps
        begun = grouped(weight, self.grid).clamp(low, high)
        largest = begun.abs().amax(dim=2).clamp(min=torch.finfo(torch.float32).tiny)
        self.share.copy_(scale * ((self.grid.q_max - self.grid.q_min) / 2) / largest)
        return begun.reshape(weight.shape)

    def scale(self, weight: Tensor, share: Tensor) -> Tensor:
        """Scales [out, groups] of a weight [out, in] with the shares [out, groups]."""
        return range_scale(grouped(weight, self.grid).abs().amax(dim=2) * share, self.grid)

    def forward(self, weight: Tensor, *learned: Tensor) -> Tensor:
        """The weight [out, in] that ships."""
        detached = weight.detach()
        return straight_through(weight, rounded(detached, self.scale(detached, *learned), self.grid))

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Integers [out, in], int8, and scales [out, groups] that ship."""
        scale = self.scale(weight, self.share)
        return quantize(weight, scale, self.grid), scale


class _Clipped(torch.autograd.Function):
    """round(clip(w / s)) s with the gradients of Learned Step Size Quantization (Esser et al. 2020, eq. 3 and 5, section 2.2)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, grid: WeightGrid) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.grid = grid
        return rounded(weight, scale, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (weight, scale), grid = ctx.saved_tensors, ctx.grid
        gradient, ratio = grouped(gradients[0], grid), grouped(weight, grid) / scale[:, :, None]
        inside = (ratio > grid.q_min) & (ratio < grid.q_max)
        step = torch.where(inside, ratio.round() - ratio, ratio.clamp(grid.q_min, grid.q_max))
        balance = 1 / math.sqrt(ratio.shape[2] * grid.q_max)
        return (gradient * inside).reshape(weight.shape), (gradient * step).sum(2) * balance, None


class LearnedRange(Quantizer):
    """Scales from the w_min and w_max of every group, which are learned [MobileLLM-Pro section 7.1, Table 15].

    They begin at the weight's own, both times the share that rounds with the least error: outliers cost a whole channel its resolution.
    """

    def __init__(self, weight: Tensor, grid: WeightGrid) -> None:
        super().__init__(weight, grid)
        (low, high), share = torch.aminmax(grouped(weight.detach().float(), grid), dim=2), best_shares(weight, grid)
        self.low, self.high = nn.Parameter(low * share), nn.Parameter(high * share)

    def forward(self, weight: Tensor, *learned: Tensor) -> Tensor:
        """The weight [out, in] that ships."""
        low, high = learned
        largest = torch.maximum(-low, high)
        exact = largest / ((self.grid.q_max - self.grid.q_min) / 2)
        scale = straight_through(exact, range_scale(largest.detach(), self.grid))
        return _Clipped.apply(weight, scale, self.grid)  # type: ignore[no-untyped-call, no-any-return]

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Integers [out, in], int8, and scales [out, groups] that ship."""
        scale = range_scale(torch.maximum(-self.low, self.high).detach(), self.grid)
        return quantize(weight, scale, self.grid), scale


class RowNorm(Quantizer):
    """A latent ternary matrix T, and a learned magnitude v for every row: w = v Q(T) / ||Q(T)||, by rows [Bonsai eq. 1 and 2]."""

    def __init__(self, weight: Tensor, grid: WeightGrid) -> None:
        super().__init__(weight, grid)
        self.magnitude = nn.Parameter(weight.detach().float().norm(dim=1, keepdim=True))

    @staticmethod
    def start(weight: Tensor) -> Tensor:
        """T: the signs of the weights that are not small [Bonsai section 2.1]."""
        return ternary_sign(weight)

    def forward(self, weight: Tensor, *learned: Tensor) -> Tensor:
        """The weight [out, in] that ships."""
        (magnitude,) = learned
        clamped = weight.clamp(-1, 1)
        integers = straight_through(clamped, clamped.detach().round())
        norm = integers.square().sum(1, keepdim=True).clamp(min=1).sqrt()
        exact = magnitude.abs() / norm
        return integers * straight_through(exact, round_scale(exact.detach()))

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Integers [out, in], int8, and scales [out, 1] that ship."""
        integers = weight.clamp(-1, 1).round().to(torch.int8)
        return integers, row_norm_scale(self.magnitude.detach().abs(), integers)


def quantizer_for(weight: Tensor, grid: WeightGrid) -> Quantizer:
    """The quantizer of the grid's rule for a float weight [out, in]."""
    kinds: dict[str, type[Quantizer]] = {"least_squares": Searched, "learned": LearnedRange, "row_norm": RowNorm}
    return kinds.get(grid.scale_rule, Quantizer)(weight, grid)
