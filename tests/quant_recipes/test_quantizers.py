"""What is learned besides a weight, and the gradients that reach both: by hand, by finite differences, by plain autograd."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lobit.quant_recipes.fake_quant import FakeQuantizedLinear
from lobit.quant_recipes.grid import round_scale, straight_through
from lobit.quant_recipes.quantizers import LearnedRange, RowNorm, quantizer_for
from lobit.quant_recipes.recipe import Rule, WeightGrid

pytestmark = pytest.mark.usefixtures("one_thread")
GRIDS = {
    "int8": WeightGrid(8, None),
    "int6": WeightGrid(6, None),
    "int3 group 16": WeightGrid(3, 16),
    "int4 group 32": WeightGrid(4, 32),
    "int4 group 32 range": WeightGrid(4, 32, "range"),
    "int4 learned": WeightGrid(4, None, "learned"),
    "int4 learned group 32": WeightGrid(4, 32, "learned"),
    "ternary": WeightGrid(2, None, "absmean", shards=1),
    "ternary in 2 shards": WeightGrid(2, None, "absmean", shards=2),
    "ternary row norm": WeightGrid(2, None, "row_norm"),
    "binary": WeightGrid(1, None, "absmean", shards=1),
    "binary per channel": WeightGrid(1, None, "absmean"),
}
STRAIGHT = [name for name, grid in GRIDS.items() if grid.scale_rule in ("least_squares", "range", "absmean")]
ACTIVATIONS = {"float": (None, "range"), "int8": (8, "range"), "int8 absmax": (8, "absmax")}
seeds = st.integers(0, 2**31)
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rule_of(grid: WeightGrid, activation: str = "float") -> Rule:
    bits, kind = ACTIVATIONS[activation]
    return Rule(("*",), grid, bits, kind)


def linear(out: int, inner: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(inner, out, bias)
    layer.weight.data = random(out, inner, seed=seed)
    if bias:
        layer.bias.data = random(out, seed=seed + 1)
    return layer


# --- gradients of each rule -------------------------------------------------------------------------------------------------------


def test_straight_through_passes_the_value_of_one_and_the_gradient_of_the_other() -> None:
    exact, rounded = random(5).requires_grad_(), random(5, seed=1).requires_grad_()
    found = straight_through(exact, rounded)
    (found * torch.arange(5.0)).sum().backward()
    assert torch.equal(found, rounded)
    assert torch.equal(exact.grad, torch.arange(5.0))
    assert rounded.grad is None


@pytest.mark.parametrize("name", STRAIGHT)
def test_gradients_of_computed_scales_go_straight_through(name: str) -> None:
    weight, gradient = random(6, 64).requires_grad_(), random(6, 64, seed=1)
    quantizer = quantizer_for(weight, GRIDS[name])
    assert list(quantizer.parameters()) == []
    quantizer(weight, *quantizer.learned()).backward(gradient)
    assert torch.equal(weight.grad, gradient)


def test_learned_ranges_have_the_gradients_of_learned_step_sizes_worked_out_by_hand() -> None:
    # w_min = -7.5 and w_max = 6 make s = 7.5 / 7.5 = 1, in [-8, 7].
    weight = torch.tensor([[-9.0, -8.0, -2.25, 0.375, 0.5, 6.75, 7.0, 8.25]], requires_grad=True)
    quantizer = quantizer_for(weight, GRIDS["int4 learned"])
    assert isinstance(quantizer, LearnedRange)
    quantizer.low.data.fill_(-7.5), quantizer.high.data.fill_(6)
    found = quantizer(weight, *quantizer.learned())
    assert found.tolist() == [[-8, -8, -2, 0, 0, 7, 7, 7]]
    found.backward(torch.tensor([[1.0, 2, 4, 8, 16, 32, 64, 128]]))
    assert weight.grad.tolist() == [[0, 0, 4, 8, 16, 32, 0, 0]]  # eq. 5: 1 inside, 0 at the ends and beyond
    # eq. 3: round(v/s) - v/s inside, -8 or 7 at the ends and beyond; section 2.2: times 1 / sqrt(N Q_P); ds/dw_min = -1 / 7.5.
    of_scale = 1 * -8 + 2 * -8 + 4 * 0.25 + 8 * -0.375 + 16 * -0.5 + 32 * 0.25 + 64 * 7 + 128 * 7
    assert quantizer.low.grad.item() == pytest.approx(-of_scale / 7.5 / math.sqrt(8 * 7))
    assert quantizer.high.grad.item() == 0


@pytest.mark.parametrize("group", [None, 4])
@given(seed=seeds, share=st.floats(0.2, 1.5))
@settings(deadline=None, max_examples=20)
def test_learned_ranges_have_the_gradients_of_learned_step_sizes(group: int | None, seed: int, share: float) -> None:
    weight, gradient = random(3, 8, seed=seed).requires_grad_(), random(3, 8, seed=seed + 1)
    quantizer = quantizer_for(weight, WeightGrid(4, group, "learned"))
    assert isinstance(quantizer, LearnedRange)
    quantizer.low.data *= share
    quantizer.high.data *= share
    quantizer(weight, *quantizer.learned()).backward(gradient)
    size = group or 8
    for row in range(3):
        for start in range(0, 8, size):
            low, high = (float(end.detach()[row, start // size]) for end in (quantizer.low, quantizer.high))
            scale, of_scale = float(round_scale(torch.tensor(max(-low, high) / 7.5))), 0.0
            for column in range(start, start + size):
                ratio, g = float(weight[row, column].detach() / scale), float(gradient[row, column])
                inside = -8 < ratio < 7
                assert weight.grad[row, column] == (g if inside else 0)
                of_scale += g * (round(ratio) - ratio if inside else min(7, max(-8, ratio)))
            of_scale /= 7.5 * math.sqrt(size * 7)
            at = row, start // size
            wanted = (-of_scale, 0) if -low > high else (0, of_scale)
            found = quantizer.low.grad[at].item(), quantizer.high.grad[at].item()
            assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@given(seed=seeds, negative=st.booleans())
@settings(deadline=None, max_examples=20)
def test_row_norms_have_the_gradients_of_bonsais_equation(seed: int, negative: bool) -> None:
    latent, gradient = (random(4, 16, seed=seed) * 0.8).requires_grad_(), random(4, 16, seed=seed + 1)
    latent.data[3] *= 0.1  # rounds to zeros
    quantizer = quantizer_for(random(4, 16, seed=seed + 2), GRIDS["ternary row norm"])
    assert isinstance(quantizer, RowNorm)
    quantizer.magnitude.data *= -1 if negative else 1
    quantizer(latent, *quantizer.learned()).backward(gradient)
    for row in range(4):
        t, g, v = latent[row].detach().double(), gradient[row].double(), quantizer.magnitude[row].double().item()
        q = t.clamp(-1, 1).round()
        norm = max(1.0, float(q.norm()))
        assert quantizer.magnitude.grad[row].item() == pytest.approx(float(g @ q) / norm * math.copysign(1, v), rel=1e-4, abs=1e-5)
        scale = float(round_scale(torch.tensor(abs(v) / norm)))  # the shipped one multiplies Q; its own gradient is the exact one's
        through_norm = abs(v) * float(g @ q) / norm**3 * q
        wanted = (g * scale - through_norm) * (t.abs() <= 1)
        torch.testing.assert_close(latent.grad[row].double(), wanted, rtol=1e-4, atol=1e-5)


def test_bonsais_gradients_are_slopes_of_its_normalized_row() -> None:
    """Central differences of v Q / ||Q|| by Q, where rounding and its scale (2 / 2 = 1) are exact."""
    latent = torch.tensor([[0.9, -0.8, 0.1, 1.0, -0.6, -0.2]], requires_grad=True)
    gradient, q = random(1, 6), torch.tensor([1.0, -1, 0, 1, -1, 0], dtype=torch.float64)
    quantizer = quantizer_for(latent, GRIDS["ternary row norm"])
    assert isinstance(quantizer, RowNorm)
    quantizer.magnitude.data.fill_(2)
    quantizer(latent, *quantizer.learned()).backward(gradient)

    def value(v: float, at: Tensor) -> float:
        return float(gradient[0].double() @ (v * at / at.norm()))

    step = 1e-6
    slopes = [(value(2, q + step * e) - value(2, q - step * e)) / (2 * step) for e in torch.eye(6, dtype=torch.float64)]
    assert latent.grad[0].tolist() == pytest.approx(slopes, abs=1e-5)
    slope = (value(2 + step, q) - value(2 - step, q)) / (2 * step)
    assert quantizer.magnitude.grad.item() == pytest.approx(slope, abs=1e-5)


def test_bonsai_begins_with_the_signs_and_row_norms_of_the_float_weight() -> None:
    weight = torch.tensor([[3.0, -2.0, 0.25, -0.5], [0.1, 0.1, -0.1, 0.1], [0, 0, 0, 0]])
    quantizer = quantizer_for(weight, GRIDS["ternary row norm"])
    start = quantizer.start(weight)
    assert start.tolist() == [[1, -1, 0, 0], [1, 1, -1, 1], [0, 0, 0, 0]]  # 0.7 mean |w| of the first row: 1.006
    assert quantizer.learned()[0].flatten().tolist() == pytest.approx([math.sqrt(13.3125), 0.2, 0])
    integers, scale = quantizer.integers(start)
    assert torch.equal(integers, start.to(torch.int8))
    assert scale.flatten().tolist() == pytest.approx([math.sqrt(13.3125 / 2), 0.1, 2**-14], rel=2**-8)


# --- the product ------------------------------------------------------------------------------------------------------------------


def gradients_of(layer: FakeQuantizedLinear, x: Tensor, product: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and the gradients of input, bias, weight and what is learned."""
    wanted = [x, *layer.parameters()]
    for tensor in wanted:
        tensor.grad = None
    y = product(x)
    y.backward(random(*y.shape, seed=5).to(y.dtype))
    return y.detach(), [tensor.grad for tensor in wanted]


