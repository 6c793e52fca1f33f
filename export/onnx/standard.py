"""A model's operations in standard ONNX operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from onnx import TensorProto
from torch import nn

from lobit.export.onnx.graph import Graph
from lobit.export.onnx.weights import float_weight, form_of, int4_weight, int8_weight, parameter
from lobit.export.target import Spec
from lobit.model import Block, Config, RMSNorm, bias_of, weight_of
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear
from lobit.quant_recipes.recipe import Rule
from lobit.rope import Rope
from lobit.runtime.onnx_ports import LOGITS, TOKENS, cache_names

MASKED = -1e9
"""Added to the score of a key that a query must not see."""
EVERYTHING = np.iinfo(np.int64).max
"""The end of a slice that has none."""
EPS = float(torch.finfo(torch.float32).eps)


class Standard:
    """Nodes of standard ONNX operators alone; keys and values are handed in, and handed out longer.

    Args:
        graph: to add to.
        config: the model.
        spec: what the program is made for.
    """

    def __init__(self, graph: Graph, config: Config, spec: Spec) -> None:
        self.graph, self.config, self.spec = graph, config, spec
        self.ropes = sorted({layer.rope for layer in config.layers if layer.rope}, key=repr)
        self.tables: dict[Rope, tuple[str, str]] = {}
        """Cosine and sine [T, 1, dim / 2]."""
        self.rounded: dict[tuple[str, str], str] = {}
        """Inputs rounded to their tokens' grids: of q, k and v there is one."""
        self.masks: dict[int | None, str] = {}
        """For each window: 0 where a query sees a key, `MASKED` where not, [T, S]."""

    def integers(self, *values: int) -> str:
        """A constant int64 [n]."""
        return self.graph.constant(values, np.int64)

    def number(self, value: int) -> str:
        """A constant int64 without axes."""
        return self.graph.constant(value, np.int64)

    def begin(self) -> str:
        """Declares the inputs, and all that follows from positions; the tokens int64 [1, T]."""
        graph, config = self.graph, self.config
        tokens = graph.input(TOKENS, TensorProto.INT64, [1, "tokens"])
        for layer in range(len(config.layers)):
            for before, after in cache_names(layer):
                graph.input(before, TensorProto.FLOAT, [1, config.kv_heads, "past", config.head_dim])
                graph.output(after, TensorProto.FLOAT, [1, config.kv_heads, "total", config.head_dim])
        with graph.composing():
            self._place(tokens)
        return tokens

    def _place(self, tokens: str) -> None:
        """All that follows from the positions of the call's tokens: rotary tables and masks."""
        graph, config = self.graph, self.config
        past = graph.op("Squeeze", graph.op("Shape", cache_names(0)[0][0], start=2, end=3))
        total = graph.op("Add", past, graph.op("Squeeze", graph.op("Shape", tokens, start=1, end=2)))
        positions = graph.op("Range", past, total, self.number(1))
        keys = graph.op("Range", self.number(0), total, self.number(1))
        self._cos_sin(positions)
        distance = graph.op("Sub", graph.op("Unsqueeze", positions, self.integers(1)), keys)
        for window in sorted({layer.window for layer in config.layers}, key=str):
            hidden = graph.op("Less", distance, self.number(0))
            if window is not None:
                hidden = graph.op("Or", hidden, graph.op("GreaterOrEqual", distance, self.number(window)))
            self.masks[window] = graph.op("Where", hidden, graph.constant(MASKED), graph.constant(0.0))

    def _cos_sin(self, positions: str) -> None:
        """Cosines and sines of the call's positions [T]."""
        graph = self.graph
        at = graph.op("Unsqueeze", graph.op("Cast", positions, to=TensorProto.FLOAT), self.integers(1, 2))
        for rope in self.ropes:
            frequencies, factor = rope.frequencies()
            angles = graph.op("Mul", at, graph.constant(frequencies.numpy()))
            cos, sin = (graph.op("Mul", graph.op(kind, angles), graph.constant(factor)) for kind in ("Cos", "Sin"))
            self.tables[rope] = cos, sin

    def embed(self, embedding: nn.Module, tokens: str) -> str:
        """The stream [1, T, D] of tokens [1, T]."""
        with self.graph.scope("embedding"):
            rows = self._rows(embedding, tokens)
        scale = self.config.embedding_scale
        return rows if scale == 1.0 else self.graph.op("Mul", rows, self.graph.constant(scale))

    def _rows(self, embedding: nn.Module, tokens: str) -> str:
        """Rows [1, T, D] of a table. Integers are kept as INT8: standard operators find rows in no other."""
        graph = self.graph
        if not isinstance(embedding, IntegerEmbedding):
            table = float_weight(graph, weight_of(embedding), recipe=self.spec.recipe)
            return self._float32(graph.op("Gather", table, tokens))
        integers = graph.op("Gather", int8_weight(graph, embedding.integers), tokens)
        scale = graph.op("Gather", parameter(graph, "scale", embedding.scale), tokens)
        width, groups = embedding.integers.shape[1], embedding.scale.shape[1]
        grouped = graph.op("Reshape", graph.op("Cast", integers, to=TensorProto.FLOAT), self.integers(1, -1, groups, width // groups))
        return self.reshape(graph.op("Mul", grouped, graph.op("Unsqueeze", scale, self.integers(3))), width)

    def _float32(self, values: str) -> str:
        return self.graph.op("Cast", values, to=TensorProto.FLOAT) if self.spec.recipe.float_bits == 16 else values

    def reshape(self, x: str, *sizes: int) -> str:
        """x [1, T, …] with other sizes behind the tokens."""
        return self.graph.op("Reshape", x, self.integers(1, -1, *sizes))

    def norm(self, x: str, norm: RMSNorm) -> str:
        """RMSNorm over the last axis."""
        graph = self.graph
        mean = graph.op("ReduceMean", graph.op("Mul", x, x), self.integers(-1), keepdims=1)
        y = graph.op("Div", x, graph.op("Sqrt", graph.op("Add", mean, graph.constant(norm.eps))))
        return y if norm.weight is None else graph.op("Mul", y, parameter(graph, "norm", norm.weight))

    def add_norm(self, x: str, delta: str | None, norm: RMSNorm) -> tuple[str, str]:
        """The stream after `delta` was added to it, and its norm."""
        x = x if delta is None else self.graph.op("Add", x, delta)
        return x, self.norm(x, norm)

    def last(self, x: str) -> str:
        """What of x [1, T, n] has logits: the last token, or all."""
        return x if self.spec.all_logits else self._last(x)

    def _last(self, x: str) -> str:
        """x [1, 1, …] of the last token alone."""
        return self.graph.op("Slice", x, self.integers(-1), self.integers(EVERYTHING), self.integers(1))

    def linear(self, name: str, module: nn.Module, x: str) -> str:
        """A product with a weight [out, in], and its bias."""
        graph, bias = self.graph, bias_of(module)
        with graph.scope(name):
            y = self._integer_product(module, x) if isinstance(module, IntegerLinear) else self._float_product(module, x)
            return y if bias is None else graph.op("Add", y, parameter(graph, "bias", bias))

    def _float_product(self, module: nn.Module, x: str) -> str:
        """With the weight as [in, out]."""
        weight = float_weight(self.graph, weight_of(module), recipe=self.spec.recipe, transposed=True)
        return self.graph.op("MatMul", x, self._float32(weight))

    def _integer_product(self, module: IntegerLinear, x: str) -> str:
        """In float32, of weights [in, out] that were rounded, and of inputs that are, where the recipe says so."""
        graph, grid = self.graph, module.rule.weights
        if module.rule.activation_bits:
            key = x, module.rule.activation_rule
            if key not in self.rounded:
                self.rounded[key] = self._round_tokens(x, module.rule)
            x = self.rounded[key]
        form = form_of(grid, module.integers.shape[1], rows=False, fused=False)
        store = int8_weight if form.bits == 8 else int4_weight
        if grid.group_size:
            scale, blocks = parameter(graph, "scale", module.scale, transposed=True), {"axis": 0, "block_size": grid.group_size}
        else:
            scale, blocks = parameter(graph, "scale", module.scale, flat=True), {"axis": 1}
        weight = graph.op("DequantizeLinear", store(graph, module.integers, transposed=True), scale, **blocks)
        return graph.op("MatMul", x, weight)

    def _round_tokens(self, x: str, rule: Rule) -> str:
        """x [1, T, n] rounded to each token's INT8 grid (`quant_recipes.grid.quantize_tokens`)."""
        graph, number = self.graph, self.graph.constant
        axis, zero = self.integers(-1), number(0.0)
        if rule.activation_rule == "absmax":
            span = graph.op("Div", graph.op("ReduceMax", graph.op("Abs", x), axis, keepdims=1), number(127))
            scale, zero_point = graph.op("Max", span, number(EPS)), zero
        else:
            low = graph.op("Min", graph.op("ReduceMin", x, axis, keepdims=1), zero)
            high = graph.op("Max", graph.op("ReduceMax", x, axis, keepdims=1), zero)
            scale = graph.op("Max", graph.op("Div", graph.op("Sub", high, low), number(255)), number(EPS))
            low, high = graph.op("Div", low, scale), graph.op("Div", high, scale)
            above = graph.op("Greater", graph.op("Add", graph.op("Add", low, number(-128)), graph.op("Add", high, number(127))), zero)
            chosen = graph.op("Where", above, graph.op("Sub", number(-128), low), graph.op("Sub", number(127), high))
            zero_point = graph.op("Round", graph.op("Clip", chosen, number(-128), number(127)))
        steps = graph.op("Add", graph.op("Mul", x, graph.op("Reciprocal", scale)), zero_point)
        integers = graph.op("Clip", graph.op("Round", steps), number(-128), number(127))
        return graph.op("Mul", graph.op("Sub", integers, zero_point), scale)

    def attend(self, layer: int, block: Block, x: str) -> str:
        """What of the normed stream [1, T, D] attention gives: [1, T, H · E]."""
        heads = self._heads(block, x)
        with self.graph.composing():
            return self._attention(layer, *heads)

    def _attention(self, layer: int, *heads: str) -> str:
        """Of q [1, T, H, E], k and v [1, T, K, E]."""
        graph, config = self.graph, self.config
        q, k, v = (graph.op("Transpose", part, perm=[0, 2, 1, 3]) for part in heads)
        (k_past, k_all), (v_past, v_all) = cache_names(layer)
        graph.nodes_of("Concat", [k_past, k], [k_all], axis=2)
        graph.nodes_of("Concat", [v_past, v], [v_all], axis=2)
        k, v = self._repeated(k_all), self._repeated(v_all)
        q = graph.op("Mul", q, graph.constant(config.scale))
        scores = self._softcap(graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2])), config.attention_softcap)
        probabilities = graph.op("Softmax", graph.op("Add", scores, self.masks[config.layers[layer].window]), axis=-1)
        y = graph.op("Transpose", graph.op("MatMul", probabilities, v), perm=[0, 2, 1, 3])
        return self.reshape(y, config.heads * config.head_dim)

    def _heads(self, block: Block, x: str) -> tuple[str, str, str]:
        """q [1, T, H, E], k and v [1, T, K, E] as they are attended to."""
        attention = block.attention
        counts = (self.config.heads, self.config.kv_heads, self.config.kv_heads)
        parts = zip(self.project(block, x), counts, strict=True)
        q, k, v = (self.reshape(part, count, self.config.head_dim) for part, count in parts)
        if self.config.qk_norm != "none":
            q, k = self.norm(q, attention.q_norm), self.norm(k, attention.k_norm)
        if attention.rope:
            q, k = self._rotated(q, attention.rope), self._rotated(k, attention.rope)
        return q, k, v

    def project(self, block: Block, x: str) -> Sequence[str]:
        """q [1, T, H · E], k and v [1, T, K · E]."""
        return [self.linear(name, getattr(block.attention, name), x) for name in "qkv"]

    def _rotated(self, x: str, rope: Rope) -> str:
        """Rotary embedding of x [1, T, heads, E]."""
        with self.graph.composing():
            return self._rotate_halves(x, rope)

    def _rotate_halves(self, x: str, rope: Rope) -> str:
        graph, (cos, sin) = self.graph, self.tables[rope]
        sizes = [size for size in (rope.dim // 2, rope.dim // 2, self.config.head_dim - rope.dim) if size]
        a, b, *rest = graph.nodes_of("Split", [x, self.integers(*sizes)], len(sizes), axis=-1)
        real = graph.op("Sub", graph.op("Mul", a, cos), graph.op("Mul", b, sin))
        imaginary = graph.op("Add", graph.op("Mul", b, cos), graph.op("Mul", a, sin))
        return graph.op("Concat", real, imaginary, *rest, axis=-1)

    def _repeated(self, x: str) -> str:
        """Keys or values [1, K, S, E] for each query head."""
        groups = self.config.heads // self.config.kv_heads
        owners = [head // groups for head in range(self.config.heads)]
        return x if groups == 1 else self.graph.op("Gather", x, self.integers(*owners), axis=1)

    def _softcap(self, scores: str, cap: float | None) -> str:
        if cap is None:
            return scores
        graph, bound = self.graph, self.graph.constant(cap)
        return graph.op("Mul", graph.op("Tanh", graph.op("Div", scores, bound)), bound)

    def gate_up(self, block: Block, x: str) -> Sequence[str]:
        """Gate and up, each [1, T, F]."""
        return [self.linear(name, getattr(block.mlp, name), x) for name in ("gate", "up")]

    def activate(self, x: str) -> str:
        """The gate's nonlinearity."""
        graph = self.graph
        match self.config.activation:
            case "gelu_tanh":
                cubed = graph.op("Mul", graph.op("Mul", graph.op("Mul", x, x), x), graph.constant(0.044715))
                inner = graph.op("Mul", graph.op("Add", x, cubed), graph.constant(math.sqrt(2 / math.pi)))
                shifted = graph.op("Add", graph.op("Tanh", inner), graph.constant(1.0))
                return graph.op("Mul", graph.op("Mul", x, graph.constant(0.5)), shifted)
            case "relu2":
                positive = graph.op("Relu", x)
                return graph.op("Mul", positive, positive)
        return graph.op("Mul", x, graph.op("Sigmoid", x))

    def score(self, head: nn.Module, x: str) -> None:
        """Gives out the logits of the normed stream."""
        logits = self.linear("head", head, x)
        with self.graph.composing():
            logits = self._softcap(logits, self.config.logits_softcap)
        self.graph.name_output(logits, LOGITS, [1, "tokens" if self.spec.all_logits else 1, self.config.vocab_size])
