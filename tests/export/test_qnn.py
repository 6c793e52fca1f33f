"""Target qnn: what the graphs say, what Qualcomm's compiler makes of them, and what the emulator of the HTP computes."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lobit import verbs
from lobit.demo import TERNARY_FOLDER, held_out_text
from lobit.errors import BundleError, InputError, TargetError
from lobit.export.qnn import compiling
from lobit.export.qnn.builder import EagerHtpBuilder, QnnBuilder
from lobit.export.qnn.compiling import compile_variants
from lobit.export.qnn.graph import Graph, Weights
from lobit.export.qnn.program import write_pte
from lobit.export.qnn.target import OPERATOR_ERROR, SOCS
from lobit.export.qnn.weights import HtpLinear
from lobit.quant_recipes.integer import IntegerLinear, quantize_linear
from lobit.quant_recipes.recipe import Rule, WeightGrid
from lobit.runtime.bundle import open_bundle
from lobit.runtime.client import CachedProgram
from lobit.runtime.engine import open_engine
from lobit.runtime.manifest import FILE_NAME, Method, Port, sealed, sha256_of
from lobit.stage_cache import StageCache
from lobit.verbs import prove
from tests.small_models import FAMILIES

pytestmark = [pytest.mark.usefixtures("qnn_libraries", "one_thread"), pytest.mark.slow]
CONTEXT = 64
TEXT = "".join(chr(code) for code in np.random.default_rng(0).integers(32, 127, 100))
"""For models with a tokenizer of bytes."""
NEAR = 0.1
"""Of logits from -10 to 10 that two methods compute, each in half floats of its own order."""
RELATIVE = 3e-3
"""Of an operator's largest result: half floats keep 5e-4, and sums inside an operator may be half floats too."""


def exported(model: Any, out: Path, recipe: str, *, context: int = CONTEXT, **options: Any) -> Path:
    verbs.export(str(model), "qnn", out, recipe=verbs.choose_recipe(recipe), context=context, **options)
    return out


