"""A model's operations in ONNX Runtime's own operators, which it runs fast."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from onnx import TensorProto
from torch import nn

from lobit.export.onnx.graph import FUSED, OnnxGraph
from lobit.export.onnx.standard import Standard
from lobit.export.onnx.weights import (
    alike,
    blocks_weight,
    float_weight,
    form_of,
    parameter,
    rounds_inputs,
    rows_of,
)
from lobit.export.target import Spec
from lobit.model import Block, Config, RMSNorm, bias_of, weight_of
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear
from lobit.rope import Rope, rotary_table
from lobit.runtime.onnx_ports import POSITIONS, TOKENS, cache_names


def slots_name(window: int | None) -> str:
    """Name of the axis of slots of a cache that is written in place, by the layer's window."""
    return "slots" if window is None else f"slots_{window}"


class Fused(Standard):
    """Uses ONNX Runtime's own operators where they can express the model; keys and values are written in place.

    Its attention takes heads whose size is a multiple of 8, and applies rotary embeddings itself where sizes are multiples of 16.
    """

    def __init__(self, graph: OnnxGraph, config: Config, spec: Spec) -> None:
        super().__init__(graph, config, spec)
        self.in_place = in_place(spec, config)
        self.inner_ropes = inner_ropes(config) if self.in_place else []
        self.last_position = self.total = ""

    def begin(self) -> str:
        """See `walk.Ops`."""
        if not self.in_place:
            return super().begin()
        graph, config = self.graph, self.config
        tokens = graph.input(TOKENS, TensorProto.INT64, [1, "tokens"])
        positions = graph.input(POSITIONS, TensorProto.INT64, [1, "tokens"])
        for layer, window in enumerate(layer.window for layer in config.layers):
            for before, after in cache_names(layer):
                shape: list[int | str] = [1, config.kv_heads, slots_name(window), config.head_dim]
                graph.input(before, TensorProto.FLOAT, shape)
                graph.output(after, TensorProto.FLOAT, shape)
        last = graph.op("Cast", self.build.last(positions), to=TensorProto.INT32)
        self.last_position = graph.op("Reshape", last, self.build.integers(1))
        self.total = graph.op("Add", graph.op("Squeeze", last), graph.constant(1, np.int32))
        every = torch.arange(self.spec.context)
        for rope in self.inner_ropes:
            frequencies, factor = rope.frequencies()
            cos, sin = rotary_table(every, frequencies, torch.tensor(factor))
            self.tables[rope] = parameter(graph, "cos", cos[:, 0]), parameter(graph, "sin", sin[:, 0])
        if len(self.inner_ropes) < len(self.ropes):
            with graph.composing():
                self.cos_sin(graph.op("Squeeze", positions, self.build.integers(0)))
        return tokens

    def rows(self, embedding: nn.Module, tokens: str) -> str:
        """See `Composed.rows`."""
        if not isinstance(embedding, IntegerEmbedding):
            return super().rows(embedding, tokens)
        form = form_of(embedding.rule.weights, embedding.integers.shape[1], rows=True, fused=True)
        if form.block is None:
            with self.graph.composing():
                return super().rows(embedding, tokens)
        weight, scale = blocks_weight(self.graph, [embedding], form, rows=True)
        sizes = {"bits": form.bits, "block_size": form.block}
        return self.graph.fused("GatherBlockQuantized", weight, tokens, scale, **sizes, gather_axis=0, quantize_axis=1)

    def norm(self, x: str, norm: RMSNorm) -> str:
        """See `walk.Ops`."""
        return self.graph.op("SimplifiedLayerNormalization", x, self._scale(norm), axis=-1, epsilon=norm.eps)

    def add_norm(self, x: str, delta: str | None, norm: RMSNorm) -> tuple[str, str]:
        """See `walk.Ops`."""
        if delta is None:
            return x, self.norm(x, norm)
        name = self.graph.name("SkipSimplifiedLayerNormalization")
        outputs = [f"{name}:norm", "", "", f"{name}:sum"]
        self.graph.nodes_of(
            "SkipSimplifiedLayerNormalization", [x, delta, self._scale(norm)], outputs, FUSED, epsilon=norm.eps
        )
        return outputs[3], outputs[0]

    def _scale(self, norm: RMSNorm) -> str:
        return self.graph.constant(np.ones(norm.size)) if norm.weight is None else parameter(self.graph, "norm", norm.weight)

    def linear(self, name: str, module: nn.Module, x: str) -> str:
        """See `walk.Ops`."""
        return self._joined(name, [module], x)

    def _joined(self, name: str, modules: Sequence[nn.Module], x: str) -> str:
        """One product for all modules, which must be `alike`; their outputs lie side by side."""
        graph, integers = self.graph, [module for module in modules if isinstance(module, IntegerLinear)]
        with graph.scope(name):
            bias = self._biases(modules)
            if not integers:
                weight = float_weight(graph, *(weight_of(module) for module in modules), recipe=self.spec.recipe)
                y = graph.fused("FusedMatMul", x, self._float32(weight), transB=1)
                return graph.op("Add", y, bias) if bias else y
            rule, inner = integers[0].rule, integers[0].integers.shape[1]
            form = form_of(rule.weights, inner, rows=False, fused=True)
            weight, scale = blocks_weight(graph, integers, form)
            sizes = {"N": sum(map(rows_of, modules)), "K": inner, "bits": form.bits, "block_size": form.block}
            level = 4 if rounds_inputs(rule) else 0
            return graph.fused("MatMulNBits", x, weight, scale, *(["", "", bias] if bias else []), **sizes, accuracy_level=level)

    def _biases(self, modules: Sequence[nn.Module]) -> str:
        """The joined biases of modules that all have one; empty where none has one."""
        biases = [bias for bias in map(bias_of, modules) if bias is not None]
        return parameter(self.graph, "bias", *biases) if biases else ""

    def _apart(self, names: Sequence[str], owner: nn.Module, x: str) -> Sequence[str]:
        """The outputs of the owner's linears of these names, which all read x; they are one product where they are `alike`."""
        modules = [getattr(owner, name) for name in names]
        if not alike(modules):
            return [self.linear(name, module, x) for name, module in zip(names, modules, strict=True)]
        sizes = self.build.integers(*map(rows_of, modules))
        return self.graph.nodes_of("Split", [self._joined("_".join(names), modules, x), sizes], len(modules), axis=-1)

    def project(self, block: Block, x: str) -> Sequence[str]:
        """See `Composed.project`."""
        return self._apart("qkv", block.attention, x)

    def gate_up(self, block: Block, x: str) -> Sequence[str]:
        """See `walk.Ops`."""
        return self._apart(("gate", "up"), block.mlp, x)

    def rotate(self, x: str, rope: Rope) -> str:
        """See `Composed.rotate`."""
        return x if rope in self.inner_ropes else super().rotate(x, rope)

    def attend(self, layer: int, block: Block, x: str) -> str:
        """See `walk.Ops`."""
        if not self.in_place:
            return super().attend(layer, block, x)
        graph, config, attention = self.graph, self.config, block.attention
        rope, window, modules = attention.rope, config.layers[layer].window, [attention.q, attention.k, attention.v]
        inside = rope in self.inner_ropes
        if config.qk_norm == "none" and (rope is None or inside) and alike(modules):
            heads = [self._joined("q_k_v", modules, x), "", ""]
        else:
            counts = (config.heads, config.kv_heads, config.kv_heads)
            parts = zip(self.heads(block, x), counts, strict=True)
            heads = [self.build.reshape(part, count * config.head_dim) for part, count in parts]
        (k_past, k_all), (v_past, v_all) = cache_names(layer)
        tables = self.tables[rope] if rope is not None and inside else ()
        options: dict[str, float] = {} if config.attention_softcap is None else {"softcap": config.attention_softcap}
        if window is not None:
            options |= {"local_window_size": window, "sliding_window_cache": int(window < self.spec.context)}
        (y, _, _) = graph.nodes_of(
            "GroupQueryAttention",
            [*heads, k_past, v_past, self.last_position, self.total, *tables],
            [graph.name("attended"), k_all, v_all],
            FUSED,
            num_heads=config.heads,
            kv_num_heads=config.kv_heads,
            scale=config.scale,
            do_rotary=int(inside),
            **options,
        )
        return y

    def activate(self, x: str) -> str:
        """See `walk.Ops`."""
        match self.config.activation:
            case "gelu_tanh":
                return self.graph.fused("FastGelu", x)
            case "silu":
                return self.graph.fused("QuickGelu", x, alpha=1.0)
        with self.graph.composing():
            return super().activate(x)


def in_place(spec: Spec, config: Config) -> bool:
    """Whether ONNX Runtime's attention is used, which writes keys and values in place."""
    return not spec.portable and config.head_dim % 8 == 0


def inner_ropes(config: Config) -> list[Rope]:
    """The rotary embeddings that ONNX Runtime's attention can apply itself."""
    found = {layer.rope for layer in config.layers if layer.rope and config.head_dim % 16 == 0 and layer.rope.dim % 16 == 0}
    return sorted(found, key=repr)
