"""The result of `lobit eval` as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table

from lobit.runtime.eval_view import CHANGED, CHANGED_NOTE, benchmark_rows, changed_rows, heading, notes
from lobit.tables import _table


def evaluation(result: dict[str, Any]) -> Group:
    """What each model reaches, then what changed between them."""
    return Group(_reached(result), *([_changed(result)] if result["pairs"] else []))


def _reached(result: dict[str, Any]) -> Table:
    columns = [heading(column) for column in result["columns"]]
    table = _table("", "benchmark", "items", *columns, right=("items", *columns))
    for label, items, figures in benchmark_rows(result):
        table.add_row(label, items, *figures)
    return _noted(table, "\n".join(notes(result)))


def _changed(result: dict[str, Any]) -> Table:
    table = _table("answers that changed", *CHANGED, right=CHANGED[3:])
    for row in changed_rows(result):
        table.add_row(*row)
    return _noted(table, CHANGED_NOTE)


def _noted(table: Table, note: str) -> Table:
    """A table with a note below it."""
    table.caption, table.caption_justify, table.caption_style = note, "left", ""
    return table
