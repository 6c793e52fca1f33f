"""The result of `bench` as a table in llama-bench's manner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

COLUMNS = ("model", "size", "params", "target", "recipe", "threads", "test", "t/s", "ttft", "peak RSS", "KV", "GB/s")
LEFT = {"model", "target", "recipe", "test"}


def bench_table(result: Mapping[str, Any]) -> Table:
    """A table with a line for each row, and below it the machine and the rows that were skipped.

    Args:
        result: what `bench` returned.
    """
    caption = [f"{result['device']}; memory bandwidth {result['memory_bandwidth_gb_s']:.1f} GB/s"]
    caption += [f"left out: {entry['model']} {entry['test']}: {entry['why']}" for entry in result["skipped"]]
    table = Table(box=None, pad_edge=False, caption="\n".join(caption), caption_justify="left", caption_style="")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(*cells(row))
    return table


def cells(row: Mapping[str, Any]) -> list[str]:
    """The cells of a row, in the order of `COLUMNS`; a cell is empty where the test has no such figure."""
    first, read = row["first_token_ms"], row["gigabytes_per_second"]
    return [
        row["model"],
        size(row["model_bytes"]),
        count(row["params"]),
        row["target"],
        str(row["recipe"]),
        str(row["threads"]),
        row["test"],
        f"{row['tokens_per_second']:.2f} ± {row['stddev']:.2f}",
        "" if first is None else f"{first:.1f} ms",
        size(row["peak_rss_bytes"]),
        size(row["kv_cache_bytes"]),
        "" if read is None else f"{read:.1f} ({row['bandwidth_share']:.0%})",
    ]


def size(value: int) -> str:
    """Bytes as `78.2 MB` (10⁶ bytes)."""
    number = float(value)
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def count(value: int) -> str:
    """Parameters as `264 K`, `124.6 M`, `1.08 B`."""
    if value >= 1e9:
        return f"{value / 1e9:.2f} B"
    return f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value / 1e3:.0f} K"
