"""Joins lowered parts to one ExecuTorch program, which has one list of values, of operators, of delegates and of instructions.

All tensors inside a part lie in one scratch area, which every part uses anew. The caches, and the values that parts hand to each
other, lie behind it, each in its place (`Parts.place_of`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from executorch.exir import schema
from executorch.exir._serialize.padding import aligned_size
from executorch.exir.scalar_type import ScalarType
from torch import Tensor, nn

from lobit.errors import TargetError, listed
from lobit.export.pte import Linked, program_of
from lobit.export.stages import Count
from lobit.export.xnnpack.lowering import LoweredPart
from lobit.export.xnnpack.parts import INPUTS, OUTPUT, Choice, Parts, PerToken, Step, Value
from lobit.export.xnnpack.stamp import SCALE, digest_of, key_of, serialized

ARENA = 1
"""Id of the memory that ExecuTorch plans; 0 stands for none there."""
INSTRUCTIONS = {schema.KernelCall, schema.DelegateCall, schema.MoveCall, schema.JumpFalseCall, schema.FreeCall}
"""Kinds of instructions whose values and operators are renumbered."""
ALIGNMENT = 64
"""Bytes at whose multiples tensors begin in memory: a cache line."""
SCALARS = {
    torch.uint8: ScalarType.BYTE,
    torch.int8: ScalarType.CHAR,
    torch.int64: ScalarType.LONG,
    torch.float16: ScalarType.HALF,
    torch.float32: ScalarType.FLOAT,
    torch.bool: ScalarType.BOOL,
}


@dataclass(frozen=True)
class Weight:
    """A delegate's constant, whose bytes are made when they are written (`pte.Named`)."""

    module: nn.Module
    name: str
    bytes: int
    digest: str

    def data(self) -> Tensor:
        """The constant's bytes, as XNNPACK reads them."""
        return serialized(self.module, self.name, self.module.state_dict()[self.name])


