"""The sensitivity of single layers, and the finer grids that are proposed for few of them."""

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
from lobit.quant_recipes.apply import convert, layer_plans, layers_of
from lobit.quant_recipes.catalog import find_recipe
from lobit.quant_recipes.corpus import Corpus
from lobit.quant_recipes.integer import quantize_linear
from lobit.quant_recipes.metrics import figures
from lobit.quant_recipes.recipe import Recipe, Rule, WeightGrid
from lobit.quant_recipes.sensitivity import Row, Wider, measured, proposal, sensitivity
from lobit.quant_recipes.sizes import checkpoint_bytes
from lobit.verbs.make import choose_recipe, quantize
from lobit.verbs.sensitivity import budget_bytes, default_tokens
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
    return sensitivity_verb(str(stories), choose_recipe("w4-channel"), text, budget="12%", tokens=256)


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
    assert {name for row in rows for name in row.layers} == {row.name for row in layer_plans(model.config, chosen) if row.rule}
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
        for wider in row.wider:
            changed = recipe.with_changes(mixed=tuple(f"{layer}={wider.grid}" for layer in row.layers))
            assert checkpoint_bytes(model.config, changed) - size == wider.bytes


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
    assert found["budget"] == {"asked": "12%", "bytes": int(0.12 * whole["bytes"])}
    assert 0.9 * found["budget"]["bytes"] < proposed["bytes"] - whole["bytes"] <= found["budget"]["bytes"]
    again = sensitivity_verb(str(stories), choose_recipe("w4-channel", mixed=proposed["mixed"]), text, tokens=256)["all"]
    assert again == {key: value for key, value in proposed.items() if key != "mixed"}


def test_the_result_is_json_and_its_rows_are_in_order(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found)) == found
    assert found["tokens"] == 256
    assert [row["kl"] for row in found["rows"]] == sorted((row["kl"] for row in found["rows"]), reverse=True)
    assert len(found["rows"]) == 2 + 5 * 7
    assert not found["gptq_to_nearest"]


@st.composite
def made_rows(draw: st.DrawFn) -> list[Row]:
    """Layers with up to two finer grids, of any bytes, each of which leaves any share of the KL."""
    rows, grids = [], ("int4:32", "int8")
    for i in range(draw(st.integers(1, 20))):
        kl, count = draw(st.floats(0, 10)), draw(st.integers(0, 2))
        wider = tuple(Wider(grids[j], draw(st.integers(-100, 10_000)), kl * draw(st.floats(0, 1))) for j in range(count))
        rows.append(Row((f"layers.{i}.mlp.up",), Rule((), WeightGrid(4, None)), 1, 1, kl, wider))
    return rows


def of_proposal(rows: list[Row], budget: int) -> tuple[int, float]:
    """The bytes that a proposal adds, and the sum of KL that it leaves."""
    chosen = dict(entry.split("=") for entry in proposal(rows, budget))
    assert len(chosen) == len(proposal(rows, budget)), "a layer is named once"
    finer = [next((wider for wider in row.wider if wider.grid == chosen.get(row.layers[0])), None) for row in rows]
    assert sum(wider is not None for wider in finer) == len(chosen)
    left = (wider.kl if wider else row.kl for row, wider in zip(rows, finer, strict=True))
    return sum(wider.bytes for wider in finer if wider), sum(left)


ROUNDING = 1e-9
"""Of sums of at most 20 figures of at most 10, in double precision: far less."""


@given(made_rows(), st.integers(0, 50_000), st.integers(0, 50_000))
def test_every_budget_is_kept_and_a_larger_one_leaves_no_more(rows: list[Row], budget: int, more: int) -> None:
    added, left = of_proposal(rows, budget)
    assert added <= budget
    assert left <= sum(row.kl for row in rows) + ROUNDING
    assert of_proposal(rows, budget + more)[1] <= left + ROUNDING


@given(made_rows())
def test_a_budget_for_all_takes_the_finest_grid_of_every_layer(rows: list[Row]) -> None:
    best = sum(min([row.kl, *(wider.kl for wider in row.wider)]) for row in rows)
    assert of_proposal(rows, 20 * 10_000)[1] == pytest.approx(best, abs=ROUNDING)


