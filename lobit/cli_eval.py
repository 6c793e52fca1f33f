"""The command that measures how good a model is: eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lobit.cli_options import Json, Threads, app, print_json, read_text


@app.command(
    name="eval",
    epilog="Examples: lobit eval bundle --tasks arc_easy.jsonl --limit 200  |  "
    "lobit eval bundle --reference ./SmolLM2-135M --tasks arc_easy.jsonl --tasks piqa.jsonl  |  lobit eval demo --text novel.txt --json",
)
def evaluate(
    subjects: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE|CKPT|MODEL...",
            help="Answers are compared with those of the first float model; without one, of the first checkpoint or bundle.",
        ),
    ],
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            "--tasks", metavar="FILE", help="JSON lines: query, choices, gold; or context, continuation. May be given several times."
        ),
    ] = None,
    texts: Annotated[
        list[Path] | None, typer.Option("--text", metavar="FILE", help="A text, for its perplexity. May be given several times.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Items of each task, and windows of each text, at most.")] = None,
    shots: Annotated[int, typer.Option("--shots", min=0, max=1000, help="Items of each task that are solved examples, not asked.")] = 0,
    stages: Annotated[
        str | None, typer.Option("--stages", help="Of float, fake_quant, artifact; default: all that the models given have.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="MODEL", help="The bundles' float model: measured too, and rounded as they are.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="Where finished items are kept; default: ~/.cache/lobit/eval.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """How good is it, and which answers did quantization change?

    Accuracy on tasks and perplexity of texts, as lm-evaluation-harness counts them, with standard errors; and the answers that changed
    between the stages, with an exact test. A run that was killed goes on where it stopped.
    """
    from lobit import tables_eval, verbs
    from lobit.progress import bar
    from lobit.tables import show

    with bar() as shown:
        result = verbs.eval(
            subjects,
            tasks or (),
            texts=[(path.stem, read_text(path)) for path in texts or ()],
            limit=limit,
            shots=shots,
            stages=stages.split(",") if stages else None,
            reference=reference,
            threads=threads,
            cache=cache,
            progress=shown.count,
        )
    print_json(result) if as_json else show(tables_eval.evaluation(result))
