"""The verbs that every runtime has. Parity, benchmarks, generation and evaluation know engines and nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from lobit.errors import BundleError, InputError
from lobit.runtime.bundle import Bundle
from lobit.runtime.host import usable_cores
from lobit.targets import HOST, TARGETS

Logits = NDArray[np.float32]


class Engine(Protocol):
    """A model that remembers what it has read.

    Attributes:
        context: positions that it can hold.
        vocab_size: length of the logits.
        position: tokens read since the last reset.
    """

    context: int
    vocab_size: int
    position: int

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Reads tokens after those already read; the logits [V] after the last.

        Raises:
            InputError: no tokens, a token outside the vocabulary, or more than the context holds.
        """

    def decode(self, token: int) -> Logits:
        """Reads one token; the logits [V] after it.

        Raises:
            InputError: as `prefill`.
        """

    def score(self, tokens: Sequence[int]) -> Logits:
        """Reads tokens as `prefill` does; the logits [T, V] after each.

        Raises:
            InputError: as `prefill`.
        """

    def rewind(self, position: int) -> bool:
        """Forgets the tokens from a position on; false, and nothing is forgotten, where a layer no longer has all tokens before it.

        Raises:
            InputError: fewer tokens were read.
        """

    def reset(self) -> None:
        """Forgets all tokens."""


def check_tokens(engine: Engine, tokens: Sequence[int]) -> None:
    """Refuses tokens that an engine cannot read.

    Raises:
        InputError: none, outside the vocabulary, or past the context.
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
"""(tokens, position of the first) -> logits [n, V] after the last, or after each of them; keeps what it read in its cache."""


class SteppingEngine:
    """The verbs over one function that reads a chunk of tokens at a position.

    Args:
        step: reads 1 to `chunk` tokens. Positions begin at 0 after a reset; what lies behind a position is overwritten.
        context: positions that the cache holds.
        chunk: the most tokens in one step.
        vocab_size: length of the logits.
        slots: positions that the shortest cache of a layer holds; None: the context.
        all_logits: whether a step gives the logits after each of its tokens.
    """

    def __init__(
        self, step: ReadChunk, context: int, chunk: int, vocab_size: int, slots: int | None = None, all_logits: bool = False
    ) -> None:
        self.step, self.context, self.chunk, self.vocab_size, self.all_logits = step, context, chunk, vocab_size, all_logits
        self.slots = context if slots is None else slots
        self.position = 0

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """See `Engine.prefill`; long prompts go in chunks."""
        for rows in self._steps(tokens, self.chunk):
            logits: Logits = rows[-1]
        return logits

    def score(self, tokens: Sequence[int]) -> Logits:
        """See `Engine.score`; token by token where the program gives the logits of the last alone."""
        return np.concatenate(list(self._steps(tokens, self.chunk if self.all_logits else 1)))

    def _steps(self, tokens: Sequence[int], length: int) -> Iterator[Logits]:
        """What the steps over pieces of a length give."""
        check_tokens(self, tokens)
        for start in range(0, len(tokens), length):
            part = list(tokens[start : start + length])
            rows = self.step(part, self.position)
            self.position += len(part)
            yield rows

    def decode(self, token: int) -> Logits:
        """See `Engine.decode`."""
        return self.prefill([token])

    def rewind(self, position: int) -> bool:
        """See `Engine.rewind`: once a window is full, each token takes the place of an older one."""
        if not 0 <= position <= self.position:
            raise InputError(f"position {position} is not among the {self.position} tokens that were read")
        possible = self.position <= self.slots or position == self.position
        self.position = position if possible else self.position
        return possible

    def reset(self) -> None:
        """See `Engine.reset`."""
        self.position = 0


def target_module(bundle: Bundle) -> Any:
    """The module that runs and reads the bundles of a target.

    Raises:
        BundleError: the target is unknown to this version.
    """
    target = bundle.manifest.target
    if target not in TARGETS:
        raise BundleError(f"bundle {bundle.manifest.name} is for target {target!r}, this lobit runs {', '.join(TARGETS)}")
    return importlib.import_module(TARGETS[target].engines[HOST])


def open_engine(bundle: Bundle, threads: int | None = None) -> Engine:
    """The engine of a bundle's target.

    Args:
        bundle: what to run.
        threads: of the runtime; None: as the bundle says, or one per core.

    Raises:
        BundleError: the target is unknown to this version.
        MissingPartError: the runtime is not installed.
    """
    return cast(Engine, target_module(bundle).open_engine(bundle, threads or default_threads(bundle)))


def import_runtime(bundle: Bundle) -> None:
    """Imports the Python modules that an engine needs, so that this does not count as loading; `open_engine` refuses unknown targets.

    Raises:
        MissingPartError: the runtime is not installed.
    """
    if bundle.manifest.target in TARGETS:
        getattr(target_module(bundle), "import_runtime", lambda: None)()


def default_threads(bundle: Bundle) -> int:
    """Of the runtime: what the bundle says, or one per core."""
    return bundle.manifest.threads or usable_cores()
