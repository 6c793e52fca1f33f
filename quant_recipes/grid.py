"""Scales, zero points and integers: pure functions on tensors, which training, conversion and the reference share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lobit.quant_recipes.recipe import WeightGrid

SMALLEST_SCALE = 2.0**-14
"""float16's smallest normal number."""
LARGEST_SCALE = 65280.0
"""The largest bfloat16 that float16 holds too."""
ABSMEAN_EPS = 1e-5
"""Added to the mean of absolute weights [Spectra Table 1]."""
SHARES = [step / 40 for step in range(16, 45)]
"""Shares of the largest weight, 0.4 to 1.1: the ranges that a search of scales tries. Some exceed 1, since eq. 4 clips half a step."""
LEAST_OF_ROW = 0.85
"""The smallest share that is tried where a whole row has one scale. The least squared error would clip its largest weights, which matter
more than their share of that error: KL of SmolLM2 per channel 2.6 with all shares, 1.39 with these, 1.48 by eq. 4."""
TERNARY_THRESHOLD = 0.7
"""Weights below this share of their row's mean absolute weight become 0 [Ternary Weight Networks, Li et al. 2016, eq. 6]."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, whose gradient is passed on to `exact` unchanged [Bengio et al. 2013]."""
    return _StraightThrough.apply(exact, rounded)  # type: ignore[no-untyped-call, no-any-return]


def round_scale(scale: Tensor) -> Tensor:
    """The nearest value that bfloat16 and float16 both hold exactly: 8 significant bits, in float16's normal range.

    XNNPACK keeps blockwise scales as bfloat16, Core ML and GGUF as float16, and both round silently.
    """
    return scale.to(torch.bfloat16).float().clamp(SMALLEST_SCALE, LARGEST_SCALE)


def grouped(weight: Tensor, grid: WeightGrid) -> Tensor:
    """weight [out, in] as [out, groups, weights per group]."""
    return weight.reshape(weight.shape[0], -1, grid.group_size or weight.shape[1])


