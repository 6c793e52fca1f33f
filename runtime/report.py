"""`lobit report`: makes a self-contained page from the JSON that the other verbs write."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from lobit.atomic_folder import publish
from lobit.errors import InputError
from lobit.runtime import eval_view, report_plots
from lobit.runtime.report_canvas import number, percent, seconds, size
from lobit.runtime.report_eval import accuracies
from lobit.runtime.report_results import ACCEPTED, Result, group, read, text_of

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def report(paths: list[Path], out: Path, command: str = "") -> Path:
    """Writes the page.

    Args:
        paths: JSON of parity, bench, eval, verify, build and manifests, of any number of bundles.
        out: the HTML file; replaced only when the page is complete.
        command: the command that made the report, to be shown in it.

    Returns:
        `out`.

    Raises:
        InputError: there is no file, files are no results (all are named), or `out` cannot be written.
    """
    paths, out = [Path(path) for path in paths], Path(out)
    if not paths:
        raise InputError(f"there is no result to report: give {ACCEPTED}")
    if out.is_dir() or any(path.resolve() == out.resolve() for path in paths):
        raise InputError(f"{out} is {'a folder' if out.is_dir() else 'one of the results'}: give another name with -o")
    page = render(read(paths), command).encode("utf-8", "replace")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(page)
        publish(partial, out)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}): give another place with -o") from None
    finally:
        partial.unlink(missing_ok=True)
    return out


def render(results: Sequence[Result], command: str = "") -> str:
    """The HTML of the page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        number=number,
        size=size,
        percent=percent,
        seconds=seconds,
        plain=text_of,
        pretty=lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        tally=lambda items: Counter(items).items(),
    )
    bundles = group(results)
    told = [{**result.values, "rows": None} for result in results if result.kind == "bench"]
    evals = [result.values for result in results if result.kind == "eval"]
    evals = [one for i, one in enumerate(evals) if one not in evals[:i]]
    colours = {one.name: one.colour for one in bundles}
    conditions = [one for i, one in enumerate(told) if one not in told[:i]]
    untimed = dict.fromkeys(one.told for one in bundles if one.calls)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        bundles=bundles,
        conditions=conditions,
        untimed=[one for one in untimed if not any(one in other and one != other for other in untimed)],
        evals=[(one, accuracies(one, colours)) for one in evals],
        view=eval_view,
        plots=report_plots.plots(bundles),
        command=re.sub(r"^\S*[/\\]", "", command),
    )
