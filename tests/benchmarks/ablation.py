"""What each recipe costs and wins back, on a small model trained for it: `python tests/benchmarks/ablation.py`.

Trains a Llama on tinyshakespeare and War and Peace with three seeds, then quantizes each of the three by every method, and writes
`ablation.md` (tables), `ablation.png` (bits against perplexity) and `ablation.json` (all figures). About an hour on two cores; what is
finished is kept in the work folder, and the same command goes on from there. With a GPU, `--scale large` trains a larger model longer.
`--model demo` takes the shipped demo model and stories of its grammar instead, some twenty minutes; its tables have accuracy too, on
questions about stories that the grammar itself answers all right (`lobit.demo.cloze`).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lobit.checkpoint import load_model, save_model
from lobit.families import read_config
from lobit.model import Config, Transformer
from lobit.quant_recipes.apply import convert, prepare
from lobit.quant_recipes.calibration import calibrate
from lobit.quant_recipes.catalog import LINEARS, find_recipe
from lobit.quant_recipes.corpus import Corpus, pack
from lobit.quant_recipes.metrics import figures
from lobit.quant_recipes.recipe import Recipe, Rule, WeightGrid
from lobit.quant_recipes.schedule import Training
from lobit.quant_recipes.sizes import checkpoint_bytes
from lobit.quant_recipes.train import Run, Trainer, join, native_precision
from lobit.quant_recipes.trainee import Trainee, new_weights
from tests.benchmarks.ablation_cloze import cloze_accuracy
from tests.benchmarks.ablation_report import write_report

SHARED = Path(__file__).resolve().parents[3] / "shared"
OUT = Path(__file__).parent / "ablation"
SEEDS = (0, 1, 2)
LENGTH = 128
CALIBRATION = 128
"""Sequences."""


@dataclass(frozen=True)
class Scale:
    """How large the model is, and how long it trains.

    Attributes:
        float_steps: of the float model.
        tuning_steps: of quantization-aware training at 4 bits.
        ternary_steps: of every ternary and binary training.
        batch: sequences of `LENGTH` tokens in a step.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    float_steps: int
    tuning_steps: int
    ternary_steps: int
    batch: int


SCALES = {
    "smoke": Scale(512, 64, 128, 2, 20, 4, 4, 4),
    "small": Scale(1024, 192, 512, 6, 1200, 360, 240, 16),
    "demo": Scale(768, 128, 512, 8, 0, 240, 240, 8),
    "large": Scale(2048, 512, 1536, 8, 6000, 1800, 3000, 64),
}


@dataclass(frozen=True)
class Row:
    """One way to a quantized model.

    Attributes:
        table: where it stands.
        method: in words.
        recipe: what ships.
        training: None: without training.
        scratch: from new weights.
        steps: which of the scale's steps.
    """

    table: str
    method: str
    recipe: Recipe
    training: Training | None = None
    scratch: bool = False
    steps: str = "tuning_steps"

    @property
    def name(self) -> str:
        """A file's name."""
        return f"{self.table} {self.method}".lower().replace(",", "").replace(" ", "-")


def int4(group: int | None, learned: bool = False, gptq: bool = False) -> Recipe:
    """INT4 weights in the blocks; all else as the float model, embedding and head half."""
    grid = WeightGrid(4, group, "learned" if learned else "range")
    rule = Rule(LINEARS, grid, rounding="gptq" if gptq else "nearest")
    return Recipe(str(grid), "", (rule,), float_bits=16)


def rows(demo: bool = False) -> list[Row]:
    """All rows, in the order of the tables; of the demo model those that begin with it."""
    tuned = Training(learning_rate=1e-4, distillation=1.0)
    found = []
    for group, where in ((32, "groups of 32"), (None, "per channel")):
        found += [
            Row(where, "PTQ", int4(group)),
            Row(where, "GPTQ", int4(group, gptq=True)),
            Row(where, "QAT, computed ranges", int4(group), tuned),
            Row(where, "QAT, learned ranges", int4(group, learned=True), tuned),
        ]
    alone = replace(tuned, distillation=0.0)
    found += [
        Row("no distillation", "groups of 32, computed ranges", int4(32), alone),
        Row("no distillation", "per channel, learned ranges", int4(None, learned=True), alone),
    ]
    two_stage = Training(learning_rate=2.4e-3, schedule="two_stage", weight_decay=0.1)
    cosine, bonsai = replace(two_stage, schedule="cosine"), Training(1e-2, weight_decay=0.1, optimizer="cautious")
    ternary = (
        ("BitNet", "bitnet", two_stage),
        ("TriLM", "trilm", two_stage),
        ("TriLM, plain cosine", "trilm", cosine),
        ("Bonsai, one stage", "bonsai", bonsai),
        ("Bonsai, two stages", "bonsai", replace(bonsai, tuning_samples=128)),
        ("binary (BiLM)", "bilm", two_stage),
    )
    for scratch, (method, recipe, training) in product((False,) if demo else (False, True), ternary):
        table = "ternary, from scratch" if scratch else "ternary, from the float model"
        found.append(Row(table, method, find_recipe(recipe), training, scratch, "ternary_steps"))
    return found


