"""The methods that every runtime has. Parity, benchmarks, generation and evaluation use a runtime through these alone."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from lobit.errors import BundleError, InputError
from lobit.runtime.bundle import Bundle
from lobit.runtime.host import usable_cores
from lobit.targets import TARGETS, THIS_MACHINE, Device

Logits = NDArray[np.float32]


class Engine(Protocol):
    """A model that remembers what it has read.

    Attributes:
        context: number of positions that it can hold.
        vocab_size: length of the logits.
        position: number of tokens read since the last reset.
        served_by: id of the process that runs the program; None: this one does.
    """

    context: int
    vocab_size: int
    position: int
    served_by: int | None

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Reads tokens after those already read; returns the logits [V] after the last one.

        Raises:
            InputError: there are no tokens, one is outside the vocabulary, or they do not fit into the context.
        """

    def decode(self, token: int) -> Logits:
        """Reads one token; returns the logits [V] after it.

        Raises:
            InputError: as `prefill`.
        """

    def score(self, tokens: Sequence[int], count: int | None = None) -> Logits:
        """Reads tokens as `prefill` does; returns the logits [count, V] after each of the last ones.

        Args:
            tokens: what to read.
            count: number of tokens at the end, 1 or more, after which the logits are wanted; None: all.

        Raises:
            InputError: as `prefill`.
        """

    def rewind(self, position: int) -> bool:
        """Forgets the tokens from a position on. Where a layer no longer has all tokens before it, nothing is forgotten: returns false.

        Raises:
            InputError: fewer tokens than that were read.
        """

    def reset(self) -> None:
        """Forgets all tokens."""


def check_tokens(engine: Engine, tokens: Sequence[int]) -> None:
    """Refuses tokens that an engine cannot read.

    Raises:
        InputError: there are no tokens, one is outside the vocabulary, or they do not fit into the context.
    """
    if not tokens:
        raise InputError("there are no tokens to read: give a prompt with at least one")
    outside = [token for token in tokens if not 0 <= token < engine.vocab_size]
    if outside:
        raise InputError(f"token {outside[0]} is outside the vocabulary of {engine.vocab_size}: is it the model's own tokenizer?")
    if engine.position + len(tokens) > engine.context:
        raise InputError(
            f"{engine.position} tokens read and {len(tokens)} to read are more than the context of {engine.context}: "
            "shorten the text, or export with a larger --context"
        )


ReadChunk = Callable[[list[int], int], Logits]
"""Called with tokens and the position of the first; gives the logits [n, V] after the last or after each, and caches what it read."""


class SteppingEngine:
    """An engine made of one function that reads a chunk of tokens at a position.

    Args:
        step: reads 1 to `chunk` tokens. Positions begin at 0 after a reset; cache entries from the given position on are overwritten.
        context: number of positions that the cache holds.
        chunk: the most tokens in one step.
        vocab_size: length of the logits.
        slots: number of positions that the shortest cache of a layer holds; None: as many as the context.
        all_logits: whether a step gives the logits after each of its tokens.
        step_of_all: a step that does so where `step` does not.
    """

    def __init__(
        self,
        step: ReadChunk,
        context: int,
        chunk: int,
        vocab_size: int,
        slots: int | None = None,
        all_logits: bool = False,
        step_of_all: ReadChunk | None = None,
    ) -> None:
        self.step, self.context, self.chunk, self.vocab_size, self.all_logits = step, context, chunk, vocab_size, all_logits
        self.step_of_all = step_of_all
        self.slots = context if slots is None else slots
        self.position = 0
        self.served_by: int | None = None

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """See `Engine.prefill`; long prompts are read in chunks."""
        check_tokens(self, tokens)
        for start in range(0, len(tokens), self.chunk):
            rows = self._advance(tokens[start : start + self.chunk], self.step)
        logits: Logits = rows[-1]
        return logits

    def score(self, tokens: Sequence[int], count: int | None = None) -> Logits:
        """See `Engine.score`; the last tokens are read one by one where no step gives the logits of all of a chunk's tokens."""
        check_tokens(self, tokens)
        count = len(tokens) if count is None else count
        first = len(tokens) - count
        step_of_all = self.step if self.all_logits else self.step_of_all
        in_chunks = len(tokens) if step_of_all else first + 1
        starts = [*range(0, in_chunks, self.chunk), *range(in_chunks, len(tokens)), len(tokens)]
        found: list[Logits] = []
        for start, end in itertools.pairwise(starts):
            wanted = end > first
            rows = self._advance(tokens[start:end], step_of_all if wanted and step_of_all else self.step)
            found += [rows] if wanted else []
        return np.concatenate(found)[-count:]

    def _advance(self, tokens: Sequence[int], step: ReadChunk) -> Logits:
        """Reads a chunk; its logits."""
        rows = step(list(tokens), self.position)
        self.position += len(tokens)
        return rows

    def decode(self, token: int) -> Logits:
        """See `Engine.decode`."""
        return self.prefill([token])

    def rewind(self, position: int) -> bool:
        """See `Engine.rewind`. Once the shortest cache is full, each new token overwrites an older one, which cannot be brought back."""
        if not 0 <= position <= self.position:
            raise InputError(f"position {position} is not among the {self.position} tokens that were read")
        possible = self.position <= self.slots or position == self.position
        self.position = position if possible else self.position
        return possible

    def reset(self) -> None:
        """See `Engine.reset`."""
        self.position = 0


def target_module(bundle: Bundle, device: Device = THIS_MACHINE) -> Any:
    """The module that runs the bundles of a bundle's target on a device; that of this machine also reads their programs.

    Raises:
        BundleError: the target is unknown to this version.
        InputError: its bundles do not run on such a device.
    """
    target = bundle.manifest.target
    if target not in TARGETS:
        raise BundleError(f"bundle {bundle.manifest.name} is for target {target!r}, this lobit runs {', '.join(TARGETS)}")
    engines = TARGETS[target].engines
    if device.kind not in engines:
        raise InputError(f"bundles for target {target} do not run on device {device}: choose one of {', '.join(engines)}")
    return importlib.import_module(engines[device.kind])


def open_engine(bundle: Bundle, threads: int | None = None, device: Device = THIS_MACHINE) -> Engine:
    """The engine of a bundle's target.

    Args:
        bundle: what to run.
        threads: number of the runtime's threads; None: what the bundle says, or one per core.
        device: where to run it.

    Raises:
        BundleError: the target is unknown to this version.
        InputError: its bundles do not run on such a device.
        MissingPartError: the runtime is not installed.
    """
    return cast(Engine, target_module(bundle, device).open_engine(bundle, threads or default_threads(bundle), device))


def import_runtime(bundle: Bundle, device: Device = THIS_MACHINE) -> None:
    """Imports the Python modules of a bundle's engine, so that this does not count as loading. Unknown targets are left to `open_engine`.

    Raises:
        MissingPartError: the runtime is not installed.
    """
    if bundle.manifest.target in TARGETS:
        getattr(target_module(bundle, device), "import_runtime", lambda: None)()


def default_threads(bundle: Bundle) -> int:
    """Number of the runtime's threads: what the bundle says, or one per core."""
    return bundle.manifest.threads or usable_cores()
