"""`lobit plan` against what an export then gives."""

import json
from pathlib import Path
from typing import Any

import pytest

from lobit import verbs
from lobit.errors import InputError
from lobit.export import plan as planning
from lobit.export.stages import WHOLE, Stages
from lobit.quant_recipes.catalog import CATALOG
from lobit.runtime import parity
from lobit.runtime.bundle import open_bundle
from lobit.targets import TARGETS

FILE_SHARE = 0.03
"""What the bytes of a file may differ from the plan's."""
MODELS = [
    ("stories260k", "fp", 192, 64),
    ("stories260k", "8da8w", 192, 64),
    ("mobilellm_p1", "fp", 128, 32),
    ("mobilellm_p1", "bitnet", 128, 32),
]


@pytest.mark.parametrize(
    ("model", "recipe", "context", "chunk"), [*MODELS, pytest.param("demo", "8da4w-g32", 192, 64, marks=pytest.mark.slow)]
)
def test_the_plan_says_what_the_export_gives(model: str, recipe: str, context: int, chunk: int, bundles: Any, models: Any) -> None:
    manifest = open_bundle(bundles(model, recipe)).manifest
    plan = verbs.plan(str(models(model)), verbs.choose_recipe(recipe), "xnnpack", context=context, chunk=chunk)
    assert plan.problems == []
    assert plan.parameters == manifest.model.parameters
    assert plan.cache == manifest.cache
    assert plan.weights == manifest.weights
    found = manifest.file("program").bytes
    assert abs(plan.file_bytes - found) < FILE_SHARE * found
    assert plan.bits_per_weight == pytest.approx(8 * plan.file_bytes / plan.parameters)


def test_every_reason_why_not_is_in_the_plan(models: Any) -> None:
    plan = verbs.plan(str(models("llama")), verbs.choose_recipe("w4-channel"), "xnnpack", context=999, chunk=16)
    assert len(plan.problems) == 2
    assert "INT8 activations" in plan.problems[0]
    assert "999" in plan.problems[1]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", CATALOG)
def test_every_recipe_and_target_has_a_plan(recipe: str, target: str, models: Any) -> None:
    plan = verbs.plan(str(models("llama")), verbs.choose_recipe(recipe), target, context=64)
    assert plan.file_bytes > 0
    assert plan.host_peak_bytes > 0
    assert (plan.device_peak_bytes > plan.file_bytes) != bool(plan.problems)


def test_progress_never_turns_back_and_ends_at_the_whole() -> None:
    told: list[tuple[str, int, int]] = []
    stages = Stages({"one": 3.0, "two": 1.0}, lambda *said: told.append(said))
    for name in ("one", "two"):
        with stages.stage(name) as count:
            for done in range(5):
                count(done, 5)
    shares = [done for _, done, _ in told]
    assert shares == sorted(shares)
    assert (told[0][1], told[-1][1]) == (0, WHOLE)
    assert told[6] == ("one", round(0.75 * WHOLE), WHOLE), "a stage counts as much as it should take"
    assert [row["name"] for row in stages.rows] == ["one", "two"]


def test_a_float_model_needs_a_recipe(models: Any) -> None:
    with pytest.raises(InputError, match="--recipe"):
        verbs.plan(str(models("llama")), None, "xnnpack")


EXPORT = """
import sys
from pathlib import Path
from lobit import verbs
verbs.export("demo", sys.argv[2], Path(sys.argv[1]), recipe=verbs.choose_recipe("8da4w-g32"), context=int(sys.argv[3]), chunk=32)
"""
CONTEXTS = {"gguf": 32}
"""Where not 192: llama.cpp has no architecture with the demo's windows, so that a file for it holds what one of them does."""
IN_ONE_PROCESS = [name for name, target in TARGETS.items() if not target.proof]
"""Targets whose exports and engines take memory of this process alone; tests/export/test_qnn.py has the others."""
MEMORY_SHARE = 0.20
PARITY_SHARE = 0.30
"""A real model of 135 million parameters took 2.31 GB on XNNPACK, where the plan says 2.2."""


@pytest.mark.slow
@pytest.mark.parametrize("target", IN_ONE_PROCESS)
def test_the_plan_says_what_memory_the_export_takes(target: str, tmp_path: Path, another_process: Any) -> None:
    context = CONTEXTS.get(target, 192)
    another_process(EXPORT, tmp_path / "bundle", target, context)
    stages = json.loads((tmp_path / "bundle" / "build.json").read_text(encoding="utf-8"))["stages"]
    assert [stage["name"] for stage in stages] == ["quantize", "lower", "write"]
    found = max(stage["peak_rss_bytes"] for stage in stages)
    plan = verbs.plan("demo", verbs.choose_recipe("8da4w-g32"), target, context=context, chunk=32)
    assert abs(plan.host_peak_bytes - found) < MEMORY_SHARE * found


PARITY = """
import json, sys
from pathlib import Path
from lobit import verbs
from lobit.demo import held_out_text
from lobit.memory import peak_rss_bytes
verbs.export("demo", sys.argv[2], Path(sys.argv[1]), recipe=verbs.choose_recipe("8da4w-g32"), context=int(sys.argv[3]), chunk=32)
verbs.parity(Path(sys.argv[1]), "demo", held_out_text(20), tokens=600, threads=1)
print(json.dumps(peak_rss_bytes()))
"""


def test_the_plan_reckons_with_as_many_logits_as_parity_compares_at_once() -> None:
    assert planning.COMPARED == parity.COMPARED


@pytest.mark.slow
@pytest.mark.parametrize("target", IN_ONE_PROCESS)
def test_the_plan_says_what_memory_parity_takes(target: str, tmp_path: Path, another_process: Any) -> None:
    context = CONTEXTS.get(target, 192)
    found = int(another_process(PARITY, tmp_path / "bundle", target, context).stdout.split()[-1])
    plan = verbs.plan("demo", verbs.choose_recipe("8da4w-g32"), target, context=context, chunk=32)
    assert abs(plan.parity_peak_bytes - found) < PARITY_SHARE * found
