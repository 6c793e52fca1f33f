"""Training ends with what ships: the same bits, integers of the grid, one tensor where head and embedding share it."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lobit.checkpoint import load_model
from lobit.errors import RecipeError
from lobit.families import read_config
from lobit.model import Transformer, weight_of
from lobit.quant_recipes.apply import convert, layers_of, prepare
from lobit.quant_recipes.catalog import CATALOG, EVERYWHERE, find_recipe
from lobit.quant_recipes.fake_quant import FakeQuantizedEmbedding, FakeQuantizedLinear
from lobit.quant_recipes.grid import dequantize, round_scale
from lobit.quant_recipes.integer import quantize_linear
from lobit.quant_recipes.optimizer import optimizer_for
from lobit.quant_recipes.quantized import load_checkpoint, save_checkpoint
from lobit.quant_recipes.quantizers import quantizer_for
from lobit.quant_recipes.recipe import Recipe, Rule, WeightGrid
from lobit.quant_recipes.schedule import training_of
from lobit.quant_recipes.trainee import Trainee, normed

pytestmark = pytest.mark.usefixtures("one_thread")
TRAINED = [name for name, recipe in CATALOG.items() if all(rule.rounding == "nearest" for rule in recipe.rules)]
"""Recipes that a model is trained by."""
QUANTIZED = [name for name in TRAINED if CATALOG[name].rules]
GRIDS = [
    WeightGrid(8, None),
    WeightGrid(6, None),
    WeightGrid(3, 16),
    WeightGrid(4, 32),
    WeightGrid(4, None, "learned"),
    WeightGrid(4, 32, "learned"),
    WeightGrid(2, None, "absmean", shards=1),
    WeightGrid(2, None, "absmean", shards=2),
    WeightGrid(2, None, "row_norm"),
    WeightGrid(1, None, "absmean", shards=1),
    WeightGrid(1, None, "absmean"),
]
grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid} {grid.scale_rule}")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


VALUES = {
    "model_type": "mobilellm_p1",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 8,
    "use_qk_norm": True,
    "tie_word_embeddings": True,
}


def small_model(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(read_config({**VALUES, **changes}))


def trained(recipe: Recipe, steps: int = 4, **changes: Any) -> Transformer:
    """A small model after some steps, large enough that integers change."""
    model = prepare(small_model(**changes), recipe)
    tokens = torch.randint(model.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    optimizer = optimizer_for(model.named_parameters(), replace(training_of(recipe), learning_rate=0.2))
    trainee = Trainee(model, recipe)
    for _ in range(steps):
        trainee(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def to_half(model: Transformer, recipe: Recipe) -> None:
    """What training leaves in float32 and a checkpoint keeps in half precision."""
    for name, module in layers_of(model):
        if recipe.float_bits == 16 and recipe.rule_for(name) is None:
            weight_of(module).data = weight_of(module).data.half().float()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", TRAINED)
def test_training_ends_with_the_logits_that_ship_bit_for_bit(name: str, tied: bool) -> None:
    recipe, tokens = find_recipe(name), torch.arange(40).reshape(2, 20)
    model = trained(recipe, tie_word_embeddings=tied)
    before = prepare(small_model(tie_word_embeddings=tied), recipe)
    shipped = convert(copy.deepcopy(model), recipe)
    to_half(model, recipe)
    with torch.no_grad():
        ends, starts, ships = (each.head(normed(each, tokens, recipe)) for each in (model, before, shipped))
    assert torch.equal(ends, ships)
    assert not torch.equal(starts, ends)


@pytest.mark.parametrize("name", QUANTIZED)
def test_what_is_trained_lies_in_its_grid_with_scales_that_runtimes_hold(name: str) -> None:
    recipe = find_recipe(name)
    start, end = prepare(small_model(), recipe), trained(recipe)
    changed = 0
    for layer in dict(layers_of(end)):
        before, module = start.get_submodule(layer), end.get_submodule(layer)
        if not isinstance(module, (FakeQuantizedLinear, FakeQuantizedEmbedding)):
            assert recipe.rule_for(layer) is None
            continue
        assert isinstance(before, (FakeQuantizedLinear, FakeQuantizedEmbedding))
        grid, (integers, scale) = module.rule.weights, module.integers()
        assert integers.dtype == torch.int8
        assert grid.q_min <= int(integers.min()) and int(integers.max()) <= grid.q_max
        assert grid.bits != 1 or 0 not in integers
        assert torch.equal(round_scale(scale), scale)
        assert scale.shape == (len(integers), integers.shape[1] // (grid.group_size or integers.shape[1]))
        changed += int((integers != before.integers()[0]).sum())
    assert changed > 0


SHAPES = [(1, 32), (1, 96), (34, 32), (1030, 32), (34, 1), (1, 1)]
"""[out, in]: one row, tails of both axes and of the rows that are rounded at once, one column."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@grids
def test_every_shape_trains_as_it_ships(grid: WeightGrid, shape: tuple[int, int]) -> None:
    out, inner = shape
    if grid.misfit(out, inner):
        grid = replace(grid, group_size=grid.group_size and 1, shards=grid.shards and 1)
    weight = nn.Parameter(random(out, inner))
    quantizer = quantizer_for(weight, grid)
    latent = nn.Parameter(quantizer.start(weight.detach()).clone())
    integers, scale = quantizer.integers(latent.detach())
    for found, wanted in zip((integers, scale), quantize_linear(weight.detach(), grid), strict=True):
        assert torch.equal(found, wanted), "it begins as quantization without training"
    optimizer = torch.optim.SGD([latent, *quantizer.parameters()], lr=0.1)
    for step in range(3):
        ships = quantizer(latent, *quantizer.learned())
        integers, scale = quantizer.integers(latent.detach())
        assert torch.equal(ships, dequantize(integers, scale))
        assert integers.shape == (out, inner)
        assert ships.isfinite().all()
        ships.backward(random(out, inner, seed=step))
        optimizer.step()


