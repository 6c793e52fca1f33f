"""Names of the files, functions and ports of Core ML packages, for export and for the engine."""

from __future__ import annotations

PACKAGE = "model.mlpackage"
SPEC_FILE = f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"
WEIGHTS_FILE = f"{PACKAGE}/Data/com.apple.CoreML/weights/weight.bin"
WEIGHTS_PATH = "@model_path/weights/weight.bin"
"""The file of weights as the program names it."""
MANIFEST_FILE = f"{PACKAGE}/Manifest.json"
REFERENCE = b"CMJR"
"""How the data of a method of an ExecuTorch program begins whose package is named data of it; the rest is JSON."""
NO_BIAS = "no_bias"
"""Part of the name of the zeros that stand for the bias of a product that has none."""
TOKENS, POSITION, LAST, LOGITS = "tokens", "position", "last", "logits"


def cache_names(layer: int) -> tuple[str, str]:
    """States, or inputs, with a layer's keys and values."""
    return f"k_{layer}", f"v_{layer}"


def row_names(layer: int) -> tuple[str, str]:
    """Outputs with a call's own keys and values of a layer, where the caches are inputs."""
    return f"k_rows_{layer}", f"v_rows_{layer}"
