"""Every family on every target: what its runtime runs is what transformers computes, and what was quantized."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lobit import verbs
from lobit.quant_recipes.catalog import find_recipe
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import open_engine
from lobit.runtime.parity import Passage, read_passage
from tests.oracles import VOCABULARY
from tests.small_models import FAMILIES, oracle_logits

SmallModels = Callable[[str], tuple[Path, nn.Module]]
"""The fixture of tests/conftest.py: folder and oracle of a family's small model."""
CONTEXT, CHUNK, THREADS = 64, 24, 1
CALLS = [1, 5, CHUNK]
"""Tokens of each prefill call; the last overwrites in every window what its own first tokens still see."""
FLOAT_RELATIVE = 1e-4
"""Of the largest logit: sums of float32 in another order give about 1e-6, one key that is missed or seen too much over 1e-2."""
TEXT = "".join(chr(code) for code in np.random.default_rng(0).integers(32, 127, 160))

KINDS: dict[str, tuple[str, dict[str, bool]]] = {
    "xnnpack": ("xnnpack", {}),
    "onnx": ("onnx", {}),
    "portable": ("onnx", {"portable": True}),
    "coreml": ("coreml", {"float32": True, "explicit_cache": True}),
}
"""Target, and its options; tests/export/test_coreml.py has packages of half floats, and states, which are always half floats."""
EVERY = [pytest.param(kind, name, marks=pytest.mark.slow if kind == "xnnpack" else ()) for kind in KINDS for name in FAMILIES]

pytestmark = pytest.mark.usefixtures("one_thread")


def exported(folder: Path, recipe: str, out: Path, kind: str) -> Path:
    target, options = KINDS[kind]
    verbs.export(str(folder), target, out, recipe=find_recipe(recipe), context=CONTEXT, chunk=CHUNK, **options)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_the_float_artifact_computes_what_the_reference_does(kind: str, name: str, small_models: SmallModels, tmp_path: Path) -> None:
    folder, oracle = small_models(name)
    engine = open_engine(open_bundle(exported(folder, "fp", tmp_path / name, kind)), THREADS)
    plan = Passage([int(token) for token in np.random.default_rng(0).integers(0, VOCABULARY, CONTEXT)], CALLS)
    found = read_passage(engine, plan, lambda _: None)
    expected = oracle_logits(oracle, torch.tensor([plan.tokens]))[0, plan.positions].numpy()
    error = np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)
    assert error.max() < FLOAT_RELATIVE, f"relative errors {[f'{value:.0e}' for value in error]}"


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_the_quantized_artifact_is_what_was_quantized(kind: str, name: str, small_models: SmallModels, tmp_path: Path) -> None:
    folder, _ = small_models(name)
    bundle = exported(folder, "8da4w-g32", tmp_path / name, kind)
    verified = verbs.verify(bundle, str(folder))
    assert [verified[f"differing_{kind}"] for kind in ("integers", "scales", "floats")] == [0, 0, 0]
    result = verbs.parity(bundle, str(folder), TEXT, stages=["fake_quant"], threads=THREADS)
    assert kind == "coreml" or result["parts"]["faults"] == []
    assert result["passed"], result["limits"]
    assert (result["phases"]["wrapped"] is not None) == (open_bundle(bundle).manifest.model.largest_window > 0)