class Linker:
    """Joins the lowered parts of a program.

    Args:
        parts: the program.
        lowered: the lowered parts by what `parts.part_of` gives for their steps.
        chunk: the most tokens in one call.

    Raises:
        TargetError: a part has something that this linker does not know.
    """

    def __init__(self, parts: Parts, lowered: Mapping[str, LoweredPart], chunk: int) -> None:
        for name, part in lowered.items():
            _check(part, name.partition("\n")[0])
        self.parts, self.lowered, self.chunk = parts, lowered, chunk
        self.values: list[schema.EValue] = []
        self.operators: list[schema.Operator] = []
        self.instructions: list[schema.Instruction] = []
        self.delegates: list[schema.BackendDelegate] = []
        self.constants: dict[str, Tensor] = {}
        self.blobs: list[bytes] = []
        self.weights: dict[str, Weight] = {}
        self.size = aligned_size(max(_scratch(part) for part in lowered.values()), ALIGNMENT)
        self._sizes = parts.places(chunk)
        self._places: dict[str, int] = {}
        self._named: dict[str, int] = {}
        self._inner: dict[str, dict[int, int]] = {}
        self._lists: dict[tuple[Any, ...], int] = {}
        self._numbers: dict[str, int] = {}
        self._delegates: dict[tuple[bytes, str], int] = {}
        self._keys: dict[tuple[int, str], str] = {}

    def link(self, constant_methods: Sequence[schema.ExecutionPlan] = (), count: Count | None = None) -> Linked:
        """Links the whole program.

        Args:
            constant_methods: further methods of the program.
            count: called with how many steps are linked, and how many there are.
        """
        false = self._add(schema.Bool(False))
        inputs = [self._value(name) for name in INPUTS]
        for number, step in enumerate(self.parts.steps):
            if count:
                count(number, len(self.parts.steps))
            if isinstance(step, Step):
                self._emit(step)
            else:
                self._choose(step, false)
        outputs = [self._value(OUTPUT)]
        begin, *_, end = self.parts.every_step()
        first, last = self._plan(begin), self._plan(end)
        container = schema.ContainerMetadata(
            encoded_inp_str=first.container_meta_type.encoded_inp_str, encoded_out_str=last.container_meta_type.encoded_out_str
        )
        plan = schema.ExecutionPlan(
            name="forward",
            container_meta_type=container,
            values=self.values,
            inputs=inputs,
            outputs=outputs,
            chains=[schema.Chain(inputs=inputs, outputs=outputs, instructions=self.instructions, stacktrace=None)],
            operators=self.operators,
            delegates=self.delegates,
            non_const_buffer_sizes=[0, self.size],
        )
        program = program_of([plan, *constant_methods], next(iter(self.lowered.values())).program.version)
        return Linked(program, self.constants, self.blobs, self.weights)

    def _plan(self, step: Step) -> schema.ExecutionPlan:
        plan: schema.ExecutionPlan = self.lowered[self.parts.part_of(step)].program.execution_plan[0]
        return plan

    def _add(self, value: Any) -> int:
        self.values.append(schema.EValue(value))
        return len(self.values) - 1

    def _choose(self, choice: Choice, false: int) -> None:
        """Emits the cases: a jump leads over each whose flag is false, and another from the end of each to the end of all."""
        to_end = []
        for flag, steps in choice.cases:
            skip = None
            if flag is not None:
                skip = schema.JumpFalseCall(cond_value_index=self._value(flag), destination_instruction=0)
                self.instructions.append(schema.Instruction(instr_args=skip))
            for step in steps:
                self._emit(step)
            to_end.append(schema.JumpFalseCall(cond_value_index=false, destination_instruction=0))
            self.instructions.append(schema.Instruction(instr_args=to_end[-1]))
            if skip:
                skip.destination_instruction = len(self.instructions)
        for jump in to_end:
            jump.destination_instruction = len(self.instructions)

    def _emit(self, step: Step) -> None:
        """Emits a part's instructions with this step's values and weights."""
        part, plan = self.lowered[self.parts.part_of(step)], self._plan(step)
        outputs = plan.outputs[len(plan.outputs) - len(step.outputs) :]
        bound = dict(zip(plan.inputs, map(self._value, step.inputs), strict=True))
        bound |= dict(zip(outputs, map(self._value, step.outputs), strict=True))
        base = len(self.instructions)
        for instruction in plan.chains[0].instructions:
            call = dataclasses.replace(instruction.instr_args)
            if isinstance(call, schema.JumpFalseCall):
                call.destination_instruction += base
            for attribute in ("cond_value_index", "move_from", "move_to", "value_index"):
                if hasattr(call, attribute):
                    setattr(call, attribute, self._index(step, getattr(call, attribute), bound))
            if hasattr(call, "args"):
                call.args = [self._index(step, argument, bound) for argument in call.args]
            if isinstance(call, schema.KernelCall):
                call.op_index = self._operator(plan.operators[call.op_index])
            if isinstance(call, schema.DelegateCall):
                call.delegate_index = self._delegate(step, part, plan.delegates[call.delegate_index])
            self.instructions.append(schema.Instruction(instr_args=call))

    def _index(self, step: Step, index: int, bound: dict[int, int]) -> int:
        """The program's index of a value of a part; `bound` has the program's indices of values that belong to this step alone."""
        if index in bound:
            return bound[index]
        name = self.parts.part_of(step)
        part = self.lowered[name]
        value = part.program.execution_plan[0].values[index].val
        if isinstance(value, (schema.TensorList, schema.IntList, schema.OptionalTensorList)):
            items = [self._index(step, item, bound) if item >= 0 else item for item in value.items]
            key = (type(value), *items)
            if key not in self._lists:
                self._lists[key] = self._add(dataclasses.replace(value, items=items))
            return self._lists[key]
        buffer = value.data_buffer_idx if isinstance(value, schema.Tensor) else 0
        if buffer in part.stamp.buffers:
            weight = step.module.state_dict()[part.stamp.buffers[buffer]]
            bound[index] = self._add(dataclasses.replace(value, data_buffer_idx=self._constant(weight)))
            return bound[index]
        inner = self._inner.setdefault(name, {})
        if index not in inner:
            if buffer:
                storage = torch.frombuffer(bytearray(part.program.constant_buffer[buffer].storage), dtype=torch.uint8)
                value = dataclasses.replace(value, data_buffer_idx=self._constant(storage))
            inner[index] = self._add(value)
        return inner[index]

    def _constant(self, tensor: Tensor) -> int:
        digest = digest_of(tensor)
        if digest not in self.constants:
            self.constants[digest] = tensor
            self._numbers[digest] = len(self.constants)
        return self._numbers[digest]

    def _operator(self, operator: schema.Operator) -> int:
        if operator not in self.operators:
            self.operators.append(operator)
        return self.operators.index(operator)

    def _delegate(self, step: Step, part: LoweredPart, delegate: schema.BackendDelegate) -> int:
        """The index of the delegate with this step's weights; steps with the same weights have the same one."""
        names = part.stamp.keys
        blob = bytes(part.program.backend_delegate_data[delegate.processed.index].data)
        for key in names:
            if key.encode() in blob:
                blob = blob.replace(key.encode(), self._key(step.module, names[key]).encode())
        known = (blob, delegate.id)
        if known not in self._delegates:
            self.blobs.append(blob)
            where = schema.BackendDelegateDataReference(location=schema.DataLocation.SEGMENT, index=len(self.blobs) - 1)
            self.delegates.append(schema.BackendDelegate(id=delegate.id, processed=where, compile_specs=delegate.compile_specs))
            self._delegates[known] = len(self.delegates) - 1
        return self._delegates[known]

    def _key(self, module: nn.Module, name: str) -> str:
        """XNNPACK's name of a tensor's data; records in `weights` where the data comes from."""
        known = (id(module), name)
        if known not in self._keys:
            data = serialized(module, name, module.state_dict()[name])
            self._keys[known] = key_of(module, name, data)
            self.weights.setdefault(self._keys[known], Weight(module, name, data.nbytes, self._keys[known].removeprefix(SCALE)))
        return self._keys[known]

    def _value(self, name: str) -> int:
        """The index of a value that parts hand to each other."""
        if name not in self._named:
            self._named[name] = self._add(self._tensor(name, self.parts.values[name]))
        return self._named[name]

    def _tensor(self, name: str, value: Value) -> schema.Tensor:
        sizes = value.sizes(self.chunk)
        moves = any(isinstance(size, PerToken) for size in value.shape)
        place, where = self.parts.place_of(name), None
        if place is not None:
            offset = self._offset(place)
            where = schema.AllocationDetails(memory_id=ARENA, memory_offset_low=offset & 0xFFFFFFFF, memory_offset_high=offset >> 32)
        return schema.Tensor(
            scalar_type=SCALARS[value.dtype],
            storage_offset=0,
            sizes=sizes,
            dim_order=list(range(len(sizes))),
            requires_grad=False,
            layout=0,
            data_buffer_idx=0 if value.constant is None else self._constant(value.constant),
            allocation_info=where,
            shape_dynamism=schema.TensorShapeDynamism.DYNAMIC_BOUND if moves else schema.TensorShapeDynamism.STATIC,
        )

    def _offset(self, place: str) -> int:
        if place not in self._places:
            self._places[place] = self.size
            self.size += aligned_size(self._sizes[place], ALIGNMENT)
        return self._places[place]


