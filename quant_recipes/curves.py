"""The course of a training, written as a table and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lobit.quant_recipes.train import Row

TABLE_FILE, PICTURE_FILE = "training.csv", "training.png"
SMOOTH = 50
"""Parts into which a training is divided; the line of the loss is a running mean over one part."""


def write_curves(rows: Sequence[Row], folder: Path, title: str) -> None:
    """Writes `training.csv`, with a line for every step, and `training.png`, with loss and learning rate by steps and by minutes."""
    with (folder / TABLE_FILE).open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Row)])
        table.writeheader()
        table.writerows(asdict(row) for row in rows)
    _draw(rows, folder / PICTURE_FILE, title)


def _draw(rows: Sequence[Row], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    steps, losses = [row.step for row in rows], [row.loss for row in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    loss = figure.add_subplot()
    loss.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
    loss.plot(steps, smooth(losses), color="tab:blue", label="loss")
    loss.set(title=title, xlabel="step", ylabel="loss, nats a token")
    minutes = sum(row.seconds for row in rows) / len(rows) / 60
    if minutes > 0:
        functions: Any = (lambda step: step * minutes, lambda minute: minute / minutes)
        loss.secondary_xaxis("top", functions=functions).set_xlabel(f"minutes, at {60 * minutes:.1f} s a step")
    rate = loss.twinx()
    rate.plot(steps, [row.learning_rate for row in rows], color="tab:orange", linestyle="--", label="learning rate")
    rate.set(ylabel="learning rate", ylim=(0, None))
    loss.legend(handles=[loss.lines[1], rate.lines[0]], loc="upper right")
    figure.savefig(path, dpi=120)


def smooth(values: Sequence[float]) -> list[float]:
    """The running mean: each value averaged with those before it, over 1 / `SMOOTH` of all values."""
    width = max(1, len(values) // SMOOTH)
    return [sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(values))]
