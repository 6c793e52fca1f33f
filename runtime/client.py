"""What a client computes for programs whose methods have fixed shapes: embeddings, rotary tables, masks, and where rows of caches go.

It reads the manifest alone (`manifest.ClientInputs`), and knows nothing of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from lobit.errors import BundleError
from lobit.runtime.manifest import ClientInputs, Lookup, Manifest, Mask, Method, Rotary, State

Ports = dict[str, NDArray[Any]]
RunMethod = Callable[[str, Ports], Mapping[str, NDArray[Any]]]
"""Runs a method, by name, on its inputs; returns its outputs."""


class Table:
    """A table of embeddings, of which rows are read.

    Args:
        path: the file.
        told: how it is stored.

    Raises:
        BundleError: the file is damaged, or has another form than told.
    """

    def __init__(self, path: Path, told: Lookup) -> None:
        self.path, self.told = path, told
        try:
            self._file = cast(Any, safe_open)(path, framework="numpy")
            self._weight: Any = self._file.get_slice("weight")
            self._scale: Any = self._file.get_slice("scale") if told.bits < 16 else None
            self.width = self._weight.get_shape()[1] * (2 if told.bits == 4 else 1)
        except Exception as error:  # safetensors raises an exception of its own
            raise BundleError(f"{path} cannot be read ({error}): export the bundle again") from None

    def stored(self, rows: slice) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """Integers int8 [n, hidden_size] and their scales [n, groups], or floats and None."""
        weight = self._weight[rows]
        if self._scale is None:
            return weight, None
        if self.told.bits == 4:
            weight = np.stack([weight & 15, weight >> 4], axis=2).reshape(len(weight), -1).astype(np.int8) - np.int8(8)
        return weight, self._scale[rows]

    def row(self, token: int) -> NDArray[np.float32]:
        """The embedding of a token, scaled."""
        weight, scale = self.stored(slice(token, token + 1))
        values = weight.astype(np.float32)
        if scale is not None:
            values = (values.reshape(scale.shape[1], -1) * scale.T).reshape(1, -1)
        factor = np.float32(self.told.factor)
        return values[0] if factor == 1 else values[0] * factor  # type: ignore[no-any-return]


class CachedProgram:
    """A program with methods `prefill` and `decode`, whose caches the client keeps.

    Args:
        methods: the methods with their ports.
        states: the caches.
        client: the other inputs.
        row: gives the embedding of a token, scaled.
        run: runs a method.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        states: Sequence[State],
        client: ClientInputs,
        row: Callable[[int], NDArray[np.float32]],
        run: RunMethod,
    ) -> None:
        self.methods, self.states, self.client, self.row, self.run = methods, states, client, row, run
        self.caches = {state.input: np.zeros(state.shape, state.dtype) for state in states}

    @staticmethod
    def of(manifest: Manifest, folder: Path, run: RunMethod) -> CachedProgram:
        """The program of a bundle, from its manifest and its folder.

        Raises:
            BundleError: the bundle does not say what its client computes, or its table is damaged.
        """
        if manifest.client is None:
            raise BundleError(f"bundle {manifest.name} says nothing about its client's inputs: export it again")
        table = Table(folder / manifest.client.embedding.file, manifest.client.embedding)
        return CachedProgram(manifest.methods, manifest.states, manifest.client, table.row, run)

    def step(self, tokens: list[int], position: int) -> NDArray[np.float32]:
        """Reads tokens that begin at a position, over what was read there before; returns the logits [n, V] that the method gives."""
        role = "decode" if len(tokens) == 1 else "prefill"
        method = next(method for method in self.methods if method.role == role)
        outputs = self.run(method.name, self.inputs(method, tokens, position))
        for state in self.states:
            keep(self.caches, state, outputs[state.output], position, len(tokens))
        name = next(port.name for port in method.outputs if port.role == "logits")
        return outputs[name][0, : len(tokens)].astype(np.float32)

    def inputs(self, method: Method, tokens: list[int], position: int) -> Ports:
        """All inputs of a method for one call."""
        shapes = {port.name: tuple(int(size) for size in port.shape) for port in method.inputs}
        dtypes = {port.name: port.dtype for port in method.inputs}
        client, found = self.client, dict[str, NDArray[Any]](self.caches)
        room = shapes[client.embedding.port][1]
        positions = position + np.arange(room)
        rows = np.zeros(shapes[client.embedding.port], np.float32)
        for index, token in enumerate(tokens):
            rows[0, index] = self.row(token)
        found[client.embedding.port] = rows
        for rotary in client.rotary:
            found |= tables(rotary, positions)
        for mask in client.masks:
            found[mask.port] = hidden(mask, shapes[mask.port][3] - room, position, room)
        if client.last is not None and client.last in shapes:
            found[client.last] = (np.arange(room) == len(tokens) - 1).reshape(shapes[client.last])
        return {port.name: np.ascontiguousarray(found[port.name], dtypes[port.name]) for port in method.inputs}


def keep(caches: Ports, state: State, rows: NDArray[Any], position: int, count: int) -> None:
    """Writes the rows of a call's tokens into the cache; of those that fall into one slot the last one stays.

    Args:
        caches: the caches by the names of their inputs.
        state: which of them.
        rows: the call's rows, with those of tokens that are none.
        position: that of the call's first token.
        count: number of the call's tokens.
    """
    assert state.axis is not None
    slots = state.shape[state.axis]
    first = max(0, count - slots)
    cache, rows = np.moveaxis(caches[state.input], state.axis, 0), np.moveaxis(rows, state.axis, 0)
    cache[(position + np.arange(first, count)) % slots] = rows[first:count]


def tables(rotary: Rotary, positions: NDArray[Any]) -> Ports:
    """Cosines and sines [1, T, 1, pairs] of positions [T]."""
    angles = (positions.astype(np.float32)[:, None] * np.array(rotary.frequencies, np.float32))[None, :, None]
    factor = np.float32(rotary.factor)
    return {rotary.cos: np.cos(angles) * factor, rotary.sin: np.sin(angles) * factor}


def hidden(mask: Mask, slots: int, position: int, tokens: int) -> NDArray[np.float32]:
    """The mask [1, 1, T, slots + T] of tokens that begin at a position.

    Slot j holds the latest position before the call that is j modulo the number of slots, and nothing where there is none.
    """
    queries = position + np.arange(tokens)[:, None]
    ages = (position - 1 - np.arange(slots)) % slots
    keys = np.concatenate([position - 1 - ages, position + np.arange(tokens)])
    distance = queries - keys
    seen = (keys >= 0) & (distance >= 0)
    if mask.window is not None:
        seen &= distance < mask.window
    return np.where(seen, np.float32(0), np.float32(mask.hidden))[None, None]
