"""Every part of a program beside the reference's, on the same inputs: right programs pass, and each planted fault has its layer's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lobit import verbs
from lobit.demo import held_out_text
from lobit.export import bundle as bundles_module
from lobit.model import Transformer
from lobit.quant_recipes.packing import pack_int4
from lobit.quant_recipes.quantized import fingerprint
from lobit.runtime.manifest import FILE_NAME, FileEntry, Manifest
from lobit.runtime.onnxruntime import GraphFile
from lobit.runtime.parity import SHORTEST_TEXT

FAR = 0.5
"""Of its limit that no part of a right program reaches: 0.05 at most was measured, and other processors have other kernels."""
CONTEXT, CHUNK, TOKENS = 256, 64, 60
EXPORTS = [
    ("demo", "onnx", "8da4w-g32"),
    pytest.param(("demo", "xnnpack", "8da4w-g32"), marks=pytest.mark.slow),
    pytest.param(("smollm2", "onnx", "8da8w"), marks=pytest.mark.slow),
    pytest.param(("smollm2", "xnnpack", "8da8w"), marks=pytest.mark.slow),
]
TEXT = "The harbour was built in 1874. It has two basins, of which the southern one is still used by fishing boats. " * 4

pytestmark = pytest.mark.usefixtures("one_thread")


def off_by_one(model: Transformer) -> None:
    """The zero point of layer 1's keys is off by one: their integers all are."""
    integers = model.blocks[1].attention.k.integers
    assert isinstance(integers, torch.Tensor)
    integers += (integers < integers.max()).to(torch.int8)


def scale_of_another_row(model: Transformer) -> None:
    """One row, or one group of it, has the scale of the row that differs most."""
    scale = model.blocks[2].mlp.gate.scale
    assert isinstance(scale, torch.Tensor)
    scale[0, 0] = scale[(scale[:, 0] / scale[0, 0]).log().abs().argmax(), 0].clone()


def wrong_rotary_base(model: Transformer) -> None:
    """Layer 4 turns q and k by other angles."""
    layers, attention = list(model.config.layers), model.blocks[4].attention
    assert attention.rope is not None
    attention.rope = replace(attention.rope, theta=attention.rope.theta * 1.25)
    layers[4] = replace(layers[4], rope=attention.rope)
    model.config = replace(model.config, layers=tuple(layers))


def swapped_layers(model: Transformer) -> None:
    """Two layers have each other's feed-forward."""
    one, other = model.blocks[5], model.blocks[6]
    one.mlp, other.mlp = other.mlp, one.mlp


FAULTS: dict[str, tuple[Callable[[Transformer], None], set[str]]] = {
    "zero point": (off_by_one, {"layers.1.qkv"}),
    "scale": (scale_of_another_row, {"layers.2.o_mlp"}),
    "rotary base": (wrong_rotary_base, {"layers.4.qkv"}),
    "layers": (swapped_layers, {"layers.5.o_mlp", "layers.6.o_mlp"}),
}
"""What is planted, and the parts that it is in."""
TURNED_INSIDE = {"layers.4.attention"}
"""ONNX Runtime turns q inside its attention, whose part then has the wrong base too."""


def folder_of(model: str, request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue("smollm2") if model == "smollm2" else request.getfixturevalue("models")(model))


def judged(bundle: Path, folder: Path, model: str) -> dict[str, Any]:
    text = TEXT if model == "smollm2" else held_out_text(2)
    return verbs.parity(bundle, str(folder), text, tokens=TOKENS, stages=[], threads=1)


