"""What the parts of an ExecuTorch program hand to each other, read out of runs of the program itself.

In a program every layer writes the same few tensors: the residual stream, q, k, v, their cache entries and attention's output. So
a copy of the program is made in which each layer has tensors of its own, which are outputs; the copy runs the same instructions,
delegates and kernels.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lobit.errors import BundleError
from lobit.quiet import quiet_python
from lobit.runtime.bundle import Bundle
from lobit.runtime.executorch import import_runtime, use_threads
from lobit.runtime.parts import Seen

FLOAT_KEPT, INT8_KEPT = ("k_values", "v_values"), tuple(f"{side}_{part}" for side in "kv" for part in ("integers", "scale", "zero_point"))
"""Names of the cache entries that a layer writes: with a float cache, and with an INT8 cache."""
ALIGNMENT = 64


def room(bundle: Bundle) -> int:
    """See `parts.Reader`. The caches themselves are not read, so that the context is the only limit."""
    return bundle.manifest.context


def read_parts(bundle: Bundle, threads: int, calls: Sequence[Sequence[int]]) -> list[Seen]:
    """See `parts.Reader`.

    Raises:
        BundleError: the program was not linked by lobit, or does not run.
    """
    native = import_runtime()
    import torch

    longest = max(map(len, calls))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "parts.pte"
        names = write_opened(bundle, path, longest)
        position, seen = 0, []
        use_threads(native, threads)
        try:
            module = native._load_for_executorch(str(path))
            for tokens in calls:
                values = module.forward((torch.tensor([list(tokens)]), torch.tensor([position])))
                seen.append({name: value.clone() for name, value in zip(names, values, strict=True)})
                seen[-1]["logits"] = seen[-1]["logits"][:, -1:]
                position += len(tokens)
        except RuntimeError as error:
            raise BundleError(f"ExecuTorch cannot run the parts of {bundle.path('program')} ({error}): export it again") from None
    return seen


def write_opened(bundle: Bundle, out: Path, longest: int) -> list[str]:
    """Writes a copy of the program that has its inner values as outputs; returns the names of all outputs.

    Args:
        bundle: the program's bundle.
        out: where the copy is written.
        longest: the most tokens of a call.
    """
    with quiet_python():
        from executorch.exir._serialize import _flatbuffer_program, _program

    header = _program._ExtendedHeader
    path, model = bundle.path("program"), bundle.manifest.model
    with path.open("rb") as file:
        head = header.from_bytes(file.read(header.NUM_HEAD_BYTES)[8:])
        file.seek(0)
        program = _flatbuffer_program._flatbuffer_to_program(file.read(head.program_size))
        names = _Opened(program.execution_plan[0], longest, model.hidden_size, model.layers).names
        written = _flatbuffer_program._program_to_flatbuffer(program, constant_tensor_alignment=16, delegate_alignment=None)
        length = -(-header.EXPECTED_LENGTH // written.max_alignment) * written.max_alignment
        begin = -(-(length + len(written.data)) // 4096) * 4096
        described = header(length + len(written.data), begin, head.segment_data_size).to_bytes().ljust(length, b"\0")
        data = _program._insert_flatbuffer_header(written.data, r"ET[0-9a-zA-Z][0-9a-zA-Z]", described)
        file.seek(head.segment_base_offset)
        with out.open("wb") as copy:
            copy.write(data.ljust(begin, b"\0"))
            shutil.copyfileobj(file, copy, 1 << 22)
    return names


class _Opened:
    """Rewrites a program in place, so that every layer has values of its own.

    Behind the scratch area lie the tensors that parts hand to each other (`export/xnnpack/link.py`), numbered in the order of their
    first use: the positions' values, the residual stream, q, k, v, the cache entries, and attention's output y.
    """

    def __init__(self, plan: Any, longest: int, width: int, layers: int) -> None:
        self.plan, self.longest, self.width, self.layers = plan, longest, width, layers
        self.instructions = [instruction.instr_args for instruction in plan.chains[0].instructions]
        self.handed = self._handed()
        kept = {index for name, index in self.handed.items() if name in (*FLOAT_KEPT, *INT8_KEPT)}
        streams = {index for name, index in self.handed.items() if name[0] == "x"}
        self.encoded: list[int] = []
        self.left: list[int] = []
        """`encoded` has each layer's first instruction with a cache entry, `left` its first one after attention that reads the stream."""
        for _ in range(layers):
            self.encoded.append(self._next(self.left[-1] if self.left else 0, kept))
            self.left.append(self._next(self.encoded[-1], streams))
        self.names: list[str] = []
        self._own: dict[str, int] = {}
        self._lists: dict[tuple[int, ...], int] = {}
        self._rewrite()

    def _handed(self) -> dict[str, int]:
        """Finds the values that parts hand to each other; returns their indices by name."""
        plan, tensors = self.plan, {}
        for index, value in enumerate(plan.values):
            if type(value.val).__name__ == "Tensor" and value.val.allocation_info is not None:
                tensors[index] = value.val
        if 3 not in tensors:
            raise self._foreign()
        scratch, chunk = _offset(tensors[3]), plan.values[plan.inputs[0]].val.sizes[1]
        behind = [index for index, one in tensors.items() if _offset(one) >= scratch and one.sizes[:2] == [1, chunk] and one.shape_dynamism]
        streams = [index for index in behind if len(tensors[index].sizes) == 3 and tensors[index].sizes[2] == self.width]
        streams = streams[-min(2, self.layers) :]
        fours = [index for index in behind if len(tensors[index].sizes) == 4]
        kept = INT8_KEPT if len(fours) == 10 else FLOAT_KEPT
        if len(streams) != min(2, self.layers) or len(fours) != 4 + len(kept):
            raise self._foreign()
        return dict(zip(("q", "k", "v", *kept, "y"), fours, strict=True)) | {f"x{n}": index for n, index in enumerate(streams)}

    def _foreign(self) -> BundleError:
        return BundleError("the program's parts are not those that lobit links: export it again")

    def _next(self, start: int, values: set[int]) -> int:
        """Index of the first instruction from `start` on that has one of the values as an argument."""
        for n in range(start, len(self.instructions)):
            if values & set(getattr(self.instructions[n], "args", None) or ()):
                return n
        raise self._foreign()

    def _rewrite(self) -> None:
        names = {index: name for name, index in self.handed.items()}
        for n, call in enumerate(self.instructions):
            if getattr(call, "args", None):
                call.args = [self._argument(argument, n, names) for argument in call.args]
        logits = self.plan.outputs[0]
        self.names.append("logits")
        self.plan.outputs[:] = [*self._own.values(), logits]
        self.plan.chains[0].outputs = self.plan.outputs

    def _argument(self, index: int, n: int, names: dict[int, str]) -> int:
        """Returns what replaces an argument of instruction `n`: the value of its own that the layer has, else the same argument."""
        value: Any = self.plan.values[index].val if index >= 0 else None
        if type(value).__name__ == "TensorList":
            items = [self._argument(item, n, names) for item in value.items]
            if items == list(value.items):
                return index
            self._lists.setdefault(tuple(items), len(self.plan.values))
            if self._lists[tuple(items)] == len(self.plan.values):
                self.plan.values.append(dataclasses.replace(self.plan.values[index], val=dataclasses.replace(value, items=items)))
            return self._lists[tuple(items)]
        if index not in names:
            return index
        return self._layers_own(names[index], index, self._layer(names[index], n))

    def _layer(self, name: str, n: int) -> int:
        """The layer whose value instruction `n` refers to by a name."""
        begun, left = sum(one <= n for one in self.encoded), sum(one <= n for one in self.left)
        if name[0] == "x":
            return begun - ((begun - int(name[1])) % 2)
        return left if name in ("q", "k", "v") else begun - 1

    def _layers_own(self, name: str, index: int, layer: int) -> int:
        key = f"{name[0] if name[0] == 'x' else name}.{layer}"
        if key not in self._own:
            tensor = self.plan.values[index].val
            sizes = [1, self.longest, *tensor.sizes[2:]]
            end, size = self.plan.non_const_buffer_sizes[1], 4
            for one in sizes:
                size *= one
            where = dataclasses.replace(tensor.allocation_info, memory_offset_low=end & 0xFFFFFFFF, memory_offset_high=end >> 32)
            self.plan.non_const_buffer_sizes[1] = end + -(-size // ALIGNMENT) * ALIGNMENT
            self._own[key] = len(self.plan.values)
            self.names.append(key)
            own = dataclasses.replace(tensor, sizes=sizes, allocation_info=where)
            self.plan.values.append(dataclasses.replace(self.plan.values[index], val=own))
        return self._own[key]


def _offset(tensor: Any) -> int:
    return int(tensor.allocation_info.memory_offset_low) + (int(tensor.allocation_info.memory_offset_high) << 32)
