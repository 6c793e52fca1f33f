"""Rotary position embedding: its frequencies as the families scale them, tables of cosine and sine, and the quarter turn of its pairs.

Shapes: T positions, E head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's change of the rotary frequencies (transformers `_compute_llama3_parameters`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class LinearScaling:
    """All rotary frequencies divided by one factor (transformers `_compute_linear_scaling_rope_parameters`)."""

    factor: float


@dataclass(frozen=True)
class LongRopeScaling:
    """One divisor per rotary frequency, and a factor on cosine and sine (transformers `_compute_longrope_parameters`)."""

    factors: tuple[float, ...]
    attention_factor: float


@dataclass(frozen=True)
class YarnScaling:
    """Slow frequencies are divided by a factor, fast ones are unchanged, with a ramp between (transformers `_compute_yarn_parameters`)."""

    factor: float
    attention_factor: float
    """Factor on cosine and sine."""
    original_context: int
    beta_fast: float = 32.0
    """A frequency that makes this many turns within the original context, or more, is unchanged."""
    beta_slow: float = 1.0
    """A frequency that makes this many turns within the original context, or fewer, is divided by the whole factor."""
    truncate: bool = True
    """Whether the ramp begins and ends at whole indices of frequencies."""

    def divided(self, theta: float, dim: int) -> Tensor:
        """Share of each frequency [dim / 2] that is divided by the factor, from 0 to 1."""
        turns = (self.beta_fast, self.beta_slow)
        first, last = (dim * math.log(self.original_context / (2 * math.pi * each)) / (2 * math.log(theta)) for each in turns)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        last += 0.001 if first == last else 0
        return ((torch.arange(dim // 2).float() - first) / (last - first)).clamp(0, 1)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one layer.

    The two halves of the first `dim` entries of a head are the real and imaginary parts; checkpoints that pair neighbours
    have the rows of their q and k permuted when they are read (`families.py`).
    """

    theta: float
    dim: int
    scaling: Llama3Scaling | LinearScaling | LongRopeScaling | YarnScaling | None = None

    def frequencies(self) -> tuple[Tensor, float]:
        """Angles per position [dim / 2] in radians, and the factor on cosine and sine."""
        inverse = self.theta ** (-torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim)
        match self.scaling:
            case LinearScaling(factor):
                return inverse / factor, 1.0
            case LongRopeScaling(factors, attention_factor):
                return inverse / torch.tensor(factors), attention_factor
            case YarnScaling(factor, attention_factor):
                divided = self.scaling.divided(self.theta, self.dim)
                return inverse / factor * divided + inverse * (1 - divided), attention_factor
            case Llama3Scaling(factor, low, high, context):
                wavelength = 2 * math.pi / inverse
                smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
                return (1 - smooth) * inverse / factor + smooth * inverse, 1.0
        return inverse, 1.0

    def spectrum(self, width: int) -> tuple[Tensor, Tensor]:
        """Angles per position and factors on cosine and sine for every entry of a head [width]; 0 and 1 where it does not turn."""
        frequencies, factor = self.frequencies()
        still = width - self.dim
        turning = torch.cat([frequencies, frequencies, torch.zeros(still)])
        return turning, torch.cat([torch.full((self.dim,), factor), torch.ones(still)])


class Table(NamedTuple):
    """Cosine and sine of a run of positions for every entry of a head, each [T, 1, E]."""

    cos: Tensor
    sin: Tensor


Tables = dict[Rope, Table]


def rotary_table(positions: Tensor, frequencies: Tensor, factors: Tensor) -> Table:
    """Cosine and sine of `positions` [T] for one spectrum (`Rope.spectrum`)."""
    angles = positions.float()[:, None, None] * frequencies
    return Table(angles.cos() * factors, angles.sin() * factors)


class RotateHalf(nn.Module):
    """(a, b, rest) -> (-b, a, 0) over the last axis, a and b of `dim` / 2 entries each: a quarter turn of every rotary pair."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        a, b, rest = x.split([self.dim // 2, self.dim // 2, x.shape[-1] - self.dim], dim=-1)
        return torch.cat([-b, a, torch.zeros_like(rest)], dim=-1)
