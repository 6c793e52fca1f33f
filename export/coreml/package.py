"""Writes a Core ML package: the program with its description, and the file of weights."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lobit.export.coreml.mil import FEATURES, MIL, MODEL, SPECIFICATION, Blobs, Function, Value
from lobit.export.stages import Count
from lobit.runtime.coreml_ports import MANIFEST_FILE, SPEC_FILE, WEIGHTS_FILE

ARRAY_TYPES = {
    "fp16": FEATURES.ArrayFeatureType.FLOAT16,
    "fp32": FEATURES.ArrayFeatureType.FLOAT32,
    "int32": FEATURES.ArrayFeatureType.INT32,
}
AUTHOR = "com.apple.CoreML"
"""Who the items of a package are said to be from, and the folder where they lie."""
ITEMS = {"model.mlmodel": "CoreML Model Specification", "weights": "CoreML Model Weights"}


def write_package(functions: Mapping[str, Function], default: str, blobs: Blobs, folder: Path, count: Count) -> None:
    """Writes the package into a bundle's folder.

    Args:
        functions: the program's functions.
        default: the one that runs where none is named.
        blobs: the arrays of all functions.
        folder: the bundle's folder.
        count: told of the bytes of weights that are written.
    """
    (folder / WEIGHTS_FILE).parent.mkdir(parents=True, exist_ok=True)  # of a run that was killed
    blobs.write(folder / WEIGHTS_FILE, count)
    (folder / SPEC_FILE).write_bytes(model(functions, default).SerializeToString(deterministic=True))
    (folder / MANIFEST_FILE).write_text(json.dumps(_items(), indent=4) + "\n", encoding="utf-8")


def model(functions: Mapping[str, Function], default: str) -> Any:
    """The model's message: what its functions take and give, and the program."""
    found = MODEL.Model(specificationVersion=SPECIFICATION)
    found.description.defaultFunctionName = default
    for name, function in functions.items():
        told = found.description.functions.add(name=name)
        _describe(told.input, function.inputs)
        _describe(told.output, function.outputs)
        for state in function.states:
            told.state.add(name=state.name).type.stateType.arrayType.CopyFrom(_array(state))
    program = MIL.Program(version=1)
    for name, function in functions.items():
        program.functions[name].CopyFrom(function.message())
    found.mlProgram.CopyFrom(program)
    return found


def _describe(features: Any, values: Sequence[Value]) -> None:
    for value in values:
        features.add(name=value.name).type.multiArrayType.CopyFrom(_array(value))


def _array(value: Value) -> Any:
    return FEATURES.ArrayFeatureType(shape=value.shape, dataType=ARRAY_TYPES[value.dtype])


def _items() -> dict[str, Any]:
    """The list of a package's items. Their identifiers may be any; here they are the same in every package."""
    names = {name: str(uuid.uuid5(uuid.NAMESPACE_URL, f"{AUTHOR}/{name}")) for name in ITEMS}
    entries = {
        names[name]: {"author": AUTHOR, "description": description, "name": name, "path": f"{AUTHOR}/{name}"}
        for name, description in ITEMS.items()
    }
    return {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": names["model.mlmodel"]}
