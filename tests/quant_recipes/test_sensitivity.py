"""The sensitivity of single layers, and the wider grids that are proposed for few of them."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from lobit import tables
from lobit.checkpoint import load_model
from lobit.errors import InputError, RecipeError
from lobit.model import Transformer, weight_of
from lobit.quant_recipes import sensitivity as module
from lobit.quant_recipes.apply import convert, fates, layers_of
from lobit.quant_recipes.catalog import find_recipe
from lobit.quant_recipes.corpus import Corpus
from lobit.quant_recipes.figures import figures
from lobit.quant_recipes.integer import quantize_linear
from lobit.quant_recipes.recipe import Recipe, Rule, WeightGrid
from lobit.quant_recipes.sensitivity import Row, measured, proposal, sensitivity
from lobit.quant_recipes.sizes import checkpoint_bytes
from lobit.verbs.make import choose_recipe, quantize
from lobit.verbs.sensitivity import sensitivity as sensitivity_verb

pytestmark = pytest.mark.usefixtures("one_thread")


def corpus_of(model: Transformer, count: int = 3, length: int = 24) -> Corpus:
    generator = torch.Generator().manual_seed(0)
    return Corpus(torch.randint(model.config.vocab_size, (count, length + 1), generator=generator, dtype=torch.int32))


def alone(model: Transformer, recipe: Recipe, layers: tuple[str, ...]) -> Transformer:
    """The model with these layers quantized, converted whole."""
    others = tuple(name for name, _ in layers_of(model) if name not in layers)
    return convert(deepcopy(model), replace(recipe, exclude=others, float_bits=32))


def straightforward_kl(model: Transformer, other: Transformer, tokens: Tensor) -> float:
    """KL(model || other), nats a token, in float64."""
    with torch.inference_mode():
        told, said = (one(tokens).double().log_softmax(-1) for one in (model, other))
    return float((told.exp() * (told - said)).sum() / tokens.numel())


@pytest.fixture(scope="module")
def text(shared: Callable[[str], Path]) -> str:
    return shared("text/tinystories_sample.txt").read_text(encoding="utf-8")[:20_000]


@pytest.fixture(scope="module")
def found(stories: Path, text: str) -> dict[str, Any]:
    """The verb on stories260k under w4-channel."""
    return sensitivity_verb(str(stories), choose_recipe("w4-channel"), text, tokens=256)


def repeated(model: Transformer) -> Transformer:
    """The model with each block run twice in a row, and a larger stream."""
    layers = tuple(layer for layer in model.config.layers for _ in "12")
    twice = Transformer(replace(model.config, layers=layers, repeats=2, embedding_scale=3.0))
    twice.load_state_dict(model.state_dict())
    return twice.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("llama", "bitnet"), ("qwen3", "w4-channel"), ("mobilellm_p1", "8da4w-g32"), ("stories260k", "8da8w"), ("repeated", "w4-channel")],
)
def test_a_layers_kl_is_that_of_the_whole_model_with_it_quantized(name: str, recipe: str, models: Callable[[str], Path]) -> None:
    model = repeated(load_model(models("llama"))) if name == "repeated" else load_model(models(name))
    chosen = find_recipe(recipe)
    corpus = corpus_of(model)
    rows = sensitivity(model, chosen, corpus)
    assert {name for row in rows for name in row.layers} == {fate.name for fate in fates(model.config, chosen) if fate.rule}
    for row in rows[:4] + rows[-4:]:
        expected = straightforward_kl(model, alone(model, chosen, row.layers), corpus.sequences[:, :-1].long())
        assert row.kl == pytest.approx(expected, rel=1e-3, abs=1e-6), row.layers
    assert [row.kl for row in rows] == sorted((row.kl for row in rows), reverse=True)


def test_a_pass_begins_at_the_layers_block(models: Callable[[str], Path]) -> None:
    model, runs = repeated(load_model(models("llama"))), []
    for block in model.blocks:
        block.register_forward_hook(lambda *told: runs.append(told))
    sensitivity(model, find_recipe("8da8w"), corpus_of(model))
    assert len(runs) == 4 + 4 + (4 + 7 * 4 + 7 * 2 + 0)  # reference, float stream, then embedding, two blocks run twice, head


def test_a_text_in_parts_gives_the_same_figures(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(stories)
    together = sensitivity(model, find_recipe("8da8w"), corpus_of(model))
    monkeypatch.setattr(module, "AT_ONCE", 24 * model.config.vocab_size)
    parts = sensitivity(model, find_recipe("8da8w"), corpus_of(model))
    kl = {row.layers: row.kl for row in parts}
    assert all(row.kl == pytest.approx(kl[row.layers], rel=1e-3, abs=1e-6) for row in together)


@pytest.mark.parametrize("layer", ["embedding", "layers.1.attention.v", "layers.3.mlp.down", "head"])
def test_a_layer_whose_scales_are_zero_is_the_most_sensitive(layer: str, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(stories)
    model.head.weight, model.config = torch.nn.Parameter(weight_of(model.head).clone()), replace(model.config, tied=False)
    broken = weight_of(model.get_submodule(layer))

    def with_zeros(weight: Tensor, grid: WeightGrid) -> tuple[Tensor, Tensor]:
        integers, scale = quantize_linear(weight, grid)
        return integers, scale * (weight.data_ptr() != broken.data_ptr())

    monkeypatch.setattr(module, "quantize_linear", with_zeros)
    rows = sensitivity(model, find_recipe("w4-channel"), corpus_of(model))
    assert rows[0].layers == (layer,)
    assert rows[0].kl > 2 * rows[1].kl


@pytest.mark.parametrize("name", ["8da4w-g32", "w4-channel", "bonsai"])
def test_bytes_are_those_that_a_checkpoint_saves_and_would_add(name: str, models: Callable[[str], Path]) -> None:
    model, recipe = load_model(models("mobilellm_p1")), find_recipe(name)
    size = checkpoint_bytes(model.config, recipe)
    for row in sensitivity(model, recipe, corpus_of(model, 1, 8)):
        assert checkpoint_bytes(model.config, recipe.with_changes(exclude=row.layers)) - size == row.bytes_saved
        wider = recipe.with_changes(mixed=tuple(f"{layer}={row.wider}" for layer in row.layers))
        assert checkpoint_bytes(model.config, wider) - size == row.bytes_wider


@pytest.mark.parametrize("name", ["w4-channel", "bitnet"])
def test_the_float_model_stays_as_it_is(name: str, models: Callable[[str], Path]) -> None:
    model, recipe = load_model(models("qwen3")), find_recipe(name)
    corpus, config = corpus_of(model), model.config
    state, layers = {key: tensor.clone() for key, tensor in model.state_dict().items()}, list(layers_of(model))
    sensitivity(model, recipe, corpus)
    measured(model, recipe, corpus)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert [(key, id(layer)) for key, layer in layers_of(model)] == [(key, id(layer)) for key, layer in layers]
    assert model.config is config and weight_of(model.head) is weight_of(model.embedding)


def test_gptq_is_rounded_to_nearest_and_the_result_says_so(models: Callable[[str], Path], stories: Path, text: str) -> None:
    model, recipe = load_model(models("llama")), find_recipe("gptq-w6")
    nearest = replace(recipe, rules=tuple(replace(rule, rounding="nearest") for rule in recipe.rules))
    corpus = corpus_of(model)
    assert [row.kl for row in sensitivity(model, recipe, corpus)] == [row.kl for row in sensitivity(model, nearest, corpus)]
    assert measured(model, recipe, corpus) == figures(convert(deepcopy(model), nearest), corpus, nearest, model)
    result = sensitivity_verb(str(stories), recipe, text, tokens=16)
    assert result["gptq_to_nearest"]
    assert "rounded to nearest" in printed(result)


def test_the_proposal_is_better_than_the_recipe_and_can_be_had_by_its_options(found: dict[str, Any], stories: Path, text: str) -> None:
    proposed, whole = found["proposal"], found["all"]
    assert 0 < proposed["kl"] < 0.75 * whole["kl"]
    assert whole["bits_per_weight"] < proposed["bits_per_weight"] < 8
    again = sensitivity_verb(str(stories), choose_recipe("w4-channel", mixed=proposed["mixed"]), text, tokens=256)["all"]
    assert again == {key: value for key, value in proposed.items() if key != "mixed"}


def test_the_result_is_json_and_its_rows_are_in_order(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found)) == found
    assert found["tokens"] == 256
    assert [row["kl"] for row in found["rows"]] == sorted((row["kl"] for row in found["rows"]), reverse=True)
    assert len(found["rows"]) == 2 + 5 * 7
    assert not found["gptq_to_nearest"]


KLS = st.lists(st.tuples(st.floats(0, 10), st.integers(-100, 10_000)), min_size=1, max_size=30)


@given(KLS, st.sampled_from([4, 8]))
def test_a_proposal_leaves_half_of_the_sum_and_takes_the_dearest_bytes_first(values: list[tuple[float, int]], bits: Any) -> None:
    rule = Rule((), WeightGrid(bits, None))
    rows = [Row((f"layers.{i}.mlp.up",), rule, 1, 1, wider, kl) for i, (kl, wider) in enumerate(values)]
    mixed, total = proposal(rows), sum(row.kl for row in rows)
    assert {entry.rpartition("=")[2] for entry in mixed} <= {"int8" if bits == 4 else "float"}
    chosen = [rows[int(entry.split(".")[1])] for entry in mixed]
    assert sum(row.kl for row in chosen) >= total / 2 - 1e-6
    assert not chosen or sum(row.kl for row in chosen[:-1]) < total / 2 + 1e-6
    gains = [row.kl / max(row.bytes_wider, 1) for row in rows]
    assert [row.kl / max(row.bytes_wider, 1) for row in chosen] == sorted(gains, reverse=True)[: len(chosen)]


def printed(result: dict[str, Any]) -> str:
    console = Console(width=tables.WIDTH_WITHOUT_TERMINAL, markup=False)
    with console.capture() as captured:
        console.print(tables.sensitivity(result))
    return captured.get()


def test_the_table_has_bars_and_options_that_can_be_copied(found: dict[str, Any]) -> None:
    lines = printed(found).splitlines()
    bars = [line.count("█") for line in lines if "int4 per channel" in line]
    assert bars[0] == tables.BAR and bars == sorted(bars, reverse=True) and bars[-1] < tables.BAR / 4
    options = " ".join(line.strip().removeprefix("wider: ").removesuffix(" \\") for line in lines if "--mixed" in line)
    assert options == " ".join(f"--mixed '{entry}'" for entry in found["proposal"]["mixed"])


def test_a_long_table_sums_up_the_rest(found: dict[str, Any]) -> None:
    rows = [{**found["rows"][0], "layers": [f"layers.{i}.mlp.up"], "kl": 1.0} for i in range(tables.MOST_LAYERS + 3)]
    lines = printed({**found, "rows": rows}).splitlines()
    assert sum("mlp.up " in line and "█" in line for line in lines) == tables.MOST_LAYERS
    assert any(line.split()[:4] == ["and", "3", "more", "3.00e+00"] for line in lines)


def test_what_cannot_be_measured_is_refused(stories: Path, text: str, tmp_path: Path) -> None:
    recipe = choose_recipe("8da8w")
    with pytest.raises(RecipeError, match="fp quantizes no layer"):
        sensitivity_verb(str(stories), choose_recipe("fp"), text, tokens=16)
    with pytest.raises(RecipeError, match="in=172"):
        sensitivity_verb(str(stories), choose_recipe("8da4w-g32"), text)
    with pytest.raises(InputError, match="2 tokens of the text would be read, at least 16"):
        sensitivity_verb(str(stories), recipe, "Once upon")
    with pytest.raises(InputError, match="15 tokens"):
        sensitivity_verb(str(stories), recipe, text, tokens=15)
    quantize(str(stories), recipe, tmp_path / "quantized")
    with pytest.raises(InputError, match="quantized already"):
        sensitivity_verb(str(tmp_path / "quantized"), recipe, text)


def test_progress_counts_every_layer_and_both_recipes(stories: Path, text: str) -> None:
    seen: list[tuple[str, int, int]] = []
    sensitivity_verb(str(stories), choose_recipe("8da8w"), text, tokens=16, progress=lambda *told: seen.append(told))
    assert seen == [*(("sensitivity", i, 36) for i in range(1, 37)), ("all layers", 1, 2), ("all layers", 2, 2)]
