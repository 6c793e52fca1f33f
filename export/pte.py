"""Writes ExecuTorch's file format without holding its data in memory (executorch/exir/_serialize/_program.py).

A file is a header, the program as a flatbuffer, and segments: the constants of its tensors, its delegates' graphs, and the named
data of those. Where named data equals a constant, as for a head that is the embedding, its segment is where the constant lies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from executorch.exir import schema
from executorch.exir._serialize._flatbuffer_program import _program_to_flatbuffer
from executorch.exir._serialize._program import _ExtendedHeader, _insert_flatbuffer_header
from executorch.exir._serialize.padding import aligned_size
from executorch.exir.scalar_type import ScalarType
from executorch.exir.version import EXECUTORCH_SCHEMA_VERSION
from torch import Tensor

from lobit.export.stages import Count
from lobit.runtime.manifest import Method, Port

SEGMENT_ALIGNMENT = 128
CONSTANT_ALIGNMENT = 16
"""Bytes; both are those of ExecuTorch's own writer."""

ARENA, TENSOR_ALIGNMENT = 1, 64
"""Number of the memory that ExecuTorch plans, and bytes at whose multiples its tensors begin."""
SCALARS = {
    "float16": (ScalarType.HALF, 2),
    "float32": (ScalarType.FLOAT, 4),
    "int32": (ScalarType.INT, 4),
    "int16": (ScalarType.SHORT, 2),
    "uint8": (ScalarType.BYTE, 1),
}
"""Types of ports, and bytes of an element."""
PIECE = 1 << 24
"""Bytes of a file that are copied at once."""


class Named(Protocol):
    """A delegate's constant, whose bytes are made when they are written."""

    @property
    def bytes(self) -> int:
        """Number of its bytes."""

    @property
    def digest(self) -> str:
        """The sha256 of its bytes, in hexadecimal."""

    def data(self) -> Tensor:
        """The bytes."""


@dataclass
class Linked:
    """A program whose large data is still outside of it."""

    program: schema.Program
    """The program without constants, the delegates' data and named data."""
    constants: Mapping[str, Tensor]
    """Constants by their digests; the program's tensors refer to them by their number in this order, counted from 1."""
    delegates: Sequence[bytes | Path]
    """Data of the delegates, or files that have them; the program's delegates refer to them by index."""
    weights: Mapping[str, Named]
    """Constants of the delegates by the names that the delegates have for them."""


Source = bytes | Path | Tensor | Named


@dataclass
class _Layout:
    """Where the data lies that follows the program in the file."""

    pieces: list[tuple[int, Source]] = field(default_factory=list)
    segments: list[schema.DataSegment] = field(default_factory=list)
    end: int = 0

    def place(self, source: Source, size: int, alignment: int) -> int:
        """Adds data and returns its offset."""
        offset: int = aligned_size(self.end, alignment)
        self.pieces.append((offset, source))
        self.end = offset + size
        return offset

    def segment(self, offset: int, size: int) -> int:
        """Adds a segment for a range of the data and returns its number."""
        self.segments.append(schema.DataSegment(offset=offset, size=size))
        return len(self.segments) - 1


def program_of(plans: Sequence[schema.ExecutionPlan], version: int = EXECUTORCH_SCHEMA_VERSION) -> schema.Program:
    """A program of these methods, without data."""
    return schema.Program(
        version=version,
        execution_plan=list(plans),
        constant_buffer=[],
        backend_delegate_data=[],
        segments=[],
        constant_segment=schema.SubsegmentOffsets(segment_index=0, offsets=[]),
        mutable_data_segments=[],
        named_data=[],
    )


def delegate_plan(method: Method, backend: str, specs: Mapping[str, bytes], processed: int) -> schema.ExecutionPlan:
    """A method that is one call of a delegate: inputs stay in the caller's memory, outputs have a place of their own.

    Args:
        method: its name and ports of fixed shapes, in the delegate's order.
        backend: the delegate's name in ExecuTorch.
        specs: what the delegate is opened with.
        processed: number of its data among `Linked.delegates`.
    """
    values, end = [schema.EValue(_tensor(port, None)) for port in method.inputs], 0
    for port in method.outputs:
        where = schema.AllocationDetails(memory_id=ARENA, memory_offset_low=end & 0xFFFFFFFF, memory_offset_high=end >> 32)
        values.append(schema.EValue(_tensor(port, where)))
        end = aligned_size(end + SCALARS[port.dtype][1] * math.prod(map(int, port.shape)), TENSOR_ALIGNMENT)
    everything = list(range(len(values)))
    inputs, outputs = everything[: len(method.inputs)], everything[len(method.inputs) :]
    call = schema.Instruction(instr_args=schema.DelegateCall(delegate_index=0, args=everything))
    data = schema.BackendDelegateDataReference(location=schema.DataLocation.SEGMENT, index=processed)
    told = [schema.CompileSpec(key=key, value=value) for key, value in specs.items()]
    return schema.ExecutionPlan(
        name=method.name,
        container_meta_type=schema.ContainerMetadata(encoded_inp_str="", encoded_out_str=""),
        values=values,
        inputs=inputs,
        outputs=outputs,
        chains=[schema.Chain(inputs=[], outputs=[], instructions=[call], stacktrace=None)],
        operators=[],
        delegates=[schema.BackendDelegate(id=backend, processed=data, compile_specs=told)],
        non_const_buffer_sizes=[0, end],
    )


