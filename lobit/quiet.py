"""Silences what libraries print about themselves while they work."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator


class _Silence:
    """Discards what is written to the process's standard error stream as long as at least one thread asks for it."""

    def __init__(self) -> None:
        self.lock, self.wanted, self.kept = threading.Lock(), 0, -1

    def begin(self) -> None:
        """Redirects the stream to the null device, unless another thread has done so."""
        with self.lock:
            self.wanted += 1
            if self.wanted == 1:
                sys.stderr.flush()
                self.kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 2)
                os.close(null)

    def end(self) -> None:
        """Restores the stream, unless another thread still wants it silent."""
        with self.lock:
            self.wanted -= 1
            if self.wanted == 0:
                os.dup2(self.kept, 2)
                os.close(self.kept)


_SILENCE = _Silence()


@contextlib.contextmanager
def quiet_native() -> Iterator[None]:
    """Drops what native code writes to the standard error stream.

    Use it only for code that is known to print about itself and cannot abort, such as ExecuTorch's thread pool when it is made anew: the
    message of an abort would be lost.
    """
    _SILENCE.begin()
    try:
        yield
    finally:
        _SILENCE.end()


@contextlib.contextmanager
def quiet_python() -> Iterator[None]:
    """Drops warnings and log lines below errors: torch.export and torchao print them about their own internals."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
