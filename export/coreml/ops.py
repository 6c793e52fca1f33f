"""A model's operations in the form that Core ML takes: a fixed number of tokens, caches that are states or inputs of fixed shapes."""

from __future__ import annotations

import functools
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lobit.export.composed import windows
from lobit.export.static import StaticBuilder, StaticOps
from lobit.model import Config
from lobit.rope import Rope
from lobit.runtime.coreml_ports import LAST, LOGITS, POSITION, TOKENS, cache_names, row_names

V = TypeVar("V")
HIDDEN = -10_000.0
"""Added to the score of a key that a query must not see; half precision holds it."""
MULTIPLE = 32
"""What sizes of states are a multiple of; Apple's neural engine is said to fail with others (coremltools, issue 2631)."""


class CoreMlBuilder(StaticBuilder[V], Protocol[V]):
    """Operations of MIL beyond those of other programs of fixed shapes."""

    def input(self, name: str, dtype: str, *shape: int) -> V:
        """An input; `float`: of the floats that are computed."""

    def state(self, name: str, *shape: int) -> Any:
        """A state of half floats, zeros at first."""

    def integers(self, values: NDArray[np.int32]) -> V:
        """A constant of whole numbers."""

    def table(self, name: str, values: Tensor) -> V:
        """A constant of floats that is stored once under its name."""

    def embedding(self, module: nn.Module, tokens: V) -> V:
        """The rows [1, T, D] of an embedding."""

    def to_logits(self, x: V) -> V:
        """x as float32."""

    def modulo(self, a: V, b: V) -> V:
        """What is left when whole numbers a, none below zero, are divided by b."""

    def silu(self, x: V) -> V:
        """x · sigmoid(x)."""

    def gelu(self, x: V) -> V:
        """GELU by its approximation with tanh."""

    def gather(self, x: V, indices: V, axis: int) -> V:
        """The entries of an axis that have these indices."""

    def read(self, state: Any) -> V:
        """What a state [1, S, W] holds."""

    def update(self, state: Any, rows: V, slot: V) -> V:
        """Writes rows [1, n, w] into a state [1, S, W] from a slot [1] on; returns all of it."""

    def replace(self, state: Any, value: V) -> V:
        """Replaces all that a state holds; returns it."""

    def columns(self, x: V, count: int) -> V:
        """The first `count` columns of x [1, S, W]."""

    def widened(self, x: V, count: int) -> V:
        """x [1, S, W] filled up with columns of zeros."""


