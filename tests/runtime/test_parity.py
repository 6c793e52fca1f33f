"""Parity: the figures are what they say, a perfect engine passes, a subtly broken one does not."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional as F

from lobit import verbs
from lobit.checkpoint import load_model
from lobit.demo import held_out_text
from lobit.errors import InputError
from lobit.quant_recipes.apply import convert
from lobit.quant_recipes.catalog import CATALOG, find_recipe
from lobit.runtime.engine import Logits
from lobit.runtime.parity import CONVERSION, LIMITS, SHORTEST_TEXT, Walk, kl_divergence, log_softmax, parity, plan_walks, walk
from lobit.runtime.reference import ReferenceEngine

Bundles = Any
"""The fixture of tests/conftest.py: `bundles(model, recipe, kv_cache)`."""
CONTEXT = 100
TOKENS = [int(token) for token in np.random.default_rng(1).integers(0, 96, 250)]
FLOAT_KL = 1e-6
"""Nats a token: nothing is rounded, only sums of float32 come in another order (1e-12 where it was measured)."""
ORACLE = 1e-9
"""Between our double precision and PyTorch's."""

# --- the figures ------------------------------------------------------------------------------------------------------------------

logits = arrays(np.float32, (3, 11), elements=st.floats(-60, 60, width=32))


@given(logits)
def test_equal_distributions_have_no_divergence(scores: Logits) -> None:
    assert kl_divergence(log_softmax(scores), log_softmax(scores)).tolist() == [0, 0, 0]


@given(logits, logits)
def test_divergence_is_torchs_with_the_reference_first(reference: Logits, other: Logits) -> None:
    ours = kl_divergence(log_softmax(reference), log_softmax(other))
    p, q = (torch.log_softmax(torch.tensor(scores).double(), dim=1) for scores in (reference, other))
    theirs = F.kl_div(q, p, reduction="none", log_target=True).sum(dim=1)
    assert np.allclose(ours, theirs.numpy(), rtol=ORACLE, atol=ORACLE)
    assert (ours >= 0).all()


@given(logits, st.floats(-1000, 1000, width=32))
def test_a_constant_on_all_logits_changes_nothing(scores: Logits, constant: float) -> None:
    shifted = scores.astype(np.float64) + constant
    assert np.allclose(log_softmax(scores), log_softmax(shifted.astype(np.float64)), atol=ORACLE)  # type: ignore[arg-type]


texts = st.integers(SHORTEST_TEXT, 700).map(lambda count: list(range(count)))


@given(texts, st.integers(2 * SHORTEST_TEXT, 128), st.sampled_from([None, 999]))
def test_walks_read_the_whole_text_once_and_in_order(tokens: list[int], context: int, bos: int | None) -> None:
    walks = plan_walks(tokens, context, bos)
    head = [] if bos is None else [bos]
    assert all(plan.tokens[: len(head)] == head for plan in walks)
    read = [token for plan in walks for token in plan.tokens[len(head) :]]
    assert read == tokens[: len(read)]
    left_out = len(tokens) - len(read)
    assert left_out + len(head) < SHORTEST_TEXT or left_out == 0, "only an end that is too short to say anything"
    for plan in walks:
        assert SHORTEST_TEXT <= len(plan.tokens) <= context
        assert 0 < sum(plan.prefill) <= len(plan.tokens) / 2
        assert min(plan.prefill) > 0


@given(texts, st.integers(2 * SHORTEST_TEXT, 128))
def test_a_position_is_compared_once_and_every_decoded_one_is(tokens: list[int], context: int) -> None:
    for plan in plan_walks(tokens, context, 999):
        assert plan.positions == sorted(set(plan.positions))
        decoded = list(range(sum(plan.prefill), len(plan.tokens)))
        assert plan.positions[len(plan.prefill) :] == decoded
        assert plan.positions[-1] == len(plan.tokens) - 1


def test_prefill_calls_are_short_and_long_odd_and_even() -> None:
    (plan,) = plan_walks(list(range(600)), 600, None)
    assert {1, 2, 7, 64, 128} <= set(plan.prefill)


def test_a_text_that_is_too_short_is_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match=f"{SHORTEST_TEXT - 1} tokens, at least {SHORTEST_TEXT}"):
        plan_walks(TOKENS[: SHORTEST_TEXT - 1], CONTEXT, None)


def test_every_recipe_has_limits_or_the_default() -> None:
    assert set(LIMITS) <= set(CATALOG)
    for limits in LIMITS.values():
        assert {limit.metric for limit in limits} == {"kl_mean", "kl_conversion"}
        assert all(limit.reason for limit in limits)


# --- the gate ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(models: Callable[[str], Path]) -> Path:
    """A random model with windows of 16."""
    return models("mobilellm_p1")


def engine(folder: Path) -> ReferenceEngine:
    return ReferenceEngine(load_model(folder), None, CONTEXT)


def compare(folder: Path, artifact: Any, **options: Any) -> dict[str, Any]:
    arguments = {"context": CONTEXT, "window": 16, "recipe": "fp", **options}
    return parity(engine(folder), {"artifact": artifact}, TOKENS, **arguments)


class Stepping(ReferenceEngine):
    """Read call by call, as an engine of a device is, with one fault or none."""

    score = None  # type: ignore[assignment]

    def __init__(self, folder: Path, fault: str = "") -> None:
        super().__init__(load_model(folder), None, CONTEXT)
        del self.score
        self.fault = fault
        self.step = self.faulty

    def faulty(self, tokens: list[int], position: int) -> Logits:
        match self.fault:
            case "decodes one position too far" if len(tokens) == 1:
                return self._step(tokens, min(position + 1, self.context - 1))
            case "prefills in reverse":
                return self._step(tokens[::-1], position)
            case "forgets one token of long calls" if len(tokens) > 20:
                return self._step(tokens[:5] + tokens[5:6] + tokens[5:6] + tokens[7:], position)
            case "is a little too sure":
                return self._step(tokens, position) * np.float32(1.01)
        return self._step(tokens, position)


del Stepping.score


def test_a_perfect_engine_differs_nowhere(folder: Path) -> None:
    result = compare(folder, Stepped(folder))
    (stage,) = result["stages"]
    assert stage["kl_mean"] < FLOAT_KL
    assert stage["top1_agreement"] == 1
    assert math.isclose(stage["perplexity"], result["reference_perplexity"], rel_tol=1e-4)
    assert result["passed"]
