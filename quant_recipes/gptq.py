"""GPTQ: each weight makes up for the rounding of those before it, so that a layer's output on a calibration text changes least.

This module rounds one weight; `calibration.py` goes through a model. Source: Frantar et al. 2022, arXiv 2210.17323; Spectra section 4
(QuantLM: symmetric, groups of 128 at 3 and 4 bits).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lobit.errors import InputError, RecipeError
from lobit.quant_recipes.grid import choose_scale, dequantize, least_squares_scale
from lobit.quant_recipes.recipe import WeightGrid

DAMPING = 0.1
"""The share of the Hessian's mean diagonal that is added to its diagonal [GPTQ section 4, step 3]. GPTQ takes 0.01, with which the KL of
SmolLM2 on held-out text is 1.2 times as large (table in `quant_recipes/README.md`)."""
STRONGER = (1.0,)
"""Dampings to try, one after the other, where the one asked for leaves the Hessian without a Cholesky factor."""
RUN = 128
"""Columns that are rounded before the columns after them are updated [GPTQ section 4, step 2]."""
UNSEEN = 1e-6
"""The least importance of an input, as a share of the mean over inputs: groups of inputs that are always 0 get sensible scales too."""
TINY = 1e-30
"""Stands in place of a sum of squares of 0, of inputs or of a layer's output."""


def round_with_hessian(
    weight: Tensor, hessian: Tensor, grid: WeightGrid, *, act_order: bool = False, damping: float = DAMPING, block: int = RUN
) -> tuple[Tensor, Tensor, float]:
    """Integers [out, in] int8, scales [out, groups] float32 and `relative_error` of a weight [out, in].

    Weights of an input that is always 0 are rounded to nearest: no other weight can make up for them, nor they for another.

    Args:
        weight: float.
        hessian: Σ x xᵀ of the layer's inputs, [in, in].
        grid: whose scales are those of the range, or searched with the inputs' mean squares as weights. A group's scale is chosen
            when its turn comes, for its weights as corrected by then.
        act_order: rounds inputs with the largest diagonal first; the scales are then chosen for the weights as given.
        damping: a share of the mean diagonal; `STRONGER` is tried where it is not enough.
        block: columns that are rounded before the columns after them are updated; it changes speed only.

    Raises:
        RecipeError: the grid has another scale rule, or fewer than 3 bits.
        InputError: the Hessian is not that of any inputs.

    Source: GPTQ Algorithm 1; `act_order` as in IST-DASLab/gptq `gptq.py` with `static_groups`.
    """
    if not grid.is_computed:
        told = f"{grid} with scale rule {grid.scale_rule}"
        raise RecipeError(f"{told} cannot be rounded by GPTQ: take rule least_squares or range, and at least 3 bits")
    weight, (out, inner) = weight.detach().float(), weight.shape
    size, squares = grid.group_size or inner, importance_of(hessian)
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(inner)
    factor = _inverse_factor(hessian[order][:, order], damping)
    diagonal, places = factor.diagonal().tolist(), order.tolist()
    columns, integers = weight.T[order], torch.empty(inner, out, dtype=torch.int8)
    scales = calibrated_scale(weight, grid, squares).T.contiguous()
    for start, end in _runs(inner, size, block):
        errors = torch.empty(end - start, out)
        for i in range(start, end):
            if not act_order and i % size == 0:
                scales[i // size] = calibrated_scale(columns[i : i + size].T, grid, squares[i : i + size])[:, 0]
            scale = scales[places[i] // size]
            rounded = (columns[i] / scale).round_().clamp_(grid.q_min, grid.q_max)
            integers[places[i]] = rounded
            errors[i - start] = (columns[i] - rounded * scale) / diagonal[i]
            columns[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i - start], alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    found = integers.T.contiguous(), scales.T.contiguous()
    return *found, relative_error(weight, *found, hessian)


def catch_up(hessian: Tensor, drift: Tensor, damping: float = DAMPING) -> Tensor:
    """The matrix A [in, in] with which a weight W + W A gives on inputs x, as nearly as a weight can, what W gives on x̄.

    With it a layer makes up for the errors of those before it: this is the objective of GPTAQ [Li et al. 2025, arXiv
    2504.02692], solved before the layer is rounded instead of with each of its columns: A = D (H + λI)⁻¹.

    Args:
        hessian: H = Σ x xᵀ [in, in] of the inputs x that come through the rounded layers before.
        drift: D = Σ (x̄ - x) xᵀ [in, in], where x̄ is the input in the float model.
        damping: λ as a share of the Hessian's mean diagonal.
    """
    factor = _inverse_factor(hessian, damping)
    return drift @ factor.T @ factor


def importance_of(hessian: Tensor) -> Tensor:
    """Factors [in] on each input's squared errors when scales are searched: its sum of squares, or a little where that is 0."""
    squares = hessian.diagonal()
    return squares.clamp(min=UNSEEN * max(float(squares.mean()), TINY))


def calibrated_scale(weight: Tensor, grid: WeightGrid, importance: Tensor) -> Tensor:
    """Scales [out, groups] of weight [out, in] by the grid's rule, given the importance [in] of each input."""
    return least_squares_scale(weight, grid, importance) if grid.scale_rule == "least_squares" else choose_scale(weight, grid)


def _runs(inner: int, size: int, block: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `block` columns; a group of `size` that begins inside of one also ends there."""
    step = max(block // size, 1) * size
    for first in range(0, inner, step):
        last = min(first + step, inner)
        yield from ((start, min(start + block, last)) for start in range(first, last, block))


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U [in, in], float32, with UᵀU = (H + λI)⁻¹ [GPTQ section 4, step 3].

    With both axes reversed, U is the inverse of the Cholesky factor of H + λI, so that (H + λI)⁻¹ is never needed. Computed in float64.
    """
    turned = hessian.double().flip(0, 1)
    mean, added = float(turned.diagonal().mean()) or 1.0, 0.0
    for strength in (damping, *(more for more in STRONGER if more > damping)):
        turned.diagonal().add_((strength - added) * mean)
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not failed:
            inverse: Tensor = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False)
            return inverse.flip(0, 1).float()
        added = strength
    raise InputError(
        f"the Hessian [{len(turned)}, {len(turned)}] of a layer, mean diagonal {mean:.3g}, has no Cholesky factor, not even with "
        f"{STRONGER[-1]:g} of the mean added to its diagonal: calibrate on another text"
    )


def relative_error(weight: Tensor, integers: Tensor, scales: Tensor, hessian: Tensor) -> float:
    """How far rounding moves a layer's output on the calibration text: tr((W-Ŵ)H(W-Ŵ)ᵀ) / tr(WHWᵀ)."""
    moved, whole = (float((rows @ hessian).mul_(rows).sum()) for rows in (weight - dequantize(integers, scales), weight))
    return moved / max(whole, TINY)
