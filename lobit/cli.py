"""The command line: parses, calls the function of the same name in `verbs`, prints.

stdout is the result, a table or with `--json` one JSON object; progress goes to stderr.
Exit 0: done; 1: a gate failed; 2: a mistake or a missing part, in one message; 130: interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from lobit.errors import InputError
from lobit.memory import check_address_space
from lobit.trouble import MISTAKE, one_message

if TYPE_CHECKING:
    from lobit.quant_recipes.recipe import Recipe

app = typer.Typer(
    name="lobit",
    help="A trained language model on a phone, with proof that what runs there is what was trained.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

RecipeName = Annotated[str, typer.Option("--recipe", help="Name of the catalogue (`lobit recipes`).")]
Except = Annotated[list[str] | None, typer.Option("--except", help="Layers that stay in floating point, such as 'layers.*.mlp.down'.")]
GroupSize = Annotated[int | None, typer.Option("--group-size", help="Weights that share a scale, instead of the recipe's.")]
KVCache = Annotated[Literal["int8", "float"] | None, typer.Option("--kv-cache", help="Instead of the recipe's.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Where to write; must not exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Threads = Annotated[int | None, typer.Option("-t", "--threads", min=1, help="Of the runtime; default: one per core.")]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that `lobit export` wrote.")]
Source = Annotated[str, typer.Argument(metavar="MODEL|CKPT", help="A float model, or a quantized checkpoint.")]
Target = Annotated[str, typer.Option("--target", help="xnnpack.")]
FloatRecipe = Annotated[str | None, typer.Option("--recipe", help="For a float model (`lobit recipes`).")]
Context = Annotated[int | None, typer.Option("--context", help="Tokens to hold; default: the model's, at most 2048.")]
Chunk = Annotated[int | None, typer.Option("--chunk", help="Most tokens in one prefill call; default: 512.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a hub name, or 'demo'.")]


@app.callback()
def _before() -> None:
    check_address_space()


def _print_json(result: dict[str, Any]) -> None:
    typer.echo(json.dumps(result, indent=2, ensure_ascii=False))


def _numbers(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    """`128,512` as numbers."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < least:
        raise InputError(f"{option} {text!r} is no list of whole numbers from {least}: give one such as 128,512")
    return values


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): give a text file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a text file") from None


@app.command(epilog="Example: lobit demo --out demo-out")
def demo(out: Annotated[Path, typer.Option("-o", "--out", help="A new folder.")] = Path("demo-out")) -> None:
    """The shipped model through everything, to report.html."""
    from lobit import verbs
    from lobit.progress import announce

    with announce() as on_step:
        report_path = verbs.demo(out, on_step=on_step)
    results = {name: json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in ("verify", "parity", "bench")}
    from lobit import tables

    for name, table in (("verify", tables.verify), ("parity", tables.parity), ("bench", tables.bench)):
        tables.show(table(results[name]))
    typer.echo(f"\nreport: {report_path}\nnext:   lobit run {out}/demo-8da4w-g32 --prompt 'Once'")
    if not (results["verify"]["passed"] and results["parity"]["passed"]):
        raise typer.Exit(1)


@app.command(epilog="Examples: lobit recipes  |  lobit recipes 8da4w-g32 --model demo")
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One recipe.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Show what happens to each of its layers.")] = None,
    exclude: Except = None,
    group_size: GroupSize = None,
    kv_cache: KVCache = None,
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
        _print_json({"recipes": [recipe.to_json() for recipe in found]}) if as_json else tables.show(tables.recipes(found))
        return
    recipe = verbs.choose_recipe(name, exclude or (), group_size, kv_cache)
    if model is None:
        _print_json(recipe.to_json()) if as_json else typer.echo(json.dumps(recipe.to_json(), indent=2))
        return
    fates = verbs.recipes(recipe, model)
    if as_json:
        _print_json({"recipe": recipe.to_json(), "layers": [dataclasses.asdict(fate) for fate in fates]})
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
    as_json: Json = False,
) -> None:
    """Sizes, memory and time of an export, and every reason why not, before any slow work."""
    from lobit import tables, verbs

    found = verbs.plan(model, _chosen(recipe, exclude, group_size, kv_cache), target, context=context, chunk=chunk)
    _print_json(found.to_json()) if as_json else tables.show(tables.plan(found))
    if found.problems:
        raise typer.Exit(1)


def _chosen(recipe: str | None, exclude: list[str] | None, group_size: int | None, kv_cache: str | None) -> Recipe | None:
    """The recipe that is named, with its changes."""
    from lobit import verbs

    if recipe is None and (exclude or group_size or kv_cache):
        raise InputError("--except, --group-size and --kv-cache change a recipe: name it with --recipe")
    return None if recipe is None else verbs.choose_recipe(recipe, exclude or (), group_size, cast("verbs.make.KVCache | None", kv_cache))


@app.command(epilog="Example: lobit quantize ./SmolLM2-135M --recipe 8da4w-g32 -o checkpoint")
def quantize(
    model: ModelArgument,
    recipe: RecipeName,
    out: Out,
    exclude: Except = None,
    group_size: GroupSize = None,
    kv_cache: KVCache = None,
    as_json: Json = False,
) -> None:
    """Post-training quantization into a checkpoint folder."""
    from lobit import tables, verbs
    from lobit.progress import bar

    chosen = verbs.choose_recipe(recipe, exclude or (), group_size, kv_cache)
    tables.show(tables.fates(verbs.recipes(chosen, model)), error=True)
    with bar() as shown:
        path = verbs.quantize(model, chosen, out, shown.count)
    _print_json({"checkpoint": str(path), "recipe": chosen.to_json()}) if as_json else typer.echo(f"checkpoint: {path}")


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
    as_json: Json = False,
) -> None:
    """Lowers a model for a target and writes a bundle."""
    from lobit import tables, verbs
    from lobit.progress import bar

    chosen = _chosen(recipe, exclude, group_size, kv_cache)
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
    _print_json(json.loads(manifest.to_json())) if as_json else tables.show(tables.manifest(manifest))


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
    _print_json(result) if as_json else tables.show(tables.verify(result))
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
        _print_json(result)
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
            _read_text(text),
            tokens=tokens,
            checkpoint=checkpoint,
            stages=stages.split(","),
            threads=threads,
            progress=shown.count,
        )
    result["text"] = text.name
    _print_json(result) if as_json else tables.show(tables.parity(result))
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
            prompts=_numbers(prompts, "-p"),
            generates=_numbers(generates, "-n"),
            depths=_numbers(depths, "-d", least=0),
            threads=threads,
            repetitions=repetitions,
            progress=shown.count,
        )
    _print_json(result) if as_json else tables.show(tables.bench(result))


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
    _print_json(result) if as_json else tables.show(tables.doctor(result))
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
