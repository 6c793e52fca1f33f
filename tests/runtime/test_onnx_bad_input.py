"""Graphs that are not as export wrote them: one message that says what to do, no crash, in the process that asked."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lobit import verbs
from lobit.errors import BundleError, InputError, LobitError, MissingPartError
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import open_engine
from lobit.runtime.onnxruntime import read_program
from tests.mutations import refused, reseal

GRAPH, DATA = "model.onnx", "model.onnx.data"
THREADS = 1


@pytest.fixture(scope="module")
def made(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "bundle"
    recipe = verbs.choose_recipe("8da4w-g32")
    verbs.export(str(models("mobilellm_p1")), "onnx", out, recipe=recipe, context=48, chunk=16)
    return out


def runs(bundle: Path) -> Any:
    return open_engine(open_bundle(bundle), THREADS).prefill([1, 2, 3])


@pytest.mark.parametrize("name", [GRAPH, DATA])
def test_a_file_that_is_missing_short_or_changed_is_named(name: str, bundle: Path) -> None:
    whole = (bundle / name).read_bytes()
    (bundle / name).write_bytes(whole[:-1])
    assert name in refused(lambda: runs(bundle))
    (bundle / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert "sha256" in refused(lambda: runs(bundle))
    (bundle / name).unlink()
    assert f"{name} is missing" in refused(lambda: runs(bundle))


def edited(bundle: Path, edit: Callable[[onnx.GraphProto], Any]) -> None:
    """Changes the graph, and the manifest with it."""
    model = onnx.load(bundle / GRAPH, load_external_data=False)
    edit(model.graph)
    (bundle / GRAPH).write_bytes(model.SerializeToString())
    reseal(bundle)


def of_kind(graph: onnx.GraphProto, kind: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.op_type == kind)


def attribute(graph: onnx.GraphProto, kind: str, name: str, value: int) -> None:
    """Changes it in the first node of the kind that has it."""
    next(one for node in graph.node if node.op_type == kind for one in node.attribute if one.name == name).i = value


def rename(graph: onnx.GraphProto, name: str, other: str) -> None:
    """An input."""
    next(port for port in graph.input if port.name == name).name = other
    for node in graph.node:
        node.input[:] = [other if one == name else one for one in node.input]


def external(graph: onnx.GraphProto, key: str, value: str) -> None:
    tensor = next(one for one in graph.initializer if one.name == of_kind(graph, "MatMulNBits").input[1])
    next(entry for entry in tensor.external_data if entry.key == key).value = value


def nowhere(graph: onnx.GraphProto, name: str) -> None:
    """Takes away where a constant's data are."""
    del next(one for one in graph.initializer if one.name == name).external_data[:]


def rescaled(graph: onnx.GraphProto, shape: list[int]) -> None:
    """Gives the first product's scales another shape."""
    (tensor,) = (one for one in graph.initializer if one.name == of_kind(graph, "MatMulNBits").input[2])
    tensor.dims[:] = shape
    next(entry for entry in tensor.external_data if entry.key == "length").value = str(4 * int(np.prod(shape)))


