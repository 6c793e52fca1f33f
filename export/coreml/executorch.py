"""An ExecuTorch program whose methods are functions of one Core ML package, for ExecuTorch's Core ML delegate.

The form is that of ExecuTorch 1.5 (`backends/apple/coreml/compiler/coreml_preprocess.py`, `preprocess_multimethod`): the package is named
data, stored once, and each method's delegate refers to it and to its function. Keys and values are inputs and outputs: states in the
delegate are said to be written wrongly (executorch, issue 21855).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lobit.errors import MissingPartError
from lobit.export.pte import Linked, delegate_plan, program_of, write_program
from lobit.export.stages import Count
from lobit.quiet import quiet_python
from lobit.runtime.coreml_ports import PACKAGE, REFERENCE, SPEC_FILE, WEIGHTS_FILE
from lobit.runtime.manifest import Method, sha256_of

BACKEND = "CoreMLBackend"
METADATA_FILE = "metadata.json"
DEPLOYMENT_TARGET = "9"
"""iOS 18, by the number of its file format."""


@dataclass(frozen=True)
class _Flat:
    """The package in one piece (`pte.Named`)."""

    content: bytearray

    @property
    def bytes(self) -> int:
        return len(self.content)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def data(self) -> Tensor:
        return torch.frombuffer(self.content, dtype=torch.uint8)


def write_pte(methods: Sequence[Method], folder: Path, path: Path, float32: bool, count: Count) -> None:
    """Puts the package in a bundle's folder into a program, and removes it from the folder.

    Args:
        methods: names and ports of the package's functions.
        folder: the bundle's folder.
        path: the new file.
        float32: whether the package computes in float32.
        count: as in `pte.write_program`.

    Raises:
        MissingPartError: ExecuTorch has no Core ML delegate for this system.
    """
    inside = folder / "lowered_module"
    shutil.rmtree(inside, ignore_errors=True)  # of a run that was killed
    inside.mkdir()
    (folder / PACKAGE).rename(inside / PACKAGE)
    digest = "".join(sha256_of(inside / name) for name in (SPEC_FILE, WEIGHTS_FILE))
    identifier = f"executorch_{uuid.uuid5(uuid.NAMESPACE_OID, digest)}"
    ports = {method.name: _names(method) for method in methods}
    (inside / METADATA_FILE).write_text(json.dumps({"identifier": identifier, "methods": ports}), encoding="utf-8")
    key = f"coreml_{identifier}"
    told = [{"version": 1, "key": key, "functionName": method.name} for method in methods]
    specs = {
        "compute_units": b"cpu_and_ne",
        "min_deployment_target": DEPLOYMENT_TARGET.encode(),
        "model_compute_precision": b"float32" if float32 else b"float16",
        "model_type": b"model",
    }
    plans = [delegate_plan(method, BACKEND, specs, index) for index, method in enumerate(methods)]
    references = [REFERENCE + json.dumps(each).encode() for each in told]
    write_program(Linked(program_of(plans), {}, references, {key: _Flat(_flattened(inside))}), path, count)
    shutil.rmtree(inside)


def _names(method: Method) -> dict[str, list[str]]:
    return {"inputNames": [port.name for port in method.inputs], "outputNames": [port.name for port in method.outputs]}


def _flattened(folder: Path) -> bytearray:
    """A folder in one piece, as ExecuTorch's own code makes it."""
    try:
        with quiet_python():
            from executorch.backends.apple.coreml import executorchcoreml
    except ImportError as error:
        raise MissingPartError(f"ExecuTorch has no Core ML delegate here ({error}): use Linux or macOS, and a wheel from PyPI") from None
    return bytearray(executorchcoreml.flatten_directory_contents(str(folder)) or b"")
