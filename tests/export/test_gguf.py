"""Target gguf: the file has the checkpoint's integers, and llama.cpp tells with it what the reference tells."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lobit import verbs
from lobit.checkpoint import load_config, load_model, resolve
from lobit.demo import held_out_text
from lobit.errors import TargetError
from lobit.export.block_inputs import round_blocks
from lobit.export.gguf.architecture import choose, fields_of
from lobit.export.gguf.arithmetic import arithmetic
from lobit.export.gguf.file import entries
from lobit.export.gguf.weights import Q4_0, Q8_0, form_of, packed
from lobit.export.target import Spec
from lobit.model import Config
from lobit.quant_recipes.recipe import Recipe, WeightGrid
from lobit.quant_recipes.train import Run
from lobit.rope import LongRopeScaling, Rope
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import open_engine
from lobit.runtime.gguf_parts import GgufFile
from lobit.runtime.llama_library import Model
from lobit.runtime.reference import ReferenceEngine
from lobit.runtime.stored import read_program
from lobit.tokenizer import Tokenizer
from lobit.verbs.make import converted
from tests.conftest import EXCLUDED
from tests.mutations import reseal
from tests.oracles import SMALL, WINDOW, of_class
from tests.small_models import FAMILIES, write_model, write_tokenizer

CONTEXT = 64
NEAR = 0.03
"""How far apart the two likeliest tokens may be, in standard deviations of all logits, where llama.cpp may take the other: it rounds
queries, keys and values to half precision, which moves logits of small random models by up to 0.015."""
TERNARY_DEMO = Path(verbs.__file__).parents[1] / "demo" / "ternary"
LINEAR = {"rope_type": "linear", "factor": 8.0}
WITHIN_A_WINDOW = 32
"""Positions that a window of the demo holds; llama.cpp has no architecture with windows like these."""
REFUSED = {
    "gemma3": "scales attention by",  # this small one has a scale of its own; Gemma's are those of llama.cpp
    "mobilellm-pro": "--context 16",
    "bitnet": "silu where the model has relu2",
    "bitnet-masters": "silu where the model has relu2",
}
"""Families whose small model llama.cpp does not compute, and what the message says."""


def export(model: Path | str, out: Path, recipe: str | Recipe = "fp", context: int = CONTEXT, **options: Any) -> Path:
    chosen = verbs.choose_recipe(recipe) if isinstance(recipe, str) else recipe
    verbs.export(str(model), "gguf", out, recipe=chosen, context=context, **options)
    return out


def differing_tokens(reference: Any, engine: Any, prompt: list[int], count: int) -> list[int]:
    """Positions at which the engine takes another token than the reference, though that is not nearly as likely."""
    expected, found, differing = reference.prefill(prompt), engine.prefill(prompt), []
    for _ in range(count):
        token, other = int(expected.argmax()), int(found.argmax())
        if expected[token] - expected[other] > NEAR * expected.std():
            differing.append(engine.position)
        expected, found = reference.decode(token), engine.decode(token)
    return differing


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_llama_cpp_tells_the_same_tokens_as_the_reference(name: str, tmp_path: Path) -> None:
    write_model(name, tmp_path / "model")
    bundle = export(tmp_path / "model", tmp_path / "bundle")
    assert verbs.verify(bundle, str(tmp_path / "model"))["passed"]
    reference = ReferenceEngine(load_model(tmp_path / "model"), None, CONTEXT)
    assert differing_tokens(reference, open_engine(open_bundle(bundle), 1), list(range(60, 80)), 40) == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    write_model(name, tmp_path / "model")
    with pytest.raises(TargetError, match=REFUSED[name]):
        export(tmp_path / "model", tmp_path / "bundle")


def test_a_real_model_in_floats_tells_the_reference_s_story(stories: Path, tmp_path: Path) -> None:
    engine = open_engine(open_bundle(export(stories, tmp_path / "bundle", context=160)), 1)
    prompt = Tokenizer.from_folder(stories).encode("Once upon a time")
    assert differing_tokens(ReferenceEngine(load_model(stories), None, 160), engine, prompt, 120) == []


@pytest.mark.parametrize("recipe", ["8da4w-g32", "8da8w", "bitnet", "fp16"])
def test_quantized_models_pass_verify_and_parity(recipe: str, tmp_path: Path) -> None:
    write_model("llama3", tmp_path / "model")
    bundle = export(tmp_path / "model", tmp_path / "bundle", recipe)
    verified = verbs.verify(bundle, str(tmp_path / "model"))
    assert verified["passed"]
    assert (verified["integers"] > 0) == (recipe != "fp16")
    assert verbs.parity(bundle, str(tmp_path / "model"), "The quick brown fox. " * 20, tokens=300, threads=1)["passed"]


@pytest.mark.parametrize("ternary", [False, True])
def test_the_demo_within_a_window_is_proved(ternary: bool, tmp_path: Path) -> None:
    source = str(TERNARY_DEMO) if ternary else "demo"
    recipe = "bitnet" if ternary else "8da4w-g32"
    bundle = export(source, tmp_path / "bundle", recipe, WITHIN_A_WINDOW)
    formats = {group.format for group in open_bundle(bundle).manifest.weights}
    assert any("as TQ2_0, inputs int8 in blocks of 256" in text for text in formats) == ternary
    assert verbs.verify(bundle, source)["passed"]
    found = verbs.parity(bundle, "demo", held_out_text(10), tokens=200, checkpoint=source if ternary else None, threads=1)
    assert found["passed"]
    model, _ = converted(resolve(source), None if ternary else verbs.choose_recipe(recipe))
    exact = arithmetic(model, Spec(verbs.choose_recipe(recipe), WITHIN_A_WINDOW, WITHIN_A_WINDOW))
    prompt = Tokenizer.from_folder(resolve(source)).encode("Once upon a time")
    count = WITHIN_A_WINDOW - len(prompt)
    assert differing_tokens(ReferenceEngine(*exact, WITHIN_A_WINDOW), open_engine(open_bundle(bundle), 1), prompt, count) == []


def write_gemma_3(folder: Path, **ropes: dict[str, Any]) -> None:
    """A Gemma 3 whose attention has the scale of its head size, as llama.cpp's has; `ropes` changes rotary embeddings."""
    sizes = {**SMALL, "num_hidden_layers": 6, "hidden_size": 96, "max_position_embeddings": CONTEXT}
    config = transformers.Gemma3TextConfig(**sizes, head_dim=32, sliding_window=WINDOW, query_pre_attn_scalar=32)
    for layers, rope in ropes.items():
        config.rope_parameters[layers].update(rope)
    of_class(config, norm=0.0)(folder)
    write_tokenizer(folder)


