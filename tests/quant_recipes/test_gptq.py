"""GPTQ: the rounding of one weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lobit.errors import InputError, RecipeError
from lobit.quant_recipes import gptq
from lobit.quant_recipes.gptq import calibrated_scale, catch_up, importance_of, relative_error, round_with_hessian
from lobit.quant_recipes.grid import dequantize, least_squares_scale, quantize, round_scale
from lobit.quant_recipes.integer import quantize_linear
from lobit.quant_recipes.recipe import WeightGrid

pytestmark = pytest.mark.usefixtures("one_thread")

HALVED = 0.5
"""Of the error of rounding to nearest: what GPTQ leaves on average is about 0.3 of it on inputs as correlated as here."""
GREEDY = 1.25
"""Of the error of rounding to nearest, at most: each column is rounded without regard to those after it, and one in a hundred layers as
small as here comes out worse."""
bits = st.sampled_from([3, 4, 6, 8])
seeds = st.integers(0, 2**31)


def layer(seed: int, out: int, inner: int, rank: int) -> tuple[Tensor, Tensor]:
    """A random weight [out, inner] and the Hessian of inputs that `rank` causes and some noise make."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = noise(4 * inner, rank) @ noise(rank, inner) + 0.1 * noise(4 * inner, inner)
    return noise(out, inner), x.T @ x


def one_by_one(weight: Tensor, hessian: Tensor, grid: WeightGrid, act_order: bool) -> tuple[Tensor, Tensor]:
    """GPTQ as it is derived: after each column its error is spread over all others, and it is struck out of the inverse Hessian."""
    left, inner = weight.double(), weight.shape[1]
    inverse = (hessian.double() + gptq.DAMPING * hessian.diagonal().double().mean() * torch.eye(inner)).inverse()
    importance = importance_of(hessian)
    size, scales, integers = grid.group_size or inner, calibrated_scale(weight, grid, importance), torch.zeros_like(weight)
    order = sorted(range(inner), key=lambda i: -float(hessian[i, i])) if act_order else range(inner)
    for column in order:
        group = column // size
        if not act_order and column % size == 0:
            part = slice(column, column + size)
            scales[:, group] = calibrated_scale(left[:, part].float(), grid, importance[part])[:, 0]
        rounded = (left[:, column] / scales[:, group]).round().clamp(grid.q_min, grid.q_max)
        integers[:, column] = rounded
        error = (left[:, column] - rounded * scales[:, group]) / inverse[column, column]
        left = left - error[:, None] * inverse[column]
        inverse = inverse - inverse[:, [column]] * inverse[[column]] / inverse[column, column]
    return integers.to(torch.int8), scales


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 4, 24, 48])
@given(seed=seeds, bits=bits)
@settings(deadline=None, max_examples=15)
def test_inputs_that_have_nothing_in_common_are_rounded_to_nearest_bit_for_bit(seed, bits, group_size, act_order):
    weight, grid = layer(seed, 9, 48, 1)[0], WeightGrid(bits, group_size)
    for hessian in (torch.eye(48), torch.diag(torch.rand(48)), torch.zeros(48, 48)):
        integers, scales, _ = round_with_hessian(weight, hessian, grid, act_order=act_order)
        expected = least_squares_scale(weight, grid, importance_of(hessian))
        assert torch.equal(scales, expected) and torch.equal(integers, quantize(weight, expected, grid))
        if hessian.diagonal().unique().numel() == 1:
            assert torch.equal(integers, quantize_linear(weight, grid)[0])


@pytest.mark.parametrize("block", [1, 10, 32, 128])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("rule", ["least_squares", "range"])
@pytest.mark.parametrize(("bits", "group_size"), [(3, 16), (4, 4), (4, 48), (6, None), (8, 96)])
def test_the_integers_are_those_of_the_derivation(bits, group_size, rule, act_order, block):
    grid, (weight, hessian) = WeightGrid(bits, group_size, rule), layer(7, 12, 96, 30)
    integers, scales, _ = round_with_hessian(weight, hessian, grid, act_order=act_order, block=block)
    expected = one_by_one(weight, hessian, grid, act_order)
    assert torch.equal(integers, expected[0]) and torch.equal(scales, expected[1])


sizes = st.sampled_from([4, 8, 16, 43])


