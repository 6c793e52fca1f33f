"""Evaluates models on tasks and texts, item by item, and compares their answers in pairs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobit.errors import InputError
from lobit.progress_callback import Progress
from lobit.runtime.engine import Engine
from lobit.runtime.eval_cache import Kept, key_of
from lobit.runtime.eval_metrics import Answers, answers, paired, share, target_perplexity, text_figures
from lobit.runtime.eval_requests import Encoder, Query, beginning_of, queries
from lobit.runtime.eval_scoring import Reader, Score
from lobit.runtime.eval_tasks import Task

if TYPE_CHECKING:
    from lobit.tokenizer import Tokenizer

COST = {"float": 1, "fake_quant": 2, "artifact": 1}
"""Time that a token takes in each stage, relative to the float model's, for the estimate of the time left."""


@dataclass(frozen=True)
class Column:
    """A model in one stage.

    Attributes:
        name: of the model or bundle.
        stage: `float`, `fake_quant` or `artifact`.
        target: of a bundle; empty: PyTorch runs it.
        recipe: by name; empty: none.
        tokenizer: its own.
        context: the most tokens that it holds.
        origin: a digest of the quantized weights that it was made from; empty: it is a float model.
        key: all that its figures depend on besides tokens, as JSON values.
        open: gives the engine, with room for so many tokens at least.
    """

    name: str
    stage: str
    target: str
    recipe: str
    tokenizer: Tokenizer
    context: int
    origin: str
    key: Mapping[str, Any]
    open: Callable[[int], Engine]


@dataclass(frozen=True)
class Text:
    """A text to read, with the name that tables give it."""

    name: str
    text: str


@dataclass
class _Part:
    """A task or a text as one column reads it."""

    what: Task | Text
    found: list[Query]
    sizes: list[int]
    """Bytes of the text in each window; empty for a task."""
    read: str = ""
    """The text as far as it is read."""
    beginning: tuple[int, ...] = ()
    """Tokens of a task's examples."""

    def __post_init__(self) -> None:
        self.keys = [key_of(query, self.beginning) for query in self.found]
        self.costs = [sum({one.context: len(one.context) for one in query.asked}.values()) + _asked(query) for query in self.found]


def _asked(query: Query) -> int:
    return sum(one.count for one in query.asked)


