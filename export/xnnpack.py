"""Target `xnnpack`: an ExecuTorch program for the CPU, its products on the XNNPACK delegate."""

from __future__ import annotations

from typing import cast

import executorch.kernels.quantized  # noqa: F401 (registers the out variants of quantized_decomposed)
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear
from lobit.quant_recipes.packing import pack_int4


class DelegatedLinear(nn.Module):
    """An integer linear layer in the operators that XNNPACK's partitioner takes for one product."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None

    def __init__(self, linear: IntegerLinear) -> None:
        super().__init__()
        grid = linear.rule.weights
        self.grid, self.activation_bits = grid, linear.rule.activation_bits
        scale = linear.scale if grid.group_size else linear.scale[:, 0]
        self.register_buffer("integers", linear.integers)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(scale.shape, dtype=torch.int64))
        self.register_buffer("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        ops, grid = torch.ops.quantized_decomposed, self.grid
        if self.activation_bits:
            scale, zero_point = ops.choose_qparams_per_token_asymmetric.default(x, torch.int8)
            integers = ops.quantize_per_token.default(x, scale, zero_point, -128, 127, torch.int8)
            x = ops.dequantize_per_token.default(integers, scale, zero_point, -128, 127, torch.int8, torch.float32)
        if grid.group_size:
            weight = ops.dequantize_per_channel_group.default(
                self.integers, self.scale, self.zero_point, grid.q_min, grid.q_max, torch.int8, grid.group_size, torch.float32
            )
        else:
            weight = ops.dequantize_per_channel.default(
                self.integers, self.scale, self.zero_point, 0, grid.q_min, grid.q_max, torch.int8
            )
        return F.linear(x, cast(Tensor, weight), self.bias)


class PackedEmbedding(nn.Module):
    """An integer embedding in ExecuTorch's `embedding_4bit` (the even element in the high half) or `embedding_byte`."""

    packed: Tensor
    scale: Tensor

    def __init__(self, embedding: IntegerEmbedding) -> None:
        super().__init__()
        self.grid = embedding.rule.weights
        integers = embedding.integers
        if self.grid.bits == 4:
            packed = pack_int4(integers)
            self.register_buffer("packed", (packed << 4) | (packed >> 4))
        else:
            self.register_buffer("packed", integers)
        self.register_buffer("scale", embedding.scale)

    def forward(self, tokens: Tensor) -> Tensor:
        ops = torch.ops.quantized_decomposed
        op = ops.embedding_4bit.default if self.grid.bits == 4 else ops.embedding_byte.default
        return cast(Tensor, op(self.packed, self.scale, None, self.grid.q_min, self.grid.q_max, tokens))
