"""Eval: how good models, checkpoints and bundles are at tasks, and which answers they change.

Imports are inside the functions: what a verb does not need is not loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobit.errors import InputError
from lobit.progress_callback import Progress
from lobit.targets import TARGETS
from lobit.user_cache import user_cache

if TYPE_CHECKING:
    from lobit.runtime.bundle import Bundle
    from lobit.runtime.engine import Engine
    from lobit.runtime.eval_run import Column
    from lobit.tokenizer import Tokenizer

STAGES = ("float", "fake_quant", "artifact")
FORMAT = 2
"""Number to raise where items that were kept are no longer what would be computed."""


def eval(
    subjects: Sequence[str],
    tasks: Sequence[Path] = (),
    *,
    texts: Sequence[tuple[str, str]] = (),
    limit: int | None = None,
    shots: int = 0,
    stages: Sequence[str] | None = None,
    reference: str | None = None,
    threads: int | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures accuracy on tasks and perplexity of texts, each item by the same tokens for all, and pairs the answers.

    Finished items are kept: a run that was killed goes on where it stopped, and gives what it would have given.

    Args:
        subjects: bundles, quantized checkpoints and float models.
        tasks: files of questions (`runtime.eval_tasks`).
        texts: names and contents of texts whose perplexity is measured.
        limit: items of each task, and windows of each text, at most; None: all.
        shots: how many items at the beginning of each task are given as solved examples, and not asked.
        stages: which of `float`, `fake_quant` and `artifact`; None: all that the subjects and the reference have.
        reference: the float model of the bundles, which is measured too, and rounded as each bundle's recipe says.
        threads: how many a bundle's runtime uses; None: as the bundle says.
        cache: where finished items are kept; None: `user_cache("eval")`.
        progress: called as items advance.

    Returns:
        `columns` (one for each model and stage, floats first), `tasks`, and in `rows` the `metrics` of each column on each task, with
        their standard errors. `pairs` has for each column how many answers it lost and gained against the first, and each artifact
        against its fake-quantized model, with the exact test's `p`. `averages` has each column's mean accuracy. `cut`: items whose
        context did not fit. `speed`: what was computed now, and its seconds.

    Raises:
        InputError: there is nothing to measure, a file or an item is not usable, or a stage is asked for that no subject has.
    """
    from lobit.runtime.eval_run import Text, evaluate
    from lobit.runtime.eval_tasks import read_task

    if not tasks and not texts:
        raise InputError("there is nothing to measure: give --tasks FILE with questions, or --text FILE for its perplexity")
    unknown = sorted(set(stages or ()) - set(STAGES))
    if unknown:
        raise InputError(f"there is no stage {', '.join(unknown)}: choose of {', '.join(STAGES)}")
    read = [read_task(path).with_shots(shots).first(limit) for path in tasks]
    named = [*(task.name for task in read), *(name for name, _ in texts)]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise InputError(f"several files are called {', '.join(twice)}: rename one, or give a task a first line with another name")
    columns = columns_of(subjects, reference, STAGES if stages is None else stages, threads)
    missing = [stage for stage in stages or () if stage not in {column.stage for column in columns}]
    if missing or not columns:
        raise InputError(
            f"nothing here has stage {', '.join(missing or STAGES)}: a float model has float, a checkpoint fake_quant, a bundle artifact, "
            "and with --reference MODEL a bundle has all three"
        )
    folder, told = cache or user_cache("eval"), [Text(name, text) for name, text in texts]
    result = evaluate(columns, read, told, limit=limit, folder=folder, progress=progress)
    return {**result, "shots": shots, "limit": limit}


def columns_of(subjects: Sequence[str], reference: str | None, stages: Sequence[str], threads: int | None) -> list[Column]:
    """The columns of all subjects without repetitions: the reference first, then by stage."""
    from lobit.checkpoint import resolve
    from lobit.quant_recipes.quantized import check_float, is_checkpoint
    from lobit.runtime.bundle import open_bundle
    from lobit.runtime.manifest import FILE_NAME

    found: list[Column] = []
    if reference is not None and "float" in stages:
        check_float(resolve(reference))
        found.append(_float(reference))
    for subject in subjects:
        if (Path(subject) / FILE_NAME).is_file():
            bundle = open_bundle(subject)
            found += [_rounded(bundle, reference)] if reference is not None and "fake_quant" in stages else []
            found += [_artifact(bundle, threads)] if "artifact" in stages else []
        elif is_checkpoint(resolve(subject)):
            found += [_checkpoint(subject)] if "fake_quant" in stages else []
        elif "float" in stages:
            found.append(_float(subject))
    unlike = [column for place, column in enumerate(found) if column.key not in [other.key for other in found[:place]]]
    return sorted(unlike, key=lambda column: STAGES.index(column.stage))


