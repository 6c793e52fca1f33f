"""Target onnx: every recipe's integers in ONNX Runtime's operators and in standard ones, for ONNX Runtime and for other clients."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from lobit import verbs
from lobit.checkpoint import load_config, load_model
from lobit.demo import held_out_text
from lobit.errors import InputError
from lobit.export.onnx import target
from lobit.export.onnx.emit import emit
from lobit.export.onnx.target import GENAI_FILE
from lobit.export.onnx.weights import form_of
from lobit.export.target import Spec
from lobit.families import read_config
from lobit.model import Layer, Transformer
from lobit.quant_recipes.apply import convert
from lobit.quant_recipes.catalog import CATALOG, find_recipe
from lobit.quant_recipes.recipe import WeightGrid
from lobit.runtime import onnxruntime as onnxruntime_engine
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import SteppingEngine, default_threads, open_engine
from lobit.runtime.onnx_ports import GRAPH_FILE
from lobit.runtime.onnxruntime import stepper
from lobit.runtime.parity import kl_divergence, log_softmax
from lobit.runtime.reference import ReferenceEngine
from lobit.stage_cache import StageCache
from tests.onnx_walks import (
    CHUNK,
    CONTEXT,
    FLOAT_RELATIVE,
    PORTABLE_KL,
    THREADS,
    TOKENS,
    export,
    off,
    reference,
    short_texts,
    walked,
)

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES = [name for name in CATALOG if not name.startswith("gptq")]
ROUNDED_INPUTS = {"8da4w-g32", "8da4w-g32-e8", "8da8w", "bitnet", "trilm", "bonsai", "bilm"}
"""Recipes whose products have INT8 inputs in ONNX Runtime's operators: their own, or since two bits have fast products in no other way."""


ROUNDED_KL = 0.01
"""Nats a token between a recipe and a graph that rounds its inputs in blocks, of models of a few layers: 2e-3 measured."""


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("model", ["llama", "mobilellm_p1"])
def test_every_recipe_runs_as_it_was_quantized(model: str, name: str, portable: bool, models: Any, tmp_path: Path) -> None:
    recipe = verbs.choose_recipe(name, kv_cache="float", activations="float")
    bundle = export(models(model), recipe, tmp_path / "bundle", portable=portable)
    verified = verbs.verify(bundle, str(models(model)))
    assert verified["passed"], verified
    engines = reference(models(model), recipe), open_engine(open_bundle(bundle), THREADS)
    expected, found = map(walked, engines)
    exact = name not in ROUNDED_INPUTS or (portable and not recipe.rules[0].activation_bits)
    if exact:
        assert (np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)).max() < FLOAT_RELATIVE
    elif portable:
        assert off(*map(short_texts, engines)) < PORTABLE_KL
    else:
        assert kl_divergence(log_softmax(expected), log_softmax(found)).mean() < ROUNDED_KL
    levels = [next(one.i for one in node.attribute if one.name == "accuracy_level") for node in products(bundle)]
    assert set(levels) == (set() if portable or name in ("fp", "fp16") else {4} if name in ROUNDED_INPUTS else {0})


def products(bundle: Path) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(bundle / GRAPH_FILE, load_external_data=False).graph.node if node.op_type == "MatMulNBits"]


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(
    "mixed", ["int3:32", "int3", "int4", "int4:16", "int6", "int6:64", "int8", "int8:32", "ternary", "binary", "float"]
)
def test_every_grid_is_held_without_changing_a_value(mixed: str, portable: bool, models: Any, tmp_path: Path) -> None:
    recipe = verbs.choose_recipe("w4-channel", mixed=[f"*={mixed}"])
    bundle = export(models("llama"), recipe, tmp_path / "bundle", portable=portable)
    verified = verbs.verify(bundle, str(models("llama")))
    assert verified["passed"], verified
    assert (verified["integers"] > 0) == (mixed != "float")
    expected, found = walked(reference(models("llama"), recipe)), walked(open_engine(open_bundle(bundle), THREADS))
    assert kl_divergence(log_softmax(expected), log_softmax(found)).mean() < ROUNDED_KL


