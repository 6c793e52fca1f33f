"""llama.cpp's arithmetic in plain PyTorch: inputs of products are rounded to INT8 in blocks or to half precision, as is the cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from lobit.export.block_inputs import RoundedInputs, round_blocks
from lobit.export.gguf.weights import F32, SMALL, Form, float_form, form_of
from lobit.export.target import Spec
from lobit.model import Transformer, twin
from lobit.quant_recipes.apply import layers_of
from lobit.quant_recipes.integer import IntegerLinear
from lobit.quant_recipes.precision import to_half
from lobit.quant_recipes.recipe import Recipe


def arithmetic(model: Transformer, spec: Spec) -> tuple[Transformer, Recipe]:
    """See `Target.arithmetic`. Gemma's embeddings are multiplied by the square root of the width, which is not rounded to bfloat16."""
    changed, floats = twin(model), float_form(spec.recipe)
    for name, layer in list(layers_of(changed)):
        kept = form_of(layer.rule.weights, layer.integers.shape[1], spec.smallest) if isinstance(layer, IntegerLinear) else floats
        if name != "embedding" and kept != F32:
            changed.set_submodule(name, RoundedInputs(layer, rounding(kept)))
    if changed.config.post_norms:
        changed.config = replace(changed.config, embedding_scale=math.sqrt(changed.config.hidden_size))
    return changed, replace(spec.recipe, kv_bits=16, compute_bits=32)


def rounding(kept: Form) -> Callable[[Tensor], Tensor]:
    """How the inputs of a product with weights of a form are rounded (ggml `type_traits_cpu`, `vec_dot_type`)."""
    if kept.block == 1:
        return to_half
    return partial(round_blocks, block=kept.block, half_scales=kept.block == SMALL)
