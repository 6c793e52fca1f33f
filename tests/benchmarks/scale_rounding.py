"""What it costs that a shipped scale has 8 significant bits: KL against the float model with rounded and with unrounded scales.

    python tests/benchmarks/scale_rounding.py MODEL TEXT [--except PATTERN] [--tokens N]

Prints one row per recipe: mean KL in nats a token, with its standard error, both ways.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from lobit.checkpoint import load_config, load_model, resolve
from lobit.quant_recipes import grid
from lobit.quant_recipes.apply import convert
from lobit.quant_recipes.catalog import find_recipe
from lobit.quant_recipes.recipe import Recipe
from lobit.runtime.parity import kl_divergence, log_softmax
from lobit.runtime.reference import ReferenceEngine
from lobit.tokenizer import Tokenizer

RECIPES = ("8da4w-g32", "8da8w")


def divergence(folder: Path, recipe: Recipe, tokens: list[int]) -> NDArray[np.float64]:
    """KL(float ‖ fake-quantized) at every position of the text, read in sequences of the model's context."""
    config = load_config(folder)
    length = min(config.max_context, 512)
    reference, rounded = ReferenceEngine(load_model(folder)), ReferenceEngine(convert(load_model(folder), recipe), recipe)
    pieces = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    read = [[log_softmax(engine.read(piece)(range(len(piece)))) for engine in (reference, rounded)] for piece in pieces]
    return np.concatenate([kl_divergence(*pair) for pair in read])


def described(values: NDArray[np.float64]) -> str:
    """Mean and standard error."""
    return f"{values.mean():.6f} ± {values.std() / np.sqrt(len(values)):.6f}"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--except", dest="exclude", action="append", default=[])
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    tokens = Tokenizer.from_folder(folder).encode(arguments.text.read_text(encoding="utf-8"))[: arguments.tokens]
    print(f"{'recipe':12} {'rounded scales':24} unrounded scales")
    for name in RECIPES:
        recipe = find_recipe(name).with_changes(tuple(arguments.exclude))
        rounded = divergence(folder, recipe, tokens)
        with mock.patch.object(grid, "round_scale", lambda scale: scale.clamp(min=grid.SMALLEST_SCALE)):
            unrounded = divergence(folder, recipe, tokens)
        print(f"{name:12} {described(rounded):24} {described(unrounded)}")


if __name__ == "__main__":
    main()
