"""A model's operations for programs of fixed shapes: every call has room for the same number of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lobit.export.builder import Builder
from lobit.export.composed import Composed
from lobit.export.eager import TorchBuilder
from lobit.model import Block, Config, RMSNorm, bias_of, weight_of

V = TypeVar("V")


class StaticBuilder(Builder[V], Protocol[V]):
    """Small operations on values of fixed shapes, and the large ones that the processors for such programs have."""

    def output(self, value: V, name: str) -> None:
        """Makes a value an output."""

    def view(self, x: V, *shape: int) -> V:
        """x in another shape of as many entries; one size may be -1: what the others leave."""

    def append(self, axis: int, *parts: V) -> V:
        """The parts joined along an axis, one after the other."""

    def rms_norm(self, x: V, weight: Tensor | None, eps: float) -> V:
        """RMSNorm over the last axis; None: without a weight."""

    def product(self, module: nn.Module, x: V) -> V:
        """The product of x and a layer's weight, plus the bias, where there is one."""


class StaticOps(Composed[V]):
    """One call of a model that has room for `tokens` tokens.

    Args:
        build: adds the operations.
        config: the model.
        context: positions that the caches of layers without a window hold.
        tokens: tokens of the call, T.
        all_logits: whether the call gives the logits of all its tokens, not of one alone.
    """

    build: StaticBuilder[V]

    def __init__(self, build: StaticBuilder[V], config: Config, context: int, tokens: int, all_logits: bool) -> None:
        super().__init__(build, config, all_logits or tokens == 1)
        self.context, self.tokens = context, tokens

    def cached(self, layer: int, k: V, v: V) -> tuple[V, V]:
        """Keeps the call's keys and values [1, T, K, E]; returns them with those before [1, K, S, E], S as the layer's mask has it."""
        raise NotImplementedError

    def linear(self, name: str, module: nn.Module, x: V) -> V:
        """See `walk.Ops`."""
        with self.scope(name):
            return self.build.product(module, x)

    def norm(self, x: V, norm: RMSNorm) -> V:
        """See `walk.Ops`."""
        return self.build.rms_norm(x, norm.weight, norm.eps)

    def attend(self, layer: int, block: Block, x: V) -> V:
        """See `walk.Ops`."""
        return self._attention(layer, *self.heads(block, x))

    def _attention(self, layer: int, *heads: V) -> V:
        """Attention [1, T, H · E] over the cache and the call's own keys.

        The queries that share a key are rows of one product: keys that are repeated for every query head would be copied, or would leave
        the delegate.
        """
        build, config, tokens = self.build, self.config, self.tokens
        count, size = config.kv_heads, config.head_dim
        rows = config.heads // count * tokens
        q, k, v = heads
        k, v = self.cached(layer, k, v)
        q = build.transpose(q, [0, 2, 1, 3])
        q = build.view(build.multiply(q, build.number(config.scale)), 1, count, rows, size)
        scores = build.view(build.matmul(q, build.transpose(k, [0, 1, 3, 2])), 1, config.heads, tokens, -1)
        scores = self._softcap(scores, config.attention_softcap)
        shares = build.softmax(build.add(scores, self.masks[config.layers[layer].window]))
        y = build.matmul(build.view(shares, 1, count, rows, -1), v)
        y = build.transpose(build.view(y, 1, config.heads, tokens, size), [0, 2, 1, 3])
        return build.view(y, 1, tokens, config.heads * size)


def whole_shape(entries: int, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of as many entries, where one of the sizes may be -1: what the others leave."""
    left = entries // math.prod(size for size in wanted if size != -1)
    return tuple(left if size == -1 else size for size in wanted)


class EagerStaticBuilder(TorchBuilder):
    """A `StaticBuilder` that computes at once, from inputs by name.

    Args:
        ports: the inputs.
    """

    def __init__(self, ports: Mapping[str, Tensor]) -> None:
        self.ports, self.outputs = ports, dict[str, Tensor]()

    def output(self, value: Tensor, name: str) -> None:
        self.outputs[name] = value

    def view(self, x: Tensor, *shape: int) -> Tensor:
        return x.reshape(shape)

    def append(self, axis: int, *parts: Tensor) -> Tensor:
        return torch.cat(parts, axis)

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    def product(self, module: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, weight_of(module).float(), bias_of(module))
