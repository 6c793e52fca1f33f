"""Is what runs there what was trained? Compares an artifact's distributions with those of the float reference, on real text.

The loss is attributed to the stages on the way: float -> fake-quantized -> exported graph -> artifact. All stages read the same
tokens and are compared at the same positions: after every prefill chunk, and after every decoded token.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lobit.errors import BundleError, InputError
from lobit.progress_callback import Progress
from lobit.runtime.engine import Engine, Logits
from lobit.runtime.verdict import MOVED, judged, warnings

PREFILL_LENGTHS = (16, 1, 7, 64, 2, 33, 3, 128, 5, 20)
"""Tokens of the prefill calls, in turn: short and long, odd and even, some longer than the chunk of a program with a short one."""
COST = {"float": 1, "fake_quant": 2, "target": 2, "floor": 2, "graph": 2, "artifact": 3, "rounded": 6}
"""Time that a token takes in each stage, relative to the float model's, for the estimate of the time left."""
STEPPED_GRAPH = 60
"""The same for a graph whose operators PyTorch runs one by one."""
WAYS_OUT = {"fake_quant": "its values are beyond what its floats hold; take --activations float"} | dict.fromkeys(
    ("target", "floor"), "its values are beyond what the target's floats hold; choose a target that computes in float32"
)
"""What helps where a stage that is no artifact gives no numbers; `target` is the model in the target's own arithmetic."""
SHORTEST_TEXT = 16
"""Number of tokens below which the figures say nothing."""
COMPARED = 4 << 20
"""Number of a stage's logits that are compared at once: in double precision, with what is computed from them, some 100 MB."""
LARGEST_EXPONENT = 700.0
"""The largest logarithm of a perplexity that is reported, so that it stays a finite number."""


Rows = Callable[[Sequence[int]], Logits]
"""Gives the logits [n, V] at positions [n] of a sequence; of an engine, which reads on as it is called, they must be asked for in order."""


class Scorer(Protocol):
    """A model that reads a whole sequence at once."""

    def read(self, tokens: list[int]) -> Rows:
        """Reads tokens [T] from position 0; returns what gives the logits at any of them."""


@dataclass(frozen=True)
class Floor:
    """Two versions of what the artifact should compute: they differ as two right implementations do, and by what grows from that."""

    exact: Scorer
    """The converted model in the target's arithmetic; may be one of the stages."""
    moved: Scorer
    """The same model with its sums in another order (`reference.moved`), or with operators that are off as the device's are."""
    how: str = MOVED
    """What the second one is, for the limit's reason."""


@dataclass(frozen=True)
class Passage:
    """One sequence of a comparison: first prefilled in calls of several lengths, then decoded token by token."""

    tokens: list[int]
    prefill: list[int]
    """Number of tokens of each prefill call."""

    @property
    def positions(self) -> list[int]:
        """Positions whose logits are compared: the last of each prefill call, then each decoded one."""
        ends = np.cumsum(self.prefill).tolist()
        return [end - 1 for end in ends] + list(range(ends[-1], len(self.tokens)))


