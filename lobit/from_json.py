"""JSON values as dataclasses: a file must have what the annotations of the fields say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lobit.errors import shown, shown_name

LARGEST_NUMBER = (1 << 63) - 1
_hints = cache(get_type_hints)


def build(kind: Any, value: Any, where: str, more: bool = False) -> Any:
    """`value` as an instance of the annotation `kind`, with no field missing or left over.

    Args:
        kind: a dataclass, or what its fields are annotated with: list, tuple of any length, dict, Literal, a union of plain types or of
            a dataclass and None, a plain type, Any. Whole numbers lie in 0 to `LARGEST_NUMBER`, and are taken where a float is needed;
            floats are finite.
        value: as `json.loads` gives it.
        where: its place in the file, for messages.
        more: whether unknown fields are left out instead of refused.

    Raises:
        ValueError: the value does not fit; the message names the first difference.
    """
    if dataclasses.is_dataclass(kind):
        return _instance(kind, value, where, more)
    origin, arguments = get_origin(kind), get_args(kind)
    if value is not None and NoneType in arguments and dataclasses.is_dataclass(arguments[0]):
        return build(arguments[0], value, where, more)
    if origin in (list, tuple) and isinstance(value, list):
        return origin(build(arguments[0], item, f"{where}[{i}]", more) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: build(arguments[1], item, f"{where}: {shown_name(key)}", more) for key, item in value.items()}
    if kind is Any or _is_plain(kind, value):
        return value
    raise ValueError(f"{where} is {shown(value)}: {_name(kind)} is needed")


def _instance(kind: Any, value: Any, where: str, more: bool) -> Any:
    hints = _hints(kind)
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {shown(value)}: an object is needed")
    missing, unknown = sorted(set(hints) - set(value)), sorted(set(value) - set(hints))
    if missing or (unknown and not more):
        left = ", ".join(shown(name) for name in unknown[:9])
        raise ValueError(f"{where} lacks {', '.join(missing) or 'nothing'} and has {left or 'nothing'} that is unknown")
    return kind(**{name: build(hint, value[name], f"{where}: {name}", more) for name, hint in hints.items()})


def _is_plain(kind: Any, value: Any) -> bool:
    """Whether a value is of a plain type, one of a union, or of a Literal; True does not count as a number."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return any(_is_plain(part, value) for part in get_args(kind))
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(kind))
    if kind is None or kind is NoneType:
        return value is None
    if kind is float and type(value) in (int, float):
        return bool(abs(value) <= LARGEST_NUMBER)  # neither infinite nor NaN, then
    return type(value) is kind and (kind is not int or 0 <= value <= LARGEST_NUMBER)


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
