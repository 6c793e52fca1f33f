"""Graphs of standard operators alone, on ONNX's own evaluator: no runtime's fusions, none of our code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from lobit import verbs
from lobit.checkpoint import load_config
from lobit.runtime.engine import SteppingEngine
from lobit.runtime.onnx_ports import GRAPH_FILE
from tests.onnx_walks import CHUNK, CONTEXT, FLOAT_RELATIVE, PORTABLE_KL, UNROUNDED_KL, export, off, reference, short_texts, walked

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["fp", "8da4w-g32", "8da8w", "bitnet", "bonsai"])
@pytest.mark.parametrize("model", ["llama", "qwen3", "mobilellm_p1"])
def test_a_portable_graph_is_valid_and_the_reference_evaluator_runs_it(model: str, name: str, models: Any, tmp_path: Path) -> None:
    """Several calls on ONNX's own evaluator, in numpy: no runtime's fusions, none of our code."""
    recipe = verbs.choose_recipe(name, kv_cache="float", activations="float")
    bundle = export(models(model), recipe, tmp_path / "bundle", portable=True)
    onnx.checker.check_model(str(bundle / GRAPH_FILE), full_check=True)
    graph = onnx.load(bundle / GRAPH_FILE)
    assert {node.domain for node in graph.graph.node} == {""}
    evaluator, config = ReferenceEvaluator(graph), load_config(models(model))
    caches = {
        f"past_key_values.{layer}.{part}": np.zeros((1, config.kv_heads, 0, config.head_dim), np.float32)
        for layer in range(len(config.layers))
        for part in ("key", "value")
    }

    empty = dict(caches)

    def read(tokens: list[int], position: int) -> Any:
        outputs = evaluator.run(None, {"input_ids": np.array([tokens])} | (caches if position else empty))
        named = dict(zip([value.name for value in graph.graph.output], outputs, strict=True))
        caches.update({name: named[name.replace("past_key_values", "present")] for name in caches})
        return named["logits"][0]

    engines = reference(models(model), recipe), SteppingEngine(read, CONTEXT, CHUNK, config.vocab_size)
    if any(rule.activation_bits for rule in recipe.rules):
        assert off(*map(short_texts, engines)) < PORTABLE_KL
    else:
        expected, found = map(walked, engines)
        assert np.abs(found - expected).max() / np.abs(expected).max() < FLOAT_RELATIVE


@pytest.mark.parametrize("name", ["8da4w-g32", "8da8w", "bitnet"])
@pytest.mark.parametrize("model", ["llama", "qwen3", "mobilellm_p1"])
def test_the_limit_on_rounded_inputs_would_notice_inputs_that_are_not(model: str, name: str, models: Any) -> None:
    recipe = verbs.choose_recipe(name, kv_cache="float", activations="float")
    floats = replace(recipe, rules=tuple(replace(rule, activation_bits=None) for rule in recipe.rules))
    rounded, unrounded = (short_texts(reference(models(model), one)) for one in (recipe, floats))
    assert off(rounded, unrounded) > UNROUNDED_KL > PORTABLE_KL
