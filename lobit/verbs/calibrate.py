"""Quantization on a calibration text.

Imports are inside the functions: what a verb does not need is not loaded.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobit.errors import InputError

if TYPE_CHECKING:
    from lobit.model import Config, Transformer
    from lobit.progress_callback import Progress
    from lobit.quant_recipes.recipe import Recipe

SAMPLES, LENGTH = 128, 512
"""Sequences, and tokens in each; Spectra's appendix A.1 has 512 of 2048, which takes sixteen times as long."""
RANGED, RANGED_LENGTH = 8, 256
"""The same for the ranges of activations, of which 2 048 tokens cost 0.001 nats a token and 512 cost 0.0015."""
CALIBRATION_FILE = "calibration.json"
"""The file in a checkpoint that has every layer's error."""


@dataclass(frozen=True)
class Calibration:
    """The text that a recipe is calibrated on, and how it is used."""

    text: str
    samples: int | None = None
    """Sequences; fewer where the text has fewer. None: `SAMPLES`, or `RANGED` for the ranges of activations."""
    length: int | None = None
    """Tokens of a sequence; None: the model's context, at most `LENGTH`, or `RANGED_LENGTH` for the ranges of activations."""
    act_order: bool = True
    """Whether the weights of inputs with the largest mean square are rounded first, onto scales of the weights before any rounding."""
    seed: int = 0
    """Seed of the choice of sequences."""

    def to_json(self) -> dict[str, Any]:
        """All fields, with the text's sha256 in the place of the text."""
        return asdict(self) | {"text": hashlib.sha256(self.text.encode()).hexdigest()}


def calibrated(
    source: Path, recipe: Recipe, given: Calibration, progress: Progress | None = None
) -> tuple[Transformer, dict[str, Any]]:
    """The converted model of a float folder under a recipe, rounded on a calibration text, and what the calibration found.

    Args:
        source: the float folder, with tokenizer.json.
        recipe: as `Recipe.calibrated` gives it.
        given: the text, and how much of it.
        progress: called as calibration, then conversion advances.

    Returns:
        The model, and `{"sequences", "asked", "length", "act_order", "seed", "layers": [{"name", "nearest", "gptq"}]}`. A layer's two
        figures are its squared error on the text as a share of its squared output: rounded to nearest, and by GPTQ.

    Raises:
        InputError: the model is quantized already, the recipe has nothing to calibrate, or the text is too short.
        RecipeError: the recipe does not fit the model.
        ModelError: the model or its tokenizer cannot be read.
    """
    from lobit.checkpoint import load_config, load_model
    from lobit.quant_recipes.apply import check, convert
    from lobit.quant_recipes.calibration import calibrate
    from lobit.quant_recipes.corpus import sequences_of
    from lobit.quant_recipes.quantized import check_float
    from lobit.tokenizer import Tokenizer

    check_float(source)
    if not recipe.is_calibrated:
        raise InputError(f"recipe {recipe.name} has nothing that GPTQ could round on a text: leave --calibration out, or take 8da4w-g32")
    config = load_config(source)
    check(config, recipe)
    length = min(config.max_context, LENGTH) if given.length is None else given.length
    if length > config.max_context:
        raise InputError(f"a sequence of {length} tokens is longer than the model's context of {config.max_context}: take at most that")
    tokenizer = Tokenizer.from_folder(source, config.vocab_size)
    samples = SAMPLES if given.samples is None else given.samples
    sequences = sequences_of(tokenizer.encode(given.text, bos=False), samples, length, given.seed, tokenizer.bos)
    model = load_model(source, config)
    found = calibrate(model, recipe, sequences, act_order=given.act_order, progress=progress)
    result = {
        "sequences": len(sequences),
        "asked": samples,
        "length": length,
        "act_order": given.act_order,
        "seed": given.seed,
        "layers": [error._asdict() for error in found.errors],
    }
    return convert(model, recipe, progress, calibrated=found.integers), result


def ranging_sequences(source: Path, config: Config, given: Calibration, context: int) -> tuple[tuple[int, ...], ...]:
    """Sequences of a text on which the ranges of activations are found.

    Args:
        source: the model's folder, with tokenizer.json.
        config: its configuration.
        given: the text, and how much of it.
        context: positions that the program holds.

    Raises:
        InputError: the text or a sequence is too short, a sequence too long, or an order of rounding is asked for.
        ModelError: the tokenizer cannot be read.
    """
    from lobit.quant_recipes.corpus import sequences_of
    from lobit.tokenizer import Tokenizer

    if not given.act_order:
        raise InputError("--in-order is for rounding by GPTQ, and with --activations int16 a text gives ranges alone: leave it out")
    length = min(context, RANGED_LENGTH) if given.length is None else given.length
    if not 2 <= length <= context:
        raise InputError(f"a sequence of {length} tokens is outside of 2 to the program's context of {context}: choose one inside")
    tokenizer = Tokenizer.from_folder(source, config.vocab_size)
    samples = RANGED if given.samples is None else given.samples
    found = sequences_of(tokenizer.encode(given.text, bos=False), samples, length, given.seed, tokenizer.bos)
    return tuple(tuple(sequence) for sequence in found.tolist())
