"""What tables and the report show of an evaluation: its JSON as rows of text."""

from __future__ import annotations

from typing import Any

MEASURES = {
    "accuracy": "",
    "accuracy_bytes": "per byte",
    "accuracy_without_context": "less that without the question",
    "perplexity": "perplexity",
    "word_perplexity": "perplexity of words",
    "byte_perplexity": "perplexity of bytes",
    "bits_per_byte": "bits a byte",
}
"""How rows name what is measured; accuracy has a task's plain name."""
CERTAIN = 0.05
"""Probability below which a difference is marked."""


LONG = 1e5
"""The least perplexity that is written with an exponent."""


def heading(column: dict[str, Any]) -> str:
    """A model's name and, in a second line, its stage, or its target where it is a bundle."""
    return f"{column['name']}\n{column['target'] if column['stage'] == 'artifact' else column['stage']}"


def title(column: dict[str, Any]) -> str:
    """The same in one line."""
    return heading(column).replace("\n", " ")


def unchanged(result: dict[str, Any]) -> str:
    """A sentence on the models that answered all as another did; empty where there are none."""
    columns = result["columns"]
    flips: dict[tuple[int, int], int] = {}
    for pair in result["pairs"]:
        key = pair["base"], pair["other"]
        flips[key] = flips.get(key, 0) + pair["lost"] + pair["gained"]
    alike = [f"{title(columns[other])} as {title(columns[base])}" for (base, other), count in flips.items() if not count]
    return f"all answers the same: {', '.join(alike)}" if alike else ""


def benchmark_rows(result: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """A table as the papers have it: benchmark and measure, number of items, and the figure of each model; at the end the average."""
    rows = []
    for task in result["tasks"]:
        found = {row["column"]: row["metrics"] for row in result["rows"] if row["task"] == task["name"]}
        measures = list(dict.fromkeys(measure for metrics in found.values() for measure in metrics))
        for measure in measures:
            figures = [figure(measure, found.get(column, {}).get(measure)) for column in range(len(result["columns"]))]
            first = measure == measures[0]
            label = " ".join([task["name"] if first else " ", MEASURES.get(measure, measure)]).rstrip()
            rows.append((label, f"{task['items']:,}" if first else "", figures))
    if result["averages"]:
        rows.append(("average", "", [figure("accuracy", average) for average in result["averages"]]))
    return rows


def figure(measure: str, found: dict[str, float] | None) -> str:
    """A figure with its standard error; shares in percent."""
    if found is None:
        return "–"
    if measure.startswith("accuracy"):
        return f"{100 * found['value']:.2f} ± {100 * found['se']:.2f}"
    shape = ",.3f" if found["value"] < LONG else ".2e"
    return f"{found['value']:{shape}} ± {found['se']:{shape}}"


def changed_rows(result: dict[str, Any]) -> list[list[str]]:
    """The answers that changed: benchmark, from, to, lost, gained, difference in percent, probability; where none did there is no row."""
    names = [title(column) for column in result["columns"]]
    return [
        [
            f"{pair['task']} {MEASURES.get(pair['metric'], pair['metric'])}".rstrip(),
            names[pair["base"]],
            names[pair["other"]],
            str(pair["lost"]),
            str(pair["gained"]),
            f"{100 * pair['difference']:+.2f} ± {100 * pair['se']:.2f}",
            f"{pair['p']:.2g}{' *' if pair['p'] < CERTAIN else '  '}",
        ]
        for pair in result["pairs"]
        if pair["lost"] or pair["gained"]
    ]


CHANGED = ("benchmark", "from", "to", "lost", "gained", "difference", "p")
CHANGED_NOTE = (
    "lost: right before, wrong now; p: of a split as uneven as this or more, if both ways were equally likely (exact, two-sided); "
    f"*: below {CERTAIN}"
)


def notes(result: dict[str, Any]) -> list[str]:
    """What has to be known to read the figures."""
    chance = [f"{task['name']} {100 * task['chance']:.3g}" for task in result["tasks"] if task.get("chance")]
    cut = [f"{row['cut']} of {row['task']}" for row in result["rows"] if row["column"] == 0 and row["cut"]]
    found = ["accuracy in %, with its standard error" + (f"; by chance: {', '.join(chance)}" if chance else "")]
    found += [f"{result['shots']} solved examples before each question"] if result.get("shots") else []
    found += [f"items that lost their beginning, to fit into {result['context']} tokens: {', '.join(cut)}"] if cut else []
    return found
