"""The command line: parses, calls the function of the same name in `verbs`, prints.

stdout is the result, a table or with `--json` one JSON object; progress goes to stderr.
Exit 0: done; 1: a gate failed; 2: a mistake or a missing part, in one message; 130: interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import lobit.cli_learn  # noqa: F401 (its commands)
from lobit.cli_options import (
    BundleArgument,
    Chunk,
    Context,
    Except,
    FloatRecipe,
    GroupSize,
    Json,
    KVCache,
    Mixed,
    ModelArgument,
    Out,
    Source,
    Target,
    Threads,
    app,
    chosen_recipe,
    numbers,
    print_json,
    read_text,
)
from lobit.errors import InputError
from lobit.memory import check_address_space
from lobit.trouble import MISTAKE, one_message

if TYPE_CHECKING:
    pass

@app.callback()
def _before() -> None:
    check_address_space()


@app.command(epilog="Example: lobit demo --out demo-out")
def demo(out: Annotated[Path, typer.Option("-o", "--out", help="A new folder.")] = Path("demo-out")) -> None:
    """The shipped models through everything, to report.html."""
    from lobit import tables, verbs
    from lobit.progress import announce

    with announce() as on_step:
        report_path = verbs.demo(out, on_step=on_step)
    shown = {"verify": tables.verify, "parity": tables.parity, "bench": tables.bench}
    passed = True
    for name in ("verify", "parity", "ternary-verify", "ternary-parity", "bench"):
        result = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        tables.show(shown[name.removeprefix("ternary-")](result))
        passed &= result.get("passed", True)
    typer.echo(f"\nreport: {report_path}\nnext:   lobit run {out}/demo-8da4w-g32 --prompt 'Once'")
    if not passed:
        raise typer.Exit(1)


@app.command(epilog="Examples: lobit recipes  |  lobit recipes 8da4w-g32 --model demo")
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One recipe.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Show what happens to each of its layers.")] = None,
    exclude: Except = None,
    group_size: GroupSize = None,
    kv_cache: KVCache = None,
    mixed: Mixed = None,
    as_json: Json = False,
) -> None:
    """The catalogue; one recipe; the fate of every layer of a model."""
    import dataclasses

    from lobit import tables, verbs
    from lobit.quant_recipes.catalog import CATALOG

    if model is not None and name is None:
        raise InputError(f"--model needs the name of a recipe: lobit recipes {next(iter(CATALOG))} --model {model}")
    if name is None:
        found = list(CATALOG.values())
        print_json({"recipes": [recipe.to_json() for recipe in found]}) if as_json else tables.show(tables.recipes(found))
        return
    recipe = verbs.choose_recipe(name, exclude or (), group_size, kv_cache, mixed or ())
    if model is None:
        print_json(recipe.to_json()) if as_json else typer.echo(json.dumps(recipe.to_json(), indent=2))
        return
    fates = verbs.recipes(recipe, model)
    if as_json:
        print_json({"recipe": recipe.to_json(), "layers": [dataclasses.asdict(fate) for fate in fates]})
    else:
        tables.show(tables.fates(fates))


@app.command(epilog="Example: lobit plan ./SmolLM2-135M --recipe 8da4w-g32 --target xnnpack --context 2048")
def plan(
    model: Source,
    target: Target,
    recipe: FloatRecipe = None,
    context: Context = None,
    chunk: Chunk = None,
    exclude: Except = None,
    group_size: GroupSize = None,
    kv_cache: KVCache = None,
    mixed: Mixed = None,
    detail: Annotated[bool, typer.Option("--detail", help="Bound on decode speed, energy, entropy of the weights.")] = False,
    bandwidth: Annotated[float | None, typer.Option("--bandwidth", min=0.1, help="GB/s, for --detail; default: measured here.")] = None,
    as_json: Json = False,
) -> None:
    """Sizes, memory and time of an export, and every reason why not, before any slow work."""
    from lobit import tables, verbs
    from lobit.progress import bar

    if bandwidth is not None and not detail:
        raise InputError(f"--bandwidth {bandwidth:g} is for the bound on decode speed: add --detail")
    chosen = chosen_recipe(recipe, exclude, group_size, kv_cache, mixed)
    with bar() as shown:
        found = verbs.plan(
            model, chosen, target, context=context, chunk=chunk, detail=detail, bandwidth=bandwidth, progress=shown.count
        )
    if as_json:
        print_json(found.to_json())
    else:
        for table in tables.plan(found):
            tables.show(table)
    if found.problems:
        raise typer.Exit(1)


@app.command(epilog="Example: lobit quantize ./SmolLM2-135M --recipe gptq-w4 --calibration wiki.txt -o checkpoint")
def quantize(
    model: ModelArgument,
    out: Out,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="(`lobit recipes`); without it, a model that was quantized before is taken in.")
    ] = None,
    calibration: Annotated[Path | None, typer.Option("--calibration", metavar="FILE", help="Text for recipes with GPTQ.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Sequences of the calibration text.")] = 512,
    length: Annotated[int | None, typer.Option("--length", min=1, help="Their tokens; default: the context, at most 2048.")] = None,
    act_order: Annotated[bool, typer.Option("--act-order", help="GPTQ rounds the weights of large inputs first.")] = False,
    exclude: Except = None,
    group_size: GroupSize = None,
    kv_cache: KVCache = None,
    mixed: Mixed = None,
    as_json: Json = False,
) -> None:
    """Post-training quantization into a checkpoint folder."""
    from lobit import tables, verbs
    from lobit.progress import bar
    from lobit.verbs.calibrate import CALIBRATION_FILE, Calibration

    chosen = chosen_recipe(recipe, exclude, group_size, kv_cache, mixed)
    given = Calibration(read_text(calibration), samples, length, act_order) if calibration else None
    tables.show(tables.fates(verbs.recipes(chosen, model)), error=True)
    with bar() as shown:
        path = verbs.quantize(model, chosen, out, shown.count, calibration=given)
    found = json.loads((path / CALIBRATION_FILE).read_text(encoding="utf-8")) if given else None
    told = {"checkpoint": str(path), "recipe": json.loads((path / "recipe.json").read_text(encoding="utf-8"))}
    if as_json:
        print_json(told | ({"calibration": found} if found else {}))
        return
    if found:
        tables.show(tables.calibration(found))
    typer.echo(f"checkpoint: {path}")


@app.command(epilog="Example: lobit export ./SmolLM2-135M --recipe 8da4w-g32 --target xnnpack --context 2048 -o bundle")
def export(
    model: Source,
    target: Target,
    out: Out,
    recipe: FloatRecipe = None,
    context: Context = None,
    chunk: Chunk = None,
    exclude: Except = None,
    group_size: GroupSize = None,
    kv_cache: KVCache = None,
    mixed: Mixed = None,
    as_json: Json = False,
) -> None:
    """Lowers a model for a target and writes a bundle."""
    from lobit import tables, verbs
    from lobit.progress import bar

    chosen = chosen_recipe(recipe, exclude, group_size, kv_cache, mixed)
    if chosen is not None:
        tables.show(tables.fates(verbs.recipes(chosen, model)), error=True)
    with bar() as shown:
        manifest = verbs.export(
            model,
            target,
            out,
            recipe=chosen,
            context=context,
            chunk=chunk,
            command=["lobit", *sys.argv[1:]],
            progress=shown.count,
        )
    print_json(json.loads(manifest.to_json())) if as_json else tables.show(tables.manifest(manifest))


@app.command(epilog="Example: lobit verify bundle checkpoint")
def verify(
    bundle: BundleArgument,
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT|MODEL", help="What the bundle was exported from.")],
    as_json: Json = False,
) -> None:
    """Compares a bundle's integers with the checkpoint's.

    Every integer and scale is read back out of the program. Exit 1 where one differs.
    """
    from lobit import tables, verbs

    result = verbs.verify(bundle, checkpoint)
    print_json(result) if as_json else tables.show(tables.verify(result))
    if not result["passed"]:
        raise typer.Exit(1)


@app.command(epilog="Examples: lobit run bundle --prompt 'Once upon a time'  |  lobit run bundle   (a chat)")
def run(
    bundle: BundleArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text to continue; without it: a chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Generates text and prints tokens per second."""
    from lobit import tables, verbs

    if prompt is None:
        lines = _typed_lines() if sys.stdin.isatty() else sys.stdin
        verbs.chat(
            bundle,
            lines,
            _stream,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            threads=threads,
            on_turn=lambda stats: typer.echo(tables.speed(stats), err=True),
        )
        return
    result = verbs.run(
        bundle,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        threads=threads,
        on_text=None if as_json else _stream,
        echo=True,
    )
    if as_json:
        print_json(result)
    else:
        typer.echo()
        typer.echo(tables.speed(result["stats"]), err=True)


