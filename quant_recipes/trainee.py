"""What is trained: a model as its recipe rounds it, and its loss against text and, where there is one, a float teacher."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lobit.model import Config, FloatAttention, Transformer, bias_of, rotary_tables, weight_of
from lobit.quant_recipes.distill import Teacher, head_loss
from lobit.quant_recipes.fake_quant import FakeQuantizedLinear, attention_for
from lobit.quant_recipes.recipe import Recipe


class Trainee(nn.Module):
    """Computes the training loss of sequences of tokens.

    Args:
        model: one that `prepare` made.
        recipe: the model's.
        teacher: a frozen float model of the same vocabulary, or None.
        distillation: share of the loss that is KL(teacher || model); the rest is cross entropy.
        recompute: activations inside of blocks are computed again in the backward pass instead of being kept.
    """

    def __init__(
        self, model: Transformer, recipe: Recipe, teacher: Transformer | None = None, distillation: float = 0.0, recompute: bool = False
    ) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        self.teacher = teacher if distillation > 0 else None
        self.distillation = distillation
        if recompute:
            for block in model.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]

    def forward(self, sequences: Tensor) -> Tensor:
        """The mean loss, in nats a token, of sequences [B, T + 1]."""
        tokens, targets = sequences[:, :-1], sequences[:, 1:].flatten()
        hidden = normed(self.model, tokens, self.recipe)
        x, weight = operands(self.model.head, hidden)
        told = None
        if self.teacher is not None:
            with torch.no_grad():
                seen = normed(self.teacher, tokens).flatten(0, 1)
            told = Teacher(seen, weight_of(self.teacher.head), self.teacher.config.logits_softcap, bias_of(self.teacher.head))
        cap = self.model.config.logits_softcap
        bias = bias_of(self.model.head)
        return head_loss(x.flatten(0, 1), weight, targets, bias=bias, teacher=told, share=self.distillation, cap=cap)


def new_weights(config: Config, seed: int) -> Transformer:
    """A model of random normal weights that keep the size of what they multiply; attention.o and mlp.down are smaller, by the depth."""
    model, generator = Transformer(config), torch.Generator().manual_seed(seed % 2**63)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            adds = name.endswith(("attention.o.weight", "mlp.down.weight"))
            deviation = (weight.shape[1] * (2 * len(config.layers) if adds else 1)) ** -0.5
            nn.init.normal_(weight, 0.0, deviation, generator=generator)
    return model


def normed(model: Transformer, tokens: Tensor, recipe: Recipe | None = None) -> Tensor:
    """The head's input [B, T, D] for whole sequences of tokens [B, T]."""
    config: Config = model.config
    tables = rotary_tables(config, torch.arange(tokens.shape[1], device=tokens.device))
    return cast(Tensor, model.norm(model.run(model.embed(tokens), tables, attention_for(recipe, FloatAttention(config)))))


def operands(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The input and the weight of a linear layer's product, rounded where the layer rounds them."""
    return layer.operands(x) if isinstance(layer, FakeQuantizedLinear) else (x, weight_of(layer))