@grids
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_product_has_the_gradients_of_plain_autograd(grid: WeightGrid, activation: str) -> None:
    layer = FakeQuantizedLinear(linear(10, 64), rule_of(grid, activation))
    x = random(2, 5, 64, seed=3).requires_grad_()
    for learned in layer.quantizer.learned():
        learned.data *= 0.8  # some weights are clipped
    found = gradients_of(layer, x, layer)
    plain = gradients_of(layer, x, lambda x: F.linear(*layer.operands(x), layer.bias))
    assert len(found[1]) == 3 + len(list(layer.quantizer.parameters()))
    torch.testing.assert_close(found[0], plain[0], rtol=1e-5, atol=1e-5)
    for of_product, of_autograd in zip(found[1], plain[1], strict=True):
        assert of_autograd is not None and of_autograd.abs().sum() > 0
        torch.testing.assert_close(of_product, of_autograd, rtol=1e-4, atol=1e-4)


@grids
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_product_in_bfloat16_has_about_the_same_gradients(grid: WeightGrid, activation: str) -> None:
    layer = FakeQuantizedLinear(linear(10, 64), rule_of(grid, activation))
    x = random(2, 5, 64, seed=3).requires_grad_()
    _, plain = gradients_of(layer, x, layer)
    with torch.autocast("cpu", torch.bfloat16):
        y, found = gradients_of(layer, x, layer)
    assert y.dtype == torch.bfloat16
    for rough, exact in zip(found, plain, strict=True):
        assert rough is not None and exact is not None and rough.dtype == torch.float32
        assert (rough - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", ["int4 group 32", "int4 learned", "ternary row norm"])
@pytest.mark.parametrize("frozen", ["x", "bias", "weight", "learned", "all but x"])
def test_what_is_frozen_gets_no_gradient_and_the_others_the_same(name: str, frozen: str) -> None:
    layer = FakeQuantizedLinear(linear(10, 64), rule_of(GRIDS[name], "int8"))
    x = random(5, 64, seed=3).requires_grad_()
    _, whole = gradients_of(layer, x, layer)
    still = {"x": [x], "bias": [layer.bias], "weight": [layer.weight], "learned": layer.quantizer.learned()}
    still["all but x"] = [*layer.parameters()]
    for tensor in still[frozen]:
        assert tensor is not None
        tensor.requires_grad_(False)
    _, found = gradients_of(layer, x, layer)
    for tensor, some, all_of_it in zip([x, *layer.parameters()], found, whole, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(some, all_of_it)
        else:
            assert some is None


def test_a_layer_of_a_frozen_model_stays_frozen() -> None:
    source = linear(4, 8).requires_grad_(False)
    for grid in (GRIDS["int4 learned"], GRIDS["ternary row norm"]):
        layer = FakeQuantizedLinear(source, rule_of(grid))
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        assert not layer(random(2, 8)).requires_grad


@grids
def test_a_step_keeps_a_byte_of_each_int8_input_and_no_rounded_weight(grid: WeightGrid) -> None:
    layer, kept = FakeQuantizedLinear(linear(10, 64), rule_of(grid, "int8")), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = random(3, 7, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer((x * 1).requires_grad_())
    own = {tensor.data_ptr() for tensor in layer.state_dict().values()}
    added = [tensor for tensor in kept if tensor.data_ptr() not in own]
    assert len(kept) > len(added) > 0
    assert [tensor.dtype for tensor in added if tensor.numel() == x.numel()] == [torch.int8]
    tokens = x.numel() // 64
    assert sum(tensor.numel() * tensor.element_size() for tensor in added) == x.numel() + 2 * 4 * tokens
