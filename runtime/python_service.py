"""Both sides of a service that is a Python process of its own, for libraries that end the process where something is wrong."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial

from lobit.errors import BundleError, LobitError
from lobit.runtime.bundle import Bundle
from lobit.runtime.engine import Logits, ReadChunk
from lobit.runtime.service import DONE, FAILED, HEADER, ServedProcess

PATIENCE = 1
"""Seconds that the process has for its own end. It has nothing to finish, and may be in the middle of a call that takes longer."""
SHOWN = 3
"""Lines of what the process printed last that a message shows."""


class PythonProcess(ServedProcess):
    """The process that runs a bundle.

    Args:
        bundle: what to run.
        module: the module that serves it (`serve`), given the bundle's folder.
        who: what runs there, in messages.
        arguments: what the module is given besides.
        environment: what is set in the process's environment besides.

    Raises:
        LobitError: the program cannot be run.
    """

    def __init__(self, bundle: Bundle, module: str, who: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.bundle, self.who = bundle, who
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        command = [sys.executable, "-m", module, str(bundle.folder.resolve()), *arguments]
        told = {**os.environ, **(environment or {})}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=told)
        assert process.stdout is not None
        super().__init__(process, process.stdout, PATIENCE)

    def refused(self, message: str) -> LobitError:
        """See `Peer.refused`."""
        return BundleError(f"{self.who} does not run bundle {self.bundle.manifest.name} ({message}): export it again")

    def ended(self) -> LobitError:
        """See `Peer.ended`."""
        code = self.process.wait()
        self.log.seek(0)
        lines = [line for line in self.log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        told = "; ".join(lines[-SHOWN:]) or "it printed nothing"
        return BundleError(f"{self.who} ended with code {code} while it ran bundle {self.bundle.manifest.name} ({told}): export it again")


def serve(who: str, opened: Callable[[], Mapping[int, ReadChunk]]) -> None:
    """Answers requests on the standard streams until they end.

    Args:
        who: what runs here.
        opened: loads the program; gives the function that reads tokens for each kind of request (`service.STEP`, …).
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between the frames

    def answer(kind: int, content: bytes) -> None:
        answers.write(HEADER.pack(kind, len(content)) + content)
        answers.flush()

    def told(work: Callable[[], bytes]) -> bool:
        """Answers with what some work gives, or with why it gives nothing: whatever the library raises is told to the other side."""
        try:
            answer(DONE, work())
        except Exception as error:
            answer(FAILED, (str(error) if isinstance(error, LobitError) else f"{type(error).__name__}: {error}").encode())
            return False
        return True

    known: dict[int, ReadChunk] = {}

    def begin() -> bytes:
        known.update(opened())
        return json.dumps({"device": who}).encode()

    def read(kind: int, content: bytes) -> bytes:
        if kind not in known:
            raise BundleError(f"requests of kind {kind} are not known here")
        position, *tokens = struct.unpack(f">{len(content) // 8}q", content)
        logits: Logits = known[kind](tokens, position)
        return logits.astype(">f4").tobytes()

    requests = sys.stdin.buffer
    if not told(begin):
        return
    while len(header := requests.read(HEADER.size)) == HEADER.size:
        kind, size = HEADER.unpack(header)
        content = requests.read(size)
        told(partial(read, kind, content))