@given(seed=seeds, bits=bits, size=sizes, groups=st.integers(1, 40), out=st.integers(8, 40), act_order=st.booleans())
@settings(deadline=None, max_examples=100)
def test_no_layer_is_much_worse_than_rounded_to_nearest(seed, bits, size, groups, out, act_order):
    inner = size * groups
    assume(16 <= inner <= 258)
    weight, hessian = layer(seed, out, inner, 1 + seed % inner)
    grid = WeightGrid(bits, size)
    integers, scales, error = round_with_hessian(weight, hessian, grid, act_order=act_order)
    assert integers.dtype == torch.int8 and integers.shape == weight.shape and scales.shape == (out, groups)
    assert grid.q_min <= integers.min() and integers.max() <= grid.q_max
    assert torch.equal(round_scale(scales), scales)
    assert error == relative_error(weight, integers, scales, hessian)
    assert error <= GREEDY * relative_error(weight, *quantize_linear(weight, grid), hessian)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(3, 32), (4, 32), (6, None), (8, None)])
def test_the_error_is_clearly_smaller_on_average(bits, group_size, act_order):
    grid, ratios = WeightGrid(bits, group_size), []
    for seed in range(10):
        weight, hessian = layer(seed, 32, 128, 100)
        nearest = relative_error(weight, *quantize_linear(weight, grid), hessian)
        ratios.append(round_with_hessian(weight, hessian, grid, act_order=act_order)[2] / nearest)
    assert sum(ratios) / len(ratios) < HALVED


def test_the_error_is_that_of_the_output():
    generator = torch.Generator().manual_seed(1)
    x, (weight, _) = torch.randn(50, 32, generator=generator), layer(2, 8, 32, 4)
    integers, scales = quantize_linear(weight, WeightGrid(4, 16))
    before, after = x @ weight.T, x @ dequantize(integers, scales).T
    expected = ((after - before).square().sum() / before.square().sum()).item()
    assert relative_error(weight, integers, scales, x.T @ x) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_that_are_always_zero_change_nothing(act_order):
    weight, hessian = layer(3, 8, 32, 20)
    dead, alive = torch.arange(32) % 5 == 0, torch.arange(32) % 5 != 0
    hessian[dead] = 0
    hessian[:, dead] = 0
    grid = WeightGrid(4, 1)
    integers, scales, _ = round_with_hessian(weight, hessian, grid, act_order=act_order)
    nearest = quantize_linear(weight, grid)
    assert torch.equal(integers[:, dead], nearest[0][:, dead]) and torch.equal(scales[:, dead], nearest[1][:, dead])
    mean = hessian.diagonal().mean() / hessian[alive][:, alive].diagonal().mean()
    alone = round_with_hessian(weight[:, alive], hessian[alive][:, alive], grid, act_order=act_order, damping=gptq.DAMPING * float(mean))
    assert torch.equal(integers[:, alive], alone[0]) and torch.equal(scales[:, alive], alone[1])


def test_more_damping_is_taken_where_less_is_not_enough():
    weight, grid = layer(4, 8, 32, 4)[0], WeightGrid(4, 16)
    flat = torch.ones(32, 32)
    strong = round_with_hessian(weight, flat, grid, damping=gptq.STRONGER[0])
    none = round_with_hessian(weight, flat, grid, damping=0.0)
    assert torch.equal(none[0], strong[0]) and torch.equal(none[1], strong[1])


@given(seed=seeds)
@settings(deadline=None, max_examples=30)
def test_a_weight_that_catches_up_is_the_least_squares_one(seed):
    generator = torch.Generator().manual_seed(seed)
    exact, weight = torch.randn(200, 24, generator=generator), torch.randn(6, 24, generator=generator)
    lossy = exact + 0.3 * torch.randn(200, 24, generator=generator)
    move = catch_up(lossy.T @ lossy, (exact - lossy).T @ lossy, damping=0.0)
    solved = torch.linalg.lstsq(lossy.double(), (exact @ weight.T).double()).solution.T
    torch.testing.assert_close((weight + weight @ move).double(), solved, rtol=1e-3, atol=1e-3)


def test_nothing_was_lost_and_nothing_is_caught_up_with():
    _, hessian = layer(8, 4, 32, 8)
    assert torch.equal(catch_up(hessian, torch.zeros(32, 32)), torch.zeros(32, 32))


def test_a_matrix_that_is_no_hessian_is_refused():
    with pytest.raises(InputError, match=r"\[32, 32\].* no Cholesky factor.*another text"):
        round_with_hessian(layer(5, 8, 32, 4)[0], 3 * torch.ones(32, 32) - 2 * torch.eye(32), WeightGrid(4, 16))


@pytest.mark.parametrize("grid", [WeightGrid(1, None), WeightGrid(2, None, "absmean", shards=1), WeightGrid(4, None, "learned")], ids=str)
def test_grids_of_other_rules_are_refused(grid):
    with pytest.raises(RecipeError, match="range"):
        round_with_hessian(*layer(6, 8, 32, 4), grid)
