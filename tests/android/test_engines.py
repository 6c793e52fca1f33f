"""The phone's own ExecuTorch library on Linux: it computes what the runtime in Python computes, and its failures are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobit import verbs
from lobit.android import artifacts, shim
from lobit.android.elf import Import, Library
from lobit.android.host import CPUS
from lobit.demo import held_out_text
from lobit.errors import BundleError, InputError, MissingPartError
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import SteppingEngine, open_engine
from lobit.runtime.executorch_android import Server
from lobit.runtime.parity import kl_divergence, log_softmax
from lobit.targets import THIS_MACHINE, Device, parse_device

X86, ARM = Device("emulated-x86_64"), Device("emulated-arm64")
CLOSE_KL = {"fp": 1e-6, "8da4w-g32": 1e-3}
"""Nats a token: none is measured where both builds choose the same kernels; where they do not, INT8 inputs fall over boundaries (1e-5)."""


def walked(engine: SteppingEngine) -> Any:
    """Logits after a prompt of several chunks, and after tokens one by one."""
    tokens = [int(token) for token in np.random.default_rng(0).integers(3, 500, 110)]
    return np.stack([engine.prefill(tokens[:90]), *(engine.decode(token) for token in tokens[90:])])


@pytest.mark.parametrize(("model", "recipe"), [("stories260k", "fp"), ("stories260k", "8da4w-g32"), ("demo", "8da4w-g32")])
def test_the_x86_library_computes_what_the_runtime_in_python_does(
    model: str, recipe: str, bundles: Any, android_tools: Callable[[str], None]
) -> None:
    android_tools("native")
    bundle = open_bundle(bundles(model, recipe))
    found, expected = (log_softmax(walked(open_engine(bundle, 1, device))) for device in (X86, THIS_MACHINE))
    assert kl_divergence(expected, found).mean() < CLOSE_KL[recipe]


@pytest.mark.slow
@pytest.mark.parametrize("cpu", CPUS)
def test_parity_passes_on_the_arm64_library(cpu: str, bundles: Any, models: Any, android_tools: Callable[[str], None]) -> None:
    for use in ("native", "arm64"):
        android_tools(use)
    bundle, device = bundles("demo", "8da4w-g32"), Device("emulated-arm64", cpu)
    result = verbs.parity(bundle, str(models("demo")), held_out_text(), tokens=300, stages=["artifact"], device=device)
    assert result["passed"], result
    assert [stage["name"] for stage in result["stages"]] == ["artifact", f"emulated-arm64:{cpu}"]
    assert result["emulated"] and result["stages"][-1]["kl_step"] < result["limits"]["kl_conversion"]["limit"]


@pytest.mark.slow
def test_a_wrong_program_is_refused_by_the_library(bundles: Any, android_tools: Callable[[str], None], tmp_path: Path) -> None:
    android_tools("native")
    bundle = open_bundle(bundles("stories260k", "fp"))
    (tmp_path / bundle.manifest.file("program").path).write_bytes(b"no program" * 100)
    with pytest.raises(BundleError, match="phone's library cannot run the program"):
        open_engine(replace(bundle, folder=tmp_path), 1, X86)


def test_a_process_that_dies_is_told_with_its_last_words(bundles: Any, android_tools: Callable[[str], None]) -> None:
    android_tools("native")
    server = Server(open_bundle(bundles("stories260k", "fp")), 1, X86)
    server.process.kill()
    with pytest.raises(BundleError, match="ended"):
        server.step([1, 2], 0)


@pytest.mark.slow
def test_instructions_a_token_are_counted_the_same_twice(bundles: Any, android_tools: Callable[[str], None]) -> None:
    """The Java side's share varies by a little. A token of a prompt shares the reading of the weights with others."""
    for use in ("native", "arm64"):
        android_tools(use)
    found = [
        verbs.bench([bundles("demo", "8da4w-g32")], prompts=(64,), generates=(16,), depths=(0, 1000), device=ARM) for _ in range(2)
    ]
    (prompt, token), again = (row["instructions_per_token"] for row in found[0]["rows"]), found[1]["rows"]
    assert [row["instructions_per_token"] for row in again] == pytest.approx([prompt, token], rel=0.1)
    assert 2_000_000 / 16 < prompt < token, "each of 2 million weights is multiplied once, by instructions that multiply up to 16"
    assert [left["test"] for left in found[0]["skipped"]] == ["pp64@d1000", "tg16@d1000"]