def _typed_lines() -> Iterator[str]:
    """Lines typed at a prompt, until end of input."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def _stream(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@app.command(epilog="Example: lobit parity bundle --reference ./SmolLM2-135M --text novel.txt --json")
def parity(
    bundle: BundleArgument,
    reference: Annotated[str, typer.Option("--reference", metavar="MODEL", help="The float model.")],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="What to read.")],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Of the text, at most.")] = 2048,
    checkpoint: Annotated[str | None, typer.Option("--checkpoint", metavar="CKPT", help="Where the model was trained.")] = None,
    stages: Annotated[str, typer.Option("--stages", help="Which to compare.")] = "fake_quant,graph,artifact",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Is what runs there what was trained?

    Distributions against the float model, stage by stage. Exit 1 where a limit is exceeded.
    """
    from lobit import tables, verbs
    from lobit.progress import bar

    with bar() as shown:
        result = verbs.parity(
            bundle,
            reference,
            read_text(text),
            tokens=tokens,
            checkpoint=checkpoint,
            stages=stages.split(","),
            threads=threads,
            progress=shown.count,
        )
    result["text"] = text.name
    print_json(result) if as_json else tables.show(tables.parity(result))
    if not result["passed"]:
        raise typer.Exit(1)


@app.command(epilog="Example: lobit bench bundle -p 128,512 -n 64 -d 0,2048 -t 2")
def bench(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="One or more, measured in turn.")],
    prompts: Annotated[str, typer.Option("-p", "--prompt", help="Tokens to prefill.")] = "128",
    generates: Annotated[str, typer.Option("-n", "--generate", help="Tokens to decode.")] = "64",
    depths: Annotated[str, typer.Option("-d", "--depth", help="Tokens that are in the cache before.")] = "0",
    threads: Threads = None,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1)] = 5,
    as_json: Json = False,
) -> None:
    """Prefill and decode speed, time to first token, memory.

    Each row runs in a process of its own, so that peak memory is honest.
    """
    from lobit import tables, verbs
    from lobit.progress import bar

    with bar() as shown:
        result = verbs.bench(
            bundles,
            prompts=numbers(prompts, "-p"),
            generates=numbers(generates, "-n"),
            depths=numbers(depths, "-d", least=0),
            threads=threads,
            repetitions=repetitions,
            progress=shown.count,
        )
    print_json(result) if as_json else tables.show(tables.bench(result))


