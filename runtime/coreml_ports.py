"""Names of the files, functions and ports of Core ML packages, for export and for the engine."""

from __future__ import annotations

PACKAGE = "model.mlpackage"
SPEC_FILE = f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"
WEIGHTS_FILE = f"{PACKAGE}/Data/com.apple.CoreML/weights/weight.bin"
MANIFEST_FILE = f"{PACKAGE}/Manifest.json"
TOKENS, POSITION, LAST, LOGITS = "tokens", "position", "last", "logits"


def cache_names(layer: int) -> tuple[str, str]:
    """States, or inputs, with a layer's keys and values."""
    return f"k_{layer}", f"v_{layer}"


def row_names(layer: int) -> tuple[str, str]:
    """Outputs with a call's own keys and values of a layer, where the caches are inputs."""
    return f"k_rows_{layer}", f"v_rows_{layer}"