def _tensor(port: Port, where: schema.AllocationDetails | None) -> schema.Tensor:
    return schema.Tensor(
        scalar_type=SCALARS[port.dtype][0],
        storage_offset=0,
        sizes=list(map(int, port.shape)),
        dim_order=list(range(len(port.shape))),
        requires_grad=False,
        layout=0,
        data_buffer_idx=0,
        allocation_info=where,
        shape_dynamism=schema.TensorShapeDynamism.STATIC,
    )


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy."""
    return tensor.flatten().view(torch.uint8).numpy().data


def write_program(linked: Linked, path: Path, count: Count | None = None) -> None:
    """Writes a linked program; `count` is called with how many bytes are written, and how many there are."""
    layout, program = _Layout(), linked.program
    offsets = _constants(linked, layout)
    program.constant_segment = schema.SubsegmentOffsets(segment_index=0, offsets=[0, *offsets])
    sizes = [blob.stat().st_size if isinstance(blob, Path) else len(blob) for blob in linked.delegates]
    blobs = zip(linked.delegates, sizes, strict=True)
    numbers = [layout.segment(layout.place(blob, size, SEGMENT_ALIGNMENT), size) for blob, size in blobs]
    for delegate in (delegate for plan in program.execution_plan for delegate in plan.delegates):
        where = schema.BackendDelegateDataReference(location=schema.DataLocation.SEGMENT, index=numbers[delegate.processed.index])
        delegate.processed = where
    held = dict(zip(linked.constants, offsets, strict=True))
    program.named_data = []
    for key, weight in linked.weights.items():
        offset = held[weight.digest] if held and weight.digest in held else layout.place(weight, weight.bytes, SEGMENT_ALIGNMENT)
        program.named_data.append(schema.NamedData(key=key, segment_index=layout.segment(offset, weight.bytes)))
    program.segments = layout.segments
    with path.open("wb") as file:
        begin = file.write(_head(program, layout.end))
        for offset, source in layout.pieces:
            file.write(bytes(begin + offset - file.tell()))
            for piece in _pieces(source):
                file.write(piece)
            if count:
                count(offset, layout.end)


def _constants(linked: Linked, layout: _Layout) -> list[int]:
    """Places the constants in segment 0 and returns their offsets."""
    offsets = [layout.place(tensor, tensor.nbytes, CONSTANT_ALIGNMENT) for tensor in linked.constants.values()]
    layout.segment(0, layout.end)
    return offsets


def _pieces(source: Source) -> Iterator[bytes | memoryview]:
    match source:
        case bytes():
            yield source
        case Path():
            with source.open("rb") as file:
                while piece := file.read(PIECE):
                    yield piece
        case Tensor():
            yield as_bytes(source)
        case _:
            yield as_bytes(source.data())


def _head(program: schema.Program, data_size: int) -> bytes:
    """The header and the flatbuffer, padded to where the segments begin."""
    result = _program_to_flatbuffer(program, constant_tensor_alignment=CONSTANT_ALIGNMENT, delegate_alignment=None)
    header_size = aligned_size(_ExtendedHeader.EXPECTED_LENGTH, result.max_alignment)
    size = header_size + len(result.data)
    begin = aligned_size(size, SEGMENT_ALIGNMENT)
    header = _ExtendedHeader(program_size=size, segment_base_offset=begin, segment_data_size=data_size).to_bytes()
    data: bytes = _insert_flatbuffer_header(
        flatbuffer_data=result.data, magic_regex=r"ET[0-9a-zA-Z][0-9a-zA-Z]", header_data=header.ljust(header_size, b"\0")
    )
    return data.ljust(begin, b"\0")

