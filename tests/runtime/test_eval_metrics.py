"""Figures of an evaluation against closed forms."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobit.runtime.eval_metrics import answers, exact_p, paired, share, target_perplexity, text_figures
from lobit.runtime.eval_tasks import Item, Task

EXACT = 1e-12
"""Relative; of sums of a few hundred double-precision numbers."""


def choice_task(gold: int, *choices: str, without_context: str | None = None) -> Task:
    return Task("task", Path("task.jsonl"), "", (Item(1, "Why?", choices, gold),), True, without_context=without_context)


@given(st.integers(0, 300), st.integers(0, 300))
def test_the_exact_test_is_both_tails_of_the_binomial_distribution(lost: int, gained: int) -> None:
    count = lost + gained
    far = abs(2 * lost - count)
    tails = sum(Fraction(math.comb(count, k), 2**count) for k in range(count + 1) if abs(2 * k - count) >= far)
    assert exact_p(lost, gained) == pytest.approx(float(tails), rel=EXACT)
    assert exact_p(lost, gained) == exact_p(gained, lost)


def test_the_exact_test_of_thousands_of_flips_is_a_number() -> None:
    assert 0 <= exact_p(2000, 3000) < 1e-40
    assert exact_p(2500, 2500) == 1.0
    assert exact_p(0, 0) == 1.0
    assert exact_p(0, 5) == 2 / 32


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_pairs_count_flips_both_ways_and_the_difference_is_theirs(pairs: list[tuple[bool, bool]]) -> None:
    base, other = (np.array(side) for side in zip(*pairs, strict=True))
    found = paired(base, other)
    assert found["lost"] == pairs.count((True, False)) and found["gained"] == pairs.count((False, True))
    assert found["difference"] == pytest.approx((found["gained"] - found["lost"]) / len(pairs), abs=EXACT)
    assert found["difference"] == pytest.approx(share(other)["value"] - share(base)["value"], abs=EXACT)


@given(st.lists(st.booleans(), min_size=2, max_size=200))
def test_a_shares_standard_error_is_that_of_a_binomial_sample(right: list[bool]) -> None:
    found, p = share(np.array(right)), sum(right) / len(right)
    assert found["value"] == pytest.approx(p, rel=EXACT)
    assert found["se"] == pytest.approx(math.sqrt(p * (1 - p) / (len(right) - 1)), rel=1e-9, abs=EXACT)


def test_one_item_has_no_standard_error() -> None:
    assert share(np.array([True])) == {"value": 1.0, "se": 0.0}


@pytest.mark.parametrize(
    ("values", "right"),
    [
        ([-4.0, -6.0], {"accuracy": True, "accuracy_bytes": False}),  # 2 and 6 bytes: -2 and -1 a byte
        ([-6.0, -4.0], {"accuracy": False, "accuracy_bytes": False}),
        ([-1.0, -12.0], {"accuracy": True, "accuracy_bytes": True}),
    ],
)
def test_choices_are_judged_whole_and_by_byte(values: list[float], right: dict[str, bool]) -> None:
    task = choice_task(0, "no", "ja wé")
    assert len("ja wé".encode()) == 6
    found = answers(task, [[(value, False) for value in values]])
    assert {name: bool(values[0]) for name, values in found.items()} == right


def test_the_likelihood_without_the_question_is_taken_off_where_the_task_asks() -> None:
    task = choice_task(1, "a", "b", without_context="")
    found = answers(task, [[(-2.0, False), (-3.0, False), (-1.0, False), (-9.0, False)]])
    assert {name: bool(values[0]) for name, values in found.items()} == {
        "accuracy": False, "accuracy_bytes": False, "accuracy_without_context": True,
    }  # fmt: skip


def test_last_words_are_right_where_they_are_the_most_probable() -> None:
    task = Task("words", Path("w.jsonl"), "", (Item(1, "Once upon a", ("time",), 0),) * 2, False)
    scores = [[(-1.0, True)], [(-3.0, False)]]
    assert answers(task, scores)["accuracy"].tolist() == [True, False]
    assert target_perplexity(scores)["value"] == pytest.approx(math.exp(2))
    assert target_perplexity([[(-1e9, False)]])["value"] < math.inf


def test_a_texts_perplexities_are_those_of_its_words_and_bytes() -> None:
    found = text_figures("a bé\nc", [6.0, 8.0], [4, 3])
    assert found["byte_perplexity"]["value"] == pytest.approx(math.exp(14 / 7))
    assert found["word_perplexity"]["value"] == pytest.approx(math.exp(14 / 3))
    assert found["bits_per_byte"]["value"] == pytest.approx(2 / math.log(2))
    assert found["bits_per_byte"]["se"] == pytest.approx(math.sqrt(2 * (4 + 4)) / 7 / math.log(2))  # windows are off by -2 and 2 nats
    assert text_figures("ab", [1.0], [2])["bits_per_byte"]["se"] == 0
