"""Small operations as standard ONNX nodes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
from onnx import TensorProto
from torch import Tensor

from lobit.export.onnx.graph import OnnxGraph

EVERYTHING = np.iinfo(np.int64).max
"""The end of a slice that reaches to the end of its axis."""


class OnnxBuilder:
    """A `builder.Builder` that adds standard nodes to a graph; its values are names in the graph."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph

    def scope(self, name: str) -> AbstractContextManager[None]:
        return self.graph.scope(name)

    def composing(self) -> AbstractContextManager[None]:
        return self.graph.composing()

    def number(self, value: float) -> str:
        return self.graph.constant(value)

    def integer(self, value: int) -> str:
        return self.graph.constant(value, np.int64)

    def integers(self, *values: int) -> str:
        """A constant int64 [n]."""
        return self.graph.constant(values, np.int64)

    def floats(self, values: Tensor) -> str:
        return self.graph.constant(values.numpy())

    def to_float(self, x: str) -> str:
        return self.graph.op("Cast", x, to=TensorProto.FLOAT)

    def add(self, a: str, b: str) -> str:
        return self.graph.op("Add", a, b)

    def subtract(self, a: str, b: str) -> str:
        return self.graph.op("Sub", a, b)

    def multiply(self, a: str, b: str) -> str:
        return self.graph.op("Mul", a, b)

    def divide(self, a: str, b: str) -> str:
        return self.graph.op("Div", a, b)

    def minimum(self, a: str, b: str) -> str:
        return self.graph.op("Min", a, b)

    def maximum(self, a: str, b: str) -> str:
        return self.graph.op("Max", a, b)

    def less(self, a: str, b: str) -> str:
        return self.graph.op("Less", a, b)

    def greater(self, a: str, b: str) -> str:
        return self.graph.op("Greater", a, b)

    def at_least(self, a: str, b: str) -> str:
        return self.graph.op("GreaterOrEqual", a, b)

    def either(self, a: str, b: str) -> str:
        return self.graph.op("Or", a, b)

    def where(self, condition: str, a: str, b: str) -> str:
        return self.graph.op("Where", condition, a, b)

    def reciprocal(self, x: str) -> str:
        return self.graph.op("Reciprocal", x)

    def square_root(self, x: str) -> str:
        return self.graph.op("Sqrt", x)

    def absolute(self, x: str) -> str:
        return self.graph.op("Abs", x)

    def round(self, x: str) -> str:
        return self.graph.op("Round", x)

    def clip(self, x: str, low: str, high: str) -> str:
        return self.graph.op("Clip", x, low, high)

    def tanh(self, x: str) -> str:
        return self.graph.op("Tanh", x)

    def sigmoid(self, x: str) -> str:
        return self.graph.op("Sigmoid", x)

    def relu(self, x: str) -> str:
        return self.graph.op("Relu", x)

    def sine(self, x: str) -> str:
        return self.graph.op("Sin", x)

    def cosine(self, x: str) -> str:
        return self.graph.op("Cos", x)

    def mean(self, x: str) -> str:
        return self.graph.op("ReduceMean", x, self.integers(-1), keepdims=1)

    def smallest(self, x: str) -> str:
        return self.graph.op("ReduceMin", x, self.integers(-1), keepdims=1)

    def largest(self, x: str) -> str:
        return self.graph.op("ReduceMax", x, self.integers(-1), keepdims=1)

    def softmax(self, x: str) -> str:
        return self.graph.op("Softmax", x, axis=-1)

    def matmul(self, a: str, b: str) -> str:
        return self.graph.op("MatMul", a, b)

    def transpose(self, x: str, order: Sequence[int]) -> str:
        return self.graph.op("Transpose", x, perm=list(order))

    def reshape(self, x: str, *sizes: int) -> str:
        return self.graph.op("Reshape", x, self.integers(1, -1, *sizes))

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self.graph.op("Unsqueeze", x, self.integers(*axes))

    def split(self, x: str, sizes: Sequence[int]) -> Sequence[str]:
        return self.graph.nodes_of("Split", [x, self.integers(*sizes)], len(sizes), axis=-1)

    def join(self, *parts: str) -> str:
        return self.graph.op("Concat", *parts, axis=-1)

    def select(self, x: str, indices: Sequence[int]) -> str:
        return self.graph.op("Gather", x, self.integers(*indices), axis=1)

    def last(self, x: str) -> str:
        return self.graph.op("Slice", x, self.integers(-1), self.integers(EVERYTHING), self.integers(1))
