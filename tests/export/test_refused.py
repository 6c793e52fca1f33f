"""What target xnnpack cannot hold is refused before anything slow, every reason at once, with the way out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lobit import verbs
from lobit.checkpoint import load_config
from lobit.errors import RecipeError, TargetError
from lobit.export.target import Spec, check_target
from lobit.export.xnnpack import target as xnnpack
from lobit.quant_recipes.catalog import CATALOG, find_recipe
from lobit.quant_recipes.recipe import Recipe, Rule, WeightGrid


def spec(recipe: Recipe) -> Spec:
    """What a program under a recipe is made for."""
    return Spec(recipe, context=64, chunk=16)


@pytest.mark.parametrize(("recipe", "layers"), [("w4-channel", 15), ("trilm", 14)])
def test_recipes_without_integer_activations_are_refused_with_a_way_out(recipe: str, layers: int, models: Any) -> None:
    (problem,) = xnnpack.check(spec(find_recipe(recipe)), load_config(models("llama")))
    for part in (f"{layers} layers", "layers.0.attention.q", "8da4w-g32", "8da8w", "bitnet for ternary"):
        assert part in problem


@pytest.mark.parametrize("size", [16, 48, 4])
def test_groups_that_are_no_multiple_of_32_are_refused(size: int, models: Any) -> None:
    recipe = find_recipe("8da4w-g32").with_changes(group_size=size)
    (problem,) = xnnpack.check(spec(recipe), load_config(models("llama")))
    assert f"group_size={size}" in problem
    assert "multiple of 32" in problem


def test_scales_that_groups_would_round_are_refused(models: Any) -> None:
    recipe = Recipe("found", "", (Rule(("*",), WeightGrid(4, 32, "exact"), 8),))
    (problem,) = xnnpack.check(spec(recipe), load_config(models("llama")))
    for part in ("15 layers", "layers.0.attention.q", "bfloat16", "8da4w-g32"):
        assert part in problem


def test_capped_attention_is_refused(models: Any) -> None:
    config = replace(load_config(models("llama")), attention_softcap=50.0)
    (problem,) = xnnpack.check(spec(find_recipe("8da8w")), config)
    assert "attention scores" in problem


def test_every_reason_is_given_at_once(models: Any) -> None:
    rules = (
        Rule(("layers.0.*",), WeightGrid(4, None)),
        Rule(("layers.1.attention.*",), WeightGrid(4, 16), 8),
        Rule(("layers.1.mlp.*",), WeightGrid(8, 64), 8),
    )
    recipe = Recipe("mixed", "", rules)
    config = replace(load_config(models("llama")), attention_softcap=50.0)
    with pytest.raises(TargetError) as error:
        check_target("xnnpack", spec(recipe), config)
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + 4
    for part in ("recipe mixed", "7 layers", "layers.0.attention.q", "group_size=16", "layers.1.mlp.gate", "attention scores"):
        assert part in str(error.value)


HELD = {"fp", "fp16", "8da4w-g32", "8da4w-g32-e8", "8da8w", "bitnet"}
"""Recipes whose products XNNPACK has (the table in docs/recipes.md)."""


def test_the_recipes_that_are_held_are_those_with_int8_or_no_rounding_of_inputs(models: Any) -> None:
    assert {name for name in CATALOG if not xnnpack.check(spec(find_recipe(name)), load_config(models("llama")))} == HELD


@pytest.mark.parametrize("name", sorted(set(CATALOG) - HELD))
def test_a_recipe_that_is_not_held_is_refused_before_anything_is_written(name: str, models: Any, tmp_path: Path) -> None:
    with pytest.raises((TargetError, RecipeError)):
        verbs.export(str(models("llama")), "xnnpack", tmp_path / "out", recipe=find_recipe(name))
    assert list(tmp_path.iterdir()) == []
