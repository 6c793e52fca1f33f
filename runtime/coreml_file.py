"""Reads a Core ML package: the functions of its program (MIL), and the arrays in its file of weights.

The form of weight.bin is that of coremltools 9.0 (`mlmodel/src/MILBlob/Blob/StorageFormat.hpp`): 64 bytes of header, and for each array a
record of 64 bytes (a mark, the type, bytes, where they begin, bits that fill the last byte), which the program points at.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lobit.errors import BundleError, shown
from lobit.runtime.bundle import Bundle
from lobit.runtime.coreml_executorch import mapped, taken_out
from lobit.runtime.coreml_ports import SPEC_FILE, WEIGHTS_FILE, WEIGHTS_PATH
from lobit.runtime.coreml_proto import messages

LARGEST_PROGRAM = 256 << 20
"""Bytes of a program's file that are read; 30 layers take 1 MB."""
LARGEST_PORT = 1 << 28
"""Entries that an input or a state may have: memory for it is taken whatever the file holds."""
LARGEST_VALUE, MOST_AXES = 1 << 31, 5
"""Entries and axes that a value of the program may have; Core ML takes no more axes."""
RECORD = struct.Struct("<IIQQQ")
MARK = 0xDEADBEEF
"""How a record in the file of weights begins."""
ALIGNMENT = 64
FLOATS = {"FLOAT16": np.float16, "FLOAT32": np.float32}
WHOLE: dict[str, Any] = {"INT32": np.int32, "BOOL": np.bool_, "INT8": np.int8, "UINT8": np.uint8}
SUB_BYTE = {"INT4": 4, "UINT4": 4, "UINT2": 2, "UINT1": 1}
"""Bits of the types that share bytes."""
BLOB_TYPES = {"FLOAT16": 1, "FLOAT32": 2, "UINT8": 3, "INT8": 4, "INT4": 8, "UINT1": 9, "UINT2": 10, "UINT4": 11, "INT32": 14}
"""Numbers of types in records (`MILBlob/Blob/BlobDataType.hpp`)."""
Array = NDArray[Any]