def plan_passages(tokens: Sequence[int], context: int, bos: int | None, lines: Sequence[int] = ()) -> list[Passage]:
    """Cuts a text into sequences of at most the context, each beginning with bos, half prefilled and half decoded.

    A cut is made where a line begins, if one begins in the later half of what the context holds: after bos a model expects the beginning
    of a text, and predicts badly in the middle of a sentence.

    Args:
        tokens: the tokens of the text.
        context: the most tokens of a sequence.
        bos: the token that begins every sequence; None: there is none.
        lines: indices of the tokens that begin a line, in order.

    Raises:
        InputError: the text is too short to say anything.
    """
    if len(tokens) < SHORTEST_TEXT:
        raise InputError(f"the text has {len(tokens)} tokens, at least {SHORTEST_TEXT} are needed: give a longer one")
    head = [] if bos is None else [bos]
    room = context - len(head)
    pieces, start = [], 0
    while start < len(tokens):
        end = start + room
        if end < len(tokens):
            before = bisect.bisect_right(lines, end) - 1
            if before >= 0 and lines[before] > start + room // 2:
                end = lines[before]
        pieces.append(head + list(tokens[start:end]))
        start = end
    passages = []
    for piece in (piece for piece in pieces if len(piece) >= SHORTEST_TEXT):
        prefill: list[int] = []
        while (left := len(piece) // 2 - sum(prefill)) > 0:
            prefill.append(min(PREFILL_LENGTHS[len(prefill) % len(PREFILL_LENGTHS)], left))
        passages.append(Passage(piece, prefill))
    return passages


def read_passage(engine: Engine, plan: Passage, progress: Callable[[int], None]) -> Logits:
    """An engine's logits [positions, V] along a passage."""
    return np.stack(list(_steps(engine, plan, progress)))


def _steps(engine: Engine, plan: Passage, progress: Callable[[int], None]) -> Iterator[Logits]:
    engine.reset()
    start = 0
    for length in plan.prefill:
        row = engine.prefill(plan.tokens[start : start + length])
        start += length
        progress(length)
        yield row
    for token in plan.tokens[start:]:
        row = engine.decode(token)
        progress(1)
        yield row


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Log-probabilities [n, V] in nats, in double precision."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # type: ignore[no-any-return]


@dataclass
class Comparison:
    """The figures of each compared position."""

    kl: NDArray[np.float64]
    """KL(reference ‖ stage) in nats."""
    kl_step: NDArray[np.float64]
    """KL(stage before ‖ stage) in nats."""
    kl_rounded: NDArray[np.float64]
    """KL(what the artifact should compute ‖ stage) in nats."""
    agrees: NDArray[np.bool_]
    """Whether the stage has the same most probable token as the reference."""
    surprise: NDArray[np.float64]
    """-log p of the text's next token in nats; NaN at the end of a sequence."""


def kl_divergence(reference: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(reference ‖ other) [n] of log-probabilities [n, V]; rounding below zero is cut off."""
    divergences: NDArray[np.float64] = (np.exp(reference) * (reference - other)).sum(axis=1)
    return np.maximum(divergences, 0.0)


def _perplexity(surprise: NDArray[np.float64]) -> float:
    known = surprise[~np.isnan(surprise)]
    return math.exp(min(float(known.mean()), LARGEST_EXPONENT)) if len(known) else 1.0


def _summary(parts: Sequence[Comparison], keep: Callable[[int], NDArray[np.bool_]] | None = None) -> dict[str, float] | None:
    """The figures of a stage over the positions that `keep` selects in each passage, or over all; None where there are none."""

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(part, name)[slice(None) if keep is None else keep(i)] for i, part in enumerate(parts)])

    kl = joined("kl")
    if not len(kl):
        return None
    return {
        "kl_mean": float(kl.mean()),
        "kl_se": float(kl.std(ddof=1) / math.sqrt(len(kl))) if len(kl) > 1 else 0.0,
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1_agreement": float(joined("agrees").mean()),
        "perplexity": _perplexity(joined("surprise")),
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
    lines: Sequence[int] = (),
    floor: Floor | None = None,
    tried: Collection[str] = (),
    beside: Mapping[str, Engine] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compares the stages with the reference and with each other.

    Args:
        reference: the float model.
        stages: `fake_quant` (a scorer), `graph`, `artifact` and a device (engines), in this order; the last one is judged.
        tokens: the tokens of the text.
        context: number of positions that every engine can hold.
        bos: the token that begins every sequence; None: there is none.
        window: the longest attention window of the model; 0 where there is none. The phase `wrapped` has the positions from it on.
        lines: as in `plan_passages`.
        floor: what the artifact should compute; None: the same as the reference, up to the order of float32 sums.
        tried: names of the advice that the recipe follows already (`verdict.ADVICE`).
        beside: other runs of the artifact, which are compared and not judged; logits that are no numbers are taken as 0 there.
        progress: see `Progress`.

    Returns:
        The result of `lobit parity`: KL in nats a token, with the reference first; agreement as a share.

    Raises:
        InputError: the text is too short.
        BundleError: a stage's logits are not finite.
    """
    passages, last = plan_passages(tokens, context, bos, lines), list(stages)[-1]
    stages = {**stages, **(beside or {})}
    run = _Run(reference, stages, set(beside or ()), floor, _Progress(stages, floor, sum(len(plan.tokens) for plan in passages), progress))
    for plan in passages:
        run.compare(plan)
    found = {name: [_joined(parts) for parts in compared] for name, compared in run.compared.items()}
    every: list[dict[str, Any]] = [{"name": name, **(_summary(parts) or {})} for name, parts in found.items()]
    rows, others = ([row for row in every if (row["name"] in run.beside) is apart] for apart in (False, True))
    surprises, chaos = (np.concatenate(parts) for parts in (run.surprises, run.chaos))
    limit, measured = judged(chaos, floor.how if floor else Floor.how)
    return {
        "kind": "parity",
        "tokens": sum(len(plan.tokens) for plan in passages),
        "positions": len(surprises),
        "reference_perplexity": _perplexity(surprises),
        "stages": rows,
        "beside": others,
        "phases": _phases(passages, found[last], window),
        "floor": measured,
        "limits": {"kl_conversion": limit},
        "warnings": warnings(rows[-1], _perplexity(surprises), tried),
        "passed": rows[-1]["kl_conversion"] <= limit["limit"],
    }


class _Progress:
    """Counts the work that is done, and all work; the unit is the time that the float model takes for a token."""

    def __init__(self, stages: Mapping[str, Scorer | Engine], floor: Floor | None, tokens: int, told: Progress | None) -> None:
        self.cost = {"float": 1, **{name: COST.get(name, 1) if hasattr(one, "read") else _walked(name) for name, one in stages.items()}}
        if floor is not None:
            self.cost["floor"] = COST["floor"]
            self.cost |= {} if floor.exact in stages.values() else {"target": COST["target"]}
        self.done, self.total, self.told = 0, tokens * sum(self.cost.values()), told

    def of(self, name: str) -> Callable[[int], None]:
        """A function that is called with the number of tokens that a stage has read since."""

        def step(count: int) -> None:
            self.done += count * self.cost[name]
            if self.told:
                self.told(name, self.done, self.total)

        return step


def _walked(name: str) -> int:
    return STEPPED_GRAPH if name == "graph" else COST.get(name, 1)


class _Run:
    """Compares the stages passage by passage, and keeps the figures of every compared position."""

    def __init__(
        self, reference: Scorer, stages: Mapping[str, Scorer | Engine], beside: set[str], floor: Floor | None, progress: _Progress
    ) -> None:
        self.reference, self.stages, self.beside, self.floor, self.progress = reference, stages, beside, floor, progress
        self.compared: dict[str, list[list[Comparison]]] = {name: [] for name in stages}
        self.surprises: list[NDArray[np.float64]] = []
        self.chaos: list[NDArray[np.float64]] = []

    def compare(self, plan: Passage) -> None:
        """Reads one passage with every stage, and compares its positions, some at a time."""
        readers = {"float": self._rows("float", self.reference, plan)}
        readers |= {name: self._rows(name, stage, plan) for name, stage in self.stages.items()}
        exact = "float"
        if self.floor is not None:
            shared = [name for name, stage in self.stages.items() if stage is self.floor.exact]
            exact = shared[0] if shared else "target"
            readers |= {} if shared else {exact: self._rows(exact, self.floor.exact, plan)}
            readers["floor"] = self._rows("floor", self.floor.moved, plan)
        for compared in self.compared.values():
            compared.append([])
        start, count = 0, 1
        while start < len(plan.positions):
            positions = plan.positions[start : start + count]
            scores = {name: log_softmax(self._finite(rows(positions), name)) for name, rows in readers.items()}
            self._keep(plan, positions, scores, exact)
            start, count = start + count, max(1, COMPARED // scores["float"].shape[1])

    def _rows(self, name: str, stage: Scorer | Engine, plan: Passage) -> Rows:
        """A stage's logits at the passage's positions. A scorer reads the passage here, at once; an engine as its logits are asked for."""
        step = self.progress.of(name)
        if hasattr(stage, "read"):
            rows: Rows = stage.read(plan.tokens)
            step(len(plan.tokens))
            return rows
        rows_in_order = _steps(stage, plan, step)
        return lambda positions: np.stack(list(itertools.islice(rows_in_order, len(positions))))

    def _finite(self, logits: Logits, name: str) -> Logits:
        if np.isfinite(logits).all():
            return logits
        if name in self.beside:
            return np.where(np.isfinite(logits), logits, np.float32(0))
        told = f"{np.size(logits) - np.isfinite(logits).sum()} logits of stage {name} are no numbers"
        raise BundleError(f"{told}: {WAYS_OUT.get(name, 'export the model again')}")

    def _keep(self, plan: Passage, positions: Sequence[int], scores: Mapping[str, NDArray[np.float64]], exact: str) -> None:
        base = before = scores["float"]
        following = [plan.tokens[position + 1] if position + 1 < len(plan.tokens) else -1 for position in positions]
        for name, compared in self.compared.items():
            own = scores[name]
            kl = kl_divergence(base, own)
            compared[-1].append(
                Comparison(
                    kl,
                    kl if before is base else kl_divergence(before, own),
                    kl if exact == "float" else kl_divergence(scores[exact], own),
                    base.argmax(axis=1) == own.argmax(axis=1),
                    _surprise(own, following),
                )
            )
            before = own
        self.surprises.append(_surprise(base, following))
        self.chaos.append(kl_divergence(scores[exact], scores["floor"]) if self.floor else np.zeros(len(positions)))


def _surprise(scores: NDArray[np.float64], following: Sequence[int]) -> NDArray[np.float64]:
    return np.array([-scores[i, token] if token >= 0 else np.nan for i, token in enumerate(following)])


def _joined(parts: Sequence[Comparison]) -> Comparison:
    return Comparison(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Comparison)))


def _phases(passages: Sequence[Passage], parts: Sequence[Comparison], window: int) -> dict[str, dict[str, float] | None]:
    """The artifact's figures after prefill calls, after decoded tokens, and at positions from the end of the window on."""

    def prefill(i: int) -> NDArray[np.bool_]:
        return np.arange(len(passages[i].positions)) < len(passages[i].prefill)

    def wrapped(i: int) -> NDArray[np.bool_]:
        return np.array(passages[i].positions) >= window

    return {
        "prefill": _summary(parts, prefill),
        "decode": _summary(parts, lambda i: ~prefill(i)),
        "wrapped": _summary(parts, wrapped) if window else None,
    }
