"""A recipe meets a model: prepare, convert, the checkpoint file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lobit.checkpoint import load_config, load_model
from lobit.errors import ModelError, RecipeError
from lobit.families import read_config
from lobit.model import Transformer, weight_of
from lobit.quant_recipes.apply import convert, layer_plans, layers_of, prepare, problems
from lobit.quant_recipes.catalog import CATALOG, find_recipe
from lobit.quant_recipes.integer import quantize_linear
from lobit.quant_recipes.quantized import fingerprint, integer_layers, load_checkpoint, save_checkpoint
from lobit.quant_recipes.recipe import Recipe

VALUES = {
    "model_type": "mobilellm_p1",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 16,
    "use_qk_norm": True,
    "tie_word_embeddings": True,
}


def small_model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(read_config(VALUES)).requires_grad_(False)


def small_recipe(name: str) -> Recipe:
    """A recipe of the catalogue in groups that the small model has."""
    recipe = find_recipe(name)
    return recipe.with_changes(group_size=32) if name in ("gptq-w3", "gptq-w4") else recipe


def converted(name: str) -> Transformer:
    """The small model; what a calibration would round is rounded to the nearest."""
    recipe, model = small_recipe(name), small_model()
    rules = {layer: recipe.rule_for(layer) for layer, _ in layers_of(model)}
    calibrated = {
        layer: quantize_linear(weight_of(model.get_submodule(layer)), rule.weights)
        for layer, rule in rules.items()
        if rule and rule.rounding == "gptq"
    }
    return convert(model, recipe, calibrated=calibrated)


@pytest.mark.parametrize("name", CATALOG)
def test_prepared_and_converted_models_compute_the_same_bits(name: str) -> None:
    tokens = torch.arange(20)[None]
    assert torch.equal(prepare(small_model(), small_recipe(name))(tokens), converted(name)(tokens))


@pytest.mark.parametrize("name", ["gptq-w3", "gptq-w8"])
def test_what_a_calibration_rounds_is_not_rounded_without_one(name: str) -> None:
    with pytest.raises(RecipeError, match=r"layers\.0\.attention\.q is rounded on a calibration text: .*--calibration"):
        convert(small_model(), small_recipe(name))


@pytest.mark.parametrize("name", CATALOG)
def test_a_checkpoint_is_read_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    recipe, model = small_recipe(name), converted(name)
    target = tmp_path / "checkpoint"
    target.mkdir()
    save_checkpoint(model, recipe, tmp_path, target)
    again, found = load_checkpoint(target)
    assert found == recipe
    assert fingerprint(again) == fingerprint(model)
    tokens = torch.arange(20)[None]
    assert torch.equal(again(tokens), model(tokens))


def test_the_fingerprint_sees_a_single_integer(tmp_path: Path) -> None:
    model = convert(small_model(), find_recipe("8da4w-g32"))
    before = fingerprint(model)
    next(iter(integer_layers(model)))[1][0, 0] += 1
    assert fingerprint(model) != before


@pytest.mark.parametrize("name", CATALOG)
def test_recipes_survive_json(name: str) -> None:
    recipe = find_recipe(name).with_changes(exclude=("layers.*.mlp.down",))
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_recipe_with_unknown_values_is_refused() -> None:
    values = find_recipe("8da4w-g32").to_json()
    with pytest.raises(RecipeError):
        Recipe.from_json({**values, "surprise": 1})
    values["rules"][0]["weights"]["bits"] = 5
    with pytest.raises(RecipeError):
        Recipe.from_json(values)


def test_every_layer_is_planned_and_a_tied_head_is_shared() -> None:
    rows = {layer_plan.name: layer_plan for layer_plan in layer_plans(read_config(VALUES), find_recipe("8da4w-g32"))}
    assert len(rows) == 2 + 3 * 7
    assert rows["head"].shared_with == "embedding"
    assert rows["layers.1.mlp.down"].shape == (64, 128)


def test_tied_heads_share_their_integers_and_untied_ones_do_not() -> None:
    shared = convert(small_model(), find_recipe("8da4w-g32"))
    assert shared.head.integers.data_ptr() == shared.embedding.integers.data_ptr()
    apart = convert(small_model(), find_recipe("w4-channel"))
    assert apart.head.integers.data_ptr() != apart.embedding.integers.data_ptr()
    assert not apart.config.tied


def test_layers_that_do_not_divide_are_all_named_with_a_way_out_that_works(stories: Path) -> None:
    config, recipe = load_config(stories), find_recipe("8da4w-g32")
    (message,) = problems(config, recipe)
    assert "5 layers do not divide by group_size=32: layers.0.mlp.down (in=172)" in message
    assert "--except 'layers.*.mlp.down'" in message
    model = convert(load_model(stories), recipe.with_changes(exclude=("layers.*.mlp.down",)))
    assert {name.rpartition(".")[2] for name, *_ in integer_layers(model)} == {"embedding", "head", *"qkvo", "gate", "up"}


def test_other_ways_out_work_too(stories: Path) -> None:
    config = load_config(stories)
    assert not problems(config, find_recipe("8da8w"))
    assert not problems(config, find_recipe("8da4w-g32").with_changes(group_size=4))


def test_an_exclusion_that_matches_nothing_is_a_mistake() -> None:
    (message,) = problems(read_config(VALUES), find_recipe("8da4w-g32").with_changes(exclude=("layers.*.mlp.dwon",)))
    assert "dwon" in message


def test_head_and_embedding_that_share_a_tensor_must_share_a_grid() -> None:
    config = read_config(VALUES)
    assert problems(config, find_recipe("8da4w-g32").with_changes(exclude=("head",)))
    assert not problems(replace(config, tied=False), find_recipe("8da4w-g32").with_changes(exclude=("head",)))


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="8da4w-g32"):
        find_recipe("int3")


def test_a_damaged_checkpoint_is_refused_with_every_reason(tmp_path: Path) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    target = tmp_path / "checkpoint"
    target.mkdir()
    save_checkpoint(convert(small_model(), find_recipe("8da4w-g32")), find_recipe("8da4w-g32"), tmp_path, target)
    tensors = load_file(target / "model.safetensors")
    del tensors["layers.0.attention.q.scale"]
    tensors["layers.1.mlp.up.integers"] = torch.zeros(3, 3, dtype=torch.int8)
    tensors["stray"] = torch.zeros(1)
    save_file(tensors, target / "model.safetensors", metadata={"lobit": "packed-2"})
    with pytest.raises(ModelError) as error:
        load_checkpoint(target)
    for part in ("layers.0.attention.q.scale is missing", "layers.1.mlp.up.integers", "stray is not used"):
        assert part in str(error.value)


MIXED = (
    "layers.0.mlp.down=int8",
    "layers.*.mlp.*=int6:32",
    "layers.1.*=ternary",
    "layers.2.attention.?=float",
    "embedding=int4:16",
    "head=int4:16",
)
MIXED_WHY = {
    "embedding": "int4 group 16",
    "layers.0.attention.q": "int4 per channel",
    "layers.0.mlp.down": "int8 per channel",
    "layers.1.attention.o": "ternary per channel",
    "layers.1.mlp.down": "int6 group 32",
    "layers.2.attention.v": "excluded by layers.2.attention.?",
    "head": "int4 group 16",
}


def test_the_first_pattern_decides_and_floating_point_before_all() -> None:
    rows = {row.name: row for row in layer_plans(read_config(VALUES), find_recipe("w4-channel").with_changes(mixed=MIXED))}
    assert {name: rows[name].why for name in MIXED_WHY} == MIXED_WHY
    late = find_recipe("w4-channel").with_changes(mixed=("layers.*.mlp.*=int8", "layers.0.*=float"))
    assert late.rule_for("layers.0.mlp.up") is None


@pytest.mark.parametrize("name", ["fp", "8da4w-g32", "w4-channel-learned", "bitnet", "bonsai"])
def test_mixed_precision_reaches_training_and_the_checkpoint(name: str, tmp_path: Path) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    recipe, target, tokens = find_recipe(name).with_changes(mixed=MIXED), tmp_path / "checkpoint", torch.arange(20)[None]
    assert Recipe.from_json(recipe.to_json()) == recipe
    model = convert(small_model(), recipe)
    assert {name: str(grid) for name, *_, grid in integer_layers(model)} == {
        layer_plan.name: layer_plan.why for layer_plan in layer_plans(read_config(VALUES), recipe) if layer_plan.rule
    }
    assert torch.equal(prepare(small_model(), recipe)(tokens), model(tokens))
    target.mkdir()
    save_checkpoint(model, recipe, tmp_path, target)
    again, found = load_checkpoint(target)
    assert found == recipe
    assert fingerprint(again) == fingerprint(model)
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("name", CATALOG)
def test_mixed_layers_round_their_inputs_as_the_recipe_does(name: str) -> None:
    own, recipe = find_recipe(name), find_recipe(name).with_changes(mixed=("layers.0.*=int8",))
    rules = [one.rule_for("layers.0.mlp.up") for one in (own, recipe)]
    inputs = [(rule.activation_bits, rule.activation_rule, rule.rounding) for rule in rules if rule]
    assert inputs[-1] == (inputs[0] if own.rules else (None, "range", "nearest"))


@pytest.mark.parametrize(
    ("entry", "rounding"), [("layers.0.*=int6", "gptq"), ("layers.0.*=ternary", "nearest"), ("head=int8", "nearest"), ("*=int8", "nearest")]
)
def test_gptq_rounds_no_mixed_layers_that_it_cannot(entry: str, rounding: str) -> None:
    assert find_recipe("gptq-w4").with_changes(mixed=(entry,)).rules[0].rounding == rounding


def test_a_mixed_group_size_stays_where_another_is_given_for_the_recipe() -> None:
    recipe = find_recipe("8da4w-g32").with_changes(group_size=16, mixed=("layers.0.*=int4:64",))
    assert [rule.weights.group_size for rule in recipe.rules] == [64, 16]


@pytest.mark.parametrize(
    "entry", ["int8", "=int8", "layers.*", "head=", "head=int5", "head=int4:0", "head=int4:", "head=int8:x", "head=ternary:32", "a=b=int8"]
)
def test_what_is_no_pattern_and_grid_is_refused_with_the_grids(entry: str) -> None:
    with pytest.raises(RecipeError, match="float, binary, ternary, int3, int4, int6, int8") as error:
        find_recipe("8da8w").with_changes(mixed=("layers.0.*=int4:32", entry, "head=intl4"))
    assert f"'{entry}'" in str(error.value) and "'head=intl4'" in str(error.value) and "layers.0" not in str(error.value)


def test_a_mixed_pattern_that_matches_nothing_is_a_mistake() -> None:
    found = problems(read_config(VALUES), find_recipe("8da8w").with_changes(mixed=("layers.*.mlp.dwon=int4", "layers.3.*=float")))
    assert ["dwon" in message or "layers.3" in message for message in found] == [True, True]


@pytest.mark.parametrize(
    ("mixed", "late"),
    [
        (("layers.*.mlp.down=int4", "layers.0.mlp.down=int8"), "layers.0.mlp.down: layers.*.mlp.down"),
        (("head=int8", "head=int4"), "head: head"),
        (("layers.0.mlp.up=int8", "layers.0.*=float"), "layers.0.mlp.up: layers.0.*"),
    ],
)
def test_a_mixed_entry_that_others_are_before_is_a_mistake(mixed: tuple[str, ...], late: str) -> None:
    with pytest.raises(RecipeError, match="the first pattern that matches decides") as error:
        find_recipe("8da8w").with_changes(mixed=mixed)
    assert late in str(error.value)
    with pytest.raises(RecipeError, match="the first pattern"):
        find_recipe("8da8w").with_changes(exclude=("layers.*",), mixed=("layers.0.mlp.down=int8",))


def test_a_mixed_grid_must_divide_the_layers(stories: Path) -> None:
    (message,) = problems(load_config(stories), find_recipe("w4-channel").with_changes(mixed=("layers.0.*=int4:32",)))
    assert "layers.0.mlp.down (in=172)" in message
