"""The result of `lobit eval` as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from lobit.runtime.eval_view import CHANGED, CHANGED_NOTE, benchmark_rows, changed_rows, heading, notes, unchanged
from lobit.tables import _table


def evaluation(result: dict[str, Any]) -> Group:
    """What each model reaches, then what changed between them."""
    changed, same = changed_rows(result), unchanged(result)
    flips: list[RenderableType] = ["", _changed(changed), CHANGED_NOTE] if changed else []
    return Group(_reached(result), *notes(result), *flips, *([same] if same else []))


def _reached(result: dict[str, Any]) -> Table:
    columns = [heading(column) for column in result["columns"]]
    table = _table("", "benchmark", "items", *columns, right=("items", *columns))
    table.columns[0].no_wrap = True
    for label, items, figures in benchmark_rows(result):
        table.add_row(label, items, *figures)
    return table


def _changed(rows: list[list[str]]) -> Table:
    table = _table("answers that changed", *CHANGED, right=CHANGED[3:])
    for row in rows:
        table.add_row(*row)
    return table
