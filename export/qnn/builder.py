"""Small operations as QNN's operators."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lobit.export.qnn.encodings import over
from lobit.export.qnn.graph import Encoding, Graph, Value
from lobit.export.qnn.weights import HtpLinear
from lobit.export.static import whole_shape
from lobit.model import bias_of, weight_of
from lobit.runtime.qnn_ports import is_cache


class QnnBuilder:
    """An `ops.HtpBuilder` that adds operators to a graph; operations that no model here needs are not there.

    Args:
        graph: the graph.
        narrow: whether rows of caches become integers of 8 bits, for chips that multiply no 16 bits with 16.
    """

    def __init__(self, graph: Graph, narrow: bool = False) -> None:
        self.graph, self.narrow = graph, narrow
        self._numbers: dict[float, Tensor] = {}
        self._biases: dict[int, Tensor] = {}
        self._ones: dict[int, Tensor] = {}

    def scope(self, name: str) -> AbstractContextManager[None]:
        return self.graph.scope(name)

    def composing(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()  # nothing of it stands for an operator that the HTP lacks

    def input(self, name: str, *shape: int) -> Value:
        value = self.graph.input(name, *shape)
        if self.graph.encodings is None or is_cache(name):
            return value
        with self.scope(name):
            return self._one("Quantize", [value], shape)

    def output(self, value: Value, name: str) -> None:
        if self.graph.encodings is not None and not is_cache(name):
            with self.scope(name):
                value = self._one("Dequantize", [value], value.shape)
        self.graph.output(value, name)

    def kept(self, x: Value) -> Value:
        return self._one("Convert", [x], x.shape) if self.narrow else x

    def choose(self, chosen: Value, x: Value) -> Value:
        if not self.narrow:
            return self.matmul(chosen, x)
        found = self.matmul(self.transpose(x, [0, 2, 1]), self.transpose(self._one("Convert", [chosen], chosen.shape), [0, 2, 1]))
        return self.transpose(found, [0, 2, 1])

    def number(self, value: float) -> Value:
        tensor = self._numbers.setdefault(value, torch.tensor([value]))
        return self.graph.constant("number", tensor, self._over(value, value))

    def add(self, a: Value, b: Value) -> Value:
        return self._binary("ElementWiseAdd", a, b)

    def subtract(self, a: Value, b: Value) -> Value:
        return self._binary("ElementWiseSubtract", a, b)

    def multiply(self, a: Value, b: Value) -> Value:
        return self._binary("ElementWiseMultiply", a, b)

    def divide(self, a: Value, b: Value) -> Value:
        return self._binary("ElementWiseDivide", a, b)

    def tanh(self, x: Value) -> Value:
        return self._one("Tanh", [x], x.shape)

    def sigmoid(self, x: Value) -> Value:
        return self._one("Sigmoid", [x], x.shape)

    def relu(self, x: Value) -> Value:
        return self._one("Relu", [x], x.shape)

    def softmax(self, x: Value) -> Value:
        return self._one("Softmax", [x], x.shape, axis=len(x.shape) - 1)

    def matmul(self, a: Value, b: Value) -> Value:
        return self._one("MatMul", [a, b], (*a.shape[:-1], b.shape[-1]))

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        return self._one("Transpose", [x], [x.shape[axis] for axis in order], perm=list(order))

    def view(self, x: Value, *shape: int) -> Value:
        return self._one("Reshape", [x], whole_shape(math.prod(x.shape), shape))

    def reshape(self, x: Value, *sizes: int) -> Value:
        return self.view(x, 1, x.shape[1], *sizes)

    def split(self, x: Value, sizes: Sequence[int]) -> Sequence[Value]:
        shapes = [(*x.shape[:-1], size) for size in sizes]
        return self.graph.op("Split", [x], *shapes, split_index=list(itertools.accumulate(sizes[:-1])), axis=len(x.shape) - 1)

    def append(self, axis: int, *parts: Value) -> Value:
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self._one("Concat", parts, shape, axis=axis)

    def join(self, *parts: Value) -> Value:
        return self.append(len(parts[0].shape) - 1, *parts)

    def rms_norm(self, x: Value, weight: Tensor | None, eps: float) -> Value:
        """RMSNorm of at most three axes: that of four is silently wrong on the HTP where there are several tokens."""
        size = x.shape[-1]
        rows = self.view(x, 1, math.prod(x.shape[:-1]), size) if len(x.shape) > 3 else x
        weight = self._ones.setdefault(size, torch.ones(size)) if weight is None else weight  # the operator needs one
        bias = self.graph.constant("no_bias", self._biases.setdefault(size, torch.zeros(size)), self._over(0.0, 1.0))
        encoding = None if self.graph.encodings is None else over(float(weight.min()), float(weight.max()))
        inputs = [rows, self.graph.constant("norm", weight, encoding), bias]
        y = self._one("RmsNorm", inputs, rows.shape, epsilon=float(eps), axes=[len(rows.shape) - 1])
        return self.view(y, *x.shape) if y.shape != x.shape else y

    def product(self, module: nn.Module, x: Value) -> Value:
        """FullyConnected; inputs are filled up with zeros to the number that the HTP takes."""
        if isinstance(module, HtpLinear):
            weight = self.graph.weight(module)
            if module.extra:
                amounts = [[0, 0] for _ in x.shape[:-1]] + [[0, module.extra]]
                x = self._one("Pad", [x], (*x.shape[:-1], weight.shape[1]), scheme=0, pad_constant_value=0.0, pad_amount=amounts)
        else:
            weight = self.graph.constant("weight", weight_of(module))
        bias = bias_of(module)
        added = [] if bias is None else [self._bias(module, bias, x)]
        return self._one("FullyConnected", [x, weight, *added], (*x.shape[:-1], weight.shape[0]))

    def _bias(self, module: nn.Module, bias: Tensor, x: Value) -> Value:
        """A bias, which among integers has the scales of the products that it is added to."""
        if self.graph.encodings is None:
            return self.graph.constant("bias", bias)
        assert isinstance(module, HtpLinear)
        encoding = self.graph.encodings.get(x.name, over(0.0, 1.0))  # of one that is missing the graph's check tells
        return self.graph.bias(bias, module.scale * encoding.scale, encoding)

    def _over(self, low: float, high: float) -> Encoding | None:
        return None if self.graph.encodings is None else over(low, high)

    def _binary(self, kind: str, a: Value, b: Value) -> Value:
        return self._one(kind, [a, b], torch.broadcast_shapes(a.shape, b.shape))

    def _one(self, kind: str, inputs: Sequence[Value], shape: Sequence[int], **parameters: Any) -> Value:
        (value,) = self.graph.op(kind, inputs, shape, **parameters)
        return value
