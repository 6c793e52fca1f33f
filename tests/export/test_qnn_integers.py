"""Target qnn with integers of 16 bits between its products: encodings, what the emulator computes with them, and whole bundles."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lobit import verbs
from lobit.demo import TERNARY_FOLDER, held_out_text
from lobit.errors import BundleError, InputError, TargetError
from lobit.export.qnn.encodings import HIDDEN_BELOW, encodings_of, over, read_encodings, write_encodings
from lobit.export.qnn.graph import Encoding, Graph, Weights
from lobit.export.qnn.methods import WITHOUT_HALF
from lobit.export.target import find_target
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import open_engine
from lobit.runtime.manifest import FILE_NAME, sealed, sha256_of
from lobit.verbs import prove
from lobit.verbs.calibrate import Calibration

TALE = "Once upon a time there was a little girl who had a red ball. She went to the park with her mom and saw a big dog. "
CONTEXT = 64
ROUNDING = 1e-3
"""Nats a token that rounding to 16 bits may cost; 5e-7 to 1.3e-5 were measured of the demo and of stories260k."""
BYTES = "".join(chr(code) for code in np.random.default_rng(0).integers(32, 127, 600))
"""For models with a tokenizer of bytes."""


def exported(model: Any, out: Path, recipe: str | None, text: str, *, mixed: Any = (), context: int = CONTEXT, **options: Any) -> Path:
    chosen = verbs.choose_recipe(recipe, mixed=mixed) if recipe else None
    given = Calibration(text, samples=4, length=48)
    verbs.export(str(model), "qnn", out, recipe=chosen, calibration=given, context=context, activations="int16", **options)
    return out


# --- encodings ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(-3.0, 5.0), (1.0, 5.0), (-7.0, -2.0), (0.0, 0.0), (-1e-9, 1e4)])
def test_an_encoding_holds_zero_exactly_and_its_range_to_half_a_step(low: float, high: float) -> None:
    encoding = over(low, high)
    assert encoding.rounded(torch.zeros(1)) == 0
    inside = torch.linspace(min(low, 0), max(high, 0), 1001)
    assert (encoding.rounded(inside) - inside).abs().max() <= 1.01 * encoding.scale, "half a step, and half at the ends, as 0 is exact"


def test_a_graph_has_one_encoding_where_entries_only_move() -> None:
    graph = Graph(Weights())
    a, b = graph.input("embeddings", 1, 2, 4), graph.input("k.0", 1, 2, 4)
    (moved,) = graph.op("Reshape", [a], (1, 1, 8))
    (joined,) = graph.op("Concat", [moved, b], (1, 1, 16), axis=2)
    (other,) = graph.op("Tanh", [joined], (1, 1, 16))
    names = ("embeddings", "k.0", moved.name, joined.name, other.name)
    found = encodings_of([graph], dict(zip(names, [(-1.0, 1.0), (-4.0, 0.0), (-1.0, 2.0), (-4.0, 2.0), (-0.5, 0.5)], strict=True)))
    assert len({found[name] for name in ("embeddings.Quantize@0", "k.0", moved.name, joined.name)}) == 1
    assert found[other.name] == Encoding(1 / 32768, 32768), "the HTP wants it so, whatever the range"


def test_what_a_mask_hides_has_no_share() -> None:
    """However large its score is: the sum with the mask is below the range of what is seen, and lands at its end."""
    graph = Graph(Weights())
    scores, mask = graph.input("embeddings", 1, 8), graph.input("mask.0", 1, 8)
    (total,) = graph.op("ElementWiseAdd", [scores, mask], (1, 8))
    found = encodings_of([graph], {"embeddings": (-30.0, 50.0), "mask.0": (-1e4, 0.0), total.name: (-1e4, 50.0)})
    lowest = found["mask.0.Quantize@0"].rounded(torch.tensor(-1e9))
    seen, hidden = torch.tensor([-30.0]), torch.tensor([50.0]) + lowest
    shares = found[total.name].rounded(torch.cat([seen, hidden])).softmax(0)
    assert over(0.0, 1.0).integers(shares).tolist() == [65535, 0]
    assert shares[1] < np.exp(-HIDDEN_BELOW / 1.01)


def test_encodings_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = {"a": over(-0.1, 0.3), "b": over(-1.0, 0.0, 8), "c": Encoding(1 / 32768, 32768)}
    write_encodings(written, tmp_path / "file")
    assert read_encodings(tmp_path / "file") == written


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"a": 1}', '{"a": [0.1, 2]}', '{"a": [-0.1, 2, 16]}', '{"a": [0.1, 70000, 16]}', '{"a": [NaN, 1, 16]}']
)
def test_a_file_without_encodings_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match="holds no encodings"):
        read_encodings(tmp_path / "file")


# --- what is refused ----------------------------------------------------------------------------------------------------------------


def test_integers_are_for_this_target_alone(models: Any, tmp_path: Path) -> None:
    for target in ("xnnpack", "onnx"):
        with pytest.raises(TargetError, match="--activations int16 is for target qnn: leave it out"):
            verbs.export(
                str(models("demo")),
                target,
                tmp_path / "x",
                recipe=verbs.choose_recipe("8da4w-g32"),
                context=64,
                calibration=Calibration(TALE),
                activations="int16",
            )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("qnn_libraries")
def test_without_a_text_there_are_no_ranges(models: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give one with --calibration FILE"):
        verbs.export(
            str(models("demo")), "qnn", tmp_path / "x", recipe=verbs.choose_recipe("w4-channel"), context=64, activations="int16"
        )
    with pytest.raises(InputError, match="--in-order is for rounding"):
        verbs.export(
            str(models("demo")),
            "qnn",
            tmp_path / "x",
            recipe=verbs.choose_recipe("w4-channel"),
            context=64,
            calibration=Calibration(TALE, act_order=False),
            activations="int16",
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("qnn_libraries")
@pytest.mark.parametrize(
    ("recipe", "told"),
    [("fp16", "--mixed 'layers.0.attention.q=int8'"), ("trilm", "no products with weights of 2 bits"), ("trilm", "--mixed 'head=int8'")],
)
def test_what_older_chips_compute_wrongly_is_refused_by_name(recipe: str, told: str, models: Any, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=told):
        exported(models("demo"), tmp_path / "x", recipe, TALE, soc="SM8350")


# --- bundles ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tale(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(stories, tmp_path_factory.mktemp("tale") / "bundle", "w4-channel", TALE * 20, context=128)


@pytest.mark.usefixtures("qnn_libraries", "one_thread")
@pytest.mark.slow
def test_the_demo_of_integers_is_verified_and_proved(tmp_path: Path) -> None:
    bundle = exported("demo", tmp_path / "bundle", "w4-channel", held_out_text(20, seed=1), context=128)
    manifest = open_bundle(bundle).manifest
    assert manifest.options == {"soc": "SM8650", "activations": "int16"} and manifest.cache.dtype == "int16"
    assert {port.dtype for method in manifest.methods for port in method.inputs if port.role == "client"} == {"float32"}
    verified = verbs.verify(bundle, "demo")
    assert verified["passed"] and verified["integers"] > 0
    assert [(row["file"], row["differing_bytes"]) for row in verified["compiled"]] == [("model.pte", 0), ("emulated.pte", 0)]
    result = verbs.parity(bundle, "demo", held_out_text(8), tokens=150)
    assert result["passed"] and result["phases"]["wrapped"] is not None, result["limits"]
    (graph,) = [row for row in result["stages"] if row["name"] == "graph"]
    assert graph["kl_step"] < ROUNDING


@pytest.mark.usefixtures("qnn_libraries", "one_thread")
@pytest.mark.slow
def test_tokens_are_those_of_the_rounded_graph(tale: Path, stories: Path) -> None:
    """And a client that reads the manifest alone, and copies integers of 16 bits unread, writes the same."""
    opened = open_bundle(tale)
    recipe = verbs.choose_recipe("w4-channel")
    model = verbs.make.converted(stories, recipe)[0]
    graph = find_target("qnn").graph(model, prove._spec(recipe, opened, model.config))
    assert graph is not None
    prompt, texts = [1, 403, 407, 261, 378, 31, 281], []
    for engine in (open_engine(opened), prove._graph_engine(graph, opened.manifest)):
        found = [int(engine.prefill(prompt).argmax())]
        while len(found) < 40:
            found.append(int(engine.decode(found[-1]).argmax()))
        texts.append(found)
    assert texts[0] == texts[1]
    script = Path(__file__).parents[1] / "runtime" / "qnn_client.py"
    command = [sys.executable, str(script), str(tale), *map(str, prompt), "40"]
    assert json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == texts[0]


def with_encodings(bundle: Path, folder: Path, edit: Any) -> Path:
    """A copy of a bundle whose encodings are others, with the right digests."""
    shutil.copytree(bundle, folder)
    told = json.loads((folder / "encodings.json").read_text(encoding="utf-8"))
    edit(told)
    (folder / "encodings.json").write_text(json.dumps(told), encoding="utf-8")
    values = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    entry = next(entry for entry in values["files"] if entry["role"] == "encodings")
    entry |= {"bytes": (folder / "encodings.json").stat().st_size, "sha256": sha256_of(folder / "encodings.json")}
    (folder / FILE_NAME).write_text(sealed(values), encoding="utf-8")
    return folder


@pytest.mark.usefixtures("qnn_libraries", "one_thread")
@pytest.mark.slow
def test_encodings_that_are_not_the_programs_are_found(tale: Path, stories: Path, tmp_path: Path) -> None:
    def one_step_more(told: dict[str, list[Any]]) -> None:
        told["layers.3.mlp.ElementWiseAdd@0"][1] += 1

    changed = with_encodings(tale, tmp_path / "changed", one_step_more)
    result = verbs.verify(changed, str(stories))
    assert not result["passed"] and all(row["differing_bytes"] > 0 for row in result["compiled"])
    missing = with_encodings(tale, tmp_path / "missing", lambda told: told.pop("layers.3.mlp.ElementWiseAdd@0"))
    with pytest.raises(BundleError, match=r"1 values have no encoding \(layers\.3\.mlp"):
        verbs.verify(missing, str(stories))


@pytest.mark.usefixtures("qnn_libraries", "one_thread")
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["8da8w", "fp16", "trilm"])
def test_stories_of_integers_is_proved_under_every_kind_of_recipe(recipe: str, stories: Path, tmp_path: Path) -> None:
    """Floats of a recipe, as the ternary head, become integers of 16 bits."""
    bundle = exported(stories, tmp_path / "bundle", recipe, TALE * 20)
    result = verbs.parity(bundle, str(stories), TALE * 3, tokens=60)
    assert result["passed"], result["limits"]


@pytest.mark.usefixtures("qnn_libraries", "one_thread")
@pytest.mark.slow
def test_a_ternary_checkpoint_of_integers_is_proved(tmp_path: Path) -> None:
    bundle = exported(TERNARY_FOLDER, tmp_path / "bundle", None, held_out_text(20, seed=1))
    assert verbs.verify(bundle, str(TERNARY_FOLDER))["passed"]
    result = verbs.parity(bundle, "demo", held_out_text(2), tokens=60, checkpoint=str(TERNARY_FOLDER))
    assert result["passed"], result["limits"]


@pytest.mark.usefixtures("qnn_libraries", "one_thread")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3"])
def test_families_of_integers_are_proved(name: str, small_models: Any, tmp_path: Path) -> None:
    """Biases, norms of queries and keys, capped scores, windows that wrap."""
    folder, _ = small_models(name)
    bundle = exported(folder, tmp_path / "bundle", "w4-channel", BYTES, chunk=24)
    result = verbs.parity(bundle, str(folder), BYTES, tokens=90, stages=["fake_quant"])
    assert result["passed"], (result["limits"], result["stages"])


@pytest.mark.usefixtures("qnn_libraries", "one_thread")
@pytest.mark.slow
@pytest.mark.parametrize("soc", WITHOUT_HALF)
def test_chips_without_half_floats_have_caches_of_8_bits(soc: str, stories: Path, tmp_path: Path) -> None:
    bundle = exported(stories, tmp_path / "bundle", "w4-channel", TALE * 20, soc=soc)
    manifest = open_bundle(bundle).manifest
    assert manifest.cache.dtype == "uint8" and {state.dtype for state in manifest.states} == {"uint8"}
    result = verbs.parity(bundle, str(stories), TALE * 3, tokens=60)
    assert result["passed"], result["limits"]
    assert verbs.verify(bundle, str(stories))["passed"]


@pytest.mark.usefixtures("qnn_libraries", "one_thread")
@pytest.mark.slow
def test_the_plan_says_what_the_files_of_integers_are(tale: Path, stories: Path) -> None:
    manifest = open_bundle(tale).manifest
    plan = verbs.plan(str(stories), verbs.choose_recipe("w4-channel"), "qnn", context=128, activations="int16")
    assert plan.file_bytes == pytest.approx(manifest.program_bytes, rel=0.03)
    assert plan.cache == manifest.cache
