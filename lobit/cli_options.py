"""What the commands share: the typer application, options that several of them have, and functions that read and print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lobit.errors import InputError
from lobit.targets import TARGETS

if TYPE_CHECKING:
    from lobit import verbs
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
Mixed = Annotated[
    list[str] | None,
    typer.Option("--mixed", metavar="PATTERN=GRID", help="Another grid for some layers, such as 'layers.0.mlp.down=int8', head=float."),
]
ScaleRule = Annotated[
    Literal["least_squares", "range"] | None,
    typer.Option("--scale-rule", help="How scales are computed from weights; range: MobileLLM-Pro's eq. 4. Default: least_squares."),
]
Rotate = Annotated[
    str | None,
    typer.Option("--rotate", metavar="stream,heads", help="Spreads outliers of INT8 inputs, exactly; stream unties the head."),
]
Calibration = Annotated[
    Path | None, typer.Option("--calibration", metavar="FILE", help="Text to round on by GPTQ: a smaller loss, minutes more.")
]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Sequences of the calibration text; default: 128, int16 8.")]
SampleLength = Annotated[int | None, typer.Option("--length", min=1, help="Their tokens; default: the context, at most 512 or 256.")]
ActOrder = Annotated[
    bool, typer.Option("--act-order/--in-order", help="GPTQ rounds the weights of large inputs first, or in the order of the inputs.")
]
KVCache = Annotated[Literal["int8", "half", "float"] | None, typer.Option("--kv-cache", help="Instead of the recipe's.")]
Activations = Annotated[
    Literal["half", "float"] | None, typer.Option("--activations", help="Of what is computed in floating point, instead of the recipe's.")
]
ProgramActivations = Annotated[
    Literal["half", "float", "int16"] | None,
    typer.Option(
        "--activations", help="Instead of the recipe's half or float; int16: target qnn, integers whose ranges --calibration FILE gives."
    ),
]
Out = Annotated[Path, typer.Option("-o", "--out", help="Where to write; must not exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Threads = Annotated[
    int | None, typer.Option("-t", "--threads", min=1, max=1024, help="Of the runtime; default: the bundle's own, or one per core.")
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="host, adb[:SERIAL] (a phone with lobit's app), emulated-arm64 (the phone's library in an emulator), emulated-x86_64.",
    ),
]
Cpu = Annotated[str | None, typer.Option("--cpu", help="That emulated-arm64 emulates: max, cortex-a76, a64fx.")]
BundleThreads = Annotated[
    int, typer.Option("--threads", min=0, max=1024, help="Of the runtime, written into the bundle; 0: one per core.")
]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that `lobit export` wrote.")]
Source = Annotated[str, typer.Argument(metavar="MODEL|CKPT", help="A float model, or a quantized checkpoint.")]
Target = Annotated[str, typer.Option("--target", help=f"{', '.join(f'{name} ({target.what})' for name, target in TARGETS.items())}.")]
FloatRecipe = Annotated[str | None, typer.Option("--recipe", help="For a float model (`lobit recipes`).")]
Context = Annotated[int | None, typer.Option("--context", help="Tokens to hold; default: the model's, at most 2048.")]
Chunk = Annotated[int | None, typer.Option("--chunk", help="Most tokens in one prefill call; default: 512, 32 for targets qnn and coreml.")]
Soc = Annotated[str | None, typer.Option("--soc", metavar="CHIP", help="Target qnn: to compile for, such as SM8650 (default), SM8750.")]
Float32 = Annotated[bool, typer.Option("--float32", help="Target coreml: compute in float32, not in half precision.")]
ExplicitCache = Annotated[
    bool, typer.Option("--explicit-cache", help="Target coreml: keys and values as inputs and outputs, not as states.")
]
ExecuTorch = Annotated[
    bool, typer.Option("--executorch", help="Target coreml: an ExecuTorch program for its Core ML delegate, with explicit caches.")
]
Smallest = Annotated[bool, typer.Option("--smallest", help="Target gguf: ternary weights in 1.69 bits, where 2.06 are read faster.")]
Portable = Annotated[bool, typer.Option("--portable", help="Target onnx: standard operators alone, for other tools to convert.")]
AllLogits = Annotated[bool, typer.Option("--all-logits", help="Logits of every token of a call, not of the last alone: for evaluation.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a hub name, or 'demo'.")]


def print_json(result: dict[str, Any]) -> None:
    """Prints the result of a command as JSON."""
    typer.echo(json.dumps(result, indent=2, ensure_ascii=False))


def numbers(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    """Parses an option's list of whole numbers, such as `128,512`, each at least `least`."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < least:
        raise InputError(f"{option} {text!r} is no list of whole numbers from {least}: give one such as 128,512")
    return values


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # drops the byte order mark that editors on Windows put first
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): give a text file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a text file") from None


def rotations(text: str | None) -> tuple[str, ...]:
    """Parses the rotations that `--rotate` names, such as `stream,heads`."""
    return () if text is None else tuple(turn.strip() for turn in text.split(","))


def chosen_recipe(
    recipe: str | None,
    exclude: list[str] | None,
    group_size: int | None,
    kv_cache: KVCache,
    mixed: list[str] | None,
    scale_rule: ScaleRule = None,
    rotate: Rotate = None,
    activations: Activations = None,
) -> Recipe | None:
    """The recipe that `--recipe` names, with the changes of the other options; None where none is named."""
    from lobit import verbs

    if recipe is None and (exclude or group_size or kv_cache or activations or mixed or scale_rule or rotate is not None):
        options = "--except, --group-size, --kv-cache, --activations, --mixed, --scale-rule and --rotate"
        raise InputError(f"{options} change a recipe: name it with --recipe")
    if recipe is None:
        return None
    return verbs.choose_recipe(recipe, exclude or (), group_size, kv_cache, mixed or (), scale_rule, rotations(rotate), activations)


def integers_of(activations: ProgramActivations) -> tuple[Literal["half", "float"] | None, Literal["int16"] | None]:
    """What `--activations` says of a recipe, and what of a program."""
    return (None, "int16") if activations == "int16" else (activations, None)


def calibration_on(path: Path | None, samples: int | None, length: int | None, act_order: bool) -> verbs.calibrate.Calibration | None:
    """The calibration that `--calibration` and its further options ask for; None without `--calibration`.

    Raises:
        InputError: the file cannot be read, or its further options are given without it.
    """
    from lobit.verbs.calibrate import Calibration

    if path is None:
        if samples is not None or length is not None or not act_order:
            raise InputError("--samples, --length and --in-order say how a text is calibrated on: give it with --calibration FILE")
        return None
    return Calibration(read_text(path), samples, length, act_order)
