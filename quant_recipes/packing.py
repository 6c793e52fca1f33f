"""How integers lie in bytes: versioned layouts, the same on every platform.

Along a row, `group` integers share `size` bytes. Their codes c, which count from 0, are the digits of one number: the sum of
c[i] * base^i. Its lowest byte comes first. Each row begins at a byte; its last group is filled up with the integer 0 (bits-1: with 1),
and bytes past the last integer are left out.

| layout    | integers q     | code c      | group | size | base | bits a weight | means nothing |
|-----------|----------------|-------------|-------|------|------|---------------|---------------|
| bits-1    | -1, 1          | (q + 1) / 2 | 8     | 1    | 2    | 1             |               |
| crumbs-1  | -1, 0, 1       | q + 1       | 4     | 1    | 4    | 2             | code 3        |
| trits-1   | -1, 0, 1       | q + 1       | 5     | 1    | 3    | 1.6           | byte over 242 |
| threes-1  | -4, -3, ... 3  | q + 4       | 8     | 3    | 8    | 3             |               |
| nibbles-1 | -8, -7, ... 7  | q + 8       | 2     | 1    | 16   | 4             |               |
| sixes-1   | -32, ... 31    | q + 32      | 4     | 3    | 64   | 6             |               |

Integers of 8 bits stay int8.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from lobit.errors import ModelError

SLICE = 1 << 18
"""Integers that are packed at once: their temporaries stay in the processor's cache."""
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer types by their size in bytes."""


@dataclass(frozen=True)
class Layout(ABC):
    """One row of the module's table."""

    name: str
    group: int
    size: int
    base: int
    lowest: int
    highest: int
    step: int = 1
    """The distance from one integer to the next."""

    @property
    def bits_per_weight(self) -> float:
        """Bits that an integer takes in a full group."""
        return 8 * self.size / self.group

    def width(self, columns: int) -> int:
        """Bytes of a row of `columns` integers."""
        return -(-columns * self.size // self.group)

    def pack(self, integers: Tensor) -> Tensor:
        """Packs int8 [rows, columns] into uint8 [rows, width(columns)].

        Raises:
            ModelError: integers that the layout does not have.
        """
        rows, columns = integers.shape
        packed = torch.empty(rows, self.width(columns), dtype=torch.uint8, device=integers.device)
        wrong = 0
        for part in row_slices(rows, columns):
            given = integers[part]
            steps = torch.empty(len(given), self._groups(columns) * self.group, dtype=torch.int8, device=given.device)
            steps[:, columns:] = self.step - 1 - self.lowest
            torch.sub(given, self.lowest, out=steps[:, :columns])
            wrong += self._wrong(steps.view(torch.uint8))
            packed[part] = self.encode(steps.view(torch.uint8).flatten()).view(len(given), -1)[:, : packed.shape[1]]
        if wrong:
            raise ModelError(
                f"{wrong} of {integers.numel()} integers are not from {self.lowest} to {self.highest} in steps of {self.step}, "
                f"which {self.name} holds: take more bits"
            )
        return packed

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """The inverse of `pack`: int8 [rows, columns].

        Raises:
            ModelError: rows of another width, or codes that mean nothing.
        """
        rows, width = packed.shape
        if width != self.width(columns):
            raise ModelError(
                f"rows of {width} bytes are not {columns} integers in {self.name}, which takes {self.width(columns)}: "
                "quantize the model again"
            )
        integers = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
        missing, wrong = self._groups(columns) * self.size - width, 0
        for part in row_slices(rows, columns):
            given = F.pad(packed[part], (0, missing)) if missing else packed[part]
            steps = self.decode(given.flatten()).view(len(given), -1)
            wrong += self._wrong(steps)
            torch.add(steps.view(torch.int8)[:, :columns], self.lowest, out=integers[part])
        if wrong:
            raise ModelError(f"{wrong} codes of {integers.numel()} integers in {self.name} mean nothing: quantize the model again")
        return integers

    def _groups(self, columns: int) -> int:
        return -(-columns // self.group)

    def _wrong(self, steps: Tensor) -> int:
        """How many integers, given minus `lowest`, the layout does not have."""
        span = self.highest - self.lowest
        # Two maxima are checked first, since counting takes longer than packing. A meta tensor has no values to check.
        if steps.is_meta or (steps.max() <= span and (self.step == 1 or (steps & 1).max() == 0)):
            return 0
        return int(((steps > span) | (steps % self.step > 0)).sum())

    @abstractmethod
    def encode(self, steps: Tensor) -> Tensor:
        """The packed bytes, uint8 [n * size].

        Args:
            steps: the integers of whole groups minus `lowest`, uint8 [n * group]; may be overwritten.
        """

    @abstractmethod
    def decode(self, packed: Tensor) -> Tensor:
        """The inverse of `encode`."""


def row_slices(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows that are packed at once."""
    step = max(SLICE // max(columns, 1), 1)
    return (slice(start, start + step) for start in range(0, rows if columns else 0, step))


class FixedWidth(Layout):
    """Codes of a whole number of bits; a group is one machine word with a code in each byte."""

    @property
    def joins(self) -> list[tuple[torch.dtype, int, int]]:
        """How codes are joined in pairs into one number: the type of a pair, the bits of each half, the place value of the upper half."""
        return [(word, 4 * size, self.base ** (size // 2)) for size, word in WORDS.items() if size <= self.group]

    def encode(self, steps: Tensor) -> Tensor:
        if self.size == 1:
            # In a product with this factor, the word's highest byte is the sum of all codes times their place values.
            factor: int = sum(256 ** (self.group - 1 - i) * self.base**i for i in range(self.group)) // self.step
            return (steps.view(WORDS[self.group]) * factor >> 8 * (self.group - 1)).to(torch.uint8)
        words = steps
        for word, half, base in self.joins:
            words = words.view(word)
            words.sub_(words >> half, alpha=(1 << half) - base)
        numbers = words.view(torch.uint8)
        return torch.stack([numbers[i :: self.group] for i in range(self.size)], dim=1).flatten()

    def decode(self, packed: Tensor) -> Tensor:
        words = self._numbers(packed)
        for word, half, base in reversed(self.joins):
            words = words.view(word)
            words.add_(words >> base.bit_length() - 1, alpha=(1 << half) - base)
        codes = words.view(torch.uint8)
        return codes if self.step == 1 else codes * self.step

    def _numbers(self, packed: Tensor) -> Tensor:
        """The number of each group, in a word of its own."""
        if self.size == 1:
            return packed.to(WORDS[self.group])
        words = torch.zeros(len(packed) // self.size * self.group, dtype=torch.uint8, device=packed.device)
        for i in range(self.size):
            words[i :: self.group] = packed[i :: self.size]
        return words


class Trits(Layout):
    """Five ternary codes a byte: 3^5 = 243 <= 256."""

    def encode(self, steps: Tensor) -> Tensor:
        # Sums of 2, 4 and 5 codes are taken at every position: neighbours are added in vector registers, every fifth code would not be.
        pairs = torch.add(steps[:-1], steps[1:], alpha=3)
        fours = torch.add(pairs[:-2], pairs[2:], alpha=9)
        return torch.add(fours[:-1], steps[4:], alpha=81)[::5]

    def decode(self, packed: Tensor) -> Tensor:
        return torch.index_select(self._table.to(packed.device), 0, packed.int()).flatten()

    @cached_property
    def _table(self) -> Tensor:
        """The codes [256, 5] of every byte; a byte over 242 has 3 as its last code."""
        codes = torch.arange(256)[:, None] // 3 ** torch.arange(5)
        codes[:, :4] %= 3
        return codes.to(torch.uint8)


BITS = FixedWidth("bits-1", group=8, size=1, base=2, lowest=-1, highest=1, step=2)
CRUMBS = FixedWidth("crumbs-1", group=4, size=1, base=4, lowest=-1, highest=1)
TRITS = Trits("trits-1", group=5, size=1, base=3, lowest=-1, highest=1)
THREES = FixedWidth("threes-1", group=8, size=3, base=8, lowest=-4, highest=3)
NIBBLES = FixedWidth("nibbles-1", group=2, size=1, base=16, lowest=-8, highest=7)
SIXES = FixedWidth("sixes-1", group=4, size=3, base=64, lowest=-32, highest=31)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (BITS, CRUMBS, TRITS, THREES, NIBBLES, SIXES)}
_BY_BITS: dict[int, Layout | None] = {1: BITS, 2: TRITS, 3: THREES, 4: NIBBLES, 6: SIXES, 8: None}


def layout_of(bits: int) -> Layout | None:
    """The layout in which checkpoints store integers; None: they are stored as int8, unpacked.

    Args:
        bits: 1 for -1 and 1; 2 for -1, 0 and 1; 3, 4, 6 or 8 for [-2^(bits - 1), 2^(bits - 1) - 1].
    """
    return _BY_BITS[bits]


def pack_int4(integers: Tensor) -> Tensor:
    """Integers in [-8, 7], int8 [rows, columns], as uint8 [rows, ceil(columns / 2)]: `nibbles-1`."""
    return NIBBLES.pack(integers)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_int4`: int8 [rows, columns]."""
    return NIBBLES.unpack(packed, columns)
