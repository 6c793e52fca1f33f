"""Compares every part of a program with the reference's part on the same inputs, so that a fault has the name of its layer.

A part's inputs are what the program's own previous part gave, so that differences do not grow from part to part. Inside a part an
entry may still fall over a rounding boundary (a flip): then one token is off, by a step of one entry. A fault shows in every token.
So what counts is the error that a part has in its better tokens, compared with the error that the reference's part has against
itself when its sums are in another order.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from lobit.model import Block, Transformer, dot_product_attention, rotary_tables, visible
from lobit.quant_recipes.grid import quantize_tokens
from lobit.runtime.bundle import Bundle
from lobit.runtime.reference import moved

Seen = dict[str, Tensor]
"""What the parts handed on in one call, by name and layer, batch first: `x.3` is the residual stream [1, T, D] that layer 3 reads; `q.3`,
`k.3`, `v.3` are what attention takes, or `q_unturned.3` is q before its rotary embedding; `y.3` is attention's output; `logits` [1, 1, V]
are the last token's; an INT8 cache adds its entries `k_integers.3`, `k_scale.3`, `k_zero_point.3` and those of v."""
READERS = {"xnnpack": "lobit.runtime.executorch_parts", "onnx": "lobit.runtime.onnx_parts"}
"""Module of each target's `Reader`, by the target's name; imported on use."""
PROMPT, DECODED = 40, 3
"""Number of tokens of the first call, which is more than the demo's windows hold, and number of calls after it, of one token each."""
BETTER = 0.25
"""Share of tokens that are taken as the better ones: the error that a quarter of them do not exceed is that of tokens without a flip."""
FLOORS = 4.0
"""How many times its own floor a part's error may be, as both come from only a few flips."""
BETTER_ALLOWANCE = 2e-5
"""Error of the better tokens that is allowed in addition, for other sums and approximations of exp: 1e-6 at most was measured, on both
targets, for the demo and a model of 135 million parameters. There the scale of one group of 32 weights, if another row's, makes 1e-4."""
FLIPPED_FLOORS, FLIPPED_ALLOWANCE = 2.0, 0.1
"""The share of tokens over the limit of the better ones may be this many times its floor, and this much more, with two standard errors of
a share of so many tokens. A wrong scale whose effect the next rounding mostly swallows shows here: half of the tokens are off then."""
ALLOWANCE = 0.02
"""Root mean square of all tokens' errors that is allowed in addition, for flips where the reference has none: 3e-3 was measured."""
FIGURES = ("error", "better", "flipped")
"""Figures of each part that have a limit."""
WORST = 4
"""Number of parts that a result names as the worst."""


class Reader(Protocol):
    """The functions of a target's module in `READERS`."""

    def room(self, bundle: Bundle) -> int:
        """The most tokens that can be read while the entries of each are still found in the caches."""

    def read_parts(self, bundle: Bundle, threads: int, calls: Sequence[Sequence[int]]) -> list[Seen]:
        """Runs the calls, the first at position 0; returns what the parts handed on in each."""


def check_parts(model: Transformer, bundle: Bundle, tokens: Sequence[int], threads: int) -> dict[str, Any]:
    """Runs a bundle's program on the first tokens of a text, and compares its parts with the reference's.

    Args:
        model: what the program should compute, in its target's arithmetic.
        bundle: the program's bundle.
        tokens: the tokens of the text.
        threads: number of the runtime's threads.

    Returns:
        See `compare`.

    Raises:
        BundleError: the program's parts cannot be told apart, or it does not run.
    """
    reader = cast(Reader, importlib.import_module(READERS[bundle.manifest.target]))
    prompt = max(1, min(PROMPT, bundle.manifest.chunk, reader.room(bundle) - DECODED, len(tokens) - DECODED))
    calls = [list(tokens[:prompt]), *([token] for token in tokens[prompt : prompt + DECODED])]
    return compare(model, calls, reader.read_parts(bundle, threads, calls))


def compare(model: Transformer, calls: Sequence[Sequence[int]], seen: Sequence[Seen]) -> dict[str, Any]:
    """Compares what a program's parts handed on with what the reference gives for the same inputs.

    Returns:
        `{"tokens", "passed", "nearest", "faults", "worst", "all"}`. `all` has the errors of each part, relative to the norm of a token's
        output, each with its `…_limit`: `error` is their root mean square, `better` what a quarter of the tokens do not exceed, `flipped`
        the share of tokens over the limit of `better`; of an INT8 cache `flips` counts the integers that differ, of `entries`. `nearest` is
        the largest ratio of a figure to its limit. `faults` are the parts with a figure over its limit, the worst first.
    """
    rows = _Check(model, calls, seen).rows()
    ordered = sorted(rows, key=_share, reverse=True)
    return {
        "tokens": sum(map(len, calls)),
        "passed": _share(ordered[0]) <= 1,
        "nearest": _share(ordered[0]),
        "faults": [row["name"] for row in ordered if not _share(row) <= 1],
        "worst": [row["name"] for row in ordered[:WORST]],
        "all": rows,
    }


def _share(row: Mapping[str, Any]) -> float:
    """The largest ratio of a part's figures to their limits."""
    return float(max(row[figure] / row[f"{figure}_limit"] for figure in FIGURES))


def _relative(found: Tensor, expected: Tensor, size: Tensor | None = None) -> Tensor:
    """The error [T] of each token's outputs [1, T, …], relative to their norm or that of `size`; `LOST` where it is larger or NaN."""
    difference = (found.reshape(expected.shape) - expected).flatten(2).norm(dim=2)
    norm = (expected if size is None else size).flatten(2).norm(dim=2)
    return torch.nan_to_num(difference / norm.clamp(min=1e-30), nan=LOST, posinf=LOST)[0].clamp(max=LOST)


