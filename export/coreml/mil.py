"""Functions of a Core ML program (MIL), written operation by operation as its protobuf messages.

The form is the one that coremltools 9.0 writes (`converters/mil/backend/mil/load.py`): constants are operations of their own, compressed
weights carry their data themselves, and arrays of ten entries and more lie in the file of weights.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lobit.errors import TargetError
from lobit.export.builder import Scoped
from lobit.export.stages import Count
from lobit.runtime.coreml_ports import WEIGHTS_PATH
from lobit.runtime.coreml_proto import blob_writer, messages

MIL, MODEL, FEATURES = messages()
OPSET, SPECIFICATION = "CoreML8", 9
"""Names of the operators and of the file format of iOS 18 and macOS 15."""
SMALLEST_BLOB = 10
"""Entries from which on an array lies in the file of weights."""
ALIGNMENT = 64
"""Bytes at whose multiples the records of arrays and the arrays begin; also the size of a record and of the file's header."""
BITS = {"fp16": 16, "fp32": 32, "int32": 32, "int8": 8, "int4": 4, "uint2": 2, "uint1": 1}
"""Bits of an entry in the file of weights."""
TYPES = {
    "fp16": MIL.FLOAT16,
    "fp32": MIL.FLOAT32,
    "int32": MIL.INT32,
    "bool": MIL.BOOL,
    "string": MIL.STRING,
    "int8": MIL.INT8,
    "int4": MIL.INT4,
    "uint2": MIL.UINT2,
    "uint1": MIL.UINT1,
}
FIELDS = {"fp32": "floats", "int32": "ints", "bool": "bools", "string": "strings"}
"""Where an immediate value lies; the others are bytes."""
ARRAYS: dict[str, Any] = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32}
Constant = str | bool | int | list[int] | NDArray[Any]


