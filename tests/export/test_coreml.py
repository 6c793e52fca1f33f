"""Target coreml: what packages of half floats hold and compute, on every family and under every recipe, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lobit import verbs
from lobit.checkpoint import load_model, save_model
from lobit.demo import held_out_text
from lobit.errors import BundleError, InputError, TargetError
from lobit.export.coreml.mil import Blobs
from lobit.export.coreml.ops import MULTIPLE, slots
from lobit.model import Transformer
from lobit.quant_recipes.catalog import CATALOG
from lobit.runtime.bundle import open_bundle
from lobit.runtime.coreml import evaluator
from lobit.runtime.coreml_file import read_package
from lobit.runtime.engine import open_engine
from lobit.runtime.reference import ReferenceEngine
from lobit.verbs.calibrate import Calibration
from tests.mutations import refused, reseal
from tests.small_models import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT, CHUNK = 64, 8
TEXT = "".join(chr(code) for code in np.random.default_rng(0).integers(32, 127, 120))
"""For models with a tokenizer of bytes."""
RECIPES = [name for name in CATALOG if name not in ("fp", "w4-channel-learned")]
"""`fp` needs --float32; the integers of `w4-channel-learned` come from training, and are stored as those of `w4-channel`."""
ROUNDED = 1e-3
"""Nats that rounding every operation to half precision may cost a small model: 1e-5 was measured, an overflow costs whole nats."""


def exported(model: Any, out: Path, recipe: str, *, context: int = CONTEXT, chunk: int = CHUNK, **options: Any) -> Path:
    text = Calibration(held_out_text(8), 4, 32) if CATALOG[recipe].is_calibrated else None
    verbs.export(str(model), "coreml", out, recipe=verbs.choose_recipe(recipe), context=context, chunk=chunk, calibration=text, **options)
    return out


@pytest.fixture(scope="module")
def demo(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(models("demo"), tmp_path_factory.mktemp("coreml") / "demo", "8da4w-g32", context=128, chunk=32)


def save_as(model: Transformer, like: Path, folder: Path) -> None:
    """Writes a changed model as a folder, with the tokenizer of the one that it comes from."""
    shutil.copytree(like, folder)
    save_model(model, json.loads((like / "config.json").read_text(encoding="utf-8")), folder, torch.float32)


def nothing_differs(verified: dict[str, Any]) -> bool:
    return not any(count for name, count in verified.items() if name.startswith("differing")) and bool(verified["passed"])


# --- what packages hold and compute -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_exported_verified_and_proved(recipe: str, models: Any, tmp_path: Path) -> None:
    bundle = exported(models("demo"), tmp_path / "bundle", recipe)
    assert nothing_differs(verbs.verify(bundle, "demo"))
    result = verbs.parity(bundle, "demo", held_out_text(8), tokens=100)
    assert result["passed"] and [row["name"] for row in result["stages"]] == ["fake_quant", "graph", "artifact"], result["limits"]
    assert [row["name"] for row in result["beside"]] == ["rounded"] and result["beside"][0]["kl_step"] < ROUNDED
    assert result["phases"]["wrapped"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_what_was_quantized(family: str, small_models: Any, tmp_path: Path) -> None:
    folder, _ = small_models(family)
    bundle = exported(folder, tmp_path / "bundle", "8da4w-g32")
    assert nothing_differs(verbs.verify(bundle, str(folder)))
    result = verbs.parity(bundle, str(folder), TEXT, stages=["fake_quant", "graph"])
    assert result["passed"], result["limits"]


FORMS = [{"explicit_cache": True}, {"float32": True, "explicit_cache": True}, {"all_logits": True}, {"executorch": True}]


@pytest.mark.slow
@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("model", ["demo", "stories260k"])
def test_every_form_of_package_computes_the_same(model: str, options: dict[str, bool], models: Any, tmp_path: Path) -> None:
    bundle = exported(models(model), tmp_path / "bundle", "8da8w", **options)
    assert nothing_differs(verbs.verify(bundle, str(models(model))))
    result = verbs.parity(bundle, str(models(model)), held_out_text(8), tokens=100)
    assert result["passed"], result["limits"]
    assert bool(open_bundle(bundle).manifest.states) == bool(options.get("explicit_cache") or options.get("executorch"))


def test_a_chunk_of_one_is_a_program_of_decode_alone(models: Any, tmp_path: Path) -> None:
    bundle = exported(models("demo"), tmp_path / "bundle", "8da8w", chunk=1)
    assert [method.name for method in open_bundle(bundle).manifest.methods] == ["decode"]
    assert verbs.parity(bundle, "demo", held_out_text(8), tokens=60)["passed"]


def test_stories260k_tells_the_story_that_the_reference_tells(stories: Path, tmp_path: Path) -> None:
    bundle = exported(stories, tmp_path / "bundle", "fp", float32=True, context=128)
    engine, reference = open_engine(open_bundle(bundle)), ReferenceEngine(load_model(stories), None, 128)
    prompt = [1, 403, 407, 261, 378]
    told = []
    for one in (engine, reference):
        tokens, logits = list(prompt), one.prefill(prompt)
        while len(tokens) < 100:
            tokens.append(int(logits.argmax()))
            logits = one.decode(tokens[-1])
        told.append(tokens)
    assert told[0] == told[1]
    assert verbs.run(bundle, "Once upon a time", max_new_tokens=20)["text"].strip()


def test_a_text_read_again_after_a_reset_gives_the_same_logits(demo: Path) -> None:
    engine = open_engine(open_bundle(demo))
    tokens = list(range(5, 105))
    first = engine.prefill(tokens)
    engine.reset()
    np.testing.assert_array_equal(engine.prefill(tokens), first)


def test_a_tied_embedding_is_stored_once_and_functions_share_all_weights(demo: Path) -> None:
    manifest = open_bundle(demo).manifest
    weights = next(entry.bytes for entry in manifest.files if entry.role == "weights")
    told = sum(group.bytes for group in manifest.weights)
    assert weights == pytest.approx(told, rel=0.03), "a second copy of any kind of weights would be more"
    assert sum(group.parameters for group in manifest.weights) == manifest.model.parameters


def test_a_window_keeps_itself_and_a_call_and_the_context_is_rounded_up(models: Any) -> None:
    config = load_model(models("demo")).config
    found = slots(config, 1000, 32, explicit=False)
    for layer, count in zip(config.layers, found, strict=True):
        least = layer.window + 32 - 1 if layer.window else 1000 + 32 - 1
        assert count % MULTIPLE == 0 and least <= count < least + 2 * MULTIPLE
    assert slots(config, 1000, 32, explicit=True) == config.cache_slots(1000)


def test_arrays_lie_where_the_program_says(tmp_path: Path) -> None:
    """The places are reckoned before the file is written; coremltools' writer has the last word."""
    blobs, generator = Blobs(), np.random.default_rng(0)
    arrays = {
        "fp16": torch.tensor(generator.normal(size=(3, 7))).half().float(),
        "fp32": torch.tensor(generator.normal(size=(5, 33))).float(),
        "int4": torch.tensor(generator.integers(-8, 8, (9, 13)), dtype=torch.int8),
        "int8": torch.tensor(generator.integers(-128, 128, (3, 50)), dtype=torch.int8),
        "uint2": torch.tensor(generator.integers(-1, 2, (7, 9)), dtype=torch.int8),
        "uint1": torch.tensor(2 * generator.integers(0, 2, (7, 9)) - 1, dtype=torch.int8),
    }
    for dtype, array in arrays.items():
        blobs.add(dtype, array, dtype)
        blobs.add(dtype, array, dtype)
    blobs.write(tmp_path / "weight.bin", lambda *_: None)
    assert len(blobs.offsets) == len(arrays)
    assert (tmp_path / "weight.bin").stat().st_size <= blobs.end


