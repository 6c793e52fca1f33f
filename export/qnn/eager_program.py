"""A program run by PyTorch: what the compiled one should compute, what it may be off by, and the ranges of its values on a text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lobit.export.qnn.compiler import SCALE
from lobit.export.qnn.eager import Constants, Each, run_graph
from lobit.export.qnn.encodings import MOVING, Encodings, Ranges, encodings_of
from lobit.export.qnn.graph import Encoding, Graph, Operator
from lobit.export.qnn.methods import client, graphs, methods, states
from lobit.export.qnn.weights import WIDE
from lobit.export.stages import Count
from lobit.export.target import Spec
from lobit.model import Transformer
from lobit.quant_recipes.precision import computing
from lobit.quant_recipes.recipe import Recipe
from lobit.runtime.client import CachedProgram, Ports

DROPPED, WIDE_OFF = 128.0, 2.0**20
"""What the HTP's products among integers of 16 bits are off by, in units of input's scale · weight's scale: with weights of 2, 4 and 8
bits their sums lose 8 bits, 0 to 256 units, whatever their length; with weights of 16 bits the root mean square is as many."""
NARROW_DROPPED, NARROW_STEPS = 256.0, 9.0
"""The same for the chips of `methods.NARROW`, and what their products are off by besides, in steps of the result."""
SHARES = {"MatMul": 2.5e-4, "Softmax": 1e-3}
"""Root mean square of what other operators are off by, relative to that of their results."""
STEPS, OTHER_STEPS = {"Tanh": 1.0, "Sigmoid": 1.5}, 0.5
"""Root mean square of what the rest is off by, by kind and of all others, in steps of the result, rounding apart."""
EXACT = (*MOVING, "Convert", "Quantize")
"""Operators that compute nothing."""


class EagerProgram:
    """Runs the methods by PyTorch (`target.RunGraph`), with a client that keeps the caches.

    Args:
        model: the converted model.
        spec: what the program is made for.
        recipe: in whose precision floats are computed; None: float32.
        each: called with every value (`eager.run_graph`); None: integers are rounded as the program has them.
    """

    def __init__(self, model: Transformer, spec: Spec, recipe: Recipe | None = None, each: Each | None = None) -> None:
        self.model, self.recipe = model, recipe
        self.graphs = graphs(model, spec)
        self.encodings: Mapping[str, Encoding] = self.graphs["decode"].encodings or {}
        self.each = each or self.rounded
        self.constants = Constants(self.graphs["decode"].weights)
        told = states(self.graphs, spec, model.config), client(self.graphs, spec, model.config)
        self.program = CachedProgram(methods(self.graphs), *told, self._row, self._run)

    def __call__(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        return torch.from_numpy(self.program.step(tokens[0].tolist(), int(input_pos)))[None]

    def rounded(self, name: str, x: Tensor) -> Tensor:
        """A value as the program has it."""
        return self.encodings[name].rounded(x) if name in self.encodings else x

    @torch.inference_mode()
    def _row(self, token: int) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self.model.embed(torch.tensor([token]))[0].float().numpy()
        return row

    @torch.inference_mode()
    def _run(self, name: str, inputs: Ports) -> Ports:
        given = {port: self._floats(port, array) for port, array in inputs.items()}
        with computing(self.recipe) if self.recipe else contextlib.nullcontext():
            found = run_graph(self.graphs[name], given, self.constants, self.each)
        return {port: self._stored(self.graphs[name], port, value) for port, value in found.items()}

    def _floats(self, port: str, array: NDArray[Any]) -> Tensor:
        """What the entries of a port stand for."""
        if port not in self.encodings:
            return torch.from_numpy(array).float()
        return self.encodings[port].values(torch.from_numpy(array.view(f"uint{8 * array.itemsize}").astype(np.float32)))

    def _stored(self, graph: Graph, port: str, x: Tensor) -> NDArray[Any]:
        """The entries of a port that stand for floats."""
        encoding = self.encodings.get(graph.outputs[port])
        if encoding is None:
            return x.numpy()
        return encoding.integers(x).numpy().astype(f"uint{encoding.bits}").view(graph.dtype(port))


class EagerReader:
    """Reads whole sequences with a program of integers (`target.Reader`).

    Args:
        program: the program, which gives the logits of every token; other readers may have it too.
        chunk: the most tokens in one call.
        each: what is done with every value.
    """

    def __init__(self, program: EagerProgram, chunk: int, each: Each) -> None:
        self.program, self.chunk, self.each = program, chunk, each

    def read(self, tokens: list[int]) -> Callable[[Sequence[int]], NDArray[np.float32]]:
        """Reads a sequence from position 0; returns a function that gives the logits [n, V] at any of its positions."""
        self.program.each = self.each
        step = self.program.program.step
        found = np.concatenate([step(tokens[at : at + self.chunk], at) for at in range(0, len(tokens), self.chunk)])
        return lambda positions: found[list(positions)]


class Moved:
    """Moves every value by as much as the HTP's operators are off, at random, before it is rounded (`eager.Each`).

    Args:
        program: the program that is to be moved.
        narrow: whether it is for one of the chips of `methods.NARROW`.
    """

    def __init__(self, program: EagerProgram, narrow: bool) -> None:
        self.program, self.narrow = program, narrow
        self.random = torch.Generator().manual_seed(0)
        self.weights = program.graphs["decode"].weights
        self.operators = {name: each for graph in program.graphs.values() for each in graph.operators for name in each.outputs}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """A value that is moved, then rounded."""
        encoding, operator = self.program.encodings.get(name), self.operators.get(name)
        if encoding is None or operator is None or operator.kind in EXACT:
            return self.program.rounded(name, x)
        if operator.kind == "FullyConnected":
            moved = self._product(operator, x, encoding)
        elif operator.kind in SHARES:
            moved = x * (1 + SHARES[operator.kind] * self._noise(x))
        else:
            moved = x + STEPS.get(operator.kind, OTHER_STEPS) * encoding.scale * self._noise(x)
        return self.program.rounded(name, moved)

    def _product(self, operator: Operator, x: Tensor, encoding: Encoding) -> Tensor:
        weight = operator.inputs[1]
        unit = self.program.encodings[operator.inputs[0]].scale * self.weights.tensors[weight + SCALE]
        if self.weights.bits[weight] == WIDE:
            return x + unit * WIDE_OFF * self._noise(x)
        lost = unit * (NARROW_DROPPED if self.narrow else DROPPED) * (1 + self._noise(x) / math.sqrt(3))
        return x - lost + self.narrow * NARROW_STEPS * encoding.scale * self._noise(x)

    def _noise(self, x: Tensor) -> Tensor:
        """Evenly distributed numbers with a root mean square of 1."""
        return math.sqrt(3) * torch.empty_like(x).uniform_(-1, 1, generator=self.random)


def found_encodings(model: Transformer, spec: Spec, count: Count) -> Encodings:
    """The encodings of a program of integers, from the ranges of its values on the spec's sequences.

    The first call of a sequence, and all in its first half, read `chunk` tokens, the others one.

    Args:
        model: the converted model.
        spec: what the program is made for.
        count: called with how many tokens are read, and how many there are.
    """
    ranges = Ranges()
    program = EagerProgram(model, spec, each=ranges)
    total, done = sum(map(len, spec.sequences)), 0
    for tokens in spec.sequences:
        at = 0
        while at < len(tokens):
            whole = at == 0 or at + spec.chunk <= len(tokens) // 2
            taken = tokens[at : at + (spec.chunk if whole else 1)]
            program.program.step(list(taken), at)
            at, done = at + len(taken), done + len(taken)
            count(done, total)
    return encodings_of(program.graphs.values(), ranges.found)
