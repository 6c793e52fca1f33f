"""The targets by name: where the code of each is, what runs its bundles, and which packages it needs. Standard library only.

A target that is added is its modules and a line here; its extra in pyproject.toml has its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HOST = "host"
"""The device that is this machine."""


@dataclass(frozen=True)
class TargetEntry:
    """What the command line, `doctor`, `bench` and the tests know of a target without loading it."""

    what: str
    """In a few words, for help."""
    export: str
    """The module that has the names of `export.target.Target`."""
    engines: Mapping[str, str]
    """Modules with `open_engine(bundle, threads)`, by the device that they run a bundle on."""
    packages: tuple[str, ...]
    """That it is exported and run with."""


TARGETS: dict[str, TargetEntry] = {
    "xnnpack": TargetEntry(
        "ExecuTorch on the CPU", "lobit.export.xnnpack.target", {HOST: "lobit.runtime.executorch"}, ("executorch", "torchao")
    ),
    "onnx": TargetEntry("ONNX Runtime", "lobit.export.onnx.target", {HOST: "lobit.runtime.onnxruntime"}, ("onnx", "onnxruntime")),
}
