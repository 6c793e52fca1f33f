"""A model's operations in the form that the HTP takes whole: a fixed number of tokens, caches that come in, rows that go out."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import nn

from lobit.export.composed import windows
from lobit.export.static import StaticBuilder, StaticOps
from lobit.runtime.qnn_ports import EMBEDDINGS, LAST, LOGITS, cache_names, mask_name, rotary_names

V = TypeVar("V")


class HtpBuilder(StaticBuilder[V], Protocol[V]):
    """Operations on values of the HTP, half floats or integers."""

    def input(self, name: str, *shape: int) -> V:
        """An input."""


    def kept(self, x: V) -> V:
        """Rows as caches keep them."""

    def choose(self, chosen: V, x: V) -> V:
        """The row [1, 1, n] of x [1, T, n] at which `chosen` [1, 1, T] is 1, and not 0."""


class HtpOps(StaticOps[V]):
    """One call of a model, for which the client looks up embeddings and gives masks and rotary tables (see `StaticOps`)."""

    build: HtpBuilder[V]
    caches: list[tuple[V, V]]

    def begin(self) -> V:
        """See `walk.Ops`; returns the embeddings."""
        build, config, tokens = self.build, self.config, self.tokens
        self.caches = []
        embeddings = build.input(EMBEDDINGS, 1, tokens, config.hidden_size)
        for index, rope in enumerate(self.ropes):
            cos, sin = (build.input(name, 1, tokens, 1, rope.dim // 2) for name in rotary_names(index))
            self.tables[rope] = cos, sin
        for index, window in enumerate(windows(config)):
            self.masks[window] = build.input(mask_name(index), 1, 1, tokens, min(window or self.context, self.context) + tokens)
        if not self.all_logits:
            self.chosen = build.input(LAST, 1, 1, tokens)
        for layer, slots in enumerate(config.cache_slots(self.context)):
            k, v = (build.input(before, 1, config.kv_heads, slots, config.head_dim) for before, _ in cache_names(layer))
            self.caches.append((k, v))
        return embeddings

    def embed(self, embedding: nn.Module, tokens: V) -> V:
        """See `walk.Ops`: the client has looked up and scaled the rows."""
        return tokens

    def last(self, x: V) -> V:
        """See `walk.Ops`: the client marks the token that gets logits, as a call may read fewer tokens than it has room for."""
        return x if self.all_logits else self.build.choose(self.chosen, x)

    def activate(self, x: V) -> V:
        """See `walk.Ops`. SiLU is x · sigmoid(x) = h + h · tanh(h) with h = x / 2.

        For one token Qualcomm's compiler joins a product and the SiLU of its result, written with a sigmoid, to one operator that is
        coarse: the logits of a model of four layers were off by 1.2e-2 with it, by 3.7e-3 in this form.
        """
        if self.config.activation != "silu":
            return super().activate(x)
        build = self.build
        half = build.multiply(x, build.number(0.5))
        return build.add(half, build.multiply(half, build.tanh(half)))

    def cached(self, layer: int, k: V, v: V) -> tuple[V, V]:
        """See `StaticOps.cached`: the call's own rows are outputs, which the client writes into the caches."""
        build, found = self.build, []
        for before, value, (_, name) in zip(self.caches[layer], (k, v), cache_names(layer), strict=True):
            rows = build.kept(build.transpose(value, [0, 2, 1, 3]))
            build.output(rows, name)
            found.append(build.append(2, before, rows))
        return found[0], found[1]

    def score(self, head: nn.Module, x: V) -> None:
        """See `walk.Ops`."""
        self.build.output(self.logits(head, x), LOGITS)
