"""Text as packed sequences of tokens, in an order that seed and step alone decide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lobit.errors import InputError

MOST_HELD_OUT = 64
"""Sequences."""


@dataclass(frozen=True)
class Corpus:
    """Sequences [n, length + 1]; the last token of each is only predicted."""

    sequences: Tensor
    seed: int = 0

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def length(self) -> int:
        """Tokens of a sequence that the model reads."""
        return self.sequences.shape[1] - 1

    def batch(self, step: int, size: int) -> Tensor:
        """The `size` sequences of a step: the corpus shuffled anew each time it is through."""
        numbers = range(step * size, (step + 1) * size)
        epochs = sorted({number // len(self) for number in numbers})
        orders = {epoch: self._order(epoch) for epoch in epochs}
        return self.sequences[[int(orders[number // len(self)][number % len(self)]) for number in numbers]].long()

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63))

    def first(self, count: int) -> Corpus:
        """A corpus of the first `count` sequences of the first order, or of all where there are fewer."""
        return Corpus(self.sequences[self._order(0)[:count]], self.seed)

    def split(self, share: float) -> tuple[Corpus, Corpus]:
        """Without the last `share` of the sequences, at least one and at most `MOST_HELD_OUT`; and these.

        Raises:
            InputError: there is but one sequence.
        """
        if len(self) < 2:
            raise InputError(
                f"the text gives {len(self)} sequence of {self.length} tokens, and some must be held out: "
                "give more text, a shorter --length, or --held-out FILE"
            )
        count = min(max(1, round(len(self) * share)), MOST_HELD_OUT)
        return Corpus(self.sequences[:-count], self.seed), Corpus(self.sequences[-count:], self.seed)


def pack(documents: Iterator[list[int]] | list[list[int]], length: int, seed: int = 0) -> Corpus:
    """Documents' tokens in one row, cut into sequences; what is left at the end is not used.

    Args:
        documents: token ids, with those that begin and end a document where the model knows them.
        length: tokens of a sequence that the model reads.
        seed: of the order.

    Raises:
        InputError: there are fewer tokens than one sequence needs.
    """
    tokens = torch.tensor([token for document in documents for token in document], dtype=torch.int32)
    count = (len(tokens) - 1) // length
    if count < 1:
        raise InputError(f"the text has {len(tokens)} tokens, a sequence needs {length + 1}: give more text or a shorter --length")
    starts = torch.arange(count)[:, None] * length
    return Corpus(tokens[starts + torch.arange(length + 1)], seed)
