"""Layers that compute in floating point what the integers will compute: for training, and to measure what a recipe costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lobit.model import Attend, bias_of, weight_of
from lobit.quant_recipes.grid import fake_quantize_tokens, quantize_tokens, straight_through
from lobit.quant_recipes.precision import to_half
from lobit.quant_recipes.quantizers import Quantizer, quantizer_for
from lobit.quant_recipes.recipe import Recipe, Rule, WeightGrid


def fake_quantize_weight(weight: Tensor, grid: WeightGrid) -> Tensor:
    """The weight [out, in] that ships, bit for bit, with straight-through gradients; for grids without other learned parameters."""
    quantizer = quantizer_for(weight, grid)
    return quantizer(weight, *quantizer.learned())  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """x̂ ŵᵀ + b of the rounded input x̂ and weight ŵ, with straight-through gradients.

    For the backward pass it keeps the input's integers, a byte each, but not the rounded weight, which is computed again: a step of
    training takes hardly more memory than one in floating point.
    """

    @staticmethod
    def forward(ctx: Any, layer: FakeQuantizedLinear, x: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        kept, rounded = layer.round_input(x.float() if layer.rule.activation_bits else x)
        ctx.layer, ctx.kept = layer, len(kept)
        ctx.save_for_backward(*kept, *weights)
        return F.linear(rounded.to(x.dtype), layer.quantizer(*weights).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        layer, gradient, needed = ctx.layer, gradients[0], ctx.needs_input_grad
        saved = ctx.saved_tensors  # read once: recomputed activations can be unpacked only once
        kept, weights = saved[: ctx.kept], saved[ctx.kept :]
        leaves = [weight.detach().requires_grad_(needs) for weight, needs in zip(weights, needed[3:], strict=True)]
        with torch.enable_grad():
            weight = layer.quantizer(*leaves)
        back: list[Tensor | None] = [None] * len(leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        if wanted:
            x = layer.kept_input(kept).to(gradient.dtype).flatten(0, -2)
            of_weight = (gradient.flatten(0, -2).T @ x).to(weight.dtype)
            found = iter(torch.autograd.grad(weight, wanted, of_weight))
            back = [next(found) if leaf.requires_grad else None for leaf in leaves]
        of_x = gradient @ weight.detach().to(gradient.dtype) if needed[1] else None
        of_bias = gradient.flatten(0, -2).sum(0) if needed[2] else None
        return None, of_x, of_bias, *back


class FakeQuantizedLinear(nn.Module):
    """A linear layer whose weight, and input where the rule says so, are rounded on every call."""

    def __init__(self, linear: nn.Module, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.bias = bias_of(linear)
        self.weight, self.quantizer = trained(weight_of(linear), rule)

    def round_input(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The tensors to keep of the input x [..., in] for the backward pass, and the rounded input."""
        if not self.rule.activation_bits:
            return [x], x
        integers, scale, zero_point = quantize_tokens(x, self.rule.activation_rule)
        return [integers.to(torch.int8), scale, zero_point], integers.sub_(zero_point).mul_(scale)

    def kept_input(self, kept: tuple[Tensor, ...]) -> Tensor:
        """The rounded input, from the tensors that `round_input` kept of it."""
        if not self.rule.activation_bits:
            return kept[0]
        integers, scale, zero_point = kept
        return (integers.float() - zero_point).mul_(scale)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rounded input and weight of the product, with straight-through gradients."""
        if self.rule.activation_bits:
            x = fake_quantize_tokens(x, self.rule.activation_rule)
        return x, self.quantizer(self.weight, *self.quantizer.learned())

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(self, x, self.bias, self.weight, *self.quantizer.learned())  # type: ignore[no-untyped-call, no-any-return]

    def integers(self) -> tuple[Tensor, Tensor]:
        """Integers [out, in], int8, and scales [out, groups] that ship."""
        return self.quantizer.integers(self.weight.detach())


class FakeQuantizedEmbedding(nn.Module):
    """An embedding whose table is rounded on every call."""

    def __init__(self, embedding: nn.Module, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.weight, self.quantizer = trained(weight_of(embedding), rule)

    def forward(self, tokens: Tensor) -> Tensor:
        learned = self.quantizer.learned()
        if self.rule.weights.shards:
            return F.embedding(tokens, self.quantizer(self.weight, *learned))
        rows = (F.embedding(tokens.flatten(), table) for table in (self.weight, *learned))
        return self.quantizer(*rows).reshape(*tokens.shape, -1)  # type: ignore[no-any-return]

    def integers(self) -> tuple[Tensor, Tensor]:
        """Integers [vocabulary, hidden], int8, and scales [vocabulary, groups] that ship."""
        return self.quantizer.integers(self.weight.detach())


def trained(weight: Tensor, rule: Rule) -> tuple[Tensor, Quantizer]:
    """The parameter that is trained in place of a float weight, and its quantizer.

    Where the quantizer starts from the weight itself, it is that very tensor, so that a weight used twice stays one.
    """
    quantizer = quantizer_for(weight, rule.weights)
    start = quantizer.start(weight)
    if start is not weight:
        start = nn.Parameter(start.detach(), requires_grad=weight.requires_grad)
    return start, quantizer.requires_grad_(weight.requires_grad)


class RoundedCache:
    """Attention over a key-value cache whose entries are rounded: `round` is applied to k and v [B, T, K, E]."""

    def __init__(self, attend: Attend, round: Callable[[Tensor], Tensor]) -> None:
        self.attend, self.round = attend, round

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(layer, q, self.round(k), self.round(v))


def attention_for(recipe: Recipe | None, attend: Attend) -> Attend:
    """Attention over a key-value cache of the recipe's precision: INT8 per token and head, half floats, or as it is."""
    match recipe.kv_bits if recipe else None:
        case 8:
            return RoundedCache(attend, fake_quantize_tokens)
        case 16:
            return RoundedCache(attend, lambda x: straight_through(x, to_half(x)))
    return attend
