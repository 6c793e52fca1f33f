"""Runs a bundle for target qnn on the emulator of the HTP: `python -m lobit.runtime.qnn_emulator BUNDLE`, in frames (`service.py`).

It is a process of its own, as the emulator ends the process where something is wrong, and prints what it does to the standard output.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from typing import IO, Any

from numpy.typing import NDArray

from lobit.errors import LobitError
from lobit.quiet import quiet_python
from lobit.runtime.bundle import Bundle, open_bundle
from lobit.runtime.client import CachedProgram, Ports
from lobit.runtime.qnn_libraries import load_libraries
from lobit.runtime.service import DONE, FAILED, HEADER, STEP


class Emulated:
    """The methods of a program, loaded when they are first run.

    Args:
        bundle: what to run.
    """

    def __init__(self, bundle: Bundle) -> None:
        with quiet_python():
            load_libraries()
            from executorch.runtime import Runtime
        self.bundle, self._methods = bundle, dict[str, Any]()
        self._program = Runtime.get().load_program(bundle.path("emulated"))

    def run(self, name: str, inputs: Ports) -> dict[str, NDArray[Any]]:
        """The outputs of a method (`client.RunMethod`)."""
        import torch

        if name not in self._methods:
            self._methods[name] = self._program.load_method(name)
        outputs = self._methods[name].execute([torch.from_numpy(array) for array in inputs.values()])
        method = next(method for method in self.bundle.manifest.methods if method.name == name)
        return {port.name: tensor.numpy().copy() for port, tensor in zip(method.outputs, outputs, strict=True)}


def serve(bundle: Bundle, requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answers requests until their stream ends."""

    def answer(kind: int, content: bytes) -> None:
        answers.write(HEADER.pack(kind, len(content)) + content)
        answers.flush()

    try:
        program = CachedProgram.of(bundle.manifest, bundle.folder, Emulated(bundle).run)
    except LobitError as error:
        answer(FAILED, str(error).encode())
        return
    answer(DONE, json.dumps({"device": "emulator of the HTP"}).encode())
    while len(header := requests.read(HEADER.size)) == HEADER.size:
        kind, size = HEADER.unpack(header)
        content = requests.read(size)
        if kind != STEP:
            answer(FAILED, f"requests of kind {kind} are not known here".encode())
            continue
        position, *tokens = struct.unpack(f">{size // 8}q", content)
        try:
            answer(DONE, program.step(tokens, position).astype(">f4").tobytes())
        except Exception as error:  # whatever ExecuTorch raises is told to the other side
            answer(FAILED, f"{type(error).__name__}: {error}".encode())


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between the frames
    serve(open_bundle(sys.argv[1], hashes=False), sys.stdin.buffer, answers)
