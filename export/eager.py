"""Runs the walk over a model directly in PyTorch: what a graph of small operations computes, before it is written to a file."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lobit.export.composed import Composed
from lobit.export.walk import walk
from lobit.model import RMSNorm, Transformer, bias_of, weight_of
from lobit.quant_recipes.integer import IntegerLinear


class TorchBuilder:
    """A `builder.Builder` that computes at once; its values are tensors."""

    def scope(self, name: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def composing(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def number(self, value: float) -> Tensor:
        return torch.tensor(float(value))

    def integer(self, value: int) -> Tensor:
        return torch.tensor(value)

    def floats(self, values: Tensor) -> Tensor:
        return values.float()

    def to_float(self, x: Tensor) -> Tensor:
        return x.float()

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def subtract(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def divide(self, a: Tensor, b: Tensor) -> Tensor:
        return a / b

    def minimum(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.minimum(a, b)

    def maximum(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b)

    def less(self, a: Tensor, b: Tensor) -> Tensor:
        return a < b

    def greater(self, a: Tensor, b: Tensor) -> Tensor:
        return a > b

    def at_least(self, a: Tensor, b: Tensor) -> Tensor:
        return a >= b

    def either(self, a: Tensor, b: Tensor) -> Tensor:
        return a | b

    def where(self, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition, a, b)

    def reciprocal(self, x: Tensor) -> Tensor:
        return x.reciprocal()

    def square_root(self, x: Tensor) -> Tensor:
        return x.sqrt()

    def absolute(self, x: Tensor) -> Tensor:
        return x.abs()

    def round(self, x: Tensor) -> Tensor:
        return x.round()

    def clip(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return x.clamp(low, high)

    def tanh(self, x: Tensor) -> Tensor:
        return x.tanh()

    def sigmoid(self, x: Tensor) -> Tensor:
        return x.sigmoid()

    def relu(self, x: Tensor) -> Tensor:
        return x.relu()

    def sine(self, x: Tensor) -> Tensor:
        return x.sin()

    def cosine(self, x: Tensor) -> Tensor:
        return x.cos()

    def mean(self, x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True)

    def smallest(self, x: Tensor) -> Tensor:
        return x.amin(-1, keepdim=True)

    def largest(self, x: Tensor) -> Tensor:
        return x.amax(-1, keepdim=True)

    def softmax(self, x: Tensor) -> Tensor:
        return x.softmax(-1)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        return x.permute(*order)

    def reshape(self, x: Tensor, *sizes: int) -> Tensor:
        return x.reshape(1, -1, *sizes)

    def unsqueeze(self, x: Tensor, *axes: int) -> Tensor:
        for axis in axes:
            x = x.unsqueeze(axis)
        return x

    def split(self, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        return torch.split(x, list(sizes), -1)

    def join(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, -1)

    def select(self, x: Tensor, indices: Sequence[int]) -> Tensor:
        return x[:, list(indices)]

    def last(self, x: Tensor) -> Tensor:
        return x[:, -1:]


class EagerOps(Composed[Tensor]):
    """One call of a model with tokens that follow those whose keys and values are given.

    Args:
        model: the converted model.
        tokens: int64 [1, T].
        states: keys and values [1, K, S, E] of each layer so far; they are replaced by longer ones.
        all_logits: whether to compute the logits of all tokens, not of the last alone.
    """

    def __init__(self, model: Transformer, tokens: Tensor, states: list[tuple[Tensor, Tensor]], all_logits: bool) -> None:
        super().__init__(TorchBuilder(), model.config, all_logits)
        self.tokens, self.states = tokens, states
        self.scores = torch.empty(0)

    def begin(self) -> Tensor:
        """See `walk.Ops`."""
        past, total = self.states[0][0].shape[2], self.states[0][0].shape[2] + self.tokens.shape[1]
        positions = torch.arange(past, total)
        self.cos_sin(positions)
        self.mask(positions, torch.arange(total))
        return self.tokens

    def rows(self, embedding: nn.Module, tokens: Tensor) -> Tensor:
        """See `Composed.rows`."""
        found: Tensor = embedding(tokens)
        return found.float()

    def norm_weight(self, norm: RMSNorm) -> Tensor:
        """See `Composed.norm_weight`."""
        assert norm.weight is not None
        return norm.weight

    def linear(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        """See `walk.Ops`."""
        if isinstance(module, IntegerLinear) and module.rule.activation_bits:
            x = self.round_tokens(x, module.rule)
        return F.linear(x, weight_of(module).float(), bias_of(module))

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `Composed.extend`."""
        before = self.states[layer]
        self.states[layer] = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        return self.states[layer]

    def score(self, head: nn.Module, x: Tensor) -> None:
        """See `walk.Ops`."""
        self.scores = self.logits(head, x)


class EagerGraph:
    """Runs a model in small operations, call by call: (tokens int64 [1, T], input_pos int64 [1]) -> logits (`target.RunGraph`).

    Args:
        model: the converted model.
        all_logits: whether a call gives the logits of all its tokens, not of the last alone.
    """

    def __init__(self, model: Transformer, all_logits: bool = False) -> None:
        self.model, self.all_logits = model, all_logits
        self.states: list[tuple[Tensor, Tensor]] = []

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        config, position = self.model.config, int(input_pos)
        empty = torch.zeros(1, config.kv_heads, 0, config.head_dim)
        states = self.states if position else [(empty, empty)] * len(config.layers)
        ops = EagerOps(self.model, tokens, [(k[:, :, :position], v[:, :, :position]) for k, v in states], self.all_logits)
        walk(self.model, ops)
        self.states = ops.states
        return ops.scores