def test_integers_of_other_widths_say_how_they_are_held(models: Any, tmp_path: Path) -> None:
    recipe = verbs.choose_recipe("8da4w-g32", mixed=["layers.0.*=int3", "layers.1.*=int6", "embedding=ternary", "head=int8"])
    formats = {group.format for group in target.weights(Spec(recipe, CONTEXT, CHUNK), load_config(models("llama")))}
    assert "int3 per channel as int4, inputs int8 in blocks of 64" in formats
    assert "int6 per channel as int8, inputs int8 in blocks of 64" in formats
    assert "ternary per channel" in formats


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("model", ["llama", "qwen3", "mobilellm_p1", "mobilellm-ls"])
def test_the_plan_says_every_byte(model: str, name: str, portable: bool, models: Any, small_models: Any, tmp_path: Path) -> None:
    folder = small_models(model)[0] if model == "mobilellm-ls" else models(model)
    recipe, options = find_recipe(name), {"context": 64, "chunk": CHUNK, "portable": portable, "all_logits": name == "fp"}
    plan = verbs.plan(str(folder), recipe, "onnx", **options)
    bundle = verbs.export(str(folder), "onnx", tmp_path / "bundle", recipe=recipe, **options)
    assert plan.problems == []
    assert plan.file_bytes == bundle.program_bytes
    assert plan.cache == bundle.cache


def test_blocks_tile_rows_and_groups() -> None:
    for inner in range(1, 700):
        for bits in (2, 4, 8):
            form = form_of(WeightGrid(bits, None), inner, rows=False, fused=True)
            assert form.block in (32, 64, 128)
            assert 0 <= form.columns - inner < form.block
            if bits > 2:
                assert form.block == 32 or inner % form.block == 0
        rows = form_of(WeightGrid(4, None), inner, rows=True, fused=True)
        assert rows.columns == inner
        assert rows.block is None or inner % rows.block == 0
    for group in range(16, 512, 16):
        form = form_of(WeightGrid(4, group), 3 * group, rows=False, fused=True)
        assert form.block in (16, 32, 64, 128)
        assert group % form.block == 0
        assert form.columns == 3 * group


def test_rows_of_two_bits_are_filled_up_to_faster_blocks() -> None:
    def block(inner: int) -> int | None:
        return form_of(WeightGrid(2, None, "absmean"), inner, rows=False, fused=True).block

    assert [block(inner) for inner in (768, 576, 1056, 192, 172, 64, 32)] == [128, 128, 128, 64, 64, 64, 32]


def test_groups_that_no_block_divides_are_refused(models: Any) -> None:
    recipe = verbs.choose_recipe("8da4w-g32", group_size=8)
    (problem,) = target.check(Spec(recipe, CONTEXT, CHUNK), load_config(models("llama")))
    assert "group_size=8" in problem
    assert "16" in problem
    assert "--portable" in problem
    assert target.check(Spec(recipe, CONTEXT, CHUNK, portable=True), load_config(models("llama"))) == []
    rows = verbs.choose_recipe("bitnet", mixed=["embedding=int4:8"])  # found by tokens, not multiplied with
    assert target.check(Spec(replace(rows, untied=True), CONTEXT, CHUNK), load_config(models("llama"))) == []


@pytest.mark.parametrize("recipe", ["fp", "8da4w-g32", "8da8w"])
def test_a_tied_table_is_stored_once(recipe: str, models: Any) -> None:
    def stored(untied: bool) -> int:
        chosen = replace(find_recipe(recipe), untied=untied)
        return len(emit(convert(load_model(models("qwen3")), chosen), Spec(chosen, CONTEXT, CHUNK)).regions)

    assert stored(True) - stored(False) == (1 if recipe == "fp" else 2), "a weight, and its scales"


@pytest.mark.parametrize("most", [CONTEXT, CONTEXT - 1])
def test_attention_has_tiles_where_a_cache_is_long(most: int, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, seen = onnxruntime_engine.UNTILED, list[str | None]()
    monkeypatch.setattr(onnxruntime_engine, "UNTILED_SLOTS", most)
    monkeypatch.delenv(name, raising=False)
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: seen.append(os.environ.get(name)) or session(*a, **k))
    bundle = export(models("llama"), find_recipe("fp"), tmp_path / "bundle")
    expected, found = walked(reference(models("llama"), find_recipe("fp"))), walked(open_engine(open_bundle(bundle), THREADS))
    assert seen == ["1" if most == CONTEXT else "0"]
    assert name not in os.environ
    assert np.abs(found - expected).max() / np.abs(expected).max() < FLOAT_RELATIVE


