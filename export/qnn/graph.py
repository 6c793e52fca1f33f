"""A graph for Qualcomm's QNN, written down before it is compiled: operators, shapes, and weights that both methods share.

Names of operators and their parameters are QNN's own (QnnOpDef.h; ExecuTorch's `backends/qualcomm/builders` has the same). All
values between operators are half floats of fixed shapes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lobit.export.qnn.compiler import GRAPHS_FILE, SCALE, WEIGHTS_FILE
from lobit.export.qnn.weights import HtpLinear

STATIC = "static."
"""Begins the names of constants, which are then no names of values."""
Parameter = float | int | list[int] | list[list[int]]
"""float: float32; whole numbers, also in a list or a matrix: uint32."""


@dataclass(frozen=True)
class Value:
    """A tensor of the graph by its name."""

    name: str
    shape: tuple[int, ...]


@dataclass
class Operator:
    """One operator; inputs and outputs are names of values."""

    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    parameters: dict[str, Parameter]


@dataclass
class Weights:
    """Constants of all graphs, each once."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Half floats; int8 integers and, after `SCALE`, their float32 scales [out]."""
    bits: dict[str, int] = field(default_factory=dict)
    """Bits in which integers are stored, by name."""
    _names: dict[int, str] = field(default_factory=dict)
    _alike: Counter[str] = field(default_factory=Counter)
    _kept: list[Tensor] = field(default_factory=list)

    def add(self, name: str, tensor: Tensor, bits: int | None = None, scale: Tensor | None = None) -> str:
        """Adds a constant, the first time that its tensor is seen; returns its name."""
        if id(tensor) in self._names:
            return self._names[id(tensor)]
        self._kept.append(tensor)  # an id is that of a tensor that lives
        self._alike[name] += 1
        name = name if self._alike[name] == 1 else f"{name}#{self._alike[name]}"
        self._names[id(tensor)] = name
        self.tensors[name] = tensor.detach().contiguous() if bits else tensor.detach().half().contiguous()
        if bits and scale is not None:
            self.bits[name] = bits
            self.tensors[name + SCALE] = scale.detach().float().contiguous()
        return name


class Graph:
    """One method's graph under construction.

    Args:
        weights: the constants of all methods.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.values: dict[str, tuple[int, ...]] = {}
        self.inputs: list[str] = []
        self.outputs: dict[str, str] = {}
        self.operators: list[Operator] = []
        self._scope: list[str] = []
        self._names: Counter[str] = Counter()

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Puts `name` before the names of all that is added inside the `with` block."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def input(self, name: str, *shape: int) -> Value:
        """Declares an input."""
        self.inputs.append(name)
        return self._value(name, shape)

    def op(self, kind: str, inputs: Sequence[Value], *shapes: Sequence[int], **parameters: Parameter) -> list[Value]:
        """Adds an operator with a result of each shape."""
        name = self._name(kind)
        results = [self._value(f"{name}@{index}", shape) for index, shape in enumerate(shapes)]
        told = [value.name for value in inputs], [value.name for value in results]
        self.operators.append(Operator(kind, name, *told, parameters))
        return results

    def output(self, value: Value, name: str) -> None:
        """Makes a value an output of the graph."""
        self.outputs[name] = value.name

    def constant(self, name: str, values: Tensor) -> Value:
        """Half floats, stored once however often they are used."""
        return Value(self.weights.add(STATIC + self._path(name), values), tuple(values.shape))

    def weight(self, linear: HtpLinear) -> Value:
        """The integers of a layer."""
        name = self.weights.add(STATIC + self._path("weight"), linear.integers, linear.bits, linear.scale)
        return Value(name, tuple(linear.integers.shape))

    def shape(self, port: str) -> list[int]:
        """The shape of an input or an output."""
        return list(self.values[self.outputs.get(port, port)])

    def counts(self) -> Counter[str]:
        """Number of each kind of operator."""
        return Counter(operator.kind for operator in self.operators)

    def _value(self, name: str, shape: Sequence[int]) -> Value:
        self.values[name] = tuple(shape)
        return Value(name, tuple(shape))

    def _path(self, name: str) -> str:
        return ".".join([*self._scope, name])

    def _name(self, kind: str) -> str:
        path = self._path(kind)
        self._names[path] += 1
        return path if self._names[path] == 1 else f"{path}.{self._names[path]}"


def write_graphs(graphs: Mapping[str, Graph], folder: Path) -> None:
    """Writes graphs that share their weights, for the compiler (`compiler.py`), which runs in a process of its own."""
    weights = next(iter(graphs.values())).weights
    described = {
        name: {
            "inputs": graph.inputs,
            "outputs": graph.outputs,
            "values": graph.values,
            "operators": [asdict(operator) for operator in graph.operators],
        }
        for name, graph in graphs.items()
    }
    (folder / GRAPHS_FILE).write_text(json.dumps({"graphs": described, "bits": weights.bits}), encoding="utf-8")
    save_file({name: _alone(tensor) for name, tensor in weights.tensors.items()}, folder / WEIGHTS_FILE)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is a part of a larger one: safetensors writes no memory twice."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
