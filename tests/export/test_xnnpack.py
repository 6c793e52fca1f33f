"""Target xnnpack, end to end: what ExecuTorch runs is the model, at every position, in its own memory, on its own runner."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lobit import verbs
from lobit.checkpoint import load_model
from lobit.demo import held_out_text
from lobit.errors import InputError, TargetError
from lobit.export.target import Spec
from lobit.export.xnnpack import target as xnnpack
from lobit.families import read_config
from lobit.model import Config
from lobit.quant_recipes.apply import convert
from lobit.quant_recipes.catalog import find_recipe
from lobit.quant_recipes.grid import token_absmax, token_range
from lobit.quant_recipes.recipe import Recipe
from lobit.runtime.bundle import Bundle, open_bundle
from lobit.runtime.engine import Engine, Logits, open_engine
from lobit.runtime.executorch import ProgramFile, import_runtime
from lobit.runtime.generate import generate
from lobit.runtime.parity import kl_divergence, log_softmax
from lobit.runtime.reference import ReferenceEngine
from lobit.tokenizer import Tokenizer

Bundles = Any
"""The fixture of tests/conftest.py: `bundles(model, recipe, kv_cache)`."""
THREADS = 1
"""Models this small are not faster on more."""

FLOAT_RELATIVE = 1e-4
"""Of the largest logit: sums of float32 in another order give about 1e-6, one key that is missed or seen too much over 1e-2."""
FIRST_TOKENS = 15
ROUNDED_KL = 1e-3
"""Nats, mean over a walk: the integers are the same, but an activation or a cache entry on a rounding boundary may fall to its
other side, which later tokens then read: 5e-5 to 4e-4 where it was measured, without such an entry 1e-13."""
ROUNDED_RELATIVE = 0.1
"""Of the largest logit, at any position: 0.03 where it was measured."""
ZERO_POINT_KL = 1e-2
"""Nats, mean over a walk: inputs on XNNPACK's grid of a token in place of one without zero point; 7e-4 where it was measured."""
OVERHEAD = 0.10
"""Of the weights' bytes: graphs, names, alignment."""
OVERHEAD_PARTITION = 8192
"""Bytes: a delegate's graph and the alignment of its segment; 4 to 6 kB where it was measured."""

slow = pytest.mark.slow
VARIANTS = [
    ("stories260k", "fp", None),
    ("stories260k", "8da4w-g32", None),
    ("stories260k", "8da8w", None),
    ("mobilellm_p1", "fp", None),
    ("mobilellm_p1", "8da4w-g32", None),
    ("llama", "8da4w-g32", None),
    ("qwen3", "8da4w-g32", None),
    ("mobilellm_p1", "bitnet", None),
    pytest.param("mobilellm_p1", "fp", "int8", marks=slow),
    pytest.param("mobilellm_p1", "8da4w-g32", "float", marks=slow),
    pytest.param("mobilellm_p1", "8da8w", None, marks=slow),
    pytest.param("stories260k", "bitnet", None, marks=slow),
    pytest.param("demo", "8da4w-g32", None, marks=slow),
]
"""Model, recipe, and the key-value cache where it is not the recipe's own."""
FAMILIES = ["llama", "qwen3", "mobilellm_p1"]


@pytest.fixture(scope="module")
def text(shared: Callable[[str], Path]) -> Callable[[Bundle], list[int]]:
    """`text(bundle)`: as many tokens as the context holds; of real text where the model has a tokenizer."""

    @cache
    def tokens(name: str, vocabulary: int, context: int, tokenizer: Path | None) -> list[int]:
        if tokenizer is None:
            return [int(token) for token in np.random.default_rng(0).integers(0, vocabulary, context)]
        stories = held_out_text(8) if name.startswith("demo") else shared("text/tinystories_sample.txt").read_text("utf-8")[:4000]
        inner = Tokenizer.from_folder(tokenizer)
        return inner.encode(stories)[:context]

    def read(bundle: Bundle) -> list[int]:
        manifest = bundle.manifest
        has_one = (bundle.folder / "tokenizer.json").is_file()
        return tokens(manifest.name, manifest.model.vocab_size, manifest.context, bundle.folder if has_one else None)

    return read


