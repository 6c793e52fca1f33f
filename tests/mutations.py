"""Damage to files, the same in every run: JSON values, header bytes, plain bytes; and what may come of it."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from lobit.errors import MOST_LISTED, LobitError
from lobit.runtime.manifest import FILE_NAME, FileEntry, sealed

LONGEST = 5.0
"""Seconds that any file may take, on a machine that is busy with other things."""
LONGEST_LINE = 4000
"""Characters of a line of a message: no file is repeated in it."""
DEEP: Any = []
for _ in range(60):
    DEEP = [DEEP]
ABSURD: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 7, 255, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 10**400),
    *(0.0, 0.5, 1.0, -0.5, 8.0, 1e-300, 1e30, 1e308, math.nan, math.inf, -math.inf),
    *("", "x", "0", "128", "true", "\ud800", "\0", "../x", "/etc/passwd", "a\nb", "x" * 5_000, "<unk>"),
    *([], [None], [0], [1, 2, 3], ["x"] * 3, [[]], [-1], [10**400], {}, {"a": 1}, {"type": "x"}, {"": {"": []}}, DEEP),
]
Place = tuple[Any, ...]
"""Keys and indices that lead to a value."""


def places(value: Any, above: Place = ()) -> Iterator[Place]:
    """Every place in a document, its top excepted."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in entries:
        yield (*above, key)
        yield from places(item, (*above, key))


def parent(document: Any, place: Place) -> Any:
    for key in place[:-1]:
        document = document[key]
    return document


def at(document: Any, place: Place) -> Any:
    return parent(document, place)[place[-1]]


def without(document: Any, place: Place) -> Any:
    """A copy that lacks one value."""
    damaged = copy.deepcopy(document)
    del parent(damaged, place)[place[-1]]
    return damaged


def replaced(document: Any, place: Place, value: Any) -> Any:
    """A copy with another value in one place."""
    damaged = copy.deepcopy(document)
    parent(damaged, place)[place[-1]] = copy.deepcopy(value)
    return damaged


def every_single(document: Any) -> Iterator[Any]:
    """Each value left out, and each replaced by each absurd one."""
    for place in places(document):
        yield without(document, place)
        for value in ABSURD:
            yield replaced(document, place, value)


class Damage:
    """A stream of damage."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def json(self, document: Any, times: int = 1) -> Any:
        """A copy with `times` places damaged."""
        for _ in range(times):
            found = list(places(document))
            if found:
                document = self._one(document, self.random.choice(found), found)
        return document

    def _one(self, document: Any, place: Place, found: list[Place]) -> Any:
        value = at(document, place)
        kind = self.random.randrange(6)
        if kind == 0:
            return without(document, place)
        if kind == 1:
            return replaced(document, place, at(document, self.random.choice(found)))
        if kind == 2 and isinstance(value, int) and not isinstance(value, bool):
            near = [value + 1, value - 1, -value, value * 2, value // 2, value << 40, value + 0.5 if abs(value) < 1 << 53 else -1]
            return replaced(document, place, self.random.choice(near))
        if kind == 3 and isinstance(value, str) and value:
            return replaced(document, place, self.text(value))
        if kind == 4 and isinstance(value, list) and value:
            return replaced(document, place, self.random.choice([value + value[-1:], value[::-1], value[1:], [value], value * 3]))
        if kind == 5 and isinstance(value, dict):
            return replaced(document, place, {**value, self.random.choice(["x", "type", "", *map(str, value)]): self.random.choice(ABSURD)})
        return replaced(document, place, self.random.choice(ABSURD))

    def text(self, text: str) -> str:
        """One character changed, or some left out or doubled."""
        start = self.random.randrange(len(text) + 1)
        end = min(len(text), start + self.random.randrange(4))
        other = ["", chr(self.random.randrange(1, 0x3000)), text[start:end] * 2, "{{", "}}", "{%", '"', "\\", "0", "9" * 20]
        return text[:start] + self.random.choice(other) + text[end:]

    def bytes(self, data: bytes, times: int = 1) -> bytes:
        """Bits flipped, bytes overwritten, left out, put in, or the end cut off."""
        damaged = bytearray(data)
        for _ in range(times):
            start = self.random.randrange(len(damaged) + 1)
            length = self.random.randrange(1, 9)
            kind = self.random.randrange(5)
            if kind == 0 and start < len(damaged):
                damaged[start] ^= 1 << self.random.randrange(8)
            elif kind == 1:
                damaged[start : start + length] = self.random.randbytes(length)
            elif kind == 2:
                del damaged[start : start + length]
            elif kind == 3:
                damaged[start:start] = self.random.randbytes(length)
            else:
                del damaged[start:]
        return bytes(damaged)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or the message with which it refuses; anything else, or a long wait, fails the test."""
    start = perf_counter()
    try:
        return call()
    except LobitError as error:
        message = str(error)
        lines = message.split("\n")
        assert len(lines) <= MOST_LISTED + 2 and max(map(len, lines)) < LONGEST_LINE, message[:2000]
        message.encode("utf-8")  # no half of a surrogate pair
        return Refusal(message)
    finally:
        assert perf_counter() - start < LONGEST


class Refusal(str):
    """The message of an error that a user can act on."""


def dumped(document: Any) -> str:
    """JSON with NaN and Infinity, as Python and other writers produce it."""
    return json.dumps(document)


def refused(work: Callable[[], Any]) -> str:
    """The one message with which some work is refused."""
    with pytest.raises(LobitError) as caught:
        work()
    return str(caught.value)


def reseal(bundle: Path, edit: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """Makes the manifest agree with the files as they are now, and with itself: what no accident does."""
    values = json.loads((bundle / FILE_NAME).read_text(encoding="utf-8"))
    for entry in values["files"]:
        entry.update({key: value for key, value in vars(FileEntry.of(bundle, entry["path"], "")).items() if key in ("bytes", "sha256")})
    edit(values)
    (bundle / FILE_NAME).write_text(sealed(values), encoding="utf-8")
