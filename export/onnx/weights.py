"""Weights as ONNX graphs store them: floats, integers of standard types, and the blocks of ONNX Runtime's n-bit operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch.nn import functional as F

from lobit.export.onnx.graph import Bytes, OnnxGraph
from lobit.model import weight_of
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear
from lobit.quant_recipes.packing import FixedWidth, layout_of
from lobit.quant_recipes.recipe import Recipe, Rule, WeightGrid

CRUMBS = FixedWidth("the crumbs of MatMulNBits", 4, 1, 4, lowest=-2, highest=1)
"""Two-bit integers whose zero is code 2, as the operator assumes."""
LARGEST_BLOCK, SMALLEST_BLOCK, FAST_BLOCK = 128, 16, 32
"""Weights that share a scale in MatMulNBits, powers of two: the most, the fewest, and the fewest where a whole row has one scale."""
CRUMB_SECONDS = {128: 1.0, 64: 1.17, 32: 2.33}
"""Time of a two-bit weight by the size of its block, relative to blocks of 128 (768 x 4096, 128 tokens, AVX-512 VNNI). Blocks below 32 or
over 128 have no kernel for INT8 inputs."""
ITEM_BYTES: dict[int, float] = {
    TensorProto.FLOAT: 4,
    TensorProto.FLOAT16: 2,
    TensorProto.INT8: 1,
    TensorProto.UINT8: 1,
    TensorProto.INT4: 0.5,
}
"""Bytes of an element of each type."""
FLOATS: dict[int, torch.dtype] = {TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16}
Integers = IntegerLinear | IntegerEmbedding


@dataclass(frozen=True)
class Form:
    """How a layer's integers [out, in] are stored."""

    bits: int
    """Bits of a stored integer; the values are still those of the recipe's grid."""
    scales: int
    """Number of scales in a row; a scale that several blocks share is stored once for each block."""
    columns: int
    """Number of integers stored for a row, whose last block is filled up."""
    block: int | None
    """Weights that share a scale in MatMulNBits and GatherBlockQuantized; None: standard operators."""


