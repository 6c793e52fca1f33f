"""A graph for Qualcomm's QNN, written down before it is compiled: operators, shapes, and weights that both methods share.

Names of operators and their parameters are QNN's own (QnnOpDef.h; ExecuTorch's `backends/qualcomm/builders` has the same). Values have
fixed shapes; they are half floats, or integers of 16 bits where the graph has encodings.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from lobit.export.builder import Scoped
from lobit.export.qnn.compiler import GRAPHS_FILE, SCALE, WEIGHTS_FILE
from lobit.export.qnn.weights import HtpLinear

CACHED = {16: "int16", 8: "uint8"}
"""Types of ports that hold integers, by their bits. ExecuTorch's library for Android knows no uint16; a client only copies such bits."""
BIAS_MOST = (1 << 31) - 1
"""The largest integer of a bias."""
STATIC = "static."
"""Begins the names of constants, which are then no names of values."""
Parameter = float | int | list[int] | list[list[int]]
"""float: float32; whole numbers, also in a list or a matrix: uint32."""


@dataclass(frozen=True)
class Encoding:
    """What integers without a sign stand for: scale · (integer - zero)."""

    scale: float
    """A float32."""
    zero: int
    bits: Literal[8, 16] = 16

    @property
    def most(self) -> int:
        """The largest integer."""
        return (1 << self.bits) - 1

    def integers(self, x: Tensor) -> Tensor:
        """The nearest integers, as float32."""
        return ((x / self.scale).round() + self.zero).clamp(0, self.most)

    def values(self, integers: Tensor) -> Tensor:
        """What integers stand for, in float32."""
        return (integers.float() - self.zero) * self.scale

    def rounded(self, x: Tensor) -> Tensor:
        """x as its integers stand for it."""
        return self.values(self.integers(x))


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
    """Half floats; integers and, after `SCALE`, the float32 scales [out] of those that have one for every row."""
    bits: dict[str, int] = field(default_factory=dict)
    """Bits in which integers with a scale for every row are stored, by name."""
    encodings: dict[str, Encoding] = field(default_factory=dict)
    """What the other integers stand for, by name."""
    _names: dict[tuple[int, object], str] = field(default_factory=dict)
    _alike: Counter[str] = field(default_factory=Counter)
    _kept: list[Tensor] = field(default_factory=list)

    def half(self, name: str, tensor: Tensor) -> str:
        """Adds a constant of half floats, the first time that its tensor is seen; returns its name."""
        name, new = self._named(name, tensor)
        if new:
            self.tensors[name] = tensor.detach().half().contiguous()
        return name

    def encoded(self, name: str, tensor: Tensor, encoding: Encoding) -> str:
        """The same of floats that become integers of 16 bits."""
        name, new = self._named(name, tensor, encoding)
        if new:
            self.tensors[name] = encoding.integers(tensor.detach().float()).to(torch.uint16).contiguous()
            self.encodings[name] = encoding
        return name

    def rows(self, name: str, tensor: Tensor, integers: Tensor, bits: int, scale: Tensor, key: object = None) -> str:
        """The same of integers with a scale for every row, which are made of a tensor, and of what `key` tells where that differs."""
        name, new = self._named(name, tensor, key)
        if new:
            self.tensors[name], self.bits[name] = integers.detach().contiguous(), bits
            self.tensors[name + SCALE] = scale.detach().float().contiguous()
        return name

    def _named(self, name: str, tensor: Tensor, key: object = None) -> tuple[str, bool]:
        """The constant's name, and whether it is a new one."""
        known = self._names.get((id(tensor), key))
        if known is not None:
            return known, False
        self._kept.append(tensor)  # an id is that of a tensor that lives
        self._alike[name] += 1
        name = name if self._alike[name] == 1 else f"{name}#{self._alike[name]}"
        self._names[id(tensor), key] = name
        return name, True


