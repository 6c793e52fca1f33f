"""A model's operations in the form that the HTP takes whole: a fixed number of tokens, caches that come in, rows that go out."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from lobit.export.builder import Builder
from lobit.export.composed import Composed, windows
from lobit.model import Block, Config, RMSNorm
from lobit.runtime.qnn_ports import EMBEDDINGS, LAST, LOGITS, cache_names, mask_name, rotary_names

V = TypeVar("V")


class HtpBuilder(Builder[V], Protocol[V]):
    """Small operations, and those that the HTP has beyond them; values have fixed shapes."""

    def input(self, name: str, *shape: int) -> V:
        """An input."""

    def output(self, value: V, name: str) -> None:
        """Makes a value an output."""

    def view(self, x: V, *shape: int) -> V:
        """x in another shape of as many entries."""

    def append(self, axis: int, *parts: V) -> V:
        """The parts joined along an axis, one after the other."""

    def kept(self, x: V) -> V:
        """Rows as caches keep them."""

    def choose(self, chosen: V, x: V) -> V:
        """The row [1, 1, n] of x [1, T, n] at which `chosen` [1, 1, T] is 1, and not 0."""

    def rms_norm(self, x: V, weight: Tensor, eps: float) -> V:
        """RMSNorm over the last axis."""

    def product(self, module: nn.Module, x: V) -> V:
        """The product of x and a layer's weight, plus the bias, where there is one."""


class HtpOps(Composed[V]):
    """One call of a model that reads `tokens` tokens; the client looks up embeddings and gives masks and rotary tables.

    Args:
        build: adds the operations.
        config: the model.
        context: positions that the caches of layers without a window hold.
        tokens: tokens of the call, T.
        all_logits: whether the call gives the logits of all its tokens, not of one alone.
    """

    build: HtpBuilder[V]

    def __init__(self, build: HtpBuilder[V], config: Config, context: int, tokens: int, all_logits: bool) -> None:
        super().__init__(build, config, all_logits or tokens == 1)
        self.context, self.tokens = context, tokens
        self.caches: list[tuple[V, V]] = []

    def begin(self) -> V:
        """See `walk.Ops`; returns the embeddings."""
        build, config, tokens = self.build, self.config, self.tokens
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

    def norm(self, x: V, norm: RMSNorm) -> V:
        """See `walk.Ops`."""
        if norm.weight is None:
            norm.weight = nn.Parameter(torch.ones(norm.size), requires_grad=False)  # the operator needs one
        return self.build.rms_norm(x, norm.weight, norm.eps)

    def linear(self, name: str, module: nn.Module, x: V) -> V:
        """See `walk.Ops`."""
        with self.scope(name):
            return self.build.product(module, x)

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

    def scope(self, name: str) -> AbstractContextManager[None]:
        """See `walk.Ops`."""
        return self.build.scope(name)

    def attend(self, layer: int, block: Block, x: V) -> V:
        """See `walk.Ops`."""
        return self._attention(layer, *self.heads(block, x))

    def _attention(self, layer: int, *heads: V) -> V:
        """Attention [1, T, H · E] over the cache and the call's own keys.

        The queries that share a key are rows of one product: keys that are repeated for every query head would leave the delegate.
        """
        build, config, tokens = self.build, self.config, self.tokens
        count, size = config.kv_heads, config.head_dim
        rows, slots = config.heads // count * tokens, config.cache_slots(self.context)[layer] + tokens
        q, k, v = (build.transpose(part, [0, 2, 1, 3]) for part in heads)
        k, v = build.kept(k), build.kept(v)
        k_all, v_all = (build.append(2, before, new) for before, new in zip(self.caches[layer], (k, v), strict=True))
        for value, (_, name) in zip((k, v), cache_names(layer), strict=True):
            build.output(value, name)
        q = build.view(build.multiply(q, build.number(config.scale)), 1, count, rows, size)
        scores = build.view(build.matmul(q, build.transpose(k_all, [0, 1, 3, 2])), 1, config.heads, tokens, slots)
        scores = self._softcap(scores, config.attention_softcap)
        shares = build.softmax(build.add(scores, self.masks[config.layers[layer].window]))
        y = build.matmul(build.view(shares, 1, count, rows, slots), v_all)
        y = build.transpose(build.view(y, 1, config.heads, tokens, size), [0, 2, 1, 3])
        return build.view(y, 1, tokens, config.heads * size)

    def score(self, head: nn.Module, x: V) -> None:
        """See `walk.Ops`."""
        self.build.output(self.logits(head, x), LOGITS)
