"""The commands that train, examine and merge weights: train, sensitivity, merge."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lobit.cli_options import (
    Activations,
    Except,
    GroupSize,
    Json,
    KVCache,
    Mixed,
    ModelArgument,
    Out,
    RecipeName,
    Rotate,
    ScaleRule,
    app,
    print_json,
    read_text,
    rotations,
)
from lobit.errors import InputError

if TYPE_CHECKING:
    from lobit.quant_recipes.recipe import Recipe
    from lobit.quant_recipes.schedule import Training

Texts = Annotated[list[Path], typer.Option("--text", metavar="FILE", help="To train on; may be given again.")]
HeldOut = Annotated[Path | None, typer.Option("--held-out", metavar="FILE", help="To measure on; default: the last 5 % of the text.")]
Length = Annotated[int | None, typer.Option("--length", help="Tokens of a sequence; default: the model's context, at most 512.")]
Distillation = Annotated[
    float | None,
    typer.Option("--distillation", min=0.0, max=1.0, help="Share of the loss that is KL from the float model; default: the recipe's."),
]


@app.command(epilog="Example: lobit train ./SmolLM2-135M --recipe bitnet --text wiki.txt --steps 2000 -o checkpoint")
def train(
    model: ModelArgument,
    recipe: RecipeName,
    texts: Texts,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates of the weights.")],
    out: Out,
    held_out: HeldOut = None,
    length: Length = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences in a step.")] = 8,
    micro_batch: Annotated[int | None, typer.Option("--micro-batch", min=1, help="Sequences computed at once; default: all.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="At its peak; default: the recipe's.")] = None,
    distillation: Distillation = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="From new weights; the model gives its shape.")] = False,
    start: Annotated[
        str | None, typer.Option("--from", metavar="CKPT", help="Begin at the integers of a checkpoint, best a calibrated one.")
    ] = None,
    precision: Annotated[
        Literal["bf16", "float32"] | None, typer.Option("--precision", help="Of products; default: bf16 where the hardware has it.")
    ] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Less memory, more time: activations are computed twice.")] = False,
    minutes: Annotated[float, typer.Option("--checkpoint-minutes", min=0.0, help="Between two checkpoints.")] = 5.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order of the text, and of new weights.")] = 0,
    exclude: Except = None,
    group_size: GroupSize = None,
    kv_cache: KVCache = None,
    mixed: Mixed = None,
    scale_rule: ScaleRule = None,
    rotate: Rotate = None,
    activations: Activations = None,
    as_json: Json = False,
) -> None:
    """Quantization-aware training into a checkpoint folder.

    Goes on where it was stopped when the same command is given again. On several devices: torchrun --nproc-per-node N -m lobit.cli train …
    """
    from lobit import tables, verbs
    from lobit.progress import bar
    from lobit.quant_recipes.train import Run, join, native_precision

    chosen = verbs.choose_recipe(recipe, exclude or (), group_size, kv_cache, mixed or (), scale_rule, rotations(rotate), activations)
    told = verbs.Texts([read_text(path) for path in texts], read_text(held_out) if held_out else None, length, seed)
    device = join()
    run = Run(steps, batch, micro_batch or 0, precision or native_precision(device), minutes, device)
    training = _training(chosen, learning_rate, distillation, from_scratch, start is not None)
    with bar() as shown:
        result = verbs.train(
            model,
            chosen,
            told,
            out,
            run=run,
            training=training,
            from_scratch=from_scratch,
            start=start,
            recompute=recompute,
            command=["lobit", *sys.argv[1:]],
            progress=shown.count,
        )
    if run.rank == 0:
        print_json(result) if as_json else tables.show(tables.training(result, out))


def _training(recipe: Recipe, learning_rate: float | None, distillation: float | None, from_scratch: bool, begun: bool) -> Training:
    """How the recipe trains by default, with the changes that the options ask for."""
    from lobit.quant_recipes.schedule import training_of

    training = training_of(recipe, from_scratch, begun)
    if learning_rate is not None:
        if not 0 < learning_rate < 1:
            raise InputError(f"--learning-rate {learning_rate} is outside of 0 to 1: the recipe's own is {training.learning_rate}")
        training = replace(training, learning_rate=learning_rate)
    return training if distillation is None else replace(training, distillation=distillation)


@app.command(epilog="Example: lobit sensitivity ./SmolLM2-135M --recipe 8da4w-g32 --text held-out.txt --budget 5%")
def sensitivity(
    model: ModelArgument,
    recipe: RecipeName,
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="To measure on, not to have trained on.")],
    budget: Annotated[
        str, typer.Option("--budget", metavar="SIZE", help="By how much the checkpoint may grow: a share, or bytes such as 4MB.")
    ] = "5%",
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Of the text, at most; spread over it; default: 2048, fewer for large models.")
    ] = None,
    exclude: Except = None,
    group_size: GroupSize = None,
    mixed: Mixed = None,
    rotate: Rotate = None,
    as_json: Json = False,
) -> None:
    """How far each layer alone moves the model when it is quantized, and --mixed options for those that matter.

    The options are those that take most of the loss for the bytes they add, within --budget. Layers that GPTQ rounds are rounded to
    nearest here.
    """
    from lobit import tables, verbs
    from lobit.progress import bar

    chosen = verbs.choose_recipe(recipe, exclude or (), group_size, mixed=mixed or (), rotate=rotations(rotate))
    with bar() as shown:
        result = verbs.sensitivity(model, chosen, read_text(text), budget=budget, tokens=tokens, progress=shown.count)
    print_json(result) if as_json else tables.show(tables.sensitivity(result))


@app.command(epilog="Example: lobit merge ./code ./reasoning ./facts --text held-out.txt -o merged")
def merge(
    models: Annotated[list[str], typer.Argument(metavar="MODEL MODEL...", help="Float models that were trained from one base.")],
    out: Out,
    weights: Annotated[str | None, typer.Option("--weights", metavar="W,W,...", help="One for each model; scaled to sum to 1.")] = None,
    text: Annotated[Path | None, typer.Option("--text", metavar="FILE", help="Held out: weights are searched on it.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Of the text, at most; spread over it.")] = 4096,
    as_json: Json = False,
) -> None:
    """Averages specialists into one model.

    With --weights those are used; else --text finds the best; else all models count the same.
    """
    from lobit import tables, verbs
    from lobit.progress import bar

    with bar() as shown:
        result = verbs.merge(
            models,
            out,
            weights=None if weights is None else _shares(weights),
            text=None if text is None else read_text(text),
            tokens=tokens,
            progress=shown.count,
        )
    print_json(result) if as_json else tables.show(tables.merge(result))


def _shares(text: str) -> list[float]:
    """Parses weights such as `0.3,0.7`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--weights {text!r} is no list of numbers: give one for each model, such as 0.3,0.7") from None
