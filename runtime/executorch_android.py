"""Target `xnnpack` on the phone's own ExecuTorch library: on Linux, in a Java process, natively (x86-64) or emulated (arm64).

What it computes is what the phone computes. How long it takes says nothing about a phone.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import weakref
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lobit.android.host import CPUS, runtime, serve_command
from lobit.errors import BundleError
from lobit.runtime.bundle import Bundle
from lobit.runtime.engine import Logits, SteppingEngine
from lobit.runtime.executorch import read_program as read_program
from lobit.targets import Device

LONGEST_ANSWER = 1 << 31
"""Bytes of an answer that are read at most."""
HEADER = struct.Struct(">bi")
"""Status and number of bytes of an answer."""
LAST_WORDS = 2000
"""Characters of the process's last messages that an error repeats."""


class Server:
    """A process that runs a program, and the frames in which it is asked (`android_demo/host`, Server.kt).

    Args:
        program: the `.pte` file.
        method: the name of its method that takes tokens and a position.
        threads: of the runtime.
        device: `emulated-x86_64` or `emulated-arm64`, with the processor to emulate.
        count: whether the emulator counts instructions, and tells them on stderr when the process ends.

    Raises:
        BundleError: the library refuses the program.
        MissingPartError: something that is needed to run it is missing.
    """

    def __init__(self, program: Path, method: str, threads: int, device: Device, count: bool = False) -> None:
        prepared = runtime(device.kind.removeprefix("emulated-"), device.detail or CPUS[0], count)
        ours, theirs = os.pipe()
        command = serve_command(prepared, program, method, threads, f"/proc/self/fd/{theirs}")
        environment = {**os.environ, **prepared.environment}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=(theirs,), env=environment
        )
        os.close(theirs)
        assert self.process.stdin is not None
        self._requests, self._answers = self.process.stdin, os.fdopen(ours, "rb")
        self.close = weakref.finalize(self, _end, self.process, self._answers)
        self._answer()

    def step(self, tokens: list[int], position: int) -> bytes:
        """The logits, float32 and big-endian, that the program gives for tokens that begin at a position.

        Raises:
            BundleError: the program failed, or the process ended.
        """
        with contextlib.suppress(BrokenPipeError):  # the answer tells what happened
            self._requests.write(struct.pack(f">iq{len(tokens)}q", len(tokens), position, *tokens))
            self._requests.flush()
        return self._answer()

    def _answer(self) -> bytes:
        header = self._answers.read(HEADER.size)
        if len(header) < HEADER.size:
            raise BundleError(f"the process with the phone's library ended ({self._last_words()}): report it with this message")
        status, size = HEADER.unpack(header)
        content = self._answers.read(size) if 0 <= size <= LONGEST_ANSWER else b""
        if len(content) != size:
            raise BundleError(f"the process with the phone's library ended in the middle of an answer ({self._last_words()})")
        if status:
            raise BundleError(f"the phone's library cannot run the program ({content.decode('utf-8', 'replace')}): export it again")
        return content

    def _last_words(self) -> str:
        self.close()
        assert self.process.stderr is not None
        return self.process.stderr.read().decode("utf-8", "replace")[-LAST_WORDS:].strip() or f"exit code {self.process.returncode}"


def _end(process: subprocess.Popen[bytes], answers: BinaryIO) -> None:
    """Ends the process by the end of its input, or by force."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    answers.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def open_engine(bundle: Bundle, threads: int, device: Device) -> SteppingEngine:
    """Starts a process with the phone's library and loads the program of a bundle.

    Args:
        bundle: a bundle for target xnnpack.
        threads: of the runtime.
        device: where to run it.

    Raises:
        BundleError: the library refuses the program.
        MissingPartError: something that is needed to run it is missing.
    """
    manifest = bundle.manifest
    server = Server(bundle.path("program"), manifest.method("step").name, threads, device)

    def step(tokens: list[int], position: int) -> Logits:
        logits = np.frombuffer(server.step(tokens, position), ">f4").astype(np.float32)
        return logits.reshape(-1, manifest.model.vocab_size)

    slots = min(manifest.cache.slots)
    return SteppingEngine(step, manifest.context, manifest.chunk, manifest.model.vocab_size, slots, manifest.all_logits)