def reference_of(folder: Path, recipe: Recipe, context: int) -> ReferenceEngine:
    """The model in PyTorch, rounded as the recipe says."""
    return ReferenceEngine(convert(load_model(folder), recipe), recipe, context)


def with_zero_points(recipe: Recipe) -> Recipe:
    """The recipe with the grid that XNNPACK gives the inputs of every product."""
    return replace(recipe, rules=tuple(replace(rule, activation_rule="range") for rule in recipe.rules))


def walk(engine: Engine, tokens: Sequence[int], calls: Sequence[int]) -> Logits:
    """Logits after each prefill call of so many tokens, then after each further token."""
    engine.reset()
    rows, start = [], 0
    for length in calls:
        rows.append(engine.prefill(tokens[start : start + length]))
        start += length
    return np.stack([*rows, *(engine.decode(token) for token in tokens[start:])])


def relative_error(found: Logits, expected: Logits) -> NDArray[Any]:
    """At each position, of its largest logit."""
    return np.asarray(np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1))


def first_error(engine: Engine, reference: Engine, tokens: Iterable[int]) -> float:
    """Of a text's first token: the median over many, since no earlier token's rounding is read there, and flips of its own are rare."""
    rows: list[list[Logits]] = [[], []]
    for token in sorted(set(tokens))[:FIRST_TOKENS]:
        for one, found in zip((engine, reference), rows, strict=True):
            one.reset()
            found.append(one.prefill([token]))
    return float(np.median(relative_error(*map(np.stack, rows))))


@pytest.mark.parametrize(("model", "recipe", "kv_cache"), VARIANTS)
def test_artifact_and_reference_agree_from_the_first_position_to_the_last(
    model: str, recipe: str, kv_cache: Any, bundles: Bundles, models: Any, text: Any
) -> None:
    bundle = open_bundle(bundles(model, recipe, kv_cache))
    chunk, tokens = bundle.manifest.chunk, text(bundle)
    calls = [1, 5, chunk, chunk + 7]
    assert sum(calls) < len(tokens) == bundle.manifest.context
    engine = open_engine(bundle, THREADS)
    chosen = with_zero_points(bundles.recipe(model, recipe, kv_cache))
    reference = reference_of(models(model), chosen, len(tokens))
    assert first_error(engine, reference, tokens) < FLOAT_RELATIVE
    found = walk(engine, tokens, calls)
    expected = walk(reference, tokens, calls)
    error = relative_error(found, expected)
    if chosen.rules or chosen.kv_bits:
        assert kl_divergence(log_softmax(expected), log_softmax(found)).mean() < ROUNDED_KL
        assert error.max() < ROUNDED_RELATIVE
    else:
        assert error.max() < FLOAT_RELATIVE
    assert engine.position == engine.context == len(tokens)
    with pytest.raises(InputError, match=str(engine.context)):
        engine.decode(tokens[0])


def test_a_bitnet_model_is_computed_with_the_finer_of_two_grids_of_its_inputs(bundles: Bundles, models: Any, text: Any) -> None:
    """BitNet's grid of a token has no zero point, XNNPACK's has one: the step of its s is never the larger."""
    bundle, recipe = open_bundle(bundles("mobilellm_p1", "bitnet")), find_recipe("bitnet")
    x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)) * 3 + torch.linspace(-9, 9, 1000)[:, None]
    assert (token_range(x)[0] <= token_absmax(x)[0]).all()
    tokens, calls = text(bundle), [5, 33]
    expected = walk(reference_of(models("mobilellm_p1"), recipe, len(tokens)), tokens, calls)
    found = walk(open_engine(bundle, THREADS), tokens, calls)
    assert kl_divergence(log_softmax(expected), log_softmax(found)).mean() < ZERO_POINT_KL
    assert all(group.format.endswith("with zero point") for group in bundle.manifest.weights if group.kind in ("attention", "mlp"))


