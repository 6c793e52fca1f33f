"""Writes a converted model to disk as a bundle, in the same steps for every target."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from lobit import __version__
from lobit.checkpoint import TOKENIZER_FILES, copy_companions
from lobit.errors import InputError
from lobit.export.stages import Stages
from lobit.export.target import Spec, find_target
from lobit.model import Config, Transformer
from lobit.quant_recipes.apply import skeleton
from lobit.quant_recipes.quantized import fingerprint
from lobit.quant_recipes.recipe import Recipe
from lobit.runtime.manifest import FILE_NAME, FileEntry, Generation, Manifest, ModelInfo, Tokens
from lobit.stage_cache import StageCache

BUILD_FILE = "build.json"
"""File with the command, seconds and memory of the export. They are not in the manifest because they differ from run to run."""
VERSIONED = ("torch", "safetensors", "tokenizers")


def check_context(config: Config, context: int, chunk: int) -> None:
    """Refuses a context that is longer than the model's own, and a chunk that is longer than the context.

    Raises:
        InputError: context or chunk out of range.
    """
    if not 1 <= context <= config.max_context:
        raise InputError(f"context {context} is outside of 1 to {config.max_context}, the model's own: choose one inside")
    if not 1 <= chunk <= context:
        raise InputError(f"chunk {chunk} is outside of 1 to the context {context}: choose one inside")


def parameter_count(config: Config) -> int:
    """Number of weights of the float model; a tied embedding counts once."""
    return sum(parameter.numel() for parameter in skeleton(config).parameters())


@dataclass(frozen=True)
class Request:
    """What is to be exported, besides the model."""

    source: Path
    """The model's folder, which has the tokenizer."""
    name: str
    """The bundle's name."""
    target: str
    tokens: Tokens
    """What a client must know about the tokenizer."""
    generation: Generation
    """How the model's authors sample tokens."""
    spec: Spec
    """What the program is made for."""
    command: Sequence[str] = ()
    """The command line of the export, which is recorded in `BUILD_FILE`."""


def write_bundle(model: Transformer, recipe: Recipe, request: Request, folder: Path, kept: StageCache, stages: Stages) -> Manifest:
    """Lowers a converted model and writes the bundle's files.

    Args:
        model: converted by `recipe`.
        recipe: what the model was converted with.
        request: what is to be exported.
        folder: the folder that the files are written to.
        kept: what an earlier run has finished, and where this run keeps what it finishes.
        stages: times the stages `lower` and `write`, which it must expect.

    Raises:
        TargetError: the target cannot hold the model.
    """
    config, tokens = model.config, request.tokens
    module = find_target(request.target)
    spec = replace(request.spec, recipe=recipe)
    digest = fingerprint(model)
    with stages.stage("lower") as count:
        lowered = module.lower(model, spec, kept, count)
    with stages.stage("write") as count:
        tokenizer = _copy_tokenizer(request.source, folder)  # which a target may put into its own files
        files = module.write(lowered, folder, count) + tokenizer
    manifest = Manifest(
        name=request.name,
        target=request.target,
        model=model_info(config),
        recipe=recipe.to_json(),
        checkpoint_sha256=digest,
        context=spec.context,
        chunk=module.step(spec),
        threads=spec.threads,
        options=module.options(spec),
        methods=lowered.methods,
        states=lowered.states,
        client=lowered.client,
        cache=module.cache(spec, config),
        tokens=tokens,
        generation=request.generation,
        delegation=lowered.delegation,
        weights=module.weights(spec, config),
        files=files,
        versions=versions(request.target),
    )
    (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    build = {"kind": "build", "bundle": request.name, "command": " ".join(request.command), "stages": stages.rows}
    (folder / BUILD_FILE).write_text(json.dumps(build, indent=2) + "\n", encoding="utf-8")
    return manifest


def model_info(config: Config) -> ModelInfo:
    """The manifest's summary of a model."""
    layers, parameters = len(config.layers), parameter_count(config)
    return ModelInfo(config.family, parameters, layers, config.hidden_size, config.vocab_size, config.max_context, config.largest_window)


def _copy_tokenizer(source: Path, folder: Path) -> list[FileEntry]:
    names = copy_companions(source, folder, TOKENIZER_FILES)
    return [FileEntry.of(folder, name, "tokenizer" if name == "tokenizer.json" else "config") for name in names]


def versions(target: str) -> dict[str, str]:
    """Versions of all that a bundle's bytes depend on: lobit, its packages and the target's packages."""
    found = {name: metadata.version(name) for name in VERSIONED} | find_target(target).versions()
    return dict(sorted((found | {"lobit": __version__}).items()))
