"""What cannot be true of any bundle: entries of a manifest that contradict each other, and paths that lead out of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from lobit.errors import BundleError, shown

if TYPE_CHECKING:
    from lobit.runtime.manifest import Manifest, State

LONGEST_PATH = 80
"""Characters that the path of a file may have; no target gives its files longer ones."""
MOST_THREADS = 1024
"""Threads that a manifest may name for a runtime; no processor has more."""
DTYPES = ("float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
"""Element types that a state may have."""
TABLE_BITS = (4, 8, 16, 32)
"""Bits that an entry of a table of embeddings may have."""


def problems(manifest: Manifest) -> Iterator[str]:
    """Messages about what cannot be true of any bundle."""
    model, context, slots = manifest.model, manifest.context, manifest.cache.slots
    sizes = {"layers": model.layers, "hidden_size": model.hidden_size, "vocab_size": model.vocab_size, "chunk": manifest.chunk}
    yield from (f"{name} is {size}" for name, size in sizes.items() if size < 1)
    if manifest.chunk > context or context > model.max_context:
        yield f"chunk {manifest.chunk}, context {context} and the model's own context {model.max_context} are not in this order"
    if len(slots) != model.layers or not all(1 <= size <= context for size in slots):
        yield f"{len(slots)} layers have a cache of {shown(slots)} positions: {model.layers} layers and a context of {context} are told"
    yield from _state_problems(manifest)
    yield from _client_problems(manifest)
    if manifest.threads > MOST_THREADS:
        yield f"threads is {manifest.threads}, over {MOST_THREADS}"
    tokens = [*manifest.tokens.stop, *([] if manifest.tokens.bos is None else [manifest.tokens.bos])]
    yield from (f"token {token} is outside the vocabulary of {model.vocab_size}" for token in tokens if token >= model.vocab_size)
    times = Counter(entry.path for entry in manifest.files)
    yield from (f"{name} is listed {count} times" for name, count in times.items() if count > 1)
    yield from (f"{name} has the sha256 {shown(text)}" for name, text in _hashes(manifest) if not re.fullmatch("[0-9a-f]{64}", text))


def _state_problems(manifest: Manifest) -> Iterator[str]:
    """Messages about states and methods that contradict each other."""
    roles = Counter(method.role for method in manifest.methods)
    yield from (f"{count} methods are for {shown(role)}" for role, count in roles.items() if count > 1)
    told = {side: {port.name for method in manifest.methods for port in getattr(method, side)} for side in ("inputs", "outputs")}
    for state in manifest.states:
        yield from (f"state {shown(name)} is no port" for name, side in _ends(state) if name not in told[side])
        if state.dtype not in DTYPES:
            yield f"state {shown(state.input)} has the type {shown(state.dtype)}, none of {', '.join(DTYPES)}"
        if not state.shape or not all(size >= 1 for size in state.shape):
            yield f"state {shown(state.input)} has the shape {shown(state.shape)}"
        if state.axis is not None and not (state.axis < len(state.shape) and state.shape[state.axis] <= manifest.context):
            yield f"state {shown(state.input)} has its positions on axis {state.axis} of {shown(state.shape)}, context {manifest.context}"


def _client_problems(manifest: Manifest) -> Iterator[str]:
    """Messages about inputs of the client that contradict the rest."""
    client = manifest.client
    if client is None:
        return
    inputs = {port.name for method in manifest.methods for port in method.inputs}
    named = [client.embedding.port, *(name for rotary in client.rotary for name in (rotary.cos, rotary.sin))]
    named += [*(mask.port for mask in client.masks), *([] if client.last is None else [client.last])]
    yield from (f"the client's input {shown(name)} is no port" for name in named if name not in inputs)
    if client.embedding.file not in {entry.path for entry in manifest.files}:
        yield f"the embedding's file {shown(client.embedding.file)} is none of the files"
    if client.embedding.bits not in TABLE_BITS:
        yield f"the embedding has {client.embedding.bits} bits"


def _ends(state: State) -> list[tuple[str, str]]:
    return [(state.input, "inputs"), (state.output, "outputs")]


def _hashes(manifest: Manifest) -> list[tuple[str, str]]:
    return [("the checkpoint", manifest.checkpoint_sha256), *((entry.path, entry.sha256) for entry in manifest.files)]


def check_path(path: str) -> None:
    """Refuses a path that leaves the bundle.

    Raises:
        BundleError: the path is empty, absolute or too long, or has `..`, a backslash, a drive or characters that cannot be printed.
    """
    parts = PurePosixPath(path).parts
    if not path.isprintable() or len(path) > LONGEST_PATH:
        raise BundleError(f"manifest.json names {shown(path)}, which is no usable name of a file: do not use this bundle")
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path:
        raise BundleError(f"manifest.json names {shown(path)}, which leaves the bundle: do not use this bundle")
