"""The report's picture of an evaluation: accuracy with error bars, task by task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib.style
from markupsafe import Markup

from lobit.runtime.eval_view import title
from lobit.runtime.report_canvas import STYLE, WIDTH, Canvas, clipped

HEAD, ROW = 26, 34
"""Heights in pixels of a task's name, and of a model below it."""
OPACITY = {"float": 1.0, "fake_quant": 0.55}
"""Of a mark, by stage: of a bundle's, which has its own colour, 1."""


def accuracies(result: dict[str, Any], colours: Mapping[str, str]) -> Markup | None:
    """Accuracy of each model on each task, as a dot with a bar of one standard error to each side; None where nothing has one.

    Args:
        result: the JSON of `lobit eval`.
        colours: of bundles, by their names.
    """
    tasks = [(task, rows) for task in result["tasks"] if (rows := _rows(result, task["name"]))]
    if not tasks:
        return None
    with matplotlib.style.context(["default", STYLE]):
        canvas = Canvas(sum(HEAD + ROW * len(rows) for _, rows in tasks))
        top = 0.0
        for task, rows in tasks:
            canvas.text(0, top + 14, clipped(task["name"], 54), bold=True)
            top += HEAD
            for row in rows:
                _draw(canvas, top, result["columns"][row["column"]], row["metrics"]["accuracy"], task.get("chance") or 0.0, colours)
                top += ROW
        return canvas.svg("Accuracy on each task")


def _rows(result: dict[str, Any], task: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["task"] == task and "accuracy" in row["metrics"]]


def _draw(canvas: Canvas, top: float, column: dict[str, Any], found: dict[str, float], chance: float, colours: Mapping[str, str]) -> None:
    """A model's line: its name and figure, and below them the scale from 0 to 1 with its mark."""
    value, error = _share(found["value"]), _share(found["se"])
    is_bundle = column["stage"] == "artifact"
    colour, opacity = colours.get(column["name"], "ink") if is_bundle else "ink", OPACITY.get(column["stage"], 1.0)
    canvas.text(0, top + 10, clipped(title(column), 40), "quiet")
    canvas.text(WIDTH, top + 10, f"{100 * value:.1f} ± {100 * error:.1f} %", side="right")
    canvas.box(0, top + 19, WIDTH, 4, "line", 0.55)
    if 0 < chance < 1:
        canvas.box(chance * WIDTH - 1, top + 15, 2, 12, "limit", 0.6)
    canvas.line([max(value - error, 0) * WIDTH, min(value + error, 1) * WIDTH], [top + 21, top + 21], colour, 2)
    canvas.dot(value * WIDTH, top + 21, colour, 4, opacity)


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0
