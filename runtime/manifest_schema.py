"""The JSON Schema of a manifest, from its dataclasses: `python -m lobit.runtime.manifest_schema` prints `manifest.schema.json`.

The schema says which fields there are and what each means; `manifest.py` alone checks that they agree with each other.
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
from lobit.runtime.manifest import LATER, MAJOR, SEAL, Manifest

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
    """The schema of the whole file."""
    found = _object(Manifest)
    found["properties"]["schema_version"] |= {"pattern": rf"^{MAJOR}\.[0-9]+$"}
    found["properties"][SEAL] = SEALED
    found["required"].append(SEAL)
    return {"$schema": DIALECT, "title": "manifest.json of a lobit bundle", **found}


def _object(kind: Any) -> dict[str, Any]:
    """The schema of a dataclass. It allows unknown fields: a newer minor version may have more, which a reader ignores."""
    hints, comments = get_type_hints(kind), _comments(kind)
    properties = {field.name: _of(hints[field.name]) | comments.get(field.name, {}) for field in dataclasses.fields(kind)}
    required = [name for name in properties if name not in LATER.get(kind, {})]
    return {"type": "object", "description": inspect.getdoc(kind), "properties": properties, "required": required}


def _of(kind: Any) -> dict[str, Any]:
    """The schema of an annotation, for the values that `from_json.build` takes."""
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
    """The docstrings below the fields of a dataclass, as `description` by field name."""
    (body,) = (node.body for node in ast.parse(textwrap.dedent(inspect.getsource(kind))).body if isinstance(node, ast.ClassDef))
    found = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = {"description": inspect.cleandoc(ast.literal_eval(below.value))}
    return found


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
