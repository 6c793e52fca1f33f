"""The model as an ONNX graph: one call reads a chunk of tokens and gives the logits of the last."""

from __future__ import annotations

from torch import nn

from lobit.export.onnx.fused import Fused
from lobit.export.onnx.graph import Graph
from lobit.export.onnx.standard import Standard
from lobit.export.target import Spec
from lobit.model import RMSNorm, Transformer


def emit(model: Transformer, spec: Spec) -> Graph:
    """The graph of a converted model.

    Args:
        model: converted; its tensors are stored when the graph is written, and may have no memory until then.
        spec: `portable` chooses standard operators alone.
    """
    graph, config = Graph(), model.config
    ops = (Standard if spec.portable else Fused)(graph, config, spec)
    x, delta = ops.embed(model.embedding, ops.begin()), None
    count = len(config.layers)
    for layer in range(count):
        block = model.blocks[layer // config.repeats]
        with graph.scope(f"layers.{layer}.attention"):
            x, y = ops.add_norm(x, delta, block.attention_norm)
            y = ops.attend(layer, block, y)
            if layer == count - 1:
                # From here on tokens do not need each other.
                x, y = ops.last(x), ops.last(y)
            y = ops.norm(y, block.attention.sub_norm) if config.sub_norms else y
            delta = _normed(ops, block.post_attention_norm, ops.linear("o", block.attention.o, y))
        with graph.scope(f"layers.{layer}.mlp"):
            x, y = ops.add_norm(x, delta, block.mlp_norm)
            gate, up = ops.gate_up(block, y)
            y = graph.op("Mul", ops.activate(gate), up)
            y = ops.norm(y, block.mlp.sub_norm) if config.sub_norms else y
            delta = _normed(ops, block.post_mlp_norm, ops.linear("down", block.mlp.down, y))
    _, x = ops.add_norm(x, delta, model.norm)
    ops.score(model.head, x)
    return graph


def _normed(ops: Standard, norm: nn.Module, x: str) -> str:
    """Through a norm that only some families have."""
    return ops.norm(x, norm) if isinstance(norm, RMSNorm) else x
