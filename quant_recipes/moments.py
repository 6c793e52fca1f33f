"""Sums of products of a layer's inputs over a calibration text: all that GPTQ needs of the text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

STRIP = 256
"""Rows of a Hessian that are summed at once, each strip from its diagonal block on: the rest is the mirror image."""


def squares(inputs: Iterable[Tensor]) -> Tensor:
    """Σ x xᵀ [in, in] of inputs x [..., in]."""
    total = torch.zeros(0)
    for part in inputs:
        x = part.flatten(0, -2).float()
        total = total if len(total) else torch.zeros(x.shape[1], x.shape[1])
        _add_squares(total, x)
    return _mirrored(total)


def _mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle is that of `upper`."""
    return upper.triu() + upper.triu(1).T


def moments(inputs: Iterable[Tensor], exact: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Σ x xᵀ and Σ (x̄ - x) xᵀ, each [in, in], of inputs x [..., in] and their counterparts x̄ in the float model."""
    total = drift = torch.zeros(0)
    for part, other in zip(inputs, exact, strict=True):
        x, moved = part.flatten(0, -2).float(), other.flatten(0, -2).float()
        if not len(total):
            total, drift = (torch.zeros(x.shape[1], x.shape[1]) for _ in range(2))
        _add_squares(total, x)
        with quick_sums():
            drift.addmm_((moved - x).T, x)
    return _mirrored(total), drift


def _add_squares(total: Tensor, x: Tensor) -> None:
    """Adds Σ x xᵀ of x [tokens, in] to the upper triangle of the sum [in, in]."""
    with quick_sums():
        for start in range(0, len(total), STRIP):
            total[start : start + STRIP, start:].addmm_(x[:, start : start + STRIP].T, x[:, start:])


@contextlib.contextmanager
def quick_sums() -> Iterator[None]:
    """Lets oneDNN round the inputs of float32 products to bfloat16, and nothing else: a sum of squares stays a sum of squares."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
