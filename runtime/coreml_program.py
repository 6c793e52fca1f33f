"""Evaluates a Core ML package in NumPy: the program as it was saved, in float32, or rounded after every operation as a phone may do it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lobit.errors import BundleError
from lobit.runtime.coreml_file import Array, Constant, Function, Operation, Package, Type
from lobit.runtime.coreml_operators import MANY, OPERATORS, expand_blockwise, expand_table, expected_shape, region

EXPANDERS = {
    "constexpr_blockwise_shift_scale": (expand_blockwise, ("data", "scale")),
    "constexpr_lut_to_dense": (expand_table, ("indices", "lut")),
}
"""Operations that make a weight of compressed parts, and the names of these."""
KNOWN = {*OPERATORS, *EXPANDERS, "read_state", "write_state"}


def as_half(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values rounded to half precision; those beyond its largest become infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


class Evaluator:
    """A package's functions, run operation by operation.

    Args:
        package: the package.
        half: whether what every operation gives is rounded to half precision, where the program says that it is of half floats.

    Attributes:
        states: what each state holds.
        overflows: the largest value that an operation gave where half precision does not hold it, by the operation's name.

    Raises:
        BundleError: the program has an operation that is not known here.
    """

    def __init__(self, package: Package, half: bool = False) -> None:
        self.package, self.half = package, half
        self.states: dict[str, NDArray[np.float32]] = {}
        self.overflows: dict[str, float] = {}
        self._dense: dict[Any, Array] = {}
        self._fixed: dict[str, dict[str, Any]] = {}
        self._checked: set[int] = set()
        self._in_place = {id(operation) for function in package.functions.values() for operation in _updates(function)}
        for function in package.functions.values():
            unknown = sorted({operation.kind for operation in function.operations} - KNOWN)
            if unknown:
                told = ", ".join(unknown)
                raise BundleError(f"function {function.name} has operations that are not known here ({told}): export it again")

    def run(self, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs of a function; states change.

        Raises:
            BundleError: an operation cannot be computed, or gives another shape than the program says.
        """
        function = self.package.functions[name]
        values = dict(self._constants(function))
        for port, kind in function.inputs.items():
            if inputs[port].shape != kind.shape:
                raise BundleError(f"input {port} of {name} has the shape {inputs[port].shape} instead of {kind.shape}: export it again")
            values[port] = self._cast(inputs[port], kind)
        for state, kind in function.states.items():
            if state not in self.states:
                self.states[state] = np.zeros(kind.shape, np.float32)
            held = self.states[state]
            if held.shape != kind.shape:
                raise BundleError(f"state {state} of {name} has the shape {kind.shape}, in another function {held.shape}: export it again")
        # An unknown number may come of what is not used, such as rows of tokens that are none.
        with np.errstate(all="ignore"):
            for operation in function.operations:
                if operation.kind not in EXPANDERS:
                    self._step(operation, values)
        return {output: values[output] for output in function.outputs}

    def _constants(self, function: Function) -> dict[str, Any]:
        """The function's constants and expanded weights by name, made when it first runs."""
        if function.name not in self._fixed:
            found = {name: self._value(constant) for name, constant in function.constants.items()}
            for operation in function.operations:
                if operation.kind in EXPANDERS:
                    (name, _), *_ = operation.outputs
                    found[name] = self._expanded(operation, function)
            self._fixed[function.name] = found
        return self._fixed[function.name]

    def _value(self, constant: Constant) -> Any:
        """A constant as operators take it; arrays of the file of weights are shared by all functions."""
        if isinstance(constant.array, str) or not isinstance(constant.key, tuple):
            return constant.array if isinstance(constant.array, str) else self._cast(constant.array, constant.type)
        key = constant.key, constant.type
        if key not in self._dense:
            self._dense[key] = self._cast(constant.array, constant.type)
        return self._dense[key]

    def _expanded(self, operation: Operation, function: Function) -> Array:
        """A compressed weight as floats, made once for all functions that have the same parts."""
        expand, names = EXPANDERS[operation.kind]
        try:
            bound = [operation.inputs[name] for name in names]
            parts = [function.constants[each] if isinstance(each, str) else each for (each,) in bound]
            key = tuple((part.key, part.type) for part in parts)
            if key not in self._dense:
                arrays: list[Any] = [part.array for part in parts]
                self._dense[key] = expand(*arrays)
            ((_, kind),) = operation.outputs
        except Exception as error:  # whatever is wrong with the parts of an edited program
            raise self._failed(operation, error) from None
        if self._dense[key].shape != kind.shape:
            raise self._failed(operation, f"shape {self._dense[key].shape} instead of {kind.shape}")
        return self._dense[key]

    def _step(self, operation: Operation, values: dict[str, Any]) -> None:
        """Runs one operation."""
        try:
            results = self._computed(operation, self._inputs(operation, values))
            told = list(zip(operation.outputs, results, strict=True))
        except Exception as error:  # whatever is wrong with the inputs of an edited program
            raise self._failed(operation, error) from None
        for (name, kind), result in told:
            if result.shape != kind.shape:
                raise self._failed(operation, f"shape {result.shape} instead of {kind.shape}")
            values[name] = result if id(operation) in self._in_place else self._cast(result, kind)
            if self.half and kind.dtype == "FLOAT16" and id(operation) not in self._in_place:
                values[name] = self._rounded(name, values[name])

    def _inputs(self, operation: Operation, values: dict[str, Any]) -> dict[str, Any]:
        """An operation's inputs: values, but the name of a state."""
        inputs: dict[str, Any] = {}
        for part, bound in operation.inputs.items():
            if operation.kind in ("read_state", "write_state") and part == "input":
                inputs[part] = bound[0]
                continue
            found = [values[each] if isinstance(each, str) else self._value(each) for each in bound]
            inputs[part] = found if MANY.get(operation.kind) == part else found[0]
        return inputs

    def _computed(self, operation: Operation, inputs: dict[str, Any]) -> list[Array]:
        match operation.kind:
            case "read_state":
                return [self.states[inputs["input"]]]
            case "write_state":
                held, data = self.states[inputs["input"]], inputs["data"]
                if held.shape != data.shape:
                    raise ValueError(f"shape {data.shape} for a state of {held.shape}")
                if data is not held:
                    self.states[inputs["input"]] = as_half(data)
                return []
            case "slice_update" if id(operation) in self._in_place:
                inputs["x"][region(inputs["begin"], inputs["end"])] = as_half(inputs["update"])
                return [inputs["x"]]
        if id(operation) not in self._checked:  # shapes are the same in every call
            shape, kind = expected_shape(operation.kind, inputs), operation.outputs[0][1]
            if shape is not None and shape != kind.shape:
                raise ValueError(f"shape {shape} instead of {kind.shape}")
            self._checked.add(id(operation))
        result = OPERATORS[operation.kind](**inputs)
        return list(result) if isinstance(result, list) else [np.asarray(result)]

    def _rounded(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        halves = as_half(values)
        if not np.isfinite(halves).all() and np.isfinite(values).all():
            self.overflows[name] = max(self.overflows.get(name, 0.0), float(np.abs(values).max()))
        return halves

    def _cast(self, array: Array, kind: Type) -> Array:
        """An array in the type that this evaluation has for a type of the program: float32 for all floats."""
        return array.astype(np.float32, copy=False) if kind.dtype.startswith("FLOAT") else array

    def _failed(self, operation: Operation, why: object) -> BundleError:
        return BundleError(f"operation {operation.name} ({operation.kind}) of the package cannot be computed ({why}): export it again")


def _updates(function: Function) -> list[Operation]:
    """The operations that change a part of what a state holds, which then is written to the state and not used otherwise.

    They are run in the state's own memory: a state has thousands of rows, of which a call changes a few.
    """
    bound = [each for operation in function.operations for part in operation.inputs.values() for each in part]
    uses = Counter(each for each in bound if isinstance(each, str))
    made = {name: operation for operation in function.operations for name, _ in operation.outputs}
    writes = (operation.inputs for operation in function.operations if operation.kind == "write_state")
    pairs = ((inputs.get("data") or [""], inputs.get("input") or [""]) for inputs in writes)
    written = {data: state for (data, *_), (state, *_) in pairs if isinstance(data, str)}
    found = []
    for operation in function.operations:
        if operation.kind != "slice_update":
            continue
        (name, _), (source, *_) = operation.outputs[0], operation.inputs.get("x") or [""]
        read = made.get(source) if isinstance(source, str) else None
        if read is None or read.kind != "read_state" or name in function.outputs:
            continue
        if uses[name] == uses[read.outputs[0][0]] == 1 and [written.get(name)] == read.inputs.get("input"):
            found.append(operation)
    return found
