"""The app's reader of bundles: it takes and refuses what lobit's own does, and unpacks a zip only into its own folder."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lobit.errors import BundleError
from lobit.runtime.bundle import open_bundle
from lobit.runtime.manifest import LARGEST_MANIFEST, Manifest, sealed
from tests.android.kotlin_tool import kotlin
from tests.golden.manifests import CASES, FOLDER, plain, with_client, with_states
from tests.mutations import Damage, every_single

BY_MANIFEST = {"json", "version", "fields", "path", "contradiction", "seal"}
"""Reasons that a manifest alone gives."""


@pytest.fixture(autouse=True)
def tools(android_tools: Callable[[str], None]) -> None:
    android_tools("native")


@pytest.mark.parametrize("name", CASES)
def test_a_golden_manifest_is_read_or_refused_as_expected(name: str) -> None:
    assert kotlin().manifest((FOLDER / f"{name}.json").read_bytes())["outcome"] == CASES[name][0]


def test_a_manifest_is_read_with_its_values() -> None:
    text = kotlin().manifest((FOLDER / "handed-states.json").read_bytes())["text"]
    for part in (
        "name=story, target=onnx, model=ModelInfo(family=llama, parameters=330000, layers=2",
        "recipe={name=8da4w-g32, summary=INT4 in groups of 32 – weights, INT8 inputs}",
        "context=128, chunk=64, threads=0, options={provider=CPUExecutionProvider, portable=true}",
        "Port(name=input_ids, role=tokens, shape=[1, 1..64], dtype=int64)",
        "State(input=past.ring, output=present.ring, dtype=float32, shape=[1, 2, 32, 16], axis=2, window=32, inPlace=true, rows=false)",
        "left={aten::embedding.out=1}, readBytes={})",
        "cache=CacheInfo(dtype=int8, slots=[128, 32], valueBytes=20480, scaleBytes=3200)",
        "tokens=Tokens(bos=1, stop=[2], chatTemplate={{ messages[0]['content'] }} ☺, special={eos_token=</s>})",
        "generation=Generation(temperature=0.7, topK=40, topP=null, repetitionPenalty=null)",
        "weights=[TensorGroup(kind=mlp, format=int4 group 32, parameters=100000, bytes=56250)]",
        "versions={lobit=0.1.0, torch=2.13.0}, schemaVersion=2.0",
    ):
        assert part in text


def test_what_the_client_computes_is_read_with_its_values() -> None:
    text = kotlin().manifest((FOLDER / "client-inputs.json").read_bytes())["text"]
    for part in (
        "states=[State(input=k.0, output=k_rows.0, dtype=float16, shape=[1, 2, 128, 16], axis=2, window=null, inPlace=false, rows=true)",
        "client=ClientInputs(embedding=Lookup(port=embeddings, file=embedding.safetensors, bits=4, factor=1.0)",
        "Rotary(cos=cos.0, sin=sin.0, frequencies=[1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3.0E-4], factor=1.0)",
        "Mask(port=mask.0, window=32, hidden=-10000.0), Mask(port=mask.1, window=null, hidden=-10000.0)], last=last)",
        "readBytes={prefill=300000, decode=200000}",
    ):
        assert part in text


def by_python(data: bytes) -> str:
    try:
        Manifest.from_json(data)
    except BundleError as error:
        return "path" if "do not use" in str(error) else "contradiction" if "contradicts itself" in str(error) else "refused"
    return "read"


def assert_the_readers_agree(data: bytes) -> str:
    expected, answer = by_python(data), kotlin().manifest(data)
    outcome = answer["outcome"]
    assert outcome == "read" or outcome in BY_MANIFEST
    assert outcome == expected if expected != "refused" else outcome in BY_MANIFEST - {"path", "contradiction"}, (answer, data[:3000])
    return expected


@pytest.mark.parametrize("make", [plain, with_states, with_client])
def test_a_manifest_with_a_wrong_value_is_read_or_refused_by_both_readers(make: Callable[[], dict[str, Any]]) -> None:
    """With a seal that is right, as of someone who made it so."""
    damage, outcomes = Damage(1), []
    singles = list(every_single(make()))[:: 1 if make is plain else 7]
    for values in [*singles, *(damage.json(make(), 1 + i % 3) for i in range(1500))]:
        outcomes.append(assert_the_readers_agree(sealed(values).encode("ascii")))
    assert {"read", "refused", "contradiction", "path"} <= set(outcomes)


def test_a_manifest_with_a_wrong_byte_is_refused_by_both_readers() -> None:
    damage, data = Damage(2), sealed(plain()).encode("ascii")
    for i in range(1500):
        damaged = damage.bytes(data, 1 + i % 2)
        assert damaged == data or assert_the_readers_agree(damaged) != "read"


TEXTS = [
    b"", b"{", b"[]", b"null", b"\xff", b"\xef\xbb\xbf{}", b"{} x", b"{'a': 1}", b"{a: 1}", b'{"a": 1,}',
    b'{"a": 01}', b'{"a": 1.}', b'{"a": .5}', b'{"a": +1}',
    b'{"a": NaN, "schema_version": "2.0"}', b'{"a": "\t"}',
    b'{"a": "\\x"}', b'{"a": "\\u12"}', b'{"a": tru}', b"[" * 100_000, b'{"schema_version": "2.0\n"}',
]  # fmt: skip


@pytest.mark.parametrize("data", TEXTS)
def test_what_is_no_manifest_is_refused_by_both_readers(data: bytes) -> None:
    assert assert_the_readers_agree(data) == "refused"


@pytest.mark.parametrize(
    "old, new",
    [
        (b'"threads": 0', b'"threads": -0'),
        (b'"threads": 0', b'"threads": 0.0'),
        (b'"threads": 0', b'"threads": 7, "threads": 0'),
        (b'"temperature": 0.7', b'"temperature": 7e-1'),
        (b'"temperature": 0.7', b'"temperature": 1e999'),
        (b'"temperature": 0.7', b'"temperature": 9223372036854775807'),
        (b'"temperature": 0.7', b'"temperature": 9223372036854775808'),
        (b'"summary": "', b'"more": [NaN, -Infinity, {}, 1e9, 123456789012345678901234567890], "summary": "'),
        (b'"name": "story"', b'"name": NaN'),
        (b'"name": "story"', "\"name\": \"störy\u2028 🙂\"".encode()),
        (b'"name": "story"', b'"name": "\\ud800\\/"'),
        (b'"path": "model.pte"', b'"path": "./model.pte"'),
        (b'"path": "model.pte"', b'"path": "."'),
        (b'"path": "model.pte"', b'"path": ""'),
        (b'"path": "model.pte"', b'"path": "a/..b"'),
        (b'"path": "model.pte"', b'"path": "a/../b"'),
        (b'"path": "model.pte"', b'"path": "C:model.pte"'),
        (b'"path": "model.pte"', b'"path": "a\\u200bb"'),
        (b'"path": "model.pte"', b'"path": "a\\u00a0b"'),
        (b'"path": "model.pte"', b'"path": "' + b"a" * 81 + b'"'),
        (b'"path": "model.pte"', b'"path": "' + "🙂".encode() * 80 + b'"'),
        (b"\n", b" \n"),
        (b'"schema_version": "2.0"', b'"schema_version": "2.00"'),
    ],
)  # fmt: skip
def test_json_is_read_as_lobit_reads_it(old: bytes, new: bytes) -> None:
    data = sealed(plain()).encode("ascii")
    head, _, _ = data.rpartition(b',\n  "sha256": "')
    body = head.replace(old, new) + b',\n  "sha256": "'
    assert_the_readers_agree(body + hashlib.sha256(body).hexdigest().encode("ascii") + b'"\n}\n')


CONTENTS = {"model.pte": b"program" * 999, "tokenizer.json": b"{}", "emulated.pte": b"twin", "embedding.safetensors": b"table"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle whose files are small."""
    made = tmp_path / "story"
    made.mkdir()
    write(made, plain())
    return made


