"""Verify and parity: does a bundle hold and compute what was trained?"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobit.errors import BundleError, InputError, listed
from lobit.progress_callback import Progress
from lobit.targets import TARGETS, THIS_MACHINE, Device, TargetEntry, proof_of, says_nothing_of_time
from lobit.verbs.make import converted_like

if TYPE_CHECKING:
    from lobit.export.target import RunGraph, Spec
    from lobit.model import Config, Transformer
    from lobit.quant_recipes.recipe import Recipe
    from lobit.runtime.bundle import Bundle
    from lobit.runtime.engine import Engine
    from lobit.runtime.manifest import Manifest
    from lobit.runtime.reference import ReferenceEngine

STAGES = ("fake_quant", "graph", "artifact", "rounded")
"""What parity compares with the float model. `rounded` is the artifact with what every operation gives rounded to half precision, as a
phone may do it: only target coreml has it, and it is not judged."""
QUICK_GRAPH = 20_000_000
"""Most parameters of a graph that is compared by default though PyTorch runs its operators one by one, taking 60 times as long a token."""


def verify(bundle: Path, checkpoint: str, *, every: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Reads the integers and scales back out of a bundle and compares them with a checkpoint.

    Args:
        bundle: the bundle's folder.
        checkpoint: a checkpoint folder, or the float model, to which the bundle's own recipe is then applied again. The integers of
            layers that were rounded on a calibration text do not follow from a float model: for these, as for the whole, the sha256
            that the export recorded is compared.
        every: target qnn, whose programs cannot be taken apart: whether all integers of the compiled layers are read back from the
            emulator, which takes long, instead of a sample.
        progress: called as layers are read back and the model is compiled anew (target qnn).

    Raises:
        InputError: `every` for a target whose programs are always read whole.
    """
    from lobit.checkpoint import resolve
    from lobit.quant_recipes.quantized import fingerprint
    from lobit.quant_recipes.recipe import Recipe
    from lobit.quiet import quiet_python
    from lobit.runtime import verify as verification
    from lobit.runtime.bundle import open_bundle
    from lobit.runtime.reference import stored_layers, stored_vectors

    opened = open_bundle(bundle)
    recipe = Recipe.from_json(opened.manifest.recipe)
    model = converted_for_bundle(resolve(checkpoint), recipe, opened)
    if proof := proof_of(opened.manifest.target):
        with quiet_python():
            reader = importlib.import_module(proof)
        rows, files = reader.read_back(opened, model, _spec(recipe, opened, model.config), every, progress)
        result = verification.summary(opened, rows, fingerprint(model))
        same = not any(row["differing_bytes"] for row in files)
        return {**result, "compiled": files, "passed": result["passed"] and same}
    if every:
        raise InputError(f"programs for target {opened.manifest.target} are always read whole: leave --all out")
    return verification.verify(opened, stored_layers(model), stored_vectors(model), fingerprint(model))


