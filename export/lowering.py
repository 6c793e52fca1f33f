"""One part of a program, lowered by ExecuTorch on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch.export import Dim, ExportedProgram, export
from torch.fx.passes.dialect.common.cse_pass import CSEPass

from lobit.export.parts import Parts, Step, Tokens
from lobit.quiet import quiet_python


@dataclass
class LoweredPart:
    """A part in ExecuTorch's schema: its inputs and outputs have no memory yet, its delegates' constants no data."""

    program: Any
    """`executorch.exir.schema.Program`."""
    constants: set[str]
    """The names of the delegates' constants."""
    delegated: list[str]
    """The operators on delegates."""
    left: list[str]
    """The operators outside."""


def trace_part(step: Step, parts: Parts, chunk: int) -> ExportedProgram:
    """A part as a graph for 1 to `chunk` tokens."""
    length = min(4, chunk)
    dim = Dim("length", min=1, max=chunk)
    values = [parts.values[name] for name in step.inputs]
    example = tuple(torch.zeros(value.sizes(length), dtype=value.dtype) for value in values)
    shapes = tuple(
        {
            axis: size.times * dim + size.plus if size.plus else size.times * dim if size.times > 1 else dim
            for axis, size in enumerate(value.shape)
            if isinstance(size, Tokens) and chunk > 1
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
    import inspect

    named = inspect.signature(step.module.forward).parameters.values()
    fixed = [name for name in named if name.kind is not inspect.Parameter.VAR_POSITIONAL]
    rest = shapes[len(fixed) :]
    return (*shapes[: len(fixed)], *([rest] if len(fixed) < len(named) else []))


def _drop_assertions(module: torch.fx.GraphModule) -> None:
    """Removes the checks of positions: tracing takes a length of two or more for granted, and the engine checks anyway."""
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def lower_part(graph: ExportedProgram, delegated: bool = True, methods: dict[str, Any] | None = None) -> LoweredPart:
    """A graph as an ExecuTorch program, what XNNPACK takes of it on XNNPACK.

    Args:
        graph: of `trace_part`.
        delegated: whether XNNPACK may take anything.
        methods: constant methods of the program.
    """
    with quiet_python():
        # to_edge_transform_and_lower decomposes three times to learn what to preserve; here that is known: the products.
        preserved = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True, preserve_ops=[torch.ops.aten.linear.default])
        edge = to_edge(graph, constant_methods=methods, compile_config=preserved)
        _infer_one_size(edge.exported_program().graph_module)
        edge = edge.to_backend(_partitioner()) if delegated else edge
        taken, left = _operators(edge.exported_program().graph_module)
        executorch = edge.to_executorch(
            ExecutorchBackendConfig(
                do_quant_fusion_and_const_prop=True,
                # A view's result would lie where its argument lies: other parts could not find it.
                remove_view_copy=False,
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False),
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
            )
        )
        data = executorch._named_data
    return LoweredPart(executorch.executorch_program, set(data.pte_data) if data else set(), taken, left)


def _infer_one_size(module: torch.fx.GraphModule) -> None:
    """Writes -1 where a reshape has one size that follows from the others: XNNPACK takes it so, but not as a symbol."""
    for node in module.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "_op", node.target) is torch.ops.aten.view_copy.default:
            sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
            if sizes.count(-1) == 1:
                node.args = (node.args[0], sizes)
    module.graph.eliminate_dead_code()
    module.recompile()


def _partitioner() -> XnnpackPartitioner:
    """XNNPACK's partitioner, told to run only the one of its seventeen passes that finds something in these graphs.

    The others (batch norms, convolutions, upsampling, …) retrace every partition for nothing.
    """
    partitioner = XnnpackPartitioner()
    partitioner.delegation_spec = DelegationSpec(XnnpackBackend.__name__, [CompileSpec("dqlinear_partitioner", b"")])
    return partitioner


def _operators(module: torch.fx.GraphModule) -> tuple[list[str], list[str]]:
    """The operators on delegates and outside."""
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
    """The operator's name, or nothing for arithmetic on shapes and the like."""
    target: Any = node.target
    if target is torch.ops.higher_order.auto_functionalized_v2:
        target = node.args[0]
    name = target.name() if hasattr(target, "name") and callable(target.name) else ""
    return [name.split(".")[0]] if "::" in name else []