def write(folder: Path, values: dict[str, Any], **versions: str) -> None:
    values = copy.deepcopy(values)
    values["versions"] |= {"executorch": "1.5.1", **versions}
    for entry in values["files"]:
        data = CONTENTS[entry["path"]]
        (folder / entry["path"]).write_bytes(data)
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(sealed(values), encoding="ascii")


def test_a_whole_bundle_is_opened_by_both_readers(folder: Path) -> None:
    assert open_bundle(folder).manifest.name == "story"
    assert kotlin().open(folder)["outcome"] == "read"


def test_a_file_that_is_missing_shorter_or_changed_is_refused(folder: Path) -> None:
    program = folder / "model.pte"
    for change, told in (
        (lambda: program.write_bytes(CONTENTS["model.pte"][::-1]), "has changed"),
        (lambda: program.write_bytes(b"p"), "has 1 bytes instead of 6993"),
        (lambda: program.unlink(), "is missing"),
    ):
        change()
        answer = kotlin().open(folder)
        assert answer["outcome"] == "files" and f"model.pte {told}" in answer["error"], answer


def test_hashes_are_compared_only_where_that_is_asked(folder: Path) -> None:
    (folder / "model.pte").write_bytes(CONTENTS["model.pte"][::-1])
    assert kotlin().open(folder, hashes=False)["outcome"] == "read"