LOST = 1e6
"""The largest error that is reported."""


def _row(name: str, errors: Tensor, floors: Tensor | None = None, **counts: int) -> dict[str, Any]:
    floors = torch.zeros(1) if floors is None else floors
    better_limit = FLOORS * float(floors.quantile(BETTER)) + BETTER_ALLOWANCE
    flipped, chaos = (float((one > better_limit).float().mean()) for one in (errors, floors))
    return {
        "name": name,
        "error": float(errors.square().mean().sqrt()),
        "error_limit": FLOORS * float(floors.square().mean().sqrt()) + ALLOWANCE,
        "better": float(errors.quantile(BETTER)),
        "better_limit": better_limit,
        "flipped": flipped,
        "flipped_limit": FLIPPED_FLOORS * chaos + FLIPPED_ALLOWANCE + len(errors) ** -0.5,
        **counts,
    }


class _Check:
    """Runs the reference's parts on what the program's parts handed on in all calls."""

    def __init__(self, model: Transformer, calls: Sequence[Sequence[int]], seen: Sequence[Seen]) -> None:
        self.model, self.other, self.config = model, moved(model), model.config
        self.seen = {name: torch.cat([one[name] for one in seen], 1) for name in seen[0]}
        self.tokens = torch.tensor([[token for call in calls for token in call]])
        self.ends = [end - 1 for end in itertools.accumulate(map(len, calls))]
        self.positions = torch.arange(self.tokens.shape[1])
        self.tables = rotary_tables(self.config, self.positions)

    @torch.inference_mode()
    def rows(self) -> list[dict[str, Any]]:
        """The figures of each part, in the order of execution."""
        count, embedded = len(self.config.layers), self.model.embed(self.tokens)
        rows = [_row("embedding", _relative(self.seen["x.0"], embedded))]
        for layer in range(count):
            rows.append(self._projected(layer))
            rows += [self._cache(layer)] if f"k_integers.{layer}" in self.seen else []
            rows.append(self._attention(layer))
            rows.append(self._left(layer) if layer + 1 < count else self._scored(layer))
        return rows

    def _blocks(self, layer: int) -> list[Block]:
        return [model.blocks[layer // self.config.repeats] for model in (self.model, self.other)]

    def _handed(self, name: str, layer: int) -> Tensor:
        """q, k, v or y as [1, T, heads, E]."""
        value = self.seen[f"{name}.{layer}"]
        return value.reshape(1, len(self.positions), -1, self.config.head_dim)

    def _q(self, layer: int) -> Tensor:
        turned = f"q.{layer}" in self.seen
        # Where one product gives q, k and v, q comes first.
        q = self._handed("q" if turned else "q_unturned", layer)[:, :, : self.config.heads]
        if turned:
            return q
        block = self._blocks(layer)[0]
        rope = block.attention.rope
        assert rope is not None
        return block.attention._rotate(q, self.tables[rope])

    def _projected(self, layer: int) -> dict[str, Any]:
        exact, other = (block.enter(self.seen[f"x.{layer}"], self.tables) for block in self._blocks(layer))
        found = self._q(layer), self._handed("k", layer), self._handed("v", layer)
        errors, floors = (torch.stack(list(map(_relative, one, exact))).amax(0) for one in (found, other))
        return _row(f"layers.{layer}.qkv", errors, floors)

    def _entries(self, layer: int, side: str) -> Tensor:
        """Keys or values as the cache gives them back: dequantized from an INT8 cache."""
        if f"{side}_integers.{layer}" not in self.seen:
            return self._handed(side, layer)
        integers, scale, zero_point = (self.seen[f"{side}_{part}.{layer}"].float() for part in ("integers", "scale", "zero_point"))
        return (integers - zero_point) * scale

    def _cache(self, layer: int) -> dict[str, Any]:
        errors, flips = [], 0
        for side in "kv":
            integers, scale, zero_point = quantize_tokens(self._handed(side, layer))
            errors.append(_relative(self._entries(layer, side), (integers - zero_point) * scale))
            flips += int((integers != self.seen[f"{side}_integers.{layer}"]).sum())
        return _row(f"layers.{layer}.cache", torch.stack(errors).amax(0), flips=flips, entries=2 * integers.numel())

    def _attention(self, layer: int) -> dict[str, Any]:
        shown = visible(self.positions, self.positions, self.config.layers[layer].window)
        keys, values = (self._entries(layer, side) for side in "kv")
        expected = dot_product_attention(self.config, self._q(layer), keys, values, shown)
        return _row(f"layers.{layer}.attention", _relative(self.seen[f"y.{layer}"], expected))

    def _left(self, layer: int) -> dict[str, Any]:
        x, y = self.seen[f"x.{layer}"], self._handed("y", layer)
        exact, other = (block.leave(x, y) for block in self._blocks(layer))
        found, added = self.seen[f"x.{layer + 1}"], exact - x
        return _row(f"layers.{layer}.o_mlp", _relative(found, exact, added), _relative(other, exact, added))

    def _scored(self, layer: int) -> dict[str, Any]:
        x, y = self.seen[f"x.{layer}"][:, self.ends], self._handed("y", layer)[:, self.ends]
        models = zip((self.model, self.other), self._blocks(layer), strict=True)
        exact, other = (model.score(block.leave(x, y)) for model, block in models)
        return _row(f"layers.{layer}.o_mlp and head", _relative(self.seen["logits"], exact), _relative(other, exact))
