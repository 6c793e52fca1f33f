"""Lowers one part of a program on its own with ExecuTorch."""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary, serialize_pte_binary
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from executorch.exir.schema import OptionalTensorList, Program, TensorList
from executorch.exir.schema import Tensor as TensorValue
from torch.export import Dim, ExportedProgram, export
from torch.fx.passes.dialect.common.cse_pass import CSEPass

from lobit.export.xnnpack.parts import Parts, PerToken, Step
from lobit.export.xnnpack.stamp import Stamp, randomize, stamp_of
from lobit.quiet import quiet_python


@dataclass
class LoweredPart:
    """A part in ExecuTorch's schema: its inputs and outputs have no memory yet, and its delegates' constants have no data."""

    program: Program
    stamp: Stamp
    """Where the program has the tensors of its module."""
    delegated: list[str]
    """Names of the operators on delegates."""
    left: list[str]
    """Names of the operators outside of delegates."""

    def to_bytes(self) -> bytes:
        """The part as bytes that can be kept in a file."""
        program = bytes(serialize_pte_binary(PTEFile(self.program)))
        buffers = {str(number): name for number, name in self.stamp.buffers.items()}
        rest = {"keys": self.stamp.keys, "buffers": buffers, "delegated": self.delegated, "left": self.left}
        text = json.dumps(rest).encode()
        return len(text).to_bytes(8, "little") + text + program

    @staticmethod
    def from_bytes(data: bytes) -> LoweredPart:
        """The inverse of `to_bytes`."""
        end = 8 + int.from_bytes(data[:8], "little")
        rest = json.loads(data[8:end])
        stamp = Stamp(rest["keys"], {int(number): name for number, name in rest["buffers"].items()})
        return LoweredPart(deserialize_pte_binary(data[end:]).program, stamp, rest["delegated"], rest["left"])


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Turns garbage collection off: graphs are millions of objects, and looking through them takes a tenth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def trace_part(step: Step, parts: Parts, chunk: int) -> ExportedProgram:
    """Traces a part as a graph for 1 to `chunk` tokens."""
    length = min(4, chunk)
    dim = Dim("length", min=1, max=max(chunk, 2))
    values = [parts.values[name] for name in step.inputs]
    example = tuple(torch.zeros(value.sizes(length), dtype=value.dtype) for value in values)
    shapes = tuple(
        {
            axis: size.times * dim + size.plus if size.plus else size.times * dim if size.times > 1 else dim
            for axis, size in enumerate(value.shape)
            if isinstance(size, PerToken) and chunk > 1
        }
        for value in values
    )
    with quiet_python():
        graph = export(step.module, example, dynamic_shapes=_shapes(step, shapes), strict=False)
    _drop_assertions(graph.graph_module)
    CSEPass()(graph.graph_module)
    return graph


def _shapes(step: Step, shapes: tuple[dict[int, Any], ...]) -> Any:
    """Dynamic shapes as `export` takes them: a tuple stands for all of `*args`."""
    named = inspect.signature(step.module.forward).parameters.values()
    fixed = [name for name in named if name.kind is not inspect.Parameter.VAR_POSITIONAL]
    rest = shapes[len(fixed) :]
    return (*shapes[: len(fixed)], *([rest] if rest else []))


def _drop_assertions(module: torch.fx.GraphModule) -> None:
    """Removes the checks of positions: tracing assumes a length of two or more, and the engine checks positions anyway."""
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def lower_part(step: Step, graph: ExportedProgram, methods: dict[str, Any]) -> LoweredPart:
    """Lowers a graph to an ExecuTorch program, with all that XNNPACK takes of it on XNNPACK.

    Args:
        step: the step whose part the graph is.
        graph: what `trace_part` gave; its weights are replaced by random ones.
        methods: constant methods of the program.
    """
    randomize(graph)
    with quiet_python():
        # to_edge_transform_and_lower decomposes three times to learn what to preserve; here that is known: the products.
        preserved = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True, preserve_ops=[torch.ops.aten.linear.default])
        edge = to_edge(graph, constant_methods=methods or None, compile_config=preserved)
        _infer_one_size(edge.exported_program().graph_module)
        edge = edge.to_backend(_partitioner()) if step.delegated else edge
        taken, left = _operators(edge.exported_program().graph_module)
        executorch = edge.to_executorch(
            ExecutorchBackendConfig(
                # A view's result would lie where its argument lies: other parts could not find it.
                remove_view_copy=False,
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False),
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
            )
        )
        data = executorch._named_data
    program = executorch.executorch_program
    _drop_unused(program)
    stamp = stamp_of(graph, step.module, set(data.pte_data) if data else set(), program)
    return LoweredPart(program, stamp, taken, left)


def _drop_unused(program: Program) -> None:
    """Empties the constants that no instruction refers to: weights that a delegate has taken."""
    plan = program.execution_plan[0]
    lists = {i: value.val.items for i, value in enumerate(plan.values) if isinstance(value.val, (TensorList, OptionalTensorList))}
    calls = [call.instr_args for call in plan.chains[0].instructions]
    named = {argument for call in calls for argument in getattr(call, "args", [])}
    named |= {item for argument in named & set(lists) for item in lists[argument]}
    used = {plan.values[i].val.data_buffer_idx for i in named if isinstance(plan.values[i].val, TensorValue)}
    for number, buffer in enumerate(program.constant_buffer):
        if number not in used:
            buffer.storage = b""


def _infer_one_size(module: torch.fx.GraphModule) -> None:
    """Writes -1 where a reshape has one size that follows from the others: XNNPACK takes -1 there, but not a symbolic size."""
    for node in module.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "_op", node.target) is torch.ops.aten.view_copy.default:
            sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
            if sizes.count(-1) == 1:
                node.args = (node.args[0], sizes)
    module.graph.eliminate_dead_code()
    module.recompile()


def _partitioner() -> XnnpackPartitioner:
    """XNNPACK's partitioner, set to run only the one of its seventeen passes that finds something in these graphs.

    The others (batch norms, convolutions, upsampling, …) retrace every partition for nothing.
    """
    partitioner = XnnpackPartitioner()
    partitioner.delegation_spec = DelegationSpec(XnnpackBackend.__name__, [CompileSpec("dqlinear_partitioner", b"")])
    return partitioner


def _operators(module: torch.fx.GraphModule) -> tuple[list[str], list[str]]:
    """Names of the operators on delegates, and of those outside."""
    left: list[str] = []
    delegated: list[str] = []
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if getattr(node.target, "__name__", "") == "executorch_call_delegate":
            inner = getattr(module, node.args[0].target).original_module.graph_module
            delegated += [name for one in inner.graph.nodes if one.op == "call_function" for name in _operator_name(one)]
        else:
            left += _operator_name(node)
    return delegated, left


def _operator_name(node: torch.fx.Node) -> list[str]:
    """The operator's name in a list, which is empty for arithmetic on shapes and the like."""
    target: Any = node.target
    if target is torch.ops.higher_order.auto_functionalized_v2:
        target = node.args[0]
    name = target.name() if hasattr(target, "name") and callable(target.name) else ""
    return [name.split(".")[0]] if "::" in name else []
