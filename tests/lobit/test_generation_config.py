"""How a model's authors draw tokens: read from generation_config.json, told in the manifest, and refused where it is nonsense."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lobit import verbs
from lobit.errors import ModelError
from lobit.runtime.manifest import Generation
from lobit.tokenizer_files import declared_generation


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_k": 40, "top_p": 1, "eos_token_id": 2}, {"temperature": 0.6, "top_k": 40, "top_p": 1.0}),
        ({"do_sample": True, "temperature": None, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
    ],
    ids=str,
)
def test_how_the_authors_draw_tokens_is_read(told: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(told))
    assert declared_generation(tmp_path) == expected


def test_a_folder_that_says_nothing_of_drawing_is_fine(tmp_path: Path) -> None:
    assert declared_generation(tmp_path) == {}


@pytest.mark.parametrize("wrong", [{"temperature": "warm"}, {"temperature": -1}, {"top_k": 1.5}, {"top_p": 1.2}, {"top_k": True}], ids=str)
def test_what_nothing_can_be_drawn_with_is_refused_before_any_work(wrong: dict[str, Any], models: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models("llama"), tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps(wrong))
    with pytest.raises(ModelError, match=rf"{next(iter(wrong))} is .* in .*generation_config\.json: correct it or leave it out"):
        verbs.export(str(folder), "onnx", tmp_path / "out", recipe=verbs.choose_recipe("fp"), context=16)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_manifest_tells_how_the_authors_draw(models: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models("llama"), tmp_path / "model"))
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 40}')
    found = verbs.export(str(folder), "onnx", tmp_path / "out", recipe=verbs.choose_recipe("fp"), context=16).generation
    assert found == Generation(0.6, 40, None, None)
