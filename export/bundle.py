"""From a converted model to a bundle on disk: the one way that every target's export goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from lobit.checkpoint import TOKENIZER_FILES
from lobit.errors import InputError
from lobit.export.stages import OnStage, Stages
from lobit.export.target import Lowered, Spec, check_target, find_target
from lobit.model import Config, Transformer
from lobit.place import new_folder
from lobit.quant_recipes.quantized import fingerprint
from lobit.quant_recipes.recipe import Recipe
from lobit.runtime.manifest import FILE_NAME, CacheInfo, FileEntry, Manifest, ModelInfo, Tokens

BUILD_FILE = "build.json"
"""The command, seconds and memory of the export; beside the manifest, because they differ from run to run."""
VERSIONED = ("torch", "safetensors", "tokenizers")


def check_context(config: Config, context: int, chunk: int) -> None:
    """Refuses a context that the model was not made for.

    Raises:
        InputError: context or chunk out of range.
    """
    if not 1 <= context <= config.max_context:
        raise InputError(f"context {context} is outside of 1 to {config.max_context}, the model's own: choose one inside")
    if not 1 <= chunk <= context:
        raise InputError(f"chunk {chunk} is outside of 1 to the context {context}: choose one inside")


def cache_info(config: Config, recipe: Recipe, context: int) -> CacheInfo:
    """The key-value cache in bytes: a layer with a window keeps the window, the others the context.

    INT8 entries have a float32 scale and an int8 zero point per token and head, for keys and for values.
    """
    slots = config.cache_slots(context)
    heads = 2 * sum(slots) * config.kv_heads
    if recipe.kv_bits == 8:
        return CacheInfo("int8", slots, heads * config.head_dim, heads * 5)
    return CacheInfo("float32", slots, heads * config.head_dim * 4, 0)


def parameter_count(model: Transformer) -> int:
    """Weights of the float model, a tied embedding once."""
    from lobit.quant_recipes.apply import skeleton

    return sum(parameter.numel() for parameter in skeleton(model.config).parameters())


def export(
    model: Transformer,
    recipe: Recipe,
    source: Path,
    out: Path,
    *,
    target: str,
    tokens: Tokens,
    context: int,
    chunk: int,
    command: Sequence[str] = (),
    on_stage: OnStage | None = None,
) -> Manifest:
    """Lowers a converted model and writes the bundle; `out` appears when all is done, or not at all.

    Args:
        model: converted by `recipe`; its layers are taken over.
        recipe: what the model was converted with.
        source: the model's folder, for the tokenizer.
        out: must not exist.
        target: name of the target.
        tokens: what a client must know of the tokenizer.
        context: positions to hold.
        chunk: the most tokens in one call.
        command: as given, for the record.
        on_stage: told as each stage begins.

    Raises:
        TargetError: the target cannot hold the model.
        InputError: the context is not possible.
        BundleError: something is at `out`.
    """
    config, layers = model.config, len(model.config.layers)
    check_context(config, context, chunk)
    check_target(target, recipe, config)
    module, stages = find_target(target), Stages(on_stage)
    spec = Spec(recipe, context, chunk, tokens.bos, tuple(tokens.stop))
    parameters = parameter_count(model)
    info = ModelInfo(config.family, parameters, layers, config.hidden_size, config.vocab_size, config.max_context, config.largest_window)
    with new_folder(out) as folder:
        with stages.stage("fingerprint", parameters * 1e-9):
            digest = fingerprint(model)
        with stages.stage("trace", 0.3 * layers):
            parts = module.program(model, spec)
            graphs = module.trace(parts, spec)
        with stages.stage("lower", 4 * layers):
            lowered = module.lower(parts, graphs, spec)
        with stages.stage("write", parameters * 2e-9):
            files = module.write(lowered, folder) + _copy_tokenizer(source, folder)
        manifest = Manifest(
            name=out.name,
            target=target,
            model=info,
            recipe=recipe.to_json(),
            checkpoint_sha256=digest,
            context=context,
            chunk=chunk,
            inputs=lowered.inputs,
            outputs=lowered.outputs,
            cache=cache_info(config, recipe, context),
            tokens=tokens,
            delegation=lowered.delegation,
            weights=module.weights(recipe, config),
            files=files,
            versions=_versions(lowered),
        )
        (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        build = {"kind": "build", "bundle": out.name, "command": " ".join(command), "stages": stages.rows}
        (folder / BUILD_FILE).write_text(json.dumps(build, indent=2) + "\n", encoding="utf-8")
    return manifest


def _copy_tokenizer(source: Path, folder: Path) -> list[FileEntry]:
    entries = []
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
            entries.append(FileEntry.of(folder, name, "tokenizer" if name == "tokenizer.json" else "config"))
    return entries


def _versions(lowered: Lowered) -> dict[str, str]:
    versions = {name: metadata.version(name) for name in VERSIONED}
    return dict(sorted((versions | lowered.versions | {"lobit": _lobit_version()}).items()))


def _lobit_version() -> str:
    from lobit import __version__

    return __version__
