"""The Core ML package inside of an ExecuTorch program for its Core ML delegate, taken out again.

The delegate's data is a package and `metadata.json` in one piece (executorch/backends/apple/coreml/runtime/inmemoryfs): the files' bytes,
and behind them, from the last byte on backwards, a JSON object that says where each file lies.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lobit.errors import BundleError, MissingPartError
from lobit.quiet import quiet_python
from lobit.runtime.coreml_ports import REFERENCE

LARGEST_PROGRAM, LARGEST_INDEX = 64 << 20, 1 << 20
"""Bytes of an ExecuTorch program without its data, and of the JSON behind a package, that are read."""
FILE = 0
"""Kind of an entry in the JSON that is a file; others are folders."""
Raw = NDArray[np.uint8]


def mapped(path: Path) -> Raw:
    """The bytes of a file, of which only those are read that are used."""
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)


def taken_out(path: Path) -> dict[str, Raw]:
    """The files of the package that all methods of a program call, by their paths.

    Raises:
        MissingPartError: ExecuTorch is not installed.
        BundleError: the program is damaged, calls anything else, or its methods call different packages.
    """
    try:
        with quiet_python():
            from executorch.exir._serialize import _flatbuffer_program, _program
    except ImportError as error:
        raise MissingPartError(f"{error.name} is not installed: pip install 'lobit[xnnpack]'") from None

    header = _program._ExtendedHeader
    data = mapped(path)
    try:
        head = header.from_bytes(data[: header.NUM_HEAD_BYTES].tobytes()[8:])
        if head.program_size > LARGEST_PROGRAM:
            raise _damaged(f"{head.program_size} bytes without data")
        program = _flatbuffer_program._flatbuffer_to_program(data[: head.program_size].tobytes())
    except BundleError:
        raise
    except Exception as error:  # the reader of flatbuffers raises exceptions of many kinds
        raise _damaged(str(error)) from None

    def segment(index: int) -> Raw:
        if not 0 <= index < len(program.segments):
            raise _damaged(f"segment {index} of {len(program.segments)}")
        begin = head.segment_base_offset + program.segments[index].offset
        return _slice(data, begin, program.segments[index].size)

    keys = {_key(segment(delegate.processed.index)) for plan in program.execution_plan for delegate in plan.delegates}
    named = {each.key: each.segment_index for each in program.named_data or []}
    if len(keys) != 1 or (key := keys.pop()) not in named:
        raise _damaged("its methods do not call one package")
    return _files(segment(named[key]))


def _key(processed: Raw) -> str:
    """The name of the data that a method refers to."""
    raw = processed[:LARGEST_INDEX].tobytes()
    try:
        told = json.loads(raw[len(REFERENCE) :]) if raw.startswith(REFERENCE) else None
        return str(told["key"]) if isinstance(told, dict) else ""
    except (ValueError, KeyError, RecursionError):
        return ""


def _files(data: Raw) -> dict[str, Raw]:
    """The files in one piece of data, by their paths in it."""
    behind = data[: -LARGEST_INDEX - 1 : -1].tobytes().decode("latin-1")
    try:
        nodes = json.JSONDecoder().raw_decode(behind)[0]["nodes"]
        inner = [child for node in nodes for child in node["children"].values()]
        if len(inner) != len(set(inner)) or min(inner, default=0) < 0:
            raise ValueError("an entry is in two folders")  # so that no walk is longer than the list
        found: dict[str, Raw] = {}
        for top in set(range(len(nodes))) - set(inner):  # the folder itself, whose name is no part of the paths
            for index in nodes[top]["children"].values():
                _walk(nodes, index, "", data, found)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise _damaged("its package has no list of files") from None
    return found


def _walk(nodes: list[dict[str, Any]], index: int, before: str, data: Raw, found: dict[str, Raw]) -> None:
    """Adds the files of an entry and of those in it."""
    node = nodes[index]
    path = f"{before}{node['name']}"
    if node["kind"] == FILE:
        found[path] = _slice(data, node["dataRegion"]["offset"], node["dataRegion"]["size"])
        return
    for child in node["children"].values():
        _walk(nodes, child, f"{path}/", data, found)


def _slice(data: Raw, begin: int, size: int) -> Raw:
    if not 0 <= begin <= begin + size <= len(data):
        raise _damaged(f"it points at bytes {begin} to {begin + size} of {len(data)}")
    return data[begin : begin + size]


def _damaged(what: str) -> BundleError:
    return BundleError(f"the program for ExecuTorch's Core ML delegate is not as export wrote it ({what}): export it again")
