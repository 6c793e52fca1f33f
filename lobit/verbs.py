"""Every verb of the command line as a function with the same name and parameters. The command only parses and prints.

Imports are inside the functions: what a verb does not need is not loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lobit.errors import BundleError, InputError

if TYPE_CHECKING:
    from lobit.model import Config, Transformer
    from lobit.quant_recipes.apply import Fate
    from lobit.quant_recipes.recipe import Recipe
    from lobit.runtime.bundle import Bundle
    from lobit.runtime.engine import Engine
    from lobit.runtime.generate import GenerationStats
    from lobit.runtime.manifest import Manifest
    from lobit.tokenizer import Tokenizer

DEFAULT_CONTEXT = 2048
DEFAULT_CHUNK = 512
PARTS = {"lobit": ("torch", "safetensors", "tokenizers", "huggingface_hub"), "xnnpack": ("executorch", "torchao")}
"""Packages that the core and each target need."""
STAGES = ("fake_quant", "graph", "artifact")
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
    import shutil

    from lobit.checkpoint import resolve
    from lobit.export.bundle import check_place
    from lobit.quant_recipes.quantized import save_checkpoint

    check_place(out)
    source = resolve(model)
    converted, _ = _converted(source, recipe, progress)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        save_checkpoint(converted, recipe, source, partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _converted(source: Path, recipe: Recipe | None, progress: Progress | None = None) -> tuple[Transformer, Recipe]:
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
    from lobit.quant_recipes.apply import check
    from lobit.quant_recipes.quantized import is_checkpoint, load_recipe
    from lobit.runtime.manifest import Tokens

    source = resolve(model)
    config = load_config(source)
    context = min(config.max_context, DEFAULT_CONTEXT) if context is None else context
    chunk = min(context, DEFAULT_CHUNK) if chunk is None else chunk
    bundle.check_place(out)
    bundle.check_context(config, context, chunk)
    asked = load_recipe(source) if recipe is None and is_checkpoint(source) else recipe
    if asked is not None:
        check(config, asked)
        check_target(target, asked, config)
    tokenizer = _tokenizer(source, config)
    tokens = Tokens(None, [], None, {})
    if tokenizer is not None:
        tokens = Tokens(tokenizer.bos, tokenizer.stop, tokenizer.chat_template, tokenizer.special)
    converted, recipe = _converted(source, recipe, progress)
    return bundle.export(
        converted, recipe, source, out, target=target, tokens=tokens, context=context, chunk=chunk, command=command, on_stage=on_stage
    )


def _tokenizer(source: Path, config: Config) -> Tokenizer | None:
    """The folder's tokenizer, or None where it has none."""
    from lobit.tokenizer import Tokenizer

    return Tokenizer.from_folder(source, config.vocab_size) if (source / "tokenizer.json").is_file() else None


def bundle_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer in a bundle.

    Raises:
        BundleError: it has none.
    """
    from lobit.tokenizer import Tokenizer

    if not any(entry.role == "tokenizer" for entry in bundle.manifest.files):
        raise BundleError(f"bundle {bundle.folder} has no tokenizer: put tokenizer.json into the model's folder and export again")
    tokens = bundle.manifest.tokens
    return Tokenizer.from_file(
        bundle.path("tokenizer"), bos=tokens.bos, stop=tokens.stop, chat_template=tokens.chat_template, special=tokens.special
    )


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
    model, _ = _converted_like(resolve(checkpoint), Recipe.from_json(opened.manifest.recipe))
    return verification.verify(opened, stored_layers(model), fingerprint(model))


def _converted_like(source: Path, recipe: Recipe) -> tuple[Transformer, Recipe]:
    """A checkpoint as it is; a float model under `recipe`."""
    from lobit.quant_recipes.quantized import is_checkpoint

    return _converted(source, None if is_checkpoint(source) else recipe)


def parity(
    bundle: Path,
    reference: str,
    text: str,
    *,
    tokens: int = 2048,
    checkpoint: str | None = None,
    stages: Sequence[str] = STAGES,
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
        stages: which of `STAGES` to compare; `artifact` always is.
        threads: of the artifact's runtime.
        progress: called with (stage, tokens done, tokens in all).

    Raises:
        InputError: the checkpoint is not the one that the bundle was made from, or a stage is unknown.
    """
    from lobit.checkpoint import load_config, load_model, resolve
    from lobit.quant_recipes.quantized import fingerprint
    from lobit.quant_recipes.recipe import Recipe
    from lobit.runtime import parity as comparison
    from lobit.runtime.bundle import open_bundle
    from lobit.runtime.engine import open_engine
    from lobit.runtime.reference import ReferenceEngine

    unknown = sorted(set(stages) - set(STAGES))
    if unknown:
        raise InputError(f"there is no stage {', '.join(unknown)}: choose of {', '.join(STAGES)}")
    opened = open_bundle(bundle)
    manifest, source = opened.manifest, resolve(reference)
    ids = bundle_tokenizer(opened).encode(text, bos=False)[:tokens]
    config, recipe = load_config(source), Recipe.from_json(manifest.recipe)
    model, _ = _converted_like(resolve(checkpoint) if checkpoint else source, recipe)
    if fingerprint(model) != manifest.checkpoint_sha256:
        raise InputError(
            f"{checkpoint or reference} does not hold the weights that bundle {bundle} was made from: give the model it was exported "
            "from, and with --checkpoint its quantized checkpoint where it was trained"
        )
    engines: dict[str, Any] = {}
    if "fake_quant" in stages:
        engines["fake_quant"] = ReferenceEngine(model, recipe, manifest.context)
    if "graph" in stages:
        again, _ = _converted_like(resolve(checkpoint) if checkpoint else source, recipe)
        engines["graph"] = _graph_engine(again, recipe, manifest)
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


