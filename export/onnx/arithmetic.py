"""ONNX Runtime's arithmetic in plain PyTorch: inputs are rounded to INT8 in blocks where its products do so, all else is float32."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from lobit.export.block_inputs import RoundedInputs, round_blocks
from lobit.export.onnx.weights import FAST_BLOCK, form_of, rounds_inputs
from lobit.export.target import Spec
from lobit.model import Transformer, replace_layers, twin
from lobit.quant_recipes.integer import IntegerLinear
from lobit.quant_recipes.recipe import Recipe


def arithmetic(model: Transformer, spec: Spec) -> tuple[Transformer, Recipe]:
    """See `Target.arithmetic`."""
    recipe = replace(spec.recipe, kv_bits=None, compute_bits=32)
    if spec.portable:
        return model, recipe
    changed = twin(model)
    replace_layers(changed, IntegerLinear, _fused)
    return changed, recipe


def _fused(linear: IntegerLinear) -> nn.Module:
    """The layer as MatMulNBits computes it, which has no product of INT8 inputs with blocks below `FAST_BLOCK`."""
    block = form_of(linear.rule.weights, linear.integers.shape[1], rows=False, fused=True).block
    if block and block >= FAST_BLOCK and rounds_inputs(linear.rule):
        return RoundedInputs(linear, partial(round_blocks, block=block))
    return RoundedInputs(linear, _unchanged)


def _unchanged(x: Tensor) -> Tensor:
    return x
