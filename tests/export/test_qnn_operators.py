"""Operators of target qnn, each alone on the emulator of the HTP."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lobit.errors import TargetError
from lobit.export.qnn.builder import QnnBuilder
from lobit.export.qnn.compiling import compile_variants
from lobit.export.qnn.eager import Constants, run_graph
from lobit.export.qnn.eager_program import DROPPED, NARROW_DROPPED, NARROW_STEPS, OTHER_STEPS, SHARES, STEPS, WIDE_OFF
from lobit.export.qnn.encodings import Ranges, encodings_of
from lobit.export.qnn.graph import Graph, Weights
from lobit.export.qnn.methods import SOCS, WITHOUT_HALF
from lobit.export.qnn.proof import run_alone
from lobit.export.qnn.target import OPERATOR_ERROR
from lobit.export.qnn.weights import WIDE, HtpLinear
from lobit.quant_recipes.integer import IntegerLinear, quantize_linear
from lobit.quant_recipes.recipe import Rule, WeightGrid
from lobit.stage_cache import StageCache

pytestmark = [pytest.mark.usefixtures("qnn_libraries", "one_thread"), pytest.mark.slow]
RELATIVE = 3e-3
"""Of an operator's largest result: half floats keep 5e-4, and sums inside an operator may be half floats too."""


def integer_linear(out: int, inner: int, bits: Any, bias: bool) -> HtpLinear:
    grid = WeightGrid(bits, None, "absmean" if bits <= 2 else "least_squares")
    weight = torch.randn(out, inner, generator=torch.Generator().manual_seed(bits))
    return HtpLinear(IntegerLinear(*quantize_linear(weight, grid), torch.randn(out) if bias else None, Rule(("*",), grid)))


PRODUCTS = [(bits, inner, bias) for bits in (1, 2, 3, 4, 6, 8) for inner, bias in ((64, False), (172, True))]
"""172 inputs are no multiple of 8 or 16: without zeros behind them the HTP would compute something else."""


def every_operator(build: Any, x: Any, wide: Any, norm: Tensor, layers: list[nn.Module]) -> None:
    """Calls each operation of the builder once, on x [1, 4, 64] and wide [1, 4, 172]."""
    heads = build.reshape(x, 4, 16)
    for name, value in {
        "add": build.add(x, x),
        "number": build.multiply(x, build.number(0.37)),
        "subtract": build.subtract(x, build.sigmoid(x)),
        "divide": build.divide(x, build.number(3.0)),
        "tanh": build.tanh(x),
        "relu": build.relu(x),
        "softmax": build.softmax(x),
        "matmul": build.matmul(build.transpose(heads, [0, 2, 1, 3]), build.transpose(heads, [0, 2, 3, 1])),
        "rms_norm": build.rms_norm(x, norm, 1e-5),
        "rms_norm_of_heads": build.rms_norm(heads, norm[:16], 1e-5),
        "split": build.join(*reversed(build.split(x, [10, 22, 32]))),
        "append": build.append(1, x, x),
        **{f"product_{index}": build.product(layer, wide if index % 2 else x) for index, layer in enumerate(layers[:-1])},
        "float_product": build.product(layers[-1], x),
    }.items():
        build.output(value, name)


