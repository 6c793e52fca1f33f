"""What parity concludes: whether an artifact is as near to what it should compute as its arithmetic lets it be; what to do about loss."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOORS = 2.0
"""Times the floor that an artifact may be away: every right implementation is at most about one away (measured: 0.7 to 1.2 on a model of
135 million parameters), since flips grow until they stay as many. What adds less than the floor once more is left to the check of parts."""
ERRORS = 4.0
"""Standard errors of that floor which are granted besides: positions of one sequence share flips, so that the error is larger than told."""
FLOAT_ORDER = 1e-6
"""Nats a token that the order of float32 sums costs where nothing is rounded (1e-12 measured): a recipe of floats has this alone."""
COSTLY_KL, COSTLY_PERPLEXITY = 0.1, 1.1
"""Mean KL from the float model, and perplexity as a multiple of its, from which on advice is given: a chat shows such a loss."""
ADVICE = {
    "calibration": "round on a text: quantize or export with --calibration FILE",
    "ends": "give embedding and head INT8, as recipe 8da4w-g32-e8 does",
    "training": "train: lobit train MODEL --recipe RECIPE --text FILE",
}
"""What helps, the cheapest first."""


def judged(chaos: NDArray[np.float64]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The limit on the KL from what should be computed, and the floor it is from.

    Args:
        chaos: KL of every position between the model and itself with its sums in another order; zeros where that is not measured.
    """
    mean, error = float(chaos.mean()), float(chaos.std() / math.sqrt(len(chaos)))
    limit = FLOORS * mean + ERRORS * error * math.hypot(1, FLOORS) + FLOAT_ORDER
    reason = (
        f"with the inputs of its products moved a little the model is {mean:.2g} ± {error:.1g} nats from itself; {FLOORS:g} times that, "
        f"with {ERRORS:g} standard errors and {FLOAT_ORDER:g} for the sums themselves"
    )
    return {"limit": limit, "reason": reason}, {"kl_mean": mean, "kl_se": error, "kl_p99": float(np.quantile(chaos, 0.99))}


def warnings(artifact: Mapping[str, Any], perplexity: float, tried: Collection[str] = ()) -> list[dict[str, str]]:
    """What quantization costs more than it need, and what to do: no fault of the artifact, so no gate.

    Args:
        artifact: its row of figures.
        perplexity: of the float model.
        tried: what of `ADVICE` the bundle's recipe has already.
    """
    found = []
    if artifact["kl_mean"] > COSTLY_KL:
        found.append(f"{artifact['kl_mean']:.3f} nats a token from the float model")
    if artifact["perplexity"] > COSTLY_PERPLEXITY * perplexity:
        found.append(f"perplexity {artifact['perplexity']:.3f} where the float model has {perplexity:.3f}")
    advice = "; then ".join(text for name, text in ADVICE.items() if name not in tried)
    return [{"what": f"quantization costs much: {', '.join(found)}", "advice": advice}] if found else []
