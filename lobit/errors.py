"""Errors that a user can act on.

Every message has three parts: what went wrong, the numbers, the way out.
"""

from __future__ import annotations


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


def listed(problems: list[str], heading: str) -> str:
    """One message that names every problem.

    Args:
        problems: one line each.
        heading: the sentence above them.
    """
    return "\n".join([heading, *(f"  {problem}" for problem in problems)])