def test_every_operator_computes_on_the_emulator_what_pytorch_does(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, wide = (torch.randn(1, 4, size, generator=generator).half().float() for size in (64, 172))
    layers: list[nn.Module] = [integer_linear(24, inner, bits, bias) for bits, inner, bias in PRODUCTS]
    layers.append(nn.Linear(64, 24).requires_grad_(False))
    norm = torch.rand(64, generator=generator)
    graph = Graph(Weights())
    build = QnnBuilder(graph)
    every_operator(build, build.input("x", 1, 4, 64), build.input("wide", 1, 4, 172), norm, layers)
    found = run_alone(graph, {"x": x, "wide": wide}, SOCS[0], tmp_path)
    exact = run_graph(graph, {"x": x, "wide": wide}, Constants(graph.weights))
    assert found.keys() == exact.keys()
    errors = {name: float((found[name].float() - expected).abs().max() / expected.abs().max()) for name, expected in exact.items()}
    assert {name: f"{error:.1e}" for name, error in errors.items() if not error < RELATIVE} == {}


def test_operators_are_as_exact_as_the_limit_of_parity_reckons_with(tmp_path: Path) -> None:
    """Relative root mean square errors of the operators of attention and feed-forward, on inputs of several sizes."""
    generator, graph, exact, inputs = torch.Generator().manual_seed(0), Graph(Weights()), {}, {}
    build = QnnBuilder(graph)
    for size in (3.0, 1.0, 0.3):
        x = (size * torch.randn(1, 4, 24, 88, generator=generator)).half()
        port, values = f"x{size:g}", x.double()
        inputs[port] = x.float()
        given = build.input(port, 1, 4, 24, 88)
        for name, value, expected in [
            ("softmax", build.softmax(given), values.softmax(-1)),
            ("silu", build.multiply(given, build.sigmoid(given)), values * values.sigmoid()),
            ("tanh", build.tanh(given), values.tanh()),
            ("square", build.multiply(build.relu(given), build.relu(given)), values.relu() ** 2),
            ("norm", build.rms_norm(given, torch.ones(88), 1e-5), torch.nn.functional.rms_norm(values, (88,), eps=1e-5)),
            ("matmul", build.matmul(given, build.transpose(given, [0, 1, 3, 2])), values @ values.transpose(2, 3)),
        ]:
            build.output(value, f"{name}.{size:g}")
            exact[f"{name}.{size:g}"] = expected
    found = run_alone(graph, inputs, SOCS[0], tmp_path)
    errors = {name: float((found[name].float() - expected).norm() / expected.norm()) for name, expected in exact.items()}
    assert OPERATOR_ERROR / 3 < max(errors.values()) < OPERATOR_ERROR, errors


def of_integers(make: Callable[[Graph], None], inputs: dict[str, Tensor], soc: str, folder: Path) -> Computed:
    """What a graph of integers gives on the emulator; `make` adds its operators to a graph."""
    floats, ranges = Graph(Weights()), Ranges()
    make(floats)
    run_graph(floats, inputs, Constants(floats.weights), ranges)
    encodings = encodings_of([floats], ranges.found)
    graph = Graph(Weights(), encodings)
    make(graph)
    kinds = {operator.outputs[0]: operator.kind for operator in graph.operators}

    def each(name: str, x: Tensor) -> Tensor:
        return encodings[name].rounded(x) if kinds.get(name) == "Quantize" else x

    found = run_alone(graph, inputs, soc, folder)
    return Computed(graph, found, run_graph(graph, inputs, Constants(graph.weights), each))


@dataclass(frozen=True)
class Computed:
    """Outputs of a graph of integers, and what they are without rounding."""

    graph: Graph
    found: dict[str, Tensor]
    exact: dict[str, Tensor]

    def error(self, name: str) -> Tensor:
        return (self.found[name] - self.exact[name]).double()

    def step(self, name: str) -> float:
        (operator,) = [each for each in self.graph.operators if each.outputs[0] == self.graph.outputs[name]]
        assert self.graph.encodings is not None
        return self.graph.encodings[operator.inputs[0]].scale


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize(("soc", "lost"), [(SOCS[0], DROPPED), (WITHOUT_HALF[0], NARROW_DROPPED)])
def test_products_of_integers_lose_what_the_limit_of_parity_reckons_with(soc: str, lost: float, tmp_path: Path) -> None:
    """In units of input's scale times weight's scale, whatever the length of the sum and the bits of the weights."""
    generator = torch.Generator().manual_seed(0)
    narrow = soc in WITHOUT_HALF
    inputs = {f"x{size}": torch.randn(1, 8, size, generator=generator) for size in (64, 1024)}
    bits = (4, 8) if narrow else (2, 4, 8, 16)
    layers = {f"{each}.{name}": layer_of(each, x.shape[-1]) for name, x in inputs.items() for each in bits}

    def make(graph: Graph) -> None:
        build = QnnBuilder(graph)
        given = {name: build.input(name, *x.shape) for name, x in inputs.items()}
        for name, layer in layers.items():
            with graph.scope(name):
                build.output(build.product(layer, given[name.partition(".")[2]]), name)

    computed = of_integers(make, inputs, soc, tmp_path)
    for name, layer in layers.items():
        encodings = computed.graph.encodings
        assert encodings is not None
        unit = layer.scale * encodings[f"{name.partition('.')[2]}.Quantize@0"].scale
        units, steps = computed.error(name) / unit, rms(computed.error(name)) / computed.step(name)
        if layer.bits == WIDE:
            assert WIDE_OFF / 2 < rms(units) < 1.5 * WIDE_OFF, name
        elif narrow and layer.bits == 8:
            assert NARROW_STEPS / 2 < steps < 1.5 * NARROW_STEPS, name
        else:
            assert 0.5 * lost < -float(units.mean()) < 1.5 * lost, (name, float(units.mean()))


def layer_of(bits: int, inner: int) -> HtpLinear:
    return HtpLinear(nn.Linear(inner, 64, bias=False)) if bits == WIDE else integer_linear(64, inner, bits, False)


def test_operators_of_integers_are_as_exact_as_the_limit_of_parity_reckons_with(tmp_path: Path) -> None:
    x = 2 * torch.randn(1, 4, 24, 88, generator=torch.Generator().manual_seed(0))

    def make(graph: Graph) -> None:
        build = QnnBuilder(graph)
        given, one = build.input("x", 1, 4, 24, 88), build.input("one", 1, 4, 1, 88)
        for name, value in {
            "Softmax": build.softmax(given),
            "MatMul": build.matmul(one, build.transpose(given, [0, 1, 3, 2])),
            "Tanh": build.tanh(given),
            "Sigmoid": build.sigmoid(given),
            "Add": build.add(given, one),
            "Multiply": build.multiply(given, given),
            "RmsNorm": build.rms_norm(given, torch.rand(88, generator=torch.Generator().manual_seed(0)), 1e-5),
        }.items():
            build.output(value, name)

    computed = of_integers(make, {"x": x, "one": x[:, :, :1].contiguous()}, SOCS[0], tmp_path)
    large = computed.exact["Softmax"] > 0.05
    shares = {
        "Softmax": rms((computed.error("Softmax") / computed.exact["Softmax"])[large]),
        "MatMul": rms(computed.error("MatMul")) / rms(computed.exact["MatMul"]),
    }
    assert all(share < 1.1 * SHARES[name] for name, share in shares.items()) and shares["Softmax"] > SHARES["Softmax"] / 4, shares
    steps = {name: rms(computed.error(name)) / computed.step(name) for name in computed.exact if name not in SHARES}
    rounding = 1 / math.sqrt(12)
    assert all(error < math.hypot(STEPS.get(name, OTHER_STEPS), rounding) * 1.1 for name, error in steps.items()), steps


def test_an_operator_that_is_not_known_is_one_message(tmp_path: Path) -> None:
    graph = Graph(Weights())
    x = graph.input("x", 1, 4, 8)
    graph.output(graph.op("Frobnicate", [x], (1, 4, 8))[0], "y")
    with pytest.raises(TargetError, match="Qualcomm's compiler does not take this model"):
        compile_variants({"decode": graph}, SOCS[0], StageCache(tmp_path / "kept"))
