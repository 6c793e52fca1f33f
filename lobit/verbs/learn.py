"""Training under a recipe."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobit.errors import InputError
from lobit.progress_callback import Progress

if TYPE_CHECKING:
    from lobit.atomic_folder import Work
    from lobit.model import Config, Transformer
    from lobit.quant_recipes.corpus import Corpus
    from lobit.quant_recipes.recipe import Recipe
    from lobit.quant_recipes.schedule import Training
    from lobit.quant_recipes.train import Row, Run, Trainer

HELD_OUT = 0.05
"""Share of the text that is held out to measure on, where no held-out text is given."""
RECORD_FILE = "training.json"
RECENT = 20
"""Steps over which progress averages loss and speed."""
STEPS = "training"
"""The folder in an unfinished folder that has the newest checkpoint."""


@dataclass(frozen=True)
class Texts:
    """The texts to train on, and the text to measure on."""

    training: Sequence[str]
    held_out: str | None = None
    """The text to measure on; None: the last `HELD_OUT` of the training text. At most `corpus.MOST_HELD_OUT` tokens are used."""
    length: int | None = None
    """Tokens of a sequence; None: the model's context, at most 512."""
    seed: int = 0
    """Seed of the order of the sequences, and of new weights."""


def train(
    model: str,
    recipe: Recipe,
    texts: Texts,
    out: Path,
    *,
    run: Run,
    training: Training | None = None,
    from_scratch: bool = False,
    start: str | None = None,
    recompute: bool = False,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains a float model with a recipe's rounding and writes a checkpoint folder, or for recipe `fp` a Hugging Face folder.

    A run that was killed goes on from its newest checkpoint in `out`.partial when the same call is made again. Under torchrun every
    process makes the call, and the first one writes.

    Args:
        model: a Hugging Face folder, a hub name or `demo`.
        recipe: how the trained model is quantized.
        texts: what to train and to measure on.
        out: a new folder.
        run: how much to train, and on what device.
        training: how to train; None: as the recipe does by default.
        from_scratch: whether to begin at new weights; only the config and the tokenizer of the model are then used.
        start: a checkpoint of the same model, such as `quantize` makes with a calibration text: layers of the recipe's grid begin at
            its integers.
        recompute: whether activations inside of blocks are computed again for the backward pass, and not kept.
        command: the command line, for the record.
        progress: called as the steps advance, with the loss, then as measuring does.

    Returns:
        In the first process the content of `training.json`: `steps`, `tokens`, `seconds`, the held-out `loss`, `perplexity` and,
        where there is a float model, `kl`, `top1` and its own `reference_loss`. In the others nothing.

    Raises:
        InputError: the text is too short, the batch does not fit, or the model is a quantized checkpoint.
        RecipeError: the recipe does not fit the model, or the loss is no longer finite.
    """
    from lobit.atomic_folder import Work
    from lobit.checkpoint import load_config, load_model, resolve
    from lobit.quant_recipes.apply import check
    from lobit.quant_recipes.quantized import fingerprint
    from lobit.quant_recipes.schedule import training_of
    from lobit.quant_recipes.trainee import new_weights
    from lobit.stage_cache import files_of

    source = resolve(model)
    config = load_config(source)
    training = training or training_of(recipe, from_scratch, start is not None)
    _check(source, recipe, training, from_scratch, start)
    check(config, recipe)
    run = run.dealt()
    run.check()
    corpus, held_out = _corpora(source, config, texts)
    student = new_weights(config, texts.seed) if from_scratch else load_model(source)
    teacher = load_model(source) if training.distillation else None
    settings = {"model": model, "recipe": recipe.to_json(), "training": asdict(training), "run": asdict(run), "seed": texts.seed}
    settings["text"] = hashlib.sha256(corpus.sequences.numpy().tobytes()).hexdigest()
    settings["from_scratch"] = from_scratch
    begun = _start(start, config, recipe) if start else None
    settings["start"] = fingerprint(begun) if begun else None
    # Writing checkpoints more often makes it no other training; other files of the model do.
    same = settings | {"run": asdict(replace(run, minutes=0.0)), "files": files_of(source)}
    with _place(out, run, Work("train", same, shlex.join(command), resumes=True)) as folder:
        trainer = _trainer(student, recipe, teacher, training, corpus, run, folder / STEPS, recompute, begun)
        for row in trainer.train():
            if progress and run.rank == 0:
                progress(_recent(trainer.rows), row.step, trainer.steps)
        return _finish(trainer, source, recipe, held_out, folder, settings | {"command": " ".join(command)}, progress)


def _recent(rows: Sequence[Row]) -> str:
    """A line with the number of the step, and with the loss and speed of the last `RECENT` steps."""
    last = rows[-RECENT:]
    tokens = last[-1].tokens - (rows[-RECENT - 1].tokens if len(rows) > RECENT else 0)
    loss, speed = sum(row.loss for row in last) / len(last), tokens / sum(row.seconds for row in last)
    return f"step {last[-1].step}, loss {loss:.3f}, {speed:,.0f} t/s"


def _start(checkpoint: str, config: Config, recipe: Recipe) -> Transformer:
    """The converted model of the checkpoint that training begins at.

    Raises:
        InputError: the checkpoint is of a model of another shape, or was rotated otherwise than the recipe rotates.
    """
    from lobit.checkpoint import resolve
    from lobit.quant_recipes.quantized import load_checkpoint

    model, own = load_checkpoint(resolve(checkpoint))
    if replace(model.config, tied=config.tied) != config:
        raise InputError(f"{checkpoint} is a checkpoint of another model: give one that was quantized from the model that is trained")
    if own.rotate != recipe.rotate:
        told, asked = (",".join(turns) or "nothing" for turns in (own.rotate, recipe.rotate))
        raise InputError(f"{checkpoint} has rotated {told} and the recipe rotates {asked}: quantize the model with the same --rotate")
    return model


def _check(source: Path, recipe: Recipe, training: Training, from_scratch: bool, start: str | None) -> None:
    from lobit.quant_recipes.quantized import check_float

    check_float(source)
    if recipe.is_calibrated:
        raise InputError(f"recipe {recipe.name} rounds after training: use `lobit quantize --calibration FILE`")
    if from_scratch and start:
        raise InputError("new weights begin at no checkpoint: leave --from out, or --from-scratch")
    if from_scratch and training.distillation:
        raise InputError("new weights have no float model to learn from: leave --distillation out, or --from-scratch")


def _corpora(source: Path, config: Config, texts: Texts) -> tuple[Corpus, Corpus]:
    """The corpus to train on, and the one that is held out."""
    from lobit.quant_recipes.corpus import pack
    from lobit.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(source, config.vocab_size)
    length = min(config.max_context, 512) if texts.length is None else texts.length
    if not 1 <= length <= config.max_context:
        raise InputError(f"--length {length} is outside of 1 to {config.max_context}, the model's context: choose one inside")

    def packed(documents: Sequence[str]) -> Corpus:
        return pack([tokenizer.encode(document) for document in documents], length, texts.seed, tokenizer.bos)

    corpus = packed(texts.training)
    return corpus.split(HELD_OUT) if texts.held_out is None else (corpus, packed([texts.held_out]).to_measure())


@contextlib.contextmanager
def _place(out: Path, run: Run, work: Work) -> Iterator[Path]:
    """Yields the folder to write to, which the first process makes.

    Raises:
        BundleError: other work has left something there.
    """
    from lobit.atomic_folder import new_folder

    if run.rank:
        run.wait()
        yield out.with_name(out.name + ".partial")
        return
    with new_folder(out, work) as folder:
        run.wait()
        yield folder


def _trainer(
    student: Transformer,
    recipe: Recipe,
    teacher: Transformer | None,
    training: Training,
    corpus: Corpus,
    run: Run,
    folder: Path,
    recompute: bool,
    start: Transformer | None,
) -> Trainer:
    from lobit.quant_recipes.apply import begin_at, prepare
    from lobit.quant_recipes.train import Trainer
    from lobit.quant_recipes.trainee import Trainee

    prepared = prepare(student.requires_grad_(True).train(), recipe)
    if start is not None:
        begin_at(prepared, start)
    return Trainer(Trainee(prepared, recipe, teacher, training.distillation, recompute), training, corpus, run, folder)


def _finish(
    trainer: Trainer,
    source: Path,
    recipe: Recipe,
    held_out: Corpus,
    folder: Path,
    settings: dict[str, Any],
    progress: Progress | None,
) -> dict[str, Any]:
    """Writes the checkpoint, the curves and the record in the first process, and returns the record there."""
    from lobit.checkpoint import load_model
    from lobit.quant_recipes.curves import write_curves
    from lobit.quant_recipes.metrics import figures

    trained = trainer.trained()
    if trainer.run.rank:
        return {}
    shipped = _ship(trained, recipe, source, folder)
    device = trainer.run.device
    reference = None if settings["from_scratch"] else load_model(source).to(device)
    found = figures(shipped.to(device), held_out, recipe, reference, progress)
    record = {
        "steps": trainer.steps,
        "tokens": trainer.rows[-1].tokens,
        "seconds": round(sum(row.seconds for row in trainer.rows), 3),
        "held_out_tokens": found.tokens,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "kl": found.kl,
        "top1": found.top1,
        "reference_loss": found.reference_loss,
        "settings": settings,
        "versions": {"torch": metadata.version("torch")},
    }
    write_curves(trainer.rows, folder, f"{source.name}, {recipe.name}")
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder / STEPS, ignore_errors=True)
    return record


def _ship(trained: Transformer, recipe: Recipe, source: Path, folder: Path) -> Transformer:
    """Writes a quantized checkpoint, or a float model where nothing is quantized."""
    import torch

    from lobit.checkpoint import copy_companions, read_json, save_model
    from lobit.quant_recipes.apply import convert
    from lobit.quant_recipes.quantized import save_checkpoint

    if recipe.rules:
        shipped = convert(trained, recipe)
        save_checkpoint(shipped, recipe, source, folder)
        return shipped
    save_model(trained, read_json(source / "config.json"), folder, torch.float32)
    copy_companions(source, folder)
    return trained.eval().requires_grad_(False)