def parity(
    bundle: Path,
    reference: str,
    text: str,
    *,
    tokens: int | None = None,
    checkpoint: str | None = None,
    stages: Sequence[str] | None = None,
    threads: int | None = None,
    device: Device = THIS_MACHINE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compares a bundle with the float model on a text, stage by stage: last of all, what another device computes.

    Args:
        bundle: the bundle's folder.
        reference: the float model.
        text: the text to read.
        tokens: how many of the text are read, at most; None: what the target says (`TargetEntry.parity_tokens`).
        checkpoint: the quantized checkpoint; None: the bundle's recipe is applied to the reference again.
        stages: which of `STAGES` to compare, `artifact` always is; None: all except a graph that takes minutes.
        threads: how many the artifact's runtime uses.
        device: where the last stage runs; on this machine that is stage `artifact`.
        progress: called with (stage, tokens done, tokens in all).

    Raises:
        InputError: the checkpoint is not the one that the bundle was made from, or there is no such stage.
    """
    from lobit.checkpoint import load_config, load_model, resolve
    from lobit.export.target import find_target
    from lobit.quant_recipes.quantized import check_float, fingerprint
    from lobit.quant_recipes.recipe import Recipe
    from lobit.runtime import parity as comparison
    from lobit.runtime.bundle import open_bundle
    from lobit.runtime.engine import default_threads, open_engine
    from lobit.runtime.parts import READERS, check_parts
    from lobit.runtime.reference import ReferenceEngine, moved, order_share
    from lobit.verbs.talk import bundle_tokenizer

    unknown = sorted(set(stages or ()) - set(STAGES))
    if unknown:
        raise InputError(f"there is no stage {', '.join(unknown)}: choose of {', '.join(STAGES)}")
    opened = open_bundle(bundle)
    manifest, source = opened.manifest, resolve(reference)
    check_float(source)
    if tokens is None:
        tokens = TARGETS[manifest.target].parity_tokens if manifest.target in TARGETS else TargetEntry.parity_tokens
    ids, lines = bundle_tokenizer(opened).encode_lines(text, tokens)
    comparison.plan_passages(ids, manifest.context, manifest.tokens.bos, lines)  # a text that is too short is refused before any slow work
    config, recipe = load_config(source), Recipe.from_json(manifest.recipe)
    model = converted_for_bundle(resolve(checkpoint) if checkpoint else source, recipe, opened)
    if fingerprint(model) != manifest.checkpoint_sha256:
        raise InputError(
            f"{checkpoint or reference} does not hold the weights that bundle {bundle} was made from: give the model it was exported "
            "from, and with --checkpoint its quantized checkpoint where it was trained"
        )
    chosen = _stages(stages, manifest)
    rounding = _rounded(opened, stages) if "rounded" in chosen else None
    rounded = ReferenceEngine(model, recipe, manifest.context)
    target, spec = find_target(manifest.target), _spec(recipe, opened, config)
    exact = _in_arithmetic(rounded, opened)
    arithmetic = exact.recipe or recipe
    share = max(order_share(arithmetic), target.OPERATOR_ERROR)
    own = target.floor(model, spec)
    if own:
        floor = comparison.Floor(*own, "with every operator off by as much as the device's are")
    else:
        floor = comparison.Floor(exact, ReferenceEngine(moved(exact.model, share), arithmetic, manifest.context))
    if progress:
        progress("parts", 0, 1)
    text_begins = [*([] if manifest.tokens.bos is None else [manifest.tokens.bos]), *ids]
    parts = None
    if manifest.target in READERS:
        parts = check_parts(exact.model, opened, text_begins, threads or default_threads(opened))
    engines: dict[str, Any] = {"fake_quant": rounded} if "fake_quant" in chosen else {}
    if "graph" in chosen:
        graph = target.graph(model, spec)
        engines["graph"] = exact if graph is None else _graph_engine(graph, manifest)
    engines["artifact"] = open_engine(opened, threads)
    if device != THIS_MACHINE:
        engines[str(device)] = open_engine(opened, threads, device)
    try:
        result = comparison.parity(
            ReferenceEngine(load_model(source, config), None, manifest.context),
            engines,
            ids,
            context=manifest.context,
            bos=manifest.tokens.bos,
            lines=lines,
            window=manifest.model.largest_window if manifest.model.largest_window < manifest.context else 0,
            tried=_tried(recipe),
            beside={"rounded": rounding} if rounding else None,
            floor=floor,
            progress=progress,
        )
    except BundleError:
        # The reference in half precision fails before the package, whose operations have names.
        if rounding and (told := rounding.warnings_on(text_begins)):
            raise BundleError(f"{told[0]['what']}: {told[0]['advice']}") from None
        raise
    described = {"name": manifest.name, "target": manifest.target, "recipe": recipe.name}
    result["warnings"] += rounding.warnings() if rounding else []
    passed = result["passed"] and (parts is None or parts["passed"])
    where = {"device": str(device), "emulated": says_nothing_of_time(manifest.target, device)} | ({"parts": parts} if parts else {})
    return {**result, "passed": passed, "bundle": described, "model": reference, "entropy": None, **where}


def converted_for_bundle(source: Path, recipe: Recipe, bundle: Bundle) -> Transformer:
    """The model of a checkpoint, or of a float model under the recipe, with the bundle's integers where these were rounded on a text.

    The fingerprint of the whole model tells whether those are the checkpoint's.

    Raises:
        InputError: the integers are in the program alone, and it cannot be taken apart.
    """
    import torch

    from lobit.quant_recipes.quantized import is_checkpoint
    from lobit.runtime.reference import stored_layers
    from lobit.runtime.stored import read_program
    from lobit.runtime.verify import paired

    if is_checkpoint(source) or not recipe.is_calibrated:
        return converted_like(source, recipe)[0]
    if proof_of(bundle.manifest.target):
        raise InputError(
            f"bundle {bundle.folder} was rounded on a text, and a program for target {bundle.manifest.target} cannot be taken apart: give "
            "the quantized checkpoint that it was exported from (parity: --checkpoint)"
        )
    model, _ = converted_like(source, recipe.to_nearest())
    for part, values, scale in paired(read_program(bundle).layers(), stored_layers(model)):
        rule = recipe.rule_for(part.name)
        if rule and rule.rounding == "gptq" and part.scale is not None and scale is not None:
            layer = model.get_submodule(part.name)
            layer.integers = torch.tensor(values)
            layer.scale = torch.tensor(scale.reshape(*part.scale.shape, -1)[:, :, 0])  # a runtime may store a scale several times
    return model


def _tried(recipe: Recipe) -> list[str]:
    """The entries of `verdict.ADVICE` that a recipe follows already."""
    from lobit.quant_recipes.recipe import ENDS

    ends = [rule.weights.bits for name in ENDS if (rule := recipe.rule_for(name))]
    return [*(["calibration"] if recipe.is_calibrated else []), *(["ends"] if min(ends, default=8) >= 8 else [])]


def _stages(asked: Sequence[str] | None, manifest: Manifest) -> Sequence[str]:
    """The stages to compare: by default all, but for a graph that PyTorch runs operator by operator where that takes minutes."""
    from lobit.export.target import find_target

    if asked is not None:
        return asked
    slow = find_target(manifest.target).SLOW_GRAPH and manifest.model.parameters > QUICK_GRAPH
    return [stage for stage in STAGES if not (slow and stage == "graph")]


def _rounded(bundle: Bundle, asked: Sequence[str] | None) -> Any:
    """The engine of stage `rounded`; None: the bundle has none.

    Raises:
        InputError: the stage was asked for.
    """
    from lobit.runtime.engine import target_module

    found = getattr(target_module(bundle), "open_rounded", lambda _: None)(bundle)
    if found is None and asked is not None:
        name = bundle.manifest.name
        raise InputError(f"bundle {name} has no stage rounded, packages for target coreml in half precision have one: leave it out")
    return found


def _spec(recipe: Recipe, bundle: Bundle, config: Config) -> Spec:
    """The spec that a bundle's program was made for.

    Raises:
        BundleError: its options are none that export would have taken.
    """
    from lobit.export.target import OWN_OPTIONS, Spec, find_target, odd_options

    manifest = bundle.manifest
    told: dict[str, Any] = {name: value for name, value in manifest.options.items() if name in OWN_OPTIONS}
    spec = Spec(recipe, manifest.context, manifest.chunk, all_logits=manifest.all_logits, **told)
    if problems := odd_options(told) or find_target(manifest.target).check(spec, config):
        raise BundleError(listed(problems, f"bundle {bundle.folder} is not as export wrote it, export it again:"))
    return replace(spec, encodings=bundle.path("encodings")) if spec.activations else spec


def _in_arithmetic(rounded: ReferenceEngine, bundle: Bundle) -> ReferenceEngine:
    """The converted model, with inputs and cache rounded as the target rounds them; `rounded` itself where the recipe does the same."""
    from lobit.export.target import find_target
    from lobit.runtime.reference import ReferenceEngine

    assert rounded.recipe is not None
    manifest = bundle.manifest
    model, recipe = find_target(manifest.target).arithmetic(rounded.model, _spec(rounded.recipe, bundle, rounded.model.config))
    return rounded if model is rounded.model and recipe == rounded.recipe else ReferenceEngine(model, recipe, manifest.context)


def _graph_engine(graph: RunGraph, manifest: Manifest) -> Engine:
    """The exported graph, run by PyTorch: the artifact's operators before lowering."""
    import torch

    from lobit.runtime.engine import Logits, SteppingEngine

    @torch.inference_mode()
    def step(tokens: list[int], position: int) -> Logits:
        logits: torch.Tensor = graph(torch.tensor([tokens]), torch.tensor([position]))
        return logits[0].numpy()

    return SteppingEngine(step, manifest.context, manifest.chunk, manifest.model.vocab_size)
