"""What a model is worth on a text that it was not trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lobit.model import Transformer, capped
from lobit.quant_recipes.corpus import Corpus
from lobit.quant_recipes.recipe import Recipe
from lobit.quant_recipes.trainee import normed

AT_ONCE = 1 << 24
"""Logits."""
LARGEST = 709.0
"""Nats: e to more is no float."""


@dataclass(frozen=True)
class Figures:
    """Over all tokens of a corpus."""

    tokens: int
    loss: float
    """Nats a token."""
    kl: float | None = None
    """KL(reference || model), nats a token."""
    top1: float | None = None
    """Share of tokens whose most probable successor is the reference's."""

    @property
    def perplexity(self) -> float:
        """e to the loss, or to the largest that has a number."""
        return math.exp(min(self.loss, LARGEST))


@torch.inference_mode()
def figures(model: Transformer, corpus: Corpus, recipe: Recipe | None = None, reference: Transformer | None = None) -> Figures:
    """A model's loss, and how far it is from a reference.

    Args:
        model: float, prepared or converted.
        corpus: the text.
        recipe: of the model, for its key-value cache.
        reference: the float model, or None.
    """
    device = next(model.norm.parameters()).device
    loss = kl = same = 0.0
    few = max(1, AT_ONCE // (corpus.length * model.config.vocab_size))
    for sequences in corpus.sequences.long().split(few):
        tokens, targets = sequences[:, :-1].to(device), sequences[:, 1:].to(device).flatten()
        scores = _scores(model, tokens, recipe)
        loss += F.cross_entropy(scores, targets, reduction="sum").item()
        if reference is not None:
            others = _scores(reference, tokens)
            kl += F.kl_div(scores.log_softmax(1), others.log_softmax(1), reduction="sum", log_target=True).item()
            same += (scores.argmax(1) == others.argmax(1)).sum().item()
    count = len(corpus) * corpus.length
    return Figures(count, loss / count, kl / count if reference else None, same / count if reference else None)


def _scores(model: Transformer, tokens: Tensor, recipe: Recipe | None = None) -> Tensor:
    """Logits [B·T, V], float32."""
    scores = model.head(normed(model, tokens, recipe))
    return capped(scores, model.config.logits_softcap).float().flatten(0, 1)
