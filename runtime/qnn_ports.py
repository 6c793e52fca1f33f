"""Names of the ports of programs for target qnn, for export and for the engine."""

from __future__ import annotations

EMBEDDINGS, LAST, LOGITS = "embeddings", "last", "logits"


def rotary_names(index: int) -> tuple[str, str]:
    """Ports of the cosines and sines of a rotary embedding."""
    return f"cos.{index}", f"sin.{index}"


def is_mask(name: str) -> bool:
    """Whether a port is that of a mask."""
    return name.startswith("mask.")


def is_cache(name: str) -> bool:
    """Whether a port is one of a layer's keys or values, or of the call's own rows."""
    return name.startswith(("k.", "v.", "k_rows.", "v_rows."))


def mask_name(index: int) -> str:
    """Port of the mask of an attention window."""
    return f"mask.{index}"


def cache_names(layer: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """Ports of a layer's keys and of its values: what was cached before, and the call's own rows."""
    return (f"k.{layer}", f"k_rows.{layer}"), (f"v.{layer}", f"v_rows.{layer}")
