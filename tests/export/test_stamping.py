"""Stamped programs: one lowered graph for all layers of a kind gives what lowering every layer by itself gives."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import schema

from lobit import verbs
from lobit.errors import TargetError
from lobit.export.pte import Linked, as_bytes, write_program
from lobit.export.target import Spec
from lobit.export.xnnpack import lowering
from lobit.export.xnnpack import target as xnnpack
from lobit.export.xnnpack.link import Linker
from lobit.export.xnnpack.parts import Parts, Step
from lobit.runtime.executorch import import_runtime
from lobit.verbs.make import converted

CONTEXT, CHUNK = 96, 8
CASES = [
    ("mobilellm_p1", "8da4w-g32"),
    ("llama", "8da4w-g32"),
    ("llama", "bitnet"),
    ("qwen3", "fp"),
    pytest.param("llama", "8da8w", marks=pytest.mark.slow),
    pytest.param("mobilellm_p1", "fp", marks=pytest.mark.slow),
]


class Unshared(Parts):
    """Every step is a part of its own."""

    def part_of(self, step: Step) -> str:
        return f"{super().part_of(step)}\n{id(step)}"


def link(parts: Parts, chunk: int) -> Linked:
    lowered = {
        name: lowering.lower_part(step, lowering.trace_part(step, parts, chunk), {}) for name, step in parts.distinct().items()
    }
    return Linker(parts, lowered, chunk).link()


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_stamped_layers_are_what_lowering_each_by_itself_gives(
    model: str, recipe: str, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    integer, used = converted(models(model), verbs.choose_recipe(recipe))
    parts = xnnpack.program(integer, Spec(used, CONTEXT, CHUNK))
    stamped = link(parts, CHUNK)
    with monkeypatch.context() as patch:
        patch.setattr(lowering, "randomize", lambda graph: None)
        long = link(Unshared(parts.values, parts.memories, parts.steps), CHUNK)
    assert stamped.delegates == long.delegates, "graphs, byte for byte"
    assert set(stamped.weights) == set(long.weights)
    for key, weight in stamped.weights.items():
        assert as_bytes(weight.data()) == as_bytes(long.weights[key].data()), key
    assert {bytes(as_bytes(one)) for one in stamped.constants.values()} == {bytes(as_bytes(one)) for one in long.constants.values()}
    logits = []
    for name, linked in (("stamped", stamped), ("long", long)):
        write_program(linked, tmp_path / name)
        program = import_runtime()._load_for_executorch(str(tmp_path / name))
        calls = [(list(range(7)), 0), ([3], 7), (list(range(8)), 8), *(([token], 16 + token) for token in range(24))]
        logits.append([program.forward((torch.tensor([tokens]), torch.tensor([at])))[0].clone() for tokens, at in calls])
    assert all(torch.equal(one, other) for one, other in zip(*logits, strict=True)), "logits, bit for bit"


def test_layers_are_lowered_once_however_many_there_are(models: Any) -> None:
    integer, used = converted(models("llama"), verbs.choose_recipe("8da4w-g32"))
    config, block = integer.config, integer.layers[0]
    counts = []
    for layers in (2, 12):
        integer.config = replace(config, layers=config.layers[:1] * layers)
        integer.layers = torch.nn.ModuleList([block] * layers)
        counts.append(len(xnnpack.program(integer, Spec(used, CONTEXT, CHUNK)).distinct()))
    assert counts[0] == counts[1]


def test_a_tied_embedding_is_in_the_file_once(bundles: Any, models: Any) -> None:
    from lobit.runtime.bundle import open_bundle
    from lobit.runtime.executorch import ProgramFile

    bundle = open_bundle(bundles("mobilellm_p1", "8da4w-g32"))
    path = bundle.path("program")
    embedding, *_, head = ProgramFile(path).layers()
    assert np.array_equal(embedding.values, head.values)
    codes = (embedding.values + 8).astype(np.uint8)
    packed = ((codes[:, ::2] << 4) | codes[:, 1::2]).tobytes()
    data = path.read_bytes()
    assert data.count(packed) == 1
    other = ((codes[:, 1::2] << 4) | codes[:, ::2]).tobytes()
    assert data.count(other) == 0, "nor with the halves of its bytes exchanged"


def unknown_instruction(part: lowering.LoweredPart) -> None:
    @dataclass
    class NewCall:
        value_index: int = 0

    part.program.execution_plan[0].chains[0].instructions.append(schema.Instruction(NewCall()))  # type: ignore[arg-type]


def another_memory(part: lowering.LoweredPart) -> None:
    part.program.execution_plan[0].non_const_buffer_sizes.append(64)
    tensors = (value.val for value in part.program.execution_plan[0].values if isinstance(value.val, schema.Tensor))
    planned = next(tensor for tensor in tensors if tensor.allocation_info)
    planned.allocation_info = schema.AllocationDetails(memory_id=2, memory_offset_low=0, memory_offset_high=0)


def two_chains(part: lowering.LoweredPart) -> None:
    part.program.execution_plan[0].chains *= 2


def mutable_data(part: lowering.LoweredPart) -> None:
    part.program.mutable_data_segments = [schema.SubsegmentOffsets(segment_index=0, offsets=[0])]


UNKNOWN: dict[str, Callable[[lowering.LoweredPart], None]] = {
    "instructions of kind NewCall": unknown_instruction,
    "tensors in memory 2, 1 is known": another_memory,
    "2 chains of instructions": two_chains,
    "data that the program changes": mutable_data,
}
"""What a later ExecuTorch might write."""


@pytest.fixture(scope="module")
def two_parts(models: Any) -> tuple[Parts, dict[str, lowering.LoweredPart]]:
    integer, used = converted(models("llama"), verbs.choose_recipe("fp"))
    parts = xnnpack.program(integer, Spec(used, CONTEXT, CHUNK))
    return parts, {name: lowering.lower_part(step, lowering.trace_part(step, parts, CHUNK), {}) for name, step in parts.distinct().items()}


@pytest.mark.parametrize("told", UNKNOWN)
def test_what_the_linker_does_not_know_is_refused(told: str, two_parts: tuple[Parts, dict[str, lowering.LoweredPart]]) -> None:
    parts, lowered = two_parts
    changed = copy.deepcopy(lowered)
    UNKNOWN[told](max(changed.values(), key=lambda part: len(part.program.execution_plan[0].values)))
    with pytest.raises(TargetError, match=told):
        Linker(parts, changed, CHUNK)
    Linker(parts, lowered, CHUNK).link()