@pytest.mark.parametrize(
    ("model", "name"), [("stories260k", "fp"), ("stories260k", "8da8w"), ("demo", "fp"), ("demo", "fp16"), ("demo", "8da4w-g32")]
)
def test_parity_passes_at_prefill_decode_and_after_windows_have_wrapped(
    model: str, name: str, models: Any, shared: Any, tmp_path: Path
) -> None:
    bundle = export(models(model), find_recipe(name), tmp_path / "bundle")
    text = shared("text/tinystories_sample.txt").read_text(encoding="utf-8")
    result = verbs.parity(bundle, str(models(model)), text, tokens=250, threads=THREADS)
    assert result["passed"], result["stages"]
    assert [phase for phase, found in result["phases"].items() if found] == ["prefill", "decode", *(["wrapped"] if model == "demo" else [])]
    artifact = result["stages"][-1]
    assert not name.startswith("fp") or artifact["kl_conversion"] < 1e-6


def test_a_bundle_says_how_many_threads_run_it(models: Any, tmp_path: Path) -> None:
    folder = export(models("llama"), find_recipe("fp"), tmp_path / "bundle", threads=1)
    bundle = open_bundle(folder)
    assert (bundle.manifest.threads, default_threads(bundle)) == (1, 1)
    assert bundle.manifest.delegation.backend == "CPUExecutionProvider"
    options = json.loads((folder / GENAI_FILE).read_text())["model"]["decoder"]["session_options"]
    assert options["intra_op_num_threads"] == 1

    def threads_of(told: int | None) -> int:
        return int(cast(Any, open_engine(bundle, told)).step.session.get_session_options().intra_op_num_threads)

    assert (threads_of(None), threads_of(2)) == (1, 2)
    for wrong in (-1, 1025):
        with pytest.raises(InputError, match=f"{wrong} threads"):
            export(models("llama"), find_recipe("fp"), tmp_path / "wrong", threads=wrong)


def test_the_stage_graph_computes_what_the_graph_does(models: Any, tmp_path: Path) -> None:
    """In PyTorch with inputs rounded in blocks, where the recipe rounds them by tokens."""
    bundle = export(models("demo"), find_recipe("8da4w-g32"), tmp_path / "bundle")
    result = verbs.parity(bundle, str(models("demo")), held_out_text(2), tokens=120, stages=["fake_quant", "graph"], threads=THREADS)
    rows = result["stages"]
    assert [row["name"] for row in rows] == ["fake_quant", "graph", "artifact"]
    assert rows[2]["kl_step"] == rows[2]["kl_conversion"] < rows[1]["kl_step"]


@pytest.mark.parametrize("portable", [False, True])
def test_logits_of_all_tokens_are_those_of_the_tokens_one_by_one(portable: bool, models: Any, tmp_path: Path) -> None:
    recipe = find_recipe("fp")
    bundle = open_bundle(export(models("llama"), recipe, tmp_path / "bundle", portable=portable, all_logits=True))
    engine, config = open_engine(bundle, THREADS), load_config(models("llama"))
    expected = np.stack([engine.decode(token) for token in TOKENS[:20]])
    session = onnxruntime.InferenceSession(str(bundle.path("program")))
    slots = 0 if portable else CONTEXT
    feed = {port.name: np.zeros((1, config.kv_heads, slots, config.head_dim), np.float32) for port in session.get_inputs()}
    feed |= {"input_ids": np.array([TOKENS[:20]])} | ({} if portable else {"position_ids": np.arange(20)[None]})
    (found,) = session.run(["logits"], feed)
    assert found.shape == (1, 20, config.vocab_size)
    assert np.abs(found[0] - expected).max() / np.abs(expected).max() < FLOAT_RELATIVE


def random_model(**changes: Any) -> Transformer:
    """A small Llama with changes of its `Config`."""
    values = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 400,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    model, generator = Transformer(replace(read_config(values), **changes)), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def engine_of(model: Transformer, spec: Spec, folder: Path) -> SteppingEngine:
    lowered = target.lower(model, spec, StageCache(folder), lambda *_: None)
    target.write(lowered, folder, lambda *_: None)
    step = stepper(folder / GRAPH_FILE, lowered.methods[0], lowered.states, THREADS)
    return SteppingEngine(step, spec.context, target.step(spec), model.config.vocab_size)


def relative(found: Any, expected: Any) -> float:
    return float((np.abs(found - expected).max(axis=-1) / np.abs(expected).max(axis=-1)).max())


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("softcap", [2.0, None])
@pytest.mark.parametrize("head_dim", [4, 12, 16, 24])
def test_heads_of_every_size_and_softcaps(head_dim: int, softcap: float | None, portable: bool, tmp_path: Path) -> None:
    """Sizes that ONNX Runtime's attention does not take at all, that it does not turn, and that it does."""
    rope = replace(random_model().config.layers[0].rope, dim=head_dim)
    model = random_model(head_dim=head_dim, layers=(Layer(None, rope),) * 2, attention_softcap=softcap, logits_softcap=softcap)
    spec = Spec(find_recipe("fp"), CONTEXT, CHUNK, portable)
    expected = walked(ReferenceEngine(model, None, CONTEXT))
    assert relative(walked(engine_of(model, spec, tmp_path)), expected) < FLOAT_RELATIVE


