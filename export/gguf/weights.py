"""Weights as GGUF files store them: blocks of integers that share a scale in half precision, and floats.

Source: ggml `src/ggml-common.h`, `block_q4_0` and `block_q8_0`; the ternary blocks are in `quant_recipes/gguf_packing.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from lobit.errors import TargetError
from lobit.export.target import Spec
from lobit.quant_recipes.apply import LayerPlan
from lobit.quant_recipes.gguf_packing import TQ1_0, TQ2_0
from lobit.quant_recipes.packing import row_slices
from lobit.quant_recipes.recipe import Recipe, Rule, WeightGrid

SMALL, LARGE = 32, 256
"""Weights in a block of Q4_0 and Q8_0, and of the ternary types."""
SCALE_BYTES = 2


@dataclass(frozen=True)
class Form:
    """How a layer's weights [out, in] are stored."""

    type: Type
    block: int
    """Weights that share a scale; 1: floats."""
    size: int
    """Bytes of a block."""

    def row_bytes(self, inner: int) -> int:
        """Bytes of a row."""
        return inner // self.block * self.size


F32, F16 = Form(Type.F32, 1, 4), Form(Type.F16, 1, 2)
Q4_0, Q8_0 = Form(Type.Q4_0, SMALL, SCALE_BYTES + SMALL // 2), Form(Type.Q8_0, SMALL, SCALE_BYTES + SMALL)
TERNARY = {False: Form(Type.TQ2_0, LARGE, TQ2_0.size), True: Form(Type.TQ1_0, LARGE, TQ1_0.size)}
"""By whether the smallest is wanted: 1.69 bits a weight where 2.06 are read faster."""


def float_form(recipe: Recipe) -> Form:
    """How a recipe's layers in floating point are stored.

    bfloat16 would hold many a model's weights too, but llama.cpp rounds the inputs of such products to it, to 8 bits.
    """
    return F16 if recipe.float_bits == 16 else F32


def form_of(grid: WeightGrid, inner: int, smallest: bool = False) -> Form:
    """How integers of a grid are stored: in the narrowest blocks that hold their values and their scales.

    Args:
        grid: the grid.
        inner: weights in a row.
        smallest: see `Spec.smallest`.
    """
    if grid.bits == 2 and (grid.group_size or inner) % LARGE == 0:
        return TERNARY[smallest]
    return Q4_0 if grid.bits <= 4 else Q8_0


def form(layer_plan: LayerPlan, spec: Spec) -> Form:
    """How a layer is stored."""
    rule = layer_plan.rule
    return float_form(spec.recipe) if rule is None else form_of(rule.weights, layer_plan.shape[1], spec.smallest)


def misfit(rule: Rule, inner: int) -> str | None:
    """Why no blocks hold a layer's integers, or None."""
    group = rule.weights.group_size or inner
    return None if group % SMALL == 0 else f"{'group' if rule.weights.group_size else 'row'} of {group}"


def pattern_of(name: str) -> str:
    """The pattern that matches a layer in every block, for `--except`."""
    pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
    assert fnmatchcase(name, pattern)
    return pattern


def packed(integers: Tensor, scale: Tensor, kept: Form, name: str) -> Tensor:
    """The bytes, uint8 [out, row bytes], of integers [out, in] and scales [out, groups].

    Raises:
        TargetError: a scale is no value of half precision, or an integer is out of the type's range.
    """
    half = scale.half()
    rounded = int((half.float() != scale).sum())
    if rounded:
        raise TargetError(
            f"{rounded} of {scale.numel()} scales of {name} are no values of half precision, in which GGUF keeps them (they were taken in "
            f"from another quantization): take target onnx, or quantize the float model"
        )
    blocks = integers.shape[1] // kept.block
    scales = half.repeat_interleave(blocks // scale.shape[1], dim=1)
    return PACKERS[kept.type](integers, scales)


def _pack_q8_0(integers: Tensor, scales: Tensor) -> Tensor:
    return _joined(scales, integers.contiguous().view(torch.uint8).view(len(integers), -1, SMALL))


def _pack_q4_0(integers: Tensor, scales: Tensor) -> Tensor:
    """Two codes q + 8 in a byte: those of the first half of a block are in the low halves of its bytes."""
    rows, columns = integers.shape
    content = torch.empty(rows, columns // SMALL, SMALL // 2, dtype=torch.uint8)
    for part in row_slices(rows, columns):
        codes = (integers[part] + 8).view(torch.uint8).view(-1, columns // SMALL, SMALL)
        if codes.max() > 15:
            raise TargetError(f"integers reach {int(integers[part].abs().max())}, Q4_0 holds -8 to 7: take more bits")
        content[part] = codes[..., : SMALL // 2] | codes[..., SMALL // 2 :] << 4
    return _joined(scales, content)


def _joined(scales: Tensor, content: Tensor) -> Tensor:
    """Blocks [out, bytes]: each its scale [out, blocks] and then its content [out, blocks, bytes]."""
    return torch.cat([scales.contiguous().view(torch.uint8).view(*scales.shape, SCALE_BYTES), content], dim=2).flatten(1)


PACKERS: dict[Type, Callable[[Tensor, Tensor], Tensor]] = {
    Type.Q4_0: _pack_q4_0,
    Type.Q8_0: _pack_q8_0,
    Type.TQ1_0: lambda integers, scales: TQ1_0.pack(integers, scales.float()),
    Type.TQ2_0: lambda integers, scales: TQ2_0.pack(integers, scales.float()),
}
