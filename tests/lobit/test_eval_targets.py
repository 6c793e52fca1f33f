"""`lobit eval` on every target: four tasks have the float model's likelihoods and answers, but for what the bundle rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lobit import verbs
from lobit.runtime.eval_cache import Kept
from lobit.targets import TARGETS
from lobit.verbs.evaluate import columns_of
from tests.conftest import EXCLUDED

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "parts_once")]
TASKS = ("arc_easy", "piqa", "openbook_qa", "lambada_openai")
STAGES = ("float", "artifact")


class Bound(NamedTuple):
    """How far a likelihood may be from the float model's, and how many answers of a task may differ, with room for other processors."""

    share: float
    nats: float
    answers: int


FLOAT = Bound(1e-5, 1e-3, 0)
"""Sums in another order: 6e-5 nats when this was written."""
HALF = Bound(1e-2, 0.5, 1)
"""Keys and values, or all that is computed, in half floats: 0.08 nats."""
INT8 = Bound(0.2, 4.0, 2)
"""Weights and inputs rounded: 1.3 nats, or 5 %."""
CASES = {
    ("xnnpack", "fp"): (4, FLOAT),
    ("xnnpack", "8da8w"): (4, INT8),
    ("onnx", "fp"): (4, FLOAT),
    ("onnx", "8da8w"): (4, INT8),
    ("gguf", "fp"): (4, HALF),
    ("gguf", "8da8w"): (4, INT8),
    ("coreml", "fp16"): (4, HALF),
    ("coreml", "8da8w"): (4, INT8),
    ("qnn", "8da8w"): (1, INT8),  # its emulator takes half a minute for an item
}
"""Items of each task and the bound, by target and recipe."""


def test_every_target_is_evaluated() -> None:
    assert {target for target, _ in CASES} == set(TARGETS)


@pytest.mark.parametrize(("target", "recipe"), CASES)
def test_four_tasks_are_answered_as_by_the_float_model(
    target: str, recipe: str, stories: Path, shared: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if target == "qnn":
        request.getfixturevalue("qnn_libraries")
    items, bound = CASES[target, recipe]
    chosen = verbs.choose_recipe(recipe, exclude=(EXCLUDED,) if (target, recipe) == ("gguf", "8da8w") else ())
    bundle, cache = str(tmp_path / "bundle"), tmp_path / "cache"
    verbs.export(str(stories), target, Path(bundle), recipe=chosen, context=512, all_logits=target in ("coreml", "qnn"))
    files = [shared(f"tasks/{name}.jsonl") for name in TASKS]
    result = verbs.eval([bundle], files, reference=str(stories), stages=STAGES, limit=items, threads=1, cache=cache)
    assert [(task["name"], task["items"]) for task in result["tasks"]] == [(name, items) for name in TASKS]
    floats, found = (Kept(cache, column.key).scores for column in columns_of([bundle], str(stories), STAGES, 1))
    assert floats.keys() == found.keys() and len(found) == items * len(TASKS)
    for key, scores in floats.items():
        expected = [value for value, _ in scores]
        assert [value for value, _ in found[key]] == pytest.approx(expected, rel=bound.share, abs=bound.nats)
    assert {pair["task"] for pair in result["pairs"]} == set(TASKS)
    assert max(pair["lost"] + pair["gained"] for pair in result["pairs"]) <= bound.answers
