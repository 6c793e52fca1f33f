"""How integers lie in bytes. Layout `nibbles-1`: two INT4 a byte, q + 8, the even element in the low half."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(integers: Tensor) -> Tensor:
    """Integers in [-8, 7], int8 [rows, columns], as uint8 [rows, ceil(columns / 2)]; an odd row ends in a 0."""
    if integers.shape[1] % 2:
        integers = torch.nn.functional.pad(integers, (0, 1))
    codes = (integers + 8).to(torch.uint8)
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_int4`: int8 [rows, columns]."""
    codes = torch.stack((packed & 15, packed >> 4), dim=2).reshape(packed.shape[0], -1)
    return codes[:, :columns].to(torch.int8) - 8
