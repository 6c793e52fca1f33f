"""What tests of ONNX graphs share: a text's way through an engine, and how far two such ways are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lobit import verbs
from lobit.checkpoint import load_model
from lobit.quant_recipes.apply import convert
from lobit.quant_recipes.recipe import Recipe
from lobit.runtime.parity import kl_divergence, log_softmax
from lobit.runtime.reference import ReferenceEngine

CONTEXT, CHUNK, THREADS = 96, 24, 1
FLOAT_RELATIVE = 1e-4
"""Of the largest logit: sums of float32 in another order give about 1e-6."""
PORTABLE_KL = 1e-7
"""Nats, median over short texts: inputs are rounded as the recipe says, and sums in another order give 1e-13. In some of the texts, others
on each processor, an entry falls on the other side of a rounding boundary, and the tokens from there on move by 1e-5 to 1e-4; without
the rounding all of them do, by `UNROUNDED_KL` in the median."""
UNROUNDED_KL = 1e-5
"""At least."""
TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, 64, 60)]
CALLS = [1, 5, CHUNK]


def export(model: Path, recipe: Recipe, out: Path, **options: Any) -> Path:
    verbs.export(str(model), "onnx", out, recipe=recipe, context=CONTEXT, chunk=CHUNK, **options)
    return out


def walked(engine: Any) -> Any:
    """Logits after calls of several lengths, then after each further token."""
    rows, start = [], 0
    for length in CALLS:
        rows.append(engine.prefill(TOKENS[start : start + length]))
        start += length
    return np.stack([*rows, *(engine.decode(token) for token in TOKENS[start:])])


def short_texts(engine: Any) -> Any:
    """Logits after the fourth token of many texts: few entries were rounded before, so that few texts have one on a boundary."""
    rows = []
    for start in range(0, len(TOKENS), 4):
        engine.reset()
        engine.prefill(TOKENS[start : start + 3])
        rows.append(engine.decode(TOKENS[start + 3]))
    return np.stack(rows)


def off(expected: Any, found: Any) -> float:
    """The median KL between two walks."""
    return float(np.median(kl_divergence(log_softmax(expected), log_softmax(found))))


def reference(model: Path, recipe: Recipe, context: int = CONTEXT) -> ReferenceEngine:
    return ReferenceEngine(convert(load_model(model), recipe), recipe, context)
