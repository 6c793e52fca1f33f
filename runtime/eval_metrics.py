"""Figures of an evaluation, their standard errors, and the exact test of paired answers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lobit.runtime.eval_scoring import Score
from lobit.runtime.eval_tasks import Item, Task
from lobit.runtime.parity import LARGEST_EXPONENT

Answers = dict[str, NDArray[np.bool_]]
"""Whether each item was answered right, by the name of the measure."""


def answers(task: Task, scores: Sequence[Sequence[Score]]) -> Answers:
    """Which items were answered right.

    `accuracy`: the right choice has the largest likelihood, or the right words are the most probable. `accuracy_bytes`: the largest
    likelihood per byte of the choice, without its delimiter. `accuracy_without_context`: the largest likelihood, less that of the choice
    after the task's `without_context`.
    """
    if not task.is_choice:
        return {"accuracy": np.array([score[0][1] for score in scores])}
    rows = [_choices(item, [value for value, _ in score]) for item, score in zip(task.items, scores, strict=True)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _choices(item: Item, values: Sequence[float]) -> dict[str, bool]:
    count = len(item.choices)
    given, alone = np.array(values[:count]), np.array(values[count:])
    judged = {"accuracy": given, "accuracy_bytes": given / [len(choice.encode()) for choice in item.choices]}
    if len(alone):
        judged["accuracy_without_context"] = given - alone
    return {name: int(likelihoods.argmax()) == item.gold for name, likelihoods in judged.items()}


def share(right: NDArray[np.bool_]) -> dict[str, float]:
    """A share with its standard error."""
    return {"value": float(right.mean()), "se": _standard_error(right.astype(np.float64))}


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _raised(exponent: float) -> float:
    return math.exp(min(exponent, LARGEST_EXPONENT))


def target_perplexity(scores: Sequence[Sequence[Score]]) -> dict[str, float]:
    """The perplexity of the right words, each taken as one: the mean is over items."""
    nats = np.array([-score[0][0] for score in scores])
    value = _raised(float(nats.mean()))
    return {"value": value, "se": value * _standard_error(nats)}


def text_figures(text: str, nats: Sequence[float], window_bytes: Sequence[int]) -> dict[str, dict[str, float]]:
    """Perplexity of a text by words and bytes, and bits a byte.

    Args:
        text: as far as it was read; words are what is between white space.
        nats: -log-likelihood of each window.
        window_bytes: the bytes of the text in each window, in UTF-8.
    """
    total, size = sum(nats), len(text.encode())
    a_byte = total / size
    error = _ratio_error(np.array(nats), np.array(window_bytes), a_byte)
    words = size / len(re.split(r"\s+", text))
    found = {}
    for name, scale in (("word_perplexity", words), ("byte_perplexity", 1.0)):
        value = _raised(a_byte * scale)
        found[name] = {"value": value, "se": value * error * scale}
    return found | {"bits_per_byte": {"value": a_byte / math.log(2), "se": error / math.log(2)}}


def _ratio_error(nats: NDArray[np.float64], sizes: NDArray[np.int64], ratio: float) -> float:
    """The standard error of a ratio of sums, from what each window is off by."""
    count = len(nats)
    off = nats - ratio * sizes
    return math.sqrt(count / (count - 1) * float((off**2).sum())) / float(sizes.sum()) if count > 1 else 0.0


def paired(base: NDArray[np.bool_], other: NDArray[np.bool_]) -> dict[str, Any]:
    """How the answers of two models to the same items differ.

    Returns:
        `lost` (right in the first alone), `gained` (right in the second alone), their `difference` as a share with its standard error
        `se`, and `p`, the probability of a split at least as uneven if both ways were equally likely (McNemar's test, exact, two-sided).
    """
    lost, gained = int((base & ~other).sum()), int((~base & other).sum())
    change = other.astype(np.float64) - base.astype(np.float64)
    return {
        "lost": lost,
        "gained": gained,
        "difference": float(change.mean()),
        "se": _standard_error(change),
        "p": exact_p(lost, gained),
    }


def exact_p(lost: int, gained: int) -> float:
    """The probability that of `lost + gained` tosses of a fair coin the rarer side is as rare as that, or rarer; both sides counted."""
    count, rarer = lost + gained, min(lost, gained)
    ways, term = 0, 1
    for number in range(rarer + 1):
        ways += term
        term = term * (count - number) // (number + 1)
    return min(1.0, 2 * ways / (1 << count))
