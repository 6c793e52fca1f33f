"""Parity: the figures are what they say, a perfect engine passes, a subtly broken one does not."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
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
from lobit.errors import BundleError, InputError
from lobit.model import twin
from lobit.quant_recipes.apply import convert
from lobit.quant_recipes.catalog import find_recipe
from lobit.runtime.engine import Logits, SteppingEngine
from lobit.runtime.parity import SHORTEST_TEXT, Floor, Passage, kl_divergence, log_softmax, parity, plan_passages, read_passage
from lobit.runtime.reference import MOVED_FAR, ReferenceEngine, moved
from lobit.runtime.verdict import COSTLY_KL, FLOAT_ORDER, FLOORS, judged, warnings

Bundles = Any
"""The fixture of tests/conftest.py: `bundles(model, recipe, kv_cache)`."""
CONTEXT = 100
TOKENS = [int(token) for token in np.random.default_rng(1).integers(0, 96, 250)]
FLOAT_KL = 1e-6
"""Nats a token: nothing is rounded, only sums of float32 come in another order (1e-12 where it was measured)."""
ORACLE = 1e-9
"""Between our double precision and PyTorch's."""


pytestmark = pytest.mark.usefixtures("one_thread")


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
    passages = plan_passages(tokens, context, bos)
    head = [] if bos is None else [bos]
    assert all(plan.tokens[: len(head)] == head for plan in passages)
    read = [token for plan in passages for token in plan.tokens[len(head) :]]
    assert read == tokens[: len(read)]
    left_out = len(tokens) - len(read)
    assert left_out + len(head) < SHORTEST_TEXT or left_out == 0, "only an end that is too short to say anything"
    for plan in passages:
        assert SHORTEST_TEXT <= len(plan.tokens) <= context
        assert 0 < sum(plan.prefill) <= len(plan.tokens) / 2
        assert min(plan.prefill) > 0


@given(texts, st.integers(2 * SHORTEST_TEXT, 128))
def test_a_position_is_compared_once_and_every_decoded_one_is(tokens: list[int], context: int) -> None:
    for plan in plan_passages(tokens, context, 999):
        assert plan.positions == sorted(set(plan.positions))
        decoded = list(range(sum(plan.prefill), len(plan.tokens)))
        assert plan.positions[len(plan.prefill) :] == decoded
        assert plan.positions[-1] == len(plan.tokens) - 1


@given(texts, st.integers(2 * SHORTEST_TEXT, 128), st.lists(st.integers(1, 40), max_size=60))
def test_walks_begin_where_a_line_does_if_one_is_near(tokens: list[int], context: int, lengths: list[int]) -> None:
    lines = [0, *itertools.accumulate(lengths)]
    passages = plan_passages(tokens, context, None, lines)
    read = [token for plan in passages for token in plan.tokens]
    assert read == tokens[: len(read)]
    for before, cut in itertools.pairwise(plan.tokens[0] for plan in passages):
        near = [line for line in lines if before + context // 2 < line <= before + context]
        assert cut == (near[-1] if near else before + context)


def test_prefill_calls_are_short_and_long_odd_and_even() -> None:
    (plan,) = plan_passages(list(range(600)), 600, None)
    assert {1, 2, 7, 64, 128} <= set(plan.prefill)


def test_a_text_that_is_too_short_is_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match=f"{SHORTEST_TEXT - 1} tokens, at least {SHORTEST_TEXT}"):
        plan_passages(TOKENS[: SHORTEST_TEXT - 1], CONTEXT, None)


chaos = arrays(np.float64, st.integers(2, 40), elements=st.floats(0, 2))


@given(chaos)
def test_the_limit_is_above_the_floor_and_follows_it(measured: np.ndarray[Any, Any]) -> None:
    limit, floor = judged(measured)
    assert limit["limit"] >= FLOORS * floor["kl_mean"] + FLOAT_ORDER
    assert judged(measured * 2)[0]["limit"] >= limit["limit"]


def test_where_nothing_is_chaotic_only_sums_may_differ() -> None:
    assert judged(np.zeros(100))[0]["limit"] == FLOAT_ORDER


