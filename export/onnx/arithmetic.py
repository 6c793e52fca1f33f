"""ONNX Runtime's arithmetic in plain PyTorch: inputs are rounded to INT8 in blocks where its products do so, all else is float32."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lobit.export.onnx.weights import FAST_BLOCK, form_of, rounds_inputs
from lobit.export.target import Spec
from lobit.model import Transformer, replace_layers, twin
from lobit.quant_recipes.integer import IntegerLinear
from lobit.quant_recipes.recipe import Recipe


def round_blocks(x: Tensor, block: int) -> Tensor:
    """x [..., n] with every `block` entries rounded to a grid of their own: s = max |x| / 127, no zero point.

    MatMulNBits rounds its inputs in this way at accuracy level 4 (ONNX Runtime, `QuantizeARow_CompInt8`).
    """
    blocks = F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    integers = (blocks * torch.where(scale > 0, 1 / scale, 0.0)).round_()
    rounded: Tensor = integers.mul_(scale).flatten(-2)[..., : x.shape[-1]]
    return rounded


class BlockInputs(nn.Module):
    """An integer linear layer whose inputs are rounded to INT8 in blocks; they stay floats where `block` is None."""

    def __init__(self, linear: IntegerLinear, block: int | None) -> None:
        super().__init__()
        self.linear, self.block = linear, block

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(round_blocks(x, self.block) if self.block else x, self.linear.weight, self.linear.bias)


def arithmetic(model: Transformer, spec: Spec) -> tuple[Transformer, Recipe]:
    """See `Target.arithmetic`."""
    recipe = replace(spec.recipe, kv_bits=None, compute_bits=32)
    if spec.portable:
        return model, recipe
    changed = twin(model)
    replace_layers(changed, IntegerLinear, _fused)
    return changed, recipe


def _fused(linear: IntegerLinear) -> nn.Module:
    """The layer as MatMulNBits computes it, which has no product of INT8 inputs with blocks below `FAST_BLOCK`."""
    block = form_of(linear.rule.weights, linear.integers.shape[1], rows=False, fused=True).block
    return BlockInputs(linear, block if block and block >= FAST_BLOCK and rounds_inputs(linear.rule) else None)
