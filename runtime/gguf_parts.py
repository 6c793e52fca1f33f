"""Integers, scales and floats read back out of a GGUF file with the package `gguf`, in the order of execution."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lobit.errors import BundleError, MissingPartError, shown
from lobit.runtime.bundle import Bundle
from lobit.runtime.gguf_ports import EMBEDDING, HEAD, LINEARS, NORM, PAIRED, QK_NORMS, TURNED, VECTORS, WEIGHTLESS
from lobit.runtime.stored import StoredLayer

SCALES = {"Q4_0": slice(0, 2), "Q8_0": slice(0, 2), "TQ1_0": slice(-2, None), "TQ2_0": slice(-2, None)}
"""Where each type of block has its scale."""
FLOATS = ("F32", "F16")
ONE = np.frombuffer(np.float16(1).tobytes(), np.uint8)
"""The bytes of the scale with which a block's values are its integers."""
VERSION = 3
"""The version of the file's layout."""


class GgufFile:
    """A GGUF file taken apart without running anything.

    Args:
        path: the file.

    Raises:
        MissingPartError: gguf is not installed.
        BundleError: the file is damaged, or of another version.
    """

    def __init__(self, path: Path) -> None:
        try:
            from lobit.gguf_reader import read_gguf
        except ImportError as error:
            raise MissingPartError(f"reading a GGUF file needs gguf ({error}): pip install 'lobit[gguf]'") from None
        self.path = path
        try:
            self.fields, self.tensors = read_gguf(path)
        except ValueError as error:
            raise self._damaged(str(error)) from None
        self.architecture = self.fields.get("general.architecture")
        sizes = (self.fields.get(f"{self.architecture}.{name}") for name in ("block_count", "attention.key_length"))
        self.layer_count, self.head_dim = (size if isinstance(size, int) else 0 for size in sizes)
        version = self.fields.get("GGUF.version")
        if version != VERSION or not self.layer_count or not self.head_dim:
            raise self._damaged(f"version {shown(version)}, architecture {shown(self.architecture)}, where {VERSION} is read, and sizes")

    def _damaged(self, why: str) -> BundleError:
        return BundleError(f"{self.path} cannot be taken apart ({why}): export it again")

    def layers(self) -> Iterator[StoredLayer]:
        """The embedding and the products in the order of execution."""
        names = [f"blk.{layer}.{part}.weight" for layer in self._numbers() for part in LINEARS]
        tied = HEAD not in self.tensors
        yield from (self.layer(name) for name in (EMBEDDING, *names, EMBEDDING if tied else HEAD) if name in self.tensors)

    def vectors(self) -> Iterator[StoredLayer]:
        """Norms and biases in the order of execution; norms that stand for none are left out."""
        for name in (*(f"blk.{layer}.{part}" for layer in self._numbers() for part in VECTORS), NORM):
            if name not in self.tensors:
                continue
            stored = self.layer(name)
            if name.endswith(QK_NORMS) and self.fields.get(WEIGHTLESS):
                if not (stored.values == 1).all():
                    raise self._damaged(f"{name} is not all ones, and the model has norms without weights")
                continue
            yield stored

    def _numbers(self) -> range:
        return range(min(self.layer_count, len(self.tensors)))

    def layer(self, name: str) -> StoredLayer:
        """A tensor: integers int8 and the scale of each block, or floats as float32; rows in lobit's order.

        Raises:
            BundleError: its type is none that lobit writes.
        """
        tensor = self.tensors[name]
        kind, data = tensor.tensor_type.name, tensor.data
        if kind in FLOATS:
            return StoredLayer(name, self._ordered(name, np.asarray(data, np.float32)), None)
        if kind not in SCALES or data.ndim != 2 or not data.size:
            raise self._damaged(f"{name} is of type {kind}, with {data.size} bytes in {data.ndim} axes")
        from gguf import GGML_QUANT_SIZES
        from gguf.quants import dequantize

        _, size = GGML_QUANT_SIZES[tensor.tensor_type]
        blocks = np.array(data).reshape(len(data), -1, size)
        scales = blocks[:, :, SCALES[kind]].copy().view(np.float16)[:, :, 0].astype(np.float32)
        blocks[:, :, SCALES[kind]] = ONE
        integers = dequantize(blocks.reshape(data.shape), tensor.tensor_type).astype(np.int8)
        return StoredLayer(name, self._ordered(name, integers), self._ordered(name, scales))

    def _ordered(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        """Rows as lobit has them: of each head the even rows first, where the architecture turns neighbours."""
        if self.architecture not in PAIRED or not re.sub(r"^blk\.\d+\.", "", name).startswith(TURNED) or name.endswith(QK_NORMS):
            return values
        if len(values) % self.head_dim or self.head_dim % 2:
            raise self._damaged(f"{name} has {len(values)} rows, which are no heads of {self.head_dim}")
        heads = values.reshape(-1, self.head_dim // 2, 2, *values.shape[1:])
        return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)


def read_program(bundle: Bundle) -> GgufFile:
    """The bundle's file taken apart (`verify.ProgramReader`)."""
    return GgufFile(bundle.path("program"))
