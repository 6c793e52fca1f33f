"""What the integers of a graph stand for: an encoding for every value, from the ranges that the values have on a text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lobit.errors import BundleError
from lobit.export.qnn.graph import STATIC, Encoding, Graph, Operator
from lobit.runtime.qnn_ports import LAST, is_cache, is_mask

Range = tuple[float, float]
Encodings = dict[str, Encoding]
ENTRY = ".Quantize@0"
"""Ends the name of an input of floats after it has become integers."""
MOVING = ("Concat", "Pad", "Reshape", "Split", "Transpose")
"""Operators that move entries and compute nothing: all that they take and give has one encoding."""
FIXED = {"Tanh": Encoding(1 / 32768, 32768), "Sigmoid": Encoding(1 / 65536, 0)}
"""Encodings that the HTP wants of what an operator gives, by its kind."""
HIDDEN_BELOW = 20.0
"""How far a hidden score is below the least that is seen: its share, at most e^-20, is an exact 0 among integers of 16 bits."""
WIDER = 0.1
"""What is added to every range, as a share of it, for texts other than the one that it was found on."""
SMALLEST = 1e-6
"""The smallest range: a value that is 0 throughout has it."""
LARGEST_FILE = 64 << 20
"""Bytes that a file of encodings may have; a model of 30 layers has some 100 thousand."""


class Ranges:
    """The smallest and the largest entry of every value of the graphs, over all calls that it is told of (`eager.Each`)."""

    def __init__(self) -> None:
        self.found: dict[str, Range] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Takes note of a value, and gives it back as it is."""
        low, high = (float(each) for each in x.aminmax())
        before = self.found.get(name, (low, high))
        self.found[name] = min(before[0], low), max(before[1], high)
        return x


def over(low: float, high: float, bits: Any = 16) -> Encoding:
    """The encoding of a range, in which 0 is exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    most = (1 << bits) - 1
    scale = float(np.float32(max(high - low, SMALLEST) / most))
    return Encoding(scale, min(most, round(-low / scale)), bits)


def encodings_of(graphs: Iterable[Graph], ranges: Mapping[str, Range]) -> Encodings:
    """The encodings of all values of a model's graphs, alike in each.

    Args:
        graphs: the graphs without encodings.
        ranges: of their values, by name.
    """
    graphs = list(graphs)
    operators = {operator.name: operator for graph in graphs for operator in graph.operators}.values()
    together = _together(operators)
    joined: dict[str, Range] = {}
    for name, (low, high) in ranges.items():
        before = joined.get(together.of(name), (low, high))
        joined[together.of(name)] = min(before[0], low), max(before[1], high)
    spans = {name: joined[together.of(name)] for name in ranges}
    narrow = {together.of(operator.outputs[0]) for operator in operators if operator.kind == "Convert"}
    found = {name: over(*_wider(*spans[name]), 8 if together.of(name) in narrow else 16) for name in ranges}
    found |= {output: FIXED[operator.kind] for operator in operators if operator.kind in FIXED for output in operator.outputs}
    found |= _masked(operators, spans)
    entries = {name for graph in graphs for name in graph.inputs if not is_cache(name)}
    return {name + ENTRY * (name in entries): encoding for name, encoding in found.items()}


def _wider(low: float, high: float) -> Range:
    """A range for other texts too; shares and choices are never more than 1."""
    if (low, high) == (0.0, 1.0):
        return low, high
    more = WIDER * (high - low) / 2
    return low - more * (low < 0), high + more * (high > 0)


def _masked(operators: Iterable[Operator], spans: Mapping[str, Range]) -> Encodings:
    """The encodings of masks and of scores with masks: what is hidden falls out of the range of the scores that are seen."""
    found, depths = Encodings(), dict[str, float]()
    for operator in operators:
        for mask in filter(is_mask, operator.inputs):
            low, high = _wider(*spans[next(name for name in operator.inputs if name != mask)])
            found[operator.outputs[0]] = over(low - HIDDEN_BELOW, high)
            depths[mask] = max(depths.get(mask, 0.0), high - low + HIDDEN_BELOW)
    return found | {mask: over(-depth, 0.0) for mask, depth in depths.items()}


def hidden(encodings: Mapping[str, Encoding], mask: str) -> float:
    """What a mask adds to a score that must not be seen: its lowest integer."""
    encoding = encodings[mask + ENTRY]
    return -encoding.zero * encoding.scale


class _Sets:
    """Sets of names that grow together (union-find)."""

    def __init__(self) -> None:
        self.above: dict[str, str] = {}

    def of(self, name: str) -> str:
        """The name that stands for a name's set."""
        while name in self.above:
            name = self.above[name]
        return name

    def join(self, names: Sequence[str]) -> None:
        """Makes the names' sets one."""
        first = self.of(names[0])
        for name in map(self.of, names[1:]):
            if name != first:
                self.above[name] = first


def _together(operators: Iterable[Operator]) -> _Sets:
    """Sets of the values that have one encoding."""
    found = _Sets()
    for operator in operators:
        moved = operator.kind in MOVING
        if moved or LAST in operator.inputs:  # the product with `last` moves one token
            found.join([name for name in (*operator.inputs, *operator.outputs) if name != LAST and not name.startswith(STATIC)])
    return found


def write_encodings(encodings: Encodings, path: Path) -> None:
    """Writes encodings as {name: [scale, zero, bits]}."""
    told = {name: [each.scale, each.zero, each.bits] for name, each in sorted(encodings.items())}
    path.write_text(json.dumps(told, indent=0) + "\n", encoding="utf-8")


def read_encodings(path: Path) -> Encodings:
    """The inverse of `write_encodings`.

    Raises:
        BundleError: the file holds no encodings.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        told = json.loads(path.read_text(encoding="utf-8"))
        return {name: _checked(*values) for name, values in told.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path} holds no encodings ({error}): export the bundle again") from None


def _checked(scale: Any, zero: Any, bits: Any) -> Encoding:
    good = isinstance(scale, float) and math.isfinite(scale) and scale > 0 and bits in (8, 16)
    if not good or type(zero) is not int or not 0 <= zero < 1 << bits:
        raise ValueError(f"{scale!r}, {zero!r} and {bits!r} are no scale, zero and bits")
    return Encoding(scale, zero, bits)
