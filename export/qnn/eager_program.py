"""A program run by PyTorch: what the compiled one should compute, what it may be off by, and the ranges of its values on a text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lobit.export.qnn.eager import Constants, Each, run_graph
from lobit.export.qnn.encodings import Encodings, Ranges, encodings_of
from lobit.export.qnn.graph import Encoding, Graph
from lobit.export.qnn.methods import NARROW, client, graphs, methods, soc_of, states
from lobit.export.stages import Count
from lobit.export.target import Spec
from lobit.model import Transformer
from lobit.quant_recipes.precision import computing
from lobit.quant_recipes.recipe import Recipe
from lobit.runtime.client import CachedProgram, Ports

INTEGER_ERRORS: dict[str | int, float] = {"Softmax": 1e-3, 2: 3e-3, 4: 1e-3, 8: 1e-4, 16: 1e-3}
"""Root mean square of what the HTP's operators are off by among integers of 16 bits, relative to that of their results: of shares, and of
products by the bits of their weights."""
NARROW_ERRORS = INTEGER_ERRORS | {4: 1.5e-3, 8: 1e-3}
"""The same for the chips of `methods.NARROW`."""
EXACT = ("Concat", "Convert", "Pad", "Quantize", "Reshape", "Split", "Transpose")
"""Operators that compute nothing."""
STEPS = 1.0
"""The same for all other operators, in steps of the result's integers."""


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
        model: the converted model.
        spec: what the program is made for.
        moved: whether every operator is off by as much as the HTP's are.
    """

    def __init__(self, model: Transformer, spec: Spec, moved: bool = False) -> None:
        self.chunk = spec.chunk
        self.program = EagerProgram(model, replace(spec, all_logits=True))
        if moved:
            self.program.each = Moved(self.program, NARROW_ERRORS if soc_of(spec) in NARROW else INTEGER_ERRORS)

    def read(self, tokens: list[int]) -> Callable[[Sequence[int]], NDArray[np.float32]]:
        """Reads a sequence from position 0; returns a function that gives the logits [n, V] at any of its positions."""
        step = self.program.program.step
        found = np.concatenate([step(tokens[at : at + self.chunk], at) for at in range(0, len(tokens), self.chunk)])
        return lambda positions: found[list(positions)]


class Moved:
    """Moves every value at random before it is rounded (`eager.Each`).

    Args:
        program: the program that is to be moved.
        errors: root mean squares, as `INTEGER_ERRORS` has them.
    """

    def __init__(self, program: EagerProgram, errors: Mapping[str | int, float]) -> None:
        self.program, self.errors = program, errors
        self.random = torch.Generator().manual_seed(0)
        self.kinds: dict[str, str | int] = {}
        for graph in program.graphs.values():
            bits = graph.weights.bits
            for operator in graph.operators:
                kind = bits[operator.inputs[1]] if operator.kind == "FullyConnected" else operator.kind
                self.kinds |= dict.fromkeys(operator.outputs, kind)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """A value that is moved, then rounded."""
        encoding, kind = self.program.encodings.get(name), self.kinds.get(name)
        if encoding is None or kind in EXACT or kind is None:
            return self.program.rounded(name, x)
        size = STEPS * encoding.scale
        if kind in self.errors:
            size = self.errors[kind] * float(x.square().mean().sqrt())
        noise = torch.empty_like(x).uniform_(-1, 1, generator=self.random)
        return self.program.rounded(name, x + math.sqrt(3) * size * noise)


def found_encodings(model: Transformer, spec: Spec, count: Count) -> Encodings:
    """The encodings of a program of integers, from the ranges of its values on the spec's sequences.

    Half of each sequence is read in calls of `chunk` tokens, the rest token by token.

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
            whole = at + spec.chunk <= len(tokens) // 2
            taken = tokens[at : at + (spec.chunk if whole else 1)]
            program.program.step(list(taken), at)
            at, done = at + len(taken), done + len(taken)
            count(done, total)
    return encodings_of(program.graphs.values(), ranges.found)