def test_the_dearest_bytes_are_taken_first_and_what_does_not_fit_is_left_out() -> None:
    grid = Rule((), WeightGrid(4, None))
    rows = [
        Row(("layers.0.mlp.up",), grid, 1, 1, 1.0, (Wider("int4:32", 10, 0.4), Wider("int8", 50, 0.0))),
        Row(("embedding", "head"), grid, 1, 1, 5.0, (Wider("int8", 100, 0.0),)),
        Row(("layers.1.mlp.up",), grid, 1, 1, 0.1, (Wider("int8", 8, 0.0),)),
    ]
    assert proposal(rows, 9) == ["layers.1.mlp.up=int8"]
    assert proposal(rows, 18) == ["layers.0.mlp.up=int4:32", "layers.1.mlp.up=int8"]
    assert proposal(rows, 99) == ["layers.0.mlp.up=int8", "layers.1.mlp.up=int8"]
    assert proposal(rows, 110) == ["layers.0.mlp.up=int4:32", "embedding=int8", "head=int8"]


@pytest.mark.parametrize(("name", "finer"), [("w4-channel", ["int4:32", "int8"]), ("8da8w", ["float"]), ("bitnet", ["int8"])])
def test_finer_grids_are_expected_to_leave_less(name: str, finer: list[str], models: Callable[[str], Path]) -> None:
    model = load_model(models("qwen3"))
    for row in sensitivity(model, find_recipe(name), corpus_of(model, 1, 8)):
        assert [wider.grid for wider in row.wider] == finer
        left = [wider.kl for wider in row.wider]
        assert left == sorted(left, reverse=True)
        assert row.wider[-1].kl <= 0.02 * row.kl, "8 bits have a sixteenth of the step of 4, and a 256th of its square"


def test_a_budget_is_a_share_or_bytes() -> None:
    told = {"5%": 50, "0%": 0, "12.5 %": 125, "7B": 7, "4MB": 4_000_000, "0.5kB": 500, "1 GB": 10**9}
    assert {text: budget_bytes(text, 1000) for text in told} == told


@pytest.mark.parametrize("budget", ["", "5", "-5%", "5 percent", "4mb", "4MiB", "nan%", "1e3kB", "\u0665%", "%", "9" * 13 + "%", "5%\n"])
def test_what_is_no_budget_is_refused_before_any_work(budget: str, stories: Path) -> None:
    with pytest.raises(InputError, match="is neither a share of the checkpoint nor bytes: give one such as 5% or 4MB"):
        sensitivity_verb(str(stories), choose_recipe("8da8w"), "", budget=budget)


def test_a_budget_of_nothing_proposes_nothing(stories: Path, text: str) -> None:
    result = sensitivity_verb(str(stories), choose_recipe("8da8w"), text, budget="0%", tokens=16)
    assert result["proposal"] == {"mixed": [], **result["all"]}
    assert "nothing that fits the budget" in printed(result)


@pytest.mark.parametrize(("width", "tokens"), [(576, 2048), (10_000, 512)])
def test_a_larger_model_reads_fewer_tokens(width: int, tokens: int, models: Callable[[str], Path]) -> None:
    config = load_model(models("llama")).config
    assert default_tokens(replace(config, hidden_size=width, intermediate_size=4 * width)) == tokens


def printed(result: dict[str, Any]) -> str:
    console = Console(width=tables.WIDTH_WITHOUT_TERMINAL, markup=False)
    with console.capture() as captured:
        console.print(tables.sensitivity(result))
    return captured.get()


def test_the_table_has_bars_and_options_that_can_be_copied(found: dict[str, Any]) -> None:
    lines = printed(found).splitlines()
    bars = [line.count("█") for line in lines if "int4 per channel" in line]
    assert bars[0] == tables.BAR and bars == sorted(bars, reverse=True) and bars[-1] < tables.BAR / 4
    options = " ".join(line.strip().removeprefix("finer: ").removesuffix(" \\") for line in lines if "--mixed" in line)
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
