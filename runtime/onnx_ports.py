"""What a graph's ports are called, and its files: by the graph that export writes, and by what runs it. Standard library only."""

from __future__ import annotations

GRAPH_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
TOKENS, POSITIONS, LOGITS = "input_ids", "position_ids", "logits"
"""As onnxruntime-genai calls them."""
PAST, PRESENT = "past_key_values.", "present."
"""What the names of caches begin with, before and after a call."""
FLOAT_INPUTS = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Setting of a session: inputs of a weight's DequantizeLinear and MatMul, which ONNX Runtime joins to one product, stay floats."""


def cache_names(layer: int) -> list[tuple[str, str]]:
    """Names of a layer's keys and of its values, before and after a call."""
    return [(f"{PAST}{layer}.{part}", f"{PRESENT}{layer}.{part}") for part in ("key", "value")]
