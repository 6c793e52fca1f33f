"""Recipes, quantization and export.

Imports are inside the functions: what a verb does not need is not loaded.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lobit.errors import InputError
from lobit.progress_callback import Progress

if TYPE_CHECKING:
    from lobit.export.plan import Plan
    from lobit.export.plan_detail import Detail
    from lobit.export.stages import Count
    from lobit.model import Config, Transformer
    from lobit.quant_recipes.apply import LayerPlan
    from lobit.quant_recipes.recipe import Activations, KVCache, Recipe
    from lobit.runtime.manifest import Manifest
    from lobit.stage_cache import StageCache
    from lobit.tokenizer import Tokenizer
    from lobit.verbs.calibrate import Calibration

DEFAULT_CONTEXT = 2048
ScaleRule = Literal["least_squares", "range"]
"""The scale rules that compute scales from weights (`recipe.WeightGrid`)."""
KEPT = "stages"
"""The folder in an unfinished bundle that has its finished stages."""


def choose_recipe(
    name: str,
    exclude: Sequence[str] = (),
    group_size: int | None = None,
    kv_cache: KVCache | None = None,
    mixed: Sequence[str] = (),
    scale_rule: ScaleRule | None = None,
    rotate: Sequence[str] = (),
    activations: Activations | None = None,
) -> Recipe:
    """A recipe of the catalogue with changes."""
    from lobit.quant_recipes.catalog import find_recipe

    return find_recipe(name).with_changes(tuple(exclude), group_size, kv_cache, mixed, scale_rule, rotate, activations)


def recipes(recipe: Recipe | None, model: str) -> list[LayerPlan]:
    """What a recipe does to each layer of a model; None: the recipe that the folder was quantized with before."""
    from lobit.checkpoint import load_config, resolve
    from lobit.quant_recipes.apply import layer_plans

    source = resolve(model)
    return layer_plans(load_config(source), _asked(source, recipe))


def quantize(
    model: str, recipe: Recipe | None, out: Path, progress: Progress | None = None, *, calibration: Calibration | None = None
) -> Path:
    """Quantizes a float model after training and writes a checkpoint folder.

    Args:
        model: a Hugging Face folder, a hub name or `demo`.
        recipe: how to quantize; None: the folder was quantized before, and its integers are taken in as they are.
        out: a new folder.
        progress: called as the layers advance.
        calibration: a text to round on by GPTQ; each layer's error goes to `calibration.json`.

    Raises:
        BundleError: something is at `out`.
        RecipeError: the recipe does not fit the model.
        ModelError: the model cannot be read.
    """
    from lobit.atomic_folder import Work, new_folder
    from lobit.checkpoint import resolve
    from lobit.quant_recipes.quantized import save_checkpoint
    from lobit.stage_cache import files_of
    from lobit.verbs.calibrate import CALIBRATION_FILE, calibrated

    source = resolve(model)
    settings = {
        "model": str(source),
        "files": files_of(source),
        "recipe": recipe and recipe.to_json(),
        "calibration": calibration and calibration.to_json(),
    }
    with new_folder(out, Work("quantize", settings)) as folder:
        if calibration is not None:
            used = _asked(source, recipe).calibrated()
            integer, found = calibrated(source, used, calibration, progress)
            (folder / CALIBRATION_FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        else:
            integer, used = converted(source, recipe, progress)
        save_checkpoint(integer, used, source, folder)
    return out


def converted(source: Path, recipe: Recipe | None, progress: Progress | None = None) -> tuple[Transformer, Recipe]:
    """The converted model of a checkpoint, of a folder that was quantized before, or of a float folder under `recipe`."""
    from lobit.checkpoint import Weights, load_config
    from lobit.quant_recipes.apply import check, convert
    from lobit.quant_recipes.import_prequantized import is_taken_in, take_in
    from lobit.quant_recipes.quantized import is_checkpoint, load_checkpoint

    recipe = _asked(source, recipe)
    if is_checkpoint(source):
        model, own = load_checkpoint(source)
        if recipe != own:
            raise InputError(f"{source} was quantized with recipe {own.name}: leave --recipe out, or give the float model")
        return model, own
    config = load_config(source)
    if is_taken_in(recipe):
        taken = take_in(source, config, progress)
        if not taken or taken[1] != recipe:
            raise InputError(f"{source} does not hold integers of recipe {recipe.name}: give the folder that they were taken in from")
        return taken
    check(config, recipe)
    weights = Weights(source, config)
    recipe = replace(recipe, untied=recipe.untied or weights.untied)
    return convert(weights.model, recipe, progress, weights), recipe


def export(
    model: str,
    target: str,
    out: Path,
    *,
    recipe: Recipe | None = None,
    calibration: Calibration | None = None,
    context: int | None = None,
    chunk: int | None = None,
    all_logits: bool = False,
    threads: int = 0,
    command: Sequence[str] = (),
    progress: Progress | None = None,
    **own: Any,
) -> Manifest:
    """Exports a float model (quantizing it on the way) or a quantized checkpoint to a bundle.

    A run that was killed has left what it finished in `out`.partial, and the same call goes on from there.

    Args:
        model: a Hugging Face folder, a hub name, `demo`, or a checkpoint folder.
        target: name of the target.
        out: the bundle's folder; must not exist.
        recipe: how to quantize a float model.
        calibration: a text to round a float model on by GPTQ; with `activations`, to find the ranges of activations on.
        context: positions to hold; None: the model's own, at most `DEFAULT_CONTEXT`.
        chunk: the most tokens in one prefill call; None: the target's default (`Target.CHUNK`).
        all_logits: whether the program returns the logits of every token of a call, not of the last alone.
        threads: how many the runtime uses unless it is told otherwise; 0: one per core.
        own: options of one target alone, fields of `export.target.Spec` by the names in `OWN_OPTIONS`.
        command: the command line, for the record.
        progress: called as the whole export advances.
    """
    from lobit.atomic_folder import Work, check_place, new_folder
    from lobit.checkpoint import load_config, resolve
    from lobit.export import bundle
    from lobit.export.plan import expected_seconds
    from lobit.export.stages import Stages
    from lobit.export.target import Spec, check_target, find_target
    from lobit.quant_recipes.apply import check
    from lobit.quant_recipes.quantized import check_float, empty_model
    from lobit.runtime.manifest import Generation, Tokens
    from lobit.runtime.manifest_problems import MOST_THREADS
    from lobit.stage_cache import StageCache, files_of
    from lobit.tokenizer_files import declared_generation
    from lobit.verbs.calibrate import ranging_sequences

    source = resolve(model)
    config = load_config(source)
    context, chunk = _sizes(config, target, context, chunk)
    check_place(out)
    bundle.check_context(config, context, chunk)
    if not 0 <= threads <= MOST_THREADS:
        raise InputError(f"{threads} threads: give 0, for one per core, or up to {MOST_THREADS}")
    asked = _asked(source, recipe)
    ranged, calibration = (calibration, None) if own.get("activations") else (None, calibration)
    if calibration is not None:
        check_float(source)
        asked = asked.calibrated()
    check(config, asked)
    tokenizer = _tokenizer(source, config)
    tokens = Tokens(None, [], None, {})
    if tokenizer is not None:
        tokens = Tokens(tokenizer.bos, tokenizer.stop, tokenizer.chat_template, tokenizer.special)
    spec = Spec(asked, context, chunk, all_logits=all_logits, bos=tokens.bos, stop=tuple(tokens.stop), threads=threads, **own)
    check_target(target, spec, config, source)
    if spec.activations:
        if ranged is None:
            raise InputError("the ranges of --activations int16 are found on a text: give one with --calibration FILE")
        spec = replace(spec, sequences=ranging_sequences(source, config, ranged, context))
    request = bundle.Request(source, out.name, target, tokens, Generation(**declared_generation(source)), spec, command)
    settings = {
        "model": str(source),
        "files": files_of(source),
        "target": target,
        "spec": asdict(replace(spec, sequences=())),
        "calibration": (calibration and calibration.to_json()) or (ranged and ranged.to_json()),
        "versions": bundle.versions(target),
    }
    with new_folder(out, Work("export", settings, shlex.join(command), resumes=True)) as folder:
        kept = StageCache(folder / KEPT)
        module = find_target(target)
        needs = module.needs(empty_model(config, asked), spec)
        stages = Stages(expected_seconds(bundle.parameter_count(config), needs, module.COSTS), progress)
        with stages.stage("quantize") as count:
            integer, used = _kept_checkpoint(source, asked, calibration, kept, count)
        manifest = bundle.write_bundle(integer, used, request, folder, kept, stages)
        kept.remove()
    return manifest


def plan(
    model: str,
    recipe: Recipe | None,
    target: str,
    *,
    context: int | None = None,
    chunk: int | None = None,
    all_logits: bool = False,
    detail: bool = False,
    bandwidth: float | None = None,
    progress: Progress | None = None,
    **own: Any,
) -> Plan:
    """What an export with the same arguments will give and take; nothing is written.

    Args:
        model: a float model or a quantized checkpoint.
        recipe: how to quantize a float model.
        target: name of the target.
        context: positions to hold; None: as `export` has it.
        chunk: the most tokens in one call; None: as `export` has it.
        all_logits: as `export` has it.
        own: as `export` has them.
        detail: whether to add speed and energy as the papers model them, and the entropy of the weights, which are read for it.
        bandwidth: that of the memory that decoding reads, in 10^9 bytes a second, for the detail; None: this machine's is measured.
        progress: called as the weights are read.
    """
    from lobit.checkpoint import load_config, resolve
    from lobit.export import plan as planning
    from lobit.export.target import Spec

    source = resolve(model)
    config, asked = load_config(source), _asked(source, recipe)
    spec = Spec(asked, *_sizes(config, target, context, chunk), all_logits=all_logits, **own)
    found = planning.plan(config, spec, target, source)
    return replace(found, detail=_detail(found, source, asked, bandwidth, progress)) if detail else found


def _detail(found: Plan, source: Path, recipe: Recipe, bandwidth: float | None, progress: Progress | None) -> Detail:
    """The detail of a plan."""
    from lobit.checkpoint import Weights, load_config
    from lobit.export.plan_detail import Detail, decode, energy
    from lobit.quant_recipes.entropy import entropies
    from lobit.quant_recipes.quantized import is_checkpoint
    from lobit.runtime.host import memory_bandwidth, usable_cores

    config, of = load_config(source), "as given"
    if bandwidth is None:
        bandwidth, of = memory_bandwidth(usable_cores()).gb_s, f"measured on this machine with {usable_cores()} threads"
    entropy = None if is_checkpoint(source) else entropies(Weights(source, config), recipe, progress)
    return Detail(
        decode(config, found.weights, found.cache, bandwidth, of), energy(config, recipe, found.cache.slots), entropy
    )


def _sizes(config: Config, target: str, context: int | None, chunk: int | None) -> tuple[int, int]:
    """Context and chunk, with defaults in the place of None."""
    from lobit.export.target import find_target

    context = min(config.max_context, DEFAULT_CONTEXT) if context is None else context
    return context, min(context, find_target(target).CHUNK) if chunk is None else chunk


def _asked(source: Path, recipe: Recipe | None) -> Recipe:
    """The given recipe, or that of a folder which is quantized already."""
    from lobit.checkpoint import Weights, load_config
    from lobit.quant_recipes.import_prequantized import taken_recipe
    from lobit.quant_recipes.quantized import is_checkpoint, load_recipe

    if recipe is not None:
        return recipe
    if is_checkpoint(source):
        return load_recipe(source)
    taken = taken_recipe(Weights(source, load_config(source)))
    if taken is not None:
        return taken
    raise InputError(f"{source} is a float model: say with --recipe how to quantize it (`lobit recipes` lists them)")


def _kept_checkpoint(
    source: Path, recipe: Recipe, calibration: Calibration | None, kept: StageCache, count: Count
) -> tuple[Transformer, Recipe]:
    """The converted model, as an earlier run kept it, or made and kept for a later one; what is a checkpoint already is not kept again."""
    from lobit.quant_recipes.quantized import is_checkpoint, save_checkpoint
    from lobit.verbs.calibrate import calibrated

    def advance(_: str, done: int, total: int) -> None:
        count(done, total)

    finished = kept.has("checkpoint")
    if finished:
        return converted(finished, None)
    if calibration is not None:
        model, used = calibrated(source, recipe, calibration, advance)[0], recipe
    else:
        model, used = converted(source, recipe, advance)
    if not is_checkpoint(source):
        with kept.making("checkpoint") as folder:
            folder.mkdir()
            save_checkpoint(model, used, source, folder)
    return model, used


def _tokenizer(source: Path, config: Config) -> Tokenizer | None:
    """The folder's tokenizer, or None where it has none.

    Raises:
        ModelError: the folder has only tokenizers of other kinds, which no runtime here reads.
    """
    from lobit.errors import ModelError
    from lobit.tokenizer import Tokenizer
    from lobit.tokenizer_files import FILE_NAME, SAVE_FAST, SLOW

    slow = [name for name in SLOW if (source / name).is_file()]
    if slow and not (source / FILE_NAME).is_file():
        raise ModelError(f"{source} has a tokenizer in {', '.join(slow)} alone, and a bundle needs {FILE_NAME}: {SAVE_FAST}")
    return Tokenizer.from_folder(source, config.vocab_size) if (source / FILE_NAME).is_file() else None


def converted_like(source: Path, recipe: Recipe) -> tuple[Transformer, Recipe]:
    """The converted model of a checkpoint as it is, or of a float model under `recipe`; and its recipe."""
    from lobit.quant_recipes.quantized import is_checkpoint

    return converted(source, None if is_checkpoint(source) else recipe)
