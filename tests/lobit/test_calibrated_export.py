"""Export with a calibration text: the bundle that comes of it is proved without the checkpoint, and a killed one goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lobit.demo import held_out_text

CONTEXT = 192


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text(held_out_text(), encoding="utf-8")
    return path


@pytest.mark.parametrize("recipe", ["8da4w-g32", "8da4w-g32-e8", "8da8w", "w4-channel"])
def test_a_calibrated_bundle_is_proved_by_the_float_model_alone(recipe: str, text: Path, lobit: Any, tmp_path: Path) -> None:
    bundle, options = tmp_path / "bundle", ("--samples", "4", "--length", "128", "--context", CONTEXT)
    made = lobit("export", "demo", "--recipe", recipe, "--calibration", text, *options, "--target", "onnx", "-o", bundle)
    assert made.code == 0, made.err
    rules = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["recipe"]["rules"]
    assert [rule["rounding"] for rule in rules if "layers.*" in rule["match"]] == ["gptq"]
    verified = lobit("verify", bundle, "demo", "--json")
    assert verified.code == 0 and verified.json["checkpoint_matches"] is True
    compared = lobit("parity", bundle, "--reference", "demo", "--text", text, "--tokens", "200", "--json")
    assert compared.code == 0, compared.json


def test_another_text_is_another_bundle(text: Path, lobit: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8")[2000:], encoding="utf-8")
    hashes = set()
    for number, one in enumerate((text, other)):
        out = tmp_path / str(number)
        command = ("export", "demo", "--recipe", "8da4w-g32", "--calibration", one, "--samples", "4", "--length", "128")
        assert lobit(*command, "--target", "onnx", "--context", CONTEXT, "-o", out).code == 0
        hashes.add(json.loads((out / "manifest.json").read_text(encoding="utf-8"))["checkpoint_sha256"])
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "8da4w-g32", "--samples", "4"), "give it with --calibration FILE"),
        (("--recipe", "8da4w-g32", "--in-order"), "give it with --calibration FILE"),
        (("--recipe", "bitnet", "--calibration"), "nothing that GPTQ could round"),
        (("--recipe", "fp", "--scale-rule", "range"), "no scales that rule range could choose"),
    ],
)
def test_options_that_do_nothing_are_refused(options: tuple[str, ...], message: str, text: Path, lobit: Any, tmp_path: Path) -> None:
    options = (*options, str(text)) if options[-1] == "--calibration" else options
    answer = lobit("export", "demo", *options, "--target", "onnx", "-o", tmp_path / "bundle")
    assert answer.code == 2 and message in " ".join(answer.err.split())


def test_training_begins_at_a_calibrated_checkpoint_of_the_same_model(text: Path, lobit: Any, stories: Path, tmp_path: Path) -> None:
    begin = tmp_path / "begin"
    calibrate = ("--calibration", text, "--samples", "4", "--length", "128")
    assert lobit("quantize", "demo", "--recipe", "8da4w-g32", *calibrate, "-o", begin).code == 0
    train = ("--recipe", "8da4w-g32", "--text", text, "--steps", "1", "--batch", "1", "--length", "64", "--from", begin)
    made = lobit("train", "demo", *train, "-o", tmp_path / "trained", "--json")
    assert made.code == 0 and made.json["settings"]["start"]
    refused = lobit("train", stories, *train, "--except", "layers.*.mlp.down", "-o", tmp_path / "other")
    assert refused.code == 2 and "another model" in refused.err
    turned = lobit("train", "demo", *train, "--rotate", "heads", "-o", tmp_path / "turned")
    assert turned.code == 2 and "has rotated nothing and the recipe rotates heads" in " ".join(turned.err.split())


def test_the_papers_scales_are_there_by_name(text: Path, lobit: Any, tmp_path: Path) -> None:
    seals = set()
    for number, rule in enumerate(((), ("--scale-rule", "range"), ("--scale-rule", "least_squares"))):
        out = tmp_path / str(number)
        made = lobit("quantize", "demo", "--recipe", "8da4w-g32", *rule, "-o", out, "--json")
        assert made.code == 0, made.err
        chosen = {one["weights"]["scale_rule"] for one in made.json["recipe"]["rules"]}
        assert chosen == {rule[1] if rule else "least_squares"}
        seals.add((out / "model.safetensors").read_bytes())
    assert len(seals) == 2, "the default is the search"
    train = ("--recipe", "8da4w-g32", "--scale-rule", "range", "--text", text, "--steps", "1", "--batch", "1", "--length", "64")
    trained = lobit("train", "demo", *train, "-o", tmp_path / "trained", "--json")
    assert {one["weights"]["scale_rule"] for one in trained.json["settings"]["recipe"]["rules"]} == {"range"}


def test_training_and_quantizing_hear_what_is_to_be_rotated(text: Path, lobit: Any, tmp_path: Path) -> None:
    train = ("--recipe", "8da8w", "--rotate", "stream", "--text", text, "--steps", "1", "--batch", "1", "--length", "64")
    trained = lobit("train", "demo", *train, "-o", tmp_path / "trained", "--json")
    assert trained.code == 0 and trained.json["settings"]["recipe"]["rotate"] == ["stream"]
    made = lobit("quantize", "demo", "--recipe", "8da8w", "--rotate", "heads,stream", "-o", tmp_path / "made", "--json")
    assert made.code == 0 and made.json["recipe"]["rotate"] == ["stream", "heads"] and made.json["recipe"]["untied"]
