"""Merges models that were trained from one base.

Imports are inside the functions: what a verb does not need is not loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobit.progress_callback import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from lobit.model import Transformer
    from lobit.quant_recipes.merge import Specialists

REPORT_FILE = "merge.json"


def merge(
    models: Sequence[str],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    text: str | None = None,
    tokens: int = 4096,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Averages the parameters of models that were trained from one base, and writes a Hugging Face folder.

    Tokenizer and config.json are the first model's. merge.json in the folder says what was merged.

    Args:
        models: float models of one architecture and tokenizer, two or more.
        out: the folder; must not exist.
        weights: one for each model, scaled to sum to 1; None: searched on `text`, or equal where there is none.
        text: a text that is held out from training; losses are measured on it.
        tokens: how many of the text are read, at most, spread evenly over it.
        progress: called as the search advances.

    Returns:
        What merge.json holds. Losses are in nats per token, None without a text; `loss` is that of the model as it was written.

    Raises:
        BundleError: something is at `out`.
        InputError: fewer than two models, weights that do not fit them, or too short a text.
        ModelError: the models cannot be read or averaged; every reason is named.
    """
    from lobit.atomic_folder import Work, new_folder
    from lobit.checkpoint import load_model, resolve
    from lobit.quant_recipes.merge import STEPS, Specialists, held_out_loss, normalize, search
    from lobit.quant_recipes.merge import merge as merged
    from lobit.stage_cache import files_of

    specialists = Specialists([resolve(model) for model in models])
    used = normalize([1.0] * len(models) if weights is None else weights, len(models))
    sequences = [] if text is None else _sequences(specialists, text, tokens)
    singles: Sequence[float | None] = [None] * len(models)
    uniform = loss = None
    sources = [str(weights_of.folder) for weights_of in specialists.weights]
    settings = {
        "models": sources,
        "files": [files_of(Path(source)) for source in sources],
        "weights": weights and list(weights),
        "text": text and hashlib.sha256(text.encode()).hexdigest(),
        "tokens": tokens,
    }
    with new_folder(out, Work("merge", settings)) as folder:
        if sequences:
            found = search(specialists, sequences, STEPS if weights is None else 0, progress)
            singles, uniform = found.singles, found.uniform
            used = found.weights if weights is None else used
        _save(merged(specialists, used), specialists, folder)
        if sequences:
            loss = held_out_loss(load_model(folder), sequences)
        report = {
            "kind": "merge",
            "weights": "given" if weights is not None else "searched" if sequences else "equal",
            "models": [{"model": name, "weight": w, "loss": own} for name, w, own in zip(models, used, singles, strict=True)],
            "uniform_loss": uniform,
            "loss": loss,
            "tokens": sum(len(sequence) - 1 for sequence in sequences),
        }
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _save(model: Transformer, specialists: Specialists, folder: Path) -> None:
    """Writes the merged model in floats that hold those of every folder, with the first folder's config.json and tokenizer."""
    from lobit.checkpoint import copy_companions, read_json, save_model

    source = specialists.weights[0].folder
    values = {name: value for name, value in read_json(source / "config.json").items() if name != "dtype"}
    save_model(model, {**values, "torch_dtype": str(specialists.dtype).removeprefix("torch.")}, folder, specialists.dtype)
    copy_companions(source, folder)


def _sequences(specialists: Specialists, text: str, tokens: int) -> list[Tensor]:
    from lobit.quant_recipes.merge import held_out
    from lobit.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(specialists.weights[0].folder, specialists.config.vocab_size)
    return held_out(tokenizer.encode(text, bos=False), specialists.config, tokenizer.bos, tokens)