@dataclass(frozen=True)
class Subject:
    """What is quantized: a float model for every seed, and its text."""

    scale: Scale
    work: Path
    demo: bool
    device: str

    def corpora(self, seed: int) -> tuple[Corpus, Corpus]:
        """To train on, in the seed's order, and held out, the same for all seeds."""
        training, held_out = _sequences(self)
        return Corpus(training, seed), Corpus(held_out)

    def float_model(self, seed: int) -> Transformer:
        """The trained float model."""
        from lobit.demo import FOLDER

        return load_model(FOLDER if self.demo else self.work / f"float-{seed}")

    def new(self, seed: int) -> Transformer:
        """A model with new weights."""
        return new_weights(self.float_model(0).config if self.demo else config_of(self.scale), seed)


def values_of(scale: Scale) -> dict[str, Any]:
    """The model's config.json."""
    return {
        "model_type": "llama",
        "vocab_size": scale.vocabulary,
        "hidden_size": scale.hidden,
        "intermediate_size": scale.intermediate,
        "num_hidden_layers": scale.layers,
        "num_attention_heads": scale.hidden // 32,
        "num_key_value_heads": scale.hidden // 32,
        "head_dim": 32,
        "max_position_embeddings": 2 * LENGTH,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }


def config_of(scale: Scale) -> Config:
    """Its `Config`."""
    return read_config(values_of(scale))


def texts() -> list[str]:
    """The books, without what their publisher put around them."""
    war = (SHARED / "text/war_and_peace.txt").read_text(encoding="utf-8")
    start, end = war.find("*** START"), war.find("*** END")
    war = war[war.index("\n", start) if start >= 0 else 0 : end if end >= 0 else len(war)]
    return [war, (SHARED / "text/tinyshakespeare.txt").read_text(encoding="utf-8")]


@cache
def _sequences(subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of the training text and of the held-out part: the last 5 % of every book, or stories of another seed."""
    if subject.demo:
        return _stories(4000, "ablation"), _stories(250, "held out")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    books = [(book[: int(len(book) * 0.95)], book[int(len(book) * 0.95) :]) for book in texts()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=subject.scale.vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([begin for begin, _ in books], trainer)
    training, held_out = (pack([tokenizer.encode(part).ids for part in parts], LENGTH) for parts in zip(*books, strict=True))
    return training.sequences, held_out.sequences[:: max(1, len(held_out) // 256)]


def _stories(count: int, seed: str) -> torch.Tensor:
    """Beginnings of the demo grammar's stories: the demo model has seen no text that begins in its midst."""
    from lobit.demo import FOLDER
    from lobit.demo.story import STORIES
    from lobit.tokenizer import Tokenizer

    tokenizer, rng = Tokenizer.from_folder(FOLDER), random.Random(seed)
    stories = [tokenizer.encode(STORIES.sample(rng).text) for _ in range(count)]
    return torch.tensor([story[: LENGTH + 1] for story in stories if len(story) > LENGTH], dtype=torch.int32)


def trained(subject: Subject, seed: int, row: Row, folder: Path) -> tuple[Transformer, int]:
    """The model that a row ends with, as its recipe prepares it, and the tokens it saw."""
    steps = getattr(subject.scale, row.steps)
    corpus, _ = subject.corpora(seed)
    assert row.training is not None
    reference = subject.float_model(seed) if row.training.distillation else None
    model = (subject.new(seed) if row.scratch else subject.float_model(seed)).requires_grad_(True).train()
    trainee = Trainee(prepare(model, row.recipe), row.recipe, reference, row.training.distillation)
    batch = subject.scale.batch
    run = Run(steps, batch, batch, native_precision(subject.device), minutes=2.0, device=subject.device)
    trainer = Trainer(trainee, row.training, corpus, run, folder)
    for _ in trainer.train():
        pass
    return trainer.trained(), trainer.rows[-1].tokens


def make_float(subject: Subject, seed: int) -> None:
    """Trains the float model of a seed."""
    place = subject.work / f"float-{seed}"
    if subject.demo or place.is_dir():
        return
    row = Row("float", "float", find_recipe("fp"), Training(2e-3, weight_decay=0.1), True, "float_steps")
    model, _ = trained(subject, seed, row, subject.work / f"training-float-{seed}")
    new = place.with_suffix(".new")
    save_model(model, values_of(subject.scale), new, torch.float32)
    new.rename(place)
    shutil.rmtree(subject.work / f"training-float-{seed}", ignore_errors=True)


def make_row(subject: Subject, seed: int, row: Row) -> dict[str, Any]:
    """The figures of a row for one seed."""
    start = time.monotonic()
    reference, (corpus, held_out) = subject.float_model(seed), subject.corpora(seed)
    folder = subject.work / f"training-{row.name}-{seed}"
    tokens, calibrated = 0, None
    if row.training is not None:
        model, tokens = trained(subject, seed, row, folder)
    else:
        model = subject.float_model(seed)
        if row.recipe.rules and row.recipe.rules[0].rounding == "gptq":
            calibrated = calibrate(subject.float_model(seed), row.recipe, corpus.first(CALIBRATION).sequences[:, :-1].long()).integers
    integer = convert(model, row.recipe, calibrated=calibrated)
    accuracy = cloze_accuracy(integer, row.recipe) if subject.demo else None  # a model of books knows nothing of the grammar's stories
    found = figures(integer.to(subject.device), held_out, row.recipe, reference.to(subject.device))
    parameters = sum(parameter.numel() for parameter in reference.parameters())
    bits = 8 * checkpoint_bytes(reference.config, row.recipe) / parameters
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "table": row.table,
        "method": row.method,
        "seed": seed,
        "bits_per_weight": bits,
        "perplexity": found.perplexity,
        "kl": found.kl,
        "top1": found.top1,
        "accuracy": accuracy,
        "trained_tokens": tokens,
        "seconds": round(time.monotonic() - start, 1),
    }


