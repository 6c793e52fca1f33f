"""Is what runs there what was trained? Distributions of an artifact against those of the float reference, on real text.

The loss is shared out over the stages on the way: float -> fake-quantized -> exported graph -> artifact. All of them see the
same tokens and are compared at the same positions: after every prefill chunk, and after every decoded token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lobit.errors import InputError
from lobit.runtime.engine import Engine, Logits

Progress = Callable[[str, int, int], None]
"""(what, done, of how many)"""
PREFILL_LENGTHS = (16, 1, 7, 64, 2, 33, 3, 128, 5, 20)
"""Tokens per prefill call, in turn: short and long, odd and even; longer than a program's chunk where the chunk is short."""
COST = {"float": 1, "fake_quant": 2, "graph": 60}
"""Time that a token takes in a stage, relative, for the estimate of the time left; 1 where a stage is not listed."""
SHORTEST_TEXT = 16
"""Tokens below which the figures say nothing."""


@dataclass(frozen=True)
class Limit:
    """A bound that a recipe's artifact must keep."""

    metric: str
    """`kl_mean`: artifact against float; `kl_conversion`: artifact against the fake-quantized model."""
    limit: float
    """Nats a token."""
    reason: str


FLOAT_CONVERSION = Limit("kl_conversion", 1e-6, "nothing is rounded: only the order of float32 sums may differ")
CONVERSION = Limit(
    "kl_conversion",
    0.01,
    "the artifact holds the same integers as the fake-quantized model; what is left is activations and cache entries that fall on "
    "the other side of a rounding boundary, about 1e-3 where it was measured",
)
LIMITS: dict[str, tuple[Limit, ...]] = {
    "fp": (replace(FLOAT_CONVERSION, metric="kl_mean"), FLOAT_CONVERSION),
    "fp16": (
        Limit("kl_mean", 1e-4, "weights of 11 significant bits cost 5e-7 on the smallest trained model; a hundred times that is a fault"),
        FLOAT_CONVERSION,
    ),
    "8da8w": (
        Limit("kl_mean", 0.05, "INT8 weights and activations cost about 1e-3 on the smallest trained models; ten times that is a fault"),
        CONVERSION,
    ),
    "8da4w-g32": (
        Limit(
            "kl_mean",
            0.75,
            "four bits without training cost up to 0.3 on a model of width 64 and less on wider ones; a broken one loses over 1",
        ),
        CONVERSION,
    ),
}
"""By recipe name; a recipe without an entry has `DEFAULT_LIMITS`."""
DEFAULT_LIMITS = (Limit("kl_mean", 1.0, "a model that differs by more than a nat a token tells other stories"), CONVERSION)


class Scorer(Protocol):
    """A model that gives the logits after every token of a sequence at once."""

    def score(self, tokens: list[int]) -> Logits:
        """Logits [T, V] of tokens [T] from position 0."""


@dataclass(frozen=True)
class Walk:
    """One sequence of a comparison: first prefilled in calls of several lengths, then decoded token by token."""

    tokens: list[int]
    prefill: list[int]
    """Tokens of each prefill call."""

    @property
    def positions(self) -> list[int]:
        """Positions whose logits are compared: the last of each prefill call, then each decoded one."""
        ends = np.cumsum(self.prefill).tolist()
        return [end - 1 for end in ends] + list(range(ends[-1], len(self.tokens)))


