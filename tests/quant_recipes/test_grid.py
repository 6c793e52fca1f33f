"""Scales, integers and rounding, as small properties."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lobit.quant_recipes.fake_quant import fake_quantize_weight
from lobit.quant_recipes.grid import (
    LEAST_OF_ROW,
    SHARES,
    choose_scale,
    dequantize,
    fake_quantize_tokens,
    least_squares_scale,
    quantize,
    range_scale,
    round_scale,
    rounded,
    shares_of,
    token_range,
)
from lobit.quant_recipes.integer import quantize_linear
from lobit.quant_recipes.packing import pack_int4, unpack_int4
from lobit.quant_recipes.recipe import WeightGrid

GRIDS = [WeightGrid(4, 32), WeightGrid(4, 32, "range"), WeightGrid(4, None), WeightGrid(8, None), WeightGrid(8, 64)]
floats = st.floats(-1e4, 1e4, width=32)
seeds = st.integers(0, 2**31)


def weight_of(seed: int, rows: int = 5, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(rows, 1, generator=generator) * 8 - 4
    return torch.randn(rows, columns, generator=generator) * spread.exp()


@given(floats)
def test_a_rounded_scale_is_held_exactly_by_bfloat16_and_float16(value: float) -> None:
    scale = round_scale(torch.tensor([abs(value)]))
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)
    assert torch.equal(scale.to(torch.float16).float(), scale)
    assert torch.equal(round_scale(scale), scale)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@given(seed=seeds)
@settings(deadline=None, max_examples=30)
def test_the_fake_quantized_weight_is_the_shipped_one_bit_for_bit(grid: WeightGrid, seed: int) -> None:
    weight = weight_of(seed)
    integers, scale = quantize_linear(weight, grid)
    shipped = dequantize(integers, scale)
    assert torch.equal(fake_quantize_weight(weight, grid), shipped)
    assert torch.equal(fake_quantize_weight(weight.clone().requires_grad_(), grid).detach(), shipped)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@given(seed=seeds)
@settings(deadline=None, max_examples=30)
def test_every_weight_lies_within_half_a_step_or_at_the_edge(grid: WeightGrid, seed: int) -> None:
    weight = weight_of(seed)
    scale = choose_scale(weight, grid)
    integers = quantize(weight, scale, grid)
    assert grid.q_min <= integers.min() and integers.max() <= grid.q_max
    error = (dequantize(integers, scale) - weight).abs().reshape(5, scale.shape[1], -1) / scale[:, :, None]
    inside = (integers > grid.q_min) & (integers < grid.q_max)
    assert error.reshape(5, -1)[inside].max() <= 0.5 + 1e-4
    if grid.scale_rule == "range":
        assert error.max() <= 1 + 2.0**-7


@given(seed=seeds)
@settings(deadline=None, max_examples=30)
def test_integers_survive_being_dequantized_and_quantized_again(seed: int) -> None:
    grid = WeightGrid(4, 32)
    integers, scale = quantize_linear(weight_of(seed), grid)
    assert torch.equal(quantize(dequantize(integers, scale), scale, grid), integers)


@pytest.mark.parametrize("size", [None, 32])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@given(seed=seeds, weighted=st.booleans())
@settings(deadline=None, max_examples=30)
def test_no_range_rounds_a_group_with_a_smaller_error_than_the_searched_one(bits: Any, size: int | None, seed: int, weighted: bool) -> None:
    weight, grid = weight_of(seed), WeightGrid(bits, size)
    importance = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed)) if weighted else None

    def errors(scale: torch.Tensor) -> torch.Tensor:
        squares = (rounded(weight, scale, grid) - weight).square() * (1 if importance is None else importance)
        return squares.reshape(len(weight), scale.shape[1], -1).sum(2)

    least = errors(least_squares_scale(weight, grid, importance))
    largest = weight.reshape(len(weight), least.shape[1], -1).abs().amax(2)
    for share in shares_of(grid):
        assert (least <= errors(range_scale(largest * share, grid)) * (1 + 1e-5)).all()


def test_a_whole_row_keeps_its_largest_weights() -> None:
    weight = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0))
    row, groups = (least_squares_scale(weight, WeightGrid(4, size)) for size in (None, 1024))
    eq_4 = range_scale(weight.abs().amax(1, keepdim=True), WeightGrid(4, None))
    assert (row >= LEAST_OF_ROW * eq_4 * (1 - 2.0**-7)).all()
    assert (groups < row).any(), "least squares alone would cut more"


def test_an_input_that_is_always_zero_has_no_say_in_a_scale() -> None:
    weight = torch.full((1, 32), 0.1)
    weight[0, 7] = 9.0
    importance = torch.ones(32)
    importance[7] = 0.0
    scale = least_squares_scale(weight, WeightGrid(4, 32), importance)
    assert scale.item() == pytest.approx(SHARES[0] * 9.0 / 7.5, rel=2.0**-8)


def test_equation_4_by_hand() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([-1.5, 0.75, 0.1, -0.3])
    integers, scale = quantize_linear(weight, WeightGrid(4, 32, "range"))
    assert scale.item() == torch.tensor(1.5 / 7.5).to(torch.bfloat16).float().item()
    assert integers[0, :4].tolist() == [-7, 4, 0, -1]


def test_a_group_of_zeros_stays_zero() -> None:
    integers, scale = quantize_linear(torch.zeros(2, 64), WeightGrid(4, 32))
    assert scale.min() > 0 and not integers.any()


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40))
@settings(deadline=None)
def test_a_token_is_rounded_to_255_steps_that_hold_zero(values: list[float]) -> None:
    x = torch.tensor(values)
    scale, zero_point = token_range(x)
    assert -128 <= zero_point.item() <= 127
    rounded = fake_quantize_tokens(x)
    assert (rounded - x).abs().max() <= scale.item() * 0.5 * 1.01 + 1e-6
    assert torch.equal(fake_quantize_tokens(torch.zeros(3)), torch.zeros(3))


@given(seed=seeds)
@settings(deadline=None, max_examples=30)
def test_token_grids_are_those_of_the_runtimes_operators(seed: int) -> None:
    import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401 (registers the operators)

    x = weight_of(seed)
    scale, zero_point = torch.ops.quantized_decomposed.choose_qparams_per_token_asymmetric(x, torch.int8)
    integers = torch.ops.quantized_decomposed.quantize_per_token(x, scale, zero_point, -128, 127, torch.int8)
    theirs = torch.ops.quantized_decomposed.dequantize_per_token(integers, scale, zero_point, -128, 127, torch.int8, torch.float32)
    ours, grid = fake_quantize_tokens(x), token_range(x)
    assert torch.equal(grid[0].double(), scale) and torch.equal(grid[1].long(), zero_point)
    steps = ((ours - theirs).abs() / scale.float()).max()
    assert steps < 1e-3 or steps <= 1.001, "at most the other side of a tie"


def test_fake_quantization_lets_gradients_through() -> None:
    weight = weight_of(1).requires_grad_()
    fake_quantize_weight(weight, WeightGrid(4, 32)).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.ones_like(weight))
    x = weight_of(2).requires_grad_()
    fake_quantize_tokens(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


@given(rows=st.integers(1, 5), columns=st.integers(1, 70), seed=seeds)
@settings(deadline=None)
def test_int4_packing_is_a_round_trip_for_every_shape(rows: int, columns: int, seed: int) -> None:
    integers = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    assert torch.equal(unpack_int4(pack_int4(integers), columns), integers)


def test_int4_packing_golden_bytes() -> None:
    assert pack_int4(torch.tensor([[-8, 7, 0, -1, 3]], dtype=torch.int8)).tolist() == [[0xF0, 0x78, 0x8B]]
