"""Parity's conclusions: whether an artifact is as near to what it should compute as its arithmetic allows, and advice about loss."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOORS = 2.0
"""How many times the floor an artifact's KL may be. A right implementation's is at most about the floor (measured: 0.7 to 1.2 times on a
model of 135 million parameters), since flips grow to a number that then stays. A fault that adds less is left to the check of parts."""
ERRORS = 4.0
"""Standard errors of the floor that are allowed in addition: positions of a sequence share flips, so that the true error is larger."""
FLOAT_ORDER = 1e-6
"""Nats a token that are allowed for the order of float32 sums (1e-12 measured): a recipe of floats has this limit alone."""
COSTLY_KL, COSTLY_PERPLEXITY = 0.1, 1.1
"""Mean KL from the float model, and perplexity over the float model's, above which advice is given: such a loss shows in a chat."""
ADVICE = {
    "calibration": "round on a text: quantize or export with --calibration FILE",
    "ends": "give embedding and head INT8, as recipe 8da4w-g32-e8 does",
    "training": "train: lobit train MODEL --recipe RECIPE --text FILE",
}
"""What helps against loss, the cheapest first."""


MOVED = "with the inputs of its products moved a little"
"""How a model is moved to find the floor, unless its target's operators are off in ways of their own."""


def judged(chaos: NDArray[np.float64], how: str = MOVED) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the limit on the KL from what should be computed, and the floor that the limit is derived from.

    Args:
        chaos: KL at every position between the model and itself, moved; zeros where it was not measured.
        how: it was moved.
    """
    mean, error = float(chaos.mean()), float(chaos.std() / math.sqrt(len(chaos)))
    limit = FLOORS * mean + ERRORS * error * math.hypot(1, FLOORS) + FLOAT_ORDER
    reason = (
        f"{how} the model is {mean:.2g} ± {error:.1g} nats from itself; {FLOORS:g} times that, "
        f"with {ERRORS:g} standard errors and {FLOAT_ORDER:g} for the sums themselves"
    )
    return {"limit": limit, "reason": reason}, {"kl_mean": mean, "kl_se": error, "kl_p99": float(np.quantile(chaos, 0.99))}


def warnings(artifact: Mapping[str, Any], perplexity: float, tried: Collection[str] = ()) -> list[dict[str, str]]:
    """Warnings, with advice, where quantization costs much: this is no fault of the artifact, and fails nothing.

    Args:
        artifact: the figures of the artifact's stage.
        perplexity: the float model's perplexity.
        tried: names in `ADVICE` that the bundle's recipe follows already.
    """
    found = []
    if artifact["kl_mean"] > COSTLY_KL:
        found.append(f"{artifact['kl_mean']:.3f} nats a token from the float model")
    if artifact["perplexity"] > COSTLY_PERPLEXITY * perplexity:
        found.append(f"perplexity {artifact['perplexity']:.3f} where the float model has {perplexity:.3f}")
    advice = "; then ".join(text for name, text in ADVICE.items() if name not in tried)
    return [{"what": f"quantization costs much: {', '.join(found)}", "advice": advice}] if found else []