def test_the_same_model_gives_the_same_bytes(demo: Path, models: Any, tmp_path: Path) -> None:
    again = exported(models("demo"), tmp_path / "demo", "8da4w-g32", context=128, chunk=32)
    assert (again / "manifest.json").read_bytes() == (demo / "manifest.json").read_bytes()


def test_the_plan_says_what_the_package_is(models: Any, demo: Path) -> None:
    manifest = open_bundle(demo).manifest
    plan = verbs.plan("demo", verbs.choose_recipe("8da4w-g32"), "coreml", context=128, chunk=32)
    assert plan.file_bytes == pytest.approx(manifest.program_bytes, rel=0.03)
    assert (plan.weights, plan.cache) == (manifest.weights, manifest.cache)


def test_nothing_is_timed(demo: Path) -> None:
    rows = verbs.bench([demo])["rows"]
    assert [(row["method"], row["tokens"]) for row in rows] == [("prefill", 32), ("decode", 1)]
    assert not any("second" in key for row in rows for key in row)
    assert verbs.run(demo, "Once", max_new_tokens=2)["stats"]["emulated"]


def test_a_bias_of_zeros_is_a_bias(small_models: Any, tmp_path: Path) -> None:
    """Core ML's products have zeros where a model has no bias: these are not taken for one, nor one of zeros for none."""
    folder, _ = small_models("qwen2")
    model = load_model(folder)
    model.blocks[0].attention.k.bias.data.zero_()
    save_as(model, folder, tmp_path / "zeros")
    assert nothing_differs(verbs.verify(exported(tmp_path / "zeros", tmp_path / "bundle", "8da8w"), str(tmp_path / "zeros")))


