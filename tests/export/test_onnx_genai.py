"""Folders for target onnx in another client: onnxruntime-genai, unchanged."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
import pytest

from lobit import verbs
from lobit.quant_recipes.catalog import find_recipe
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import open_engine
from lobit.runtime.generate import generate
from lobit.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT, THREADS = 96, 1
TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, 64, 30)]
PROMPT = "Once upon a time there was a little girl"


def made(model: Path, recipe: str, out: Path, portable: bool = False) -> Path:
    verbs.export(str(model), "onnx", out, recipe=find_recipe(recipe), context=CONTEXT, chunk=24, portable=portable)
    return out


@pytest.mark.parametrize(
    ("model", "recipe", "portable"),
    [
        ("stories260k", "fp", False),
        ("stories260k", "fp", True),
        ("stories260k", "w4-channel", False),
        ("demo", "8da4w-g32", False),
        ("demo", "bitnet", False),
        ("demo", "8da4w-g32", True),
    ],
)
def test_onnxruntime_genai_generates_the_same_tokens(model: str, recipe: str, portable: bool, models: Any, tmp_path: Path) -> None:
    bundle = made(models(model), recipe, tmp_path / "bundle", portable)
    tokenizer = Tokenizer.from_folder(bundle)
    client = onnxruntime_genai.Model(str(bundle))
    reader = onnxruntime_genai.Tokenizer(client)
    assert [int(token) for token in reader.encode(PROMPT)] == tokenizer.encode(PROMPT, bos=False), "its default is to begin with no bos"
    reader.update_options(add_special_tokens="true")
    prompt = [int(token) for token in reader.encode(PROMPT)]
    assert prompt == tokenizer.encode(PROMPT)
    generator = onnxruntime_genai.Generator(client, onnxruntime_genai.GeneratorParams(client))
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)]
    engine = open_engine(open_bundle(bundle), THREADS)
    expected = [*prompt, *generate(engine, prompt, max_new_tokens=CONTEXT, stop=tokenizer.stop).tokens]
    assert len(found) > len(prompt) + 10
    assert found[: len(expected)] == expected


def test_onnxruntime_genai_runs_layers_with_windows(models: Any, tmp_path: Path) -> None:
    bundle = made(models("mobilellm_p1"), "fp", tmp_path / "bundle")
    client = onnxruntime_genai.Model(str(bundle))
    generator = onnxruntime_genai.Generator(client, onnxruntime_genai.GeneratorParams(client))
    generator.append_tokens(TOKENS)
    for _ in range(60):
        generator.generate_next_token()
    engine = open_engine(open_bundle(bundle), THREADS)
    logits, expected = engine.prefill(TOKENS), []
    for _ in range(60):
        expected.append(int(logits.argmax()))
        logits = engine.decode(expected[-1])
    assert [int(token) for token in generator.get_sequence(0)][30:] == expected