@pytest.fixture(scope="module")
def demo(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(models("demo"), tmp_path_factory.mktemp("qnn") / "demo", "w4-channel", context=128)


# --- operators ----------------------------------------------------------------------------------------------------------------------


def integer_linear(out: int, inner: int, bits: Any, bias: bool) -> HtpLinear:
    grid = WeightGrid(bits, None, "absmean" if bits <= 2 else "least_squares")
    weight = torch.randn(out, inner, generator=torch.Generator().manual_seed(bits))
    return HtpLinear(IntegerLinear(*quantize_linear(weight, grid), torch.randn(out) if bias else None, Rule(("*",), grid)))


PRODUCTS = [(bits, inner, bias) for bits in (1, 2, 3, 4, 6, 8) for inner, bias in ((64, False), (172, True))]
"""172 inputs are no multiple of 8 or 16: without zeros behind them the HTP would compute something else."""


def every_operator(build: Any, x: Any, wide: Any, norm: Tensor, layers: list[nn.Module]) -> None:
    """Calls each operation of the builder once, on x [1, 4, 64] and wide [1, 4, 172]."""
    heads = build.reshape(x, 4, 16)
    for name, value in {
        "add": build.add(x, x),
        "number": build.multiply(x, build.number(0.37)),
        "subtract": build.subtract(x, build.sigmoid(x)),
        "divide": build.divide(x, build.number(3.0)),
        "tanh": build.tanh(x),
        "relu": build.relu(x),
        "softmax": build.softmax(x),
        "matmul": build.matmul(build.transpose(heads, [0, 2, 1, 3]), build.transpose(heads, [0, 2, 3, 1])),
        "rms_norm": build.rms_norm(x, norm, 1e-5),
        "rms_norm_of_heads": build.rms_norm(heads, norm[:16], 1e-5),
        "split": build.join(*reversed(build.split(x, [10, 22, 32]))),
        "append": build.append(1, x, x),
        **{f"product_{index}": build.product(layer, wide if index % 2 else x) for index, layer in enumerate(layers[:-1])},
        "float_product": build.product(layers[-1], x),
    }.items():
        build.output(value, name)


def run_alone(graph: Graph, inputs: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """What the emulator gives for one graph."""
    from safetensors.torch import load_file, save_file

    _, copied = compile_variants({"decode": graph}, SOCS[0], StageCache(folder), lambda done, total: None)
    ports = [[Port(name, "client", list(graph.values[name]), "float16") for name in names] for names in (graph.inputs, graph.outputs)]
    write_pte([Method("decode", "decode", *ports)], copied.context, copied.options, folder / "x.pte")
    save_file({f"{index:04}": inputs[name].half() for index, name in enumerate(graph.inputs)}, folder / "in")
    command = [sys.executable, "-m", "lobit.export.qnn.probe", *(str(folder / name) for name in ("x.pte", "in", "out"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(graph.outputs, (found.float() for _, found in sorted(load_file(folder / "out").items())), strict=True))


def test_every_operator_computes_on_the_emulator_what_pytorch_does(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, wide = (torch.randn(1, 4, size, generator=generator).half().float() for size in (64, 172))
    layers: list[nn.Module] = [integer_linear(24, inner, bits, bias) for bits, inner, bias in PRODUCTS]
    layers.append(nn.Linear(64, 24).requires_grad_(False))
    norm = torch.rand(64, generator=generator)
    eager = EagerHtpBuilder({})
    every_operator(eager, x, wide, norm, layers)
    graph = Graph(Weights())
    build = QnnBuilder(graph)
    every_operator(build, build.input("x", 1, 4, 64), build.input("wide", 1, 4, 172), norm, layers)
    found = run_alone(graph, {"x": x, "wide": wide}, tmp_path)
    assert found.keys() == eager.outputs.keys()
    errors = {name: float((found[name] - expected).abs().max() / expected.abs().max()) for name, expected in eager.outputs.items()}
    assert {name: f"{error:.1e}" for name, error in errors.items() if not error < RELATIVE} == {}


def test_operators_are_as_exact_as_the_limit_of_parity_reckons_with(tmp_path: Path) -> None:
    """Relative root mean square errors of the operators of attention and feed-forward, on inputs of several sizes."""
    generator, graph, exact, inputs = torch.Generator().manual_seed(0), Graph(Weights()), {}, {}
    build = QnnBuilder(graph)
    for size in (3.0, 1.0, 0.3):
        x = (size * torch.randn(1, 4, 24, 88, generator=generator)).half()
        port, values = f"x{size:g}", x.double()
        inputs[port] = x.float()
        given = build.input(port, 1, 4, 24, 88)
        for name, value, expected in [
            ("softmax", build.softmax(given), values.softmax(-1)),
            ("silu", build.multiply(given, build.sigmoid(given)), values * values.sigmoid()),
            ("tanh", build.tanh(given), values.tanh()),
            ("square", build.multiply(build.relu(given), build.relu(given)), values.relu() ** 2),
            ("norm", build.rms_norm(given, torch.ones(88), 1e-5), torch.nn.functional.rms_norm(values, (88,), eps=1e-5)),
            ("matmul", build.matmul(given, build.transpose(given, [0, 1, 3, 2])), values @ values.transpose(2, 3)),
        ]:
            build.output(value, f"{name}.{size:g}")
            exact[f"{name}.{size:g}"] = expected
    found = run_alone(graph, inputs, tmp_path)
    errors = {name: float((found[name] - expected).norm() / expected.norm()) for name, expected in exact.items()}
    assert OPERATOR_ERROR / 3 < max(errors.values()) < OPERATOR_ERROR, errors


def test_an_operator_that_is_not_known_is_one_message(tmp_path: Path) -> None:
    graph = Graph(Weights())
    x = graph.input("x", 1, 4, 8)
    graph.output(graph.op("Frobnicate", [x], (1, 4, 8))[0], "y")
    with pytest.raises(TargetError, match="Qualcomm's compiler does not take this model"):
        compile_variants({"decode": graph}, SOCS[0], StageCache(tmp_path / "kept"), lambda done, total: None)


# --- bundles ------------------------------------------------------------------------------------------------------------------------


def test_the_demo_is_exported_verified_and_proved(demo: Path) -> None:
    verified = verbs.verify(demo, "demo")
    assert verified["passed"] and verified["integers"] > 0
    assert [(row["file"], row["differing_bytes"]) for row in verified["compiled"]] == [("model.pte", 0), ("emulated.pte", 0)]
    result = verbs.parity(demo, "demo", held_out_text(8), tokens=150)
    assert result["passed"] and result["emulated"], result["limits"]
    assert [row["name"] for row in result["stages"]] == ["fake_quant", "graph", "artifact"]
    assert result["phases"]["wrapped"] is not None


def test_nothing_is_left_behind_and_each_method_is_one_delegate(demo: Path) -> None:
    manifest = open_bundle(demo).manifest
    assert [(method.name, method.role) for method in manifest.methods] == [("prefill", "prefill"), ("decode", "decode")]
    assert manifest.delegation.left == {} and manifest.delegation.partitions == 2
    assert set(manifest.delegation.read_bytes) == {"prefill", "decode"}
    assert manifest.options == {"soc": "SM8650"}


def test_the_file_that_ships_and_its_twin_are_the_same_but_for_the_copied_weights(demo: Path) -> None:
    """One graph made both; what loads on x86 differs from what a phone loads only in how often weights are stored."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    shipped, twin = (deserialize_pte_binary((demo / name).read_bytes()).program for name in ("model.pte", "emulated.pte"))
    for ours, theirs in zip(shipped.execution_plan, twin.execution_plan, strict=True):
        assert (ours.name, ours.values, ours.inputs, ours.outputs) == (theirs.name, theirs.values, theirs.inputs, theirs.outputs)
        assert len(ours.delegates) == len(theirs.delegates) == 1 and not ours.operators
    layers = sum(group.bytes for group in open_bundle(demo).manifest.weights if group.kind != "embedding")
    more = (demo / "emulated.pte").stat().st_size - (demo / "model.pte").stat().st_size
    assert more == pytest.approx(layers, rel=0.05), "the twin has the weights once more"


def test_one_integer_that_is_another_is_found(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a layer that the sample of probes leaves out: the file that is compiled anew is another."""
    convert = prove._converted_like

    def changed(*arguments: Any) -> Any:
        model = convert(*arguments)
        integers = model.get_submodule("layers.3.mlp.down").integers
        integers[0, 0] += 1 if integers[0, 0] < 0 else -1
        return model

    monkeypatch.setattr(prove, "_converted_like", changed)
    result = verbs.verify(demo, "demo")
    assert not result["passed"]
    assert result["checkpoint_matches"] is False
    shipped, twin = (row["differing_bytes"] for row in result["compiled"])
    assert shipped > 0 and 0 < twin <= 4, "half a byte in each method's copy of the weights"


def test_the_whole_of_a_small_model_is_read_back(models: Any, tmp_path: Path) -> None:
    bundle = exported(models("qwen3"), tmp_path / "bundle", "8da8w")
    model = verbs.make.converted(models("qwen3"), verbs.choose_recipe("8da8w"))[0]
    result = verbs.verify(bundle, str(models("qwen3")), every=True)
    layers = {name: module.integers.numel() for name, module in model.named_modules() if hasattr(module, "integers")}
    assert result["passed"] and {row["name"]: row["integers"] for row in result["layers"]} == layers


@pytest.mark.parametrize("recipe", ["w4-channel", "8da8w", "fp16", "trilm", "bonsai"])
def test_stories_is_proved_under_every_kind_of_recipe(recipe: str, stories: Path, tmp_path: Path) -> None:
    """172 inputs of its products down are filled up with zeros."""
    bundle = exported(stories, tmp_path / "bundle", recipe)
    result = verbs.parity(bundle, str(stories), "Once upon a time there was a little girl who had a red ball. " * 3, tokens=60)
    assert result["passed"], result["limits"]


def test_the_ternary_demo_is_proved(tmp_path: Path) -> None:
    verbs.export(str(TERNARY_FOLDER), "qnn", tmp_path / "bundle", context=CONTEXT)
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert any(group.format == "ternary per matrix" for group in manifest.weights), "two bits, as they are"
    assert verbs.verify(tmp_path / "bundle", str(TERNARY_FOLDER))["passed"]
    result = verbs.parity(tmp_path / "bundle", "demo", held_out_text(2), tokens=60, checkpoint=str(TERNARY_FOLDER))
    assert result["passed"], result["limits"]


def test_ranges_that_training_learned_are_what_ships(models: Any, tmp_path: Path) -> None:
    from lobit.quant_recipes.train import Run

    recipe, text = verbs.choose_recipe("w4-channel-learned"), held_out_text(8)
    texts, run = verbs.Texts([text], length=64), Run(3, 2).dealt()
    verbs.train(str(models("demo")), recipe, texts, tmp_path / "trained", run=run)
    verbs.export(str(tmp_path / "trained"), "qnn", tmp_path / "bundle", context=CONTEXT)
    assert verbs.verify(tmp_path / "bundle", str(tmp_path / "trained"))["passed"]
    result = verbs.parity(tmp_path / "bundle", str(models("demo")), text, tokens=60, checkpoint=str(tmp_path / "trained"))
    assert result["passed"], result["limits"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_proved(name: str, small_models: Any, tmp_path: Path) -> None:
    folder, _ = small_models(name)
    bundle = exported(folder, tmp_path / "bundle", "w4-channel", chunk=24)
    result = verbs.parity(bundle, str(folder), TEXT, tokens=90, stages=["fake_quant"])
    assert result["passed"], (result["limits"], result["stages"])
    assert (result["phases"]["wrapped"] is not None) == (open_bundle(bundle).manifest.model.largest_window > 0)


@pytest.mark.parametrize("soc", SOCS)
def test_every_chip_is_compiled_for(soc: str, stories: Path, tmp_path: Path) -> None:
    bundle = exported(stories, tmp_path / "bundle", "w4-channel", soc=soc)
    assert open_bundle(bundle).manifest.options == {"soc": soc}
    assert "Lily" in verbs.run(bundle, "Once upon a time, there was a little girl named", max_new_tokens=3)["text"]


def test_all_logits_and_a_chunk_of_one(stories: Path, tmp_path: Path) -> None:
    """Both give the logits that a call for the last token alone gives."""
    tokens = [1, 403, 407, 261, 378, 31, 281]
    rows = {}
    for name, options in {"last": {}, "all": {"all_logits": True}, "one": {"chunk": 1}}.items():
        engine = open_engine(open_bundle(exported(stories, tmp_path / name, "w4-channel", **options)))
        rows[name] = engine.score(tokens)
        engine.reset()
        assert np.abs(engine.prefill(tokens) - rows[name][-1]).max() < NEAR
    assert np.abs(rows["last"] - rows["all"]).max() < NEAR and np.abs(rows["last"] - rows["one"]).max() < NEAR


def test_a_client_that_reads_the_manifest_alone_says_the_same(demo: Path) -> None:
    engine = open_engine(open_bundle(demo))
    tokens = [int(token) for token in np.random.default_rng(1).integers(5, 700, 20)]
    found = [int(engine.prefill(tokens).argmax())]
    while len(found) < 20:
        found.append(int(engine.decode(found[-1]).argmax()))
    script = Path(__file__).parents[1] / "runtime" / "qnn_client.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 120
    command = [sys.executable, str(script), str(demo), *map(str, tokens), "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == found


# --- what is refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"recipe": "8da4w-g32"}, "choose w4-channel, w4-channel-learned, 8da8w"),
        ({"soc": "SM8350"}, "SM8350 has no half floats"),
        ({"soc": "SM1"}, "there is no chip 'SM1' here: choose one of SM8650"),
        ({"portable": True}, "--portable is for target onnx"),
    ],
)
def test_what_the_htp_cannot_hold_is_refused_before_any_work(options: dict[str, Any], told: str, models: Any, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=told):
        exported(models("demo"), tmp_path / "bundle", **({"recipe": "w4-channel"} | options))
    assert list(tmp_path.iterdir()) == []


def test_a_chip_is_for_this_target_alone(models: Any, tmp_path: Path) -> None:
    for target, recipe in (("xnnpack", "8da4w-g32"), ("onnx", "8da4w-g32")):
        with pytest.raises(TargetError, match="--soc is for target qnn"):
            verbs.export(str(models("demo")), target, tmp_path / "x", recipe=verbs.choose_recipe(recipe), context=64, soc="SM8650")


def test_an_emulator_that_ends_is_one_message(demo: Path, tmp_path: Path) -> None:
    """The hashes are right: export itself wrote half of a file."""
    folder = Path(shutil.copytree(demo, tmp_path / "bundle"))
    program = folder / "emulated.pte"
    program.write_bytes(program.read_bytes()[: program.stat().st_size // 2])
    values = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    entry = next(entry for entry in values["files"] if entry["role"] == "emulated")
    entry |= {"bytes": program.stat().st_size, "sha256": sha256_of(program)}
    (folder / FILE_NAME).write_text(sealed(values), encoding="utf-8")
    with pytest.raises(BundleError, match="emulator"):
        open_engine(open_bundle(folder)).prefill([1, 2, 3])


def test_a_changed_byte_is_refused(demo: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo, tmp_path / "bundle"))
    data = bytearray((folder / "model.pte").read_bytes())
    data[-1] ^= 1
    (folder / "model.pte").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.pte has changed"):
        open_bundle(folder)


def test_all_is_refused_where_programs_are_read_whole(bundles: Any) -> None:
    with pytest.raises(InputError, match="leave --all out"):
        verbs.verify(bundles("demo", "8da4w-g32"), "demo", every=True)


# --- plan, bench, resuming ----------------------------------------------------------------------------------------------------------


def test_nothing_is_timed(demo: Path) -> None:
    result = verbs.bench([demo])
    assert [(row["method"], row["tokens"]) for row in result["rows"]] == [("prefill", 32), ("decode", 1)]
    weights = sum(group.bytes for group in open_bundle(demo).manifest.weights if group.kind != "embedding")
    assert all(row["read_bytes"] > weights for row in result["rows"]), "every weight is read at least once"
    assert not any("second" in key for row in result["rows"] for key in row)
    assert verbs.run(demo, "Once", max_new_tokens=2)["stats"]["emulated"]


EXPORT = """
import resource, sys
from pathlib import Path
from lobit import verbs
verbs.export("demo", "qnn", Path(sys.argv[1]), recipe=verbs.choose_recipe("w4-channel"), context=192)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + 2 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""


def test_the_plan_says_what_the_files_and_the_memory_are(another_process: Callable[..., Any], tmp_path: Path) -> None:
    peak = int(another_process(EXPORT, tmp_path / "bundle").stdout.split()[-1])
    plan = verbs.plan("demo", verbs.choose_recipe("w4-channel"), "qnn", context=192)
    assert plan.file_bytes == pytest.approx(open_bundle(tmp_path / "bundle").manifest.program_bytes, rel=0.03)
    assert peak < 1.25 * plan.host_peak_bytes
    assert resource.RUSAGE_SELF is not None


def test_what_was_compiled_before_a_kill_is_not_compiled_again(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lobit.export.qnn.target import graphs
    from lobit.export.target import Spec

    recipe = verbs.choose_recipe("w4-channel")
    model = verbs.make.converted(stories, recipe)[0]
    made = graphs(model, Spec(recipe, CONTEXT, 8))
    kept = StageCache(tmp_path / "kept")
    compile_variants(made, SOCS[0], kept, lambda done, total: None)
    shutil.rmtree(kept.folder / "copied")
    started: list[str] = []
    popen = subprocess.Popen

    def counted(command: list[str], **options: Any) -> Any:
        started.extend([Path(command[-1]).name] if "lobit.export.qnn.compiler" in command else [])  # the adaptor runs flatc besides
        return popen(command, **options)

    monkeypatch.setattr(compiling.subprocess, "Popen", counted)
    compile_variants(made, SOCS[0], kept, lambda done, total: None)
    assert started == ["copied.compiling"]


def test_the_graph_stage_is_the_cached_program_run_by_pytorch(stories: Path) -> None:
    """The stage between fake_quant and artifact has the client's own masks and rows, not a shortcut."""
    from lobit.export.target import Spec, find_target

    recipe = verbs.choose_recipe("w4-channel")
    graph = find_target("qnn").graph(verbs.make.converted(stories, recipe)[0], Spec(recipe, CONTEXT, 8))
    assert isinstance(graph.program, CachedProgram)  # type: ignore[union-attr]
