"""Layers in operators that XNNPACK's partitioner recognizes as one of its own, or that keep a graph on the delegate in one piece."""

from __future__ import annotations

from typing import cast

import executorch.exir.passes._quant_patterns_and_replacements
import executorch.kernels.quantized  # noqa: F401 (both register operators of quantized_decomposed)
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lobit.export.xnnpack.weights import form_of
from lobit.model import RMSNorm
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear
from lobit.quant_recipes.packing import pack_int4
from lobit.rope import RotateHalf


class DelegatedLinear(nn.Module):
    """An integer linear layer in operators that XNNPACK's partitioner recognizes as one product."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None

    def __init__(self, linear: IntegerLinear) -> None:
        super().__init__()
        grid = form_of(linear.rule.weights, linear.integers.shape[1]).grid
        self.grid, self.activation_bits = grid, linear.rule.activation_bits
        scale = linear.scale if grid.group_size else linear.scale[:, 0]
        self.register_buffer("integers", linear.integers)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(scale.shape, dtype=torch.int64))
        self.register_buffer("bias", linear.bias)

    def extra_repr(self) -> str:
        """The grid and the bits of activations."""
        return f"{self.grid}, {self.activation_bits}"

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


class SharedHead(nn.Module):
    """A head whose bytes in the file are those of an INT4 embedding.

    ExecuTorch's `embedding_4bit` has the even element of a pair in the high half of a byte, XNNPACK's products have it in the
    low half. So XNNPACK reads the same bytes as a head with the elements of each pair exchanged, and the input's are exchanged too.
    """

    swap: Tensor

    def __init__(self, head: IntegerLinear) -> None:
        super().__init__()
        pairs = head.integers.unflatten(1, (-1, 2)).flip(2).flatten(1)
        self.linear = DelegatedLinear(IntegerLinear(pairs, head.scale, head.bias, head.rule))
        self.register_buffer("swap", torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.bmm(x.reshape(1, -1, 2), self.swap).reshape(x.shape))  # type: ignore[no-any-return]


class DelegatedNorm(nn.Module):
    """RMSNorm whose mean of squares is a product with a row of 1 / n, with eps as the bias.

    XNNPACK takes no mean over the last axis of a 3-dimensional tensor; outside of the delegate, each norm would cut it in two.
    """

    row: Tensor
    eps: Tensor

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.register_buffer("row", torch.full((1, norm.size), 1 / norm.size))
        self.register_buffer("eps", torch.tensor([norm.eps]))

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(F.linear(x * x, self.row, self.eps))
        return y if self.weight is None else y * self.weight


class DelegatedTurn(nn.Module):
    """A quarter turn of every rotary pair as a product with a matrix of 0, 1 and -1.

    XNNPACK cannot slice a tensor whose length is not fixed.
    """

    matrix: Tensor

    def __init__(self, turn: RotateHalf, width: int) -> None:
        super().__init__()
        self.register_buffer("matrix", turn(torch.eye(width))[None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.reshape(1, -1, x.shape[-1]), self.matrix).reshape(x.shape)


class PackedEmbedding(nn.Module):
    """An integer embedding for ExecuTorch's operator `embedding_4bit` (the even element in the high half) or `embedding_byte`."""

    packed: Tensor
    scale: Tensor

    def __init__(self, embedding: IntegerEmbedding) -> None:
        super().__init__()
        integers, grid = embedding.integers, embedding.rule.weights
        self.grid = form_of(grid, integers.shape[1], rows=True).grid
        if self.grid.bits == 4:
            packed = pack_int4(integers)
            self.register_buffer("packed", (packed << 4) | (packed >> 4))
        else:
            self.register_buffer("packed", integers)
        # The scales that a recipe chooses are values that float16 holds exactly.
        self.register_buffer("scale", embedding.scale if grid.scale_rule == "exact" else embedding.scale.half())

    def look_up(self, tokens: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        """Rows [.., D] of the table."""
        ops, grid = torch.ops.quantized_decomposed, self.grid
        op = ops.embedding_4bit.dtype if grid.bits == 4 else ops.embedding_byte.dtype
        return cast(Tensor, op(packed, scale, None, grid.q_min, grid.q_max, tokens, dtype=torch.float32))
