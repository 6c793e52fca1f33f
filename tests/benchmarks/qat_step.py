"""What a step of quantization-aware training costs beside a float step: `python tests/benchmarks/qat_step.py`.

Each recipe trains a Llama of 23 million parameters from new weights on random tokens, in a process of its own for its peak memory;
the rounds of all recipes take turns. Without a teacher, whose forward pass is the same for every recipe.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from lobit.families import read_config
from lobit.memory import peak_rss_bytes
from lobit.quant_recipes.apply import prepare
from lobit.quant_recipes.catalog import find_recipe
from lobit.quant_recipes.corpus import Corpus
from lobit.quant_recipes.schedule import training_of
from lobit.quant_recipes.train import Run, Trainer, native_precision
from lobit.quant_recipes.trainee import Trainee, new_weights
from lobit.runtime.host import cpu

RECIPES = ("fp", "8da4w-g32", "w4-channel-learned", "bitnet", "bonsai")
VALUES = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
BATCH, LENGTH = 8, 512


def steps(recipe: str, count: int, precision: str) -> None:
    """Trains; prints each step's seconds and the peak memory above what importing took."""
    config, before = read_config(VALUES), peak_rss_bytes()
    chosen = find_recipe(recipe)
    training = replace(training_of(chosen), distillation=0.0, tuning_samples=0)
    tokens = torch.randint(0, config.vocab_size, (64, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    model = prepare(new_weights(config, 0).requires_grad_(True).train(), chosen)
    run = Run(count + 1, BATCH, BATCH, precision, minutes=1e9)
    trainer = Trainer(Trainee(model, chosen), training, Corpus(tokens.int()), run, Path("unused"))
    seconds = [row.seconds for row in trainer.train()][1:]
    print(json.dumps({"seconds": seconds, "bytes": peak_rss_bytes() - before}))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="in a round, after one that is not counted")
    parser.add_argument("--precision", choices=("bf16", "float32"), default=native_precision("cpu"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        steps(arguments.one, arguments.steps, arguments.precision)
        return
    found: dict[str, list[dict[str, list[float] | float]]] = {recipe: [] for recipe in RECIPES}
    for number in range(arguments.rounds):
        for recipe in RECIPES:
            command = [sys.executable, __file__, "--one", recipe, "--steps", str(arguments.steps), "--precision", arguments.precision]
            found[recipe].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(f"round {number + 1} of {arguments.rounds}, {time.strftime('%H:%M:%S')}", file=sys.stderr)
    print(f"{cpu()['name']}, {torch.get_num_threads()} threads, {arguments.precision}, {BATCH} x {LENGTH} tokens a step\n")
    print("| recipe | step, ms | of float | peak memory, MB | of float |\n|---|--:|--:|--:|--:|")
    times = {recipe: statistics.median([second for one in rows for second in one["seconds"]]) for recipe, rows in found.items()}
    sizes = {recipe: statistics.median([one["bytes"] for one in rows]) for recipe, rows in found.items()}
    for recipe in RECIPES:
        ratios = [times[recipe] / times["fp"], sizes[recipe] / sizes["fp"]]
        print(f"| {recipe} | {times[recipe] * 1e3:.0f} | {ratios[0]:.2f} | {sizes[recipe] / 1e6:.0f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
