"""Runs graphs by PyTorch, operator by operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lobit.export.qnn.compiler import SCALE
from lobit.export.qnn.graph import Graph, Operator, Weights

Each = Callable[[str, Tensor], Tensor]
"""Gets the name and the entries of a value; what it returns is gone on with."""


def run_graph(graph: Graph, inputs: Mapping[str, Tensor], constants: Constants, each: Each | None = None) -> dict[str, Tensor]:
    """The outputs of a graph, in float32.

    Args:
        graph: the graph.
        inputs: its inputs by name, as the floats that they stand for.
        constants: those of the graph.
        each: called with every value.
    """
    each = each or (lambda name, x: x)
    values = {name: each(name, inputs[name]) for name in graph.inputs}
    for operator in graph.operators:
        given = [values[name] if name in values else constants[name] for name in operator.inputs]
        if operator.kind == "Reshape":
            results = given[0].reshape(graph.values[operator.outputs[0]])
        else:
            results = COMPUTED[operator.kind](operator, *given)
        shaped = zip(operator.outputs, results if isinstance(results, (tuple, list)) else (results,), strict=True)
        values |= {name: each(name, result) for name, result in shaped}
    return {name: values[value] for name, value in graph.outputs.items()}


class Constants(dict[str, Tensor]):
    """The constants of graphs as floats, each computed when it is first asked for.

    Args:
        weights: the constants as they are stored.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights

    def __missing__(self, name: str) -> Tensor:
        stored = self.weights.tensors[name]
        if name in self.weights.encodings:
            found = self.weights.encodings[name].values(stored)
        elif name in self.weights.bits:
            scale = self.weights.tensors[name + SCALE]
            found = stored.float() * (scale if stored.dim() == 1 else scale[:, None])
        else:
            found = stored.float()
        self[name] = found
        return found


def _pad(operator: Operator, x: Tensor) -> Tensor:
    amounts: Any = operator.parameters["pad_amount"]
    return F.pad(x, [amount for pair in reversed(amounts) for amount in pair])


def _split(operator: Operator, x: Tensor) -> Any:
    index: Any = operator.parameters["split_index"]
    return torch.tensor_split(x, index, -1)


def _concat(operator: Operator, *parts: Tensor) -> Tensor:
    axis: Any = operator.parameters["axis"]
    return torch.cat(parts, axis)


def _norm(operator: Operator, x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    epsilon: Any = operator.parameters["epsilon"]
    return F.rms_norm(x, x.shape[-1:], weight, epsilon)


def _linear(_: Operator, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def _same(_: Operator, x: Tensor) -> Tensor:
    return x


def _plain(function: Callable[..., Tensor], _: Operator, *given: Tensor) -> Tensor:
    return function(*given)


PLAIN: dict[str, Callable[..., Tensor]] = {
    "ElementWiseAdd": torch.add,
    "ElementWiseSubtract": torch.subtract,
    "ElementWiseMultiply": torch.multiply,
    "ElementWiseDivide": torch.divide,
    "MatMul": torch.matmul,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Softmax": functools.partial(torch.softmax, dim=-1),
    "Tanh": torch.tanh,
}
COMPUTED: dict[str, Callable[..., Any]] = {
    **{kind: functools.partial(_plain, function) for kind, function in PLAIN.items()},
    "Concat": _concat,
    "FullyConnected": _linear,
    "Pad": _pad,
    "RmsNorm": _norm,
    "Split": _split,
    "Transpose": lambda operator, x: x.permute(operator.parameters["perm"]),
    **dict.fromkeys(("Convert", "Dequantize", "Quantize"), _same),
}
"""What each kind of operator computes, but for Reshape, whose shape is its result's."""
