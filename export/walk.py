"""Walks through a model in the order in which data flows, and calls a target's operations, which make the graph."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from torch import nn

from lobit.model import Block, RMSNorm, Transformer

V = TypeVar("V")
"""A value of the graph: a name where nodes are written, a tensor where they run at once."""


class Ops(Protocol[V]):
    """A model's operations, as targets provide them; T tokens, D hidden size, H heads, E head size, F feed-forward size, V vocabulary."""

    def scope(self, name: str) -> AbstractContextManager[None]:
        """Puts `name` before the names of all that is added inside the `with` block."""

    def begin(self) -> V:
        """Declares the inputs and all that depends on positions alone; returns the tokens int64 [1, T]."""

    def embed(self, embedding: nn.Module, tokens: V) -> V:
        """The residual stream [1, T, D] that the tokens begin with: their rows of the embedding, scaled."""

    def norm(self, x: V, norm: RMSNorm) -> V:
        """RMSNorm over the last axis."""

    def add_norm(self, x: V, delta: V | None, norm: RMSNorm) -> tuple[V, V]:
        """The residual stream x with `delta` added, where there is one, and the same after the norm."""

    def attend(self, layer: int, block: Block, x: V) -> V:
        """Attention [1, T, H · E] of the normed stream [1, T, D], before the output product; keeps keys and values."""

    def linear(self, name: str, module: nn.Module, x: V) -> V:
        """The product of x and a weight [out, in], plus the bias, where there is one."""

    def gate_up(self, block: Block, x: V) -> Sequence[V]:
        """The gate and up products, each [1, T, F]."""

    def activate(self, x: V) -> V:
        """Applies the feed-forward's nonlinearity to the gate x."""

    def multiply(self, a: V, b: V) -> V:
        """a · b, entry by entry."""

    def last(self, x: V) -> V:
        """The tokens of x [1, T, n] that get logits: the last one, or all."""

    def score(self, head: nn.Module, x: V) -> None:
        """Makes the logits of the normed stream x the output."""


def walk(model: Transformer, ops: Ops[V]) -> None:
    """Goes through a converted model once.

    Args:
        model: the converted model. For a graph in a file, its tensors are stored when that is written, and may have no memory until then.
        ops: the target's operations.
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
    """x after a norm that only some families have; x itself in the others."""
    return ops.norm(x, norm) if isinstance(norm, RMSNorm) else x
