"""Task files of `lobit eval`: JSON lines, each a question with choices, or a text and how it goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lobit.errors import InputError, listed, shown, shown_name
from lobit.tokenizer_files import is_unicode

LONGEST_LINE = 1 << 20
"""Bytes of a line: a thousand times those of a long question."""
LARGEST_TASK = 256 << 20
"""Bytes of a task file."""
MOST_CHOICES = 256
SETTINGS = ("name", "cue", "delimiter", "without_context")
"""Keys of a first line that says how the others are read."""
BETWEEN = "\n\n"
"""What is between two examples, and before the question, as lm-evaluation-harness has it."""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        line: its line in the file, from 1.
        prompt: the text before a choice and its delimiter.
        choices: what may follow; one, where the right words alone are known.
        gold: index of the right one.
    """

    line: int
    prompt: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """A task file that was read.

    Attributes:
        name: what tables call it.
        path: the file.
        sha256: of the file.
        items: those to answer.
        is_choice: whether there are choices; otherwise the right words must be the likeliest.
        delimiter: what is between a prompt and a choice.
        without_context: the text that stands for no question, where the likelihood of a choice after it is taken off; None: it is not.
        examples: solved items before every question; empty: none.
    """

    name: str
    path: Path
    sha256: str
    items: tuple[Item, ...]
    is_choice: bool
    delimiter: str = " "
    without_context: str | None = None
    examples: str = ""

    def with_shots(self, shots: int) -> Task:
        """The task with its first items as solved examples before each of the others.

        Raises:
            InputError: there are no others.
        """
        if shots >= len(self.items):
            raise InputError(f"{self.path} has {len(self.items)} items, and {shots} of them would be examples: give a smaller --shots")
        solved = (f"{item.prompt}{self.delimiter}{item.choices[item.gold]}{BETWEEN}" for item in self.items[:shots])
        return replace(self, items=self.items[shots:], examples="".join(solved))

    def first(self, limit: int | None) -> Task:
        """The task with its first items alone; None: all."""
        return replace(self, items=self.items[:limit])


def read_task(path: Path) -> Task:
    """Reads a task file and checks every line.

    Raises:
        InputError: the file cannot be read, has no items, or lines are not as they should be; all of these are named.
    """
    problems: list[str] = []
    settings: dict[str, Any] = {}
    items: list[Item] = []
    kinds: set[bool] = set()
    digest = hashlib.sha256()
    for number, raw in _lines(path):
        digest.update(raw)
        try:
            values = _parsed(raw, first=number == 1)
            if values and number == 1 and not {"query", "context"} & values.keys():
                settings = _settings(values)
            elif values:
                items.append(_item(number, values, settings))
                kinds.add("query" in values)
                if len(kinds) > 1:
                    raise ValueError("the lines before have the other fields: questions with choices and texts need a file each")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise InputError(listed(problems, f"{path} is no task to evaluate:"))
    if not items:
        raise InputError(f"{path} has no items: give JSON lines such as " + '{"query": "…", "choices": ["…", "…"], "gold": 0}')
    kept = {key: settings[key] for key in ("delimiter", "without_context") if key in settings}
    return Task(shown_name(settings.get("name") or path.stem), path, digest.hexdigest(), tuple(items), True in kinds, **kept)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers.

    Raises:
        InputError: it cannot be read, is too large, or has a line that is too long.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size > LARGEST_TASK:
                raise InputError(f"{path} has {size} bytes, at most {LARGEST_TASK} are read: split it into several task files")
            for number in itertools.count(1):
                raw = file.readline(LONGEST_LINE + 1)
                if len(raw) > LONGEST_LINE:
                    raise InputError(f"{path} line {number} has more than {LONGEST_LINE} bytes: give one item a line")
                if not raw:
                    return
                yield number, raw
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a task file, JSON lines") from None


def _parsed(raw: bytes, first: bool) -> dict[str, Any]:
    """The object of a line, empty where the line is blank.

    Raises:
        ValueError: the line is no UTF-8, or no JSON object.
    """
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start} of the line): save the file as UTF-8") from None
    if not text.strip():
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({str(error)[:80]}): give one object a line") from None
    if not isinstance(values, dict):
        raise ValueError(f"{shown(values)} is no object: give one with query, choices and gold, or with context and continuation")
    return values


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    unknown = [key for key in values if key not in SETTINGS]
    if unknown:
        raise ValueError(f"neither query nor context is there, and {shown(unknown[0])} is no setting: settings are {', '.join(SETTINGS)}")
    for key, value in values.items():
        _check_text(value, key)
    return values


def _item(line: int, values: dict[str, Any], settings: dict[str, Any]) -> Item:
    """The item of a line.

    Raises:
        ValueError: a field is missing or not usable.
    """
    is_choice = "query" in values
    wanted = ("query", "choices", "gold") if is_choice else ("context", "continuation")
    missing = [key for key in wanted if key not in values]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: an item has {', '.join(wanted)}")
    context = values[wanted[0]]
    _check_text(context, wanted[0])
    if not context.strip():
        raise ValueError(f"{wanted[0]} is empty: a model needs some text before what it continues")
    choices = values["choices"] if is_choice else [values["continuation"]]
    _check_choices(choices, is_choice)
    gold = values["gold"] if is_choice else 0
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise ValueError(f"gold is {shown(gold)}: give the index of the right one of {len(choices)} choices, from 0")
    return Item(line, _prompt(context, settings), tuple(choices), gold)


def _check_choices(choices: Any, is_choice: bool) -> None:
    if not isinstance(choices, list) or not (1 + is_choice) <= len(choices) <= MOST_CHOICES:
        count = f"{len(choices)} choices" if isinstance(choices, list) else f"choices {shown(choices)}"
        raise ValueError(f"{count}: give a list of 2 to {MOST_CHOICES} texts")
    for number, choice in enumerate(choices):
        name = f"choice {number}" if is_choice else "continuation"
        _check_text(choice, name)
        if not choice.strip():
            raise ValueError(f"{name} is empty: it has no likelihood")


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}: give a text")
    if not is_unicode(value):
        raise ValueError(f"{name} has half a surrogate pair, which is no character")


def _prompt(context: str, settings: dict[str, Any]) -> str:
    """A query with the cue that asks for the answer.

    A query that begins with `Question:` is followed by a line `Answer:` where the file says nothing else: with it the prompts of ARC and
    PIQA are lm-evaluation-harness's.
    """
    if "cue" in settings:
        return f"{context}{settings['cue']}"
    return f"{context.rstrip()}\nAnswer:" if context.startswith("Question:") else context
