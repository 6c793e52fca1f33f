"""The weights of a Core ML package, read back from its files for `verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lobit.errors import BundleError
from lobit.runtime.bundle import Bundle
from lobit.runtime.coreml_file import Constant, Function, Operation, Package, read_package, same_weights
from lobit.runtime.coreml_ports import NO_BIAS
from lobit.runtime.stored import StoredLayer

TABLES = {2: (-1, 1), 4: (-1, 0, 1, 0)}
"""Integers that the codes of a table stand for, by the number of its values."""


class StoredPackage:
    """A package's weights in the order of execution, as all of its functions read them.

    Args:
        package: the package.

    Raises:
        BundleError: its functions do not read the same weights.
    """

    def __init__(self, package: Package) -> None:
        functions = list(package.functions.values())
        if not same_weights(functions):
            raise BundleError(f"functions {', '.join(package.functions)} of the package read different weights: export it again")
        self.function: Function = functions[0]
        self._makers = {name: operation for operation in self.function.operations for name, _ in operation.outputs}

    def layers(self) -> Iterator[StoredLayer]:
        """See `StoredProgram.layers`: the embedding is the one weight that rows are gathered from, the others are multiplied."""
        return self._each({"gather": "x", "linear": "weight"}, self._weight)

    def vectors(self) -> Iterator[StoredLayer]:
        """See `StoredProgram.vectors`: norms are multiplied entry by entry."""
        return self._each({"mul": "y", "linear": "bias"}, self._vector)

    def _each(self, parts: Mapping[str, str], read: Callable[[Operation, str], StoredLayer | None]) -> Iterator[StoredLayer]:
        """What is read of one input of all operations of some kinds.

        Raises:
            BundleError: an operation is not as export writes it.
        """
        for operation in self.function.operations:
            if operation.kind in parts:
                try:
                    found = read(operation, parts[operation.kind])
                except (KeyError, ValueError, IndexError, TypeError) as error:
                    raise BundleError(f"operation {operation.name} of the package cannot be read ({error}): export it again") from None
                if found is not None:
                    yield found

    def _vector(self, operation: Operation, part: str) -> StoredLayer | None:
        """A norm or a bias; None: neither. Core ML's products have a bias always, zeros of this name where the model has none."""
        (bound,) = operation.inputs[part]
        constant = self._constant(operation, part)
        none = isinstance(bound, str) and NO_BIAS in bound and constant is not None and not constant.array.any()
        return None if constant is None or constant.array.ndim != 1 or none else StoredLayer(operation.name, constant.array, None)

    def _weight(self, operation: Operation, part: str) -> StoredLayer | None:
        """The weight [out, in] that an operation reads; None: what it reads is computed, or a table of angles."""
        (name,) = operation.inputs[part]
        maker = self._makers.get(name) if isinstance(name, str) else None
        if maker is not None and maker.kind == "constexpr_blockwise_shift_scale":
            data, scale = (self._array(maker, each) for each in ("data", "scale"))
            return StoredLayer(operation.name, data, np.repeat(scale, len(data) // len(scale), axis=0))
        if maker is not None and maker.kind == "constexpr_lut_to_dense":
            return _from_table(operation.name, self._array(maker, "indices"), self._array(maker, "lut"))
        constant = self._constant(operation, part)
        if constant is None or (operation.kind == "gather" and str(name).startswith(("cos", "sin"))):
            return None
        return StoredLayer(operation.name, constant.array, None)

    def _array(self, operation: Operation, part: str) -> NDArray[Any]:
        """An input of an operation that is a constant; scales are float32."""
        constant = self._constant(operation, part)
        if constant is None:
            raise BundleError(f"weight {operation.name} of the package has no {part}: export it again")
        array: NDArray[Any] = constant.array
        return array.astype(np.float32) if array.dtype.kind == "f" else array

    def _constant(self, operation: Operation, part: str) -> Any:
        (bound,) = operation.inputs.get(part) or [""]
        found = bound if isinstance(bound, Constant) else self.function.constants.get(bound)
        return None if found is None or isinstance(found.array, str) else found


def _from_table(name: str, codes: NDArray[np.uint8], table: NDArray[np.float32]) -> StoredLayer:
    """Integers and scales of codes [out, in] with a table [a, b, values, 1]; a table of other values gives scales that are no numbers."""
    integers, values = TABLES[table.shape[2]], table[..., 0]
    scale = values[..., integers.index(1)]
    exact = (values == scale[..., None] * np.array(integers, np.float32)).all(axis=-1)
    whole = np.where(exact, scale, np.float32(np.nan))
    # A code without a meaning of its own is shown as an integer that no grid has.
    meaning = np.array([integer if integers.index(integer) == code else 127 for code, integer in enumerate(integers)], np.int8)
    return StoredLayer(name, meaning[codes], np.repeat(whole, len(codes) // len(whole), axis=0))


def read_program(bundle: Bundle) -> StoredPackage:
    """A bundle's package, to be compared with a checkpoint.

    Raises:
        BundleError: the package is damaged.
    """
    return StoredPackage(read_package(bundle))
