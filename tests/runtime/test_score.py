"""The logits after every token, as evaluation wants them: the same as token by token, in as few calls as the program allows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobit import verbs
from lobit.checkpoint import load_model
from lobit.errors import InputError
from lobit.quant_recipes.catalog import find_recipe
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import Engine, SteppingEngine, open_engine
from lobit.runtime.reference import ReferenceEngine

pytestmark = pytest.mark.usefixtures("one_thread", "parts_once")
CLOSE = 1e-4
"""Of logits of float models: prefill and decode add up in another order."""
CONTEXT, CHUNK, TOKENS = 96, 16, [5, *range(3, 43)]


def exported(target: str, model: Path, out: Path, **options: Any) -> SteppingEngine:
    verbs.export(str(model), target, out, recipe=find_recipe("fp"), context=CONTEXT, chunk=CHUNK, **options)
    engine = open_engine(open_bundle(out), 1)
    assert isinstance(engine, SteppingEngine)
    return engine


def counted(engine: SteppingEngine) -> list[int]:
    """Tokens of each call that the engine makes from now on."""
    calls, step = [], engine.step
    engine.step = lambda tokens, position: (calls.append(len(tokens)), step(tokens, position))[1]
    return calls


def assert_scores(engine: Engine, expected: Any) -> None:
    """In one call of the verb, in two that follow each other, and after the last tokens alone."""
    limit = CLOSE * float(np.abs(expected).max())
    engine.reset()
    np.testing.assert_allclose(engine.score(TOKENS), expected, rtol=0, atol=limit)
    engine.reset()
    engine.prefill(TOKENS[:7])
    np.testing.assert_allclose(engine.score(TOKENS[7:]), expected[7:], rtol=0, atol=limit)
    assert engine.position == len(TOKENS)
    for count in (1, 7, CHUNK + 1):
        engine.reset()
        np.testing.assert_allclose(engine.score(TOKENS, count), expected[-count:], rtol=0, atol=limit)
        assert engine.position == len(TOKENS)


@pytest.mark.parametrize("model", ["llama", "mobilellm_p1"])
@pytest.mark.parametrize(("target", "portable"), [("xnnpack", False), ("onnx", False), ("onnx", True)])
def test_a_program_of_all_logits_gives_them_chunk_by_chunk(target: str, portable: bool, model: str, models: Any, tmp_path: Path) -> None:
    """Past the windows of mobilellm_p1, which are 16."""
    engine = exported(target, models(model), tmp_path / "bundle", all_logits=True, **({"portable": True} if portable else {}))
    expected = ReferenceEngine(load_model(models(model)), context=CONTEXT).score(TOKENS)
    assert_scores(engine, expected)
    engine.reset()
    calls = counted(engine)
    engine.score(TOKENS)
    assert calls == [CHUNK, CHUNK, len(TOKENS) - 2 * CHUNK]
    engine.reset()
    np.testing.assert_allclose(engine.prefill(TOKENS), expected[-1], rtol=0, atol=CLOSE * float(np.abs(expected).max()))


def test_a_program_of_the_last_logits_is_read_token_by_token(models: Any, tmp_path: Path) -> None:
    engine = exported("onnx", models("llama"), tmp_path / "bundle")
    assert_scores(engine, ReferenceEngine(load_model(models("llama")), context=CONTEXT).score(TOKENS))
    engine.reset()
    calls = counted(engine)
    engine.score(TOKENS)
    assert calls == [1] * len(TOKENS)
    engine.reset()
    calls.clear()
    engine.score(TOKENS, 4)
    assert calls == [CHUNK, CHUNK, len(TOKENS) - 2 * CHUNK - 3, 1, 1, 1]


def test_the_reference_scores_as_it_decodes(models: Any) -> None:
    engine = ReferenceEngine(load_model(models("mobilellm_p1")), context=CONTEXT)
    assert_scores(engine, np.stack([engine.decode(token) for token in TOKENS]))


@pytest.mark.parametrize(("tokens", "told"), [([], "no tokens"), ([1] * (CONTEXT + 1), "context"), ([96], "vocabulary")])
def test_what_cannot_be_read_is_refused(tokens: list[int], told: str, models: Any) -> None:
    engine = ReferenceEngine(load_model(models("llama")), context=CONTEXT)
    with pytest.raises(InputError, match=told):
        engine.score(tokens)
    assert engine.position == 0
