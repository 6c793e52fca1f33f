"""Small operations as those of Core ML's MIL, and the same run at once by PyTorch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lobit.export.coreml.mil import Function, Value
from lobit.export.coreml.weights import weight_value
from lobit.export.static import EagerStaticBuilder, whole_shape
from lobit.model import bias_of, weight_of
from lobit.runtime.coreml_ports import NO_BIAS

SMALLEST = 2.0**-14
"""What a norm takes for the largest entry of a row of zeros: half precision's smallest normal number."""


class MilBuilder:
    """An `ops.CoreMlBuilder` that adds operations to a function; operations that no model here needs are not there."""

    def __init__(self, function: Function) -> None:
        self.function = function

    def scope(self, name: str) -> AbstractContextManager[None]:
        return self.function.scope(name)

    def composing(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()  # nothing of it stands for an operation that Core ML lacks

    def input(self, name: str, dtype: str, *shape: int) -> Value:
        return self.function.input(name, self._float(dtype), *shape)

    def state(self, name: str, *shape: int) -> Value:
        return self.function.state(name, *shape)

    def output(self, value: Value, name: str) -> None:
        self.function.output(value, name)

    def number(self, value: float) -> Value:
        return self.function.constant(np.array(value, np.float64), "number")

    def integer(self, value: int) -> Value:
        return self.function.constant(value, "integer")

    def integers(self, values: NDArray[np.int32]) -> Value:
        return self.function.constant(values, "integers")

    def table(self, name: str, values: Tensor) -> Value:
        return self.function.weight(name, values, name)

    def embedding(self, module: nn.Module, tokens: Value) -> Value:
        return self.gather(weight_value(self.function, module), tokens, 0)

    def to_float(self, x: Value) -> Value:
        return self._cast(x, self.function.floats)

    def to_logits(self, x: Value) -> Value:
        return x if x.dtype == "fp32" else self._cast(x, "fp32")

    def add(self, a: Value, b: Value) -> Value:
        return self._binary("add", a, b)

    def subtract(self, a: Value, b: Value) -> Value:
        return self._binary("sub", a, b)

    def multiply(self, a: Value, b: Value) -> Value:
        return self._binary("mul", a, b)

    def divide(self, a: Value, b: Value) -> Value:
        return self._binary("real_div", a, b)

    def modulo(self, a: Value, b: Value) -> Value:
        return self._binary("mod", a, b)

    def minimum(self, a: Value, b: Value) -> Value:
        return self._binary("minimum", a, b)

    def less(self, a: Value, b: Value) -> Value:
        return self._binary("less", a, b, "bool")

    def at_least(self, a: Value, b: Value) -> Value:
        return self._binary("greater_equal", a, b, "bool")

    def either(self, a: Value, b: Value) -> Value:
        return self._binary("logical_or", a, b, "bool")

    def where(self, condition: Value, a: Value, b: Value) -> Value:
        return self._one("select", {"cond": condition, "a": a, "b": b}, torch.broadcast_shapes(a.shape, b.shape), a.dtype)

    def tanh(self, x: Value) -> Value:
        return self._one("tanh", {"x": x}, x.shape)

    def silu(self, x: Value) -> Value:
        return self._one("silu", {"x": x}, x.shape)

    def gelu(self, x: Value) -> Value:
        return self._one("gelu", {"x": x, "mode": "TANH_APPROXIMATION"}, x.shape)

    def relu(self, x: Value) -> Value:
        return self._one("relu", {"x": x}, x.shape)

    def softmax(self, x: Value) -> Value:
        return self._one("softmax", {"x": x, "axis": -1}, x.shape)

    def matmul(self, a: Value, b: Value) -> Value:
        return self._one("matmul", {"x": a, "y": b, "transpose_x": False, "transpose_y": False}, (*a.shape[:-1], b.shape[-1]))

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        return self._one("transpose", {"x": x, "perm": list(order)}, [x.shape[axis] for axis in order], x.dtype)

    def view(self, x: Value, *shape: int) -> Value:
        whole = whole_shape(math.prod(x.shape), shape)
        return x if whole == x.shape else self._one("reshape", {"x": x, "shape": list(whole)}, whole, x.dtype)

    def reshape(self, x: Value, *sizes: int) -> Value:
        return self.view(x, 1, x.shape[1], *sizes)

    def unsqueeze(self, x: Value, *axes: int) -> Value:
        shape = list(x.shape)
        for axis in sorted(axes):
            shape.insert(axis, 1)
        return self._one("expand_dims", {"x": x, "axes": list(axes)}, shape, x.dtype)

    def split(self, x: Value, sizes: Sequence[int]) -> Sequence[Value]:
        if len(sizes) == 1:
            return [x]
        shapes = [(*x.shape[:-1], size) for size in sizes]
        return self.function.op("split", {"x": x, "split_sizes": list(sizes), "axis": -1}, *shapes)

    def append(self, axis: int, *parts: Value) -> Value:
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self._one("concat", {"values": parts, "axis": axis, "interleave": False}, shape, parts[0].dtype)

    def join(self, *parts: Value) -> Value:
        return self.append(len(parts[0].shape) - 1, *parts)

    def gather(self, x: Value, indices: Value, axis: int) -> Value:
        shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
        inputs = {"x": x, "indices": indices, "axis": axis, "batch_dims": 0, "validate_indices": False}
        return self._one("gather", inputs, shape, x.dtype)

    def rms_norm(self, x: Value, weight: Tensor | None, eps: float) -> Value:
        """RMSNorm; in half precision rows are divided by their largest entry first, as squares of more than 255 would be infinite."""
        shape = (*x.shape[:-1], 1)
        if self.function.floats == "fp16":
            largest = self._reduced("reduce_max", self._one("abs", {"x": x}, x.shape), shape)
            largest = self._binary("maximum", largest, self.number(SMALLEST))
            x = self.divide(x, largest)
            offset = self._square(self.divide(self.number(math.sqrt(eps)), largest))
        else:
            offset = self.number(eps)
        mean = self.add(self._reduced("reduce_mean", self._square(x), shape), offset)
        y = self.multiply(x, self._one("rsqrt", {"x": mean, "epsilon": np.array(0.0)}, shape))
        return y if weight is None else self.multiply(y, self._vector("norm", weight))

    def product(self, module: nn.Module, x: Value) -> Value:
        weight = weight_value(self.function, module)
        bias = bias_of(module)
        # Core ML's `linear` has a bias always.
        added = self.function.constant(np.zeros(weight.shape[0]), NO_BIAS) if bias is None else self._vector("bias", bias)
        return self._one("linear", {"x": x, "weight": weight, "bias": added}, (*x.shape[:-1], weight.shape[0]))

    def read(self, state: Value) -> Value:
        x = self._one("read_state", {"input": state}, state.shape, "fp16")
        return x if self.function.floats == "fp16" else self._cast(x, "fp32")

    def update(self, state: Value, rows: Value, slot: Value) -> Value:
        zero, rows = self.function.constant([0], "zero"), self._half(rows)
        begin = self.append(0, zero, slot, zero)
        one, columns = self.function.constant([1], "one"), self.function.constant([rows.shape[2]], "columns")
        end = self.append(0, one, self.add(slot, self.integer(rows.shape[1])), columns)
        before = self._one("read_state", {"input": state}, state.shape, "fp16")
        after = self._one("slice_update", {"x": before, "update": rows, "begin": begin, "end": end}, state.shape, "fp16")
        return self.replace(state, after)

    def replace(self, state: Value, value: Value) -> Value:
        self.function.write_state(state, self._half(value))
        return self.read(state)

    def columns(self, x: Value, count: int) -> Value:
        if x.shape[2] == count:
            return x
        shape = (*x.shape[:2], count)
        return self._one("slice_by_index", {"x": x, "begin": [0, 0, 0], "end": list(shape)}, shape, x.dtype)

    def widened(self, x: Value, count: int) -> Value:
        shape = (*x.shape[:2], count - x.shape[2])
        return self.append(2, x, self.function.constant(np.zeros(shape), "zeros")) if shape[2] else x

    def _vector(self, name: str, values: Tensor) -> Value:
        return self.function.weight(name, values)

    def _half(self, x: Value) -> Value:
        return x if x.dtype == "fp16" else self._cast(x, "fp16")

    def _float(self, dtype: str) -> str:
        return self.function.floats if dtype == "float" else dtype

    def _cast(self, x: Value, dtype: str) -> Value:
        return self._one("cast", {"x": x, "dtype": dtype}, x.shape, dtype)

    def _square(self, x: Value) -> Value:
        return self._one("square", {"x": x}, x.shape)

    def _reduced(self, kind: str, x: Value, shape: Sequence[int]) -> Value:
        return self._one(kind, {"x": x, "axes": [-1], "keep_dims": True}, shape)

    def _binary(self, kind: str, a: Value, b: Value, dtype: str | None = None) -> Value:
        return self._one(kind, {"x": a, "y": b}, torch.broadcast_shapes(a.shape, b.shape), dtype or a.dtype)

    def _one(self, kind: str, inputs: dict[str, Any], shape: Sequence[int], dtype: str | None = None) -> Value:
        (value,) = self.function.op(kind, inputs, shape, dtype=dtype)
        return value


class EagerMilBuilder(EagerStaticBuilder):
    """An `ops.CoreMlBuilder` that computes at once.

    Args:
        ports: the inputs by name.
        states: the states by name, half floats in float32; they are replaced by what is written.
    """

    def __init__(self, ports: dict[str, Tensor], states: dict[str, Tensor]) -> None:
        super().__init__(ports)
        self.states = states

    def input(self, name: str, dtype: str, *shape: int) -> Tensor:
        return self.ports[name]

    def state(self, name: str, *shape: int) -> str:
        self.states.setdefault(name, torch.zeros(shape))
        return name

    def integers(self, values: NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(values)

    def table(self, name: str, values: Tensor) -> Tensor:
        return values.clone()  # an operation, whose result is rounded where halves are computed

    def embedding(self, module: nn.Module, tokens: Tensor) -> Tensor:
        found: Tensor = module(tokens) if not isinstance(module, nn.Linear) else weight_of(module)[tokens]
        return found.float()

    def to_logits(self, x: Tensor) -> Tensor:
        return x

    def modulo(self, a: Tensor, b: Tensor) -> Tensor:
        return a % b

    def silu(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x)

    def gelu(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")

    def gather(self, x: Tensor, indices: Tensor, axis: int) -> Tensor:
        return x[(slice(None),) * axis + (indices,)]

    def read(self, state: str) -> Tensor:
        return self.states[state]

    def update(self, state: str, rows: Tensor, slot: Tensor) -> Tensor:
        whole, begin = self.states[state].clone(), int(slot)
        whole[:, begin : begin + rows.shape[1], : rows.shape[2]] = rows
        return self.replace(state, whole)

    def replace(self, state: str, value: Tensor) -> Tensor:
        self.states[state] = value.half().float()
        return self.states[state]

    def columns(self, x: Tensor, count: int) -> Tensor:
        return x[:, :, :count]

    def widened(self, x: Tensor, count: int) -> Tensor:
        return nn.functional.pad(x, (0, count - x.shape[2]))
