"""The operations of Core ML's MIL that packages here consist of, in NumPy, with MIL's names of their inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Operator = Callable[..., Any]


def _softmax(x: Array, axis: Array) -> Array:
    shifted = np.exp(x - x.max(axis=int(axis), keepdims=True))
    return shifted / shifted.sum(axis=int(axis), keepdims=True)  # type: ignore[no-any-return]


def _linear(x: Array, weight: Array, bias: Array) -> Array:
    y = x.reshape(-1, x.shape[-1]) @ weight.T
    return (y + bias).reshape(*x.shape[:-1], len(weight))


def _matmul(x: Array, y: Array, transpose_x: Array, transpose_y: Array) -> Array:
    x = x.swapaxes(-1, -2) if transpose_x else x
    y = y.swapaxes(-1, -2) if transpose_y else y
    return x @ y


def _gather(x: Array, indices: Array, axis: Array, batch_dims: Array, validate_indices: Array) -> Array:
    if int(batch_dims):
        raise ValueError(f"gather with batch_dims {int(batch_dims)}")
    return np.take(x, indices, int(axis))


def _reduce(function: Callable[..., Array]) -> Operator:
    def reduced(x: Array, axes: Array, keep_dims: Array) -> Array:
        return function(x, axis=tuple(axes.tolist()), keepdims=bool(keep_dims))

    return reduced


def region(begin: Array, end: Array) -> tuple[slice, ...]:
    """The part of an array between two corners."""
    return tuple(slice(int(first), int(last)) for first, last in zip(begin, end, strict=True))


def _slice_update(x: Array, update: Array, begin: Array, end: Array) -> Array:
    y = x.copy()
    y[region(begin, end)] = update
    return y


def _gelu(x: Array, mode: str) -> Array:
    if mode != "TANH_APPROXIMATION":
        raise ValueError(f"gelu of mode {mode}")
    return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))  # type: ignore[no-any-return]


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))  # type: ignore[no-any-return]


def _cast(x: Array, dtype: str) -> Array:
    return x.astype(CASTS[dtype])


def _split(x: Array, split_sizes: Array, axis: Array) -> Sequence[Array]:
    return np.split(x, np.cumsum(split_sizes)[:-1], int(axis))


def _concat(values: Sequence[Array], axis: Array, interleave: Array) -> Array:
    if interleave:
        raise ValueError("concat that interleaves")
    return np.concatenate(values, int(axis))


CASTS = {"fp16": np.float32, "fp32": np.float32, "int32": np.int32}
"""Types that values are cast to; half floats are float32 here, and rounded, if at all, by the type of the result."""
MANY = {"concat": "values"}
"""Inputs that are several values, by their operation."""
OPERATORS: Mapping[str, Operator] = {
    "abs": lambda x: np.abs(x),
    "add": lambda x, y: x + y,
    "cast": _cast,
    "concat": _concat,
    "expand_dims": lambda x, axes: np.expand_dims(x, tuple(axes.tolist())),
    "gather": _gather,
    "gelu": _gelu,
    "greater_equal": lambda x, y: x >= y,
    "identity": lambda x: x,
    "less": lambda x, y: x < y,
    "linear": _linear,
    "logical_or": lambda x, y: x | y,
    "matmul": _matmul,
    "maximum": lambda x, y: np.maximum(x, y),
    "minimum": lambda x, y: np.minimum(x, y),
    "mod": lambda x, y: np.mod(x, y),
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "reduce_max": _reduce(np.max),
    "reduce_mean": _reduce(np.mean),
    "relu": lambda x: np.maximum(x, 0),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
    "rsqrt": lambda x, epsilon: 1 / np.sqrt(x + epsilon),
    "select": lambda cond, a, b: np.where(cond, a, b),
    "silu": _silu,
    "slice_by_index": lambda x, begin, end: x[region(begin, end)],
    "slice_update": _slice_update,
    "softmax": _softmax,
    "split": _split,
    "square": lambda x: x * x,
    "sub": lambda x, y: x - y,
    "tanh": lambda x: np.tanh(x),
    "transpose": lambda x, perm: x.transpose(perm.tolist()),
}
"""Functions of the inputs by MIL's names; floats are float32."""
BROADCAST = {"add", "sub", "mul", "real_div", "mod", "minimum", "maximum", "less", "greater_equal", "logical_or", "select"}
"""Operations whose result is as large as their inputs together ask for."""


def expected_shape(kind: str, inputs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of an operation's result where that may be much larger than its inputs, found before it is computed; None: it is not.

    Raises:
        ValueError: the inputs do not fit together.
    """
    shapes = {name: value.shape for name, value in inputs.items() if isinstance(value, np.ndarray)}
    if kind in BROADCAST:
        return np.broadcast_shapes(*shapes.values())
    if kind == "concat":
        return _joined([value.shape for value in inputs["values"]], int(inputs["axis"]))
    if kind == "linear":
        return (*shapes["x"][:-1], shapes["weight"][0])
    if kind == "matmul":
        rows, columns = (-1, -2) if inputs["transpose_x"] else (-2, -1), (-2, -1) if not inputs["transpose_y"] else (-1, -2)
        batch = np.broadcast_shapes(shapes["x"][:-2], shapes["y"][:-2])
        return (*batch, shapes["x"][rows[0]], shapes["y"][columns[1]])
    if kind == "gather":
        axis = int(inputs["axis"])
        return (*shapes["x"][:axis], *shapes["indices"], *shapes["x"][axis + 1 :])
    return None


def _joined(shapes: Sequence[tuple[int, ...]], axis: int) -> tuple[int, ...]:
    """The shape of arrays of these shapes, one after the other along an axis."""
    joined = list(shapes[0])
    joined[axis] = sum(shape[axis] for shape in shapes)
    return tuple(joined)


def expand_blockwise(data: Array, scale: Array) -> NDArray[np.float32]:
    """Integers [out, in] times the scale of their block; scale [a, b] where a divides out and b divides in.

    Raises:
        ValueError: the shapes do not fit together.
    """
    blocks = data.reshape(scale.shape[0], data.shape[0] // scale.shape[0], scale.shape[1], data.shape[1] // scale.shape[1])
    return (blocks * scale.astype(np.float32)[:, None, :, None]).reshape(data.shape)


def expand_table(indices: Array, lut: Array) -> NDArray[np.float32]:
    """Codes [out, in] replaced by their values in lut [a, b, values, 1], where a divides out and b divides in.

    Raises:
        ValueError, IndexError: the shapes do not fit together, or a code has no value.
    """
    (out, inner), (rows, columns, _, each) = indices.shape, lut.shape
    if out % rows or inner % columns or each != 1:
        raise ValueError(f"a table of shape {lut.shape} for codes of shape {indices.shape}")
    values = lut[..., 0].astype(np.float32)
    if (rows, columns) == (1, 1):
        return values[0, 0][indices]  # type: ignore[no-any-return]
    row, column = np.arange(out) * rows // out, np.arange(inner) * columns // inner
    return values[row[:, None], column[None], indices]  # type: ignore[no-any-return]
