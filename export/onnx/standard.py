"""A model's operations in standard ONNX operators."""

from __future__ import annotations

from onnx import TensorProto
from torch import nn

from lobit.export.composed import Composed
from lobit.export.onnx.builder import OnnxBuilder
from lobit.export.onnx.graph import OnnxGraph
from lobit.export.onnx.weights import float_weight, form_of, int4_weight, int8_weight, parameter
from lobit.export.target import Spec
from lobit.model import Config, RMSNorm, bias_of, weight_of
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear
from lobit.runtime.onnx_ports import LOGITS, TOKENS, cache_names


class Standard(Composed[str]):
    """Uses standard ONNX operators alone; keys and values are inputs of the graph, and are outputs with those of the call added.

    Args:
        graph: the graph that nodes are added to.
        config: the model.
        spec: what the program is made for.
    """

    build: OnnxBuilder

    def __init__(self, graph: OnnxGraph, config: Config, spec: Spec) -> None:
        super().__init__(OnnxBuilder(graph), config, spec.all_logits)
        self.graph, self.spec = graph, spec

    def begin(self) -> str:
        """See `walk.Ops`."""
        graph, config = self.graph, self.config
        tokens = graph.input(TOKENS, TensorProto.INT64, [1, "tokens"])
        for layer in range(len(config.layers)):
            for before, after in cache_names(layer):
                graph.input(before, TensorProto.FLOAT, [1, config.kv_heads, "past", config.head_dim])
                graph.output(after, TensorProto.FLOAT, [1, config.kv_heads, "total", config.head_dim])
        with graph.composing():
            past = graph.op("Squeeze", graph.op("Shape", cache_names(0)[0][0], start=2, end=3))
            total = graph.op("Add", past, graph.op("Squeeze", graph.op("Shape", tokens, start=1, end=2)))
            positions = graph.op("Range", past, total, self.build.integer(1))
            keys = graph.op("Range", self.build.integer(0), total, self.build.integer(1))
            self.cos_sin(positions)
            self.mask(positions, keys)
        return tokens

    def rows(self, embedding: nn.Module, tokens: str) -> str:
        """See `Composed.rows`. Integers are stored as INT8: standard operators look rows up in no others."""
        graph = self.graph
        if not isinstance(embedding, IntegerEmbedding):
            table = float_weight(graph, weight_of(embedding), recipe=self.spec.recipe)
            return self._float32(graph.op("Gather", table, tokens))
        integers = graph.op("Gather", int8_weight(graph, embedding.integers), tokens)
        scale = graph.op("Gather", parameter(graph, "scale", embedding.scale), tokens)
        width, groups = embedding.integers.shape[1], embedding.scale.shape[1]
        grouped = self.build.reshape(self.build.to_float(integers), groups, width // groups)
        return self.build.reshape(self.build.multiply(grouped, self.build.unsqueeze(scale, 3)), width)

    def _float32(self, values: str) -> str:
        return self.build.to_float(values) if self.spec.recipe.float_bits == 16 else values

    def norm_weight(self, norm: RMSNorm) -> str:
        """See `Composed.norm_weight`."""
        assert norm.weight is not None
        return parameter(self.graph, "norm", norm.weight)

    def linear(self, name: str, module: nn.Module, x: str) -> str:
        """See `walk.Ops`."""
        bias = bias_of(module)
        with self.scope(name):
            y = self._integer_product(module, x) if isinstance(module, IntegerLinear) else self._float_product(module, x)
            return y if bias is None else self.build.add(y, parameter(self.graph, "bias", bias))

    def _float_product(self, module: nn.Module, x: str) -> str:
        """A product with a float weight, which is stored as [in, out]."""
        weight = float_weight(self.graph, weight_of(module), recipe=self.spec.recipe, transposed=True)
        return self.build.matmul(x, self._float32(weight))

    def _integer_product(self, module: IntegerLinear, x: str) -> str:
        """A float32 product of integers [in, out] times their scales, and of inputs that are rounded where the recipe says so."""
        graph, grid = self.graph, module.rule.weights
        x = self.round_tokens(x, module.rule) if module.rule.activation_bits else x
        form = form_of(grid, module.integers.shape[1], rows=False, fused=False)
        store = int8_weight if form.bits == 8 else int4_weight
        if grid.group_size:
            scale, blocks = parameter(graph, "scale", module.scale, transposed=True), {"axis": 0, "block_size": grid.group_size}
        else:
            scale, blocks = parameter(graph, "scale", module.scale, flat=True), {"axis": 1}
        weight = graph.op("DequantizeLinear", store(graph, module.integers, transposed=True), scale, **blocks)
        return self.build.matmul(x, weight)

    def extend(self, layer: int, k: str, v: str) -> tuple[str, str]:
        """See `Composed.extend`."""
        (k_past, k_all), (v_past, v_all) = cache_names(layer)
        self.graph.nodes_of("Concat", [k_past, k], [k_all], axis=2)
        self.graph.nodes_of("Concat", [v_past, v], [v_all], axis=2)
        return k_all, v_all

    def score(self, head: nn.Module, x: str) -> None:
        """See `walk.Ops`."""
        self.graph.name_output(self.logits(head, x), LOGITS, [1, "tokens" if self.all_logits else 1, self.config.vocab_size])
