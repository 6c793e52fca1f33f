"""Weights as Core ML packages store them: integers with scales in blocks, ternary and binary codes with a table of values, floats."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lobit.export.coreml.mil import ARRAYS, BITS, SMALLEST_BLOB, Function, Value, immediate
from lobit.model import weight_of
from lobit.quant_recipes.apply import LayerPlan
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear
from lobit.quant_recipes.recipe import WeightGrid

Form = Literal["uint1", "uint2", "int4", "int8"]
BLOCKWISE, TABLE = "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense"
TABLES: dict[str, tuple[int, ...]] = {"uint1": (-1, 1), "uint2": (-1, 0, 1, 0)}
"""Integers that the codes of a table stand for; the last of four is not used."""


def form_of(grid: WeightGrid) -> Form:
    """The type that holds a grid's integers; values do not change."""
    if grid.bits <= 2:
        return "uint1" if grid.bits == 1 else "uint2"
    return "int4" if grid.bits <= 4 else "int8"


def stored_bytes(layer_plan: LayerPlan, scale_bytes: int) -> int:
    """Bytes of a layer's integers and scales, or of its floats, where a scale or a float has `scale_bytes`."""
    (out, inner), rule = layer_plan.shape, layer_plan.rule
    if rule is None:
        return out * inner * scale_bytes
    grid, form = rule.weights, form_of(rule.weights)
    scales = grid.shards or out * (inner // (grid.group_size or inner))
    values = scales * len(TABLES[form]) if form in TABLES else scales
    return -(-out * inner * BITS[form] // 8) + values * scale_bytes


def weight_value(function: Function, module: nn.Module) -> Value:
    """The weight [out, in] of a layer or an embedding, stored once however often it is used."""
    if not isinstance(module, (IntegerLinear, IntegerEmbedding)):
        return function.weight("weight", weight_of(module))
    integers, grid = module.integers, module.rule.weights
    key, form = id(integers), form_of(grid)
    scale = module.scale[:: len(module.scale) // grid.shards] if grid.shards else module.scale
    stored = function.blobs.add(key, integers, form)
    if form in TABLES:
        values = (scale[..., None] * torch.tensor(TABLES[form], dtype=torch.float32, device=scale.device))[..., None]
        data = {"indices": stored, "lut": _floats(function, ("values", key), values)}
        return function.compressed(TABLE, "weight", key, integers.shape, data)
    data = {"data": stored, "scale": _floats(function, ("scale", key), scale)}
    return function.compressed(BLOCKWISE, "weight", key, integers.shape, data)


def _floats(function: Function, key: object, values: Tensor) -> object:
    """Scales as floats of the type that the function computes in, which holds them exactly (`target.check`)."""
    if values.numel() >= SMALLEST_BLOB:
        return function.blobs.add(key, values, function.floats)
    known = torch.zeros(values.shape) if values.is_meta else values  # a model without memory has sizes alone
    return immediate(known.numpy().astype(ARRAYS[function.floats]), function.floats)


def inexact(module: nn.Module) -> int:
    """Number of a layer's scales that half precision does not hold."""
    if not isinstance(module, (IntegerLinear, IntegerEmbedding)):
        return 0
    return int((module.scale.half().float() != module.scale).sum())