EDITS: dict[str, Callable[[onnx.GraphProto], Any]] = {
    "a node without an operator": lambda graph: setattr(of_kind(graph, "MatMulNBits"), "op_type", "Abacus"),
    "a product that is wider": lambda graph: attribute(graph, "MatMulNBits", "N", 1 << 20),
    "a product that is longer": lambda graph: attribute(graph, "MatMulNBits", "K", 4096),
    "other bits": lambda graph: attribute(graph, "MatMulNBits", "bits", 3),
    "a great many bits": lambda graph: attribute(graph, "MatMulNBits", "bits", 1 << 62),
    "a zero point": lambda graph: of_kind(graph, "MatMulNBits").input.append(of_kind(graph, "MatMulNBits").input[1]),
    "tokens by another name": lambda graph: rename(graph, "input_ids", "tokens"),
    "more heads": lambda graph: attribute(graph, "GroupQueryAttention", "num_heads", 64),
    "a wider window": lambda graph: attribute(graph, "GroupQueryAttention", "local_window_size", 4096),
    "an input that is not there": lambda graph: of_kind(graph, "MatMulNBits").input.__setitem__(0, "nothing"),
    "no logits": lambda graph: graph.output.pop(0) if graph.output[0].name == "logits" else graph.output.pop(-1),
    "no caches": lambda graph: [graph.input.pop() for _ in range(4)],
    "data behind the end": lambda graph: external(graph, "offset", str(1 << 40)),
    "data before the start": lambda graph: external(graph, "offset", "-4096"),
    "more data than there are": lambda graph: external(graph, "length", str(1 << 40)),
    "data nowhere": lambda graph: nowhere(graph, of_kind(graph, "MatMulNBits").input[1]),
    "an offset that is no number": lambda graph: external(graph, "offset", "somewhere"),
    "scales without axes": lambda graph: rescaled(graph, []),
    "scales in a row": lambda graph: rescaled(graph, [64]),
    "data elsewhere": lambda graph: external(graph, "location", "../../../etc/passwd"),
    "data at an absolute place": lambda graph: external(graph, "location", "/etc/passwd"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_graph_edited_by_hand_is_one_message(name: str, bundle: Path) -> None:
    edited(bundle, EDITS[name])
    assert "export it again" in refused(lambda: runs(bundle))


UNREAD = {"tokens by another name", "more heads", "a wider window", "no logits", "no caches", "an input that is not there"}
"""Edits of what `verify` does not read."""


@pytest.mark.parametrize("name", sorted({*EDITS} - UNREAD))
def test_verify_reads_nothing_that_it_cannot_account_for(name: str, bundle: Path, models: Any) -> None:
    edited(bundle, EDITS[name])
    try:
        passed = verbs.verify(bundle, str(models("mobilellm_p1")))["passed"]
    except LobitError as error:
        assert "export it again" in str(error) or "is it this bundle's checkpoint" in str(error)
    else:
        assert not passed


@pytest.fixture(scope="module")
def made_portable(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("portable") / "bundle"
    recipe = verbs.choose_recipe("8da4w-g32")
    verbs.export(str(models("mobilellm_p1")), "onnx", out, recipe=recipe, context=48, chunk=16, portable=True)
    return out


def without(graph: onnx.GraphProto, kind: str, number: int) -> None:
    """Takes a node of a kind away."""
    graph.node.remove([node for node in graph.node if node.op_type == kind][number])


PORTABLE_EDITS: dict[str, Callable[[onnx.GraphProto], Any]] = {
    "no embedding": lambda graph: without(graph, "Gather", 0),
    "an embedding without scales": lambda graph: without(graph, "Gather", 1),
    "a weight without scales": lambda graph: without(graph, "DequantizeLinear", 0),
    "one product less": lambda graph: without(graph, "MatMul", 0),
    "a zero point": lambda graph: of_kind(graph, "DequantizeLinear").input.append(of_kind(graph, "DequantizeLinear").input[0]),
    "a weight in no file": lambda graph: nowhere(graph, of_kind(graph, "DequantizeLinear").input[0]),
    "a norm in no file": lambda graph: nowhere(graph, next(one.name for one in graph.initializer if one.name.endswith("norm"))),
}


@pytest.mark.parametrize("name", PORTABLE_EDITS)
def test_verify_of_a_portable_graph_edited_by_hand_is_one_message(name: str, made_portable: Path, models: Any, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(made_portable, tmp_path / "bundle"))
    assert verbs.verify(bundle, str(models("mobilellm_p1")))["passed"]
    edited(bundle, PORTABLE_EDITS[name])
    told = refused(lambda: verbs.verify(bundle, str(models("mobilellm_p1"))))
    assert "export it again" in told or "is it this bundle's checkpoint" in told


def test_verify_says_which_package_it_lacks(bundle: Path, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_bundle(bundle)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPartError, match=r"pip install 'lobit\[onnx\]'"):
        list(read_program(opened).layers())


def test_a_cast_of_itself_ends(bundle: Path, models: Any) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        graph.node.append(onnx.helper.make_node("Cast", ["round"], ["round"], to=1))
        graph.node.append(onnx.helper.make_node("FusedMatMul", ["round", "round"], ["product"], domain="com.microsoft"))

    edited(bundle, edit)
    assert "export it again" in refused(lambda: verbs.verify(bundle, str(models("mobilellm_p1"))))


@pytest.mark.parametrize("kind", ["weight", "scale"])
def test_verify_finds_one_bit(kind: str, bundle: Path, models: Any) -> None:
    graph = onnx.load(bundle / GRAPH, load_external_data=False).graph
    tensor = next(one for one in graph.initializer if "mlp" in one.name and one.name.endswith(kind))
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    data = bytearray((bundle / DATA).read_bytes())
    data[offset + 2] ^= 1
    (bundle / DATA).write_bytes(data)
    reseal(bundle)
    result = verbs.verify(bundle, str(models("mobilellm_p1")))
    found = {"weight": (1, 0), "scale": (0, 1)}[kind]
    assert (result["differing_integers"], result["differing_scales"]) == found
    assert not result["passed"]


def test_garbage_is_refused_by_both_who_read_it(bundle: Path, models: Any) -> None:
    (bundle / GRAPH).write_bytes(bytes(range(256)) * 64)
    reseal(bundle)
    assert "cannot load" in refused(lambda: runs(bundle))
    assert "cannot be taken apart" in refused(lambda: verbs.verify(bundle, str(models("mobilellm_p1"))))


def test_a_provider_that_is_not_installed_is_told_with_those_that_are(bundle: Path) -> None:
    reseal(bundle, lambda values: values["options"].update(provider="QNNExecutionProvider"))
    with pytest.raises(MissingPartError, match=r"QNNExecutionProvider.*CPUExecutionProvider"):
        runs(bundle)


def test_ports_that_are_not_the_graphs_are_refused(bundle: Path) -> None:
    opened = open_bundle(bundle)
    (method,) = opened.manifest.methods
    fewer = replace(opened.manifest, methods=[replace(method, inputs=method.inputs[:-1])], states=opened.manifest.states[:-1])
    with pytest.raises(BundleError, match="export it again"):
        open_engine(replace(opened, manifest=fewer), THREADS)


def test_a_full_cache_refuses_more_and_goes_on_after_a_reset(bundle: Path) -> None:
    engine = open_engine(open_bundle(bundle), THREADS)
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, 64, engine.context)]
    first = engine.prefill(tokens)
    with pytest.raises(InputError, match=str(engine.context)):
        engine.decode(1)
    with pytest.raises(InputError, match=str(engine.context)):
        engine.prefill([1])
    engine.reset()
    assert np.array_equal(engine.prefill(tokens), first)


def test_a_context_over_the_models_own_is_refused_before_anything_is_written(models: Any, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    recipe = verbs.choose_recipe("8da4w-g32")
    with pytest.raises(InputError, match="100000"):
        verbs.export(str(models("mobilellm_p1")), "onnx", out, recipe=recipe, context=100_000)
    assert not out.exists()
