"""Compiles Kotlin sources to jars that are kept until a source changes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lobit.android.artifacts import SOURCES, cache_folder, fetched, run
from lobit.atomic_folder import publish

COMPILER = "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler"
OPTIONS = ["-no-stdlib", "-no-reflect", "-jvm-target", "17", "-Werror"]


def sources(*parts: str) -> list[Path]:
    """The Kotlin files of parts of the app, such as `binding`, sorted by their paths."""
    return sorted(path for part in parts for path in (SOURCES / part / "src/main/kotlin").rglob("*.kt"))


def compiled(name: str, files: Sequence[Path], classpath: Sequence[Path]) -> Path:
    """A jar with the classes of Kotlin files.

    Args:
        name: begins the jar's name.
        files: the sources.
        classpath: the jars that they use.

    Raises:
        MissingPartError: the compiler is missing, or refuses the sources; the message has what it says.
    """
    digest = hashlib.sha256()
    for path in (*files, *classpath):
        digest.update(path.name.encode() + b"\0" + (path.read_bytes() if path in files else b""))
    jar = cache_folder() / f"{name}-{digest.hexdigest()[:16]}.jar"
    if not jar.is_file():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            new = Path(folder) / "new.jar"
            run(compile_command(files, classpath, new))
            publish(new, jar)
    return jar


def compile_command(files: Sequence[Path], classpath: Sequence[Path], out: Path) -> list[str | Path]:
    """The command that compiles Kotlin files into a jar or a folder."""
    own, used = (os.pathsep.join(map(str, paths)) for paths in (fetched("kotlin"), classpath))
    return ["java", "-Xmx1g", "-cp", own, COMPILER, *OPTIONS, "-cp", used, "-d", out, *files]
