"""Finds the layers that a recipe harms most.

Imports are inside the functions: what a verb does not need is not loaded.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobit.errors import InputError
from lobit.progress_callback import Progress

if TYPE_CHECKING:
    from lobit.model import Config, Transformer
    from lobit.quant_recipes.corpus import Corpus
    from lobit.quant_recipes.recipe import Recipe
    from lobit.quant_recipes.sensitivity import Row

LONGEST_SEQUENCE = 512
"""Tokens of a sequence, at most."""
FEWEST_TOKENS = 16
"""Tokens below which the figures say nothing."""
MOST_TOKENS = 2048
"""Tokens that a small model reads by default."""
WORK = 150e9
"""Weights times tokens by default: of SmolLM2 135 million and 1024 tokens, whose 211 passes take some minutes on two cores."""
BUDGET = "5%"
"""What finer grids may add: to the INT4 checkpoint of SmolLM2 4.2 MB, which is INT8 for 11 of its 135 million weights."""
_BUDGET = re.compile(r"(\d{1,12}(?:\.\d{1,6})?) ?(%|[kMG]?B)", re.ASCII)
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def sensitivity(
    model: str,
    recipe: Recipe,
    text: str,
    *,
    budget: str = BUDGET,
    tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures how far each layer alone moves the model when it is quantized, and proposes finer grids for few layers.

    Layers that GPTQ rounds are rounded to nearest here (`gptq_to_nearest`).

    Args:
        model: a float model.
        recipe: what is quantized.
        text: a text that the model did not learn by heart.
        budget: by how much the proposal's checkpoint may be larger than the recipe's: `5%` of it, or `4MB` (B, kB, MB, GB; 1 kB is
            1000 B).
        tokens: how many of the text are read, at most, spread over it; None: `default_tokens`.
        progress: called as the layers, then the two recipes advance.

    Returns:
        `rows`, the most sensitive first, each with its `layers` (a shared head with its embedding), `grid`, `parameters`, `kl`
        (KL(float || model), nats a token), the checkpoint's `bytes_saved` against floating point, and finer grids, `wider`: each
        with the `bytes` that it would add, and the `kl` that is expected to remain. `budget` as it was `asked`, and in `bytes`. `all`
        and `proposal` are measured with every layer quantized, and the recipe's key-value cache: `kl`, `top1` (share of tokens with
        the same most probable successor), `perplexity`, `bytes` and `bits_per_weight` of the checkpoint; `proposal` also has the
        entries `mixed`, to give to `choose_recipe` before any others.

    Raises:
        InputError: the model is a quantized checkpoint, the text is too short, or the budget cannot be read.
        RecipeError: the recipe does not fit the model, or quantizes nothing.
    """
    from lobit.checkpoint import load_config, load_model, resolve
    from lobit.quant_recipes import sensitivity as layers
    from lobit.quant_recipes.apply import arrange, check
    from lobit.quant_recipes.quantized import check_float
    from lobit.quant_recipes.sizes import checkpoint_bytes

    source = resolve(model)
    check_float(source)
    config = load_config(source)
    check(config, recipe)
    most = budget_bytes(budget, checkpoint_bytes(config, recipe))
    corpus = _corpus(source, config, text, default_tokens(config) if tokens is None else tokens)
    floats = load_model(source)
    if recipe.rotate:
        arrange(floats, recipe)
    rows = layers.sensitivity(floats, recipe, corpus, progress)
    mixed = layers.proposal(rows, most)
    whole = _measured(floats, recipe, corpus)
    if progress:
        progress("all layers", 1, 2)
    proposed = _measured(floats, recipe.with_changes(mixed=mixed), corpus) if mixed else whole
    if progress:
        progress("all layers", 2, 2)
    return {
        "kind": "sensitivity",
        "model": model,
        "recipe": recipe.name,
        "tokens": len(corpus) * corpus.length,
        "gptq_to_nearest": recipe.is_calibrated,
        "rows": [_row(row) for row in rows],
        "budget": {"asked": budget, "bytes": most},
        "all": whole,
        "proposal": {"mixed": mixed, **proposed},
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "layers": list(row.layers),
        "grid": str(row.rule.weights),
        "parameters": row.parameters,
        "bytes_saved": row.bytes_saved,
        "wider": [asdict(wider) for wider in row.wider],
        "kl": row.kl,
    }


def budget_bytes(budget: str, size: int) -> int:
    """How many bytes a budget is.

    Args:
        budget: a share of `size` such as `5%`, or bytes such as `4MB`.
        size: bytes of the recipe's checkpoint.

    Raises:
        InputError: the budget is neither.
    """
    match = _BUDGET.fullmatch(budget)
    if match is None:
        raise InputError(f"budget {budget!r} is neither a share of the checkpoint nor bytes: give one such as 5% or 4MB (B, kB, MB, GB)")
    return int(float(match[1]) * (size / 100 if match[2] == "%" else _UNITS[match[2]]))


def default_tokens(config: Config) -> int:
    """How many tokens are read by default: 2048 by a small model, fewer by a large one, and at least one sequence."""
    from lobit.quant_recipes.apply import skeleton

    weights = sum(weight.numel() for weight in skeleton(config).parameters())
    return max(LONGEST_SEQUENCE, min(MOST_TOKENS, int(WORK / weights)))


def _measured(model: Transformer, recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    """The figures of a recipe with all of its layers quantized."""
    from lobit.quant_recipes.sensitivity import measured
    from lobit.quant_recipes.sizes import checkpoint_bytes

    found, size = measured(model, recipe, corpus), checkpoint_bytes(model.config, recipe)
    bits = 8 * size / sum(weight.numel() for weight in model.parameters())
    return {"kl": found.kl, "top1": found.top1, "perplexity": found.perplexity, "bytes": size, "bits_per_weight": bits}


def _corpus(source: Path, config: Config, text: str, tokens: int) -> Corpus:
    """Sequences of the text, each beginning with bos where the model has one."""
    from lobit.quant_recipes.corpus import Corpus, sequences_of
    from lobit.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(source, config.vocab_size)
    ids = tokenizer.encode(text, bos=False)
    length = min(tokens, config.max_context, LONGEST_SEQUENCE, len(ids) - (tokenizer.bos is None))
    if length < FEWEST_TOKENS:
        raise InputError(f"{length} tokens of the text would be read, at least {FEWEST_TOKENS} are needed: give more text or --tokens")
    return Corpus(sequences_of(ids, tokens // length, length + 1, bos=tokenizer.bos))
