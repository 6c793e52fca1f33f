"""ExecuTorch's program of a compiled context: each method is one call of the delegate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from executorch.exir import schema
from executorch.exir.scalar_type import ScalarType

from lobit.export.pte import Linked, program_of, write_program
from lobit.export.stages import Count
from lobit.runtime.manifest import Method, Port

BACKEND, KEY = "QnnBackend", "qnn_compile_spec"
"""Names of the delegate and of its options in ExecuTorch."""
ARENA, ALIGNMENT = 1, 64
"""Number of the memory that ExecuTorch plans, and bytes at whose multiples its tensors begin."""
SCALARS = {"float16": (ScalarType.HALF, 2), "float32": (ScalarType.FLOAT, 4), "int16": (ScalarType.SHORT, 2), "uint8": (ScalarType.BYTE, 1)}


def write_pte(methods: Sequence[Method], context: Path, options: bytes, path: Path, count: Count | None = None) -> None:
    """Writes the program of a context binary, with one method for each of its graphs.

    Args:
        methods: names and ports of the graphs.
        context: the context binary.
        options: what the delegate is opened with.
        path: the new file.
        count: as in `pte.write_program`.
    """
    program = program_of([_plan(method, options) for method in methods])
    write_program(Linked(program, {}, [context], {}), path, count)


def _plan(method: Method, options: bytes) -> schema.ExecutionPlan:
    """Inputs stay in the caller's memory; outputs have a place of their own."""
    values, end = [schema.EValue(_tensor(port, None)) for port in method.inputs], 0
    for port in method.outputs:
        where = schema.AllocationDetails(memory_id=ARENA, memory_offset_low=end & 0xFFFFFFFF, memory_offset_high=end >> 32)
        values.append(schema.EValue(_tensor(port, where)))
        end += -(-SCALARS[port.dtype][1] * math.prod(map(int, port.shape)) // ALIGNMENT) * ALIGNMENT
    everything = list(range(len(values)))
    inputs, outputs = everything[: len(method.inputs)], everything[len(method.inputs) :]
    call = schema.Instruction(instr_args=schema.DelegateCall(delegate_index=0, args=everything))
    where = schema.BackendDelegateDataReference(location=schema.DataLocation.SEGMENT, index=0)
    return schema.ExecutionPlan(
        name=method.name,
        container_meta_type=schema.ContainerMetadata(encoded_inp_str="", encoded_out_str=""),
        values=values,
        inputs=inputs,
        outputs=outputs,
        chains=[schema.Chain(inputs=[], outputs=[], instructions=[call], stacktrace=None)],
        operators=[],
        delegates=[schema.BackendDelegate(id=BACKEND, processed=where, compile_specs=[schema.CompileSpec(key=KEY, value=options)])],
        non_const_buffer_sizes=[0, end],
    )


def _tensor(port: Port, where: schema.AllocationDetails | None) -> schema.Tensor:
    return schema.Tensor(
        scalar_type=SCALARS[port.dtype][0],
        storage_offset=0,
        sizes=list(map(int, port.shape)),
        dim_order=list(range(len(port.shape))),
        requires_grad=False,
        layout=0,
        data_buffer_idx=0,
        allocation_info=where,
        shape_dynamism=schema.TensorShapeDynamism.STATIC,
    )