def rounded_up(size: int) -> int:
    """The next multiple of `MULTIPLE`."""
    return -(-size // MULTIPLE) * MULTIPLE


def slots(config: Config, context: int, chunk: int, explicit: bool) -> list[int]:
    """Positions that each layer's cache has room for.

    A call of `prefill` writes all its rows, those of no tokens too, one after the other: a state has room for them behind the context.
    A layer with a window has a ring, where position p is in slot p modulo their number: it keeps the window, and what the call writes.
    """
    if explicit:
        return config.cache_slots(context)
    whole = rounded_up(context + chunk - 1)
    return [min(rounded_up(layer.window + chunk), whole) if layer.window else whole for layer in config.layers]


@functools.lru_cache(maxsize=8)
def rotary_tables(rope: Rope, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [count, dim / 2] of all positions: half floats would not hold the angles of large ones."""
    frequencies, factor = rope.frequencies()
    angles = torch.arange(count).float()[:, None] * frequencies
    return torch.cos(angles) * factor, torch.sin(angles) * factor


class CoreMlOps(StaticOps[V]):
    """One call of a model that knows the tokens and the position of the first.

    Args:
        build, config, context, tokens, all_logits: see `StaticOps`.
        chunk: tokens of the longest call.
        explicit: whether caches are inputs, and the call's own rows outputs; otherwise caches are states.
    """

    build: CoreMlBuilder[V]

    def __init__(
        self, build: CoreMlBuilder[V], config: Config, context: int, tokens: int, all_logits: bool, chunk: int, explicit: bool
    ) -> None:
        super().__init__(build, config, context, tokens, all_logits)
        self.slots, self.explicit, self.chunk = slots(config, context, chunk, explicit), explicit, chunk
        self.whole, self.width = rounded_up(context + chunk - 1), rounded_up(config.kv_heads * config.head_dim)
        self.caches: list[tuple[Any, Any]] = []
        self.angles = [rotary_tables(rope, context + chunk) for rope in self.ropes]
        self.rings: dict[int, tuple[V, V]] = {}
        """For a ring of so many slots, which of the call's tokens each slot takes [R], and whether there is one [1, R, 1]."""

    def is_ring(self, layer: int) -> bool:
        """Whether a layer's state is written as a ring."""
        return not self.explicit and self.slots[layer] < self.whole

    # --- positions ------------------------------------------------------------------------------------------------------------------

    def begin(self) -> V:
        """See `walk.Ops`."""
        build, config, tokens = self.build, self.config, self.tokens
        found = build.input(TOKENS, "int32", 1, tokens)
        self.position = build.input(POSITION, "int32", 1)
        self.positions = build.add(self.position, build.integers(np.arange(tokens, dtype=np.int32)))
        self.token: V | None = None
        if not self.all_logits or (tokens > 1 and any(self.is_ring(layer) for layer in range(len(config.layers)))):
            self.token = build.input(LAST, "int32", 1)
        self.end = self.position if self.token is None else build.add(self.position, self.token)
        for layer, count in enumerate(self.slots):
            names = cache_names(layer)
            if self.explicit:
                k, v = (build.input(name, "float", 1, count, config.kv_heads * config.head_dim) for name in names)
            else:
                k, v = (build.state(name, 1, count, self.width) for name in names)
            self.caches.append((k, v))
        self._rotary()
        self._masks()
        return found

    def _rotary(self) -> None:
        """Fills `tables` with the rows of the call's positions."""
        build = self.build
        for rope, (cos, sin) in zip(self.ropes, self.angles, strict=True):
            names = zip(("cos", "sin"), (cos, sin), strict=True)
            told = [build.table(f"{name}_{len(self.tables)}", values) for name, values in names]
            real, imaginary = (build.unsqueeze(build.gather(table, self.positions, 0), 0, 2) for table in told)
            self.tables[rope] = real, imaginary

    def _masks(self) -> None:
        """Fills `masks` [T, S], as the keys lie in each layer's cache after `cached`."""
        build = self.build
        for window in windows(self.config):
            layer = next(index for index, each in enumerate(self.config.layers) if each.window == window)
            keys = self._keys(layer)
            distance = build.subtract(build.unsqueeze(self.positions, 1), keys)
            hidden = build.less(distance, build.integer(0))
            if self.explicit or self.is_ring(layer):
                hidden = build.either(hidden, build.less(keys, build.integer(0)))
            if window is not None:
                hidden = build.either(hidden, build.at_least(distance, build.integer(window)))
            self.masks[window] = build.multiply(build.to_float(hidden), build.number(HIDDEN))

    def _keys(self, layer: int) -> V:
        """Positions of a layer's keys; of slots that hold nothing yet, a number below 0."""
        build, count = self.build, self.slots[layer]
        index = build.integers(np.arange(count, dtype=np.int32))
        if self.explicit:
            before = build.subtract(self.position, build.integer(1))
            return build.append(0, self._latest(before, index, count), self.positions)
        return self._latest(self.end, index, count) if self.is_ring(layer) else index

    def _latest(self, end: V, index: V, count: int) -> V:
        """The latest position up to `end` that belongs into each slot: end - (end - slot) modulo the number of slots."""
        build = self.build
        # The number of slots is added, so that nothing below zero is divided.
        age = build.modulo(build.add(build.subtract(end, index), build.integer(count)), build.integer(count))
        return build.subtract(end, age)

    # --- operations of `walk.Ops` ---------------------------------------------------------------------------------------------------

    def rows(self, embedding: nn.Module, tokens: V) -> V:
        """See `Composed.rows`."""
        return self.build.embedding(embedding, tokens)

    def cached(self, layer: int, k: V, v: V) -> tuple[V, V]:
        """See `StaticOps.cached`; rows are written as the products give them, without a transpose before (coremltools, issue 2275)."""
        build, config = self.build, self.config
        width, found = config.kv_heads * config.head_dim, []
        for cache, value, name in zip(self.caches[layer], (k, v), row_names(layer), strict=True):
            rows = build.view(value, 1, self.tokens, width)
            if self.explicit:
                build.output(rows, name)
                every = build.append(1, cache, rows)
            else:
                every = build.columns(self._written(layer, cache, rows), width)
            found.append(build.transpose(build.view(every, 1, -1, config.kv_heads, config.head_dim), [0, 2, 1, 3]))
        return found[0], found[1]

    def _written(self, layer: int, state: Any, rows: V) -> V:
        """Writes rows [1, T, W] into a layer's state, and returns all of it [1, S, W]."""
        build, count = self.build, self.slots[layer]
        if not self.is_ring(layer):
            return build.update(state, rows, self.position)
        if self.tokens == 1:
            return build.update(state, rows, build.modulo(self.position, build.integer(count)))
        if count not in self.rings:
            self.rings[count] = self._taken(count)
        source, taken = self.rings[count]
        after = build.where(taken, build.gather(build.widened(rows, self.width), source, 1), build.read(state))
        return build.replace(state, after)

    def _taken(self, count: int) -> tuple[V, V]:
        """See `rings`: token i goes to slot (position + i) modulo the number of slots; tokens after the last are not taken."""
        build, number = self.build, self.build.integer
        assert self.token is not None
        index = build.integers(np.arange(count, dtype=np.int32))
        start = build.modulo(self.position, number(count))
        source = build.modulo(build.add(build.subtract(index, start), number(count)), number(count))
        taken = build.at_least(self.token, source)
        return build.minimum(source, number(self.tokens - 1)), build.unsqueeze(taken, 0, 2)

    def last(self, x: V) -> V:
        """See `walk.Ops`: the token that gets logits is told, as a call may read fewer tokens than it has room for."""
        if self.all_logits:
            return x
        assert self.token is not None
        return self.build.gather(x, self.token, 1)

    def activate(self, x: V) -> V:
        """See `walk.Ops`."""
        match self.config.activation:
            case "silu":
                return self.build.silu(x)
            case "gelu_tanh":
                return self.build.gelu(x)
        return super().activate(x)

    def score(self, head: nn.Module, x: V) -> None:
        """See `walk.Ops`."""
        self.build.output(self.build.to_logits(self.logits(head, x)), LOGITS)
