"""What rounding after training costs a real chat model, method by method: `make rounding`.

    python tests/benchmarks/rounding.py [--model SmolLM2-135M-Instruct] [--trained CHECKPOINT] [--tokens 4096] [--only PATTERN]

Mean KL from the float model on held-out articles of Wikipedia, in windows of 512 tokens, and the perplexity; calibrated on other
articles. Beside lobit's methods llama.cpp's Q4_0, plain and with importance, by its own code (of the package `xllamacpp`), on the same
weights. The table goes to `tests/benchmarks/rounding/table.md`, with what each figure was before there was a search for scales.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.quants import dequantize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from lobit.checkpoint import load_config, load_model
from lobit.export.gguf.weights import Q4_0, Form
from lobit.model import CausalAttention, Transformer, weight_of
from lobit.quant_recipes.apply import convert, layers_of
from lobit.quant_recipes.calibration import calibrate
from lobit.quant_recipes.catalog import LINEARS, find_recipe
from lobit.quant_recipes.corpus import sequences_of
from lobit.quant_recipes.fake_quant import attention_for
from lobit.quant_recipes.quantized import load_checkpoint
from lobit.quant_recipes.recipe import ENDS, Recipe, Rule, WeightGrid
from lobit.runtime.llama_library import library
from lobit.tokenizer import Tokenizer
from lobit.verbs.calibrate import LENGTH, SAMPLES

OUT = Path(__file__).parent / "rounding"
WINDOW = 512
"""Tokens of a window."""
INT4, INT8 = WeightGrid(4, 32), WeightGrid(8, None)
EQUATION_4 = replace(INT4, scale_rule="range")
PLAIN = "the same: llama.cpp's Q4_0"
COLOURS = {"rounded": "#7aa6d8", "rounded on a text, or trained": "#1a7f5a", "llama.cpp": "#9aa0a6"}
Result = dict[str, Any]
Changed = tuple[Transformer, Recipe | None]
"""A model with its weights rounded, and the recipe that its cache is rounded by."""


@dataclass(frozen=True)
class Texts:
    """Windows of tokens to measure on, and sequences [n, length] to calibrate on."""

    held_out: Sequence[Tensor]
    calibration: Tensor


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    make: Callable[[Path, Texts], Changed]
    before: float | None = None
    """The KL that was measured on 2026-11-29, before scales were searched, where the method was there."""


def only(match: tuple[str, ...], grid: WeightGrid) -> Recipe:
    """Weights alone, of some layers alone."""
    return Recipe("part", "", (Rule(match, grid),))


def rounded(recipe: Recipe) -> Callable[[Path, Texts], Changed]:
    """After training, without a text."""
    return lambda folder, texts: (convert(load_model(folder), recipe), recipe)


def calibrated(recipe: Recipe, *, act_order: bool = True) -> Callable[[Path, Texts], Changed]:
    """After training, on the calibration text."""
    used = recipe.calibrated()

    def make(folder: Path, texts: Texts) -> Changed:
        model = load_model(folder)
        found = calibrate(model, used, texts.calibration, act_order=act_order)
        return convert(model, used, calibrated=found.integers), used

    return make


def by_ggml(names: str, importance: bool = False) -> Callable[[Path, Texts], Changed]:
    """llama.cpp's Q4_0 of the layers whose names match."""

    def make(folder: Path, texts: Texts) -> Changed:
        model = load_model(folder)
        squares = mean_squares(model, texts.calibration) if importance else {}
        for name, module in layers_of(model):
            if fnmatch(name, names) and not (name == "head" and model.config.tied):
                blocks = rounded_by_ggml(weight_of(module).detach(), Q4_0, squares.get(name))
                weight_of(module).data = torch.tensor(dequantize(blocks.numpy(), Q4_0.type))
        return model, None

    return make


def rounded_by_ggml(weight: Tensor, kept: Form, importance: Tensor | None = None) -> Tensor:
    """Blocks, uint8 [out, bytes], of a weight [out, in] by llama.cpp's `ggml_quantize_chunk`, with an importance for each input [in]."""
    call = library().ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    (out, inner), floats = weight.shape, ctypes.POINTER(ctypes.c_float)
    values, blocks = weight.float().contiguous().numpy(), np.empty((out, kept.row_bytes(inner)), np.uint8)
    factors = None if importance is None else importance.float().contiguous().numpy()
    sizes = [ctypes.c_int64(size) for size in (0, out, inner)]
    pointers = values.ctypes.data_as(floats), blocks.ctypes.data_as(ctypes.c_void_p)
    written = call(int(kept.type), *pointers, *sizes, None if factors is None else factors.ctypes.data_as(floats))
    assert written == blocks.size, (written, blocks.size)
    return torch.from_numpy(blocks)


