"""Runs a bundle for target gguf with llama.cpp: `python -m lobit.runtime.llama_process BUNDLE THREADS`, in frames (`python_service.py`).

It is a process of its own, as llama.cpp ends the process where an assumption of its does not hold, such as in a file that was changed.
"""

from __future__ import annotations

import sys
from functools import partial

import numpy as np

from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import Logits, ReadChunk
from lobit.runtime.llama_library import Context, LlamaError, Model
from lobit.runtime.python_service import serve
from lobit.runtime.service import SCORE, STEP


def opened(folder: str, threads: int) -> dict[int, ReadChunk]:
    """What llama.cpp does with the file of a bundle, by the kind of request.

    Raises:
        LlamaError: it refuses the file.
    """
    bundle = open_bundle(folder, hashes=False)
    manifest, model = bundle.manifest, Model(bundle.path("program"))
    if model.vocab_size != manifest.model.vocab_size:
        raise LlamaError(f"it has {model.vocab_size} tokens, and the manifest {manifest.model.vocab_size}")
    context = Context(model, manifest.context, manifest.chunk, threads)

    def read(tokens: list[int], position: int, every: bool) -> Logits:
        rows = context.read(tokens, position, every)
        return np.stack([np.ctypeslib.as_array(row, (model.vocab_size,)) for row in rows])

    return {STEP: partial(read, every=False), SCORE: partial(read, every=True)}


if __name__ == "__main__":
    serve("llama.cpp", lambda: opened(sys.argv[1], int(sys.argv[2])))
