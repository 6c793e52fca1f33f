"""From Kotlin sources to a signed APK, by aapt2, the Kotlin compiler, R8 and apksigner alone."""

from __future__ import annotations

import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lobit
from lobit.android import apk, checks, notices
from lobit.android.artifacts import SOURCES, cache_folder, fetched, install_command, missing_programs, run, unpacked
from lobit.android.kotlin import compiled
from lobit.android.r8 import framework, r8_command
from lobit.android.shim import ABIS, phone_libraries
from lobit.android.signing import Key, debug_key, sign
from lobit.atomic_folder import publish
from lobit.errors import InputError, MissingPartError
from lobit.progress_callback import Progress
from lobit.runtime.manifest import sha256_of

MIN_SDK, TARGET_SDK = 26, 34
"""API levels: the oldest Android that has what the native library imports, and the one whose resources the app is built against."""
USES = ("native", "apk")
"""Uses of the programs that a build runs."""
PARTS = ("binding", "core", "app")
"""Parts of the sources that go into the app."""
LICENCES = "licences"
"""Where the licences are among the APK's assets."""
RULES = """
# The native library finds these by their names.
-keep class org.pytorch.executorch.** { *; }
-keep class com.facebook.jni.** { *; }
-keepattributes SourceFile,LineNumberTable
# Names stay readable in a phone's log, and what runs is what the compiler wrote: what makes the app small is what is left out.
-dontobfuscate
-dontoptimize
-dontwarn javax.annotation.**
"""
SECONDS = {"fetch": 1, "resources": 4, "compile Kotlin": 20, "dex": 12, "check": 8, "pack": 3, "sign": 4}
"""Each step, with the seconds that it takes on a slow machine, by which progress is counted."""


@dataclass(frozen=True)
class Project:
    """The sources of an app."""

    manifest: Path
    """AndroidManifest.xml."""
    resources: Path
    """The folder res."""
    kotlin: Sequence[Path]

    @staticmethod
    def in_folder(folder: Path = SOURCES, parts: Sequence[str] = PARTS) -> Project:
        """The sources in the parts of a folder, the last of which has the manifest and the resources."""
        mains = [folder / part / "src/main" for part in parts]
        files = [path for main in mains for path in sorted((main / "kotlin").rglob("*.kt"))]
        return Project(mains[-1] / "AndroidManifest.xml", mains[-1] / "res", files)


def build(
    out: Path,
    project: Project,
    *,
    processors: Sequence[str] = ("arm64",),
    assets: Mapping[str, Path] | None = None,
    key: Key | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Builds an APK; the same inputs give the same bytes, wherever and whenever it is built.

    Args:
        out: the file to write, whole or not at all; one that is there is replaced.
        project: the sources.
        processors: of `shim.ABIS`.
        assets: files that the app ships, by their paths among its assets.
        key: what to sign with; None: this machine's debug key.
        progress: called as the steps advance.

    Returns:
        `{"apk", "bytes", "sha256", "processors", "version", "certificate", "seconds"}`, seconds by step.

    Raises:
        InputError: there is no folder to write into.
        MissingPartError: a program or an artifact is missing, or refuses the sources.
        AppError: a check has found what would fail on a phone; nothing is written.
    """
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is no folder: make it first, or choose another place with -o")
    check_programs()
    cache_folder().mkdir(parents=True, exist_ok=True)
    steps = Steps(progress)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as name, tempfile.TemporaryDirectory(dir=out.parent, prefix=".apk-") as new:
        work = Path(name)
        with steps.step("fetch"):
            fetched("framework", "app", "kotlin", "dex", "native")
            libraries = {processor: phone_libraries(processor, work / ABIS[processor]) for processor in processors}
        with steps.step("resources"):
            base, generated = compile_resources(project, work)
        with steps.step("compile Kotlin"):
            classes = compile_classes(project, generated, work)
        with steps.step("dex"):
            dex = compile_dex(classes, work)
        with steps.step("check"):
            checks.check("licences", list(notices.problems()))
            checks.check("dex", [*checks.unresolved(dex), *checks.missing_natives(dex)])
            for processor, files in libraries.items():
                problems = [*checks.library_problems(processor, files, MIN_SDK), *checks.unknown_natives(files[0])]
                checks.check(f"libraries for {processor}", problems)
        with steps.step("pack"):
            unsigned = work / "unsigned.apk"
            apk.pack(dict(_entries(base, dex, libraries, assets or {})), unsigned)
            checks.check("APK", apk.misaligned(unsigned))
            run(["zipalign", "-c", "-p", str(apk.WORD), unsigned])
        with steps.step("sign"):
            signed = Path(new) / out.name
            certificate = sign(unsigned, signed, key or debug_key())
        publish(signed, out)
    return {
        "apk": str(out),
        "bytes": out.stat().st_size,
        "sha256": sha256_of(out),
        "processors": [ABIS[processor] for processor in processors],
        "version": lobit.__version__,
        "certificate": certificate,
        "seconds": steps.seconds,
    }


class Steps:
    """Times steps and tells how far they are."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One of `SECONDS`."""
        if self._progress is not None:
            self._progress(name, sum(SECONDS[done] for done in self.seconds), sum(SECONDS.values()))
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 1)


