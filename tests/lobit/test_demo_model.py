"""The shipped demo model: it is what its record says, and its training can be repeated."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from lobit.checkpoint import load_model
from lobit.demo import BEGIN, END, FOLDER, held_out_text
from lobit.demo.evaluate import held_out_figures
from lobit.demo.story import STORIES
from lobit.demo.train import CONFIG, Plan, initialise, train
from lobit.demo.vocabulary import BEGIN_ID, END_ID, count
from lobit.families import read_config
from lobit.model import Transformer

ERRORS = 4
"""Standard errors of the mean that chance is allowed."""
SHORT = Plan(steps=3, step_tokens=256, row_tokens=128, long_row_tokens=256, long_every=2)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_model(FOLDER)


@pytest.fixture(scope="module")
def record() -> dict[str, float]:
    return dict(json.loads((FOLDER / "training.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def fresh(model: Transformer, tokenizer: Tokenizer) -> dict[str, float]:
    return held_out_figures(model, tokenizer, stories=100, seed=1)


def test_the_folder_holds_about_four_megabytes() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert 3.5e6 < sum(files.values()) < 4.5e6


def test_the_folder_is_that_of_the_training_script() -> None:
    assert json.loads((FOLDER / "config.json").read_text(encoding="utf-8")) == CONFIG


def test_recorded_entropy_is_that_of_the_grammar(record: dict[str, float], tokenizer: Tokenizer) -> None:
    assert record["entropy"] == pytest.approx(STORIES.entropy_per_token(partial(count, tokenizer)), rel=1e-9)


def test_the_model_is_no_better_than_the_grammar(fresh: dict[str, float]) -> None:
    assert fresh["gap"] > -ERRORS * fresh["gap_standard_error"]


def test_the_model_is_as_near_to_perfect_as_recorded(fresh: dict[str, float], record: dict[str, float]) -> None:
    assert abs(fresh["gap"] - record["gap"]) < ERRORS * fresh["gap_standard_error"]
    assert record["gap"] < 0.05


def test_the_model_needs_its_global_layers(model: Transformer, tokenizer: Tokenizer, fresh: dict[str, float]) -> None:
    window = model.config.largest_window
    local = Transformer(replace(model.config, layers=tuple(replace(layer, window=window) for layer in model.config.layers)))
    local.load_state_dict(model.state_dict())
    assert held_out_figures(local.eval(), tokenizer, stories=20, seed=1)["loss"] > 1.5 * fresh["loss"]


def test_the_model_is_as_good_at_the_end_of_its_context(model: Transformer, tokenizer: Tokenizer, record: dict[str, float]) -> None:
    ids = torch.tensor(tokenizer.encode(held_out_text(40, seed=1)).ids)
    rows = ids[: len(ids) // 1024 * 1024].reshape(-1, 1024)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(rows)[:, :-1].mT, rows[:, 1:], reduction="none")
    assert losses[:, 512:].mean() < 1.25 * record["loss"]


def test_stories_are_seen_as_in_training(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(held_out_text(2)).ids
    assert (ids[0], ids[-1], ids.count(BEGIN_ID), ids.count(END_ID)) == (BEGIN_ID, END_ID, 2, 2)
    assert (tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)) == (0, 1)


def test_transformers_reads_the_same_tokens(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDER)
    text = held_out_text(3)
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.chat_template) == (BEGIN_ID, END_ID, None)


def test_the_same_seed_trains_the_same_bytes(tmp_path: Path) -> None:
    plans = {"a": SHORT, "b": SHORT, "c": replace(SHORT, seed=1)}
    for name, plan in plans.items():
        train(tmp_path / name, plan, stories=2)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    weights = "model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() != (tmp_path / "c" / weights).read_bytes()


def test_the_learning_rate_rises_and_falls() -> None:
    plan = Plan(steps=1000)
    rates = [plan.rate(step) for step in range(plan.steps)]
    assert max(rates) == rates[plan.warm_up] == plan.learning_rate
    assert rates[0] < rates[50] < rates[100] > rates[500] > rates[-1] > 0


def test_attention_begins_by_adding_what_it_read() -> None:
    model = Transformer(read_config(CONFIG))
    initialise(model, seed=0)
    weights, x = model.state_dict(), torch.randn(128, generator=torch.Generator().manual_seed(0))
    values = (weights["layers.0.attention.v.weight"] @ x).unflatten(0, (2, 32)).repeat_interleave(2, 0).flatten()
    added = weights["layers.0.attention.o.weight"] @ values
    assert torch.cosine_similarity(added, x, dim=0) > 0.5


def test_importing_the_demo_does_not_import_torch() -> None:
    code = "import sys, lobit.demo; lobit.demo.held_out_text(1); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[2], check=False).returncode == 0