@dataclass(frozen=True)
class Type:
    """The type of a value."""

    dtype: str
    """Name in MIL, such as `FLOAT16`."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Constant:
    """A value that the program holds."""

    type: Type
    array: Array | str
    """Whole numbers of fewer than 8 bits are int8 or uint8."""
    key: tuple[str, int] | bytes
    """Where it lies in the file of weights, or its bytes."""


@dataclass(frozen=True)
class Operation:
    """One operation; inputs are names of values, or constants."""

    kind: str
    name: str
    inputs: dict[str, list[str | Constant]]
    outputs: list[tuple[str, Type]]


@dataclass(frozen=True)
class Function:
    """One function of a program."""

    name: str
    inputs: dict[str, Type]
    states: dict[str, Type]
    outputs: list[str]
    constants: dict[str, Constant]
    operations: list[Operation]
    """All that are not constants, in the order in which they run: each reads what was there before."""


class Package:
    """A package's functions.

    Args:
        spec: the bytes of the program (model.mlmodel).
        weights: those of the file of weights.

    Raises:
        BundleError: a file is damaged, or has what is not known here.
    """

    def __init__(self, spec: NDArray[np.uint8], weights: NDArray[np.uint8]) -> None:
        mil, model, _ = messages()
        self._read_bytes = 0
        self._names = {number: name for name, number in mil.DataType.items()}
        self.weights = weights
        self._arrays: dict[tuple[int, Type], Array] = {}
        if len(spec) > LARGEST_PROGRAM:
            raise _damaged(f"its program has {len(spec)} bytes, at most {LARGEST_PROGRAM} are read")
        read = model.Model()
        try:
            read.ParseFromString(spec.tobytes())
        except Exception as error:  # protobuf raises an exception of its own
            raise _damaged(f"its program is no Core ML model: {error}") from None
        self.functions = {name: self._function(name, function) for name, function in read.mlProgram.functions.items()}
        if not self.functions:
            raise _damaged("it has no program")

    def _function(self, name: str, message: Any) -> Function:
        block = message.block_specializations.get(message.opset)
        if block is None:
            raise _damaged(f"function {name} has no block for {shown(message.opset)}")
        inputs, states = dict[str, Type](), dict[str, Type]()
        for value in message.inputs:
            is_state = value.type.WhichOneof("type") == "stateType"
            (states if is_state else inputs)[value.name] = self._type(value.type.stateType.wrappedType if is_state else value.type)
        large = [port for port, kind in (inputs | states).items() if math.prod(kind.shape) > LARGEST_PORT]
        if large:
            raise _damaged(f"input or state {shown(large[0])} of {name} has more than {LARGEST_PORT} entries")
        found = Function(name, inputs, states, list(block.outputs), {}, [])
        known = {*inputs, *states}
        if len(known) < len(inputs) + len(states):
            raise _damaged(f"function {name} has an input and a state of one name")
        for message in block.operations:
            self._add(found, message, known)
        missing = [output for output in found.outputs if output not in known or output in states]
        if missing:
            raise _damaged(f"function {name} gives {shown(missing[0])}, which no operation in it makes")
        return found

    def _add(self, function: Function, message: Any, known: set[str]) -> None:
        """Adds one operation, whose inputs must be `known`: a program that reads what comes later has a circle."""
        outputs = [(value.name, self._type(value.type)) for value in message.outputs]
        twice = [name for name, _ in outputs if name in known]
        if twice or message.blocks:
            raise _damaged(f"operation {message.type} of {function.name} " + (f"makes {shown(twice[0])} again" if twice else "has blocks"))
        known.update(name for name, _ in outputs)
        if message.type == "const":
            if len(outputs) != 1 or "val" not in message.attributes:
                raise _damaged(f"a constant of {function.name} has no value")
            function.constants[outputs[0][0]] = self._constant(message.attributes["val"])
            return
        inputs = {part: [self._bound(function, each, known) for each in told.arguments] for part, told in message.inputs.items()}
        if (not outputs and message.type != "write_state") or not all(inputs.values()):
            raise _damaged(f"an operation {message.type} of {function.name} makes nothing, or has an input that is nothing")
        label = message.attributes["name"].immediateValue.tensor.strings.values if "name" in message.attributes else ()
        function.operations.append(Operation(message.type, label[0] if label else message.type, inputs, outputs))

    def _bound(self, function: Function, binding: Any, known: set[str]) -> str | Constant:
        if binding.WhichOneof("binding") == "value":
            return self._constant(binding.value)
        if binding.name not in known:
            raise _damaged(f"function {function.name} reads {shown(binding.name)} before anything makes it")
        name: str = binding.name
        return name

    def _type(self, message: Any) -> Type:
        if message.WhichOneof("type") != "tensorType":
            raise _damaged(f"a value is no tensor but a {message.WhichOneof('type')}")
        tensor = message.tensorType
        if tensor.rank > MOST_AXES or len(tensor.dimensions) != tensor.rank:
            raise _damaged(f"a value has {tensor.rank} axes")
        if any(size.WhichOneof("dimension") != "constant" for size in tensor.dimensions):
            raise _damaged("a value has no fixed shape")
        shape = tuple(int(size.constant.size) for size in tensor.dimensions)
        if min(shape, default=1) < 1 or math.prod(shape) > LARGEST_VALUE:
            raise _damaged(f"a value has the shape {shown(shape)}")
        return Type(self._names.get(tensor.dataType, "UNUSED_TYPE"), shape)

    def _constant(self, message: Any) -> Constant:
        kind = self._type(message.type)
        if message.WhichOneof("value") == "blobFileValue":
            offset, name = int(message.blobFileValue.offset), message.blobFileValue.fileName
            if name != WEIGHTS_PATH:
                raise _damaged(f"the program points at the file {shown(name)}")
            return Constant(kind, self._array(offset, kind), (name, offset))
        tensor = message.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if field is None:
            raise _damaged("a constant has no value")
        values = getattr(tensor, field).values
        if kind.dtype == "STRING":
            if field != "strings" or len(values) != 1:
                raise _damaged("a constant is not one text")
            return Constant(kind, values[0], values[0].encode())
        if field == "bytes":
            return Constant(kind, _decoded(np.frombuffer(values, np.uint8), kind), values)
        try:
            array = np.array(values, FLOATS.get(kind.dtype) or WHOLE.get(kind.dtype) or np.int32)
        except (ValueError, TypeError, OverflowError) as error:
            raise _damaged(f"a constant of type {kind.dtype} is {error}") from None
        if array.size != math.prod(kind.shape):
            raise _damaged(f"a constant has {array.size} entries instead of {math.prod(kind.shape)}")
        return Constant(kind, array.reshape(kind.shape), array.tobytes())

    def _array(self, offset: int, kind: Type) -> Array:
        """An array of the file of weights, by where its record begins."""
        if (offset, kind) not in self._arrays:
            self._arrays[offset, kind] = self._read(offset, kind)
        return self._arrays[offset, kind]

    def _read(self, offset: int, kind: Type) -> Array:
        if not 0 <= offset <= len(self.weights) - ALIGNMENT:
            raise _damaged(f"the program points at byte {offset} of weight.bin, which has {len(self.weights)}")
        mark, number, size, begin, _ = RECORD.unpack(self.weights[offset : offset + RECORD.size].tobytes())
        if mark != MARK or number != BLOB_TYPES.get(kind.dtype):
            raise _damaged(f"weight.bin has no record of an array of {kind.dtype} at byte {offset}")
        if begin + size > len(self.weights):
            raise _damaged(f"an array of weight.bin ends at byte {begin + size} of {len(self.weights)}")
        self._read_bytes += size
        if self._read_bytes > len(self.weights):  # export stores each array once
            raise _damaged("arrays of weight.bin have the same bytes")
        return _decoded(self.weights[begin : begin + size], kind)


def read_package(bundle: Bundle) -> Package:
    """The package of a bundle, whether in files of its own or inside of an ExecuTorch program.

    Raises:
        MissingPartError: coremltools or ExecuTorch is not installed.
        BundleError: a file is damaged.
    """
    if bundle.manifest.options.get("executorch"):
        files = taken_out(bundle.path("program"))
        missing = [name for name in (SPEC_FILE, WEIGHTS_FILE) if name not in files]
        if missing:
            raise _damaged(f"the program lacks {missing[0]}")
        return Package(files[SPEC_FILE], files[WEIGHTS_FILE])
    return Package(*(mapped(bundle.path(role)) for role in ("program", "weights")))


def _decoded(raw: NDArray[np.uint8], kind: Type) -> Array:
    """Bytes as an array of a type."""
    count = math.prod(kind.shape)
    bits = SUB_BYTE.get(kind.dtype)
    plain = FLOATS.get(kind.dtype) or WHOLE.get(kind.dtype)
    if (bits is None and plain is None) or len(raw) != -(-count * (bits or 8 * np.dtype(plain).itemsize) // 8):
        raise _damaged(f"an array of {count} {kind.dtype} has {len(raw)} bytes")
    if bits is None:
        return raw.view(plain).reshape(kind.shape)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = ((raw[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1)[:count].reshape(kind.shape)
    return (codes ^ np.uint8(8)).astype(np.int8) - np.int8(8) if kind.dtype == "INT4" else codes


def same_weights(functions: Sequence[Function]) -> bool:
    """Whether functions read the same weights, in the same order: arrays of the file of weights, and all parts of compressed ones."""

    def keys(function: Function) -> list[Any]:
        told = [(operation, each) for operation in function.operations for part in operation.inputs.values() for each in part]
        found = [(operation.kind, each if isinstance(each, Constant) else function.constants.get(each)) for operation, each in told]
        constants = [(kind, each) for kind, each in found if each is not None]
        return [
            (each.key, each.type)
            for kind, each in constants
            if kind.startswith("constexpr_") or (isinstance(each.key, tuple) and each.type.dtype != "INT32")
        ]

    return all(keys(function) == keys(functions[0]) for function in functions)


def _damaged(what: str) -> BundleError:
    return BundleError(f"the Core ML package is not as export wrote it ({what}): export it again")
