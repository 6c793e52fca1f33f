"""The precision of the floats that a recipe computes in, where that is not float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lobit.quant_recipes.recipe import Recipe


def to_half(x: Tensor) -> Tensor:
    """The float32 values x rounded to half precision; those beyond its largest value become infinite, as on an accelerator."""
    return x.half().float()


class HalfPrecision(TorchFunctionMode):
    """Rounds what every operation gives to half precision; inside of an operation, such as a product or a norm, sums are float32.

    Accelerators that compute in 16 bits keep their sums wider. It is for inference: rounding has no gradient.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return to_half(result) if isinstance(result, Tensor) and result.dtype == torch.float32 else result


def computing(recipe: Recipe | None) -> AbstractContextManager[Any]:
    """Computes what is inside the `with` block in the recipe's precision; None: that of a float model, which is float32."""
    return HalfPrecision() if recipe is not None and recipe.compute_bits == 16 else contextlib.nullcontext()