def plan_walks(tokens: Sequence[int], context: int, bos: int | None) -> list[Walk]:
    """Cuts a text into sequences of at most the context, each beginning with bos, half prefilled and half decoded.

    Raises:
        InputError: the text is too short to say anything.
    """
    if len(tokens) < SHORTEST_TEXT:
        raise InputError(f"the text has {len(tokens)} tokens, at least {SHORTEST_TEXT} are needed: give a longer one")
    head = [] if bos is None else [bos]
    room = context - len(head)
    pieces = [head + list(tokens[start : start + room]) for start in range(0, len(tokens), room)]
    walks = []
    for piece in (piece for piece in pieces if len(piece) >= SHORTEST_TEXT):
        prefill: list[int] = []
        while (left := len(piece) // 2 - sum(prefill)) > 0:
            prefill.append(min(PREFILL_LENGTHS[len(prefill) % len(PREFILL_LENGTHS)], left))
        walks.append(Walk(piece, prefill))
    return walks


def walk(engine: Engine, plan: Walk, progress: Callable[[int], None]) -> Logits:
    """An engine's logits [positions, V] along a walk."""
    engine.reset()
    rows, start = [], 0
    for length in plan.prefill:
        rows.append(engine.prefill(plan.tokens[start : start + length]))
        start += length
        progress(length)
    for token in plan.tokens[start:]:
        rows.append(engine.decode(token))
        progress(1)
    return np.stack(rows)


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Log-probabilities [n, V] in nats, in double precision."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # type: ignore[no-any-return]


@dataclass
class Comparison:
    """What is kept of each compared position."""

    kl: NDArray[np.float64]
    """KL(reference ‖ stage) in nats."""
    kl_step: NDArray[np.float64]
    """KL(stage before ‖ stage) in nats."""
    kl_rounded: NDArray[np.float64]
    """KL(fake-quantized ‖ stage) in nats; 0 where there is no such stage."""
    agrees: NDArray[np.bool_]
    """Same most probable token as the reference."""
    surprise: NDArray[np.float64]
    """-log p of the text's next token; NaN at the end of a sequence."""


def kl_divergence(reference: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(reference ‖ other) [n] of log-probabilities [n, V]; rounding below zero is cut off."""
    divergences: NDArray[np.float64] = (np.exp(reference) * (reference - other)).sum(axis=1)
    return np.maximum(divergences, 0.0)


def _surprise(scores: NDArray[np.float64], plan: Walk) -> NDArray[np.float64]:
    following = [plan.tokens[p + 1] if p + 1 < len(plan.tokens) else -1 for p in plan.positions]
    return np.array([-scores[i, token] if token >= 0 else np.nan for i, token in enumerate(following)])


def _summary(parts: Sequence[Comparison], keep: Callable[[int], NDArray[np.bool_]] | None = None) -> dict[str, float] | None:
    """The figures of a stage over the positions that `keep` leaves of each walk."""

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(part, name)[slice(None) if keep is None else keep(i)] for i, part in enumerate(parts)])

    kl, surprise = joined("kl"), joined("surprise")
    if not len(kl):
        return None
    surprise = surprise[~np.isnan(surprise)]
    return {
        "kl_mean": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1_agreement": float(joined("agrees").mean()),
        "perplexity": math.exp(float(surprise.mean())) if len(surprise) else float("nan"),
        "kl_step": float(joined("kl_step").mean()),
        "kl_conversion": float(joined("kl_rounded").mean()),
        "positions": len(kl),
    }


def parity(
    reference: Scorer,
    stages: Mapping[str, Scorer | Engine],
    tokens: Sequence[int],
    *,
    context: int,
    bos: int | None = None,
    window: int = 0,
    recipe: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compares the stages with the reference and with each other.

    Args:
        reference: the float model.
        stages: `fake_quant` (a scorer), `graph` and `artifact` (engines), in the order of the way; `artifact` must be there.
        tokens: the text.
        context: positions that every engine can hold.
        bos: begins every sequence.
        window: the longest window of the model; 0 where there is none. Positions from it on are the phase `wrapped`.
        recipe: name that chooses the limits.
        progress: called with (stage, work done, work in all).

    Returns:
        The JSON of `parity` in the design: KL in nats a token, reference first; agreement as a share.

    Raises:
        InputError: the text is too short.
    """
    walks = plan_walks(tokens, context, bos)
    compared: dict[str, list[Comparison]] = {name: [] for name in stages}
    surprises = []
    total, done = sum(len(plan.tokens) for plan in walks) * sum(COST.get(name, 1) for name in ("float", *stages)), 0

    def advance(name: str) -> Callable[[int], None]:
        def step(count: int) -> None:
            nonlocal done
            done += count * COST.get(name, 1)
            if progress:
                progress(name, done, total)

        return step

    for plan in walks:
        base = log_softmax(reference.score(plan.tokens)[plan.positions])
        advance("float")(len(plan.tokens))
        surprises.append(_surprise(base, plan))
        before, rounded = base, None
        for name, stage in stages.items():
            scores = log_softmax(_logits(stage, plan, advance(name)))
            rounded = scores if name == "fake_quant" else rounded
            compared[name].append(
                Comparison(
                    kl_divergence(base, scores),
                    kl_divergence(before, scores),
                    np.zeros(len(scores)) if rounded is None else kl_divergence(rounded, scores),
                    base.argmax(axis=1) == scores.argmax(axis=1),
                    _surprise(scores, plan),
                )
            )
            before = scores
    rows: list[dict[str, Any]] = [{"name": name, **(_summary(parts) or {})} for name, parts in compared.items()]
    limits = LIMITS.get(recipe, DEFAULT_LIMITS)
    all_surprises = np.concatenate(surprises)
    return {
        "kind": "parity",
        "tokens": sum(len(plan.tokens) for plan in walks),
        "positions": len(all_surprises),
        "reference_perplexity": math.exp(float(np.nanmean(all_surprises))),
        "stages": rows,
        "phases": _phases(walks, compared["artifact"], window),
        "limits": {limit.metric: {"limit": limit.limit, "reason": limit.reason} for limit in limits},
        "passed": all(rows[-1][limit.metric] <= limit.limit for limit in limits),
    }


def _logits(stage: Scorer | Engine, plan: Walk, step: Callable[[int], None]) -> Logits:
    """Logits of a stage at the walk's positions: at once where it can, by walking where it is an engine of a device."""
    if hasattr(stage, "score"):
        logits: Logits = stage.score(plan.tokens)[plan.positions]
        step(len(plan.tokens))
        return logits
    return walk(stage, plan, step)


def _phases(walks: Sequence[Walk], parts: Sequence[Comparison], window: int) -> dict[str, dict[str, float] | None]:
    """The artifact's figures after prefill calls, after decoded tokens, and after the window has wrapped."""

    def prefill(i: int) -> NDArray[np.bool_]:
        return np.arange(len(walks[i].positions)) < len(walks[i].prefill)

    def wrapped(i: int) -> NDArray[np.bool_]:
        return np.array(walks[i].positions) >= window

    return {
        "prefill": _summary(parts, prefill),
        "decode": _summary(parts, lambda i: ~prefill(i)),
        "wrapped": _summary(parts, wrapped) if window else None,
    }
