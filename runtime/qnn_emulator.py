"""Runs a bundle for target qnn on the emulator of the HTP: `python -m lobit.runtime.qnn_emulator BUNDLE`, in frames (`python_service.py`).

It is a process of its own, as the emulator ends the process where something is wrong, and prints what it does to the standard output.
"""

from __future__ import annotations

import sys
from typing import Any

from numpy.typing import NDArray

from lobit.quiet import quiet_python
from lobit.runtime.bundle import Bundle, open_bundle
from lobit.runtime.client import CachedProgram, Ports
from lobit.runtime.engine import ReadChunk
from lobit.runtime.python_service import serve
from lobit.runtime.qnn_libraries import load_libraries
from lobit.runtime.service import STEP


class Emulated:
    """The methods of a program, loaded when they are first run.

    Args:
        bundle: what to run.
    """

    def __init__(self, bundle: Bundle) -> None:
        with quiet_python():
            load_libraries()
            from executorch.runtime import Runtime
        self.bundle, self._methods = bundle, dict[str, Any]()
        self._program = Runtime.get().load_program(bundle.path("emulated"))

    def run(self, name: str, inputs: Ports) -> dict[str, NDArray[Any]]:
        """The outputs of a method (`client.RunMethod`)."""
        import torch

        if name not in self._methods:
            self._methods[name] = self._program.load_method(name)
        outputs = self._methods[name].execute([torch.from_numpy(array) for array in inputs.values()])
        method = next(method for method in self.bundle.manifest.methods if method.name == name)
        return {port.name: tensor.numpy().copy() for port, tensor in zip(method.outputs, outputs, strict=True)}


def opened(folder: str) -> dict[int, ReadChunk]:
    """What the emulator does with the program of a bundle, by the kind of request.

    Raises:
        LobitError: it cannot be loaded.
    """
    bundle = open_bundle(folder, hashes=False)
    return {STEP: CachedProgram.of(bundle.manifest, bundle.folder, Emulated(bundle).run).step}


if __name__ == "__main__":
    serve("emulator of the HTP", lambda: opened(sys.argv[1]))
