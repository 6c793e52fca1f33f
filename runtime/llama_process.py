"""Runs a bundle for target gguf with llama.cpp: `python -m lobit.runtime.llama_process BUNDLE THREADS`, in frames (`service.py`).

It is a process of its own, as llama.cpp ends the process where an assumption of its does not hold, such as in a file that was changed.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from typing import IO

import numpy as np

from lobit.errors import LobitError
from lobit.runtime.bundle import Bundle, open_bundle
from lobit.runtime.llama_library import Context, LlamaError, Model
from lobit.runtime.service import DONE, FAILED, HEADER, SCORE, STEP


def serve(bundle: Bundle, threads: int, requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answers requests until their stream ends."""

    def answer(kind: int, content: bytes) -> None:
        answers.write(HEADER.pack(kind, len(content)) + content)
        answers.flush()

    manifest = bundle.manifest
    try:
        model = Model(bundle.path("program"))
        if model.vocab_size != manifest.model.vocab_size:
            raise LlamaError(f"it has {model.vocab_size} tokens, and the manifest {manifest.model.vocab_size}")
        context = Context(model, manifest.context, manifest.chunk, threads)
    except (LlamaError, LobitError) as error:
        answer(FAILED, str(error).encode())
        return
    answer(DONE, json.dumps({"device": "llama.cpp"}).encode())
    while len(header := requests.read(HEADER.size)) == HEADER.size:
        kind, size = HEADER.unpack(header)
        content = requests.read(size)
        if kind not in (STEP, SCORE):
            answer(FAILED, f"requests of kind {kind} are not known here".encode())
            continue
        position, *tokens = struct.unpack(f">{size // 8}q", content)
        try:
            rows = context.read(tokens, position, every=kind == SCORE)
            answer(DONE, b"".join(np.ctypeslib.as_array(row, (model.vocab_size,)).astype(">f4").tobytes() for row in rows))
        except LlamaError as error:
            answer(FAILED, str(error).encode())


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the library prints must not come between the frames
    serve(open_bundle(sys.argv[1], hashes=False), int(sys.argv[2]), sys.stdin.buffer, answers)
