"""Keeps finished items of an evaluation, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lobit.errors import InputError
from lobit.runtime.eval_requests import Query
from lobit.runtime.eval_scoring import Score


class Kept:
    """The finished items of one model in one stage: a file that only grows, one line an item.

    Its name is a digest of the model, so another model, or the same one changed, has another file; the key of an item is a digest of its
    tokens. A line that a kill cut short is left out.

    Args:
        folder: where the files are; made where it is missing.
        model: all that the figures depend on besides an item's tokens, as JSON values.

    Raises:
        InputError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        self.path = folder / f"{_digest(model)}.jsonl"
        self.scores: dict[str, list[Score]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            text = self.path.read_text(encoding="utf-8", errors="replace")
            if text and not text.endswith("\n"):
                os.write(self._descriptor, b"\n")
        except OSError as error:
            raise InputError(f"{folder} cannot be written to ({error.strerror}): choose another folder with --cache") from None
        for line in text.split("\n"):
            self._take(line)

    def _take(self, line: str) -> None:
        try:
            values = json.loads(line)
            scores = [(float(value), bool(greedy)) for value, greedy in values["scores"]]
            if values["sum"] == _digest([values["key"], values["scores"]]):
                self.scores[values["key"]] = scores
        except (ValueError, KeyError, TypeError, RecursionError):
            pass  # a line that was cut short, or damaged: its item is computed again

    def add(self, key: str, scores: Sequence[Score]) -> None:
        """Keeps the figures of an item."""
        self.scores[key] = list(scores)
        pairs = [list(score) for score in scores]
        line = json.dumps({"key": key, "scores": pairs, "sum": _digest([key, pairs])}) + "\n"
        try:
            os.write(self._descriptor, line.encode())
        except OSError as error:
            told = f"{self.path} cannot be written ({error.strerror}): make space, or choose another folder with --cache"
            raise InputError(told) from None

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def key_of(query: Query, beginning: Sequence[int]) -> str:
    """The key of an item: a digest of its tokens, and of the tokens that are read apart before it."""
    return _digest([list(beginning), [[asked.tokens, asked.count] for asked in query.asked]])


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
