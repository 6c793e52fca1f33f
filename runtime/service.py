"""Programs that run in another process, here or on a phone: the frames in which it is asked (`android_demo/core`, Service.kt)."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Protocol

import numpy as np

from lobit.errors import BundleError, LobitError
from lobit.runtime.bundle import Bundle
from lobit.runtime.engine import Logits, SteppingEngine

DONE, FAILED, PROGRESS = 0, 1, 2
"""Kinds of answers: the last one of a request, the message why there is none, and what is known before the last one."""
STEP, BENCH, SCORE = 1, 2, 3
"""Kinds of requests: the logits after some tokens, the measurement of a benchmark, and the logits after each of some tokens."""
HEADER = struct.Struct(">bi")
"""Kind and number of bytes of a frame."""
LONGEST_ANSWER = 1 << 31
"""Bytes of an answer that are read at most."""


class Peer(Protocol):
    """What the other side of a service is, for messages."""

    def refused(self, message: str) -> LobitError:
        """The error for a request that failed there."""

    def ended(self) -> LobitError:
        """The error for a connection that ended before an answer was whole."""


class Service:
    """The service, asked over a pair of streams.

    Args:
        requests: where requests are written to.
        answers: where answers are read from.
        peer: what the other side is.

    Raises:
        LobitError: the program cannot be run; the message is the peer's.
    """

    def __init__(self, requests: IO[bytes], answers: IO[bytes], peer: Peer) -> None:
        self._requests, self._answers, self._peer = requests, answers, peer
        self.about = self._json(self._answer())
        """What the service says of itself and of what it runs on."""

    def step(self, tokens: Sequence[int], position: int) -> bytes:
        """The logits, float32 and big-endian, that the program gives for tokens that begin at a position.

        Raises:
            LobitError: the program failed, or the connection ended.
        """
        return self._ask(STEP, struct.pack(f">q{len(tokens)}q", position, *tokens))

    def score(self, tokens: Sequence[int], position: int) -> bytes:
        """Like `step`, after each token, of a program that gives that."""
        return self._ask(SCORE, struct.pack(f">q{len(tokens)}q", position, *tokens))

    def bench(self, request: Mapping[str, Any], on_progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """What a benchmark measures.

        Args:
            request: what to measure, as Service.kt's `BenchRequest` has it.
            on_progress: called with `{"row", "done", "total"}` when a row begins.

        Raises:
            LobitError: the benchmark failed, or the connection ended.
        """
        return self._json(self._ask(BENCH, json.dumps(request).encode(), lambda content: on_progress(self._json(content))))

    def _ask(self, kind: int, content: bytes, on_progress: Callable[[bytes], None] = lambda _: None) -> bytes:
        with contextlib.suppress(OSError):  # the answer tells what happened
            self._requests.write(HEADER.pack(kind, len(content)) + content)
            self._requests.flush()
        return self._answer(on_progress)

    def _answer(self, on_progress: Callable[[bytes], None] = lambda _: None) -> bytes:
        while True:
            kind, size = HEADER.unpack(self._read(HEADER.size))
            content = self._read(size) if 0 <= size <= LONGEST_ANSWER else b""
            if kind == DONE and len(content) == size:
                return content
            if kind == FAILED and len(content) == size:
                raise self._peer.refused(content.decode("utf-8", "replace"))
            if kind != PROGRESS or len(content) != size:
                raise self._peer.refused(f"an answer of kind {kind} with {size} bytes is not known here")
            on_progress(content)

    def _read(self, size: int) -> bytes:
        try:
            content = self._answers.read(size)
        except OSError:
            content = b""
        if len(content) < size:
            raise self._peer.ended()
        return content

    def _json(self, content: bytes) -> dict[str, Any]:
        try:
            values = json.loads(content)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise self._peer.refused("its answer is no JSON object")
        return values


class ServedProcess:
    """A process with a service, as the other side of it (`Peer`); a subclass says what is wrong in words of its own.

    Args:
        process: the process; its input takes the requests.
        answers: where its answers come from.
        patience: seconds that it has for its own end, once its input has ended.

    Raises:
        LobitError: the program cannot be run.
    """

    def __init__(self, process: subprocess.Popen[bytes], answers: IO[bytes], patience: float = 10) -> None:
        assert process.stdin is not None
        self.process = process
        self.close = weakref.finalize(self, _end, process, answers, patience)
        self.service = Service(process.stdin, answers, self)

    def step(self, tokens: Sequence[int], position: int) -> bytes:
        """See `Service.step`."""
        return self.service.step(tokens, position)

    def refused(self, message: str) -> LobitError:
        """See `Peer.refused`."""
        raise NotImplementedError

    def ended(self) -> LobitError:
        """See `Peer.ended`."""
        raise NotImplementedError


def _end(process: subprocess.Popen[bytes], answers: IO[bytes], patience: float) -> None:
    """Ends the process by the end of its input, or by force."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    answers.close()
    try:
        process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def logits_of(content: bytes, vocab_size: int) -> Logits:
    """The logits [n, V] in an answer.

    Raises:
        BundleError: they are not of such a vocabulary.
    """
    logits = np.frombuffer(content, ">f4").astype(np.float32)
    if not logits.size or logits.size % vocab_size:
        raise BundleError(f"{logits.size} logits came back for a vocabulary of {vocab_size}: export the bundle again")
    return logits.reshape(-1, vocab_size)


def service_engine(bundle: Bundle, step: Callable[[list[int], int], bytes]) -> SteppingEngine:
    """The engine of a bundle whose program a service runs.

    Args:
        bundle: the bundle that the service runs.
        step: `Service.step`, or a method that calls it; what it belongs to lives as long as the engine.
    """
    manifest = bundle.manifest

    def read(tokens: list[int], position: int) -> Logits:
        return logits_of(step(tokens, position), manifest.model.vocab_size)

    slots = min(manifest.cache.slots)
    return SteppingEngine(read, manifest.context, manifest.chunk, manifest.model.vocab_size, slots, manifest.all_logits)
