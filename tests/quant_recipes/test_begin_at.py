"""Training that begins at the integers of a checkpoint: it begins there exactly, and as near to the float weights as they allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lobit.checkpoint import load_model
from lobit.demo import FOLDER
from lobit.errors import RecipeError
from lobit.quant_recipes.apply import begin_at, convert, layers_of, prepare
from lobit.quant_recipes.calibration import calibrate
from lobit.quant_recipes.catalog import find_recipe
from lobit.quant_recipes.grid import quantize, round_scale
from lobit.quant_recipes.quantizers import INSIDE, Searched
from lobit.quant_recipes.recipe import WeightGrid

pytestmark = pytest.mark.usefixtures("one_thread")
seeds = st.integers(0, 2**31)


@given(seed=seeds, bits=st.sampled_from([3, 4, 6, 8]), size=st.sampled_from([None, 8, 32]))
@settings(deadline=None, max_examples=60)
def test_the_integers_and_scales_are_those_that_were_given(seed: int, bits: Any, size: int | None) -> None:
    generator, grid = torch.Generator().manual_seed(seed), WeightGrid(bits, size)
    weight = torch.randn(6, 32, generator=generator)
    integers = torch.randint(grid.q_min, grid.q_max + 1, weight.shape, generator=generator, dtype=torch.int8)
    scale = round_scale(torch.rand(6, 32 // (size or 32), generator=generator) + 0.01)
    quantizer = Searched(weight, grid)
    begun = quantizer.begin_at(weight, integers, scale)
    largest = begun.reshape(6, scale.shape[1], -1).abs().amax(2)
    found = quantizer.integers(begun)
    alive = (largest > 0).repeat_interleave(32 // scale.shape[1], 1)
    assert torch.equal(found[0][alive], integers[alive])
    assert torch.equal(found[1][largest > 0], scale[largest > 0])


@given(seed=seeds)
@settings(deadline=None, max_examples=30)
def test_weights_that_round_so_already_do_not_move(seed: int) -> None:
    weight, grid = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)), WeightGrid(4, 32)
    quantizer = Searched(weight, grid)
    integers, scale = quantizer.integers(weight)
    begun = quantizer.begin_at(weight, integers, scale)
    steps = scale.repeat_interleave(32, 1)
    assert ((begun - weight).abs() <= (0.5 - INSIDE + 1e-5) * steps).all()
    assert torch.equal(quantize(begun, scale, grid), integers)


@torch.no_grad()
def test_a_calibrated_model_ships_as_it_was_where_no_step_is_trained() -> None:
    recipe = find_recipe("8da4w-g32")
    model = load_model(FOLDER)
    tokens = torch.randint(model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    found = calibrate(model, recipe.calibrated(), tokens)
    calibrated = convert(model, recipe.calibrated(), calibrated=found.integers)
    prepared = prepare(load_model(FOLDER), recipe)
    assert begin_at(prepared, calibrated) == list(found.integers)
    shipped = convert(prepared, recipe)
    for (name, ours), (_, theirs) in zip(layers_of(shipped), layers_of(calibrated), strict=True):
        assert torch.equal(ours.integers, theirs.integers) and torch.equal(ours.scale, theirs.scale), name


@torch.no_grad()
def test_layers_of_another_grid_begin_as_they_would() -> None:
    recipe, other = find_recipe("8da4w-g32"), find_recipe("8da4w-g32-e8")
    prepared = prepare(load_model(FOLDER), recipe)
    begun = begin_at(prepared, convert(load_model(FOLDER), other))
    assert "embedding" not in begun and "layers.0.mlp.down" in begun
    with pytest.raises(RecipeError, match="quantize the model with this recipe"):
        begin_at(prepare(load_model(FOLDER), find_recipe("8da8w")), convert(load_model(FOLDER), recipe))
