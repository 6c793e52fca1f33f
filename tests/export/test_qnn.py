"""Target qnn: what the graphs say, what Qualcomm's compiler makes of them, and what the emulator of the HTP computes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobit import verbs
from lobit.demo import TERNARY_FOLDER, held_out_text
from lobit.errors import BundleError, InputError, TargetError
from lobit.export.qnn import compiling
from lobit.export.qnn.compiling import compile_variants
from lobit.export.qnn.methods import SOCS
from lobit.runtime.bundle import open_bundle
from lobit.runtime.client import CachedProgram
from lobit.runtime.engine import open_engine
from lobit.runtime.manifest import FILE_NAME, sealed, sha256_of
from lobit.stage_cache import StageCache
from lobit.verbs import prove
from tests.small_models import FAMILIES

pytestmark = [pytest.mark.usefixtures("qnn_libraries", "one_thread"), pytest.mark.slow]
CONTEXT = 64
TEXT = "".join(chr(code) for code in np.random.default_rng(0).integers(32, 127, 100))
"""For models with a tokenizer of bytes."""
NEAR = 0.1
"""Of logits from -10 to 10 that two methods compute, each in half floats of its own order."""


def exported(model: Any, out: Path, recipe: str, *, context: int = CONTEXT, **options: Any) -> Path:
    verbs.export(str(model), "qnn", out, recipe=verbs.choose_recipe(recipe), context=context, **options)
    return out


@pytest.fixture(scope="module")
def demo(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(models("demo"), tmp_path_factory.mktemp("qnn") / "demo", "w4-channel", context=128)


# --- bundles ------------------------------------------------------------------------------------------------------------------------


def test_the_demo_is_exported_verified_and_proved(demo: Path, tmp_path: Path) -> None:
    verified = verbs.verify(demo, "demo")
    assert verified["passed"] and verified["integers"] > 0
    assert [(row["file"], row["differing_bytes"]) for row in verified["compiled"]] == [("model.pte", 0), ("emulated.pte", 0)]
    result = verbs.parity(demo, "demo", held_out_text(8), tokens=150)
    assert result["passed"] and result["emulated"], result["limits"]
    assert [row["name"] for row in result["stages"]] == ["fake_quant", "graph", "artifact"]
    assert result["phases"]["wrapped"] is not None
    for name, values in {"verify": verified, "parity": result}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    page = verbs.report([demo / FILE_NAME, *tmp_path.glob("*.json")], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "layers were read back from the emulator, and the model was compiled anew" in page


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
    convert = prove.converted_for_bundle

    def changed(*arguments: Any) -> Any:
        model = convert(*arguments)
        integers = model.get_submodule("layers.3.mlp.down").integers
        integers[0, 0] += 1 if integers[0, 0] < 0 else -1
        return model

    monkeypatch.setattr(prove, "converted_for_bundle", changed)
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
        ({"soc": "SM8350"}, "SM8350 has no half floats: add --activations int16 --calibration FILE"),
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
        with pytest.raises(TargetError, match="--soc SM8650 is for target qnn"):
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


def test_without_its_checkpoint_a_model_that_was_rounded_on_a_text_is_not_proved(stories: Path, tmp_path: Path) -> None:
    from lobit.verbs.calibrate import Calibration

    recipe, text = verbs.choose_recipe("8da8w"), "Once upon a time there was a little girl. " * 40
    verbs.quantize(str(stories), recipe, tmp_path / "checkpoint", calibration=Calibration(text, 4, 16))
    verbs.export(str(tmp_path / "checkpoint"), "qnn", tmp_path / "bundle", context=CONTEXT)
    with pytest.raises(InputError, match=r"was rounded on a text.* give the quantized checkpoint"):
        verbs.verify(tmp_path / "bundle", str(stories))
    assert verbs.verify(tmp_path / "bundle", str(tmp_path / "checkpoint"))["passed"]


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
    assert plan.host_peak_bytes == pytest.approx(peak, rel=0.25)


def test_what_was_compiled_before_a_kill_is_not_compiled_again(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lobit.export.qnn.methods import graphs
    from lobit.export.target import Spec

    recipe = verbs.choose_recipe("w4-channel")
    model = verbs.make.converted(stories, recipe)[0]
    made = graphs(model, Spec(recipe, CONTEXT, 8))
    kept = StageCache(tmp_path / "kept")
    compile_variants(made, SOCS[0], kept)
    shutil.rmtree(kept.folder / "copied")
    started: list[str] = []
    popen = subprocess.Popen

    def counted(command: list[str], **options: Any) -> Any:
        started.extend([Path(command[-1]).name] if "lobit.export.qnn.compiler" in command else [])  # the adaptor runs flatc besides
        return popen(command, **options)

    monkeypatch.setattr(compiling.subprocess, "Popen", counted)
    compile_variants(made, SOCS[0], kept)
    assert started == ["copied.compiling"]


def test_the_graph_stage_is_the_cached_program_run_by_pytorch(stories: Path) -> None:
    """The stage between fake_quant and artifact has the client's own masks and rows, not a shortcut."""
    from lobit.export.target import Spec, find_target

    recipe = verbs.choose_recipe("w4-channel")
    graph = find_target("qnn").graph(verbs.make.converted(stories, recipe)[0], Spec(recipe, CONTEXT, 8))
    assert isinstance(graph.program, CachedProgram)  # type: ignore[union-attr]