def test_a_costly_quantization_is_a_warning_with_advice_and_no_fault() -> None:
    cheap = {"kl_mean": COSTLY_KL / 2, "perplexity": 10.0}
    assert warnings(cheap, 10.0) == []
    for costly in ({**cheap, "kl_mean": COSTLY_KL * 2}, {**cheap, "perplexity": 12.0}):
        (warning,) = warnings(costly, 10.0)
        assert warning["advice"].index("--calibration") < warning["advice"].index("INT8") < warning["advice"].index("train")
        (warning,) = warnings(costly, 10.0, ["calibration", "ends"])
        assert warning["advice"].startswith("train")


# --- the gate ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(models: Callable[[str], Path]) -> Path:
    """A random model with windows of 16."""
    return models("mobilellm_p1")


def float_engine(folder: Path) -> ReferenceEngine:
    """The model as trained."""
    return ReferenceEngine(load_model(folder), None, CONTEXT)


Read = Callable[[ReferenceEngine, list[int], int], Logits]
"""(engine, tokens, position) -> logits [1, V]"""


def walking(folder: Path, read: Read) -> SteppingEngine:
    """An engine that can only be walked, as those of devices are, and reads in its own way."""
    inner = float_engine(folder)
    return SteppingEngine(lambda tokens, position: read(inner, tokens, position), CONTEXT, CONTEXT, inner.vocab_size)


def right(inner: ReferenceEngine, tokens: list[int], position: int) -> Logits:
    """As it should be."""
    return inner.step(tokens, position)


def compare(folder: Path, read: Read, **options: Any) -> dict[str, Any]:
    """The result for one engine, in three passages: two as long as the context, a shorter one."""
    arguments = {"context": CONTEXT, "window": 16, **options}
    return parity(float_engine(folder), {"artifact": walking(folder, read)}, TOKENS, **arguments)


def test_a_perfect_engine_differs_nowhere(folder: Path) -> None:
    result = compare(folder, right)
    (stage,) = result["stages"]
    assert stage["kl_mean"] < FLOAT_KL
    assert stage["top1_agreement"] == 1
    assert math.isclose(stage["perplexity"], result["reference_perplexity"], rel_tol=1e-4)
    assert result["passed"]


def late(inner: ReferenceEngine, tokens: list[int], position: int) -> Logits:
    """Decodes one position too far: a key is missing between the prompt and the answer."""
    return inner.step(tokens, min(position + (len(tokens) == 1 and position > 0), CONTEXT - 1))


def reversed_chunks(inner: ReferenceEngine, tokens: list[int], position: int) -> Logits:
    """The chunks are right, their order inside is not."""
    return inner.step(tokens[::-1], position)


def one_wrong_token(inner: ReferenceEngine, tokens: list[int], position: int) -> Logits:
    """One token of each long call is read wrong."""
    return inner.step([*tokens[:5], (tokens[5] + 1) % inner.vocab_size, *tokens[6:]] if len(tokens) > 5 else tokens, position)


def too_sure(inner: ReferenceEngine, tokens: list[int], position: int) -> Logits:
    """All logits one percent too large."""
    return inner.step(tokens, position) * np.float32(1.01)


def forgetful(inner: ReferenceEngine, tokens: list[int], position: int) -> Logits:
    """The window is one token too short."""
    config = inner.model.config
    layers = tuple(replace(layer, window=None if layer.window is None else layer.window - 1) for layer in config.layers)
    inner.model.config = replace(config, layers=layers) if config.layers[1].window == 16 else config
    return inner.step(tokens, position)


@pytest.mark.parametrize("fault", [late, reversed_chunks, one_wrong_token, too_sure, forgetful])
def test_a_broken_engine_does_not_pass(fault: Read, folder: Path) -> None:
    result = compare(folder, fault)
    assert not result["passed"]
    assert result["stages"][0]["kl_mean"] > result["limits"]["kl_conversion"]["limit"]


