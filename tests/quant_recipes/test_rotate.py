"""Rotation: exact where it is, refused where it is not, and outliers shrink."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lobit import verbs
from lobit.checkpoint import Weights, load_config, load_model
from lobit.cli_options import chosen_recipe
from lobit.errors import InputError, RecipeError
from lobit.model import Config, Layer, Transformer
from lobit.quant_recipes.apply import arrange, check, convert, layer_plans, prepare
from lobit.quant_recipes.calibration import calibrate
from lobit.quant_recipes.catalog import CATALOG
from lobit.quant_recipes.quantized import WEIGHTS_FILE, fingerprint, load_checkpoint, load_recipe
from lobit.quant_recipes.recipe import TURNS, Recipe, Turn
from lobit.quant_recipes.rotate import LARGEST_ODD, basis
from lobit.quant_recipes.sizes import checkpoint_bytes
from lobit.verbs import make
from tests.small_models import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")
SmallModels = Callable[[str], tuple[Path, Any]]
CASES: dict[str, tuple[Turn, ...]] = {"stream": ("stream",), "heads": ("heads",), "both": TURNS}
EXACT = 1e-4
"""Of the largest logit: products of float32 in another basis round otherwise, about 1e-6 of it in a model of four layers."""
ORTHONORMAL = 1e-13
"""Of entries of R^T R: float64 has 1e-16, and 10 bits of sums come on top."""
ROUNDED = 0.1
"""Of the largest logit: what INT8 may cost a random model; it costs 0.01."""
DIGEST = "bf76518a513beb60b904674e959efca5e57c3dfe8b02d47b950b7134edb97ba9"
TOKENS = torch.arange(48).reshape(2, 24) * 5 % 96


def recipe_of(*turns: Turn, name: str = "8da8w") -> Recipe:
    return CATALOG[name].with_changes(rotate=turns)


def small(**changes: Any) -> Config:
    """A tied model with biases everywhere and a norm before o and down."""
    base = Config(
        family="llama",
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        heads=4,
        kv_heads=2,
        head_dim=12,
        layers=(Layer(),) * 2,
        max_context=64,
        norm_eps=1e-5,
        tied=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        sub_norms=True,
    )
    return replace(base, **changes)


def random_model(config: Config) -> Transformer:
    """Norms and biases are random too."""
    model, generator = Transformer(config), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.4 * noise if "norm" in name else 0.2 * noise
    return model.eval().requires_grad_(False)


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest, as a share of the largest value."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("size", [1, 2, 15, 64, 96, 576, LARGEST_ODD])
def test_every_basis_is_orthonormal(size: int, turn: Turn) -> None:
    found = basis(size, turn).turn(torch.eye(size, dtype=torch.float64))
    assert (found.T @ found - torch.eye(size)).abs().max() < ORTHONORMAL


def test_a_basis_is_the_same_bits_everywhere() -> None:
    """No sum in it is left to a library."""
    found = basis(576, "stream").turn(torch.eye(576, dtype=torch.float64))
    assert hashlib.sha256(found.contiguous().numpy().tobytes()).hexdigest() == DIGEST


@pytest.mark.parametrize("turns", CASES.values(), ids=CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotated_family_computes_the_same(family: str, turns: tuple[Turn, ...], small_models: SmallModels) -> None:
    model, recipe = load_model(small_models(family)[0]), recipe_of(*turns)
    if family == "gemma3" and "stream" in turns:
        with pytest.raises(RecipeError, match=r"weighted norms after each part.*leave stream out of --rotate"):
            arrange(model, recipe)
        return
    wanted, before = model(TOKENS), model.blocks[0].attention.v.weight
    arrange(model, recipe)
    assert difference(model(TOKENS), wanted) < EXACT
    assert difference(model.blocks[0].attention.v.weight, before) > 0.1


@pytest.mark.parametrize("turns", CASES.values(), ids=CASES)
def test_biases_and_norms_inside_of_parts_turn_along(turns: tuple[Turn, ...]) -> None:
    model = random_model(small())
    wanted, embedded = model(TOKENS), model.embedding.weight
    arrange(model, recipe_of(*turns))
    assert difference(model(TOKENS), wanted) < EXACT
    assert (model.embedding.weight is embedded) == ("stream" not in turns)


def test_norms_of_a_rotated_stream_are_ones() -> None:
    model = random_model(small())
    arrange(model, recipe_of("stream"))
    norms = [model.norm, *(norm for block in model.blocks for norm in (block.attention_norm, block.mlp_norm))]
    assert all(norm.weight.equal(torch.ones(48)) for norm in norms)


def test_a_model_is_rotated_once() -> None:
    model, recipe = random_model(small()), recipe_of(*TURNS)
    arrange(model, recipe)
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arrange(model, recipe)
    assert all(tensor.equal(once[name]) for name, tensor in model.state_dict().items())


def test_training_begins_rotated_and_ships_what_conversion_does() -> None:
    recipe = recipe_of(*TURNS).with_changes(scale_rule="range")
    trained = convert(prepare(random_model(small()), recipe), recipe)
    assert fingerprint(trained) == fingerprint(convert(random_model(small()), recipe))


def test_a_calibrated_model_is_rotated_once() -> None:
    """A second rotation would leave nothing of what the model computes."""
    model, recipe = random_model(small()), recipe_of(*TURNS).calibrated()
    wanted = model(TOKENS)
    integers = calibrate(model, recipe, TOKENS).integers
    assert difference(convert(model, recipe, calibrated=integers)(TOKENS), wanted) < ROUNDED


@pytest.mark.parametrize("family", ["qwen2", "phi3", "mobilellm-ls", "bitnet"])
def test_weights_that_are_read_one_by_one_are_rotated_alike(family: str, small_models: SmallModels) -> None:
    folder, recipe = small_models(family)[0], recipe_of(*TURNS)
    weights = Weights(folder, load_config(folder))
    assert fingerprint(convert(weights.model, recipe, None, weights)) == fingerprint(convert(load_model(folder), recipe))


def test_one_huge_channel_is_spread_over_the_stream() -> None:
    """Of the inputs of q, k and v, largest value over root mean square: sqrt(64) = 8 where one channel has all, 1 at best."""
    model = random_model(small(hidden_size=64))
    model.embedding.weight[:, 5] = 30.0
    before = peak(model)
    arrange(model, recipe_of("stream"))
    assert before > 7
    assert peak(model) < 2


def peak(model: Transformer) -> float:
    x = model.blocks[0].attention_norm(model.embedding(TOKENS)) if model.rotated else model.embedding(TOKENS)
    return (x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean().item()


def test_a_rotated_stream_unties_the_head() -> None:
    config = small()
    assert recipe_of("stream").untied
    assert not recipe_of("heads").untied
    assert layer_plans(config, recipe_of("stream"))[-1].shared_with is None
    with pytest.raises(RecipeError, match="needs a head of its own"):
        check(config, replace(recipe_of("stream"), untied=False))


def test_what_cannot_be_rotated_is_refused_with_the_way_out() -> None:
    with pytest.raises(RecipeError, match="'tail' cannot be rotated: choose of stream, heads"):
        CATALOG["8da8w"].with_changes(rotate=("tail",))
    with pytest.raises(RecipeError, match=r"quantizes nothing.*leave --rotate out"):
        check(small(), recipe_of("stream", name="fp"))
    with pytest.raises(RecipeError, match=r"stream of 262 channels, 2 times 131, cannot be rotated.*leave stream out of --rotate"):
        check(small(hidden_size=262), recipe_of(*TURNS))


def test_recipes_from_before_there_was_rotation_stay_the_same() -> None:
    plain = CATALOG["8da8w"]
    assert "rotate" not in plain.to_json()
    assert Recipe.from_json(plain.to_json()) == plain
    assert Recipe.from_json(recipe_of(*TURNS).to_json()) == recipe_of("heads", "stream")
    with pytest.raises(RecipeError, match="rotate"):
        Recipe.from_json(plain.to_json() | {"rotate": ["tail"]})


@pytest.mark.parametrize("turns", CASES.values(), ids=CASES)
def test_a_checkpoint_keeps_its_rotation_and_has_the_size_that_was_planned(
    turns: tuple[Turn, ...], small_models: SmallModels, tmp_path: Path
) -> None:
    source, recipe = small_models("qwen3")[0], recipe_of(*turns)
    folder = make.quantize(str(source), recipe, tmp_path / "checkpoint")
    assert load_recipe(folder) == recipe
    loaded, converted = load_checkpoint(folder)[0], make.converted(source, recipe)[0]
    assert fingerprint(loaded) == fingerprint(converted)
    header = 8 + int.from_bytes((folder / WEIGHTS_FILE).read_bytes()[:8], "little")
    assert (folder / WEIGHTS_FILE).stat().st_size - header == checkpoint_bytes(load_config(source), recipe)


def test_an_exported_rotation_is_that_of_the_float_model(tmp_path: Path) -> None:
    """Whose recipe is applied to it again."""
    verbs.export("demo", "onnx", tmp_path / "bundle", recipe=recipe_of(*TURNS), context=64, chunk=16)
    assert verbs.verify(tmp_path / "bundle", "demo")["passed"]
    assert not verbs.verify(tmp_path / "bundle", str(make.quantize("demo", recipe_of("heads"), tmp_path / "other")))["passed"]


def test_rotation_without_a_recipe_is_refused() -> None:
    with pytest.raises(InputError, match="--rotate change a recipe: name it with --recipe"):
        chosen_recipe(None, None, None, None, None, None, "heads")
    assert chosen_recipe("8da8w", None, None, None, None, None, "heads, stream") == recipe_of(*TURNS)