def test_devices_are_read_from_their_names() -> None:
    assert parse_device("host") == THIS_MACHINE
    assert parse_device("emulated-arm64", "a64fx") == parse_device("emulated-arm64:a64fx") == Device("emulated-arm64", "a64fx")
    for text, cpu in (("phone", None), ("host", "max"), ("emulated-arm64:max", "a64fx")):
        with pytest.raises(InputError, match=r"choose one of|leave it out"):
            parse_device(text, cpu)


def test_a_target_without_such_a_device_and_an_unknown_processor_are_refused(models: Any, bundles: Any, tmp_path: Path) -> None:
    verbs.export(str(models("llama")), "onnx", tmp_path / "bundle", recipe=verbs.choose_recipe("fp"), context=32, chunk=8)
    with pytest.raises(InputError, match="onnx do not run on device emulated-arm64"):
        open_engine(open_bundle(tmp_path / "bundle"), 1, ARM)
    with pytest.raises(InputError, match="no emulated processor 'cortex-a53'"):
        open_engine(open_bundle(bundles("stories260k", "fp")), 1, Device("emulated-arm64", "cortex-a53"))


def test_every_function_that_the_libraries_ask_for_is_a_jump_or_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"memcpy": "LIBC", "fputs": "LIBC", "x": "LIBC_N"}
    asked = [Import(name, version, "STT_FUNC", False) for name, version in names.items()]
    monkeypatch.setattr(shim, "read_library", lambda path: Library("EM_X86_64", [], asked, set(), 16384))
    jumps, script = shim.stubs("x86_64", [Path("lib.so")], "BIONIC(fputs)\n")
    assert "memcpy@LIBC\n" in jumps and "x@LIBC_N" in jumps and "fputs" not in jumps
    assert script.splitlines()[1:] == ["LIBC { } SHIM_BASE;", "LIBC_N { } LIBC;"]


def test_a_variable_that_is_not_known_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [Import("environ", "LIBC", "STT_OBJECT", False)]
    monkeypatch.setattr(shim, "read_library", lambda path: Library("EM_X86_64", [], asked, set(), 16384))
    with pytest.raises(MissingPartError, match="environ"):
        shim.stubs("x86_64", [Path("lib.so")], "")


def test_a_file_that_is_not_the_listed_one_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that gives other bytes: npm is a script that writes a file of its own."""
    (tmp_path / "npm").write_text("#!/bin/sh\necho other > react-native-executorch-0.9.3.tgz\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("LOBIT_ANDROID", str(tmp_path / "cache"))
    only = [artifact for artifact in artifacts.artifacts() if artifact.registry == "npm"]
    monkeypatch.setattr(artifacts, "artifacts", lambda: only)
    with pytest.raises(MissingPartError, match=r"react-native-executorch-0\.9\.3\.tgz"):
        artifacts.fetched("native")
    assert list((tmp_path / "cache/artifacts").iterdir()) == []


def test_every_artifact_is_pinned_by_version_and_hash() -> None:
    listed = artifacts.artifacts()
    assert len({artifact.file for artifact in listed}) == len(listed)
    assert all(len(artifact.sha256) == 64 and artifact.version[0].isdigit() and artifact.uses for artifact in listed if artifact.version)


def test_one_command_installs_the_programs_of_every_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is what `make android-programs` runs, and with it CI on a bare machine."""
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = artifacts.missing_programs()
    assert {program.use for program in missing} == {"native", "arm64", "apk", "adb"}
    assert [program.name for program in artifacts.missing_programs("adb")] == ["adb"]
    words = artifacts.install_command(missing).split()
    assert len(words) == len(set(words)) and {"adb", "qemu-user", "aapt", "gcc"} < set(words)