def _check(part: LoweredPart, what: str) -> None:
    """Refuses a part with something that a later ExecuTorch may write and this linker would drop or misplace.

    Raises:
        TargetError: with every instruction and memory of the part that is not known.
    """
    program = part.program
    plans = program.execution_plan
    problems = [] if len(plans[0].chains) == 1 else [f"{len(plans[0].chains)} chains of instructions, 1 is known"]
    kinds = {type(instruction.instr_args) for chain in plans[0].chains for instruction in chain.instructions}
    problems += [f"instructions of kind {kind.__name__}" for kind in sorted(kinds - INSTRUCTIONS, key=lambda kind: kind.__name__)]
    tensors = [value.val for value in plans[0].values if isinstance(value.val, schema.Tensor)]
    arenas = {tensor.allocation_info.memory_id for tensor in tensors if tensor.allocation_info}
    problems += [f"tensors in memory {arena}, {ARENA} is known" for arena in sorted(arenas - {ARENA})]
    problems += [f"{len(sizes)} memories, {ARENA + 1} are known"] if len(sizes := plans[0].non_const_buffer_sizes) > ARENA + 1 else []
    problems += ["data that the program changes"] if program.mutable_data_segments else []
    problems += ["memory of a device"] if plans[0].non_const_buffer_device else []
    if problems:
        heading = f"ExecuTorch wrote of {what} what lobit cannot link; install the release that `lobit doctor xnnpack` names:"
        raise TargetError(listed(problems, heading))


def _scratch(part: LoweredPart) -> int:
    sizes: list[int] = part.program.execution_plan[0].non_const_buffer_sizes
    return sizes[1] if len(sizes) > 1 else 0
