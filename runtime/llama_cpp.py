"""Target gguf: the engine, llama.cpp in a process of its own, and the integers read back out of the file."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

from lobit.errors import BundleError, LobitError
from lobit.runtime.bundle import Bundle
from lobit.runtime.engine import Logits, SteppingEngine, check_tokens
from lobit.runtime.gguf_parts import read_program as read_program
from lobit.runtime.gguf_ports import QUIET_END
from lobit.runtime.llama_library import library_path
from lobit.runtime.service import ServedProcess, logits_of
from lobit.targets import THIS_MACHINE, Device

SHOWN = 2
"""Lines of what llama.cpp printed last that a message shows."""


class _Llama(ServedProcess):
    """The process that runs a bundle (`llama_process.py`)."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        library_path()
        self.bundle = bundle
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        command = [sys.executable, "-m", "lobit.runtime.llama_process", str(bundle.folder.resolve()), str(threads)]
        environment = {**os.environ, **QUIET_END}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment)
        assert process.stdout is not None
        super().__init__(process, process.stdout)

    def refused(self, message: str) -> LobitError:
        """See `Peer.refused`."""
        return BundleError(f"llama.cpp does not run bundle {self.bundle.manifest.name} ({message}): export it again")

    def ended(self) -> LobitError:
        """See `Peer.ended`."""
        code = self.process.wait()
        self.log.seek(0)
        lines = [line for line in self.log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        told = "; ".join(lines[-SHOWN:]) or "it printed nothing"
        return BundleError(f"llama.cpp ended with code {code} while it ran bundle {self.bundle.manifest.name} ({told}): export it again")


class LlamaEngine(SteppingEngine):
    """A GGUF file under llama.cpp, which can give the logits of every token of a call, however the bundle was exported.

    Args:
        bundle: a bundle for target gguf.
        threads: number of its threads.

    Raises:
        BundleError: llama.cpp refuses the file.
        MissingPartError: it is not installed.
    """

    def __init__(self, bundle: Bundle, threads: int) -> None:
        manifest = bundle.manifest
        self.process = _Llama(bundle, threads)
        super().__init__(self._read, manifest.context, manifest.chunk, manifest.model.vocab_size)
        self.served_by = self.process.process.pid

    def _read(self, tokens: list[int], position: int) -> Logits:
        return logits_of(self.process.step(tokens, position), self.vocab_size)

    def score(self, tokens: Sequence[int]) -> Logits:
        """See `Engine.score`."""
        check_tokens(self, tokens)
        rows = []
        for start in range(0, len(tokens), self.chunk):
            part = tokens[start : start + self.chunk]
            rows.append(logits_of(self.process.service.score(part, self.position), self.vocab_size))
            self.position += len(part)
        return np.concatenate(rows)


def open_engine(bundle: Bundle, threads: int, device: Device = THIS_MACHINE) -> LlamaEngine:
    """The engine of a bundle.

    Raises:
        MissingPartError: llama.cpp is not installed.
        BundleError: it refuses the file.
    """
    return LlamaEngine(bundle, threads)
