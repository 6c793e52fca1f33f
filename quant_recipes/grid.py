"""Scales, zero points and integers: pure functions on tensors, used alike by training, conversion and the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from lobit.quant_recipes.recipe import WeightGrid

SMALLEST_SCALE = 2.0**-14
"""float16's smallest normal number."""
LARGEST_SCALE = 65280.0
"""The largest bfloat16 that float16 holds too."""


def round_scale(scale: Tensor) -> Tensor:
    """The nearest value that bfloat16 and float16 both hold exactly: 8 significant bits, in float16's normal range.

    XNNPACK keeps blockwise scales as bfloat16, Core ML and GGUF as float16, and both round silently.
    """
    return scale.to(torch.bfloat16).float().clamp(SMALLEST_SCALE, LARGEST_SCALE)


def grouped(weight: Tensor, grid: WeightGrid) -> Tensor:
    """weight [out, in] as [out, groups, weights per group]."""
    return weight.reshape(weight.shape[0], -1, grid.group_size or weight.shape[1])


def choose_scale(weight: Tensor, grid: WeightGrid) -> Tensor:
    """Scales [out, groups] of weight [out, in]: max(-w_min, w_max) / 7.5 at 4 bits [MobileLLM-Pro eq. 4], rounded once."""
    return round_scale(grouped(weight, grid).abs().amax(dim=2) / ((grid.q_max - grid.q_min) / 2))


def quantize(weight: Tensor, scale: Tensor, grid: WeightGrid) -> Tensor:
    """Integers [out, in], int8: clip(round(w / s), q_min, q_max) [MobileLLM-Pro eq. 4], halves to even."""
    ratio = grouped(weight, grid) / scale[:, :, None]
    return ratio.round().clamp(grid.q_min, grid.q_max).to(torch.int8).reshape(weight.shape)


def dequantize(integers: Tensor, scale: Tensor) -> Tensor:
    """Weights [out, in], float32, of integers [out, in] and scales [out, groups]: exact, as both have few bits."""
    groups = integers.reshape(integers.shape[0], scale.shape[1], -1)
    return (groups.float() * scale[:, :, None]).reshape(integers.shape)


def token_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point [..., 1] of each token's INT8 grid over the last axis.

    s = (max - min) / 255 [MobileLLM-Pro eq. 3]. Runtimes hold an integer zero point in [-128, 127], so the range is widened
    to include 0 and eq. 3's offset z = min becomes the nearest multiple of s (XNNPACK `src/xnnpack/quantization.h`).
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    from_low, from_high = -128 - low / scale, 127 - high / scale
    zero_point = torch.where((-128 + low / scale) + (127 + high / scale) > 0, from_low, from_high)
    return scale, zero_point.clamp(-128, 127).round()


def fake_quantize_tokens(x: Tensor) -> Tensor:
    """x [..., n] rounded to each token's INT8 grid, with straight-through gradients."""
    scale, zero_point = token_range(x.detach().float())
    rounded = ((x * (1 / scale) + zero_point).round().clamp(-128, 127) - zero_point) * scale
    return x + (rounded - x).detach() if x.requires_grad else rounded
