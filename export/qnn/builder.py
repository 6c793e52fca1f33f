"""Small operations as QNN's operators, and the same run at once by PyTorch."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lobit.export.qnn.graph import Graph, Value
from lobit.export.qnn.weights import HtpLinear
from lobit.export.static import EagerStaticBuilder, whole_shape
from lobit.model import bias_of, weight_of


class QnnBuilder:
    """An `ops.HtpBuilder` that adds operators to a graph; operations that no model here needs are not there."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._numbers: dict[float, Tensor] = {}
        self._biases: dict[int, Tensor] = {}
        self._ones: dict[int, Tensor] = {}

    def scope(self, name: str) -> AbstractContextManager[None]:
        return self.graph.scope(name)

    def composing(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()  # nothing of it stands for an operator that the HTP lacks

    def input(self, name: str, *shape: int) -> Value:
        return self.graph.input(name, *shape)

    def output(self, value: Value, name: str) -> None:
        self.graph.output(value, name)

    def number(self, value: float) -> Value:
        return self.graph.constant("number", self._numbers.setdefault(value, torch.tensor([value])))

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
        bias = self.graph.constant("no_bias", self._biases.setdefault(size, torch.zeros(size)))
        inputs = [rows, self.graph.constant("norm", weight), bias]
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
        added = [] if bias is None else [self.graph.constant("bias", bias)]
        return self._one("FullyConnected", [x, weight, *added], (*x.shape[:-1], weight.shape[0]))

    def _binary(self, kind: str, a: Value, b: Value) -> Value:
        return self._one(kind, [a, b], torch.broadcast_shapes(a.shape, b.shape))

    def _one(self, kind: str, inputs: Sequence[Value], shape: Sequence[int], **parameters: Any) -> Value:
        (value,) = self.graph.op(kind, inputs, shape, **parameters)
        return value


class EagerHtpBuilder(EagerStaticBuilder):
    """An `ops.HtpBuilder` that computes at once, from inputs by name."""

    def input(self, name: str, *shape: int) -> Tensor:
        return self.ports[name]

    def product(self, module: nn.Module, x: Tensor) -> Tensor:
        if not isinstance(module, HtpLinear):
            return super().product(module, x)
        return F.linear(F.pad(x, (0, module.extra)), module.integers.float() * module.scale[:, None], module.bias)
