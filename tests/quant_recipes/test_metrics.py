"""What a trained model is worth is what torch says of all its logits; the curves hold every step."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lobit.model import FloatAttention, rotary_tables
from lobit.quant_recipes import metrics as metrics_module
from lobit.quant_recipes.apply import convert, prepare
from lobit.quant_recipes.catalog import find_recipe
from lobit.quant_recipes.corpus import Corpus
from lobit.quant_recipes.curves import PICTURE_FILE, SMOOTH, TABLE_FILE, smooth, write_curves
from lobit.quant_recipes.fake_quant import attention_for
from lobit.quant_recipes.metrics import Figures, figures
from lobit.quant_recipes.train import Row
from lobit.quant_recipes.trainee import new_weights
from tests.quant_recipes.test_trained import small_model

pytestmark = pytest.mark.usefixtures("one_thread")
CORPUS = Corpus(torch.randint(96, (7, 13), generator=torch.Generator().manual_seed(1)))
CONFIG = small_model().config
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_figures_are_torchs(at_once: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "AT_ONCE", at_once)
    recipe, reference, model = find_recipe("8da8w"), new_weights(CONFIG, 0), new_weights(CONFIG, 0)
    for each in (reference, model):
        each.config = replace(each.config, logits_softcap=softcap)
    model = convert(model, recipe)
    tokens, targets = CORPUS.sequences[:, :-1], CORPUS.sequences[:, 1:].flatten()
    attend = attention_for(recipe, FloatAttention(model.config))
    with torch.no_grad():
        scores = model(tokens, rotary_tables(model.config, torch.arange(12)), attend).flatten(0, 1).log_softmax(1)
        others = reference(tokens).flatten(0, 1).log_softmax(1)
    found = figures(model, CORPUS, recipe, reference)
    assert found.tokens == 7 * 12
    assert found.loss == pytest.approx(F.nll_loss(scores, targets).item(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.kl == pytest.approx((others.exp() * (others - scores)).sum(1).mean().item(), rel=1e-3)
    assert found.top1 == pytest.approx((scores.argmax(1) == others.argmax(1)).float().mean().item())
    assert found.kl > 0
    assert found.reference_loss == pytest.approx(F.nll_loss(others, targets).item(), rel=1e-5)


def test_each_model_reads_the_text_once_and_progress_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "TOGETHER", 24)
    models, reads, told = (new_weights(CONFIG, 0), new_weights(CONFIG, 1)), [0, 0], []
    for i, model in enumerate(models):
        model.embedding.register_forward_hook(lambda layer, given, out, i=i: reads.__setitem__(i, reads[i] + given[0].numel()))
    figures(models[0], CORPUS, None, models[1], lambda *count: told.append(count))
    assert reads == [7 * 12, 7 * 12]
    assert told == [("measuring", done, 7) for done in (2, 4, 6, 7)]


def test_a_model_is_no_distance_from_itself() -> None:
    found = figures(new_weights(CONFIG, 0), CORPUS, None, new_weights(CONFIG, 0))
    assert (found.kl, found.top1) == (pytest.approx(0, abs=1e-6), 1.0)
    alone = figures(new_weights(CONFIG, 0), CORPUS)
    assert (alone.kl, alone.top1, alone.reference_loss) == (None, None, None)
    assert alone.loss == found.loss == found.reference_loss


def test_a_loss_beyond_all_numbers_has_a_perplexity() -> None:
    assert Figures(1, 2.0).perplexity == pytest.approx(math.e**2)
    assert 1e300 < Figures(1, 1e6).perplexity < math.inf  # JSON has no infinity


def test_the_key_value_cache_of_a_recipe_counts() -> None:
    recipe = find_recipe("8da8w")
    model = prepare(new_weights(CONFIG, 0), recipe)
    assert figures(model, CORPUS, recipe).loss != figures(model, CORPUS).loss


def rows(count: int) -> list[Row]:
    return [Row(step, 8 * step, 5 / step, 1e-3, 0.1, 1.5, 0.25) for step in range(1, count + 1)]


@pytest.mark.parametrize("count", [1, 3, 200])
def test_curves_hold_every_step_and_a_picture(count: int, tmp_path: Path) -> None:
    write_curves(rows(count), tmp_path, "a model, a recipe")
    with (tmp_path / TABLE_FILE).open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(line["step"]) for line in table] == list(range(1, count + 1))
    assert [float(line["loss"]) for line in table] == [row.loss for row in rows(count)]
    assert set(table[0]) == {"step", "tokens", "loss", "learning_rate", "weight_decay", "gradient_norm", "seconds"}
    assert (tmp_path / PICTURE_FILE).read_bytes().startswith(PNG)


def test_a_line_is_the_mean_of_what_came_shortly_before() -> None:
    values = [float(i) for i in range(3 * SMOOTH)]
    found = smooth(values)
    assert found[:4] == [0, 0.5, 1, 2]
    assert found[-1] == sum(values[-3:]) / 3
    assert smooth([1.0, 5.0]) == [1.0, 5.0]