@app.command(epilog="Example: lobit report bundle/manifest.json parity.json bench.json verify.json -o report.html")
def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="Of parity, bench, verify; manifests.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page; replaced where it is there.")] = Path("report.html"),
) -> None:
    """One self-contained page from results."""
    from lobit import verbs

    typer.echo(f"report: {verbs.report(results, out)}")


@app.command(epilog="Examples: lobit doctor  |  lobit doctor xnnpack")
def doctor(
    target: Annotated[str | None, typer.Argument(metavar="[TARGET]", help="One target; default: all.")] = None,
    as_json: Json = False,
) -> None:
    """What is installed, what is missing, and how to get it."""
    from lobit import tables, verbs

    result = verbs.doctor(target)
    print_json(result) if as_json else tables.show(tables.doctor(result))
    if not result["passed"]:
        raise typer.Exit(MISTAKE)


def main() -> None:
    """Runs the command line; a user's mistake is one message."""
    command, code = typer.main.get_command(app), 0
    with one_message():
        try:
            with command.make_context("lobit", sys.argv[1:]) as context:
                command.invoke(context)
        except typer.Exit as end:
            code = end.exit_code
        except Exception as error:
            show = getattr(error, "show", None)  # typer's own messages on wrong options
            if show is None:
                raise
            show()
            code = MISTAKE
    sys.exit(code)


if __name__ == "__main__":
    main()