def shard_mean(weight: Tensor, grid: WeightGrid) -> Tensor:
    """The mean of each shard of weight [out, in], repeated for every row of the shard: [out, 1]."""
    shards = grid.shards or weight.shape[0]
    return weight.reshape(shards, -1).mean(1).repeat_interleave(weight.shape[0] // shards)[:, None]


def range_scale(largest: Tensor, grid: WeightGrid) -> Tensor:
    """Scales of grids whose largest weight is `largest`: s = largest / 7.5 at 4 bits [MobileLLM-Pro eq. 4]."""
    return round_scale(largest / ((grid.q_max - grid.q_min) / 2))


def row_norm_scale(magnitude: Tensor, integers: Tensor) -> Tensor:
    """Scales [out, 1] of rows of integers [out, in] whose norm is to be `magnitude` [out, 1] [Bonsai eq. 1, the norm folded in]."""
    return round_scale(magnitude / integers.float().norm(dim=1, keepdim=True).clamp(min=1))


def shares_of(grid: WeightGrid) -> list[float]:
    """The `SHARES` that are tried for a grid."""
    return SHARES if grid.group_size else [share for share in SHARES if share >= LEAST_OF_ROW]


def best_range(weight: Tensor, grid: WeightGrid, importance: Tensor | None = None) -> Tensor:
    """The one of `shares_of` the grid with which each group is rounded with the least squared error, [out, groups].

    Args:
        weight: [out, in].
        grid: the grid to round to.
        importance: [in], a factor on each input's squared errors: the inputs' mean squares on a calibration text; None: all count alike.
    """
    groups = grouped(weight, grid)
    factors = None if importance is None else grouped(importance[None], grid)
    largest = groups.abs().amax(dim=2)
    least, best = torch.full_like(largest, torch.inf), torch.ones_like(largest)
    for share in shares_of(grid):
        scale = range_scale(largest * share, grid)
        error = grouped(rounded(weight, scale, grid), grid).sub_(groups).square_()
        total = (error if factors is None else error.mul_(factors)).sum(2)
        best = torch.where(total < least, share, best)
        least = torch.minimum(least, total)
    return best


def least_squares_scale(weight: Tensor, grid: WeightGrid, importance: Tensor | None = None) -> Tensor:
    """Scales [out, groups] that round weight [out, in] with the least squared error; the arguments are those of `best_range`."""
    return range_scale(grouped(weight, grid).abs().amax(dim=2) * best_range(weight, grid, importance), grid)


def choose_scale(weight: Tensor, grid: WeightGrid) -> Tensor:
    """Scales [out, groups] of weight [out, in] by the grid's rule, rounded once; for learned ranges, those that training begins with."""
    match grid.scale_rule:
        case "least_squares" | "learned":
            return least_squares_scale(weight, grid)
        case "absmean":
            return round_scale(ABSMEAN_EPS + shard_mean(weight.abs(), grid))
        case "row_norm":
            return row_norm_scale(weight.norm(dim=1, keepdim=True), ternary_sign(weight))
    return range_scale(grouped(weight, grid).abs().amax(dim=2), grid)


def ternary_sign(weight: Tensor) -> Tensor:
    """-1, 0, 1 [out, in]: the sign of each weight that is not small in its row [Ternary Weight Networks, eq. 3]."""
    return weight.sign() * (weight.abs() > TERNARY_THRESHOLD * weight.abs().mean(1, keepdim=True))


def quantize_float(weight: Tensor, scale: Tensor, grid: WeightGrid) -> Tensor:
    """The integers of `quantize`, as floats."""
    if grid.bits == 1:
        return torch.where(weight < shard_mean(weight, grid), -1.0, 1.0)
    if grid.scale_rule == "row_norm":
        return ternary_sign(weight)
    ratio = grouped(weight, grid) / scale[:, :, None]
    return ratio.round_().clamp_(grid.q_min, grid.q_max).reshape(weight.shape)


def rounded(weight: Tensor, scale: Tensor, grid: WeightGrid) -> Tensor:
    """The weight [out, in] that its integers and scales stand for."""
    return grouped(quantize_float(weight, scale, grid), grid).mul_(scale[:, :, None]).reshape(weight.shape)


def quantize(weight: Tensor, scale: Tensor, grid: WeightGrid) -> Tensor:
    """Integers [out, in], int8, of a float weight [out, in].

    clip(round(w / s), q_min, q_max), halves to even [MobileLLM-Pro eq. 4; BitNet b1.58 eq. 1]; binary: the sign of w - mean w
    [Spectra Table 1]; rows with a magnitude, whose weight is no trained latent yet: `ternary_sign` [Bonsai section 2.1].
    """
    return quantize_float(weight, scale, grid).to(torch.int8)


def dequantize(integers: Tensor, scale: Tensor) -> Tensor:
    """Weights [out, in], float32, of integers [out, in] and scales [out, groups]: exact, as both have few bits."""
    groups = integers.reshape(integers.shape[0], scale.shape[1], -1)
    return (groups.float() * scale[:, :, None]).reshape(integers.shape)


def token_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point [..., 1] of each token's INT8 grid over the last axis.

    s = (max - min) / 255 [MobileLLM-Pro eq. 3]. Runtimes keep an integer zero point in [-128, 127], so the range is widened
    to include 0 and eq. 3's offset z = min becomes the nearest multiple of s (XNNPACK `src/xnnpack/quantization.h`).
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    from_low, from_high = -128 - low / scale, 127 - high / scale
    zero_point = torch.where((-128 + low / scale) + (127 + high / scale) > 0, from_low, from_high)
    return scale, zero_point.clamp(-128, 127).round()


def token_absmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point 0 [..., 1] of each token: s = max |x| / 127 [BitNet b1.58 section 2: scaled to [-Q, Q] per token]."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).eps)
    return scale, torch.zeros_like(scale)


TOKEN_GRIDS = {"range": token_range, "absmax": token_absmax}


def quantize_tokens(x: Tensor, rule: str = "range") -> tuple[Tensor, Tensor, Tensor]:
    """The integers of x [..., n] on each token's grid, as floats, with scale and zero point [..., 1].

    Args:
        x: float32.
        rule: a name in `TOKEN_GRIDS`.
    """
    scale, zero_point = TOKEN_GRIDS[rule](x)
    return (x * (1 / scale)).add_(zero_point).round_().clamp_(-128, 127), scale, zero_point


def fake_quantize_tokens(x: Tensor, rule: str = "range") -> Tensor:
    """x [..., n] rounded to each token's INT8 grid, with straight-through gradients."""
    integers, scale, zero_point = quantize_tokens(x.detach().float(), rule)
    rounded = integers.sub_(zero_point).mul_(scale)
    return straight_through(x, rounded) if x.requires_grad else rounded
