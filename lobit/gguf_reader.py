"""GGUF files read with the package gguf, whose reader takes every length and count in a file for true."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderTensor
from numpy.typing import DTypeLike, NDArray

from lobit.errors import reason
from lobit.quiet import quiet_python

Parts = tuple[int, list[NDArray[Any]], list[int], list[GGUFValueType]]
"""Of a field: its bytes, its parts, which of these are its value, and its types."""


class GgufContents(NamedTuple):
    """What a file holds, by name."""

    fields: dict[str, Any]
    tensors: dict[str, ReaderTensor]


def read_gguf(path: Path) -> GgufContents:
    """A file's fields and tensors; tensors stay in the file until they are used.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with quiet_python():
            reader = BoundedReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return GgufContents(fields, {tensor.name: tensor for tensor in reader.tensors})
    except (ValueError, LookupError, TypeError, OverflowError, OSError, MemoryError, RecursionError) as error:
        raise ValueError(reason(error)) from None


class BoundedReader(GGUFReader):
    """The package's reader within the file: what it takes grows with the file, and not with the numbers in it."""

    def _get(
        self, offset: int, dtype: DTypeLike, count: int = 1, override_order: Literal["I", "S", "<"] | None = None
    ) -> NDArray[Any]:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise ValueError(f"something in it should end at byte {end}, and the file has {len(self.data)}")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Parts:
        """Arrays of numbers are read at once: entry by entry one of a million takes seconds."""
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        number = self.gguf_scalar_to_np.get(GGUFValueType(kind[0]))
        if number is None or not count[0]:
            return super()._get_field_parts(orig_offs, raw_type)
        values = self._get(orig_offs + 12, number, count[0])
        return 12 + values.nbytes, [kind, count, values], [2], [GGUFValueType.ARRAY, GGUFValueType(kind[0])]
