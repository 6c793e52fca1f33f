"""The targets by name: where the code of each is, what runs its bundles, and which packages it needs.

A new target needs its modules and an entry here; its extra in pyproject.toml has its name. This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HOST = "host"
"""Name of this machine, as a device that runs bundles."""


@dataclass(frozen=True)
class TargetEntry:
    """What the command line, `doctor`, `bench` and the tests know of a target without loading it."""

    what: str
    """What the target is, in a few words for the help texts."""
    export: str
    """The module that implements `export.target.Target`."""
    engines: Mapping[str, str]
    """Modules with `open_engine(bundle, threads)`, by the device that they run a bundle on."""
    packages: tuple[str, ...]
    """The packages that exporting to it and running its bundles need."""


TARGETS: dict[str, TargetEntry] = {
    "xnnpack": TargetEntry(
        "ExecuTorch on the CPU", "lobit.export.xnnpack.target", {HOST: "lobit.runtime.executorch"}, ("executorch", "torchao")
    ),
    "onnx": TargetEntry("ONNX Runtime", "lobit.export.onnx.target", {HOST: "lobit.runtime.onnxruntime"}, ("onnx", "onnxruntime")),
}
