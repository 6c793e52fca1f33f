"""Names of a graph's ports and files, and settings to run it with: for export and for the engine. Needs the standard library alone."""

from __future__ import annotations

PROVIDER = "CPUExecutionProvider"
"""ONNX Runtime's name of what runs a graph."""
GRAPH_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
TOKENS, POSITIONS, LOGITS = "input_ids", "position_ids", "logits"
"""Names of the ports, as onnxruntime-genai calls them."""
PAST, PRESENT = "past_key_values.", "present."
"""What the names of a cache begin with as an input (before a call) and as an output (after it)."""
FLOAT_INPUTS = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Setting of a session: the inputs of a product that ONNX Runtime makes from a weight's DequantizeLinear and MatMul stay floats."""
UNTILED_SLOTS = 4096
"""Slots of a cache up to which attention computes the scores of all at once: so a prompt of 512 takes 6 to 10 % less time and a token 5 %
less, with 2048 tokens before them as well (AVX-512, 125 million parameters). With more, a step's scores would take hundreds of MB."""


def cache_names(layer: int) -> list[tuple[str, str]]:
    """Names of a layer's keys and of its values, each as (input, output)."""
    return [(f"{PAST}{layer}.{part}", f"{PRESENT}{layer}.{part}") for part in ("key", "value")]
