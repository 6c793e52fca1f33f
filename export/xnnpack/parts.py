"""A program in parts: graphs that are traced and lowered once, however many layers run them, and the values that they exchange."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

INPUTS = ("tokens", "input_pos")
OUTPUT = "logits"


@dataclass(frozen=True)
class PerToken:
    """A size that follows the number of tokens T of a call: times · T + plus."""

    times: int = 1
    plus: int = 0

    def at(self, length: int) -> int:
        """The size in a call of `length` tokens."""
        return self.times * length + self.plus


Size = int | PerToken


@dataclass(frozen=True)
class Value:
    """A tensor that parts read or make."""

    shape: tuple[Size, ...]
    dtype: torch.dtype = torch.float32
    memory: str | None = None
    """Name of the cache whose first rows the value is; None: it is a tensor of its own."""
    overlay: str | None = None
    """Name of the value's overlay. Values of one overlay are never needed together, so they may lie in the same place."""
    constant: Tensor | None = field(default=None, compare=False)

    def sizes(self, length: int) -> list[int]:
        """The shape in a call of `length` tokens."""
        return [size.at(length) if isinstance(size, PerToken) else size for size in self.shape]

    def bytes(self, length: int) -> int:
        """Bytes of memory in a call of `length` tokens."""
        return math.prod(self.sizes(length)) * self.dtype.itemsize


@dataclass(frozen=True)
class Step:
    """One run of a part."""

    kind: str
    """What it does, in a few words."""
    module: nn.Module
    """The module that runs, with the weights of this step."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    delegated: bool = True
    """Whether the target's delegate may take it."""


@dataclass(frozen=True)
class Choice:
    """Runs the steps of the first case whose flag is true; the flag None counts as true."""

    cases: tuple[tuple[str | None, tuple[Step, ...]], ...]


@dataclass
class Parts:
    """What runs in a call, in order: `INPUTS` in, `OUTPUT` out."""

    values: dict[str, Value] = field(default_factory=dict)
    memories: dict[str, Value] = field(default_factory=dict)
    """Caches: they keep their contents from call to call. Their rows are along axis 1."""
    steps: list[Step | Choice] = field(default_factory=list)

    def every_step(self) -> Iterator[Step]:
        """All steps in order, those of every case included."""
        for step in self.steps:
            if isinstance(step, Step):
                yield step
            else:
                for _, steps in step.cases:
                    yield from steps

    _parts: dict[Step, str] = field(default_factory=dict)

    def part_of(self, step: Step) -> str:
        """Names the part of a step by all that its graph depends on, except weights: steps of one part have one graph."""
        if step not in self._parts:
            self._parts[step] = self._describe(step)
        return self._parts[step]

    def _describe(self, step: Step) -> str:
        modules = [f"{name}:{type(module).__name__}({module.extra_repr()})" for name, module in step.module.named_modules()]
        tensors = [f"{name}:{tensor.dtype}{list(tensor.shape)}" for name, tensor in step.module.state_dict().items()]
        ports = [f"{self.values[name].dtype}{list(self.values[name].shape)}" for name in step.inputs]
        return "\n".join([step.kind, *modules, *tensors, *ports])

    def place_of(self, name: str) -> str | None:
        """Where a value lies: its cache, its overlay, or a place of its own; None: it is an input or a constant."""
        value = self.values[name]
        return None if name in INPUTS or value.constant is not None else value.memory or value.overlay or name

    def places(self, length: int) -> dict[str, int]:
        """Bytes of every place, in a call of `length` tokens."""
        sizes = {name: value.bytes(length) for name, value in self.memories.items()}
        for name, value in self.values.items():
            place = self.place_of(name)
            if place is not None:
                sizes[place] = max(sizes.get(place, 0), value.bytes(length))
        return sizes

    def distinct(self) -> dict[str, Step]:
        """The first step of each part."""
        found: dict[str, Step] = {}
        for step in self.every_step():
            found.setdefault(self.part_of(step), step)
        return found


Run = Callable[[Step, Sequence[Tensor]], Sequence[Tensor]]
"""Runs a step on its inputs and returns its outputs; writes into caches in place."""


def run_eagerly(step: Step, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Runs the step's module as it is."""
    result: Any = step.module(*inputs)
    return result if isinstance(result, tuple) else (result,)


class Interpreter:
    """Runs a program in PyTorch, part by part.

    Args:
        parts: the program.
        run: the function that runs a step.
    """

    def __init__(self, parts: Parts, run: Run = run_eagerly) -> None:
        self.parts, self.run = parts, run
        self.memories = {name: torch.zeros(value.sizes(0), dtype=value.dtype) for name, value in parts.memories.items()}

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """Logits float32 [1, 1, V] of the last token, or [1, T, V], of tokens int64 [1, T] from position input_pos int64 [1] on."""
        made = dict(zip(INPUTS, (tokens, input_pos), strict=True))
        for step in self.parts.steps:
            for one in self._chosen(step, made):
                outputs = self.run(one, [self._value(name, made) for name in one.inputs])
                made.update(zip(one.outputs, outputs, strict=True))
        return made[OUTPUT]

    @staticmethod
    def _chosen(step: Step | Choice, made: Mapping[str, Tensor]) -> tuple[Step, ...]:
        if isinstance(step, Step):
            return (step,)
        return next((steps for flag, steps in step.cases if flag is None or bool(made[flag])), ())

    def _value(self, name: str, made: Mapping[str, Tensor]) -> Tensor:
        value = self.parts.values[name]
        if value.constant is not None:
            return value.constant
        if value.memory is not None:
            return self.memories[value.memory].narrow(1, 0, value.sizes(0)[1])
        return made[name]
