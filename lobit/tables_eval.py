"""The result of `lobit eval` as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from lobit.tables import _table

MEASURES = {
    "accuracy": "",
    "accuracy_bytes": "per byte",
    "accuracy_without_context": "without context off",
    "perplexity": "perplexity",
    "word_perplexity": "perplexity of words",
    "byte_perplexity": "perplexity of bytes",
    "bits_per_byte": "bits a byte",
}
"""How tables name what is measured; accuracy is a task's plain name."""
CERTAIN = 0.05
"""Probability below which a difference is marked; that of a fair coin, told as it is, stands beside it."""


def evaluation(result: dict[str, Any]) -> Group:
    """What each model reaches, then what changed between them."""
    tables: list[RenderableType] = [_reached(result)]
    if result["pairs"]:
        tables.append(_changed(result))
    return Group(*tables)


def heading(column: dict[str, Any]) -> str:
    """A model's name with its stage, and with its target where it is a bundle."""
    stage = column["stage"] if column["stage"] != "artifact" else column["target"]
    return f"{column['name']}\n{stage}"


def _reached(result: dict[str, Any]) -> Table:
    """A table as the papers have it: benchmarks down, models across."""
    columns = [heading(column) for column in result["columns"]]
    table = _table("", "benchmark", "items", *columns, right=("items", *columns))
    for task in result["tasks"]:
        rows = [row for row in result["rows"] if row["task"] == task["name"]]
        for measure in rows[0]["metrics"]:
            figures = [_figure(measure, row["metrics"][measure]) for row in rows]
            first = measure == next(iter(rows[0]["metrics"]))
            label = " ".join([task["name"] if first else " ", MEASURES[measure]]).rstrip()
            table.add_row(label, f"{task['items']:,}" if first else "", *figures)
    if result["averages"]:
        table.add_row("average", "", *(_figure("accuracy", average) for average in result["averages"]))
    table.caption, table.caption_justify, table.caption_style = "\n".join(_notes(result)), "left", ""
    return table


def _figure(measure: str, found: dict[str, float]) -> str:
    if measure.startswith("accuracy"):
        return f"{100 * found['value']:.2f} ± {100 * found['se']:.2f}"
    return f"{found['value']:,.3f} ± {found['se']:.3f}"


def _notes(result: dict[str, Any]) -> list[str]:
    chance = [f"{task['name']} {100 * task['chance']:.0f}" for task in result["tasks"] if task.get("chance")]
    cut = [f"{row['cut']} of {row['task']}" for row in result["rows"] if row["column"] == 0 and row["cut"]]
    notes = ["accuracy in %, with its standard error" + (f"; by chance: {', '.join(chance)}" if chance else "")]
    notes += [f"{result['shots']} solved examples before each question"] if result["shots"] else []
    notes += [f"items whose beginning did not fit into {result['context']} tokens and was left out: {', '.join(cut)}"] if cut else []
    return notes


def _changed(result: dict[str, Any]) -> Table:
    """The answers that changed, both ways."""
    right = ("lost", "gained", "difference", "p")
    table = _table("answers that changed", "benchmark", "from", "to", *right, right=right)
    names = [heading(column).replace("\n", " ") for column in result["columns"]]
    for pair in result["pairs"]:
        label = f"{pair['task']} {MEASURES[pair['metric']]}".rstrip()
        figures = str(pair["lost"]), str(pair["gained"]), f"{100 * pair['difference']:+.2f} ± {100 * pair['se']:.2f}"
        table.add_row(label, names[pair["base"]], names[pair["other"]], *figures, _probability(pair["p"]))
    note = "lost: right before, wrong now; p: of a split as uneven or more, if both ways were equally likely (exact, two-sided); * below "
    table.caption, table.caption_justify, table.caption_style = f"{note}{CERTAIN}", "left", ""
    return table


def _probability(value: float) -> str:
    return f"{value:.2g}{' *' if value < CERTAIN else '  '}"
