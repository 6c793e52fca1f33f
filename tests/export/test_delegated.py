"""Integers of every width in the two grids that XNNPACK's products have: none is changed, and products are exact."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge
from torch import Tensor

from lobit import verbs
from lobit.checkpoint import load_model
from lobit.export.xnnpack import lowering
from lobit.export.xnnpack.delegated import DelegatedLinear, PackedEmbedding
from lobit.export.xnnpack.stamp import serialized
from lobit.quant_recipes.apply import convert
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear
from lobit.quant_recipes.recipe import Recipe, Rule, WeightGrid
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import open_engine
from lobit.runtime.executorch import ProgramFile, import_runtime
from lobit.runtime.parity import Passage, kl_divergence, log_softmax, read_passage
from lobit.runtime.reference import ReferenceEngine

ROUNDED_KL = 1e-3
"""Nats, mean over a walk: an input on a rounding boundary may fall to its other side."""


class Products(torch.nn.Module):
    """Integer layers side by side."""

    def __init__(self, layers: list[IntegerLinear]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(map(DelegatedLinear, layers))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def test_products_of_every_grid_are_exact_in_even_and_odd_widths() -> None:
    """Inputs lie on grids whose steps are powers of two, one for each token, and so are the scales: nothing is rounded."""
    generator, layers = torch.Generator().manual_seed(0), []
    for grid in [WeightGrid(bits, group) for bits, group in ((1, None), (2, None), (3, 64), (4, None), (4, 32), (6, None), (8, None))]:
        for width in (128,) if grid.group_size else (34, 33):
            integers = torch.randint(grid.q_min, grid.q_max + 1, (9, width), dtype=torch.int8, generator=generator)
            scale = 2.0 ** torch.randint(-6, 0, (9, width // (grid.group_size or width)), generator=generator)
            layers.append(IntegerLinear(integers, scale, None, Rule(("*",), grid, 8)))
    inputs = [torch.randint(-28, 228, (1, 17, layer.integers.shape[1]), generator=generator).float() for layer in layers]
    for x in inputs:
        x[..., 0], x[..., 1] = -28, 227
        x *= 2.0 ** torch.randint(-3, 4, (17, 1), generator=generator)
    dim = torch.export.Dim("length", min=1, max=17)
    graph = torch.export.export(Products(layers), tuple(inputs), dynamic_shapes=(tuple({1: dim} for _ in inputs),))
    preserved = EdgeCompileConfig(preserve_ops=[torch.ops.aten.linear.default])
    data = to_edge(graph, compile_config=preserved).to_backend(lowering._partitioner()).to_executorch().buffer
    program = import_runtime()._load_for_executorch_from_buffer(data)
    for length in (1, 17):
        found = program.forward(tuple(x[:, :length].contiguous() for x in inputs))
        for layer, x, y in zip(layers, inputs, found, strict=True):
            assert torch.equal(y, x[:, :length] @ layer.weight.T), (str(layer.rule.weights), layer.integers.shape, length)


class Rows(torch.nn.Module):
    """An embedding with its table inside."""

    def __init__(self, table: PackedEmbedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table.look_up(tokens, self.table.packed, self.table.scale)


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_of_an_earlier_quantization_stay_as_they_are(bits: Any) -> None:
    """No 8 significant bits hold them, nor 11."""
    scale, generator = torch.full((6, 1), 1 / 3), torch.Generator().manual_seed(0)
    integers = torch.randint(-8, 8, (6, 64), dtype=torch.int8, generator=generator)
    rule = Rule(("*",), WeightGrid(bits, None, "exact"), 8)
    linear = DelegatedLinear(IntegerLinear(integers, scale, None, rule))
    assert torch.equal(serialized(linear, "scale", linear.scale), scale[:, 0])
    table, tokens = IntegerEmbedding(integers, scale, rule), torch.tensor([[3, 1, 4]])
    graph = torch.export.export(Rows(PackedEmbedding(table)), (tokens,))
    data = to_edge(graph).to_executorch().buffer
    (found,) = import_runtime()._load_for_executorch_from_buffer(data).forward((tokens,))
    assert torch.equal(found, table(tokens))


def datatypes(path: Path) -> Counter[str]:
    """XNNPACK's types of the weights of products, and how many have each; without the means in norms, which have one row."""
    found: Counter[str] = Counter()
    for graph in ProgramFile(path).graphs:
        tensors = [value["xvalue_union"].get("tensor_value", value["xvalue_union"]) for value in graph["xvalues"]]
        by_id = {tensor["id_out"]: tensor for tensor in tensors}
        nodes = [node["xnode_union"] for node in graph["xnodes"] if node["xnode_union_type"] == "XNNFullyConnected"]
        found.update(by_id[node["filter_id"]]["datatype"] for node in nodes if by_id[node["filter_id"]]["dims"][0] > 1)
    return found


def test_ternary_products_take_four_bits_a_weight_in_the_file(bundles: Any) -> None:
    path = open_bundle(bundles("mobilellm_p1", "bitnet")).path("program")
    assert datatypes(path) == {"xnn_datatype_qcint4": 7 * 3, "xnn_datatype_fp32": 1}, "seven a layer and the head"
    file = ProgramFile(path)
    sizes = Counter(len(file.data(key)) for key in file.named.pte_data)
    shapes = [(4 * 32, 64), (2 * 32, 64), (2 * 32, 64), (64, 4 * 32), (128, 64), (128, 64), (64, 128)]
    assert sizes >= Counter(3 * [out * inner // 2 for out, inner in shapes])


MIXED = Recipe(
    "mixed",
    "",
    (
        Rule(("embedding", "head"), WeightGrid(4, None), 8),
        Rule(("layers.0.attention.*",), WeightGrid(1, None, "absmean", shards=2), 8),
        Rule(("layers.0.mlp.*",), WeightGrid(3, 64), 8),
        Rule(("layers.1.attention.*",), WeightGrid(6, None), 8),
        Rule(("layers.1.mlp.*",), WeightGrid(2, None, "row_norm"), 8),
    ),
    kv_bits=8,
)
"""Every grid that is held in a wider one; a tied table of INT4 per row."""


def test_every_narrower_grid_ships_its_own_integers(models: Any, tmp_path: Path) -> None:
    folder, context = models("qwen3"), 40
    verbs.export(str(folder), "xnnpack", tmp_path / "bundle", recipe=MIXED, context=context, chunk=16)
    bundle = open_bundle(tmp_path / "bundle")
    assert datatypes(bundle.path("program")) == {"xnn_datatype_qcint4": 4 + 3 + 1, "xnn_datatype_qbint4": 3, "xnn_datatype_qcint8": 4}
    result = verbs.verify(bundle.folder, str(folder))
    assert [result[f"differing_{kind}"] for kind in ("integers", "scales", "floats")] == [0, 0, 0]
    assert result["passed"]
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, 96, context)]
    reference = ReferenceEngine(convert(load_model(folder), MIXED), MIXED, context)
    expected, found = (read_passage(engine, Passage(tokens, [1, 5, 20]), lambda _: None) for engine in (reference, open_engine(bundle, 1)))
    assert kl_divergence(log_softmax(expected), log_softmax(found)).mean() < ROUNDED_KL