def _named(subject: str) -> str:
    return Path(subject).resolve().name if Path(subject).exists() else subject


def _float(model: str) -> Column:
    """A float model."""
    from lobit.checkpoint import load_config, load_model, resolve
    from lobit.runtime.eval_run import Column
    from lobit.runtime.reference import ReferenceEngine

    source = resolve(model)
    config = load_config(source)
    key = _key("float", ("torch",), files=_content(source))
    tokenizer = _tokenizer(source, config.vocab_size)

    def opened(context: int) -> Engine:
        return ReferenceEngine(load_model(source, config), None, context)

    return Column(_named(model), "float", "", "", tokenizer, config.max_context, "", key, opened)


def _checkpoint(subject: str) -> Column:
    """A quantized checkpoint."""
    from lobit.checkpoint import load_config, resolve
    from lobit.quant_recipes.quantized import fingerprint, load_checkpoint
    from lobit.runtime.eval_run import Column
    from lobit.runtime.reference import ReferenceEngine

    source = resolve(subject)
    model, recipe = load_checkpoint(source)
    origin, config = fingerprint(model), load_config(source)
    tokenizer = _tokenizer(source, config.vocab_size)
    key = _key("fake_quant", ("torch",), model=origin, recipe=recipe.to_json())

    def opened(context: int) -> Engine:
        return ReferenceEngine(load_checkpoint(source)[0], recipe, context)

    return Column(_named(subject), "fake_quant", "", recipe.name, tokenizer, config.max_context, origin, key, opened)


def _rounded(bundle: Bundle, reference: str) -> Column:
    """The reference, rounded as a bundle is."""
    from lobit.checkpoint import resolve
    from lobit.quant_recipes.quantized import fingerprint
    from lobit.quant_recipes.recipe import Recipe
    from lobit.runtime.eval_run import Column
    from lobit.runtime.reference import ReferenceEngine
    from lobit.verbs.prove import converted_for_bundle
    from lobit.verbs.talk import bundle_tokenizer

    manifest, recipe = bundle.manifest, Recipe.from_json(bundle.manifest.recipe)
    key = _key("fake_quant", ("torch",), model=manifest.checkpoint_sha256, recipe=recipe.to_json())

    def opened(context: int) -> Engine:
        model = converted_for_bundle(resolve(reference), recipe, bundle)
        if fingerprint(model) != manifest.checkpoint_sha256:
            raise InputError(
                f"{reference} does not hold the weights that bundle {bundle.folder} was made from: give the model it was exported from; "
                "where it was trained, leave --reference out and give the float model and the quantized checkpoint beside the bundle"
            )
        return ReferenceEngine(model, recipe, context)

    name, context = manifest.name, manifest.context
    return Column(name, "fake_quant", "", recipe.name, bundle_tokenizer(bundle), context, manifest.checkpoint_sha256, key, opened)


def _artifact(bundle: Bundle, threads: int | None) -> Column:
    """A bundle as its runtime computes it."""
    from lobit.runtime.engine import open_engine, target_module
    from lobit.runtime.eval_run import Column
    from lobit.runtime.manifest import FILE_NAME, sha256_of
    from lobit.verbs.talk import bundle_tokenizer

    manifest = bundle.manifest
    target_module(bundle)  # an unknown target is refused before any slow work
    key = _key("artifact", TARGETS[manifest.target].packages, manifest=sha256_of(bundle.folder / FILE_NAME))
    tokenizer, run = bundle_tokenizer(bundle), functools.partial(open_engine, bundle, threads)
    opened: Callable[[int], Engine] = lambda _: run()  # noqa: E731 (its context is the bundle's own)
    recipe = str(manifest.recipe["name"])
    return Column(
        manifest.name, "artifact", manifest.target, recipe, tokenizer, manifest.context, manifest.checkpoint_sha256, key, opened
    )


def _key(stage: str, packages: Sequence[str], **what: Any) -> dict[str, Any]:
    """All that a column's figures depend on, the versions of what computes them included."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # the engine says so when it is opened
            versions[package] = ""
    return {"format": FORMAT, "stage": stage, "versions": versions, **what}


def _content(folder: Path) -> dict[str, str]:
    """The sha256 of every file of a model's folder."""
    from lobit.runtime.manifest import sha256_of

    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _tokenizer(source: Path, vocab_size: int) -> Tokenizer:
    from lobit.tokenizer import Tokenizer

    return Tokenizer.from_folder(source, vocab_size)
