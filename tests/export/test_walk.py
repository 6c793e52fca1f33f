"""The walk and its small operations compute the model: of every family and kind of rounding, chunk by chunk and after going back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lobit.checkpoint import load_model
from lobit.export.eager import EagerGraph
from lobit.quant_recipes.apply import convert
from lobit.quant_recipes.catalog import find_recipe
from lobit.runtime.engine import SteppingEngine
from lobit.runtime.reference import ReferenceEngine
from tests.small_models import FAMILIES, write_model

CONTEXT, CHUNK = 48, 16
CLOSE = 2e-4
"""Of the largest logit: sums of float32 in another order."""
FLIPPED = 0.1
"""Of the largest logit, where an input or a cache entry on a rounding boundary may fall to its other side."""


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_model(request.param, folder)
    return folder


def eager(model: Any) -> SteppingEngine:
    graph = EagerGraph(model)
    return SteppingEngine(
        lambda tokens, position: graph(torch.tensor([tokens]), torch.tensor([position]))[0].numpy(), CONTEXT, CHUNK, model.config.vocab_size
    )


def errors(engine: SteppingEngine, reference: ReferenceEngine) -> Any:
    """After a prompt of several chunks and a few tokens, of the largest logit; then from the middle on again."""
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, engine.vocab_size, CONTEXT)]
    found, expected = ([one.prefill(tokens[:40]), *(one.decode(token) for token in tokens[40:44])] for one in (engine, reference))
    for one, rows in ((engine, found), (reference, expected)):
        assert one.rewind(20)
        rows += [one.prefill(tokens[5:15]), one.decode(7)]
    pairs = zip(found, expected, strict=True)
    return np.array([np.abs(mine - theirs).max() / np.abs(theirs).max() for mine, theirs in pairs])


def test_every_family_in_floats(folder: Path) -> None:
    model = load_model(folder)
    assert errors(eager(model), ReferenceEngine(model, None, CONTEXT)).max() < CLOSE


@pytest.mark.parametrize("name", ["8da4w-g32", "bitnet", "trilm", "8da8w"])
def test_every_kind_of_rounding(name: str, models: Any) -> None:
    recipe = find_recipe(name).with_changes(kv_cache="float")
    model = convert(load_model(models("llama")), recipe)
    found = errors(eager(model), ReferenceEngine(model, recipe, CONTEXT))
    assert np.median(found) < CLOSE and found.max() < FLIPPED


def test_the_logits_of_all_tokens_are_those_of_a_prompt(models: Any) -> None:
    model = load_model(models("qwen3"))
    tokens = list(range(3, 23))
    found = EagerGraph(model, all_logits=True)(torch.tensor([tokens]), torch.tensor([0]))[0].numpy()
    np.testing.assert_allclose(found, ReferenceEngine(model, None, CONTEXT).score(tokens), rtol=0, atol=CLOSE * float(np.abs(found).max()))
