"""How well a model predicts a text that it was not trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lobit.model import Transformer
from lobit.progress_callback import Progress
from lobit.quant_recipes.corpus import Corpus
from lobit.quant_recipes.precision import computing
from lobit.quant_recipes.recipe import Recipe
from lobit.quant_recipes.trainee import normed

AT_ONCE = 1 << 24
"""Logits that are in memory at once."""
TOGETHER = 4096
"""Tokens that go through the layers at once: many, since a layer of integers computes its float weights anew in each call."""
LARGEST = 709.0
"""Nats: the exponential of much more overflows a float."""


@dataclass(frozen=True)
class Figures:
    """The figures of a model over all tokens of a corpus."""

    tokens: int
    loss: float
    """Nats a token."""
    kl: float | None = None
    """KL(reference || model), nats a token."""
    top1: float | None = None
    """Share of positions where model and reference give the highest probability to the same next token."""
    reference_loss: float | None = None
    """The loss of the reference on the same tokens."""

    @property
    def perplexity(self) -> float:
        """e to the loss, with the loss cut at `LARGEST` so that the result is finite."""
        return math.exp(min(self.loss, LARGEST))


@torch.inference_mode()
def figures(
    model: Transformer,
    corpus: Corpus,
    recipe: Recipe | None = None,
    reference: Transformer | None = None,
    progress: Progress | None = None,
) -> Figures:
    """A model's loss, and how far its predictions are from a reference's, in one pass of each.

    Args:
        model: a float, prepared or converted model.
        corpus: the text.
        recipe: of the model, for its key-value cache and its precision.
        reference: the float model, or None.
        progress: called with the number of sequences that are done.
    """
    device = next(model.norm.parameters()).device
    loss = others_loss = kl = same = 0.0
    done, few = 0, max(1, AT_ONCE // model.config.vocab_size)
    for sequences in corpus.sequences.long().split(max(1, TOGETHER // corpus.length)):
        tokens, targets = sequences[:, :-1].to(device), sequences[:, 1:].to(device).flatten().split(few)
        with computing(recipe):
            stream = normed(model, tokens, recipe)
        streams = [stream, *([normed(reference, tokens)] if reference else [])]
        for wanted, x, *other in zip(targets, *(stream.flatten(0, 1).split(few) for stream in streams), strict=True):
            with computing(recipe):
                scores = model.cap(model.head(x))
            told = _log_probabilities(scores)
            loss += F.nll_loss(told, wanted, reduction="sum").item()
            if reference is not None:
                expected = _log_probabilities(*(reference.cap(reference.head(y)) for y in other))
                others_loss += F.nll_loss(expected, wanted, reduction="sum").item()
                same += (told.argmax(1) == expected.argmax(1)).sum().item()
                kl += F.kl_div(told, expected, reduction="sum", log_target=True).item()
        done += len(sequences)
        if progress:
            progress("measuring", done, len(corpus))
    count = len(corpus) * corpus.length
    if reference is None:
        return Figures(count, loss / count)
    return Figures(count, loss / count, kl / count, same / count, others_loss / count)


def _log_probabilities(logits: Tensor) -> Tensor:
    """Log probabilities [N, V] of the next tokens, float32."""
    return logits.float().log_softmax(1)
