"""An ONNX graph under construction and its files; weights get their stored form only when they are written, one after the other."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor

from lobit.export.builder import Scoped
from lobit.runtime.onnx_ports import DATA_FILE, GRAPH_FILE

OPSET, IR_VERSION = 21, 10
"""The oldest versions that have 4-bit integers with a scale for every block."""
FUSED = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
ALIGNMENT, PAGE = 64, 4096
"""Bytes. Weights are mapped from the file page by page, and those of at least a page begin where a page begins."""
Bytes = Callable[[], Tensor]


@dataclass(frozen=True)
class Region:
    """A range of the data file."""

    offset: int
    bytes: int
    make: Bytes
    """Makes the range's contents."""


class OnnxGraph(Scoped):
    """Nodes, ports and constants of a graph, in the order in which they are added."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.regions: dict[Any, Region] = {}
        self.composed: list[onnx.NodeProto] = []
        """Those of `nodes` of which several together stand for one operator that the graph does not use."""
        self.data_bytes = 0
        self._times: Counter[str] = Counter()

    @contextlib.contextmanager
    def composing(self) -> Iterator[None]:
        """Adds the nodes that are made inside the `with` block to `composed`."""
        before = len(self.nodes)
        yield
        self.composed += self.nodes[before:]

    def name(self, what: str) -> str:
        """A name in the current scope that nothing else has."""
        name = self.path(what)
        self._times[name] += 1
        return name if self._times[name] == 1 else f"{name}_{self._times[name]}"

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Declares an input; sizes that change from call to call are given as names."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Declares an output."""
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def nodes_of(
        self, kind: str, inputs: Sequence[str], outputs: int | Sequence[str] = 1, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Adds a node and returns the names of its outputs."""
        name = self.name(kind)
        named = [name if outputs == 1 else f"{name}:{i}" for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self.nodes.append(helper.make_node(kind, inputs, named, name, domain=domain, **attributes))
        return named

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a standard node with one output and returns the output's name."""
        return self.nodes_of(kind, inputs, **attributes)[0]

    def fused(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node of ONNX Runtime's own with one output and returns the output's name."""
        return self.nodes_of(kind, inputs, domain=FUSED, **attributes)[0]

    def name_output(self, value: str, name: str, shape: Sequence[int | str]) -> None:
        """Makes the output of the last node, float32, an output of the graph and calls it `name`."""
        assert self.nodes[-1].output[0] == value
        self.nodes[-1].output[0] = name
        self.outputs.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        """Adds a small constant to the graph itself, once for equal values, and returns its name."""
        array = np.asarray(values, dtype)
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        name = f"constant_{array.dtype}_{'x'.join(map(str, array.shape))}_{digest}"
        if name not in self.initializers:
            self.initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, dtype: int, shape: Sequence[int], size: int, key: Any, make: Bytes) -> str:
        """Adds a constant whose bytes are in the data file, and returns its name.

        Args:
            name: what it is called in the current scope.
            dtype: its type, one of `onnx.TensorProto`.
            shape: its shape.
            size: its number of bytes.
            key: constants with the same key have the same bytes, which are stored once.
            make: makes the bytes when they are written.
        """
        if key not in self.regions:
            unit = PAGE if size >= PAGE else ALIGNMENT
            start = -(-self.data_bytes // unit) * unit
            self.regions[key] = Region(start, size, make)
            self.data_bytes = start + size
        region = self.regions[key]
        tensor = onnx.TensorProto(name=self.name(name), data_type=dtype, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
        for entry, value in (("location", DATA_FILE), ("offset", region.offset), ("length", region.bytes)):
            tensor.external_data.add(key=entry, value=str(value))
        self.initializers[tensor.name] = tensor
        return tensor.name

    def model(self) -> onnx.ModelProto:
        """The graph as it is written to its file."""
        graph = helper.make_graph(self.nodes, "lobit", self.inputs, self.outputs, list(self.initializers.values()))
        domains = sorted({node.domain for node in self.nodes})
        opsets = [helper.make_opsetid(domain, 1 if domain else OPSET) for domain in domains]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="lobit")

    def write(self, folder: Path, count: Callable[[int, int], None]) -> None:
        """Writes both files; only one weight at a time is in memory in its stored form."""
        with (folder / DATA_FILE).open("wb") as file:
            for region in self.regions.values():
                file.seek(region.offset)
                file.write(bytes_of(region.make()))
                count(file.tell(), self.data_bytes)
        (folder / GRAPH_FILE).write_bytes(self.model().SerializeToString(deterministic=True))


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes."""
    array: NDArray[Any] = tensor.contiguous().numpy()
    return array.reshape(-1).view(np.uint8).data
