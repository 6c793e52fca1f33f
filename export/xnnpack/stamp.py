"""One graph for all layers of a kind: it is lowered once, with random weights, and stamped with those of each layer.

XNNPACK's graphs name their constants by the sha256 of their bytes. So the graph of another layer differs in these names alone, and
not in their lengths; the bytes behind them are what XNNPACK's serializer (backends/xnnpack/operators/node_visitor.py) makes of
the layer's tensors. The random weights are all different, so that each name in the graph says which tensor it is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from executorch.exir.schema import Program
from torch import Tensor, nn
from torch.export import ExportedProgram

from lobit.errors import TargetError
from lobit.export.pte import as_bytes
from lobit.export.xnnpack.delegated import DelegatedLinear
from lobit.quant_recipes.packing import pack_int4

SCALE = "scale_"


def randomize(graph: ExportedProgram) -> None:
    """Replaces a traced graph's weights, which are its persistent tensors, by random numbers; zero points stay 0."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in graph.state_dict.items():
        if tensor.dtype == torch.int8:
            graph.state_dict[name] = torch.randint(-8, 8, tensor.shape, dtype=torch.int8, generator=generator)
        elif tensor.is_floating_point():
            random = torch.rand(tensor.shape, generator=generator) + 0.5
            graph.state_dict[name] = nn.Parameter(random, requires_grad=False) if isinstance(tensor, nn.Parameter) else random


def serialized(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a module as XNNPACK's serializer writes it.

    Args:
        module: the module that has the tensor.
        name: the tensor's name in the module.
        tensor: the module's tensor, or another one of its shape.
    """
    path, _, part = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(owner, DelegatedLinear) and part == "integers":
        return pack_int4(tensor) if owner.grid.bits == 4 else tensor.contiguous()
    if isinstance(owner, DelegatedLinear) and part == "scale" and owner.grid.group_size:
        return tensor.to(torch.bfloat16)
    return tensor.detach().float().contiguous()


def digest_of(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(as_bytes(tensor)).hexdigest()


def key_of(module: nn.Module, name: str, data: Tensor) -> str:
    """XNNPACK's name of a constant: its digest, with `SCALE` before it where it is a scale.

    Args:
        module: as in `serialized`.
        name: as in `serialized`.
        data: the tensor as `serialized` gives it.
    """
    path, _, part = name.rpartition(".")
    is_scale = isinstance(module.get_submodule(path), DelegatedLinear) and part == "scale"
    return (SCALE if is_scale else "") + digest_of(data)


@dataclass(frozen=True)
class Stamp:
    """Where a lowered graph has a module's tensors."""

    keys: dict[str, str]
    """XNNPACK's names of constants, each with the name of the module's tensor that it is."""
    buffers: dict[int, str]
    """Numbers of ExecuTorch's own constants, each with the name of the module's tensor; the others are the same for all modules."""


def stamp_of(graph: ExportedProgram, module: nn.Module, keys: set[str], program: Program) -> Stamp:
    """Finds a module's tensors in a randomized and lowered graph.

    Args:
        graph: the traced graph after `randomize`.
        module: the module that was traced.
        keys: XNNPACK's names of the lowered graph's constants.
        program: the lowered graph.

    Raises:
        TargetError: one of XNNPACK's constants is none of the module's tensors.
    """
    weights = {name: tensor.detach() for name, tensor in graph.state_dict.items() if tensor.dtype != torch.int64}
    plain = {digest_of(tensor): name for name, tensor in weights.items()}
    buffers = {number: hashlib.sha256(buffer.storage).hexdigest() for number, buffer in enumerate(program.constant_buffer)}
    found = {key_of(module, name, serialized(module, name, tensor)): name for name, tensor in weights.items()}
    unknown = sorted(keys - set(found))
    if unknown:
        raise TargetError(
            f"{len(unknown)} of {len(keys)} constants of a lowered graph are none of its module's tensors: this version of ExecuTorch "
            "writes weights otherwise than the one that lobit is pinned to; install that one"
        )
    return Stamp(
        {key: found[key] for key in sorted(keys)},
        {number: plain[digest] for number, digest in buffers.items() if digest in plain},
    )
