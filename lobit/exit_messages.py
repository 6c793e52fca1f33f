"""Turns an error that ends a command before its result into one message and an exit code."""

from __future__ import annotations

import _thread
import contextlib
import errno
import functools
import io
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from lobit.atomic_folder import FULL
from lobit.errors import LobitError

DEBUG = "LOBIT_DEBUG"
SHOW = f" ({DEBUG}=1 shows where)"
"""The end of messages about errors that may be lobit's own fault after all."""
MISTAKE = 2
SIGNALED = 128
"""The exit code after a signal is this plus the signal's number: 130 after Ctrl-C."""
NO_MEMORY = re.compile(
    r"alloc.* memory|out of memory|bad_alloc|without exception set|failed to map segment|can't start new thread", re.IGNORECASE
)
"""How libraries that do not raise MemoryError say that memory has run out."""
INTERRUPTED = re.compile(r"KeyboardInterrupt: (\d*)")
"""What PyTorch's C++ makes of an interruption that comes while it calls Python: the text of an error of its own."""
AGAIN = 0.05
"""Seconds after which an interruption is repeated that Python has dropped."""
ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
"""Signals that end a command as Ctrl-C does."""


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """Ends the process with one message where something outside of lobit, or the user, is in the way.

    An error of lobit's own is raised unchanged, with its traceback. With `LOBIT_DEBUG=1` in the environment every error's traceback
    is shown before its message.
    """
    ending = [number for number in [signal.SIGINT, *ENDING] if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    logged = logging.root.manager.disable
    before = {number: signal.signal(number, _interrupt) for number in ending}
    unraisable = sys.unraisablehook
    sys.unraisablehook = functools.partial(_interrupt_again, unraisable)
    _open_streams()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has what it wanted
        _leave(0)
    except BaseException as error:
        explained = explain(error)
        if explained is None:
            raise
        message, code = explained
        if os.environ.get(DEBUG):
            _say("".join(traceback.format_exception(error)))
        _say("\n".join([f"lobit: {message}", *getattr(error, "__notes__", [])]))
        _leave(code, at_once=_is_out_of_memory(error))
    finally:
        sys.unraisablehook = unraisable
        logging.disable(logged)
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt_again(otherwise: Callable[[Any], object], raised: Any) -> None:
    """Repeats an interruption that came while a finalizer or a weak reference's callback ran: Python drops what is raised in those.

    Args:
        otherwise: the hook for other exceptions that Python drops.
        raised: what `sys.unraisablehook` is given.
    """
    if not issubclass(raised.exc_type, KeyboardInterrupt):
        otherwise(raised)
        return
    number = raised.exc_value.args[0] if raised.exc_value is not None and raised.exc_value.args else signal.SIGINT
    timer = threading.Timer(AGAIN, _signal_main_thread, [number])
    timer.daemon = True
    timer.start()


def _signal_main_thread(number: int) -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:  # Windows
        _thread.interrupt_main(signal.Signals(number))


def _open_streams() -> None:
    """Replaces stdout and stderr where they are closed, and lets stdout escape the characters that its encoding lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def explain(error: BaseException) -> tuple[str, int] | None:
    """The message and the exit code; None for an error of lobit's own."""
    number = _interruption(error)
    if number is not None:
        left = "" if getattr(error, "__notes__", None) else ", nothing half-written is left"
        return f"interrupted{left}", SIGNALED + number
    if _is_out_of_memory(error):
        return _memory(error), MISTAKE
    if isinstance(error, LobitError):
        return str(error), MISTAKE
    if isinstance(error, OSError):
        return _system(error), MISTAKE
    if isinstance(error, UnicodeDecodeError):
        return f"the input is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}): give text in UTF-8", MISTAKE
    if isinstance(error, RecursionError):
        return f"a file is nested too deeply to be read: fetch it again{SHOW}", MISTAKE
    return None


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    logging.disable(logging.ERROR)  # libraries log the interruption, with a traceback, as an error of their own
    raise KeyboardInterrupt(*([] if number == signal.SIGINT else [number]))


def _interruption(error: BaseException) -> int | None:
    """The signal's number where the error, or one that led to it, is an interruption; else None."""
    for one in _causes(error):
        if isinstance(one, KeyboardInterrupt):
            return one.args[0] if one.args else signal.SIGINT
        told = INTERRUPTED.search(str(one)) if isinstance(one, (TypeError, RuntimeError)) else None
        if told:
            return int(told[1] or signal.SIGINT)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields the error, then the one that led to it, and so on."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether the error, or one that led to it, is a lack of memory: libraries, and lobit, raise other errors in its place."""
    for one in _causes(error):
        if isinstance(one, MemoryError) or (isinstance(one, OSError) and one.errno == errno.ENOMEM):
            return True
        if isinstance(one, (RuntimeError, ImportError, SystemError)) and NO_MEMORY.search(str(one)):
            return True
    return False


def _memory(error: BaseException) -> str:
    traceback.clear_frames(error.__traceback__)  # frees the memory that the work used
    asked = re.search(r"allocate (\d+) bytes", str(error))
    told = f" for {asked[1]} bytes more" if asked else ""
    with contextlib.suppress(Exception):  # there may be too little even for this
        from lobit.memory import describe

        told += f": {describe()}"
    return f"there is not enough memory{told}; close other programs, or take a smaller model or context"


def _system(error: OSError) -> str:
    """The message for something that the operating system refuses."""
    place = error.filename2 or error.filename or "the output"
    why = error.strerror or str(error)
    if error.errno in FULL:
        return f"{place} cannot be written ({why}): make space, or choose another place"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place} cannot be used ({why}): change its rights, or choose another place"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{place} cannot be opened ({why}): allow more open files (ulimit -n)"
    return f"{place} cannot be used ({why}): check the place, its rights and the free space{SHOW}"


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # if stderr cannot be written to either, only the exit code tells
        print(message, file=sys.stderr, flush=True)


def _leave(code: int, at_once: bool = False) -> NoReturn:
    """Ends the process.

    Output that stdout cannot take is dropped, or Python would report it once more.

    Args:
        code: the exit code.
        at_once: skip what libraries do at exit, which needs memory too.
    """
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if at_once:
        os._exit(code)
    sys.exit(code)