@pytest.mark.parametrize("ropes", [{}, {"full_attention": LINEAR}], ids=["plain", "scaled without windows"])
def test_gemma_3_with_its_own_scale_runs_with_windows_and_two_rotary_bases(ropes: Any, tmp_path: Path) -> None:
    write_gemma_3(tmp_path / "model", **ropes)
    bundle = open_bundle(export(tmp_path / "model", tmp_path / "bundle"))
    assert bundle.manifest.delegation.backend == "llama.cpp, gemma3"
    assert verbs.verify(bundle.folder, str(tmp_path / "model"))["passed"]
    reference = ReferenceEngine(load_model(tmp_path / "model"), None, CONTEXT)
    assert differing_tokens(reference, open_engine(bundle, 1), list(range(60, 80)), 40) == []


def test_gemma_3_with_a_scaled_rotary_embedding_in_its_windows_is_refused(tmp_path: Path) -> None:
    write_gemma_3(tmp_path / "model", sliding_attention=LINEAR)
    with pytest.raises(TargetError, match=r"gemma3.* scales the rotary embedding of layers without a window alone: take target"):
        export(tmp_path / "model", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


@pytest.mark.parametrize("kind", ["linear", "yarn"])
@pytest.mark.parametrize("family", ["LlamaConfig", "Qwen3Config", "SmolLM3Config"])
def test_rotary_scaling_is_llama_cpp_s(family: str, kind: str, tmp_path: Path) -> None:
    """By a factor for each frequency (llama), or by what llama.cpp computes of the fields itself."""
    more = {"original_max_position_embeddings": 16} if kind == "yarn" else {}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **more}
    of_class(getattr(transformers, family)(**{**SMALL, "max_position_embeddings": CONTEXT}, rope_parameters=rope))(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    bundle = open_bundle(export(tmp_path / "model", tmp_path / "bundle"))
    reference = ReferenceEngine(load_model(tmp_path / "model"), None, CONTEXT)
    tokens = list(range(60, 60 + CONTEXT))
    expected, found = reference.score(tokens), open_engine(bundle, 1).score(tokens)
    assert np.median(np.abs(expected - found).max(axis=1)) < NEAR / 2 * expected.std()


def test_one_flipped_integer_is_found(stories: Path, tmp_path: Path) -> None:
    bundle = export(stories, tmp_path / "bundle", verbs.choose_recipe("8da4w-g32", exclude=(EXCLUDED,)))
    with (bundle / "model.gguf").open("r+b") as file:
        file.seek(GgufFile(bundle / "model.gguf").tensors["blk.2.attn_k.weight"].data_offset + 2)  # behind the first block's scale
        flipped = bytes([file.read(1)[0] ^ 0x10])
        file.seek(-1, 1)
        file.write(flipped)
    reseal(bundle)
    found = verbs.verify(bundle, str(stories))
    assert (found["passed"], found["differing_integers"], found["differing_scales"]) == (False, 1, 0)
    assert [row["name"] for row in found["layers"] if row["differing_integers"]] == ["layers.2.attention.k"]


def test_blocks_hold_integers_and_scales_as_ggml_reads_them() -> None:
    from gguf.quants import dequantize

    generator = torch.Generator().manual_seed(0)
    for kept, lowest, highest in ((Q4_0, -8, 8), (Q8_0, -128, 128)):
        integers = torch.randint(lowest, highest, (6, 96), generator=generator, dtype=torch.int8)
        scale = torch.rand((6, 3), generator=generator).half().float()
        values = dequantize(packed(integers, scale, kept, "x").numpy(), kept.type)
        assert np.array_equal(values, (integers.float().view(6, 3, 32) * scale[:, :, None]).view(6, 96).numpy())


def test_scales_that_half_precision_does_not_hold_are_refused() -> None:
    with pytest.raises(TargetError, match=r"1 of 3 scales of layers.0.mlp.up are no values of half precision.*target onnx"):
        packed(torch.zeros(3, 32, dtype=torch.int8), torch.tensor([[0.5], [0.1], [2.0]]), Q8_0, "layers.0.mlp.up")


def test_ternary_weights_take_fewer_bytes_where_these_are_asked_for(tmp_path: Path) -> None:
    smallest = export(TERNARY_DEMO, tmp_path / "bundle", "bitnet", WITHIN_A_WINDOW, smallest=True)
    assert any("as TQ1_0, inputs int8 in blocks of 256" in group.format for group in open_bundle(smallest).manifest.weights)
    assert verbs.verify(smallest, str(TERNARY_DEMO))["passed"]
    found = verbs.parity(smallest, "demo", held_out_text(4), tokens=100, checkpoint=str(TERNARY_DEMO), threads=1)
    assert found["passed"]


@pytest.mark.parametrize(
    ("bits", "group", "inner", "name"),
    [
        (2, None, 512, "TQ2_0"),
        (2, None, 128, "Q4_0"),
        (2, 128, 512, "Q4_0"),
        (1, None, 256, "Q4_0"),
        (3, 32, 64, "Q4_0"),
        (6, None, 64, "Q8_0"),
    ],
)
def test_integers_take_the_narrowest_blocks_that_hold_them(bits: Any, group: int | None, inner: int, name: str) -> None:
    assert form_of(WeightGrid(bits, group), inner).type.name == name


def test_rows_that_are_no_whole_blocks_are_refused_with_what_to_except(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"layers.\*.mlp.down \(row of 172\).*--except 'layers.\*.mlp.down'"):
        export(stories, tmp_path / "bundle", "8da8w")


def test_options_of_other_targets_are_refused(models: Any) -> None:
    plan = verbs.plan(str(models("llama")), verbs.choose_recipe("fp"), "gguf", portable=True, soc="SM8650")
    assert [problem.split()[0] for problem in plan.problems] == ["--portable", "--soc"]


def test_the_plan_tells_the_size_of_the_file(stories: Path, tmp_path: Path) -> None:
    recipe = verbs.choose_recipe("8da4w-g32", exclude=(EXCLUDED,))
    plan = verbs.plan(str(stories), recipe, "gguf", context=CONTEXT)
    found = open_bundle(export(stories, tmp_path / "bundle", recipe)).manifest.program_bytes
    assert abs(plan.file_bytes - found) < 0.03 * found


def test_a_tied_table_is_stored_once_and_a_block_that_runs_twice_as_often(tmp_path: Path) -> None:
    write_model("mobilellm-ls", tmp_path / "model")
    bundle = open_bundle(export(tmp_path / "model", tmp_path / "bundle"))
    names = list(GgufFile(bundle.path("program")).tensors)
    assert ("output.weight" in names, sum("ffn_up" in name for name in names)) == (False, bundle.manifest.model.layers)
    assert [layer.name for layer in read_program(bundle).layers()][-1] == "token_embd.weight"


@pytest.mark.parametrize("half", [False, True])
def test_inputs_are_rounded_in_blocks_of_their_own(half: bool) -> None:
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    x[0, 32:64] = 0
    found, scale = round_blocks(x, 32, half), x.view(2, 3, 32).abs().amax(2, keepdim=True) / 127
    kept = scale.half().float() if half else scale
    integers = (found.view(2, 3, 32) / kept.clamp(min=1e-9)).round()
    assert torch.allclose(found.view(2, 3, 32), integers * kept, rtol=1e-6)
    assert (integers.abs() <= 127).all()
    assert ((found - x).abs().view(2, 3, 32) <= 0.5 * scale + 127 * (kept - scale).abs() + 1e-7).all()


def test_factors_for_single_frequencies_are_those_of_the_rotary_embedding(models: Any) -> None:
    config = load_config(models("llama"))
    rope = Rope(1e4, config.head_dim, LongRopeScaling(tuple(1 + i / 4 for i in range(config.head_dim // 2)), 1.25))
    turned = dataclasses.replace(config, layers=tuple(dataclasses.replace(layer, rope=rope) for layer in config.layers))
    architecture, problems = choose(turned, 64)
    plain = 1e4 ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    assert problems == []
    assert torch.allclose(plain / architecture.vectors["rope_freqs.weight"], rope.frequencies()[0])
    assert fields_of(turned, architecture, 64)["llama.rope.scaling.attn_factor"] == 1.25


def test_the_context_of_a_file_without_the_model_s_windows_is_what_they_hold(models: Any) -> None:
    config: Config = load_config(models("mobilellm_p1"))
    architecture, problems = choose(config, 16)
    assert (architecture.name, problems) == ("qwen3", [])
    assert fields_of(config, architecture, 16)["qwen3.context_length"] == 16
    assert "--context 16" in choose(config, 17)[1][0]


def test_entries_have_as_many_bytes_as_the_list_of_tensors_says(models: Any) -> None:
    model, recipe = converted(models("llama"), verbs.choose_recipe("8da4w-g32"))
    tensors = entries(model, choose(model.config, 64)[0], Spec(recipe, 64, 64))
    made = {entry.name: entry.make() for entry in tensors}
    assert all(tensor.numel() * tensor.element_size() == entry.bytes for entry, tensor in zip(tensors, made.values(), strict=True))


@pytest.mark.parametrize("source", ["stories", "demo"])
def test_llama_cpp_alone_goes_on_with_a_text_as_lobit_does(source: str, stories: Path, tmp_path: Path) -> None:
    """Text to tokens and tokens to logits by llama.cpp, from nothing but the file; by lobit from the model's folder."""
    folder = stories if source == "stories" else resolve("demo")
    bundle = open_bundle(export(folder, tmp_path / "bundle", context=WITHIN_A_WINDOW))
    text = "Once upon a time, there was"
    with closing(Model(bundle.path("program"))) as model:
        prompt = model.tokenize(text, around=True)
    assert prompt == Tokenizer.from_folder(folder).encode(text)
    reference = ReferenceEngine(load_model(folder), None, WITHIN_A_WINDOW)
    assert differing_tokens(reference, open_engine(bundle, 1), prompt, WITHIN_A_WINDOW - len(prompt)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("smallest", "name"), [(False, "TQ2_0"), (True, "TQ1_0")])
def test_a_checkpoint_fresh_from_ternary_training_is_in_the_file_bit_by_bit(smallest: bool, name: str, tmp_path: Path) -> None:
    checkpoint, recipe = tmp_path / "checkpoint", verbs.choose_recipe("bitnet")
    verbs.train("demo", recipe, verbs.Texts([held_out_text(60)], length=64), checkpoint, run=Run(steps=3, batch=1).dealt())
    bundle = export(checkpoint, tmp_path / "bundle", recipe, WITHIN_A_WINDOW, smallest=smallest)
    assert GgufFile(bundle / "model.gguf").tensors["blk.0.ffn_down.weight"].tensor_type.name == name
    found = verbs.verify(bundle, str(checkpoint))
    assert found["passed"] and found["integers"] > 0