@grids
def test_rows_of_zeros_train_and_ship(grid: WeightGrid) -> None:
    source = nn.Linear(64, 4)
    source.weight.data[1] = 0
    layer = FakeQuantizedLinear(source, Rule(("*",), grid))
    layer(random(3, 64)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())
    integers, scale = layer.integers()
    assert torch.equal(layer.quantizer(layer.weight, *layer.quantizer.learned()), dequantize(integers, scale))
    assert torch.equal(round_scale(scale), scale)
    assert grid.bits == 1 or not integers[1].any()


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        (WeightGrid(4, 48), r"layers\.0\.attention\.q \(in=64\)"),
        (WeightGrid(4, 48, "learned"), r"layers\.1\.mlp\.up \(in=64\)"),
        (WeightGrid(2, None, "absmean", shards=7), r"layers\.0\.mlp\.gate \(out=96\)"),
        (WeightGrid(1, None, "absmean", shards=5), r"embedding \(out=96\)"),
    ],
    ids=str,
)
def test_groups_and_shards_that_do_not_divide_are_refused_by_name(grid: WeightGrid, told: str) -> None:
    recipe = Recipe("misfit", "", (Rule(EVERYWHERE, grid),))
    for make in (prepare, convert):
        with pytest.raises(RecipeError, match=told) as error:
            make(small_model(), recipe)
        assert "layers.0.mlp.down (in=96)" not in str(error.value)
        assert "--except" in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_weight_that_is_not_finite_is_refused_by_name(name: str, value: float) -> None:
    recipe = find_recipe(name)
    model = prepare(small_model(), recipe)
    model.layers[1].mlp.up.weight.data[3, 5] = value
    with pytest.raises(RecipeError, match=r"layers\.1\.mlp\.up has 1 weights that are not finite: train with a lower learning rate"):
        convert(model, recipe)


# --- a head that is the embedding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TRAINED if not CATALOG[name].untied])
def test_a_tied_head_stays_the_embedding_through_everything(name: str, tmp_path: Path) -> None:
    recipe, tokens = find_recipe(name), torch.arange(20)[None]
    model = trained(recipe)
    assert model.head.weight is model.embedding.weight
    assert [path for path, _ in model.named_parameters() if path.startswith("head")] == []
    if recipe.rule_for("head"):
        assert model.head.quantizer is model.embedding.quantizer
    shipped = convert(model, recipe)
    assert tables(shipped)[0] == tables(shipped)[1]
    if not recipe.rules:
        return
    (tmp_path / "config.json").write_text(json.dumps(VALUES), encoding="utf-8")
    (tmp_path / "checkpoint").mkdir()
    save_checkpoint(shipped, recipe, tmp_path, tmp_path / "checkpoint")
    again, _ = load_checkpoint(tmp_path / "checkpoint")
    assert tables(again)[0] == tables(again)[1]
    assert torch.equal(again(tokens), shipped(tokens))


def tables(model: Transformer) -> list[int]:
    """Where the integers, or floats, of head and embedding lie."""
    return [(layer.integers if hasattr(layer, "integers") else layer.weight).data_ptr() for layer in (model.head, model.embedding)]


def test_learned_ranges_of_a_tied_table_get_the_gradients_of_both_its_uses() -> None:
    recipe = Recipe("tied", "", (Rule(EVERYWHERE, WeightGrid(4, None, "learned")),))
    tokens = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(1))
    tied, apart = prepare(small_model(), recipe), prepare(small_model(), replace(recipe, untied=True))
    for model in (tied, apart):
        Trainee(model, recipe)(tokens).backward()
    for part in ("weight", "quantizer.low", "quantizer.high"):
        once = tied.embedding.get_parameter(part).grad
        twice = apart.embedding.get_parameter(part).grad + apart.head.get_parameter(part).grad
        torch.testing.assert_close(once, twice)


def test_an_untied_recipe_gives_the_head_ranges_of_its_own() -> None:
    model = trained(find_recipe("w4-channel-learned"))
    assert model.head.weight is not model.embedding.weight
    assert model.head.quantizer is not model.embedding.quantizer
    assert not torch.equal(model.head.quantizer.high, model.embedding.quantizer.high)


def test_real_weights_begin_training_as_they_are_quantized_without_it(stories: Path) -> None:
    tokens = torch.arange(64)[None]
    for name in TRAINED:
        recipe = find_recipe(name).with_changes(exclude=("layers.*.mlp.down",) if name.startswith("8da4w-g32") else ())
        with torch.no_grad():
            assert torch.equal(prepare(load_model(stories), recipe)(tokens), convert(load_model(stories), recipe)(tokens)), name