# --- what is refused, and what is told ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"recipe": "fp"}, "half precision would round them: add --float32, or take recipe fp16"),
        ({"portable": True}, "--portable is for target onnx"),
        ({"soc": "SM8650"}, "--soc SM8650 is for target qnn"),
        ({"context": 4096}, "context 4096 is outside"),
    ],
)
def test_what_core_ml_cannot_hold_is_refused_before_any_work(options: dict[str, Any], told: str, models: Any, tmp_path: Path) -> None:
    with pytest.raises((TargetError, InputError), match=told):
        exported(models("demo"), tmp_path / "bundle", **({"recipe": "8da8w"} | options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["float32", "explicit_cache", "executorch"])
@pytest.mark.parametrize("target", ["xnnpack", "onnx"])
def test_options_of_core_ml_are_for_it_alone(option: str, target: str, models: Any, tmp_path: Path) -> None:
    name = option.replace("_", "-")
    with pytest.raises(TargetError, match=f"--{name} is for target coreml"):
        verbs.export(str(models("demo")), target, tmp_path / "x", recipe=verbs.choose_recipe("8da8w"), context=64, **{option: True})  # type: ignore[arg-type]


def test_scales_that_half_precision_does_not_hold_are_refused(models: Any) -> None:
    from lobit.export.target import Spec, find_target
    from lobit.stage_cache import StageCache
    from lobit.verbs.make import converted

    recipe = verbs.choose_recipe("8da8w")
    model = converted(models("llama"), recipe)[0]
    model.blocks[0].attention.q.scale[0] *= 1 + 2**-13
    with pytest.raises(TargetError, match="1 scales are not values of half precision"):
        find_target("coreml").lower(model, Spec(recipe, 64, 8), StageCache(Path("unused")), lambda *_: None)


def test_values_beyond_half_precision_are_told_with_their_place(small_models: Any, tmp_path: Path) -> None:
    """A model whose gate is large: its products leave half precision on the way to `down`."""
    folder, _ = small_models("tinyllama")
    model = load_model(folder)
    for name in ("gate", "up"):
        getattr(model.blocks[1].mlp, name).weight.data *= 20_000
    save_as(model, folder, tmp_path / "large")
    bundle = exported(tmp_path / "large", tmp_path / "bundle", "fp16")
    with pytest.raises(BundleError, match=r"does not hold .* in layers_1_mlp_.*: export with --float32"):
        verbs.parity(bundle, str(tmp_path / "large"), TEXT)
    assert verbs.parity(exported(tmp_path / "large", tmp_path / "exact", "fp", float32=True), str(tmp_path / "large"), TEXT)["passed"]


def test_a_package_in_float32_has_no_rounded_stage(models: Any, tmp_path: Path) -> None:
    bundle = exported(models("demo"), tmp_path / "bundle", "fp", float32=True)
    with pytest.raises(InputError, match="has no stage rounded"):
        verbs.parity(bundle, "demo", held_out_text(8), tokens=40, stages=["rounded"])


@pytest.mark.parametrize(("option", "value"), [("float32", "yes"), ("soc", "SM8650"), ("soc", 5), ("activations", "int8")])
def test_options_that_export_would_not_have_taken_are_refused(option: str, value: Any, demo: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(demo, tmp_path / "bundle"))
    reseal(bundle, lambda values: values["options"].update({option: value}))
    told = refused(lambda: verbs.parity(bundle, "demo", held_out_text(8), tokens=40))
    assert option in told and "export it again" in told


def test_large_rows_are_normed_in_half_precision(small_models: Any, tmp_path: Path) -> None:
    """The squares of a residual stream of thousands, which chat models have, are beyond half precision; the norm is not."""
    folder, _ = small_models("tinyllama")
    model = load_model(folder)
    model.embedding.weight.data *= 3000 / model.embedding.weight.data.abs().max()
    save_as(model, folder, tmp_path / "large")
    bundle = exported(tmp_path / "large", tmp_path / "bundle", "fp16")
    result = verbs.parity(bundle, str(tmp_path / "large"), TEXT)
    assert result["passed"] and result["warnings"] == [] and result["beside"][0]["kl_step"] < ROUNDED


def test_both_functions_are_evaluated_from_the_files_alone(demo: Path) -> None:
    bundle = open_bundle(demo)
    package = read_package(bundle)
    assert set(package.functions) == {"prefill", "decode"}
    kinds = [kind for function in package.functions.values() for kind in function.states.values()]
    assert kinds and all(kind.shape[1] % MULTIPLE == kind.shape[2] % MULTIPLE == 0 for kind in kinds)
    assert evaluator(bundle).run("decode", {"tokens": np.array([[5]]), "position": np.array([0])})["logits"].shape == (1, 1, 768)