@pytest.mark.parametrize("calls", [[], [40], [7] * 9, [32, 32], [15, 1, 1, 16, 17], [128]], ids=str)
def test_windows_forget_the_same_whatever_the_calls_are(calls: list[int], bundles: Bundles, models: Any, text: Any) -> None:
    bundle = open_bundle(bundles("mobilellm_p1", "fp"))
    tokens, window = text(bundle), bundle.manifest.model.largest_window
    assert window < bundle.manifest.chunk < len(tokens)
    expected = ReferenceEngine(load_model(models("mobilellm_p1"))).score(tokens)
    positions = [*(np.cumsum(calls).astype(int) - 1), *range(sum(calls), len(tokens))]
    found = walk(open_engine(bundle, THREADS), tokens, calls)
    assert relative_error(found, expected[positions]).max() < FLOAT_RELATIVE


@pytest.mark.parametrize(("context", "chunk"), [(20, 1), (40, 40), pytest.param(5, 3, marks=slow), pytest.param(1, 1, marks=slow)])
def test_any_context_and_chunk_agree_with_the_reference(context: int, chunk: int, models: Any, tmp_path: Path) -> None:
    recipe = find_recipe("8da4w-g32")
    verbs.export(str(models("mobilellm_p1")), "xnnpack", tmp_path / "bundle", recipe=recipe, context=context, chunk=chunk)
    engine = open_engine(open_bundle(tmp_path / "bundle"), THREADS)
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, 96, context)]
    for calls in ([1], [context], [context - context // 3]):
        reference = reference_of(models("mobilellm_p1"), recipe, context)
        assert first_error(engine, reference, range(0, 96, 8)) < FLOAT_RELATIVE
        assert relative_error(walk(engine, tokens, calls), walk(reference, tokens, calls)).max() < ROUNDED_RELATIVE


@pytest.mark.parametrize("recipe", ["fp", "8da4w-g32"])
def test_nothing_of_a_conversation_is_left_after_a_reset(recipe: str, bundles: Bundles, text: Any) -> None:
    bundle = open_bundle(bundles("mobilellm_p1", recipe))
    tokens, calls = text(bundle), [3, 20, 33]
    expected = walk(open_engine(bundle, THREADS), tokens, calls)
    used = open_engine(bundle, THREADS)
    walk(used, tokens[::-1], [50])
    assert np.array_equal(walk(used, tokens, calls), expected)


def test_weights_are_packed_when_an_engine_is_opened(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """XNNPACK does it in the first call, whose speed would be told as the prompt's."""
    calls: list[Any] = []

    class Module:
        def forward(self, inputs: Any) -> Any:
            calls.append([tensor.tolist() for tensor in inputs])
            return (torch.zeros(1, 512),)

    monkeypatch.setattr(import_runtime(), "_load_for_executorch", lambda path: Module())
    engine = open_engine(open_bundle(bundles("stories260k", "fp")))
    assert calls == [[[[0]], [0]]]
    assert engine.position == 0


def test_a_refused_call_changes_nothing(bundles: Bundles, text: Any) -> None:
    bundle = open_bundle(bundles("mobilellm_p1", "8da4w-g32"))
    tokens, engine = text(bundle), open_engine(bundle, THREADS)
    expected = walk(open_engine(bundle, THREADS), tokens[:21], [20])[-1]
    engine.prefill(tokens[:20])
    for wrong in ([], [96], [-1], tokens):
        with pytest.raises(InputError):
            engine.prefill(wrong)
    assert engine.position == 20
    assert np.array_equal(engine.decode(tokens[20]), expected)


# --- memory and size ----------------------------------------------------------------------------------------------------------


def mobilellm_pro() -> Config:
    """The real shape (MobileLLM-Pro, Table 1)."""
    layers = 30
    kinds = ["full_attention" if i % 4 == 0 or i == layers - 1 else "sliding_attention" for i in range(layers)]
    values = {
        "model_type": "mobilellm_p1",
        "hidden_size": 1280,
        "num_hidden_layers": layers,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 6144,
        "vocab_size": 202048,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "use_qk_norm": True,
        "layer_types": kinds,
        "sliding_window": 512,
    }
    return read_config(values)


@pytest.mark.parametrize(("context", "mebibytes"), [(2000, 14), (4000, 23), (8000, 40)])
def test_mobilellm_pro_has_the_cache_of_its_paper(context: int, mebibytes: int) -> None:
    """MobileLLM-Pro, Table 10."""
    info = xnnpack.cache(Spec(find_recipe("8da4w-g32"), context, 1), mobilellm_pro())
    assert round(info.value_bytes / 2**20) == mebibytes


@pytest.mark.parametrize("recipe", ["fp", "8da4w-g32"])
def test_a_layer_with_a_window_keeps_only_its_window(recipe: str, bundles: Bundles) -> None:
    manifest = open_bundle(bundles("mobilellm_p1", recipe)).manifest
    entries = 2 * (128 + 16 + 128) * 2 * 32  # keys and values, slots, heads, head size
    assert manifest.cache.slots == [128, 16, 128]
    assert manifest.cache.value_bytes == entries * {"fp": 4, "8da4w-g32": 1}[recipe]
    assert manifest.cache.scale_bytes == {"fp": 0, "8da4w-g32": entries // 32 * 5}[recipe]


@pytest.mark.parametrize(("model", "recipe"), [("mobilellm_p1", "fp"), ("mobilellm_p1", "8da4w-g32"), ("stories260k", "8da4w-g32")])
def test_the_program_keeps_what_the_manifest_says(model: str, recipe: str, bundles: Bundles) -> None:
    bundle = open_bundle(bundles(model, recipe))
    plan = ProgramFile(bundle.path("program")).plan
    kernels = [operator.name for operator in plan.operators]
    calls = [call.instr_args for call in plan.chains[0].instructions if hasattr(call.instr_args, "op_index")]
    written = {call.args[1] for call in calls if kernels[call.op_index].startswith("llama::update_cache")}
    width = {1: 1, 6: 4}  # int8, float32 as ExecuTorch's schema numbers them
    found = sum(int(np.prod(plan.values[i].val.sizes)) * width[int(plan.values[i].val.scalar_type)] for i in written)
    assert found == bundle.manifest.cache.bytes


@pytest.mark.parametrize(
    ("model", "recipe"), [("stories260k", "fp"), ("stories260k", "8da4w-g32"), pytest.param("demo", "8da4w-g32", marks=slow)]
)
def test_prefill_and_decode_share_one_copy_of_the_weights(model: str, recipe: str, bundles: Bundles) -> None:
    bundle = open_bundle(bundles(model, recipe))
    manifest, program = bundle.manifest, ProgramFile(bundle.path("program")).program
    computing = [plan.name for plan in program.execution_plan if plan.chains and plan.chains[0].instructions]
    assert computing == ["forward"]
    weights = sum(group.bytes for group in manifest.weights)
    overhead = manifest.file("program").bytes - weights
    assert 0 < overhead < OVERHEAD * weights + OVERHEAD_PARTITION * manifest.delegation.partitions


@pytest.mark.parametrize("model", FAMILIES)
def test_a_layer_is_seven_products(model: str, bundles: Bundles) -> None:
    bundle = open_bundle(bundles(model, "8da4w-g32"))
    shapes = [stored.values.shape for stored in ProgramFile(bundle.path("program")).layers()]
    layer = [(4 * 32, 64), (2 * 32, 64), (2 * 32, 64), (64, 4 * 32), (128, 64), (128, 64), (64, 128)]
    assert shapes == [(96, 64), *layer * bundle.manifest.model.layers, (96, 64)]


# --- ExecuTorch's own runner ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "recipe", "prompt"),
    [
        ("stories260k", "fp", "Once upon a time"),
        ("stories260k", "8da4w-g32", "Once upon a time"),
        pytest.param("demo", "8da4w-g32", "Once", marks=slow),
    ],
)
def test_executorchs_own_runner_tells_the_same_story(model: str, recipe: str, prompt: str, bundles: Bundles) -> None:
    """The C++ runner that Android's `LlmModule` wraps, on the bundle's files as they are.

    It reads no post-processor of tokenizer.json, so the client asks for the first token (`num_bos`). It decodes each token by itself, where
    a `Strip` decoder takes the space before a word, so our tokens are decoded the same way.
    """
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    bundle, length = open_bundle(bundles(model, recipe)), 100
    assert length > bundle.manifest.chunk
    tokenizer = Tokenizer.from_folder(bundle.folder)
    generation = generate(open_engine(bundle, THREADS), tokenizer.encode(prompt), max_new_tokens=length)
    expected = [tokenizer.decode([token]) for token in generation]
    pieces: list[str] = []
    runner = TextLLMRunner(str(bundle.path("program")), str(bundle.path("tokenizer")))
    config = GenerationConfig(echo=False, temperature=0, max_new_tokens=length, num_bos=0 if bundle.manifest.tokens.bos is None else 1)
    runner.generate(prompt, config, pieces.append)
    assert pieces == expected


def test_the_program_tells_a_runner_what_it_must_know(bundles: Bundles) -> None:
    bundle = open_bundle(bundles("stories260k", "8da4w-g32"))
    program = import_runtime()._load_for_executorch(str(bundle.path("program")))
    promised = {
        "get_max_seq_len": [64],
        "get_max_context_len": [192],
        "get_vocab_size": [512],
        "get_bos_id": [1],
        "get_eos_ids": [2],
        "use_kv_cache": [True],
        "enable_dynamic_shape": [True],
        "use_sdpa_with_kv_cache": [True],
    }
    assert {name: program.run_method(name, ()) for name in promised} == promised
    assert sorted(program.method_names()) == sorted([*promised, "forward"])


@pytest.mark.parametrize(("model", "recipe"), [("mobilellm_p1", "fp"), ("mobilellm_p1", "8da4w-g32"), ("stories260k", "8da8w")])
def test_a_program_has_only_operators_that_android_has(model: str, recipe: str, bundles: Bundles) -> None:
    bundle = open_bundle(bundles(model, recipe))
    operators = ProgramFile(bundle.path("program")).operators()
    assert any(name.startswith("llama::") for name in operators)
    xnnpack.check_operators(operators)


def test_an_operator_that_android_lacks_is_named() -> None:
    with pytest.raises(TargetError) as error:
        xnnpack.check_operators(["aten::add.out", "aten::no_such.out", "mine::other.out"])
    assert "2 operators" in str(error.value)
    assert "aten::no_such.out" in str(error.value)
    assert "mine::other.out" in str(error.value)
    assert "aten::add.out" not in str(error.value)


# --- the same everywhere, the same again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", FAMILIES)
def test_every_family_ships_its_own_integers(model: str, bundles: Bundles, models: Any) -> None:
    result = verbs.verify(bundles(model, "8da4w-g32"), str(models(model)))
    differing = {name: count for name, count in result.items() if name.startswith("differing")}
    assert differing == {"differing_integers": 0, "differing_scales": 0, "differing_floats": 0}
    assert result["floats"] > 0, "norms and biases"
    assert result["checkpoint_matches"]


EXPORT = """
import sys
from pathlib import Path
from lobit import verbs
model, out, context, chunk = sys.argv[1:]
recipe = verbs.choose_recipe("8da4w-g32")
verbs.export(model, "xnnpack", Path(out), recipe=recipe, context=int(context), chunk=int(chunk), command=["another", "command"])
"""


def test_another_process_folder_umask_and_hash_seed_give_the_same_bytes(
    bundles: Bundles, models: Any, tmp_path: Path, another_process: Any
) -> None:
    first = bundles("qwen3", "8da4w-g32")
    manifest = json.loads((first / "manifest.json").read_text(encoding="utf-8"))
    again = tmp_path / first.name
    sizes = manifest["context"], manifest["chunk"]
    another_process(EXPORT, models("qwen3"), again, *sizes, environment={"PYTHONHASHSEED": "4711"}, umask=0o077)
    assert (again / "model.pte").read_bytes() == (first / "model.pte").read_bytes()
    assert (again / "manifest.json").read_bytes() == (first / "manifest.json").read_bytes()
