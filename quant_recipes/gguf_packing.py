"""Ternary integers in GGUF's blocks: `TQ2_0`, 2.0625 bits a weight, and `TQ1_0`, 1.6875.

A block holds 256 weights of one row: segments of bytes, then the scale d as float16. In a segment of n bytes, byte m holds weights m,
m + n, m + 2n and so on: the sum v of their codes q + 1, each times its place value. TQ1_0 writes ceil(v * 256 / 243) instead of v, which
uses the whole range of a byte, so that multiplications alone read the codes back.

Source: ggml `src/ggml-common.h`, `block_tq1_0` and `block_tq2_0`; gguf-py `gguf/quants.py`, `TQ1_0` and `TQ2_0`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lobit.errors import ModelError, TargetError
from lobit.quant_recipes.packing import row_slices

BLOCK = 256
"""Weights in a block."""
SCALE_BYTES = 2
NOTHING = 3
"""Stands in place of each code of a byte that no weights encode to."""


@dataclass(frozen=True)
class BlockFormat:
    """One of GGUF's ternary block types."""

    name: str
    segments: tuple[tuple[int, int], ...]
    """Of each segment: weights per byte, and number of bytes."""
    places: tuple[int, ...]
    """The place values of the codes in a byte."""
    values: int
    """How many different sums a byte can encode; they are spread over its 256 values."""

    @property
    def size(self) -> int:
        """Bytes in a block."""
        return sum(count for _, count in self.segments) + SCALE_BYTES

    def pack(self, integers: Tensor, scale: Tensor) -> Tensor:
        """Blocks, uint8 [rows, columns / 256 * size].

        Args:
            integers: -1, 0, 1: int8 [rows, columns].
            scale: [rows, 1] or [rows, columns / 256].

        Raises:
            TargetError: rows are not whole blocks, integers are others than -1, 0, 1, or float16 does not hold a scale.
        """
        rows, columns = integers.shape
        self._check(columns, scale)
        blocks, wrong = torch.empty(rows, columns // BLOCK, self.size, dtype=torch.uint8), 0
        blocks[:, :, -SCALE_BYTES:] = scale.half().expand(blocks.shape[:2]).contiguous()[:, :, None].view(torch.uint8)
        for part in row_slices(rows, columns):
            codes = (integers[part] + 1).contiguous().view(torch.uint8).view(-1, columns // BLOCK, BLOCK)
            wrong += _count(codes)
            blocks[part, :, :-SCALE_BYTES] = self._encode(codes)
        if wrong:
            raise TargetError(f"{wrong} of {integers.numel()} integers are not -1, 0 or 1: {self.name} holds no others")
        return blocks.flatten(1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `pack`: int8 [rows, columns], and scales [rows, columns / 256], float32.

        Raises:
            ModelError: rows are not whole blocks, or there are bytes that no weights encode to.
        """
        rows, width = packed.shape
        if width % self.size:
            raise ModelError(f"rows of {width} bytes are not whole {self.name} blocks of {self.size}: export the model again")
        blocks = packed.reshape(rows, width // self.size, self.size)
        integers, wrong = torch.empty(rows, blocks.shape[1] * BLOCK, dtype=torch.int8), 0
        for part in row_slices(*integers.shape):
            codes = self._decode(blocks[part, :, :-SCALE_BYTES])
            wrong += _count(codes)
            integers[part] = codes.view(torch.int8).flatten(1) - 1
        if wrong:
            raise ModelError(f"{wrong} of {integers.numel()} weights in {self.name} have codes that mean nothing: export the model again")
        return integers, blocks[:, :, -SCALE_BYTES:].contiguous().view(torch.float16)[:, :, 0].float()

    def _check(self, columns: int, scale: Tensor) -> None:
        if columns % BLOCK:
            raise TargetError(f"rows of {columns} weights are not whole {self.name} blocks of {BLOCK}: keep this layer in another type")
        rounded = int((scale.half().float() != scale).sum())
        if rounded:
            raise TargetError(f"{rounded} of {scale.numel()} scales are not values of float16: round them before the integers are chosen")

    def _encode(self, codes: Tensor) -> Tensor:
        """Bytes [rows, blocks, size - 2] of codes [rows, blocks, 256]."""
        segments = codes.split([weights * count for weights, count in self.segments], dim=2)
        sums = [
            sum(plane * place for plane, place in zip(segment.chunk(weights, dim=2), self.places, strict=False))
            for segment, (weights, _) in zip(segments, self.segments, strict=True)
        ]
        joined = torch.cat(sums, dim=2)
        return torch.index_select(self._bytes, 0, joined.flatten().int()).view(joined.shape)

    def _decode(self, packed: Tensor) -> Tensor:
        """The inverse of `_encode`."""
        codes = torch.index_select(self._codes, 0, packed.flatten().int()).view(*packed.shape, -1)
        segments = codes.split([count for _, count in self.segments], dim=2)
        planes = [segment[..., :weights].transpose(2, 3).flatten(2) for segment, (weights, _) in zip(segments, self.segments, strict=True)]
        return torch.cat(planes, dim=2)

    @cached_property
    def _bytes(self) -> Tensor:
        """The byte that encodes each sum: [256], of which only the first `values` occur."""
        return ((torch.arange(256) * 256 + self.values - 1) // self.values).to(torch.uint8)

    @cached_property
    def _codes(self) -> Tensor:
        """The codes that each byte encodes: [256, codes per byte]."""
        codes = torch.cartesian_prod(*[torch.arange(3)] * len(self.places))
        table = torch.full((256, len(self.places)), NOTHING, dtype=torch.uint8)
        table[self._bytes[(codes * torch.tensor(self.places)).sum(1)].long()] = codes.to(torch.uint8)
        return table


def _count(codes: Tensor) -> int:
    """How many codes are none of 0, 1, 2. The maximum is taken first, as it is quicker than the count."""
    return int((codes > 2).sum()) if codes.max() > 2 else 0


TQ2_0 = BlockFormat("TQ2_0", segments=((4, 32), (4, 32)), places=(1, 4, 16, 64), values=256)
TQ1_0 = BlockFormat("TQ1_0", segments=((5, 32), (5, 16), (4, 4)), places=(81, 27, 9, 3, 1), values=243)
