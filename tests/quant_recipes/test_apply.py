"""A recipe meets a model: prepare, convert, the checkpoint file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lobit.checkpoint import load_config, load_model
from lobit.errors import ModelError, RecipeError
from lobit.families import read_config
from lobit.model import Transformer
from lobit.quant_recipes.apply import convert, fates, prepare, problems
from lobit.quant_recipes.catalog import CATALOG, find_recipe
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


@pytest.mark.parametrize("name", CATALOG)
def test_prepared_and_converted_models_compute_the_same_bits(name: str) -> None:
    tokens = torch.arange(20)[None]
    prepared = prepare(small_model(), find_recipe(name))(tokens)
    converted = convert(small_model(), find_recipe(name))(tokens)
    assert torch.equal(prepared, converted)


@pytest.mark.parametrize("name", CATALOG)
def test_a_checkpoint_is_read_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    recipe = find_recipe(name)
    model = convert(small_model(), recipe)
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


def test_every_layer_has_a_fate_and_a_tied_head_is_shared() -> None:
    rows = {fate.name: fate for fate in fates(read_config(VALUES), find_recipe("8da4w-g32"))}
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
    save_file(tensors, target / "model.safetensors", metadata={"layout": "nibbles-1"})
    with pytest.raises(ModelError) as error:
        load_checkpoint(target)
    for part in ("layers.0.attention.q.scale is missing", "layers.1.mlp.up.integers", "stray is not used"):
        assert part in str(error.value)
