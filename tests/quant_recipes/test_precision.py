"""A recipe that says 16 bits is computed in 16 bits: what the reference then gives is what PyTorch's own half precision gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lobit.checkpoint import load_model
from lobit.model import CausalAttention, Transformer, rotary_tables
from lobit.quant_recipes.apply import convert
from lobit.quant_recipes.catalog import CATALOG, find_recipe
from lobit.quant_recipes.corpus import Corpus
from lobit.quant_recipes.fake_quant import attention_for
from lobit.quant_recipes.metrics import figures
from lobit.quant_recipes.precision import HalfPrecision
from lobit.quant_recipes.recipe import Recipe
from lobit.runtime.parity import kl_divergence, log_softmax
from lobit.runtime.reference import MOVED, ReferenceEngine, moved, order_share
from lobit.runtime.verdict import judged

pytestmark = pytest.mark.usefixtures("one_thread")
HALVES = find_recipe("fp").with_changes(kv_cache="half", activations="half")
TOKENS = 160


@pytest.fixture(scope="module")
def model(models: Any) -> Transformer:
    return load_model(models("demo"))


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(3, 500, TOKENS)]


def logits(model: Transformer, recipe: Recipe | None, tokens: list[int]) -> Any:
    return ReferenceEngine(model, recipe, TOKENS).read(tokens)(range(TOKENS))


def in_halves(model: Transformer, tokens: list[int]) -> Any:
    """The logits as PyTorch computes them with every weight, activation and cache entry of type float16."""
    halves = copy.deepcopy(model).half()
    tables = rotary_tables(model.config, torch.arange(TOKENS))
    tables = {rope: type(table)(table.cos.half(), table.sin.half()) for rope, table in tables.items()}
    with torch.inference_mode():
        return halves(torch.tensor([tokens]), tables, CausalAttention(model.config))[0].float().numpy()


def kl(exact: Any, other: Any) -> Any:
    return kl_divergence(log_softmax(exact), log_softmax(other))


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=2), st.sampled_from([torch.add, torch.mul, torch.sub]))
def test_every_operation_gives_halves(values: list[float], operation: Any) -> None:
    a, b = (torch.tensor([value]) for value in values)
    with HalfPrecision():
        found = operation(a, b)
    assert torch.equal(found, operation(a, b).half().float())


def test_sums_inside_of_an_operation_are_wider() -> None:
    """A sum of halves would stop at 2048; indices and masks stay what they are."""
    with HalfPrecision():
        assert F.linear(torch.ones(1, 4096), torch.ones(1, 4096)).item() == 4096
        assert torch.arange(3000).sum().item() == 2999 * 1500


def test_the_reference_in_halves_is_as_far_from_floats_as_pytorchs_halves(model: Transformer, tokens: list[int]) -> None:
    exact = logits(model, None, tokens)
    ours, theirs = kl(exact, logits(model, HALVES, tokens)).mean(), kl(exact, in_halves(model, tokens)).mean()
    assert 0 < theirs / 4 < ours < 4 * theirs


def test_parity_lets_another_order_of_halves_pass_and_a_coarser_cache_fail(model: Transformer, tokens: list[int]) -> None:
    exact = logits(model, HALVES, tokens)
    limit = judged(kl(exact, logits(moved(model, order_share(HALVES)), HALVES, tokens)))[0]["limit"]
    assert kl(exact, in_halves(model, tokens)).mean() < limit
    assert kl(exact, logits(model, HALVES.with_changes(kv_cache="int8"), tokens)).mean() > limit


def test_the_limit_is_as_tight_as_before_where_floats_have_32_bits() -> None:
    assert order_share(find_recipe("fp")) == MOVED < order_share(HALVES)


def test_a_cache_of_halves_rounds_keys_and_values() -> None:
    q, k, v = (torch.randn(1, 3, 2, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    seen: list[torch.Tensor] = []
    attend = attention_for(find_recipe("fp").with_changes(kv_cache="half"), lambda layer, *qkv: seen.extend(qkv) or q)
    attend(0, q, k.requires_grad_(), v)
    assert torch.equal(seen[0], q) and torch.equal(seen[1], k.half().float()) and torch.equal(seen[2], v.half().float())
    seen[1].sum().backward()
    assert torch.equal(k.grad, torch.ones_like(k)), "training passes the gradient through"


def test_figures_are_those_of_the_precision(model: Transformer) -> None:
    corpus = Corpus(torch.randint(3, 500, (2, 65), generator=torch.Generator().manual_seed(0)))
    found = [figures(model, corpus, recipe, model).kl for recipe in (None, HALVES)]
    assert found[0] < 1e-9 < found[1] < 1e-4


def test_values_beyond_halves_are_infinite_and_not_hidden(model: Transformer, tokens: list[int]) -> None:
    huge = copy.deepcopy(model)
    huge.embedding.weight.data *= 1e6
    assert np.isfinite(logits(huge, None, tokens)).all()
    assert not np.isfinite(logits(huge, HALVES, tokens)).all()


@pytest.mark.parametrize("name", CATALOG)
def test_what_a_summary_says_of_16_bit_activations_is_a_field(name: str) -> None:
    recipe = CATALOG[name]
    says = "16-bit float activations and KV cache" in recipe.summary or "As w4-channel" in recipe.summary
    assert (recipe.compute_bits == 16) == (recipe.kv_bits == 16) == says


def test_recipes_from_before_there_was_the_field_are_read_and_written_as_they_were() -> None:
    values = find_recipe("8da4w-g32").to_json()
    assert "compute_bits" not in values
    assert Recipe.from_json(values) == find_recipe("8da4w-g32")
    assert Recipe.from_json(HALVES.to_json()) == HALVES


def test_a_recipe_of_16_bits_runs_on_a_target_of_32(models: Any, tmp_path: Path) -> None:
    """Target onnx computes in float32: parity compares it with that, and shows what 16 bits would cost."""
    from lobit import verbs
    from lobit.demo import held_out_text

    recipe = find_recipe("w4-channel")
    verbs.export(str(models("demo")), "onnx", tmp_path / "bundle", recipe=recipe, context=192, chunk=64)
    result = verbs.parity(tmp_path / "bundle", str(models("demo")), held_out_text(), tokens=300)
    assert result["passed"], result
    rounded, tokens = convert(load_model(models("demo")), recipe), list(range(3, 3 + TOKENS))
    halves, floats = (logits(rounded, one, tokens) for one in (recipe, recipe.with_changes(activations="float")))
    assert not np.array_equal(halves, floats)
