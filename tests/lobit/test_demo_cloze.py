"""The cloze task of the demo's stories: the grammar itself answers every question right, and the demo model nearly all."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lobit.demo.cloze import CHOICES, cloze, task_text
from lobit.demo.story import STORIES
from lobit.runtime.eval_tasks import read_task
from tests.benchmarks.ablation_cloze import cloze_accuracy
from tests.commands import ENVIRONMENT

ENOUGH = 0.95
"""Share of questions that the trained demo model answers right: 99.5 % of 200 when this was written, 12.5 % by chance."""


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_only_the_right_choice_can_go_on(seed: int) -> None:
    one = cloze(random.Random(seed))
    assert [STORIES.can_begin(f"{one.query} {choice}") for choice in one.choices] == [place == one.gold for place in range(CHOICES)]
    assert len(set(one.choices)) == CHOICES
    assert one.choices[one.gold].lower() in one.query.lower()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_a_story_can_begin_as_it_does_and_not_otherwise(seed: int, share: float) -> None:
    text = STORIES.sample(random.Random(seed)).text
    beginning = text[: int(share * len(text))]
    assert STORIES.can_begin(beginning)
    assert not STORIES.can_begin(beginning + "#")


def test_the_same_seed_gives_a_task_that_can_be_read(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lobit.demo.cloze", "--items", "5", "--seed", "3"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout
    assert text == task_text(5, 3) != task_text(5, 4)
    (tmp_path / "cloze.jsonl").write_text(text, encoding="utf-8")
    items = read_task(tmp_path / "cloze.jsonl").items
    assert [item.prompt for item in items] == [json.loads(line)["query"] for line in text.splitlines()]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_demo_model_remembers_its_stories_and_a_ternary_one_without_training_does_not() -> None:
    from lobit.checkpoint import load_model
    from lobit.demo import FOLDER
    from lobit.quant_recipes.apply import convert
    from lobit.quant_recipes.catalog import find_recipe

    assert cloze_accuracy(load_model(FOLDER), find_recipe("fp")) > ENOUGH
    assert cloze_accuracy(convert(load_model(FOLDER), find_recipe("bilm")), find_recipe("bilm")) < ENOUGH / 2
