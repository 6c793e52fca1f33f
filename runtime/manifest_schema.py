"""The JSON Schema of a manifest, from its dataclasses: `python -m lobit.runtime.manifest_schema` prints `manifest.schema.json`.

It says what fields there are and what each means; what must agree with each other is in `manifest.py` alone.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from lobit.from_json import LARGEST_NUMBER
from lobit.runtime.manifest import MAJOR, SEAL, Manifest

DIALECT = "https://json-schema.org/draft/2020-12/schema"
PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer", "minimum": 0, "maximum": LARGEST_NUMBER},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    NoneType: {"type": "null"},
    Any: {},
}
SEALED = {
    "type": "string",
    "pattern": "^[0-9a-f]{64}$",
    "description": (
        "The last entry of the file, indented by two spaces, and behind it a line with the closing brace: sha256 of all bytes of the file "
        "that stand before these 64 characters."
    ),
}


def schema() -> dict[str, Any]:
    """Of the whole file."""
    found = _object(Manifest)
    found["properties"]["schema_version"] |= {"pattern": rf"^{MAJOR}\.[0-9]+$"}
    found["properties"][SEAL] = SEALED
    found["required"].append(SEAL)
    return {"$schema": DIALECT, "title": "manifest.json of a lobit bundle", **found}


def _object(kind: Any) -> dict[str, Any]:
    """Of a dataclass. A newer minor version may have more fields, which a reader leaves out."""
    hints, comments = get_type_hints(kind), _comments(kind)
    properties = {field.name: _of(hints[field.name]) | comments.get(field.name, {}) for field in dataclasses.fields(kind)}
    return {"type": "object", "description": inspect.getdoc(kind), "properties": properties, "required": list(properties)}


def _of(kind: Any) -> dict[str, Any]:
    """Of an annotation, as `from_json.build` reads it."""
    if dataclasses.is_dataclass(kind):
        return _object(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is list:
        return {"type": "array", "items": _of(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(arguments[1])}
    if origin is UnionType:
        return {"anyOf": [_of(part) for part in arguments]}
    return dict(PLAIN[kind])


def _comments(kind: Any) -> dict[str, dict[str, str]]:
    """The docstring that stands below each field of a dataclass."""
    (body,) = (node.body for node in ast.parse(textwrap.dedent(inspect.getsource(kind))).body if isinstance(node, ast.ClassDef))
    found = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = {"description": inspect.cleandoc(ast.literal_eval(below.value))}
    return found


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
