"""Runs programs on the emulator of the HTP and keeps what they give: `python -m lobit.export.qnn.probe PROGRAM INPUTS OUTPUTS`.

Inputs and outputs are safetensors files; an output is named by its number. It is a process of its own, as the emulator may end it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from lobit.runtime.qnn_libraries import load_libraries

PROBE = "probe"
"""Name of the method."""


def run(program: Path, inputs: Path, outputs: Path) -> None:
    """Runs method `PROBE` of a program once."""
    given = load_file(inputs)
    load_libraries()
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(program).load_method(PROBE)
    found = method.execute([given[name] for name in sorted(given)])
    save_file({f"{index:04}": tensor.contiguous() for index, tensor in enumerate(found)}, outputs)


if __name__ == "__main__":
    run(*map(Path, sys.argv[1:4]))
