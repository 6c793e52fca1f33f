"""Text as packed sequences of tokens, whose order depends on seed and step alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lobit.errors import InputError

MOST_HELD_OUT = 8192
"""Most tokens to measure on, but at least one sequence: half a minute of SmolLM2 and its float model on two cores. They give the KL of
its `8da4w-g32` with a standard error of 3 %, from sequence to sequence; half of that would take four times as many."""


@dataclass(frozen=True)
class Corpus:
    """Sequences [n, length + 1]; the last token of each is predicted but not read."""

    sequences: Tensor
    seed: int = 0

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def length(self) -> int:
        """Tokens of a sequence that the model reads."""
        return self.sequences.shape[1] - 1

    def batch(self, step: int, size: int) -> Tensor:
        """The `size` sequences of a step; the corpus is shuffled anew for every epoch."""
        numbers = range(step * size, (step + 1) * size)
        epochs = sorted({number // len(self) for number in numbers})
        orders = {epoch: self._order(epoch) for epoch in epochs}
        return self.sequences[[int(orders[number // len(self)][number % len(self)]) for number in numbers]].long()

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63))

    def first(self, count: int) -> Corpus:
        """A corpus of the first `count` sequences of the first order, or of all where there are fewer."""
        return Corpus(self.sequences[self._order(0)[:count]], self.seed)

    @property
    def _most_held_out(self) -> int:
        return max(1, MOST_HELD_OUT // self.length)

    def to_measure(self) -> Corpus:
        """A corpus of at most `MOST_HELD_OUT` tokens, in sequences spread over all of this one."""
        count = min(len(self), self._most_held_out)
        return Corpus(self.sequences[[i * len(self) // count for i in range(count)]], self.seed)

    def split(self, share: float) -> tuple[Corpus, Corpus]:
        """All but the last `share` of the sequences, and these: at least one sequence, and at most `MOST_HELD_OUT` tokens.

        Raises:
            InputError: there is only one sequence.
        """
        if len(self) < 2:
            raise InputError(
                f"the text gives {len(self)} sequence of {self.length} tokens, and some must be held out: "
                "give more text, a shorter --length, or --held-out FILE"
            )
        count = min(max(1, round(len(self) * share)), self._most_held_out)
        return Corpus(self.sequences[:-count], self.seed), Corpus(self.sequences[-count:], self.seed)


def pack(documents: Iterable[list[int]], length: int, seed: int = 0, bos: int | None = None) -> Corpus:
    """Joins documents and cuts them into sequences, each with `bos` at its start if there is one; tokens left over at the end are unused.

    A sequence begins where the one before it ended, or at the start of the last document in that one. A sequence that begins inside of a
    document gets a `bos` of its own: a model that never sees `bos` at position 0 in training forgets what to do there.

    Args:
        documents: token ids of each, with the tokens that begin and end a document where the model has such.
        length: tokens of a sequence that the model reads.
        seed: of the order in which `Corpus.batch` takes the sequences.
        bos: the token that begins a document; None: nothing is put before a sequence.

    Raises:
        InputError: there are fewer tokens than one sequence needs, or a sequence has room for nothing but `bos`.
    """
    if length < (1 if bos is None else 2):
        raise InputError(f"sequences of {length} tokens have no room for text: give a longer --length")
    tokens = torch.tensor([token for document in documents for token in document], dtype=torch.int32)
    begins = [] if bos is None else (tokens == bos).nonzero()[:, 0].tolist()
    before = torch.tensor([] if bos is None else [bos], dtype=torch.int32)
    sequences, at = list[Tensor](), 0
    while True:
        prefix = before[:0] if tokens[at : at + 1].equal(before) else before
        end = at + length - len(prefix)
        if end >= len(tokens):
            break
        sequences.append(torch.cat([prefix, tokens[at : end + 1]]))
        begun = bisect_right(begins, end)
        last = begins[begun - 1] if begun else 0
        at = last if last > at else end
    if not sequences:
        raise InputError(f"the text has {len(tokens)} tokens, a sequence needs {length + 1}: give more text or a shorter --length")
    return Corpus(torch.stack(sequences), seed)


def sequences_of(tokens: Sequence[int], samples: int, length: int, seed: int = 0, bos: int | None = None) -> Tensor:
    """Calibration sequences [n, length], int64: random windows of a text that do not overlap.

    Args:
        tokens: the tokens of the whole text.
        samples: n; where the text has fewer windows, all are taken.
        length: tokens of a sequence, `bos` included.
        seed: of the choice of windows.
        bos: the token to put before every window, or None.

    Raises:
        InputError: `samples` or `length` is too small, or the text is shorter than one sequence.
    """
    head = [] if bos is None else [bos]
    room = length - len(head)
    if samples < 1 or room < 1:
        raise InputError(f"{samples} sequences of {length} tokens are no calibration: ask for at least 1 of {len(head) + 1} or more")
    windows = len(tokens) // room
    if not windows:
        raise InputError(f"the calibration text has {len(tokens)} tokens, one sequence takes {room}: give more text, or a smaller length")
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(tokens) - windows * room + 1, (), generator=generator))
    chosen = torch.randperm(windows, generator=generator)[:samples]
    text = torch.tensor(tokens[first : first + windows * room]).reshape(windows, room)[chosen]
    return torch.cat([torch.tensor(head, dtype=torch.int64).expand(len(text), -1), text], 1)
