"""The result of `bench` as a table in llama-bench's manner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.table import Table

COLUMNS = ("model", "size", "params", "target", "recipe", "threads", "test", "t/s", "ttft", "peak RSS", "KV", "GB/s")
PHONE_COLUMNS = ("battery", "thermal")
LEFT = {"model", "target", "recipe", "test", "thermal"}
THERMAL = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
"""Android's names of its thermal statuses, from 0."""


def bench_table(result: Mapping[str, Any]) -> Table:
    """A table with a line for each row, and below it the machine and the rows that were skipped.

    Args:
        result: what `bench` returned.
    """
    bandwidth = result.get("memory_bandwidth_gb_s")
    caption = [result["device"] + (f"; memory bandwidth {bandwidth:.1f} GB/s" if bandwidth else "")]
    for entry in result.get("sustained", ()):
        first, last = drift(entry["samples"])
        caption.append(f"sustained: {entry['model']} {first:.2f} t/s at first, {last:.2f} t/s after {entry['seconds']:.0f} s")
    caption += [f"left out: {entry['model']} {entry['test']}: {entry['why']}" for entry in result["skipped"]]
    table = Table(box=None, pad_edge=False, caption="\n".join(caption), caption_justify="left", caption_style="")
    on_phone = any("before" in row for row in result["rows"])
    for name in COLUMNS + (PHONE_COLUMNS if on_phone else ()):
        table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(*cells(row), *(phone_cells(row) if on_phone else ()))
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
        str(row["threads"] or ""),
        row["test"],
        f"{row['tokens_per_second']:.2f} ± {row['stddev']:.2f}",
        "" if first is None else f"{first:.1f} ms",
        size(row["peak_rss_bytes"]),
        size(row["kv_cache_bytes"]),
        "" if read is None else f"{read:.1f}" + ("" if row["bandwidth_share"] is None else f" ({row['bandwidth_share']:.0%})"),
    ]


def phone_cells(row: Mapping[str, Any]) -> list[str]:
    """The battery's temperature and the phone's thermal status before and after a row; a cell is empty where the phone does not tell."""
    states = [row["before"], row["after"]]
    celsius = [state["battery_celsius"] for state in states]
    thermal = [state["thermal_status"] for state in states]
    names = [THERMAL[status] for status in thermal if status is not None and 0 <= status < len(THERMAL)]
    return ["" if None in celsius else "{:.1f} → {:.1f} °C".format(*celsius), " → ".join(dict.fromkeys(names))]


def drift(samples: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Tokens a second in the first and in the last tenth of a sustained run; 0 where nothing was decoded."""
    speeds = [speed for _, speed in samples]
    part = max(1, len(speeds) // 10)
    return (fmean(speeds[:part]), fmean(speeds[-part:])) if speeds else (0.0, 0.0)


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
