"""Verify and parity: is what runs there what was trained?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobit.errors import InputError
from lobit.verbs.make import Progress, converted_like

if TYPE_CHECKING:
    from lobit.export.target import Graph
    from lobit.runtime.engine import Engine
    from lobit.runtime.manifest import Manifest

STAGES = ("fake_quant", "graph", "artifact")


def verify(bundle: Path, checkpoint: str) -> dict[str, Any]:
    """Reads the integers and scales back out of a bundle and compares them with a checkpoint.

    Args:
        bundle: the bundle's folder.
        checkpoint: a checkpoint folder, or the float model that the bundle's own recipe is applied to again.
    """
    from lobit.checkpoint import resolve
    from lobit.quant_recipes.quantized import fingerprint
    from lobit.quant_recipes.recipe import Recipe
    from lobit.runtime import verify as verification
    from lobit.runtime.bundle import open_bundle
    from lobit.runtime.reference import stored_layers

    opened = open_bundle(bundle)
    model, _ = converted_like(resolve(checkpoint), Recipe.from_json(opened.manifest.recipe))
    return verification.verify(opened, stored_layers(model), fingerprint(model))


def parity(
    bundle: Path,
    reference: str,
    text: str,
    *,
    tokens: int = 2048,
    checkpoint: str | None = None,
    stages: Sequence[str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compares a bundle with the float model on a text, stage by stage.

    Args:
        bundle: the bundle's folder.
        reference: the float model.
        text: what to read.
        tokens: of the text, at most.
        checkpoint: the quantized checkpoint; None: the bundle's recipe is applied to the reference again.
        stages: which of `STAGES` to compare, `artifact` always is; None: all that the target has.
        threads: of the artifact's runtime.
        progress: called with (stage, tokens done, tokens in all).

    Raises:
        InputError: the checkpoint is not the one that the bundle was made from, or there is no such stage.
    """
    from lobit.checkpoint import load_config, load_model, resolve
    from lobit.export.target import Spec, find_target
    from lobit.quant_recipes.quantized import fingerprint
    from lobit.quant_recipes.recipe import Recipe
    from lobit.runtime import parity as comparison
    from lobit.runtime.bundle import open_bundle
    from lobit.runtime.engine import open_engine
    from lobit.runtime.reference import ReferenceEngine
    from lobit.verbs.talk import bundle_tokenizer

    unknown = sorted(set(stages or ()) - set(STAGES))
    if unknown:
        raise InputError(f"there is no stage {', '.join(unknown)}: choose of {', '.join(STAGES)}")
    opened = open_bundle(bundle)
    manifest, source = opened.manifest, resolve(reference)
    chosen = STAGES if stages is None else stages
    graph = find_target(manifest.target).graph if "graph" in chosen else None
    if stages and "graph" in stages and graph is None:
        raise InputError(f"target {manifest.target} has no stage graph: what it writes is that graph, and its stage is artifact")
    ids = bundle_tokenizer(opened).encode(text, bos=False)[:tokens]
    comparison.plan_walks(ids, manifest.context, manifest.tokens.bos)  # a text that is too short is refused before any slow work
    config, recipe = load_config(source), Recipe.from_json(manifest.recipe)
    model, _ = converted_like(resolve(checkpoint) if checkpoint else source, recipe)
    if fingerprint(model) != manifest.checkpoint_sha256:
        raise InputError(
            f"{checkpoint or reference} does not hold the weights that bundle {bundle} was made from: give the model it was exported "
            "from, and with --checkpoint its quantized checkpoint where it was trained"
        )
    engines: dict[str, Any] = {}
    if "fake_quant" in chosen:
        engines["fake_quant"] = ReferenceEngine(model, recipe, manifest.context)
    if graph:
        again, _ = converted_like(resolve(checkpoint) if checkpoint else source, recipe)
        engines["graph"] = _graph_engine(graph(again, Spec(recipe, manifest.context, manifest.chunk)), manifest)
    engines["artifact"] = open_engine(opened, threads)
    result = comparison.parity(
        ReferenceEngine(load_model(source, config), None, manifest.context),
        engines,
        ids,
        context=manifest.context,
        bos=manifest.tokens.bos,
        window=manifest.model.largest_window if manifest.model.largest_window < manifest.context else 0,
        recipe=recipe.name,
        progress=progress,
    )
    described = {"name": manifest.name, "target": manifest.target, "recipe": recipe.name}
    return {**result, "bundle": described, "model": reference, "entropy": None}


def _graph_engine(graph: Graph, manifest: Manifest) -> Engine:
    """The exported graph, run by PyTorch: the artifact's operators before lowering."""
    import torch

    from lobit.quiet import quiet_native
    from lobit.runtime.engine import Logits, SteppingEngine

    @torch.inference_mode()
    def step(tokens: list[int], position: int) -> Logits:
        with quiet_native():
            logits: torch.Tensor = graph(torch.tensor([tokens]), torch.tensor([position]))
        return logits.reshape(-1).numpy()

    return SteppingEngine(step, manifest.context, manifest.chunk, manifest.model.vocab_size)