class Graph(Scoped):
    """One method's graph under construction.

    Args:
        weights: the constants of all methods.
        encodings: of the values that are integers of 16 bits, by name, the others then being float32; None: all are half floats.
    """

    def __init__(self, weights: Weights, encodings: Mapping[str, Encoding] | None = None) -> None:
        super().__init__()
        self.weights, self.encodings = weights, encodings
        self.values: dict[str, tuple[int, ...]] = {}
        self.inputs: list[str] = []
        self.outputs: dict[str, str] = {}
        self.operators: list[Operator] = []
        self._names: Counter[str] = Counter()

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

    def constant(self, name: str, values: Tensor, encoding: Encoding | None = None) -> Value:
        """Half floats, or integers where there is an encoding, stored once however often they are used."""
        path = STATIC + self.path(name)
        found = self.weights.half(path, values) if encoding is None else self.weights.encoded(path, values, encoding)
        return Value(found, tuple(values.shape))

    def weight(self, linear: HtpLinear) -> Value:
        """The integers of a layer."""
        name = self.weights.rows(STATIC + self.path("weight"), linear.integers, linear.integers, linear.bits, linear.scale)
        return Value(name, tuple(linear.integers.shape))

    def bias(self, bias: Tensor, scale: Tensor, key: object) -> Value:
        """A bias [out] as integers of 32 bits with a scale [out] for each, of which a tensor has one for every `key`."""
        integers = (bias.detach().double() / scale.double()).round().clamp(-BIAS_MOST, BIAS_MOST).to(torch.int32)
        name = self.weights.rows(STATIC + self.path("bias"), bias, integers, 32, scale, key)
        return Value(name, tuple(bias.shape))

    def dtype(self, port: str) -> str:
        """The type of an input or an output, by its NumPy name."""
        if self.encodings is None:
            return "float16"
        encoding = self.encodings.get(self.outputs.get(port, port))
        return CACHED[encoding.bits] if encoding else "float32"

    def shape(self, port: str) -> list[int]:
        """The shape of an input or an output."""
        return list(self.values[self.outputs.get(port, port)])

    def counts(self) -> Counter[str]:
        """Number of each kind of operator."""
        return Counter(operator.kind for operator in self.operators)

    def _value(self, name: str, shape: Sequence[int]) -> Value:
        self.values[name] = tuple(shape)
        return Value(name, tuple(shape))

    def _name(self, kind: str) -> str:
        path = self.path(kind)
        self._names[path] += 1
        return path if self._names[path] == 1 else f"{path}.{self._names[path]}"


def write_graphs(graphs: Mapping[str, Graph], folder: Path) -> None:
    """Writes graphs that share their weights, for the compiler (`compiler.py`), which runs in a process of its own."""
    weights = next(iter(graphs.values())).weights
    described: dict[str, dict[str, Any]] = {
        name: {
            "inputs": graph.inputs,
            "outputs": graph.outputs,
            "values": graph.values,
            "encodings": _all_told(graph),
            "operators": [asdict(operator) for operator in graph.operators],
        }
        for name, graph in graphs.items()
    }
    told = {"graphs": described, "bits": weights.bits, "encodings": {name: _told(each) for name, each in weights.encodings.items()}}
    (folder / GRAPHS_FILE).write_text(json.dumps(told), encoding="utf-8")
    save_file({name: _alone(tensor) for name, tensor in weights.tensors.items()}, folder / WEIGHTS_FILE)


def _all_told(graph: Graph) -> dict[str, list[float | int]] | None:
    """The encodings of a graph's values; None: all are half floats."""
    if graph.encodings is None:
        return None
    return {name: _told(encoding) for name, encoding in graph.encodings.items() if name in graph.values}


def _told(encoding: Encoding) -> list[float | int]:
    """Bits, scale and offset, as QNN has them: it adds the offset to the integer."""
    return [encoding.bits, encoding.scale, -encoding.zero]


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is a part of a larger one: safetensors writes no memory twice."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