def work(subject: Subject, seed: int, row: Row | None) -> dict[str, Any] | None:
    """One piece of work in a process of its own: a float model (`row` None), or a row."""
    torch.set_num_threads(1)
    if row is None:
        make_float(subject, seed)
        return None
    place = subject.work / f"{row.name}-{seed}.json"
    if not place.is_file():
        new = place.with_suffix(".new")
        new.write_text(json.dumps(make_row(subject, seed, row)), encoding="utf-8")
        new.rename(place)
    return json.loads(place.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def everything(subject: Subject, jobs: int, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """All rows of all seeds, `jobs` at once; the rows of a seed begin when its float model is there."""
    wanted = [Row("float", "float", find_recipe("fp16")), *rows(subject.demo)]
    found: dict[tuple[int, int], dict[str, Any]] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        floats = {pool.submit(work, subject, seed, None): seed for seed in SEEDS}
        waiting: dict[Future[Any], tuple[int, int]] = {}
        for future in as_completed(floats):
            future.result()
            report(f"float model of seed {floats[future]}")
            waiting |= {pool.submit(work, subject, floats[future], row): (i, floats[future]) for i, row in enumerate(wanted)}
        start = time.monotonic()
        for done, future in enumerate(as_completed(waiting), 1):
            row = found[waiting[future]] = future.result()
            left = (time.monotonic() - start) / done * (len(waiting) - done) / 60
            report(f"{done} of {len(waiting)}: {row['table']}, {row['method']}, seed {row['seed']}; {left:.0f} min left")
    return [found[key] for key in sorted(found)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, help="default: small, or that of the demo model")
    parser.add_argument("--model", choices=("own", "demo"), default="own")
    parser.add_argument("--work", type=Path, default=Path("bench-out/ablation"), help="for what is finished")
    parser.add_argument("--out", type=Path, default=OUT, help="for tables and picture")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once, one thread each")
    arguments = parser.parse_args()
    scale = arguments.scale or ("demo" if arguments.model == "demo" else "small")
    name = scale if scale == arguments.model else f"{arguments.model}-{scale}"
    place = arguments.work / name
    place.mkdir(parents=True, exist_ok=True)
    device, start = join(), time.monotonic()
    subject = Subject(SCALES[scale], place, arguments.model == "demo", device)

    def report(line: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {line}", file=sys.stderr, flush=True)

    found = everything(subject, 1 if device != "cpu" else arguments.jobs, report)
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = f"python tests/benchmarks/ablation.py --scale {scale} --model {arguments.model}"
    write_report(found, asdict(subject.scale), command, arguments.out / name)


if __name__ == "__main__":
    main()
