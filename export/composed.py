"""A model's mathematics in small operations, for the parts of it that a target has no operator of its own for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

import torch
from torch import nn

from lobit.export.builder import Builder
from lobit.model import Block, Config, RMSNorm
from lobit.quant_recipes.recipe import Rule
from lobit.rope import Rope

V = TypeVar("V")
MASKED = -1e9
"""Added to the score of a key that a query must not see."""
EPS = float(torch.finfo(torch.float32).eps)


def ropes(config: Config) -> list[Rope]:
    """The rotary embeddings of a model's layers, each once."""
    return sorted({layer.rope for layer in config.layers if layer.rope}, key=repr)


def windows(config: Config) -> list[int | None]:
    """The attention windows of a model's layers, each once; None: a layer that sees the whole context."""
    return sorted({layer.window for layer in config.layers}, key=str)


class Composed(Generic[V]):
    """Implements most of `walk.Ops` in small operations; a target adds how it stores weights and keeps states, and its own operators.

    Args:
        build: adds the operations.
        config: the model.
        all_logits: whether a call gives the logits of all its tokens, not of the last alone.
    """

    def __init__(self, build: Builder[V], config: Config, all_logits: bool) -> None:
        self.build, self.config, self.all_logits = build, config, all_logits
        self.ropes = ropes(config)
        self.tables: dict[Rope, tuple[V, V]] = {}
        """Cosine and sine [T, 1, dim / 2] of each rotary embedding."""
        self.rounded: dict[tuple[V, str], V] = {}
        """Inputs that are rounded already, by input and rule: q, k and v read the same one."""
        self.masks: dict[int | None, V] = {}
        """A mask [T, S] for each window: 0 where a query sees a key, `MASKED` where it does not."""

    # --- what a target adds ---------------------------------------------------------------------------------------------------------

    def rows(self, embedding: nn.Module, tokens: V) -> V:
        """The rows [1, T, D] of the embedding that belong to the tokens."""
        raise NotImplementedError

    def linear(self, name: str, module: nn.Module, x: V) -> V:
        """See `walk.Ops`."""
        raise NotImplementedError

    def norm_weight(self, norm: RMSNorm) -> V:
        """The weight [n] of a norm that has one."""
        raise NotImplementedError

    def extend(self, layer: int, k: V, v: V) -> tuple[V, V]:
        """Appends the call's keys and values [1, K, T, E] to those so far; keeps and returns all of them [1, K, S, E]."""
        raise NotImplementedError

    # --- positions ------------------------------------------------------------------------------------------------------------------

    def cos_sin(self, positions: V) -> None:
        """Fills `tables` with cosines and sines of the call's positions [T]."""
        build = self.build
        at = build.unsqueeze(build.to_float(positions), 1, 2)
        for rope in self.ropes:
            frequencies, factor = rope.frequencies()
            angles = build.multiply(at, build.floats(frequencies))
            cos, sin = (build.multiply(turn(angles), build.number(factor)) for turn in (build.cosine, build.sine))
            self.tables[rope] = cos, sin

    def mask(self, positions: V, keys: V) -> None:
        """Fills `masks`: which keys, at positions [S], the queries, at positions [T], see."""
        build = self.build
        distance = build.subtract(build.unsqueeze(positions, 1), keys)
        for window in windows(self.config):
            hidden = build.less(distance, build.integer(0))
            if window is not None:
                hidden = build.either(hidden, build.at_least(distance, build.integer(window)))
            self.masks[window] = build.where(hidden, build.number(MASKED), build.number(0.0))

    # --- operations of `walk.Ops` ---------------------------------------------------------------------------------------------------

    def scope(self, name: str) -> AbstractContextManager[None]:
        """See `walk.Ops`."""
        return self.build.scope(name)

    def multiply(self, a: V, b: V) -> V:
        """See `walk.Ops`."""
        return self.build.multiply(a, b)

    def embed(self, embedding: nn.Module, tokens: V) -> V:
        """See `walk.Ops`."""
        with self.scope("embedding"):
            rows = self.rows(embedding, tokens)
        scale = self.config.embedding_scale
        return rows if scale == 1.0 else self.build.multiply(rows, self.build.number(scale))

    def norm(self, x: V, norm: RMSNorm) -> V:
        """See `walk.Ops`."""
        build = self.build
        mean = build.mean(build.multiply(x, x))
        y = build.divide(x, build.square_root(build.add(mean, build.number(norm.eps))))
        return y if norm.weight is None else build.multiply(y, self.norm_weight(norm))

    def add_norm(self, x: V, delta: V | None, norm: RMSNorm) -> tuple[V, V]:
        """See `walk.Ops`."""
        x = x if delta is None else self.build.add(x, delta)
        return x, self.norm(x, norm)

    def last(self, x: V) -> V:
        """See `walk.Ops`."""
        return x if self.all_logits else self.build.last(x)

    def attend(self, layer: int, block: Block, x: V) -> V:
        """See `walk.Ops`."""
        heads = self.heads(block, x)
        with self.build.composing():
            return self._attention(layer, *heads)

    def heads(self, block: Block, x: V) -> tuple[V, V, V]:
        """q [1, T, H, E], k and v [1, T, K, E], normed and rotated where the model does so."""
        attention = block.attention
        counts = (self.config.heads, self.config.kv_heads, self.config.kv_heads)
        parts = zip(self.project(block, x), counts, strict=True)
        q, k, v = (self.build.reshape(part, count, self.config.head_dim) for part, count in parts)
        if self.config.qk_norm != "none":
            q, k = self.norm(q, attention.q_norm), self.norm(k, attention.k_norm)
        if attention.rope:
            q, k = self.rotate(q, attention.rope), self.rotate(k, attention.rope)
        return q, k, v

    def project(self, block: Block, x: V) -> Sequence[V]:
        """q [1, T, H · E], k and v [1, T, K · E]."""
        return [self.linear(name, getattr(block.attention, name), x) for name in "qkv"]

    def rotate(self, x: V, rope: Rope) -> V:
        """Rotary embedding of x [1, T, heads, E]."""
        with self.build.composing():
            return self._rotate_halves(x, rope)

    def gate_up(self, block: Block, x: V) -> Sequence[V]:
        """See `walk.Ops`."""
        return [self.linear(name, getattr(block.mlp, name), x) for name in ("gate", "up")]

    def activate(self, x: V) -> V:
        """See `walk.Ops`."""
        build = self.build
        match self.config.activation:
            case "gelu_tanh":
                cubed = build.multiply(build.multiply(build.multiply(x, x), x), build.number(0.044715))
                inner = build.multiply(build.add(x, cubed), build.number(math.sqrt(2 / math.pi)))
                shifted = build.add(build.tanh(inner), build.number(1.0))
                return build.multiply(build.multiply(x, build.number(0.5)), shifted)
            case "relu2":
                positive = build.relu(x)
                return build.multiply(positive, positive)
        return build.multiply(x, build.sigmoid(x))

    def logits(self, head: nn.Module, x: V) -> V:
        """Logits of the normed residual stream, with the model's softcap."""
        found = self.linear("head", head, x)
        with self.build.composing():
            return self._softcap(found, self.config.logits_softcap)

    def round_tokens(self, x: V, rule: Rule) -> V:
        """x [1, T, n] rounded to each token's INT8 grid (`quant_recipes.grid.quantize_tokens`), once for all products that read it."""
        key = x, rule.activation_rule
        if key not in self.rounded:
            self.rounded[key] = self._rounded(x, rule)
        return self.rounded[key]

    # --- formulas -------------------------------------------------------------------------------------------------------------------

    def _attention(self, layer: int, *heads: V) -> V:
        """Attention [1, T, H · E] of q [1, T, H, E], k and v [1, T, K, E]."""
        build, config = self.build, self.config
        q, k, v = (build.transpose(part, [0, 2, 1, 3]) for part in heads)
        k_all, v_all = self.extend(layer, k, v)
        k, v = self._repeated(k_all), self._repeated(v_all)
        q = build.multiply(q, build.number(config.scale))
        scores = self._softcap(build.matmul(q, build.transpose(k, [0, 1, 3, 2])), config.attention_softcap)
        probabilities = build.softmax(build.add(scores, self.masks[config.layers[layer].window]))
        y = build.transpose(build.matmul(probabilities, v), [0, 2, 1, 3])
        return build.reshape(y, config.heads * config.head_dim)

    def _repeated(self, x: V) -> V:
        """Keys or values [1, K, S, E] repeated for each query head: [1, H, S, E]."""
        groups = self.config.heads // self.config.kv_heads
        owners = [head // groups for head in range(self.config.heads)]
        return x if groups == 1 else self.build.select(x, owners)

    def _softcap(self, scores: V, cap: float | None) -> V:
        if cap is None:
            return scores
        bound = self.build.number(cap)
        return self.build.multiply(self.build.tanh(self.build.divide(scores, bound)), bound)

    def _rotate_halves(self, x: V, rope: Rope) -> V:
        build, (cos, sin) = self.build, self.tables[rope]
        sizes = [size for size in (rope.dim // 2, rope.dim // 2, self.config.head_dim - rope.dim) if size]
        a, b, *rest = build.split(x, sizes)
        real = build.subtract(build.multiply(a, cos), build.multiply(b, sin))
        imaginary = build.add(build.multiply(b, cos), build.multiply(a, sin))
        return build.join(real, imaginary, *rest)

    def _rounded(self, x: V, rule: Rule) -> V:
        build, number = self.build, self.build.number
        zero = number(0.0)
        if rule.activation_rule == "absmax":
            span = build.divide(build.largest(build.absolute(x)), number(127))
            scale, zero_point = build.maximum(span, number(EPS)), zero
        else:
            low = build.minimum(build.smallest(x), zero)
            high = build.maximum(build.largest(x), zero)
            scale = build.maximum(build.divide(build.subtract(high, low), number(255)), number(EPS))
            low, high = build.divide(low, scale), build.divide(high, scale)
            above = build.greater(build.add(build.add(low, number(-128)), build.add(high, number(127))), zero)
            chosen = build.where(above, build.subtract(number(-128), low), build.subtract(number(127), high))
            zero_point = build.round(build.clip(chosen, number(-128), number(127)))
        steps = build.add(build.multiply(x, build.reciprocal(scale)), zero_point)
        integers = build.clip(build.round(steps), number(-128), number(127))
        return build.multiply(build.subtract(integers, zero_point), scale)