@pytest.fixture(scope="module", params=EXPORTS, ids="-".join)
def faulty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What parity says of a program with all the faults, whose manifest has the fingerprint of the right weights."""
    model, target, recipe = request.param
    folder, out, write = folder_of(model, request), tmp_path_factory.mktemp("faulty") / "bundle", bundles_module.write_bundle

    def write_wrong(integer: Transformer, *arguments: Any) -> Manifest:
        right = fingerprint(integer)
        patch.setattr(bundles_module, "fingerprint", lambda _: right)
        for plant, _ in FAULTS.values():
            plant(integer)
        return write(integer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles_module, "write_bundle", write_wrong)
        verbs.export(str(folder), target, out, recipe=verbs.choose_recipe(recipe), context=CONTEXT, chunk=CHUNK)
    return judged(out, folder, model)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_the_name_of_its_part(fault: str, faulty: dict[str, Any]) -> None:
    assert FAULTS[fault][1] <= set(faulty["parts"]["faults"]), faulty["parts"]
    assert not faulty["passed"]


def test_no_part_is_blamed_for_the_fault_of_another(faulty: dict[str, Any]) -> None:
    assert set(faulty["parts"]["faults"]) - TURNED_INSIDE == set.union(*(parts for _, parts in FAULTS.values()))


@pytest.mark.parametrize("case", EXPORTS, ids="-".join)
def test_a_right_program_is_far_from_the_limits_of_its_parts(case: tuple[str, str, str], request: Any, tmp_path: Path) -> None:
    model, target, recipe = case
    folder = folder_of(model, request)
    verbs.export(str(folder), target, tmp_path / "b", recipe=verbs.choose_recipe(recipe), context=CONTEXT, chunk=CHUNK)
    result = judged(tmp_path / "b", folder, model)
    assert result["passed"]
    assert result["parts"]["faults"] == []
    assert result["parts"]["nearest"] < FAR
    names = [row["name"] for row in result["parts"]["all"]]
    assert len(set(names)) == len(names)
    assert {"embedding", "layers.0.qkv", "layers.7.attention"} <= set(names)
    assert result["stages"][-1]["kl_conversion"] < result["limits"]["kl_conversion"]["limit"]
    assert result["tokens"] >= SHORTEST_TEXT


def rewritten(bundle: Path) -> None:
    """Gives the manifest the hashes of the files as they are, so that parity alone can find what they hold."""
    manifest = Manifest.from_json((bundle / FILE_NAME).read_bytes())
    files = [FileEntry.of(bundle, entry.path, entry.role) for entry in manifest.files]
    (bundle / FILE_NAME).write_text(replace(manifest, files=files).to_json())


def test_a_scale_that_is_changed_in_a_graphs_file_is_found_by_name(models: Any, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    verbs.export(str(models("demo")), "onnx", bundle, recipe=verbs.choose_recipe("8da4w-g32"), context=CONTEXT, chunk=CHUNK)
    graph = GraphFile(bundle / "model.onnx", bundle / "model.onnx.data")
    name = next(name for name in graph.initializers if name.startswith("layers.3.attention.o") and name.endswith("scale"))
    offset = next(int(entry.value) for entry in graph.initializers[name].external_data if entry.key == "offset")
    with (bundle / "model.onnx.data").open("r+b") as file:
        file.seek(offset)
        (scale,) = np.frombuffer(file.read(4), np.float32)
        file.seek(offset)
        file.write(np.float32(scale * 1.5).tobytes())
    rewritten(bundle)
    assert judged(bundle, models("demo"), "demo")["parts"]["faults"] == ["layers.3.o_mlp"]


@pytest.mark.slow
def test_integers_that_are_changed_in_a_programs_file_are_found_by_name(models: Any, tmp_path: Path) -> None:
    bundle, recipe = tmp_path / "bundle", verbs.choose_recipe("8da4w-g32")
    verbs.export(str(models("demo")), "xnnpack", bundle, recipe=recipe, context=CONTEXT, chunk=CHUNK)
    from lobit.verbs.make import converted

    model, _ = converted(models("demo"), recipe)
    integers = model.blocks[3].mlp.down.integers
    assert isinstance(integers, torch.Tensor)
    stored = pack_int4(integers).numpy().tobytes()
    program = bytearray((bundle / "model.pte").read_bytes())
    assert program.count(stored) == 1
    place = program.index(stored)
    program[place : place + 64] = bytes(byte ^ 0x77 for byte in program[place : place + 64])
    (bundle / "model.pte").write_bytes(program)
    rewritten(bundle)
    assert judged(bundle, models("demo"), "demo")["parts"]["faults"] == ["layers.3.o_mlp"]
