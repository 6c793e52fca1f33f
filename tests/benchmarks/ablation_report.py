"""The ablation's figures as tables and as one picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lobit.runtime.host import cpu

MARKERS = {"float": "*", "groups of 32": "o", "per channel": "s", "no distillation": "x"}


def write_report(found: Sequence[dict[str, Any]], scale: dict[str, Any], command: str, path: Path) -> None:
    """Writes `path`.md, .json and .png."""
    means = [summary(list(group)) for _, group in groupby(found, key=lambda row: (row["table"], row["method"]))]
    told = {"command": command, "cpu": cpu()["name"], "scale": scale, "rows": list(found)}
    path.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(tables(means, told), encoding="utf-8")
    draw(means, path.with_suffix(".png"))


def summary(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and half of what lies between the least and the most."""
    first = seeds[0]
    found = {key: first[key] for key in ("table", "method", "bits_per_weight", "trained_tokens")}
    for key in ("perplexity", "kl", "top1"):
        values = [row[key] for row in seeds]
        found |= {key: statistics.mean(values), f"{key}_spread": (max(values) - min(values)) / 2}
    return found


def tables(means: Sequence[dict[str, Any]], told: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"`{told['command']}`, {told['cpu']}; means of 3 seeds ± half their range; held-out text.", ""]
    lines += ["| | method | bits a weight | trained tokens | perplexity | KL | top-1 |", "|---|---|--:|--:|--:|--:|--:|"]
    table = None
    for row in means:
        name = row["table"] if row["table"] != table else ""
        table = row["table"]
        figures = [f"{row['perplexity']:.2f} ± {row['perplexity_spread']:.2f}", f"{row['kl']:.4f} ± {row['kl_spread']:.4f}"]
        tokens = f"{row['trained_tokens'] / 1e6:.2f} M" if row["trained_tokens"] else "–"
        cells = [name, row["method"], f"{row['bits_per_weight']:.2f}", tokens, *figures, f"{row['top1']:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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
    """Bits a weight against perplexity, with the Pareto front."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for table, group in groupby(means, key=lambda row: row["table"]):
        members = list(group)
        x, y = [row["bits_per_weight"] for row in members], [row["perplexity"] for row in members]
        spread = [row["perplexity_spread"] for row in members]
        axes.errorbar(x, y, spread, fmt=MARKERS.get(table, "D" if "scratch" in table else "^"), capsize=3, label=table)
        for row in members:
            at = (row["bits_per_weight"], row["perplexity"])
            axes.annotate(row["method"], at, xytext=(5, 3), textcoords="offset points", fontsize=6)
    axes.step(*zip(*front(means), strict=True), where="post", color="0.6", linewidth=1, label="Pareto front", zorder=0)
    axes.set(xlabel="bits a weight, scales and embedding counted", ylabel="perplexity on held-out text", xscale="log", yscale="log")
    axes.set_xticks([2, 3, 4, 6, 8, 16], ["2", "3", "4", "6", "8", "16"])
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