def form_of(grid: WeightGrid, inner: int, rows: bool, fused: bool) -> Form:
    """How the integers of a layer are stored.

    Args:
        grid: the grid of its weights.
        inner: number of weights in a row.
        rows: whether it is an embedding: its rows are whole blocks, and standard operators look them up in INT8 alone.
        fused: whether ONNX Runtime's own operators are used where they take the integers.
    """
    block = _block(grid, inner)
    if rows:
        block = min(block, inner & -inner)
    if fused and block >= SMALLEST_BLOCK:
        scales = -(-inner // block)
        return Form(stored_bits(grid), scales, scales * block, block)
    return Form(8 if rows or grid.bits > 4 else 4, inner // (grid.group_size or inner), inner, None)


def _block(grid: WeightGrid, inner: int) -> int:
    """Weights in a block: the largest power of two up to `LARGEST_BLOCK` that divides a group, or a row where there are no groups.

    A row that has one scale is filled up to blocks of at least `FAST_BLOCK`; a row of two-bit integers to those that are fastest.
    """
    if grid.group_size is not None:
        return min(LARGEST_BLOCK, grid.group_size & -grid.group_size)
    if stored_bits(grid) == 2:
        return min(CRUMB_SECONDS, key=lambda block: -(-inner // block) * block * CRUMB_SECONDS[block])
    return max(min(LARGEST_BLOCK, inner & -inner), FAST_BLOCK)


def stored_bits(grid: WeightGrid) -> Literal[2, 4, 8]:
    """Bits in which MatMulNBits stores a grid's integers; their values do not change."""
    return 2 if grid.bits <= 2 else 4 if grid.bits <= 4 else 8


def rounds_inputs(rule: Rule) -> bool:
    """Whether MatMulNBits rounds its inputs to INT8: where the recipe does, and where it would be slow with floats."""
    return bool(rule.activation_bits) or stored_bits(rule.weights) != 4


def alike(modules: Sequence[nn.Module]) -> bool:
    """Whether linears may be joined to one product: all are floats, or all are integers of one grid with inputs of one kind."""
    kinds = {(module.rule.weights, module.rule.activation_bits) if isinstance(module, IntegerLinear) else None for module in modules}
    return len(kinds) == 1


def rows_of(module: nn.Module) -> int:
    """Number of outputs of a linear."""
    return len(module.integers if isinstance(module, Integers) else weight_of(module))


def _store(graph: OnnxGraph, name: str, dtype: int, shape: Sequence[int], key: Sequence[object], make: Bytes) -> str:
    return graph.weight(name, dtype, shape, math.ceil(math.prod(shape) * ITEM_BYTES[dtype]), (dtype, *key), make)


def parameter(
    graph: OnnxGraph, name: str, *tensors: Tensor, dtype: int = TensorProto.FLOAT, transposed: bool = False, flat: bool = False
) -> str:
    """Stores floats [n, …] one after the other, in float32 or half, and returns their name.

    They are stored as […, n] where `transposed`, and as [n] where `flat`, which takes tensors [n, 1].
    """
    rows = sum(len(tensor) for tensor in tensors)
    shape = (rows,) if flat else (rows, *tensors[0].shape[1:])

    def make() -> Tensor:
        joined = (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).detach().to(FLOATS[dtype])
        return joined.t() if transposed else joined

    return _store(graph, name, dtype, shape[::-1] if transposed else shape, (transposed, flat, *map(id, tensors)), make)


def float_weight(graph: OnnxGraph, *tensors: Tensor, recipe: Recipe, transposed: bool = False) -> str:
    """Stores weights [out, in] one after the other, or as [in, out], as floats of the recipe's width; returns their name."""
    dtype = TensorProto.FLOAT16 if recipe.float_bits == 16 else TensorProto.FLOAT
    return parameter(graph, "weight", *tensors, dtype=dtype, transposed=transposed)


def int8_weight(graph: OnnxGraph, integers: Tensor, transposed: bool = False) -> str:
    """Stores integers [out, in] of any grid as INT8, or as [in, out]; returns their name."""
    given = integers.t() if transposed else integers
    return _store(graph, "weight", TensorProto.INT8, given.shape, (transposed, id(integers)), lambda: given)


def int4_weight(graph: OnnxGraph, integers: Tensor, transposed: bool = False) -> str:
    """Like `int8_weight`, for integers of 4 bits or fewer as INT4: two in a byte, the first in the low half [ONNX, IR.md]."""
    given = integers.t() if transposed else integers

    def make() -> Tensor:
        flat = given.flatten().view(torch.uint8)
        even, odd = flat[0::2] & 15, F.pad(flat[1::2], (0, len(flat) % 2))
        return even | odd << 4

    return _store(graph, "weight", TensorProto.INT4, given.shape, (transposed, id(integers)), make)


def blocks_weight(graph: OnnxGraph, modules: Sequence[Integers], form: Form, rows: bool = False) -> tuple[str, str]:
    """Stores the integers and scales of layers of one grid in blocks, one layer after the other.

    Args:
        graph: the graph to store them in.
        modules: layers with integers [out, in].
        form: how they are stored; it has blocks.
        rows: whether to use the shape of GatherBlockQuantized. The bytes are the same: an embedding that is the head too is stored once.

    Returns:
        Names of the weight, uint8 [out, blocks, block · bits / 8], or [out, in · bits / 8] for rows, and of the scales, float32
        [out, blocks].
    """
    inner, out = modules[0].integers.shape[1], sum(len(module.integers) for module in modules)
    width = form.columns * form.bits // 8
    shape = (out, width) if rows else (out, form.scales, width // form.scales)

    def weight() -> Tensor:
        return torch.cat([_packed(F.pad(module.integers, (0, form.columns - inner)), form.bits) for module in modules])

    def scale() -> Tensor:
        return torch.cat([module.scale.repeat_interleave(form.scales // module.scale.shape[1], dim=1) for module in modules])

    return (
        _store(graph, "weight", TensorProto.UINT8, shape, (form, *(id(module.integers) for module in modules)), weight),
        _store(graph, "scale", TensorProto.FLOAT, (out, form.scales), (form, *(id(module.scale) for module in modules)), scale),
    )


def _packed(integers: Tensor, bits: int) -> Tensor:
    """The integers as unsigned codes, the first in the lowest bits of a byte; the code of zero is 2^(bits - 1)."""
    layout = CRUMBS if bits == 2 else layout_of(bits)
    return layout.pack(integers) if layout else integers.view(torch.uint8) ^ 128
