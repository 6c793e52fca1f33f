"""Recipes, quantization and export.

Imports are inside the functions: what a verb does not need is not loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lobit.errors import InputError

if TYPE_CHECKING:
    from lobit.model import Config, Transformer
    from lobit.quant_recipes.apply import Fate
    from lobit.quant_recipes.recipe import Recipe
    from lobit.runtime.manifest import Manifest
    from lobit.tokenizer import Tokenizer

DEFAULT_CONTEXT = 2048
DEFAULT_CHUNK = 512
KVCache = Literal["int8", "float"]
Progress = Callable[[str, int, int], None]
"""(what, done, of how many)"""
OnStage = Callable[[str, float], None]
"""(stage, seconds that it should take)"""


def choose_recipe(
    name: str, exclude: Sequence[str] = (), group_size: int | None = None, kv_cache: KVCache | None = None
) -> Recipe:
    """A recipe of the catalogue with changes."""
    from lobit.quant_recipes.catalog import find_recipe

    return find_recipe(name).with_changes(tuple(exclude), group_size, kv_cache)


def recipes(recipe: Recipe, model: str) -> list[Fate]:
    """What a recipe does to each layer of a model."""
    from lobit.checkpoint import load_config, resolve
    from lobit.quant_recipes.apply import fates

    return fates(load_config(resolve(model)), recipe)


def quantize(model: str, recipe: Recipe, out: Path, progress: Progress | None = None) -> Path:
    """Quantizes a float model after training and writes a checkpoint folder.

    Raises:
        BundleError: something is at `out`.
        RecipeError: the recipe does not fit.
        ModelError: the model cannot be read.
    """
    from lobit.checkpoint import resolve
    from lobit.place import new_folder
    from lobit.quant_recipes.quantized import save_checkpoint

    source = resolve(model)
    with new_folder(out) as folder:
        integer, _ = converted(source, recipe, progress)
        save_checkpoint(integer, recipe, source, folder)
    return out


def converted(source: Path, recipe: Recipe | None, progress: Progress | None = None) -> tuple[Transformer, Recipe]:
    """The converted model of a checkpoint, or of a float folder under `recipe`."""
    from lobit.checkpoint import load_config, load_model
    from lobit.quant_recipes.apply import check, convert
    from lobit.quant_recipes.quantized import is_checkpoint, load_checkpoint

    if is_checkpoint(source):
        model, own = load_checkpoint(source)
        if recipe is not None and recipe != own:
            raise InputError(f"{source} was quantized with recipe {own.name}: leave --recipe out, or give the float model")
        return model, own
    if recipe is None:
        raise InputError(f"{source} is a float model: say with --recipe how to quantize it (`lobit recipes` lists them)")
    config = load_config(source)
    check(config, recipe)
    return convert(load_model(source, config), recipe, progress), recipe


def export(
    model: str,
    target: str,
    out: Path,
    *,
    recipe: Recipe | None = None,
    context: int | None = None,
    chunk: int | None = None,
    command: Sequence[str] = (),
    progress: Progress | None = None,
    on_stage: OnStage | None = None,
) -> Manifest:
    """Exports a float model (quantizing it on the way) or a quantized checkpoint to a bundle.

    Args:
        model: a Hugging Face folder, a hub name, `demo`, or a checkpoint folder.
        target: name of the target.
        out: the bundle's folder; must not exist.
        recipe: for a float model.
        context: positions to hold; None: the model's own, at most `DEFAULT_CONTEXT`.
        chunk: the most tokens in one prefill call; None: the context, at most `DEFAULT_CHUNK`.
        command: for the record.
        progress: of the quantization.
        on_stage: told as each stage of the export begins.
    """
    from lobit.checkpoint import load_config, resolve
    from lobit.export import bundle
    from lobit.export.target import check_target
    from lobit.place import check_place
    from lobit.quant_recipes.apply import check
    from lobit.quant_recipes.quantized import is_checkpoint, load_recipe
    from lobit.runtime.manifest import Tokens

    source = resolve(model)
    config = load_config(source)
    context = min(config.max_context, DEFAULT_CONTEXT) if context is None else context
    chunk = min(context, DEFAULT_CHUNK) if chunk is None else chunk
    check_place(out)
    bundle.check_context(config, context, chunk)
    asked = load_recipe(source) if recipe is None and is_checkpoint(source) else recipe
    if asked is not None:
        check(config, asked)
        check_target(target, asked, config)
    tokenizer = _tokenizer(source, config)
    tokens = Tokens(None, [], None, {})
    if tokenizer is not None:
        tokens = Tokens(tokenizer.bos, tokenizer.stop, tokenizer.chat_template, tokenizer.special)
    integer, used = converted(source, recipe, progress)
    return bundle.export(
        integer, used, source, out, target=target, tokens=tokens, context=context, chunk=chunk, command=command, on_stage=on_stage
    )


def _tokenizer(source: Path, config: Config) -> Tokenizer | None:
    """The folder's tokenizer, or None where it has none."""
    from lobit.tokenizer import Tokenizer

    return Tokenizer.from_folder(source, config.vocab_size) if (source / "tokenizer.json").is_file() else None


def converted_like(source: Path, recipe: Recipe) -> tuple[Transformer, Recipe]:
    """A checkpoint as it is; a float model under `recipe`."""
    from lobit.quant_recipes.quantized import is_checkpoint

    return converted(source, None if is_checkpoint(source) else recipe)
