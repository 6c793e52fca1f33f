"""Qualcomm's libraries: where they are absent, in another version, or not for this machine, one message says what to do."""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from lobit import verbs
from lobit.errors import MissingPartError
from lobit.runtime.qnn_libraries import library_folder


def package_is(monkeypatch: pytest.MonkeyPatch, spec: Any, version: str) -> None:
    """Lets the package have this spec, and this version; None: it is not there. Other packages are what they are."""
    find, told = importlib.util.find_spec, metadata.version
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: spec if name == "onnxruntime_qnn" else find(name, *rest))
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "onnxruntime-qnn" else told(name))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This is x86-64 Linux with the package, whatever it is."""
    package_is(monkeypatch, type("Spec", (), {"submodule_search_locations": ["/somewhere/onnxruntime_qnn"]}), "2.5.0")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return monkeypatch


def test_the_folder_is_that_of_the_package(installed: pytest.MonkeyPatch) -> None:
    assert library_folder() == Path("/somewhere/onnxruntime_qnn")


def test_an_absent_package_is_named_with_what_installs_it(installed: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package_is(installed, None, "2.5.0")
    with pytest.raises(MissingPartError, match=r"onnxruntime-qnn 2\.5\.0, which is not installed: pip install 'lobit\[qnn\]'"):
        verbs.export("demo", "qnn", tmp_path / "bundle", recipe=verbs.choose_recipe("w4-channel"), context=64)
    assert list(tmp_path.iterdir()) == []


def test_another_version_is_refused(installed: pytest.MonkeyPatch) -> None:
    package_is(installed, importlib.util.find_spec("onnxruntime_qnn"), "2.7.0")
    with pytest.raises(MissingPartError, match=r"2\.7\.0 is installed: pip install onnxruntime-qnn==2\.5\.0"):
        library_folder()


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "aarch64")])
def test_another_machine_is_refused(system: str, machine: str, installed: pytest.MonkeyPatch) -> None:
    installed.setattr(platform, "system", lambda: system)
    installed.setattr(platform, "machine", lambda: machine)
    with pytest.raises(MissingPartError, match=f"x86-64 Linux, not on {system}"):
        library_folder()