def test_a_window_that_is_too_short_shows_where_the_window_ends(folder: Path) -> None:
    phases = compare(folder, forgetful)["phases"]
    long = compare(folder, forgetful, window=CONTEXT - 1)["phases"]
    assert phases["wrapped"]["kl_mean"] > FLOAT_KL
    assert 0 < long["wrapped"]["positions"] < phases["wrapped"]["positions"]


def test_a_fault_of_prefill_shows_in_the_phase_of_prefill(folder: Path) -> None:
    def sure_in_prefill(inner: ReferenceEngine, tokens: list[int], position: int) -> Logits:
        return inner.step(tokens, position) * np.float32(1 + (len(tokens) > 1))

    phases = compare(folder, sure_in_prefill)["phases"]
    assert phases["prefill"]["kl_mean"] > 0.01
    assert phases["decode"]["kl_mean"] < FLOAT_KL


def test_phases_count_every_position_once(folder: Path) -> None:
    result = compare(folder, right)
    phases = result["phases"]
    assert phases["prefill"]["positions"] + phases["decode"]["positions"] == result["positions"]
    assert 0 < phases["wrapped"]["positions"] < result["positions"]
    assert compare(folder, right, window=0)["phases"]["wrapped"] is None


def rounded_stages(folder: Path) -> tuple[ReferenceEngine, Floor]:
    """A converted model, and the floor of its arithmetic."""
    recipe = find_recipe("8da4w-g32")
    exact = ReferenceEngine(convert(load_model(folder), recipe), recipe, CONTEXT)
    return exact, Floor(exact, ReferenceEngine(moved(exact.model, MOVED_FAR), recipe, CONTEXT))


def test_the_loss_is_shared_out_over_the_stages(folder: Path) -> None:
    rounded, floor = rounded_stages(folder)
    result = parity(float_engine(folder), {"fake_quant": rounded, "artifact": rounded}, TOKENS, context=CONTEXT, floor=floor)
    first, last = result["stages"]
    assert first["kl_step"] == first["kl_mean"] == last["kl_mean"] > 0
    assert last["kl_step"] == last["kl_conversion"] == 0
    assert first["perplexity"] == last["perplexity"] != result["reference_perplexity"]


def test_an_artifact_that_leaves_its_rounded_model_does_not_pass(folder: Path) -> None:
    """Near enough to the float model for four bits, but not what was quantized."""
    rounded, floor = rounded_stages(folder)
    result = parity(float_engine(folder), {"fake_quant": rounded, "artifact": float_engine(folder)}, TOKENS, context=CONTEXT, floor=floor)
    assert result["stages"][1]["kl_mean"] == 0
    assert result["stages"][1]["kl_conversion"] > result["limits"]["kl_conversion"]["limit"]
    assert not result["passed"]


def test_the_artifact_is_judged_the_same_whatever_stages_are_shown(folder: Path) -> None:
    rounded, floor = rounded_stages(folder)
    shown = parity(float_engine(folder), {"fake_quant": rounded, "artifact": rounded}, TOKENS, context=CONTEXT, floor=floor)
    alone = parity(float_engine(folder), {"artifact": walking(folder, right)}, TOKENS, context=CONTEXT, floor=floor)
    assert shown["floor"] == alone["floor"]
    assert shown["passed"] and not alone["passed"]


def test_a_moved_model_has_the_same_tensors_and_differs_by_the_order_of_sums(folder: Path) -> None:
    model = load_model(folder)
    other = moved(model)
    assert all(one is another for one, another in zip(model.parameters(), other.parameters(), strict=True))
    tokens = torch.tensor([TOKENS[:50]])
    with torch.no_grad():
        expected, found = model(tokens), other(tokens)
        assert torch.equal(model(tokens), expected), "the hooks are the twin's alone"
    assert 0 < ((found - expected).norm() / expected.norm()).item() < 1e-4


def test_a_twin_can_be_changed_and_the_model_stays(folder: Path) -> None:
    model = load_model(folder)
    other = twin(model)
    other.blocks[0].mlp.gate = torch.nn.Identity()
    assert isinstance(model.blocks[0].mlp.gate, torch.nn.Linear)


