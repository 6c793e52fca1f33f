"""Builds a model's ONNX graph: one call reads a chunk of tokens and gives the logits of the last one, or of all."""

from __future__ import annotations

from lobit.export.onnx.fused import Fused
from lobit.export.onnx.graph import OnnxGraph
from lobit.export.onnx.standard import Standard
from lobit.export.target import Spec
from lobit.export.walk import walk
from lobit.model import Transformer


def emit(model: Transformer, spec: Spec) -> OnnxGraph:
    """The graph of a converted model.

    Args:
        model: the converted model. Its tensors are stored when the graph is written, and may have no memory until then.
        spec: what the graph is made for; `portable` chooses standard operators alone.
    """
    graph = OnnxGraph()
    walk(model, (Standard if spec.portable else Fused)(graph, model.config, spec))
    return graph
