"""An engine that is taken back goes on as one that never read further; where a window has dropped tokens it says that it cannot."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobit import verbs
from lobit.checkpoint import load_model
from lobit.errors import InputError
from lobit.quant_recipes.catalog import find_recipe
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import Engine, open_engine
from lobit.runtime.reference import ReferenceEngine

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = 1e-4
"""Of logits of float models: prefill and decode add up in another order."""


def onnx(model: Path, out: Path, portable: bool = False, context: int = 64) -> Engine:
    verbs.export(str(model), "onnx", out, recipe=find_recipe("fp"), context=context, chunk=16, portable=portable)
    return open_engine(open_bundle(out), 1)


@pytest.fixture(params=["xnnpack", "onnx", "onnx-portable", "reference"])
def engine(request: pytest.FixtureRequest, bundles: Any, models: Any, tmp_path: Path) -> Engine:
    if request.param == "xnnpack":
        return open_engine(open_bundle(bundles("stories260k", "fp")), 1)
    if request.param == "reference":
        return ReferenceEngine(load_model(models("stories260k")), context=64)
    return onnx(models("stories260k"), tmp_path / "bundle", request.param == "onnx-portable")


@pytest.mark.parametrize("position", [0, 3, 19, 24])
def test_a_rewound_engine_goes_on_as_if_it_had_not_read_further(position: int, engine: Engine) -> None:
    tokens = list(range(3, 27))
    engine.prefill(tokens[:20])
    for token in tokens[20:]:
        engine.decode(token)
    assert engine.rewind(position) and engine.position == position
    other = [400, 401, 402]
    found = [engine.prefill(other), engine.decode(77)]
    engine.reset()
    expected = [engine.prefill([*tokens[:position], *other]), engine.decode(77)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE * float(np.abs(expected).max()))


@pytest.mark.parametrize("position", [-1, 6])
def test_an_engine_is_not_taken_forward(position: int, engine: Engine) -> None:
    engine.prefill([1, 2, 3, 4, 5])
    with pytest.raises(InputError, match="not among the 5 tokens"):
        engine.rewind(position)
    assert engine.position == 5


@pytest.mark.parametrize("target", ["xnnpack", "onnx"])
def test_a_window_that_has_wrapped_cannot_be_taken_back(target: str, bundles: Any, models: Any, tmp_path: Path) -> None:
    bundle = bundles("mobilellm_p1", "fp") if target == "xnnpack" else tmp_path / "bundle"
    engine = open_engine(open_bundle(bundle), 1) if target == "xnnpack" else onnx(models("mobilellm_p1"), bundle, context=128)
    window = min(open_bundle(bundle).manifest.cache.slots)
    assert window + 4 <= engine.context
    engine.prefill([1] * window)
    assert engine.rewind(window - 4)
    engine.prefill([1] * 8)
    after = engine.position
    assert after > window
    assert not engine.rewind(after - 1) and engine.position == after
    assert engine.rewind(after), "where it is already"
