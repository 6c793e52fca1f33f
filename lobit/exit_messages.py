"""What ends a command before its result, as one message and an exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from lobit.atomic_folder import FULL
from lobit.errors import LobitError

DEBUG = "LOBIT_DEBUG"
SHOW = f" ({DEBUG}=1 shows where)"
"""Of errors that may be lobit's own fault all the same."""
MISTAKE = 2
SIGNALED = 128
"""And the signal's number: 130 after Ctrl-C."""
NO_MEMORY = re.compile(
    r"alloc.* memory|out of memory|bad_alloc|without exception set|failed to map segment|can't start new thread", re.IGNORECASE
)
"""How libraries say it that do not raise MemoryError."""
ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
"""Signals that end a command as Ctrl-C does."""


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """Ends the process with one message where something outside of lobit, or the user, is in the way.

    What is an error of lobit's own goes on as it is, with its traceback. With `LOBIT_DEBUG=1` in the environment every error's traceback
    is shown before its message.
    """
    ending = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, _interrupt) for number in ending}
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
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_streams() -> None:
    """Makes stdout and stderr usable where they are closed, and where they cannot say all characters."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def explain(error: BaseException) -> tuple[str, int] | None:
    """The message and the exit code; None for an error of lobit's own."""
    if isinstance(error, KeyboardInterrupt):
        number = error.args[0] if error.args else signal.SIGINT
        return "interrupted, nothing half-written is left", SIGNALED + number
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
    raise KeyboardInterrupt(number)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what was raised first: libraries, and we, make other errors of it."""
    first: BaseException | None = error
    while first is not None:
        if isinstance(first, MemoryError) or (isinstance(first, OSError) and first.errno == errno.ENOMEM):
            return True
        if isinstance(first, (RuntimeError, ImportError, SystemError)) and NO_MEMORY.search(str(first)):
            return True
        first = first.__cause__ or first.__context__
    return False


def _memory(error: BaseException) -> str:
    traceback.clear_frames(error.__traceback__)  # gives back what the work held
    asked = re.search(r"allocate (\d+) bytes", str(error))
    told = f" for {asked[1]} bytes more" if asked else ""
    with contextlib.suppress(Exception):  # there may be too little even for this
        from lobit.memory import describe

        told += f": {describe()}"
    return f"there is not enough memory{told}; close other programs, or take a smaller model or context"


def _system(error: OSError) -> str:
    """What the operating system refuses."""
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
    with contextlib.suppress(OSError):  # where stderr is full too, the exit code is all that is left
        print(message, file=sys.stderr, flush=True)


def _leave(code: int, at_once: bool = False) -> NoReturn:
    """Ends the process.

    What stdout cannot take is dropped, or Python would complain of it once more.

    Args:
        code: of the exit.
        at_once: without what libraries do at the end, which needs memory too.
    """
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if at_once:
        os._exit(code)
    sys.exit(code)
