"""Measures how far a model is from perfect: its loss on fresh stories, compared with that of the grammar itself."""

import math
import random
import statistics
from functools import partial

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from lobit.demo.story import STORIES
from lobit.demo.vocabulary import BEGIN_ID, END_ID, count
from lobit.model import Transformer

BATCH = 20
IGNORED = -1


@torch.no_grad()
def surprises(model: Transformer, tokenizer: Tokenizer, texts: list[str]) -> tuple[list[float], list[int]]:
    """For each story: the nats that the model needs for it and its end, and their number of tokens."""
    ids = [[BEGIN_ID, *tokenizer.encode(text, add_special_tokens=False).ids, END_ID] for text in texts]
    longest = max(map(len, ids))
    rows = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in ids])
    scores = model(rows[:, :-1].clamp(min=0)).double()
    losses = F.cross_entropy(scores.mT, rows[:, 1:], ignore_index=IGNORED, reduction="none")
    return losses.sum(1).tolist(), [len(row) - 1 for row in ids]


def held_out_figures(model: Transformer, tokenizer: Tokenizer, stories: int = 1000, seed: int = 0) -> dict[str, float]:
    """The model's loss on stories that it has not seen, and the exact entropy, below which no model's expected loss can be.

    The gap is measured on the same stories for both, so that what is surprising in the stories themselves cancels.

    Returns:
        All in nats per predicted token: `loss`, `grammar_loss` (the grammar's own on the same stories), `gap` between the
        two with its standard error, and `entropy` (exact). Besides, `stories`, and the exact `story_entropy` (nats) and
        `story_tokens`, the end included.
    """
    rng = random.Random(f"held out figures {seed}")
    samples = [STORIES.sample(rng) for _ in range(stories)]
    nats, total = list[float](), 0
    for start in range(0, stories, BATCH):
        batch, tokens = surprises(model, tokenizer, [sample.text for sample in samples[start : start + BATCH]])
        nats, total = nats + batch, total + sum(tokens)
    excess = [own + sample.log_prob for own, sample in zip(nats, samples, strict=True)]
    entropy, length = STORIES.entropy(), STORIES.expected_tokens(partial(count, tokenizer)) + 1
    return {
        "stories": stories,
        "loss": sum(nats) / total,
        "grammar_loss": -sum(sample.log_prob for sample in samples) / total,
        "gap": sum(excess) / total,
        "gap_standard_error": statistics.stdev(excess) * math.sqrt(stories) / total,
        "entropy": entropy / length,
        "story_entropy": entropy,
        "story_tokens": length,
    }
