"""Likelihoods from an engine: a context is read once, and the cache taken back for each of its continuations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from lobit.errors import BundleError
from lobit.runtime.engine import Engine, Logits
from lobit.runtime.eval_requests import Asked
from lobit.runtime.parity import COMPARED, log_softmax

Score = tuple[float, bool]
"""The log-likelihood in nats, and whether each of the tokens was the most probable one."""


class Reader:
    """Asks an engine for likelihoods.

    The calls for an item do not depend on the items before it, so neither do its figures: work that was interrupted goes on to the same
    result, bit by bit.

    Args:
        engine: its cache holds all tokens but the last of every request.
        beginning: tokens that most contexts begin with, read once; such as solved examples.
    """

    def __init__(self, engine: Engine, beginning: Sequence[int] = ()) -> None:
        self.engine, self.beginning = engine, tuple(beginning)
        self._begun = False
        self._context: tuple[int, ...] = ()
        self._after: Logits | None = None
        """The logits [V] after the context."""
        self._piece = max(1, COMPARED // engine.vocab_size)

    def score(self, item: Sequence[Asked]) -> list[Score]:
        """The likelihoods of an item's requests; those of one context should follow each other.

        Raises:
            BundleError: logits are not finite.
        """
        self._after = None
        times = Counter(asked.context for asked in item)
        return [self._one(asked, times[asked.context] > 1) for asked in item]

    def _one(self, asked: Asked, is_shared: bool) -> Score:
        """The likelihood of a request.

        A context that no other request has, or to whose end the engine cannot be taken back, is read in one call with what follows it.
        """
        tokens = asked.continuation
        if is_shared:
            after = self._logits_after(asked.context)
        else:
            after = self._after = None  # the engine leaves the context that it is at
        if after is None:
            first, given = tokens[: self._piece], asked.context[self._begin(asked.context) :]
            rows = self.engine.score([*given, *first[:-1]], len(first))
        else:
            first, rows = tokens[:1], after[None]
        scores = [_of(rows, first)]
        for start in range(len(first) - 1, len(tokens) - 1, self._piece):
            piece = tokens[start : start + self._piece + 1]
            scores.append(_of(self.engine.score(piece[:-1]), piece[1:]))
        return sum(value for value, _ in scores), all(greedy for _, greedy in scores)

    def _logits_after(self, context: tuple[int, ...]) -> Logits | None:
        """The logits [V] after a context, with which the engine then ends; None where it read the context and cannot be taken back."""
        if self._after is not None and context == self._context:
            return self._after if self.engine.rewind(len(context)) else None
        start = self._begin(context)
        self._context, self._after = context, self.engine.prefill(context[start:])
        return self._after

    def _begin(self, context: tuple[int, ...]) -> int:
        """Takes the engine to the end of the beginning where the context begins so, else to position 0; returns the position."""
        count = len(self.beginning)
        if not 0 < count < len(context) or context[:count] != self.beginning:
            count = 0
        if not (count and self._begun and self.engine.rewind(count)):
            self.engine.reset()
            if count:
                self.engine.prefill(self.beginning)
            self._begun = bool(count)
        return count


def _of(rows: Logits, tokens: Sequence[int]) -> Score:
    """The likelihood of tokens [n] by the logits [n, V] before each."""
    if not np.isfinite(rows).all():
        raise BundleError("some logits are no numbers: export the model again, or take --activations float for its recipe")
    scores = log_softmax(rows)
    value = scores[np.arange(len(tokens)), list(tokens)].sum()
    return float(value), bool((rows.argmax(axis=1) == np.array(tokens)).all())
