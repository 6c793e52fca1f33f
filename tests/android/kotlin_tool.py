"""The app's own Kotlin code in a process that answers questions (`android_demo/host`, Check.kt and Calls.kt)."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lobit.android.artifacts import SOURCES, fetched
from lobit.android.host import runtime
from lobit.android.kotlin import compiled

CORE = SOURCES / "core/src/main/kotlin/dev/lobit/core"
NAMES = (
    *("Engine", "Json", "Fields", "Refusal", "Manifest", "ManifestReader", "Pieces", "Bundle", "BundleZip"),
    *("Half", "SafeTensors", "EmbeddingTable", "CallInputs", "CachedEngine"),
)
"""The files of the core that the questions need; the others need the phone's library."""
CLASS = "dev.lobit.host.CheckKt"


class Kotlin:
    """A process that lives as long as the tests."""

    def __init__(self) -> None:
        used = [path for path in (*fetched("jvm"), *fetched("kotlin")) if path.name.startswith(("json-", "kotlin-stdlib"))]
        files = [*(CORE / f"{name}.kt" for name in NAMES), *sorted((CORE / "template").glob("*.kt"))]
        files += [SOURCES / f"host/src/main/kotlin/dev/lobit/host/{name}.kt" for name in ("Check", "Calls")]
        classes = os.pathsep.join(map(str, [compiled("check", files, used), *used]))
        command = ["java", "-Xmx512m", "-cp", classes, CLASS]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="ascii")

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One question and its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the process ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def manifest(self, data: bytes) -> dict[str, Any]:
        """What the reader makes of a manifest's bytes."""
        return self.ask({"manifest": base64.b64encode(data).decode("ascii")})

    def open(self, folder: Path, hashes: bool = True, backends: Sequence[str] = ()) -> dict[str, Any]:
        """What opening a bundle gives where the app's library has such backends."""
        return self.ask({"bundle": str(folder), "hashes": hashes, "backends": list(backends)})

    def unzip(self, archive: Path, into: Path) -> dict[str, Any]:
        """What unpacking a zip gives."""
        return self.ask({"zip": str(archive), "into": str(into)})

    def render(self, template: str, messages: list[Any], special: dict[str, str] | None = None, prompt: bool = False) -> dict[str, Any]:
        """What a chat template writes."""
        return self.ask({"template": template, "messages": messages, "special": special or {}, "prompt": prompt})


def run_on_library(program: str, *arguments: Any) -> None:
    """Runs a program of `android_demo/host` with the phone's library for x86-64, whose folder is its first argument."""
    prepared = runtime("x86_64")
    command = [*prepared.command, f"dev.lobit.host.{program}Kt", prepared.libraries, *arguments]
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **prepared.environment}, capture_output=True, text=True, errors="replace", check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@cache
def kotlin() -> Kotlin:
    """The process, started when it is first asked for; it ends with the end of its input."""
    return Kotlin()
