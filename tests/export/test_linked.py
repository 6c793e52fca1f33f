"""A linked program beside ExecuTorch's own way: the whole model as one graph, lowered and written by `to_executorch()`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers torch.ops.llama)
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch import Tensor, nn
from torch.export import Dim, export

from lobit import verbs
from lobit.export.pte import write_program
from lobit.export.target import Spec
from lobit.export.xnnpack import lowering
from lobit.export.xnnpack import target as xnnpack
from lobit.export.xnnpack.link import Linker
from lobit.export.xnnpack.parts import INPUTS, OUTPUT, Choice, Parts, Step
from lobit.runtime.executorch import import_runtime
from lobit.verbs.make import converted

CONTEXT, CHUNK = 64, 8
"""A context with one bound, so that no step depends on the position and the whole can be one graph."""
CALLS = [(list(range(7)), 0), ([3], 7), (list(range(8)), 8), *(([token], 16 + token) for token in range(24))]


class Whole(nn.Module):
    """All steps behind the positions as one module, its caches buffers: (tokens, input_pos, what follows from positions) -> logits."""

    def __init__(self, parts: Parts, given: Sequence[str]) -> None:
        super().__init__()
        self.parts, self.given = parts, given
        self.steps = [one for step in parts.steps[1:] for one in chosen(step)]
        self.modules_of_steps = nn.ModuleList(step.module for step in self.steps)
        for number, value in enumerate(parts.memories.values()):
            self.register_buffer(f"cache_{number}", torch.zeros(value.sizes(0), dtype=value.dtype))
        self.cache_names = list(parts.memories)

    def forward(self, tokens: Tensor, input_pos: Tensor, positions: list[Tensor]) -> Tensor:
        made = dict(zip(INPUTS, (tokens, input_pos), strict=True)) | dict(zip(self.given, positions, strict=True))
        for step in self.steps:
            result = step.module(*(self.value(name, made) for name in step.inputs))
            made.update(zip(step.outputs, result if isinstance(result, tuple) else (result,), strict=True))
        return made[OUTPUT]

    def value(self, name: str, made: dict[str, Tensor]) -> Tensor:
        value = self.parts.values[name]
        if value.constant is not None:
            return value.constant
        if value.memory is not None:
            cache: Tensor = getattr(self, f"cache_{self.cache_names.index(value.memory)}")
            return cache
        return made[name]


def chosen(step: Step | Choice) -> tuple[Step, ...]:
    """What runs whatever the position: caches are clean to begin with, and there is one bound."""
    if isinstance(step, Step):
        return (step,)
    return next((steps for flag, steps in step.cases if flag is None), ())


def stock(module: nn.Module, example: tuple[Any, ...], shapes: Any, out: Path, delegated: bool = True) -> Any:
    """A module as ExecuTorch exports it, loaded."""
    graph = export(module, example, dynamic_shapes=shapes, strict=False)
    lowering._drop_assertions(graph.graph_module)
    preserved = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True, preserve_ops=[torch.ops.aten.linear.default])
    edge = to_edge(graph, compile_config=preserved)
    if delegated:
        lowering._infer_one_size(edge.exported_program().graph_module)
        edge = edge.to_backend(XnnpackPartitioner())
    program = edge.to_executorch(ExecutorchBackendConfig(sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass()))
    out.write_bytes(program.buffer)
    return import_runtime()._load_for_executorch(str(out))


@pytest.mark.parametrize(("model", "recipe"), [("llama", "8da4w-g32"), pytest.param("qwen3", "fp", marks=pytest.mark.slow)])
def test_a_linked_program_gives_the_logits_of_executorchs_own_bit_for_bit(model: str, recipe: str, models: Any, tmp_path: Path) -> None:
    integer, used = converted(models(model), verbs.choose_recipe(recipe))
    parts = xnnpack.program(integer, Spec(used, CONTEXT, CHUNK))
    (positions, *_) = parts.steps
    assert isinstance(positions, Step) and not positions.delegated
    length = Dim("length", min=1, max=CHUNK)
    tokens, at = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    first = stock(positions.module, (tokens, at), ({1: length}, {}), tmp_path / "positions.pte", delegated=False)
    made = [torch.zeros(parts.values[name].sizes(4), dtype=parts.values[name].dtype) for name in positions.outputs]
    moving = [
        {axis: group_of(size) * length for axis, size in enumerate(parts.values[name].shape) if not isinstance(size, int)}
        for name in positions.outputs
    ]
    rest = stock(Whole(parts, positions.outputs), (tokens, at, made), ({1: length}, {}, moving), tmp_path / "rest.pte")

    lowered = {name: lowering.lower_part(step, lowering.trace_part(step, parts, CHUNK), {}) for name, step in parts.distinct().items()}
    write_program(Linker(parts, lowered, CHUNK).link(), tmp_path / "linked.pte")
    linked = import_runtime()._load_for_executorch(str(tmp_path / "linked.pte"))
    for ids, position in CALLS:
        tokens, at = torch.tensor([ids]), torch.tensor([position])
        (found,) = linked.forward((tokens, at))
        (expected,) = rest.forward((tokens, at, *(value.clone() for value in first.forward((tokens, at)))))
        assert torch.equal(found, expected), f"at position {position}"


def group_of(size: Any) -> int:
    """Entries for each token."""
    times: int = size.times
    return times
