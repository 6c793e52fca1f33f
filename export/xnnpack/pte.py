"""Writes ExecuTorch's file format without holding its data in memory (executorch/exir/_serialize/_program.py).

A file is a header, the program as a flatbuffer, and segments: the constants of its tensors, its delegates' graphs, and the named
data of those. Where named data equals a constant, as for a head that is the embedding, its segment is where the constant lies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from executorch.exir import schema
from executorch.exir._serialize._flatbuffer_program import _program_to_flatbuffer
from executorch.exir._serialize._program import _ExtendedHeader, _insert_flatbuffer_header
from executorch.exir._serialize.padding import aligned_size
from torch import Tensor

from lobit.export.stages import Count
from lobit.export.xnnpack.link import Linked, Weight
from lobit.export.xnnpack.stamp import SCALE, as_bytes

SEGMENT_ALIGNMENT = 128
CONSTANT_ALIGNMENT = 16
"""Bytes; both are those of ExecuTorch's own writer."""

Source = bytes | Tensor | Weight


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


def write_program(linked: Linked, path: Path, count: Count | None = None) -> None:
    """Writes a linked program; `count` is called with how many bytes are written, and how many there are."""
    layout, program = _Layout(), linked.program
    offsets = _constants(linked, layout)
    program.constant_segment = schema.SubsegmentOffsets(segment_index=0, offsets=[0, *offsets])
    numbers = [layout.segment(layout.place(blob, len(blob), SEGMENT_ALIGNMENT), len(blob)) for blob in linked.delegates]
    for delegate in program.execution_plan[0].delegates:
        where = schema.BackendDelegateDataReference(location=schema.DataLocation.SEGMENT, index=numbers[delegate.processed.index])
        delegate.processed = where
    held = dict(zip(linked.constants, offsets, strict=True))
    program.named_data = []
    for key, weight in linked.weights.items():
        digest = key.removeprefix(SCALE)
        offset = held[digest] if digest in held else layout.place(weight, weight.bytes, SEGMENT_ALIGNMENT)
        program.named_data.append(schema.NamedData(key=key, segment_index=layout.segment(offset, weight.bytes)))
    program.segments = layout.segments
    with path.open("wb") as file:
        begin = file.write(_head(program, layout.end))
        for offset, source in layout.pieces:
            file.write(bytes(begin + offset - file.tell()))
            file.write(_data(source))
            if count:
                count(offset, layout.end)


def _constants(linked: Linked, layout: _Layout) -> list[int]:
    """Places the constants in segment 0 and returns their offsets."""
    offsets = [layout.place(tensor, tensor.nbytes, CONSTANT_ALIGNMENT) for tensor in linked.constants.values()]
    layout.segment(0, layout.end)
    return offsets


def _data(source: Source) -> bytes | memoryview:
    tensor = source.data() if isinstance(source, Weight) else source
    return as_bytes(tensor) if isinstance(tensor, Tensor) else tensor


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

