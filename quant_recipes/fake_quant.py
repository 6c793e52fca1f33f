"""Layers that compute in floating point what the integers will compute: for training, and to say what a recipe costs."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lobit.model import Attend, bias_of, weight_of
from lobit.quant_recipes.grid import choose_scale, dequantize, fake_quantize_tokens, quantize
from lobit.quant_recipes.recipe import Rule, WeightGrid


def fake_quantize_weight(weight: Tensor, grid: WeightGrid) -> Tensor:
    """The weight [out, in] that ships, bit for bit, with straight-through gradients."""
    detached = weight.detach().float()
    scale = choose_scale(detached, grid)
    rounded = dequantize(quantize(detached, scale, grid), scale)
    return weight + (rounded - weight).detach() if weight.requires_grad else rounded


class FakeQuantizedLinear(nn.Module):
    """A linear layer whose weight, and input where the rule says so, are rounded on every call."""

    def __init__(self, linear: nn.Module, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.weight = weight_of(linear)
        self.bias = bias_of(linear)

    def forward(self, x: Tensor) -> Tensor:
        x = fake_quantize_tokens(x) if self.rule.activation_bits else x
        return F.linear(x, fake_quantize_weight(self.weight, self.rule.weights), self.bias)


class FakeQuantizedEmbedding(nn.Module):
    """An embedding whose table is rounded on every call."""

    def __init__(self, embedding: nn.Module, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.weight = weight_of(embedding)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, fake_quantize_weight(self.weight, self.rule.weights))


class FakeQuantizedAttention:
    """Attention over an INT8 key-value cache: k and v rounded per token and head."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(layer, q, fake_quantize_tokens(k), fake_quantize_tokens(v))
