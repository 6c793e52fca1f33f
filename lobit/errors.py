"""Errors that a user can act on.

Every message has three parts: what went wrong, the numbers, the way out.
"""

from __future__ import annotations

import reprlib

LONGEST_SHOWN = 60
"""Characters of a user's text, or digits of a number, that a message repeats at most."""
LONGEST_REASON = 200
"""Characters of a library's error text that a message repeats at most."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = LONGEST_SHOWN
MOST_LISTED = 50
"""Problems that a message lists at most; a model without any of its tensors has thousands."""


class LobitError(Exception):
    """A mistake of the user's or a missing part: one message, exit code 2."""


class ModelError(LobitError):
    """A model folder cannot be read as a model that lobit knows."""


class RecipeError(LobitError):
    """A recipe does not fit the model or does not exist."""


class TargetError(LobitError):
    """A target cannot hold the model or the recipe."""


class BundleError(LobitError):
    """A bundle is missing, incomplete, changed or in the way."""


class InputError(LobitError):
    """A text, a number or an option is not usable."""


class MissingPartError(LobitError):
    """A package or program that this step needs is not installed."""


def shown(value: object) -> str:
    """A value of a user's file as a message shows it: never long."""
    return _SHORT.repr(value)


def shown_name(name: str) -> str:
    """A name out of a user's file as a message shows it: never long, without control characters."""
    return shown(name)[1:-1]


def reason(error: BaseException) -> str:
    """A library's error text as a message repeats it: on one line, never long."""
    return " ".join(str(error).split())[:LONGEST_REASON]


def listed(problems: list[str], heading: str) -> str:
    """One message that lists the first `MOST_LISTED` problems and says how many more there are.

    Args:
        problems: one line each.
        heading: the line above them.
    """
    lines = [f"  {problem}" for problem in problems[:MOST_LISTED]]
    left = len(problems) - len(lines)
    return "\n".join([heading, *lines, *([f"  … and {left} more"] if left else [])])