def check_programs() -> None:
    """Refuses to begin where a program is missing.

    Raises:
        MissingPartError: the message has the command that installs all that are missing.
    """
    if missing := missing_programs(*USES):
        raise MissingPartError(f"programs that build the app are not installed: {install_command(missing)}")


def version_code(version: str) -> int:
    """The number by which Android tells which of two versions is newer, such as 10203 for 1.2.3."""
    major, minor, patch = (int(part) for part in version.split(".")[:3])
    return 10000 * major + 100 * minor + patch


def compile_resources(project: Project, work: Path) -> tuple[Path, Path]:
    """Compiles resources and the manifest: an APK that has nothing else, and the folder with the Java class of their names."""
    generated, base = work / "generated", work / "base.apk"
    numbers = ["--version-name", lobit.__version__, "--version-code", str(version_code(lobit.__version__))]
    levels = ["--min-sdk-version", str(MIN_SDK), "--target-sdk-version", str(TARGET_SDK)]
    outputs: list[str | Path] = ["--java", generated, "--proguard", work / "resources.rules", "-o", base]
    run(["aapt2", "compile", "--dir", project.resources, "-o", work / "resources.zip"])
    link: list[str | Path] = ["aapt2", "link", "--debug-mode", "--replace-version", "-I", framework(), "--manifest", project.manifest]
    run([*link, *numbers, *levels, *outputs, work / "resources.zip"])
    return base, generated


def compile_classes(project: Project, generated: Path, work: Path) -> list[Path]:
    """Compiles the sources: jars with all classes of the app."""
    names, libraries = work / "R.jar", class_jars("app", work)
    run(["javac", "-nowarn", "-Xlint:-options", "--release", "8", "-d", work / "names", *sorted(generated.rglob("*.java"))])
    found = sorted((work / "names").rglob("*.class"))
    apk.pack({path.relative_to(work / "names").as_posix(): path for path in found}, names)
    # What is compiled is kept by the names of what it was compiled against, so that of the resources' class tells its content.
    names = names.rename(work / f"R-{sha256_of(names)[:16]}.jar")
    return [compiled("app", project.kotlin, [framework(), names, *libraries]), names, *libraries]


def class_jars(use: str, work: Path) -> list[Path]:
    """The jars of other projects' classes for a use; those of Android archives are unpacked into a folder."""
    jars = []
    for path in fetched(use):
        if path.suffix == ".aar":
            unpacked(path, ["classes.jar"], work / path.stem)
            path = (work / path.stem / "classes.jar").rename(work / path.with_suffix(".jar").name)
        jars.append(path)
    return jars


def compile_dex(classes: Sequence[Path], work: Path) -> list[Path]:
    """Translates classes to Android's format, without those that nothing uses."""
    rules, out = work / "own.rules", work / "dex"
    rules.write_text(RULES, encoding="utf-8")
    out.mkdir()
    settings: list[str | Path] = ["--release", "--min-api", str(MIN_SDK), "--pg-conf", rules, "--pg-conf", work / "resources.rules"]
    run(r8_command("R8", *settings, "--output", out, *classes))
    return sorted(out.glob("*.dex"))


def _entries(
    base: Path, dex: Sequence[Path], libraries: Mapping[str, Sequence[Path]], assets: Mapping[str, Path]
) -> Iterator[tuple[str, Path | bytes]]:
    """Everything that is in the APK."""
    with zipfile.ZipFile(base) as resources:
        yield from ((name, resources.read(name)) for name in resources.namelist())
    yield from ((path.name, path) for path in dex)
    for processor, files in libraries.items():
        yield from ((f"lib/{ABIS[processor]}/{path.name}", path) for path in files)
    shipped = {f"{LICENCES}/{path.name}": path for path in notices.files()} | dict(assets)
    yield from ((f"assets/{name}", path) for name, path in shipped.items())
