"""The manifest: one schema, and the same outcome for every reader."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lobit.errors import BundleError
from lobit.runtime.manifest import MAJOR, MINOR, Manifest
from lobit.runtime.manifest_schema import schema
from tests.golden.manifests import CASES, EXPECTED, FOLDER

SCHEMA_FILE = Path(__file__).parents[2] / "runtime" / "manifest.schema.json"
TOLD = {
    "version": "has schema version",
    "fields": "manifest.json",
    "path": "leaves the bundle",
    "contradiction": "contradicts itself",
    "seal": "has changed",
}
"""What the message has, by the outcome."""
SHAPES = ("version", "fields")
"""Outcomes that the schema alone finds; the others are of values that do not fit each other."""


def test_the_schema_is_the_dataclasses() -> None:
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == schema(), "python -m lobit.runtime.manifest_schema writes it"


def test_the_golden_files_are_the_cases() -> None:
    files = {path.name: path.read_bytes() for path in FOLDER.glob("*.json") if path.name != EXPECTED}
    assert files == {f"{name}.json": text.encode("ascii") for name, (_, text) in CASES.items()}
    outcomes = json.loads((FOLDER / EXPECTED).read_text(encoding="utf-8"))
    assert outcomes == {f"{name}.json": outcome for name, (outcome, _) in CASES.items()}
    assert set(outcomes.values()) == {"read", *TOLD}


@pytest.mark.parametrize("name", CASES)
def test_a_golden_manifest_is_read_or_refused_as_expected(name: str) -> None:
    expected, data = CASES[name][0], (FOLDER / f"{name}.json").read_bytes()
    if expected == "read":
        manifest = Manifest.from_json(data)
        assert manifest.name == "story" and "☺" in (manifest.tokens.chat_template or "")
        if manifest.schema_version == f"{MAJOR}.{MINOR}":
            assert manifest.to_json().encode() == data
    else:
        with pytest.raises(BundleError, match=TOLD[expected]):
            Manifest.from_json(data)


@pytest.mark.parametrize("name", CASES)
def test_the_schema_agrees(name: str) -> None:
    """What it allows besides is unknown fields, which a newer minor version may have."""
    expected, values = CASES[name][0], json.loads((FOLDER / f"{name}.json").read_bytes())
    errors: list[Any] = list(jsonschema.Draft202012Validator(schema()).iter_errors(values))
    assert bool(errors) == (expected in SHAPES and name != "unknown-field"), errors[:1]


def test_the_seal_is_of_the_bytes_alone() -> None:
    """As a reader in any language checks it."""
    data = (FOLDER / "own-states.json").read_bytes()
    assert data.endswith(b'"\n}\n')
    assert hashlib.sha256(data[:-68]).hexdigest().encode() == data[-68:-4]