def evaluate(
    columns: Sequence[Column],
    tasks: Sequence[Task],
    texts: Sequence[Text],
    *,
    limit: int | None,
    folder: Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates every column on the same items, cut to the context of the column that holds least.

    Args:
        columns: the models; all others are compared with the first.
        tasks: with their examples, and not more items than are wanted.
        texts: whose perplexity is asked.
        limit: windows of each text, at most; None: all.
        folder: where finished items are kept.
        progress: called with (column and task, tokens done, tokens in all).

    Returns:
        The result of `lobit eval`.

    Raises:
        InputError: an item does not fit, or the folder cannot be written to.
        BundleError: logits are not finite.
    """
    context = min(column.context for column in columns)
    parts = [_parts(column, context, tasks, texts, limit) for column in columns]  # what cannot be read is refused before any slow work
    total = sum(COST[column.stage] * sum(sum(part.costs) for part in found) for column, found in zip(columns, parts, strict=True))
    run = _Run(folder, total, progress)
    scores = [run.column(column, found) for column, found in zip(columns, parts, strict=True)]
    rows, right = [], []
    for place, (found, of_column) in enumerate(zip(parts, scores, strict=True)):
        told = [_row(place, part, part_scores) for part, part_scores in zip(found, of_column, strict=True)]
        rows += [row for row, _ in told]
        right.append([answered for _, answered in told])
    return {
        "kind": "eval",
        "context": context,
        "columns": [
            {"name": one.name, "stage": one.stage, "target": one.target or "reference", "recipe": one.recipe or "none"} for one in columns
        ],
        "tasks": [_described(part) for part in parts[0]],
        "rows": rows,
        "averages": _averages(rows, len(columns)),
        "pairs": _pairs(columns, tasks, right),
        "speed": run.speed,
    }


def _parts(column: Column, context: int, tasks: Sequence[Task], texts: Sequence[Text], limit: int | None) -> list[_Part]:
    encoder = Encoder(column.tokenizer, context)
    asked = [_Part(task, queries(task, encoder), [], beginning=beginning_of(task, encoder)) for task in tasks]
    return [*asked, *(_windows(text, encoder, limit) for text in texts)]


def _windows(text: Text, encoder: Encoder, limit: int | None) -> _Part:
    """The windows of a text, and the bytes of it that each reads."""
    ids, ends = encoder.tokenizer.encode_ends(text.text)
    if not ids:
        raise InputError(f"{text.name} has no token: give a text")
    asked = list(itertools.islice(encoder.rolling(ids), limit))
    last = list(itertools.accumulate(one.count for one in asked))
    begins = [0, *(ends[count - 1] for count in last)]
    begins[-1] = len(text.text) if last[-1] == len(ids) else begins[-1]
    sizes = [len(text.text[start:end].encode()) for start, end in itertools.pairwise(begins)]
    return _Part(text, [Query((one,)) for one in asked], sizes, text.text[: begins[-1]])


class _Run:
    """Reads what is not kept, and counts it."""

    def __init__(self, folder: Path, total: int, progress: Progress | None) -> None:
        self.folder, self.total, self.progress, self.done = folder, total, progress, 0
        self.speed: list[dict[str, Any]] = []

    def column(self, column: Column, parts: Sequence[_Part]) -> list[list[list[Score]]]:
        """The likelihoods of every item of every part; those of items that are not kept are computed and kept."""
        kept = Kept(self.folder, column.key)
        try:
            engine: Engine | None = None
            for place, part in enumerate(parts):
                missing = [number for number, key in enumerate(part.keys) if key not in kept.scores]
                self._count(column, part, sum(part.costs) - sum(part.costs[number] for number in missing))
                if missing:
                    engine = engine or column.open(max(len(asked.tokens) for one in parts for query in one.found for asked in query.asked))
                    self._read(column, place, part, missing, engine, kept)
            return [[kept.scores[key] for key in part.keys] for part in parts]
        except KeyboardInterrupt as error:
            error.add_note(f"finished items are kept in {self.folder}: the same command goes on from there")
            raise
        finally:
            kept.close()

    def _read(self, column: Column, place: int, part: _Part, missing: Sequence[int], engine: Engine, kept: Kept) -> None:
        reader, start = Reader(engine, part.beginning), time.monotonic()
        for number in missing:
            kept.add(part.keys[number], reader.score(part.found[number].asked))
            self._count(column, part, part.costs[number])
        self.speed.append({"task": place, "column": column.name, "stage": column.stage, "items": len(missing)})
        self.speed[-1]["seconds"] = round(time.monotonic() - start, 3)

    def _count(self, column: Column, part: _Part, tokens: int) -> None:
        self.done += COST[column.stage] * tokens
        if self.progress:
            self.progress(f"{column.name} {column.stage}: {part.what.name}", self.done, self.total)


def _row(column: int, part: _Part, scores: list[list[Score]]) -> tuple[dict[str, Any], Answers]:
    """The figures of a column on a task, and which items it answered right."""
    row: dict[str, Any] = {"task": part.what.name, "column": column, "items": len(part.found)}
    row["cut"] = sum(query.is_cut for query in part.found)
    if isinstance(part.what, Text):
        nats = [-score[0][0] for score in scores]
        return row | {"metrics": text_figures(part.read, nats, part.sizes)}, {}
    right = answers(part.what, scores)
    metrics = {name: share(values) for name, values in right.items()}
    return row | {"metrics": metrics if part.what.is_choice else metrics | {"perplexity": target_perplexity(scores)}}, right


def _described(part: _Part) -> dict[str, Any]:
    """A task or text as the result tells it."""
    if isinstance(part.what, Text):
        return {"name": part.what.name, "type": "text", "items": len(part.found), "bytes": sum(part.sizes)}
    task = part.what
    kind = "multiple_choice" if task.is_choice else "last_words"
    chance = sum(1 / len(item.choices) for item in task.items) / len(task.items) if task.is_choice else 0.0
    return {"name": task.name, "type": kind, "items": len(task.items), "sha256": task.sha256, "chance": chance}


def _averages(rows: Sequence[dict[str, Any]], columns: int) -> list[dict[str, float]]:
    """The mean accuracy of each column over the tasks, which count the same; empty where there is but one task."""
    found = []
    for column in range(columns):
        shares = [row["metrics"]["accuracy"] for row in rows if row["column"] == column and "accuracy" in row["metrics"]]
        if len(shares) > 1:
            error = sum(one["se"] ** 2 for one in shares) ** 0.5
            found.append({"value": sum(one["value"] for one in shares) / len(shares), "se": error / len(shares)})
    return found


def _pairs(columns: Sequence[Column], tasks: Sequence[Task], right: Sequence[Sequence[Answers]]) -> list[dict[str, Any]]:
    """Each column against the first, and each artifact against the fake-quantized model that it was made from."""
    wanted = [(0, other) for other in range(1, len(columns))]
    for base, other in itertools.permutations(range(len(columns)), 2):
        stages = columns[base].stage, columns[other].stage
        if base and stages == ("fake_quant", "artifact") and columns[base].origin == columns[other].origin:
            wanted.append((base, other))
    return [
        {"task": task.name, "metric": name, "base": base, "other": other, **paired(values, right[other][place][name])}
        for base, other in wanted
        for place, task in enumerate(tasks)
        for name, values in right[base][place].items()
    ]