@pytest.mark.parametrize("calls", [[], [200], [50, 200], [7] * 40, [1, 71, 1, 72, 1, 73]], ids=str)
@pytest.mark.parametrize("window", [1, 8, 100])
def test_windows_forget_the_same_whatever_the_calls_are(window: int, calls: list[int], tmp_path: Path) -> None:
    context = 300
    model = random_model()
    rope = model.config.layers[0].rope
    model.config = replace(model.config, layers=(Layer(window, rope), Layer(None, rope)))
    spec = Spec(find_recipe("fp"), context, chunk=200)
    assert target.cache(spec, model.config).slots == [window + target.SLACK, context]
    tokens = [int(token) for token in np.random.default_rng(1).integers(0, 64, context)]
    engine = engine_of(model, spec, tmp_path)
    for _ in range(2):
        engine.reset()
        found, start = [], 0
        for length in calls:
            found.append(engine.prefill(tokens[start : start + length]))
            start += length
        found += [engine.decode(token) for token in tokens[start:]]
        positions = [*(np.cumsum(calls).astype(int) - 1), *range(start, context)]
        expected = ReferenceEngine(model, None, context).score(tokens)[positions]
        assert relative(np.stack(found), expected) < FLOAT_RELATIVE


@pytest.mark.parametrize("dim", [16, 32])
def test_a_part_of_each_head_is_turned_inside_of_the_operator(dim: int, tmp_path: Path) -> None:
    rope = replace(random_model().config.layers[0].rope, dim=dim)
    model = random_model(head_dim=48, layers=(Layer(None, rope),) * 2)
    spec = Spec(find_recipe("fp"), CONTEXT, CHUNK)
    assert emit(model, spec).composed == []
    assert relative(walked(engine_of(model, spec, tmp_path)), walked(ReferenceEngine(model, None, CONTEXT))) < FLOAT_RELATIVE


@pytest.mark.parametrize(
    ("head_dim", "left"), [(12, {"Softmax", "Cos", "Concat"}), (24, {"Cos", "Concat"}), (16, set[str]())]
)
def test_what_is_composed_of_standard_operators_is_told(head_dim: int, left: set[str], tmp_path: Path) -> None:
    rope = replace(random_model().config.layers[0].rope, dim=head_dim)
    recipe = find_recipe("8da8w")
    model = convert(random_model(head_dim=head_dim, layers=(Layer(None, rope),) * 2), recipe)
    lowered = target.lower(model, Spec(recipe, CONTEXT, CHUNK), StageCache(tmp_path / "kept"), lambda *_: None)
    assert {"Softmax", "Cos", "Concat"} & set(lowered.delegation.left) == left
    assert not any("MatMulNBits" in name for name in lowered.delegation.left)
    assert lowered.delegation.delegated["com.microsoft::MatMulNBits"] == 2 * 4 + 1


def test_a_softcap_and_a_squared_relu_are_told(tmp_path: Path) -> None:
    model = random_model(logits_softcap=2.0, activation="relu2")
    spec = Spec(find_recipe("fp"), CONTEXT, CHUNK)
    left = target.lower(model, spec, StageCache(tmp_path / "kept"), lambda *_: None).delegation.left
    assert left == {"Div": 1, "Tanh": 1, "Relu": 2, "Mul": 1 + 2}


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(
    "mixed",
    [
        ["embedding=int4:32", "head=int4:32"],
        ["embedding=int8", "head=ternary", "layers.0.attention.q=int8", "layers.1.mlp.gate=float"],
        ["head=float", "embedding=int3:16", "layers.1.*=int6"],
    ],
    ids=str,
)
def test_mixed_precision_runs_as_it_was_quantized(mixed: list[str], portable: bool, models: Any, tmp_path: Path) -> None:
    recipe = verbs.choose_recipe("bitnet", mixed=mixed)
    bundle = export(models("llama"), recipe, tmp_path / "bundle", portable=portable)
    assert verbs.verify(bundle, str(models("llama")))["passed"]
    expected, found = walked(reference(models("llama"), recipe)), walked(open_engine(open_bundle(bundle), THREADS))
    kl = kl_divergence(log_softmax(expected), log_softmax(found))
    assert kl.mean() < ROUNDED_KL
    assert not portable or kl[0] < PORTABLE_KL, "later an entry may fall to the other side of a boundary"
