"""The small operations that a model's mathematics is composed of, as an interface with one builder for each form of graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

from torch import Tensor

V = TypeVar("V")


class Scoped:
    """A graph under construction, whose names say where in the model a thing is."""

    def __init__(self) -> None:
        self._scope: list[str] = []

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Puts `name` before the names of all that is added inside the `with` block."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def path(self, name: str, between: str = ".") -> str:
        """A name with those of the blocks that it is in."""
        return between.join([*self._scope, name])


class Builder(Protocol[V]):
    """Adds operations to a graph; sizes of one are broadcast as NumPy does."""

    def scope(self, name: str) -> AbstractContextManager[None]:
        """Puts `name` before the names of all that is added inside the `with` block."""

    def composing(self) -> AbstractContextManager[None]:
        """Marks what is added inside the `with` block: these operations together stand for one that the target does not have."""

    def number(self, value: float) -> V:
        """A constant float32 without axes."""

    def integer(self, value: int) -> V:
        """A constant int64 without axes."""

    def floats(self, values: Tensor) -> V:
        """A constant float32."""

    def to_float(self, x: V) -> V:
        """Integers as float32."""

    def add(self, a: V, b: V) -> V:
        """a + b."""

    def subtract(self, a: V, b: V) -> V:
        """a - b."""

    def multiply(self, a: V, b: V) -> V:
        """a · b, entry by entry."""

    def divide(self, a: V, b: V) -> V:
        """a / b."""

    def minimum(self, a: V, b: V) -> V:
        """The smaller of each pair."""

    def maximum(self, a: V, b: V) -> V:
        """The larger of each pair."""

    def less(self, a: V, b: V) -> V:
        """a < b."""

    def greater(self, a: V, b: V) -> V:
        """a > b."""

    def at_least(self, a: V, b: V) -> V:
        """a >= b."""

    def either(self, a: V, b: V) -> V:
        """Whether at least one of two conditions holds."""

    def where(self, condition: V, a: V, b: V) -> V:
        """a where the condition holds, else b."""

    def reciprocal(self, x: V) -> V:
        """1 / x."""

    def square_root(self, x: V) -> V:
        """√x."""

    def absolute(self, x: V) -> V:
        """|x|."""

    def round(self, x: V) -> V:
        """The nearest integer, as a float; of two equally near ones the even one."""

    def clip(self, x: V, low: V, high: V) -> V:
        """x, or the bound where x lies beyond it."""

    def tanh(self, x: V) -> V:
        """The hyperbolic tangent of each entry."""

    def sigmoid(self, x: V) -> V:
        """1 / (1 + exp(-x)) of each entry."""

    def relu(self, x: V) -> V:
        """max(x, 0) of each entry."""

    def sine(self, x: V) -> V:
        """The sine of each entry, an angle in radians."""

    def cosine(self, x: V) -> V:
        """The cosine of each entry, an angle in radians."""

    def mean(self, x: V) -> V:
        """The mean over the last axis, which is kept with size 1."""

    def smallest(self, x: V) -> V:
        """The minimum over the last axis, which is kept with size 1."""

    def largest(self, x: V) -> V:
        """The maximum over the last axis, which is kept with size 1."""

    def softmax(self, x: V) -> V:
        """The softmax over the last axis."""

    def matmul(self, a: V, b: V) -> V:
        """Matrix products over the last two axes."""

    def transpose(self, x: V, order: Sequence[int]) -> V:
        """x with its axes in another order."""

    def reshape(self, x: V, *sizes: int) -> V:
        """x [1, T, …] in the shape [1, T, *sizes]."""

    def unsqueeze(self, x: V, *axes: int) -> V:
        """x with new axes of size 1, at these places of the result's shape."""

    def split(self, x: V, sizes: Sequence[int]) -> Sequence[V]:
        """x cut along the last axis into pieces of these sizes."""

    def join(self, *parts: V) -> V:
        """The parts joined along the last axis, one after the other."""

    def select(self, x: V, indices: Sequence[int]) -> V:
        """The entries of axis 1 that have these indices, in this order."""

    def last(self, x: V) -> V:
        """The last token of x [1, T, …] alone: [1, 1, …]."""
