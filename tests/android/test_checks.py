"""A build finds what would fail on a phone, and says what it is."""

from __future__ import annotations

import shutil
import subprocess
import zipfile

import pytest

from lobit.android import checks, notices
from lobit.android.artifacts import SOURCES, Artifact, fetched
from lobit.android.elf import Import, Library
from lobit.android.java_library import java_library
from lobit.android.kotlin import compiled
from lobit.android.shim import phone_libraries, shim

LISTING = """  Class descriptor  : 'Lorg/pytorch/executorch/Module;'
    #0              : (in Lorg/pytorch/executorch/Module;)
      name          : 'initHybrid'
      type          : '(Ljava/lang/String;II)Lcom/facebook/jni/HybridData;'
      access        : 0x1011a (PRIVATE STATIC NATIVE)
    #1              : (in Lorg/pytorch/executorch/Module;)
      name          : 'close'
      type          : '()V'
      access        : 0x0001 (PUBLIC)
    #2              : (in Lorg/pytorch/executorch/Module;)
      name          : 'etdumpNative'
      type          : '()Z'
      access        : 0x0112 (PRIVATE FINAL NATIVE)
"""
LOAD = """package dev.lobit.test

import dev.lobit.host.Libraries
import kotlin.system.exitProcess
import org.pytorch.executorch.ExecuTorchRuntime

fun main(arguments: Array<String>) {
    try {
        Libraries.load(arguments[0])
        println("backends: " + ExecuTorchRuntime.getRegisteredBackends().joinToString())
    } catch (error: Throwable) {
        println("refused: $error")
    }
    exitProcess(0)
}
"""


def test_native_methods_are_read_with_their_signatures_and_kinds():
    assert list(checks.native_methods(LISTING)) == [
        "Lorg/pytorch/executorch/Module; initHybrid (Ljava/lang/String;II)Lcom/facebook/jni/HybridData; S",
        "Lorg/pytorch/executorch/Module; etdumpNative ()Z I",
    ]


def test_a_native_method_that_is_missing_or_has_another_signature_is_named(monkeypatch, tmp_path):
    listing = "".join(_listed(method) for method in checks.natives()).replace("(Ljava/lang/String;)I\n", "(Ljava/lang/String;)J\n")
    monkeypatch.setattr(checks, "run", lambda command: listing.replace("'(Ljava/lang/String;)I'", "'(Ljava/lang/String;)J'"))
    found = checks.missing_natives([tmp_path / "classes.dex"])
    assert sorted(line.split()[6] for line in found) == ["loadMethodNative", "prefillTextInput"]
    monkeypatch.setattr(checks, "run", lambda command: listing)
    assert checks.missing_natives([tmp_path / "classes.dex"]) == []


def _listed(method):
    """A native method as dexdump lists it."""
    owner, name, kind, how = method.split()
    access = "STATIC NATIVE" if how == "S" else "NATIVE"
    return f"Class descriptor : '{owner}'\n name : '{name}'\n type : '{kind}'\n access : 0x0 ({access})\n"


@pytest.mark.parametrize("processor", ["arm64", "x86_64"])
def test_the_phones_libraries_load_at_min_sdk_and_register_the_listed_natives(android_tools, tmp_path, processor):
    from lobit.android.build import MIN_SDK

    android_tools("native")
    files = phone_libraries(processor, tmp_path)
    assert checks.library_problems(processor, files, MIN_SDK) == []
    assert checks.unknown_natives(files[0]) == []
    assert len(checks.unknown_natives(files[1])) > len(checks.natives()) / 2  # fbjni's own library has none of them


def test_symbols_that_older_phones_lack_are_named(android_tools, tmp_path):
    android_tools("native")
    found = checks.library_problems("arm64", phone_libraries("arm64", tmp_path), 22)
    assert "libexecutorch.so imports stderr, which Android has since API level 23, above 22" in found
    assert all("since API level 2" in problem for problem in found)


LIBRARY = Library("EM_AARCH64", ["libc.so"], [], set(), 16384)
"""A library that nothing is wrong with."""


