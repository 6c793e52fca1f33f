"""The ablation's figures as tables and as one picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lobit.runtime.host import cpu

MARKERS = {"float": "*", "groups of 32": "o", "per channel": "s", "no distillation": "x"}
FOUR_BITS = ("groups of 32", "per channel", "no distillation")
"""Tables of INT4 weights."""
BITS = "bits a weight, scales and embedding counted"
FEWEST_NAMED_RIGHT = 2.5
"""Bits: names of rows with fewer stand on the left, out of the way of their neighbours."""
TICKS = (1.3, 1.35, 1.4, 1.5, 1.6, 1.8, 2, 3, 5, 10, 20, 25, 30, 35, 40, 50, 60, 70, 80, 100, 200)


def write_report(found: Sequence[dict[str, Any]], scale: dict[str, Any], command: str, path: Path) -> None:
    """Writes `path`.md, .json and .png."""
    floats = {row["seed"]: row["perplexity"] for row in found if row["table"] == "float"}
    means = [summary(list(group), floats) for _, group in groupby(found, key=lambda row: (row["table"], row["method"]))]
    told = {"command": command, "cpu": cpu()["name"], "scale": scale, "rows": list(found)}
    path.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(tables(means, told), encoding="utf-8")
    draw(means, path.with_suffix(".png"))


def summary(seeds: Sequence[dict[str, Any]], floats: Mapping[int, float]) -> dict[str, Any]:
    """Means over the seeds, and half of what lies between the least and the most.

    `more` is the perplexity less that of the same seed's float model.
    """
    first = seeds[0]
    found = {key: first[key] for key in ("table", "method", "bits_per_weight", "trained_tokens")}
    series = {key: [row[key] for row in seeds] for key in ("perplexity", "kl", "top1")}
    if all(row.get("accuracy") is not None for row in seeds):
        series["accuracy"] = [row["accuracy"] for row in seeds]
    series["more"] = [row["perplexity"] - floats[row["seed"]] for row in seeds]
    for key, values in series.items():
        found |= {key: statistics.mean(values), f"{key}_spread": (max(values) - min(values)) / 2}
    return found


def tables(means: Sequence[dict[str, Any]], told: dict[str, Any]) -> str:
    """Markdown."""
    has_accuracy = any("accuracy" in row for row in means)
    cloze = " Cloze: the share of questions about stories that is answered right, 12.5 % by chance; –: not measured." * has_accuracy
    lines = [f"`{told['command']}`, {told['cpu']}; means of 3 seeds ± half their range; held-out text.{cloze}", ""]
    head = "| | method | bits a weight | trained tokens | perplexity | more than the float model | KL | top-1 |"
    lines += [head + " cloze |" * has_accuracy, "|---|---|--:|--:|--:|--:|--:|--:|" + "--:|" * has_accuracy]
    table = None
    for row in means:
        name = row["table"] if row["table"] != table else ""
        table = row["table"]
        more = f"{row['more']:+.4f} ± {row['more_spread']:.4f}"
        figures = [f"{row['perplexity']:.3f} ± {row['perplexity_spread']:.3f}", more, f"{row['kl']:.4f} ± {row['kl_spread']:.4f}"]
        tokens = f"{row['trained_tokens'] / 1e6:.2f} M" if row["trained_tokens"] else "–"
        cells = [name, row["method"], f"{row['bits_per_weight']:.2f}", tokens, *figures, f"{row['top1']:.1%}"]
        cells += [_accuracy(row)] if has_accuracy else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _accuracy(row: Mapping[str, Any]) -> str:
    """The share of right answers, where all seeds have one."""
    return f"{row['accuracy']:.1%} ± {row['accuracy_spread']:.1%}" if "accuracy" in row else "–"


def front(means: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Bits and perplexity of every row that no other beats in both."""
    points = sorted((row["bits_per_weight"], row["perplexity"]) for row in means)
    best, found = float("inf"), []
    for bits, perplexity in points:
        if perplexity < best:
            best = perplexity
            found.append((bits, perplexity))
    return found


def draw(means: Sequence[dict[str, Any]], path: Path) -> None:
    """Bits a weight against perplexity with the Pareto front; beside it what four bits cost, closer."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    whole, close = figure.subplots(1, 2)
    (reference,) = (row for row in means if row["table"] == "float")
    for table, group in groupby(means, key=lambda row: row["table"]):
        members = list(group)
        x, y, spread = ([row[key] for row in members] for key in ("bits_per_weight", "perplexity", "perplexity_spread"))
        drawn = whole.errorbar(x, y, spread, fmt=_marker(table), capsize=3, label=table)
        if table in FOUR_BITS:
            colour = drawn.lines[0].get_color()
            more, spread = ([row[key] for row in members] for key in ("more", "more_spread"))
            close.errorbar(x, more, spread, fmt=_marker(table), capsize=3, color=colour, label=table)
    whole.step(*zip(*front(means), strict=True), where="post", color="0.6", linewidth=1, label="Pareto front", zorder=0)
    whole.set(title="every method", xlabel=BITS, ylabel="perplexity on held-out text", xscale="log", yscale="log", xlim=(1.5, 22))
    whole.set_xticks([2, 3, 4, 6, 8, 16], ["2", "3", "4", "6", "8", "16"])
    lowest, highest = whole.get_ylim()
    ticks = [tick for tick in TICKS if lowest < tick < highest]
    whole.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    whole.minorticks_off()
    whole.legend(fontsize=8)
    close.axhline(0, color="0.6", linewidth=1, linestyle="--")
    close.set(title="four bits in the layers", xlabel=BITS, ylabel=f"perplexity more than the float model's {reference['perplexity']:.2f}")
    least, most = close.get_xlim()
    close.set_xlim(least, most + 0.6 * (most - least))
    close.legend(fontsize=8, loc="upper right")
    four = [row for row in means if row["table"] in FOUR_BITS]
    for axes, rows, key in ((whole, [row for row in means if row not in four], "perplexity"), (close, four, "more")):
        for bits, column in groupby(sorted(rows, key=_bits), key=_bits):
            _name(axes, list(column), key, left=bits < FEWEST_NAMED_RIGHT)
    figure.savefig(path, dpi=110)


def _marker(table: str) -> str:
    return MARKERS.get(table, "D" if "scratch" in table else "^")


def _bits(row: dict[str, Any]) -> float:
    return float(row["bits_per_weight"])


def _name(axes: Axes, column: Sequence[dict[str, Any]], key: str, left: bool) -> None:
    """Writes each row's method beside its point, one name above the other."""
    to_axes = axes.transData + axes.transAxes.inverted()
    last = -1.0
    for row in sorted(column, key=lambda row: row[key]):
        x, y = to_axes.transform((row["bits_per_weight"], row[key]))
        last = max(y - 0.01, last + 0.04)
        text = row["method"].replace("groups of 32, ", "").replace("per channel, ", "")
        text += ", no distillation" if row["table"] == "no distillation" else ""
        note = axes.annotate(
            text,
            (row["bits_per_weight"], row[key]),
            xytext=(x - 0.025 if left else x + 0.025, last),
            ha="right" if left else "left",
            textcoords="axes fraction",
            fontsize=7,
            arrowprops={"arrowstyle": "-", "color": "0.8", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        )
        note.set_in_layout(False)
