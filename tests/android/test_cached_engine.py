"""The app's engine for programs of fixed shapes: it gives them what lobit's client in Python gives, and keeps the same caches."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lobit.runtime.client import CachedProgram, Ports
from lobit.runtime.engine import SteppingEngine
from lobit.runtime.manifest import FILE_NAME, Manifest, sealed
from tests.android.kotlin_tool import kotlin
from tests.golden.manifests import port, with_client

VOCABULARY, WIDTH = 512, 64
CALLS = [20, 1, 1, 70, *[1] * 30, 5, 0, 40, 1, 1]
"""Tokens of each call, 0 for a reset: a padded tail, rings that wrap, a context that is filled, and caches that hold what was before."""
TURNING = ("cos.0", "sin.0")
"""Inputs that may differ a little: the two mathematics libraries round some cosines to other floats."""
APART = {"float16": 1, "float32": 4}
"""Steps by which they may, as NumPy's cosine of a float is off by up to 1.5."""


@pytest.fixture(autouse=True)
def tools(android_tools: Callable[[str], None]) -> None:
    android_tools("native")


def test_floats_are_rounded_to_half_floats_as_numpy_rounds_them(tmp_path: Path) -> None:
    """All halves, the middles between neighbours and the floats around these, and floats of any bits."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(np.unique(np.abs(halves[np.isfinite(halves)])))
    middles = (finite[1:] + finite[:-1]) / 2
    around = [
        np.nextafter(middles, np.float32(0)),
        middles,
        np.nextafter(middles, np.float32(np.inf)),
        np.array([65519.99, 65520, 1e30], np.float32),
    ]
    anything = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    floats = np.concatenate([halves, *around, *(-part for part in around), anything])
    (tmp_path / "floats").write_bytes(floats.astype(">f4").tobytes())
    kotlin().ask({"floats": str(tmp_path / "floats"), "halves": str(tmp_path / "halves")})
    found = np.frombuffer((tmp_path / "halves").read_bytes(), np.dtype([("half", ">u2"), ("value", ">f4")]))
    with np.errstate(over="ignore"):
        expected = floats.astype(np.float16)
    numbers = ~np.isnan(floats)
    assert np.array_equal(found["half"].astype(np.uint16)[numbers], expected.view(np.uint16)[numbers])
    assert np.array_equal(found["value"].astype(np.float32).view(np.uint32)[numbers], expected.astype(np.float32).view(np.uint32)[numbers])
    assert np.isnan(found["half"].astype(np.uint16).view(np.float16)[~numbers]).all() and np.isnan(found["value"][~numbers]).all()


def table(bits: int, groups: int = 1) -> dict[str, NDArray[Any]]:
    """A table of embeddings of any numbers."""
    random = np.random.default_rng(bits)
    if bits >= 16:
        return {"weight": random.standard_normal((VOCABULARY, WIDTH)).astype(f"float{bits}")}
    weight = random.integers(0, 256, (VOCABULARY, WIDTH * bits // 8), dtype=np.uint8)
    scale = random.uniform(1e-3, 1e-1, (VOCABULARY, groups)).astype(np.float32)
    return {"weight": weight if bits == 4 else weight.view(np.int8), "scale": scale}


def bundle(folder: Path, edit: Callable[[dict[str, Any]], Any], tensors: dict[str, NDArray[Any]]) -> Manifest:
    """A bundle without its program."""
    values = copy.deepcopy(with_client())
    edit(values)
    folder.mkdir(exist_ok=True)
    (folder / FILE_NAME).write_text(sealed(values), encoding="ascii")
    save_file(tensors, folder / "embedding.safetensors")
    return Manifest.from_json((folder / FILE_NAME).read_bytes())


def embedded(bits: int, factor: float = 1.0) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values["client"]["embedding"].update(bits=bits, factor=factor)


def with_all_logits(values: dict[str, Any]) -> None:
    prefill = values["methods"][0]
    prefill["inputs"] = [entry for entry in prefill["inputs"] if entry["name"] != "last"]
    prefill["outputs"][-1] = port("logits", "logits", [1, 32, VOCABULARY], "float16")
    values["client"]["last"] = None


def with_short_windows(values: dict[str, Any]) -> None:
    """Rings of 20 positions, which a call of 32 tokens goes round more than once."""
    values["client"]["masks"][0]["window"] = 20
    for state in values["states"]:
        state["shape"][2] = min(state["shape"][2], 20) if state["window"] else state["shape"][2]
    shapes = {state["input"]: state["shape"] for state in values["states"]}
    for method, tokens in zip(values["methods"], (32, 1), strict=True):
        for entry in method["inputs"]:
            entry["shape"] = shapes.get(entry["name"], entry["shape"])
            entry["shape"] = [1, 1, tokens, 20 + tokens] if entry["name"] == "mask.0" else entry["shape"]


def without_prefill(values: dict[str, Any]) -> None:
    del values["methods"][0]
    values["chunk"] = 1
    values["client"]["last"] = None


def of_integers(dtype: str) -> Callable[[dict[str, Any]], Any]:
    """Ports of a program of integers: caches of a type whose entries are only copied, floats of 32 bits for all else."""

    def edit(values: dict[str, Any]) -> None:
        for method in values["methods"]:
            for entry in (*method["inputs"], *method["outputs"]):
                entry["dtype"] = dtype if entry["role"] == "state" else "float32"
        for state in values["states"]:
            state["dtype"] = dtype

    return edit


CASES: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, NDArray[Any]]]] = {
    "int4-rows": (embedded(4), table(4)),
    "int4-groups-with-a-factor": (embedded(4, 12.3), table(4, 4)),
    "int8": (embedded(8, 0.7), table(8)),
    "halves": (embedded(16, 3.3), table(16)),
    "floats": (embedded(32), table(32)),
    "all-logits": (with_all_logits, table(4)),
    "windows-shorter-than-a-call": (with_short_windows, table(4)),
    "decode-alone": (without_prefill, table(4)),
    "caches-of-16-bit-integers": (of_integers("int16"), table(4)),
    "caches-of-8-bit-integers": (of_integers("uint8"), table(4)),
}


class Recorded:
    """A program that gives random numbers; it keeps what it was given and what it gave, in the order of the ports."""

    def __init__(self, manifest: Manifest) -> None:
        self.methods = {method.name: method for method in manifest.methods}
        self.inputs: list[tuple[str, NDArray[Any]]] = []
        self.outputs: list[bytes] = []
        self.random = np.random.default_rng(1)

    def run(self, name: str, inputs: Ports) -> Ports:
        method = self.methods[name]
        self.inputs += [(entry.name, inputs[entry.name].copy()) for entry in method.inputs]
        found = {
            entry.name: (10 * self.random.standard_normal([int(size) for size in entry.shape])).astype(np.int8).astype(entry.dtype)
            if np.dtype(entry.dtype).kind in "iu"
            else self.random.standard_normal([int(size) for size in entry.shape]).astype(entry.dtype)
            for entry in method.outputs
        }
        self.outputs += [found[entry.name].tobytes() for entry in method.outputs]
        return found


def asked(folder: Path, work: Path, calls: list[list[int]]) -> dict[str, Any]:
    """What the engine in Kotlin answers to calls of a recorded program."""
    files = {name: str(work / name) for name in ("outputs", "inputs", "logits")}
    return kotlin().ask({"folder": str(folder), "calls": calls, **files})


def called(program: CachedProgram, manifest: Manifest, calls: list[list[int]]) -> list[NDArray[np.float32]]:
    """The logits that the client in Python has of calls; one without tokens is a reset."""
    engine = SteppingEngine(program.step, manifest.context, manifest.chunk, VOCABULARY)
    found = []
    for tokens in calls:
        if tokens:
            found.append(engine.prefill(tokens))
        else:
            engine.reset()
    return found


def steps(floats: NDArray[Any]) -> NDArray[np.int64]:
    """Floats of 16 or 32 bits numbered in their order, 0 for both zeros."""
    size = 8 * floats.itemsize
    bits = floats.view(f"int{size}").astype(np.int64)
    return np.where(bits < 0, -(bits & (1 << (size - 1)) - 1), bits)


@pytest.mark.parametrize("case", CASES)
def test_a_program_is_given_what_the_client_in_python_gives(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "story"
    manifest = bundle(folder, *CASES[case])
    recorded = Recorded(manifest)
    random = np.random.default_rng(2)
    calls = [[int(token) for token in random.integers(0, VOCABULARY, count)] for count in CALLS]
    expected = called(CachedProgram.of(manifest, folder, recorded.run), manifest, calls)
    (tmp_path / "outputs").write_bytes(b"".join(recorded.outputs))
    answer = asked(folder, tmp_path, calls)
    assert answer["outcome"] == "read", answer
    assert np.array_equal(np.frombuffer((tmp_path / "logits").read_bytes(), ">f4"), np.concatenate(expected))
    found = (tmp_path / "inputs").read_bytes()
    assert len(found) == sum(array.nbytes for _, array in recorded.inputs)
    at = 0
    for name, array in recorded.inputs:
        part = np.frombuffer(found[at : at + array.nbytes], array.dtype)
        at += array.nbytes
        if name in TURNING:
            assert np.abs(steps(part) - steps(array.flatten())).max() <= APART[str(array.dtype)], (name, at)
        else:
            assert part.tobytes() == array.tobytes(), (name, at)


def written(header: Any, data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file whose header says anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("ascii")
    return (len(text) if size is None else size).to_bytes(8, "little", signed=True) + text + data


def entry(dtype: str, shape: list[Any], offsets: list[Any]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


WEIGHT, SCALE = entry("U8", [4, 32], [0, 128]), entry("F32", [4, 1], [128, 144])
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be used"),
    "header-larger-than-the-file": (written({}, size=1000), "its header has 1000 bytes"),
    "header-of-negative-size": (written({}, size=-1), "its header has -1 bytes"),
    "header-very-large": (written(b" " * ((1 << 20) + 1)), "its header has 1048577 bytes"),
    "no-json": (written(b"{weight}"), "its header is not JSON"),
    "no-object": (written(b"[1]"), "it has no 'weight'"),
    "no-weight": (written({}), "it has no 'weight'"),
    "no-scale": (written({"weight": WEIGHT}, bytes(128)), "it has no 'scale'"),
    "outside": (written({"weight": entry("U8", [4, 32], [100, 228])}, bytes(144)), "'weight' does not lie in it"),
    "negative": (written({"weight": entry("U8", [4, 32], [-128, 0])}, bytes(144)), "'weight' does not lie in it"),
    "other-size": (written({"weight": entry("U8", [4, 33], [0, 128])}, bytes(144)), "'weight' does not lie in it"),
    "overflowing": (written({"weight": entry("U8", [1 << 62, 4], [0, 0])}, bytes(144)), "'weight' does not lie in it"),
    "no-shape": (written({"weight": entry("U8", [], [0, 1])}, bytes(144)), "'weight' does not lie in it"),
    "text-in-shape": (written({"weight": entry("U8", ["4", 32], [0, 128])}, bytes(144)), "'weight' does not lie in it"),
    "three-offsets": (written({"weight": entry("U8", [4, 32], [0, 128, 144])}, bytes(144)), "'weight' does not lie in it"),
    "no-entry": (written({"weight": 1}, bytes(144)), "'weight' does not lie in it"),
    "other-type": (written({"weight": entry("I8", [4, 32], [0, 128]), "scale": SCALE}, bytes(144)), "'weight' is 'I8'"),
    "one-axis": (written({"weight": entry("U8", [128], [0, 128]), "scale": SCALE}, bytes(144)), "of the shape [128]"),
    "odd-groups": (written({"weight": WEIGHT, "scale": entry("F32", [4, 3], [0, 48])}, bytes(144)), "64 entries have 3 scales"),
    "no-groups": (written({"weight": WEIGHT, "scale": entry("F32", [4, 0], [0, 0])}, bytes(144)), "64 entries have 0 scales"),
    "fewer-scales": (written({"weight": WEIGHT, "scale": entry("F32", [3, 1], [0, 12])}, bytes(144)), "4 tokens have scales for 3"),
}


def refused(folder: Path, work: Path, calls: list[list[int]]) -> str:
    (work / "outputs").write_bytes(b"")
    answer = asked(folder, work, calls)
    assert answer["outcome"] in ("refused", "contradiction"), answer
    return str(answer["error"])


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_table_is_refused_with_a_sentence(case: str, tmp_path: Path) -> None:
    data, told = DAMAGED[case]
    bundle(tmp_path / "story", embedded(4), table(4))
    (tmp_path / "story/embedding.safetensors").write_bytes(data)
    assert told in refused(tmp_path / "story", tmp_path, [])


def changed_input(name: str, **change: Any) -> Callable[[dict[str, Any]], Any]:
    """Changes a port of both methods."""

    def edit(values: dict[str, Any]) -> None:
        for method in values["methods"]:
            for found in (*method["inputs"], *method["outputs"]):
                if found["name"] == name:
                    found.update(change)

    return edit


CONTRADICTING: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no-client": (lambda values: values.update(client=None), "says nothing about its client's inputs"),
    "no-decode": (lambda values: values["methods"].pop(), "has no method for decode"),
    "integers": (changed_input("mask.0", dtype="int16"), "'mask.0' is int16 of the shape"),
    "wide-integers": (changed_input("k.0", dtype="int64"), "'k.0' is int64 of the shape"),
    "rows-of-another-type": (changed_input("k_rows.0", dtype="int16"), "'k_rows.0' is int16, not float16"),
    "logits-of-integers": (changed_input("logits", dtype="int16"), "has no logits"),
    "range": (changed_input("k.0", shape=[1, 2, "1..128", 16]), "'k.0' is float16 of the shape [1, 2, 1..128, 16]"),
    "width": (changed_input("embeddings", shape=[1, 1, 63]), "'embeddings' has the shape [1, 1, 63], not [1, 1, 64]"),
    "mask-of-no-slots": (changed_input("mask.0", shape=[1, 1, 1]), "'mask.0' has the shape [1, 1, 1]"),
    "rows": (changed_input("v_rows.1", shape=[1, 2, 3, 16]), "'v_rows.1' has the shape [1, 2, 3, 16]"),
    "logits": (changed_input("logits", shape=[1, 1, 511]), "'logits' has the shape [1, 1, 511]"),
    "no-logits": (changed_input("logits", role="state"), "has no logits"),
    "state-without-rows": (
        lambda values: values["states"][0].update(rows=False),
        "keeps no state as 'k.0': export the bundle with this app's lobit",
    ),
    "state-without-axis": (lambda values: values["states"][0].update(axis=None), "keeps no state as 'k.0'"),
    "unexplained-input": (lambda values: values["client"].update(last=None), "input 'last' is not explained"),
    "mask-without-end": (changed_input("mask.0", shape=[1, 1, 1, 1 << 40]), "'mask.0' is float16 of the shape"),
}


@pytest.mark.parametrize("case", CONTRADICTING)
def test_ports_that_do_not_fit_together_are_refused_with_a_sentence(case: str, tmp_path: Path) -> None:
    edit, told = CONTRADICTING[case]
    bundle(tmp_path / "story", edit, table(4))
    assert told in refused(tmp_path / "story", tmp_path, [])