@pytest.mark.parametrize(
    ("library", "told"),
    [
        (LIBRARY, []),
        (Library("EM_X86_64", [], [], set(), 16384), ["one.so is for EM_X86_64, not EM_AARCH64"]),
        (Library("EM_AARCH64", [], [], set(), 4096), ["one.so has segments aligned to 4096 bytes, phones have pages of 16384"]),
        (Library("EM_AARCH64", ["libomp.so"], [], set(), 16384), ["one.so needs libomp.so, which is not there"]),
        (
            Library("EM_AARCH64", [], [Import("quux", "LIBC", "STT_FUNC", weak=False)], set(), 16384),
            ["one.so imports quux, which bionic.txt does not have"],
        ),
        (Library("EM_AARCH64", [], [Import("quux", "LIBC", "STT_FUNC", weak=True)], set(), 16384), []),
        (Library("EM_AARCH64", [], [Import("own", "", "STT_FUNC", weak=False)], {"own"}, 16384), []),
    ],
)
def test_each_fault_of_a_library_is_named(monkeypatch, tmp_path, library, told):
    monkeypatch.setattr(checks, "read_library", lambda path: library)
    assert checks.library_problems("arm64", [tmp_path / "one.so"], 26) == told


def test_all_problems_are_listed_in_one_refusal():
    with pytest.raises(checks.AppError, match=r"dex: 2 problems, which would fail on a phone; nothing is written:\n  one\n  two"):
        checks.check("dex", ["one", "two"])
    checks.check("dex", [])


def test_java_for_android_has_what_phones_have_and_not_what_came_later(android_tools):
    android_tools("native")
    with zipfile.ZipFile(java_library()) as jar:
        names = set(jar.namelist())
    assert {"java/lang/String.class", "java/util/Map.class", "java/time/Instant.class", "javax/crypto/Cipher.class"} <= names
    absent = ("java/lang/ProcessHandle", "java/lang/management/", "java/awt/", "javax/swing/", "java/net/http/", "sun/")
    assert [name for name in names if name.startswith(absent)] == []


def test_everything_that_goes_into_the_app_has_its_notice():
    assert list(notices.problems()) == []


def test_an_artifact_without_a_notice_is_named(monkeypatch):
    monkeypatch.setattr(notices, "artifacts", lambda: [Artifact("maven", "org.example:new", "1", "jar", "", ("app",))])
    assert list(notices.problems()) == ["org.example:new goes into the app, and NOTICES.md does not name it"]


def test_a_licence_without_text_and_a_missing_holder_are_named(monkeypatch):
    monkeypatch.setattr(notices, "artifacts", lambda: [])
    monkeypatch.setattr(notices, "notices", lambda: [notices.Notice("new", [], ["Zlib", "MIT"], "")])
    assert list(notices.problems()) == ["NOTICES.md names Zlib, and there is no Zlib.txt", "NOTICES.md names no copyright holder of new"]


def _load(folder, binding, name):
    """What the phone's x86-64 library says when it is loaded with a binding in a JVM."""
    main = folder / "Load.kt"
    main.write_text(LOAD, encoding="utf-8")
    jars = [*fetched("jvm"), *(path for path in fetched("kotlin") if path.name.startswith("kotlin-stdlib"))]
    files = [*sorted(binding.rglob("*.kt")), SOURCES / "host/src/main/kotlin/dev/lobit/host/Libraries.kt", main]
    libraries = shim("x86_64")
    classes = ":".join(map(str, [compiled(name, files, jars), *jars]))
    command = ["java", "-cp", classes, "dev.lobit.test.LoadKt", libraries]
    return subprocess.run(command, env={"LD_LIBRARY_PATH": str(libraries), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_library_itself_accepts_the_binding_and_refuses_one_that_lacks_a_native(android_tools, tmp_path):
    android_tools("native")
    copy = tmp_path / "binding"
    shutil.copytree(SOURCES / "binding", copy)
    assert "backends: XnnpackBackend" in _load(tmp_path, copy, "whole")
    module = copy / "src/main/kotlin/org/pytorch/executorch/Module.kt"
    text = module.read_text(encoding="utf-8")
    native = "    private external fun etdumpNative(): Boolean\n"
    assert native in text
    module.write_text(text.replace(native, ""), encoding="utf-8")
    told = _load(tmp_path, copy, "lacking")
    assert "refused" in told and "etdumpNative" in told
