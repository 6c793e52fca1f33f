"""The bytes of a quantized checkpoint, from the shapes alone.

They are those of the tensors that `quantized.save_checkpoint` writes; the file also has a header with names and shapes. Papers count a
little differently: a ternary weight as log2(3) = 1.58 bits where five in a byte take 1.6, and neither norms nor the float32 scale of
each row [Spectra Table 4; Bonsai Table 1]. For groups of 128 they agree: 4.25 bits are 4 and a scale of 32 [Spectra section 4.2].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lobit.model import Config
from lobit.quant_recipes.apply import LayerPlan, layer_plans, skeleton
from lobit.quant_recipes.packing import layout_of
from lobit.quant_recipes.recipe import Recipe

KINDS = ("embedding", "head", "attention", "mlp")
FLOAT = 4
"""Bytes of a scale, and of each entry of norms and biases."""


@dataclass(frozen=True)
class Size:
    """The bytes of one kind of weights."""

    kind: str
    """`embedding`, `head`, `attention`, `mlp`, `norms` or `biases`."""
    format: str
    """`int4 group 32`, `float16`, `float32`, …"""
    parameters: int
    bytes: int
    """Bytes of the packed integers and their scales, or of the floats."""


def kind_of(name: str) -> str:
    """The kind of weights of a layer such as `layers.0.mlp.down`."""
    return next(kind for kind in KINDS if kind in name.split("."))


def checkpoint_sizes(config: Config, recipe: Recipe) -> list[Size]:
    """The bytes of each kind of weights in each format; a shared head takes none."""
    found: dict[tuple[str, str], Size] = {}
    for size in _tensors(config, recipe):
        key = size.kind, size.format
        before = found.get(key, Size(*key, 0, 0))
        found[key] = Size(*key, before.parameters + size.parameters, before.bytes + size.bytes)
    return list(found.values())


def checkpoint_bytes(config: Config, recipe: Recipe) -> int:
    """The bytes of all tensors together."""
    return sum(size.bytes for size in checkpoint_sizes(config, recipe))


def _tensors(config: Config, recipe: Recipe) -> Iterator[Size]:
    """The size of each layer's weight, of each norm and of each bias."""
    for layer_plan in layer_plans(config, recipe):
        if not layer_plan.shared_with:
            yield size_of(layer_plan, recipe)
    for kind, count in norms_and_biases(config):
        yield Size(kind, "float32", count, FLOAT * count)


def norms_and_biases(config: Config) -> Iterator[tuple[str, int]]:
    """The kind, `norms` or `biases`, and the number of entries of each such tensor."""
    for name, tensor in skeleton(config).named_parameters():
        if "norm" in name or name.endswith(".bias"):
            yield "norms" if "norm" in name else "biases", tensor.numel()


def size_of(layer_plan: LayerPlan, recipe: Recipe) -> Size:
    """The size of a linear's or embedding's weight: packed row by row with float32 scales, or floats of the recipe's width."""
    (out, inner), kind = layer_plan.shape, kind_of(layer_plan.name)
    if layer_plan.rule is None:
        return Size(kind, f"float{recipe.float_bits}", out * inner, out * inner * recipe.float_bits // 8)
    grid = layer_plan.rule.weights
    layout = layout_of(grid.bits)
    row = (layout.width(inner) if layout else inner) + FLOAT * (inner // (grid.group_size or inner))
    return Size(kind, str(grid), out * inner, out * row)