def _graph_engine(model: Transformer, recipe: Recipe, manifest: Manifest) -> Engine:
    """The exported graph, run by PyTorch: the artifact's operators before lowering."""
    import torch

    from lobit.export.target import Spec, find_target
    from lobit.quiet import quiet_native
    from lobit.runtime.engine import Logits, SteppingEngine

    module, spec = find_target(manifest.target), Spec(recipe, manifest.context, manifest.chunk)
    graph = module.trace(module.program(model, spec), spec).module(check_guards=False)

    @torch.inference_mode()
    def step(tokens: list[int], position: int) -> Logits:
        with quiet_native():
            logits: torch.Tensor = graph(torch.tensor([tokens]), torch.tensor([position]))
        return logits.reshape(-1).numpy()

    return SteppingEngine(step, manifest.context, manifest.chunk, manifest.model.vocab_size)


def bench(
    bundles: Sequence[Path],
    *,
    prompts: Sequence[int] = (128,),
    generates: Sequence[int] = (64,),
    depths: Sequence[int] = (0,),
    threads: int | None = None,
    repetitions: int = 5,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prefill and decode speed, time to first token, memory: each row in a process of its own."""
    from lobit.runtime import bench as benchmark

    return benchmark.bench(
        list(bundles),
        prompts=tuple(prompts),
        generates=tuple(generates),
        depths=tuple(depths),
        threads=threads,
        repetitions=repetitions,
        progress=progress,
    )


def report(results: Sequence[Path], out: Path) -> Path:
    """One HTML page from the JSON of parity, bench, verify, and from manifests."""
    from lobit.runtime import report as page

    return page.report(list(results), out, command=" ".join(sys.argv))


def run(
    bundle: Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continues a prompt.

    Args:
        bundle: the bundle's folder.
        prompt: the text.
        max_new_tokens: at most.
        temperature: 0: the most probable token each time.
        seed: of the sampling.
        threads: of the runtime.
        on_text: called with each piece of text as it becomes final.

    Returns:
        `{"prompt", "text", "tokens", "stats"}`.
    """
    from lobit.runtime.bundle import open_bundle
    from lobit.runtime.engine import open_engine
    from lobit.runtime.generate import generate, text_pieces

    opened = open_bundle(bundle)
    tokenizer, engine = bundle_tokenizer(opened), open_engine(opened, threads)
    generation = generate(
        engine,
        tokenizer.encode(prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop=tokenizer.stop,
    )
    pieces = []
    for piece in text_pieces(generation, tokenizer.stream()):
        pieces.append(piece)
        if on_text:
            on_text(piece)
    return {"prompt": prompt, "text": "".join(pieces), "tokens": generation.tokens, "stats": _speed(generation.stats)}


def _speed(stats: GenerationStats) -> dict[str, Any]:
    """Counts, seconds and tokens per second."""
    import dataclasses

    rates = ("prefill_tokens_per_second", "decode_tokens_per_second")
    return dataclasses.asdict(stats) | {name: getattr(stats, name) for name in rates}


def chat(
    bundle: Path,
    lines: Iterable[str],
    on_text: Callable[[str], None],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
    on_turn: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """A conversation: a line is a turn of the user's; the answer comes in pieces.

    Args:
        bundle: the bundle's folder; its tokenizer must have a chat template.
        lines: the user's turns.
        on_text: called with each piece of an answer, and with a line break after it.
        max_new_tokens: of an answer, at most.
        temperature: 0: the most probable token each time.
        seed: of the sampling.
        threads: of the runtime.
        on_turn: called with the counts and speed of each turn.

    Raises:
        InputError: the model has no chat template.
    """
    from lobit.runtime.bundle import open_bundle
    from lobit.runtime.engine import open_engine
    from lobit.runtime.generate import Chat, Sampling

    opened = open_bundle(bundle)
    tokenizer = bundle_tokenizer(opened)
    if tokenizer.chat_template is None:
        raise InputError(f"{bundle} has no chat template, its model continues text: give one with --prompt")
    conversation = Chat(open_engine(opened, threads), tokenizer)
    for line in lines:
        if line.strip():
            for piece in conversation.say(line.strip(), max_new_tokens=max_new_tokens, sampling=Sampling(temperature, seed=seed)):
                on_text(piece)
            on_text("\n")
            if on_turn:
                on_turn(_speed(conversation.stats))


def doctor(target: str | None = None) -> dict[str, Any]:
    """What is installed and what is missing.

    Args:
        target: one target; None: all.

    Returns:
        `{"parts": [{"for", "part", "found", "way_out"}], "passed"}`; `found` is a version, or None.

    Raises:
        TargetError: there is no such target.
    """
    import os
    from importlib import metadata

    from lobit.errors import TargetError

    if target is not None and target not in PARTS:
        raise TargetError(f"there is no target {target!r}: choose one of {', '.join(name for name in PARTS if name != 'lobit')}")
    rows: list[dict[str, Any]] = []
    for name in ("lobit", target) if target else PARTS:
        for package in PARTS[name]:
            try:
                found: str | None = metadata.version(package)
            except metadata.PackageNotFoundError:
                found = None
            rows.append({"for": name, "part": package, "found": found, "way_out": f"pip install 'lobit[{name}]'"})
    rows.append({"for": "lobit", "part": "processor cores", "found": str(os.cpu_count() or 1), "way_out": ""})
    return {"parts": rows, "passed": all(row["found"] for row in rows)}


def demo(out: Path, *, on_step: Callable[[str], None] | None = None, repetitions: int = 3) -> Path:
    """The shipped model through everything: quantize, export, verify, parity, bench, report. Returns the report.

    Raises:
        BundleError: something is at `out`.
    """
    import json

    from lobit.demo import FOLDER, held_out_text
    from lobit.export.bundle import check_place
    from lobit.runtime.manifest import FILE_NAME

    say = on_step or (lambda _: None)
    check_place(out)
    out.mkdir()
    recipe = choose_recipe("8da4w-g32")
    checkpoint, bundle = out / "checkpoint", out / "demo-8da4w-g32"
    say("quantize: INT4 weights in groups of 32")
    quantize("demo", recipe, checkpoint)
    say("export: ExecuTorch, XNNPACK (about half a minute)")
    export(str(checkpoint), "xnnpack", bundle, context=512, chunk=128, command=["lobit", "demo"])
    results: dict[str, dict[str, Any]] = {}
    say("verify: every integer and scale, read back out of the program")
    results["verify"] = verify(bundle, str(checkpoint))
    say("parity: against the float model, on stories it has not seen")
    results["parity"] = parity(bundle, str(FOLDER), held_out_text(8), tokens=600, checkpoint=str(checkpoint))
    training = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    results["parity"]["text"] = "held-out stories of the demo's grammar"
    results["parity"]["entropy"] = {"nats_per_token": training["entropy"], "what": "the story grammar, exact"}
    say("bench: prefill and decode, each row in a process of its own")
    results["bench"] = bench([bundle], prompts=(128,), generates=(32,), depths=(0, 256), repetitions=repetitions)
    paths = [bundle / FILE_NAME, bundle / "build.json"]
    for name, result in results.items():
        paths.append(out / f"{name}.json")
        paths[-1].write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    say("report")
    return report(paths, out / "report.html")
