"""The small operations that a model's mathematics is composed of: one builder for each form that a graph is written in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from torch import Tensor

V = TypeVar("V")


class Builder(Protocol[V]):
    """Adds operations to a graph; sizes of one are broadcast as NumPy does."""

    def scope(self, name: str) -> AbstractContextManager[None]:
        """Names what is added inside."""

    def composing(self) -> AbstractContextManager[None]:
        """Tells that what is added inside stands, several together, for one operator that the target does not have."""

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
        """One of two conditions, or both."""

    def where(self, condition: V, a: V, b: V) -> V:
        """a where the condition holds, else b."""

    def reciprocal(self, x: V) -> V:
        """1 / x."""

    def square_root(self, x: V) -> V:
        """√x."""

    def absolute(self, x: V) -> V:
        """|x|."""

    def round(self, x: V) -> V:
        """The nearest integer, of two the even one, as a float."""

    def clip(self, x: V, low: V, high: V) -> V:
        """x, or the bound that it exceeds."""

    def tanh(self, x: V) -> V:
        """Of each entry."""

    def sigmoid(self, x: V) -> V:
        """Of each entry."""

    def relu(self, x: V) -> V:
        """Of each entry."""

    def sine(self, x: V) -> V:
        """Of each entry, an angle in radians."""

    def cosine(self, x: V) -> V:
        """Of each entry, an angle in radians."""

    def mean(self, x: V) -> V:
        """Over the last axis, which stays with size 1; so `smallest` and `largest`."""

    def smallest(self, x: V) -> V:
        """See `mean`."""

    def largest(self, x: V) -> V:
        """See `mean`."""

    def softmax(self, x: V) -> V:
        """Over the last axis."""

    def matmul(self, a: V, b: V) -> V:
        """Products of the last two axes."""

    def transpose(self, x: V, order: Sequence[int]) -> V:
        """The axes in another order."""

    def reshape(self, x: V, *sizes: int) -> V:
        """x [1, T, …] with other sizes behind the tokens."""

    def unsqueeze(self, x: V, *axes: int) -> V:
        """New axes of size 1, at these places of the result."""

    def split(self, x: V, sizes: Sequence[int]) -> Sequence[V]:
        """Pieces of the last axis."""

    def join(self, *parts: V) -> V:
        """Pieces of the last axis, one after the other."""

    def select(self, x: V, indices: Sequence[int]) -> V:
        """Entries of axis 1, in this order."""

    def last(self, x: V) -> V:
        """x [1, 1, …] of the last token alone."""
