"""ExecuTorch's program of a compiled context: each method is one call of the delegate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lobit.export.pte import Linked, delegate_plan, program_of, write_program
from lobit.export.stages import Count
from lobit.runtime.manifest import Method

BACKEND, KEY = "QnnBackend", "qnn_compile_spec"
"""Names of the delegate and of its options in ExecuTorch."""


def write_pte(methods: Sequence[Method], context: Path, options: bytes, path: Path, count: Count | None = None) -> None:
    """Writes the program of a context binary, with one method for each of its graphs.

    Args:
        methods: names and ports of the graphs.
        context: the context binary.
        options: what the delegate is opened with.
        path: the new file.
        count: as in `pte.write_program`.
    """
    program = program_of([delegate_plan(method, BACKEND, {KEY: options}, 0) for method in methods])
    write_program(Linked(program, {}, [context], {}), path, count)