def test_a_link_that_leaves_the_bundle_is_refused_and_one_inside_is_not(folder: Path) -> None:
    program = folder / "model.pte"
    for place, outcome in ((folder.parent / "elsewhere", "files"), (folder / "inside", "read")):
        shutil.copyfile(program, place)
        program.unlink()
        program.symlink_to(place)
        assert kotlin().open(folder)["outcome"] == outcome


def test_a_bundle_for_another_target_or_release_is_refused_with_the_way_out(folder: Path) -> None:
    write(folder, plain() | {"target": "onnx"})
    assert "is for target 'onnx', this app runs xnnpack: export it" in kotlin().open(folder)["error"]
    write(folder, plain(), executorch="9.9.9")
    answer = kotlin().open(folder)
    assert answer["outcome"] == "runtime" and "was made by ExecuTorch '9.9.9', this app runs programs of 1.5.1" in answer["error"]


def test_a_bundle_for_qualcomm_is_refused_where_the_library_has_no_such_backend(folder: Path) -> None:
    write(folder, with_client())
    answer = kotlin().open(folder, backends=["XnnpackBackend"])
    assert answer["outcome"] == "runtime", answer
    assert "this app's library has no QnnBackend: build the app with the flavour for Qualcomm" in answer["error"]
    assert kotlin().open(folder, backends=["XnnpackBackend", "QnnBackend"])["outcome"] == "read"


def test_a_program_for_an_emulator_may_be_absent_but_not_changed(folder: Path, tmp_path: Path) -> None:
    values = plain()
    values["files"].append({"path": "emulated.pte", "role": "emulated", "bytes": 0, "sha256": ""})
    write(folder, values)
    (folder / "emulated.pte").write_bytes(b"niwt")
    assert "emulated.pte has changed" in kotlin().open(folder)["error"]
    (folder / "emulated.pte").unlink()
    assert kotlin().open(folder)["outcome"] == "read"
    assert kotlin().unzip(zipped(folder), tmp_path / "unpacked")["outcome"] == "read"


def test_a_folder_that_is_no_bundle_and_a_manifest_that_is_too_large_are_refused(folder: Path, tmp_path: Path) -> None:
    assert "has no manifest.json: make one with `lobit export`" in kotlin().open(tmp_path)["error"]
    (folder / "manifest.json").write_bytes(b" " * (LARGEST_MANIFEST + 1))
    assert f"at most {LARGEST_MANIFEST} are read" in kotlin().open(folder)["error"]


def zipped(folder: Path, top: str = "", last: str = "", more: dict[str, bytes] | None = None) -> Path:
    """A zip of the folder, one file of it at the end."""
    archive = folder.parent / "bundle.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.iterdir(), key=lambda path: (path.name == last, path.name)):
            file.write(path, top + path.name)
        for name, data in (more or {}).items():
            file.writestr(name, data)
    return archive


