"""What rounding costs in the file that ships, under llama.cpp: our checkpoints beside llama.cpp's own rounding of the float model.

    python tests/benchmarks/gguf_rounding.py --model SmolLM2-135M-Instruct [--checkpoint NAME=FOLDER ...] [--tokens 2048]

Every row is a GGUF file that llama.cpp reads and runs: mean KL from the float model in PyTorch on held-out articles of Wikipedia, in
windows of 512 tokens, and the perplexity. llama.cpp's rows have the blocks of its own `ggml_quantize_chunk`, which is what
`llama-quantize --pure --token-embedding-type q8_0` calls. The table goes to `tests/benchmarks/gguf_rounding.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rounding import WINDOW, rounded_by_ggml, windows
from torch import Tensor

from lobit import verbs
from lobit.checkpoint import load_model
from lobit.export.gguf.architecture import Architecture, choose, fields_of
from lobit.export.gguf.file import Entry, entries, write
from lobit.export.gguf.vocabulary import fields_of as vocabulary_fields
from lobit.export.gguf.weights import Q4_0, Q8_0, Form
from lobit.export.target import Spec
from lobit.model import Transformer
from lobit.quant_recipes.catalog import find_recipe
from lobit.runtime.llama_library import Context, Model
from lobit.runtime.parity import kl_divergence, log_softmax
from lobit.tokenizer import Tokenizer

OUT = Path(__file__).parent / "gguf_rounding.md"


def by_ggml(embedding: Form) -> Callable[[Path, Path], Path]:
    """The float model with its layers in llama.cpp's Q4_0, the embedding in a form of its own."""

    def make(folder: Path, path: Path) -> Path:
        model, spec = load_model(folder), Spec(find_recipe("fp"), WINDOW, WINDOW)
        architecture, _ = choose(model.config, WINDOW)
        forms = {"token_embd.weight": embedding}
        tensors = [rounded(entry, forms.get(entry.name, Q4_0)) for entry in entries(model, architecture, spec)]
        write_file(model, architecture, folder, tensors, path)
        return path

    return make


def rounded(entry: Entry, kept: Form) -> Entry:
    """A matrix in blocks; norms and biases as they are."""
    if len(entry.shape) == 1:
        return entry
    return replace(entry, form=kept, make=lambda: rounded_by_ggml(entry.make(), kept))


def write_file(model: Transformer, architecture: Architecture, folder: Path, tensors: list[Entry], path: Path) -> None:
    """A whole GGUF file of a model with these tensors."""
    tokenizer = Tokenizer.from_folder(folder, model.config.vocab_size)
    vocabulary = vocabulary_fields(folder, model.config.vocab_size, tokenizer.bos, tuple(tokenizer.stop))
    write(path, architecture.name, {**fields_of(model.config, architecture, WINDOW), **vocabulary}, tensors, lambda *_: None)


def exported(source: Path, recipe: str | None = None) -> Callable[[Path, Path], Path]:
    """A checkpoint, or the float model by a recipe, as lobit exports it."""

    def make(_: Path, path: Path) -> Path:
        chosen = None if recipe is None else verbs.choose_recipe(recipe)
        verbs.export(str(source), "gguf", path.with_suffix(""), recipe=chosen, context=WINDOW)
        return path.with_suffix("") / "model.gguf"

    return make


def measure(path: Path, sequences: Sequence[Tensor], reference: list[np.ndarray], threads: int) -> dict[str, float]:
    """KL from the reference with its standard error, perplexity, and the file's size."""
    divergences, surprises = [], []
    with closing(Model(path)) as model:
        context = Context(model, WINDOW, WINDOW, threads)
        for sequence, expected in zip(sequences, reference, strict=True):
            rows = context.read(sequence.tolist(), 0, every=True)
            found = log_softmax(np.stack([np.ctypeslib.as_array(row, (model.vocab_size,)) for row in rows]))
            divergences.append(kl_divergence(expected.astype(np.float64), found))
            surprises.append(surprise(found, sequence))
    kl = np.concatenate(divergences)
    perplexity = math.exp(np.concatenate(surprises).mean())
    return {"kl": kl.mean(), "se": kl.std() / len(kl) ** 0.5, "perplexity": perplexity, "mb": path.stat().st_size / 1e6}


def surprise(rows: np.ndarray, sequence: Tensor) -> np.ndarray:
    """Minus the log probability of each token but the first; rows [T, V] are log probabilities."""
    return -rows[np.arange(len(sequence) - 1), sequence[1:].numpy()]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("bench-out/SmolLM2-135M-Instruct"))
    parser.add_argument("--text", type=Path, default=Path("bench-out/texts/wiki-held-out.txt"), help="what texts.py wrote")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=FOLDER", help="a checkpoint of the same model")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    rows: dict[str, Callable[[Path, Path], Path]] = {
        "float32": exported(arguments.model, "fp"),
        "llama.cpp's Q4_0, embedding too": by_ggml(Q4_0),
        "`8da4w-g32`, without a text": exported(arguments.model, "8da4w-g32"),
        "llama.cpp's Q4_0, embedding Q8_0": by_ggml(Q8_0),
        "`8da4w-g32-e8`, without a text": exported(arguments.model, "8da4w-g32-e8"),
    }
    rows |= {name: exported(Path(folder)) for name, folder in (told.split("=", 1) for told in arguments.checkpoint)}
    sequences = windows(Tokenizer.from_folder(arguments.model), arguments.text, arguments.tokens)
    model = load_model(arguments.model)
    reference = [model(sequence[None])[0].log_softmax(-1).numpy() for sequence in sequences]
    del model
    perplexity = math.exp(np.concatenate([surprise(found, sequence) for found, sequence in zip(reference, sequences, strict=True)]).mean())
    count = sum(map(len, sequences))
    lines = [
        f"{arguments.model.name}, {count} tokens of Wikipedia under llama.cpp; in PyTorch {perplexity:.2f}",
        "",
        "| file | MB | KL | perplexity |",
        "|---|--:|--:|--:|",
    ]
    for name, make in rows.items():
        with tempfile.TemporaryDirectory() as folder:
            found = measure(make(arguments.model, Path(folder) / "made.gguf"), sequences, reference, arguments.threads)
        print(json.dumps({"row": name, **{key: float(value) for key, value in found.items()}}), flush=True)
        lines.append(f"| {name} | {found['mb']:.1f} | {found['kl']:.4f} ± {found['se']:.4f} | {found['perplexity']:.2f} |")
        OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