def test_logits_that_are_no_numbers_are_told(folder: Path) -> None:
    def broken(inner: ReferenceEngine, tokens: list[int], position: int) -> Logits:
        return inner.step(tokens, position) * np.float32(np.nan)

    with pytest.raises(BundleError, match="logits of stage artifact are no numbers"):
        compare(folder, broken)


def test_huge_logits_have_a_finite_perplexity(folder: Path) -> None:
    def sure(inner: ReferenceEngine, tokens: list[int], position: int) -> Logits:
        return inner.step(tokens, position) * np.float32(1e6)

    json.dumps(compare(folder, sure), allow_nan=False)


def test_progress_reaches_its_end_and_never_turns_back(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    compare(folder, right, progress=lambda _, done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


def test_a_walk_begins_anew(folder: Path) -> None:
    engine, plan = walking(folder, right), Passage(TOKENS[:40], [16, 1, 3])
    expected = read_passage(engine, plan, lambda _: None)
    assert len(expected) == len(plan.positions)
    assert np.array_equal(read_passage(engine, plan, lambda _: None), expected)


# --- the verb ---------------------------------------------------------------------------------------------------------------------

STAGE_KEYS = {"name", "kl_mean", "kl_p99", "top1_agreement", "perplexity"}
"""Promised by the design's JSON."""


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("stories260k", "fp"),
        ("stories260k", "8da4w-g32"),
        ("stories260k", "8da8w"),
        pytest.param("demo", "8da4w-g32", marks=pytest.mark.slow),
    ],
)
def test_what_runs_is_what_was_trained(model: str, recipe: str, bundles: Bundles, models: Any, shared: Any) -> None:
    text = held_out_text(6) if model == "demo" else shared("text/tinystories_sample.txt").read_text(encoding="utf-8")
    result = verbs.parity(bundles(model, recipe), str(models(model)), text, tokens=240, threads=1)
    assert result["passed"]
    assert [stage["name"] for stage in result["stages"]] == ["fake_quant", "graph", "artifact"]
    assert all(set(stage) >= STAGE_KEYS for stage in result["stages"])
    assert set(result) >= {"tokens", "reference_perplexity", "stages", "phases", "limits", "floor", "parts", "warnings", "passed"}
    assert set(result["phases"]) == {"prefill", "decode", "wrapped"}
    assert (result["phases"]["wrapped"] is None) == (model != "demo")
    assert set(result["limits"]) == {"kl_conversion"}
    assert set(result["floor"]) == {"kl_mean", "kl_se", "kl_p99"}
    assert result["parts"]["passed"]
    assert result["stages"][-1]["kl_conversion"] < result["limits"]["kl_conversion"]["limit"]
    if recipe == "fp":
        assert all(stage["kl_mean"] < FLOAT_KL and stage["top1_agreement"] == 1 for stage in result["stages"])
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("other", ["demo", "llama"])
def test_a_reference_of_another_model_is_refused(other: str, bundles: Bundles, models: Any) -> None:
    with pytest.raises(InputError, match="does not hold the weights"):
        verbs.parity(bundles("stories260k", "8da8w"), str(models(other)), "Once upon a time there was a little dog. " * 9)


def test_a_stage_that_does_not_exist_is_refused_with_those_that_do(bundles: Bundles, models: Any) -> None:
    with pytest.raises(InputError, match=r"grpah.*fake_quant, graph, artifact"):
        verbs.parity(bundles("stories260k", "fp"), str(models("stories260k")), "Once", stages=["grpah", "artifact"])


def test_the_artifact_is_compared_whatever_the_stages_are(bundles: Bundles, models: Any, shared: Any) -> None:
    text = shared("text/tinystories_sample.txt").read_text(encoding="utf-8")
    result = verbs.parity(bundles("stories260k", "fp"), str(models("stories260k")), text, tokens=64, stages=[], threads=1)
    assert [stage["name"] for stage in result["stages"]] == ["artifact"]
    assert result["passed"]