@torch.inference_mode()
def mean_squares(model: Transformer, sequences: Tensor) -> dict[str, Tensor]:
    """The mean square of every input of every layer in the blocks: what llama.cpp calls an importance matrix."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + inputs[0].flatten(0, -2).square().mean(0)

        return add

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in layers_of(model) if name.startswith("layers.")]
    for sequence in sequences:
        model(sequence[None])
    for hook in hooks:
        hook.remove()
    return sums


ROWS = (
    Row("layers INT4 in groups of 32, weights alone: eq. 4", rounded(only(LINEARS, EQUATION_4)), 0.445),
    Row(PLAIN, by_ggml("layers.*"), 0.318),
    Row("the same: searched scales", rounded(only(LINEARS, INT4)), 0.367),
    Row("the same: Q4_0 with importance", by_ggml("layers.*", importance=True)),
    Row("the same: calibrated, in order", calibrated(only(LINEARS, INT4), act_order=False), 0.208),
    Row("the same: calibrated", calibrated(only(LINEARS, INT4)), 0.176),
    Row("embedding and head INT4, alone: eq. 4", rounded(only(ENDS, EQUATION_4)), 0.150),
    Row(PLAIN, by_ggml("embedding"), 0.109),
    Row("the same: searched scales", rounded(only(ENDS, INT4))),
    Row("the same: INT8 per row", rounded(only(ENDS, INT8)), 0.000),
    Row("`8da8w`", rounded(find_recipe("8da8w")), 0.019),
    Row("`8da8w`, calibrated", calibrated(find_recipe("8da8w"))),
    Row("`8da4w-g32` by eq. 4", rounded(find_recipe("8da4w-g32").with_changes(scale_rule="range")), 0.557),
    Row("`8da4w-g32`", rounded(find_recipe("8da4w-g32"))),
    Row("`8da4w-g32`, calibrated", calibrated(find_recipe("8da4w-g32"))),
    Row("`8da4w-g32-e8`", rounded(find_recipe("8da4w-g32-e8"))),
    Row("`8da4w-g32-e8`, calibrated", calibrated(find_recipe("8da4w-g32-e8"))),
    Row("`w4-channel` by eq. 4", rounded(find_recipe("w4-channel").with_changes(scale_rule="range"))),
    Row("`w4-channel`", rounded(find_recipe("w4-channel"))),
    Row("`w4-channel`, calibrated", calibrated(find_recipe("w4-channel"))),
)


def windows(tokenizer: Tokenizer, text: Path, count: int) -> Sequence[Tensor]:
    """The first tokens of a text in windows, the last of which may be shorter."""
    return torch.tensor(tokenizer.encode(text.read_text(encoding="utf-8"), bos=False)[:count]).split(WINDOW)


@torch.inference_mode()
def log_probabilities(model: Transformer, sequences: Sequence[Tensor], recipe: Recipe | None = None) -> Iterator[Tensor]:
    """Of each sequence [length, V]."""
    attend = attention_for(recipe, CausalAttention(model.config))
    for sequence in sequences:
        yield model(sequence[None], None, attend)[0].log_softmax(-1)


def measure(changed: Changed, sequences: Sequence[Tensor], reference: list[Tensor]) -> dict[str, float]:
    """Mean KL from the reference with its standard error, and perplexity."""
    divergences, surprises = [], []
    for sequence, expected, found in zip(sequences, reference, log_probabilities(changed[0], sequences, changed[1]), strict=True):
        divergences.append((expected.exp() * (expected - found)).sum(-1))
        surprises.append(-found[:-1].gather(1, sequence[1:, None])[:, 0])
    kl = torch.cat(divergences)
    return {"kl": float(kl.mean()), "se": float(kl.std() / len(kl) ** 0.5), "perplexity": math.exp(float(torch.cat(surprises).mean()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("bench-out/SmolLM2-135M-Instruct"))
    parser.add_argument("--texts", type=Path, default=Path("bench-out/texts"), help="what texts.py wrote")
    parser.add_argument("--trained", type=Path, help="a checkpoint of `lobit train`, for a row of its own")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--only", default="*", help="rows whose text matches")
    parser.add_argument("--again", action="store_true", help="measure rows that are in the table already, too")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_folder(arguments.model, load_config(arguments.model).vocab_size)
    held_out = windows(tokenizer, arguments.texts / "wiki-held-out.txt", arguments.tokens)
    told = (arguments.texts / "wiki-train.txt").read_text(encoding="utf-8")
    calibration = sequences_of(tokenizer.encode(told, bos=False), arguments.samples, LENGTH, bos=tokenizer.bos)
    texts = Texts(held_out, calibration)
    floats = load_model(arguments.model)
    reference = list(log_probabilities(floats, held_out))
    rows = [*ROWS]
    if arguments.trained:
        rows.append(Row("`8da4w-g32`, trained", lambda *_: load_checkpoint(arguments.trained)))
    found = measure((floats, None), held_out, reference)
    read = f"{sum(map(len, held_out))} tokens of Wikipedia, float perplexity {found['perplexity']:.2f}"
    about = f"{arguments.model.name}, {read}; calibrated on {len(calibration)} x {LENGTH} tokens of other articles"
    kept = Results(arguments.out, about)
    part = ""
    for row in rows:
        part = part if row.what.startswith("the same") else row.what
        name = row.what if row.what == part else f"{part} | {row.what}"
        if fnmatch(row.what, arguments.only) and (name not in kept.rows or arguments.again):
            start = time.perf_counter()
            changed = row.make(arguments.model, texts)
            minutes = (time.perf_counter() - start) / 60
            figures = measure(changed, held_out, reference)
            kept.add(name, {"what": row.what, "part": part, "before": row.before, "minutes": minutes, **figures})
    print(kept.table())


class Results:
    """The rows that were measured, in a file: a run that is killed goes on, and one of a few rows leaves the others as they are.

    Args:
        folder: of `table.json` and `table.md`.
        about: what was measured, and on what; rows of another are not kept.
    """

    def __init__(self, folder: Path, about: str) -> None:
        self.folder, self.about = folder, about
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "table.json"
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.rows: dict[str, Result] = told["rows"] if told.get("about") == about else {}

    def add(self, name: str, result: Result) -> None:
        """Keeps a row, and writes the table."""
        print(json.dumps(result), flush=True)
        self.rows[name] = result
        (self.folder / "table.json").write_text(json.dumps({"about": self.about, "rows": self.rows}, indent=1) + "\n", encoding="utf-8")
        (self.folder / "table.md").write_text(self.table(), encoding="utf-8")
        self.draw()

    def draw(self) -> None:
        """The rows as bars in `table.png`."""
        names, colours, values = [], [], []
        for name, row in self.rows.items():
            names.append(row["what"].replace("`", "").replace("the same: ", "… "))
            learned = "calibrated" in name or "trained" in name
            colours.append(COLOURS["llama.cpp" if "Q4_0" in name else "rounded on a text, or trained" if learned else "rounded"])
            values.append(row["kl"])
        figure = Figure(figsize=(9, 0.6 + 0.27 * len(values)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(range(len(values)), values, color=colours)
        axes.bar_label(bars, [f"{value:.3f}" for value in values], padding=3, fontsize=8)
        axes.set_yticks(range(len(values)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * max(values))
        axes.set_xlabel("KL from the float model, nats a token; less is better")
        axes.legend([Patch(color=colour) for colour in COLOURS.values()], list(COLOURS), frameon=False, loc="upper right")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(self.folder / "table.png", dpi=110)

    def table(self) -> str:
        """The rows in Markdown."""
        lines = [self.about, "", "| what | before | KL | of Q4_0's | perplexity | minutes |", "|---|--:|--:|--:|--:|--:|"]
        for row in self.rows.values():
            plain = self.rows.get(f"{row['part']} | {PLAIN}")
            before = "" if row["before"] is None else f"{row['before']:.3f}"
            share = f"{row['kl'] / plain['kl']:.2f}" if plain else ""
            figures = f"{row['kl']:.4f} ± {row['se']:.4f} | {share} | {row['perplexity']:.2f} | {row['minutes']:.1f}"
            lines.append(f"| {row['what']} | {before} | {figures} |")
        return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
