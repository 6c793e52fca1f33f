"""Weights as an artifact or a checkpoint stores them, for `verify` and for whatever else reads them back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lobit.runtime.bundle import Bundle
from lobit.runtime.engine import target_module


@dataclass(frozen=True)
class StoredLayer:
    """Weights of a layer as an artifact or a checkpoint stores them."""

    name: str
    """The layer's name in the checkpoint; for an artifact, where in the program the layer is."""
    values: NDArray[Any]
    """Integers int8 [out, in], or float32 where the layer is not quantized; for a norm or a bias float32 [out]."""
    scale: NDArray[np.float32] | None
    """Scales [out, groups]; None where the layer is not quantized."""


class StoredProgram(Protocol):
    """A program taken apart. Products that the program joins into one, and their biases, are one layer with the rows of all."""

    def layers(self) -> Iterator[StoredLayer]:
        """Its embedding and linear layers in the order of execution."""

    def vectors(self) -> Iterator[StoredLayer]:
        """Its norms and biases in the order of execution."""


class ProgramReader(Protocol):
    """What a target's runtime module has besides `open_engine`."""

    def read_program(self, bundle: Bundle) -> StoredProgram:
        """Returns a bundle's program, taken apart."""


def read_program(bundle: Bundle) -> StoredProgram:
    """A bundle's program, taken apart by its target's module."""
    module: ProgramReader = target_module(bundle)
    return module.read_program(bundle)
