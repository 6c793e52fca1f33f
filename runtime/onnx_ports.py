"""What a graph's ports are called, its files, and how it is run: for export, and for what runs it. Standard library only."""

from __future__ import annotations

GRAPH_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
TOKENS, POSITIONS, LOGITS = "input_ids", "position_ids", "logits"
"""As onnxruntime-genai calls them."""
PAST, PRESENT = "past_key_values.", "present."
"""What the names of caches begin with, before and after a call."""
FLOAT_INPUTS = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Setting of a session: inputs of a weight's DequantizeLinear and MatMul, which ONNX Runtime joins to one product, stay floats."""
UNTILED_SLOTS = 4096
"""Slots up to which attention has scores for all of them at once: a prompt of 512 takes 6 to 10 % less time so, a token 5 % less, with 2048
tokens before them as well (AVX-512, 125 million parameters). Beyond, the scores of a step would take hundreds of megabytes."""


def cache_names(layer: int) -> list[tuple[str, str]]:
    """Names of a layer's keys and of its values, before and after a call."""
    return [(f"{PAST}{layer}.{part}", f"{PRESENT}{layer}.{part}") for part in ("key", "value")]
