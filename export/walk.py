"""A model in the order of the data, for graphs that are written: what the walk asks of a target's operations, and the walk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from torch import nn

from lobit.model import Block, RMSNorm, Transformer

V = TypeVar("V")
"""A value of the graph: a name where nodes are written, a tensor where they run at once."""


class Ops(Protocol[V]):
    """The operations of a model; T tokens, D hidden size, H heads, E head size, F feed-forward size, V vocabulary."""

    def scope(self, name: str) -> AbstractContextManager[None]:
        """Names what is added inside."""

    def begin(self) -> V:
        """Declares the inputs, and all that follows from positions; the tokens int64 [1, T]."""

    def embed(self, embedding: nn.Module, tokens: V) -> V:
        """The stream [1, T, D] of tokens."""

    def norm(self, x: V, norm: RMSNorm) -> V:
        """RMSNorm over the last axis."""

    def add_norm(self, x: V, delta: V | None, norm: RMSNorm) -> tuple[V, V]:
        """The stream after `delta` was added to it, and its norm."""

    def attend(self, layer: int, block: Block, x: V) -> V:
        """What of the normed stream [1, T, D] attention gives: [1, T, H · E]; keeps keys and values."""

    def linear(self, name: str, module: nn.Module, x: V) -> V:
        """A product with a weight [out, in], and its bias."""

    def gate_up(self, block: Block, x: V) -> Sequence[V]:
        """Gate and up, each [1, T, F]."""

    def activate(self, x: V) -> V:
        """The gate's nonlinearity."""

    def multiply(self, a: V, b: V) -> V:
        """Entry by entry."""

    def last(self, x: V) -> V:
        """What of x [1, T, n] has logits: the last token, or all."""

    def score(self, head: nn.Module, x: V) -> None:
        """Gives out the logits of the normed stream."""


def walk(model: Transformer, ops: Ops[V]) -> None:
    """Goes through a converted model once.

    Args:
        model: its tensors are stored when the graph is written, and may have no memory until then.
        ops: of a target.
    """
    config, delta = model.config, None
    x = ops.embed(model.embedding, ops.begin())
    count = len(config.layers)
    for layer in range(count):
        block = model.blocks[layer // config.repeats]
        with ops.scope(f"layers.{layer}.attention"):
            x, y = ops.add_norm(x, delta, block.attention_norm)
            y = ops.attend(layer, block, y)
            if layer == count - 1:
                # From here on tokens do not need each other.
                x, y = ops.last(x), ops.last(y)
            y = ops.norm(y, block.attention.sub_norm) if config.sub_norms else y
            delta = _normed(ops, block.post_attention_norm, ops.linear("o", block.attention.o, y))
        with ops.scope(f"layers.{layer}.mlp"):
            x, y = ops.add_norm(x, delta, block.mlp_norm)
            gate, up = ops.gate_up(block, y)
            y = ops.multiply(ops.activate(gate), up)
            y = ops.norm(y, block.mlp.sub_norm) if config.sub_norms else y
            delta = _normed(ops, block.post_mlp_norm, ops.linear("down", block.mlp.down, y))
    _, x = ops.add_norm(x, delta, model.norm)
    ops.score(model.head, x)


def _normed(ops: Ops[V], norm: nn.Module, x: V) -> V:
    """Through a norm that only some families have."""
    return ops.norm(x, norm) if isinstance(norm, RMSNorm) else x