@dataclass(frozen=True)
class Value:
    """A tensor of a function by its name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class Blobs:
    """The arrays of all functions that lie in the file of weights, each once."""

    arrays: list[tuple[NDArray[Any] | Tensor, str]] = field(default_factory=list)
    """Arrays with their types."""
    offsets: list[int] = field(default_factory=list)
    """Where each one's record begins."""
    end: int = ALIGNMENT
    """Bytes of the file so far: a header, then for each array a record and its bytes."""
    _known: dict[tuple[Any, str], int] = field(default_factory=dict)

    def add(self, key: Any, array: NDArray[Any] | Tensor, dtype: str) -> Any:
        """A message that stands for an array; arrays with the same key are stored once."""
        if (key, dtype) not in self._known:
            self._known[key, dtype] = len(self.arrays)
            self.arrays.append((array, dtype))
            self.offsets.append(self.end)
            size = -(-math.prod(array.shape) * BITS[dtype] // 8)
            self.end += ALIGNMENT + -(-size // ALIGNMENT) * ALIGNMENT
        value = MIL.Value(type=_tensor_type(dtype, tuple(array.shape)))
        value.blobFileValue.fileName, value.blobFileValue.offset = WEIGHTS_PATH, self.offsets[self._known[key, dtype]]
        return value

    def write(self, path: Path, count: Count) -> None:
        """Writes the file.

        Raises:
            TargetError: coremltools lays the file out in another way than it does here.
        """
        writer = blob_writer(path)
        for index, ((array, dtype), offset) in enumerate(zip(self.arrays, self.offsets, strict=True)):
            flat = np.ascontiguousarray(array.detach().numpy() if isinstance(array, Tensor) else array).reshape(-1)
            if (found := _write(writer, flat, dtype)) != offset:
                raise TargetError(f"coremltools puts array {index} at byte {found}, not at {offset}: install the version that lobit pins")
            count(offset, self.end)


def _write(writer: Any, flat: NDArray[Any], dtype: str) -> int:
    """Writes one array [n], and returns where it begins."""
    match dtype:
        case "fp16":
            return int(writer.write_fp16_data(flat.astype(np.float16, copy=False).view(np.uint16)))
        case "fp32":
            return int(writer.write_float_data(flat.astype(np.float32, copy=False)))
        case "uint2":  # ternary: -1, 0, 1 as 0, 1, 2
            return int(writer.write_uint2_data((flat + 1).astype(np.uint8)))
        case "uint1":  # binary: -1, 1 as 0, 1
            return int(writer.write_uint1_data((flat > 0).astype(np.uint8)))
    return int(getattr(writer, f"write_{dtype}_data")(flat))


def _tensor_type(dtype: str, shape: Sequence[int]) -> Any:
    kind = MIL.ValueType()
    kind.tensorType.dataType, kind.tensorType.rank = TYPES[dtype], len(shape)
    for size in shape:
        kind.tensorType.dimensions.add().constant.size = size
    return kind


def _state_type(shape: Sequence[int]) -> Any:
    kind = MIL.ValueType()
    kind.stateType.wrappedType.CopyFrom(_tensor_type("fp16", shape))
    return kind


def immediate(value: NDArray[Any] | str, dtype: str) -> Any:
    """A message with the value itself."""
    shape = () if isinstance(value, str) else value.shape
    message = MIL.Value(type=_tensor_type(dtype, shape))
    tensor = message.immediateValue.tensor
    if dtype in FIELDS:
        told = getattr(tensor, FIELDS[dtype]).values
        told.extend([value] if isinstance(value, str) else value.reshape(-1).tolist())
    else:
        assert not isinstance(value, str)
        tensor.bytes.values = value.tobytes()
    return message


class Function(Scoped):
    """One function under construction.

    Args:
        blobs: the arrays of all functions.
        floats: the type of the floats that are computed: `fp16` or `fp32`.
    """

    def __init__(self, blobs: Blobs, floats: str) -> None:
        super().__init__()
        self.blobs, self.floats = blobs, floats
        self.inputs: list[Value] = []
        self.states: list[Value] = []
        self.outputs: list[Value] = []
        self.operations: list[Any] = []
        self.counts: Counter[str] = Counter()
        self._names: Counter[str] = Counter()
        self._constants: dict[tuple[Any, ...], Value] = {}

    def input(self, name: str, dtype: str, *shape: int) -> Value:
        """Declares an input."""
        self.inputs.append(Value(name, shape, dtype))
        return self.inputs[-1]

    def state(self, name: str, *shape: int) -> Value:
        """Declares a state, which is of half floats."""
        self.states.append(Value(name, shape, "fp16"))
        return self.states[-1]

    def output(self, value: Value, name: str) -> None:
        """Makes a value an output, under a name of its own."""
        operation = self._operation("identity", name, {"x": value})
        self._result(operation, name, value.shape, value.dtype)
        self.outputs.append(Value(name, value.shape, value.dtype))

    def op(self, kind: str, inputs: Mapping[str, Any], *shapes: Sequence[int], dtype: str | None = None) -> list[Value]:
        """Adds an operation with a result of each shape, floats unless `dtype` says otherwise.

        Values and sequences of values among the inputs are taken as they are; all else becomes a constant.
        """
        name = self._name(kind)
        operation = self._operation(kind, name, inputs)
        names = [name] if len(shapes) == 1 else [f"{name}_{index}" for index in range(len(shapes))]
        return [self._result(operation, each, shape, dtype or self.floats) for each, shape in zip(names, shapes, strict=True)]

    def write_state(self, state: Value, value: Value) -> None:
        """Replaces what a state holds."""
        self._operation("write_state", self._name("write_state"), {"input": state, "data": value})

    def weight(self, name: str, array: Tensor, key: str | None = None) -> Value:
        """A constant of floats in the file of weights, stored once for each key; None: for each tensor."""
        key = str(id(array)) if key is None else key
        if ("weight", key) not in self._constants:
            value = self.blobs.add(key, array, self.floats)
            self._constants["weight", key] = self._constant(self._name(name), value, tuple(array.shape), self.floats)
        return self._constants["weight", key]

    def compressed(self, kind: str, name: str, key: Any, shape: Sequence[int], data: Mapping[str, Any]) -> Value:
        """A weight that is stored in fewer bits and expanded by Core ML (`constexpr_…`); `data` has the messages of its parts."""
        if (kind, key) not in self._constants:
            name = self._name(name)
            operation = self._operation(kind, name, {})
            for part, value in data.items():
                operation.inputs[part].arguments.add().value.CopyFrom(value)
            self._constants[kind, key] = self._result(operation, name, shape, self.floats)
        return self._constants[kind, key]

    def constant(self, value: Constant, hint: str = "const") -> Value:
        """A constant; equal ones are one operation."""
        array, dtype = _typed(value, self.floats)
        key = (dtype, array if isinstance(array, str) else (array.shape, array.tobytes()))
        if key not in self._constants:
            shape = () if isinstance(array, str) else array.shape
            large = not isinstance(array, str) and array.size >= SMALLEST_BLOB and dtype in ARRAYS
            message = self.blobs.add(key, array, dtype) if large and not isinstance(array, str) else immediate(array, dtype)
            self._constants[key] = self._constant(self._name(hint), message, shape, dtype)
        return self._constants[key]

    def message(self) -> Any:
        """The function as Core ML has it."""
        function = MIL.Function(opset=OPSET)
        for value in self.inputs:
            function.inputs.add(name=value.name, type=_tensor_type(value.dtype, value.shape))
        for value in self.states:
            function.inputs.add(name=value.name, type=_state_type(value.shape))
        block = function.block_specializations[OPSET]
        block.outputs.extend(value.name for value in self.outputs)
        block.operations.extend(self.operations)
        return function

    def _constant(self, name: str, message: Any, shape: tuple[int, ...], dtype: str) -> Value:
        operation = MIL.Operation(type="const")
        operation.attributes["name"].CopyFrom(immediate(name, "string"))
        operation.attributes["val"].CopyFrom(message)
        self.operations.append(operation)
        return self._result(operation, name, shape, dtype)

    def _operation(self, kind: str, name: str, inputs: Mapping[str, Any]) -> Any:
        bound = {part: self._bound(value, f"{kind}_{part}") for part, value in inputs.items()}
        operation = MIL.Operation(type=kind)
        operation.attributes["name"].CopyFrom(immediate(name, "string"))
        for part, values in bound.items():
            for value in values:
                operation.inputs[part].arguments.add(name=value.name)
        self.operations.append(operation)
        self.counts[kind] += 1
        return operation

    def _bound(self, value: Any, hint: str) -> Sequence[Value]:
        if isinstance(value, Value):
            return [value]
        if isinstance(value, Sequence) and value and isinstance(value[0], Value):
            return value
        return [self.constant(value, hint)]

    def _result(self, operation: Any, name: str, shape: Sequence[int], dtype: str) -> Value:
        operation.outputs.add(name=name, type=_tensor_type(dtype, shape))
        return Value(name, tuple(shape), dtype)

    def _name(self, kind: str) -> str:
        """A name of its own, made of the characters that identifiers may have."""
        path = re.sub(r"\W", "_", self.path(kind, "_"))
        self._names[path] += 1
        return path if self._names[path] == 1 else f"{path}_{self._names[path]}"


def _typed(value: Constant, floats: str) -> tuple[NDArray[Any] | str, str]:
    """A constant as an array, or as a text, and its type in the program."""
    if isinstance(value, str):
        return value, "string"
    if isinstance(value, bool):
        return np.array(value), "bool"
    if isinstance(value, int | list) or value.dtype == np.int32:
        return np.array(value, np.int32), "int32"
    return np.array(value, ARRAYS[floats]), floats