@pytest.mark.parametrize("top", ["", "story/"])
@pytest.mark.parametrize("last", ["manifest.json", "model.pte"])
def test_a_zip_is_unpacked_to_the_bundle(folder: Path, tmp_path: Path, top: str, last: str) -> None:
    into = tmp_path / "unpacked"
    answer = kotlin().unzip(zipped(folder, top, last, {"__MACOSX/x": b"x", f"{top}.DS_Store": b"x"}), into)
    assert answer["outcome"] == "read", answer
    assert {path.name: path.read_bytes() for path in into.iterdir()} == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert open_bundle(into).manifest.name == "story"


def assert_nothing_is_left(folder: Path, archive: Path, told: str, outcome: str = "archive") -> None:
    before = set(folder.parent.rglob("*"))
    answer = kotlin().unzip(archive, folder.parent / "unpacked")
    assert answer["outcome"] == outcome and told in answer["error"], answer
    assert set(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "..\\evil", "C:evil"])
def test_a_zip_that_leaves_its_folder_is_refused(folder: Path, name: str) -> None:
    assert_nothing_is_left(folder, zipped(folder, more={name: b"x"}), "leaves the bundle", "path")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["model.pte", "MODEL.pte"])
def test_a_zip_with_a_file_twice_is_refused(folder: Path, name: str) -> None:
    assert_nothing_is_left(folder, zipped(folder, more={name: b"x"}), "twice")


def test_a_zip_with_a_file_larger_than_the_manifest_says_is_refused(folder: Path) -> None:
    (folder / "model.pte").write_bytes(b"program" * 1000)
    assert_nothing_is_left(folder, zipped(folder), "unpacks to more than its bundle's files have")


def test_a_zip_that_grows_too_much_before_its_manifest_is_refused(folder: Path) -> None:
    (folder / "a").write_bytes(bytes(1 << 26))
    assert_nothing_is_left(folder, zipped(folder), "unpacks to more than its bundle's files have")


def test_a_zip_whose_file_has_changed_or_is_missing_is_refused(folder: Path) -> None:
    (folder / "model.pte").write_bytes(CONTENTS["model.pte"][::-1])
    assert_nothing_is_left(folder, zipped(folder), "model.pte has changed", "files")
    (folder / "model.pte").unlink()
    assert_nothing_is_left(folder, zipped(folder), "model.pte is missing", "files")


def test_a_damaged_zip_and_what_is_no_zip_are_refused(folder: Path) -> None:
    archive = zipped(folder)
    data = archive.read_bytes()
    archive.write_bytes(data[: len(data) // 3])
    assert_nothing_is_left(folder, archive, "copy it again")
    for text in (b"", b"no zip", json.dumps(plain()).encode()):
        archive.write_bytes(text)
        assert_nothing_is_left(folder, archive, "it has no manifest.json")


def test_a_zip_of_another_targets_bundle_is_refused_before_it_is_unpacked(folder: Path) -> None:
    write(folder, plain() | {"target": "onnx"})
    assert_nothing_is_left(folder, zipped(folder), "is for target 'onnx'", "runtime")


def test_a_zip_is_not_unpacked_over_what_is_there_and_old_halves_are_swept(folder: Path, tmp_path: Path) -> None:
    archive, into = zipped(folder), tmp_path / "unpacked"
    partial = tmp_path / "unpacked.partial"
    partial.mkdir()
    (partial / "old").write_bytes(b"x")
    assert kotlin().unzip(archive, into)["outcome"] == "read"
    assert not partial.exists() and not (into / "old").exists()
    assert "is already there: delete it first" in kotlin().unzip(archive, into)["error"]


def test_a_zip_of_very_many_files_is_refused(folder: Path) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for i in range(1001):
            file.writestr(f"f{i}", b"")
    archive = folder.parent / "many.zip"
    archive.write_bytes(data.getvalue())
    assert_nothing_is_left(folder, archive, "more than 1000 files")
