"""Conversations as the app holds them, with the phone's own library and tokenizer: what `lobit run` answers, the app answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lobit import verbs
from lobit.runtime.bundle import open_bundle
from lobit.verbs.talk import bundle_tokenizer
from tests.android.kotlin_tool import run_on_library


def talked(bundle: Path, folder: Path, length: int, *texts: str) -> list[dict[str, Any]]:
    """The answers to texts, one after the other."""
    answers = folder / "answers"
    run_on_library("Talk", bundle, folder / "scratch", answers, length, *texts)
    return [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]


def test_a_text_is_continued_as_lobit_continues_it(bundles: Any, android_tools: Callable[[str], None], tmp_path: Path) -> None:
    """Every text begins anew, behind the token that begins a text; no space is lost between words."""
    android_tools("native")
    bundle = bundles("stories260k", "fp")
    texts = ["Once upon a time", "Lily had a", "Once upon a time"]
    found = talked(bundle, tmp_path, 30, *texts)
    assert [one["text"] for one in found] == [verbs.run(bundle, text, max_new_tokens=30)["text"] for text in texts]
    tokenizer = bundle_tokenizer(open_bundle(bundle))
    assert [one["read"] for one in found] == [len(tokenizer.encode(text)) for text in texts]


@pytest.mark.slow
def test_a_real_chat_model_answers_and_remembers(smollm2: Path, android_tools: Callable[[str], None], tmp_path: Path) -> None:
    """Template, special tokens and stop tokens are those of lobit; the second turn reads only what is new."""
    android_tools("native")
    bundle = tmp_path / "bundle"
    verbs.export(str(smollm2), "xnnpack", bundle, recipe=verbs.choose_recipe("8da8w"), context=512, chunk=128)
    tokenizer = bundle_tokenizer(open_bundle(bundle))
    questions = ["What is the capital of France?", "And of Italy?"]
    first, second = talked(bundle, tmp_path, 60, *questions)
    asked = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": questions[0]}]), bos=False)
    assert first["read"] == len(asked)
    assert second["read"] < len(asked), "the first turn is not read again"
    for answer in (first, second):
        assert answer["text"].strip() and not any(text in answer["text"] for text in tokenizer.special.values())
    assert first["written"] < 60, "a stop token ended it"
