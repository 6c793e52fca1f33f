"""The entropy of a float model's weights, in bits, compared with the bits that a recipe spends on them [Spectra section 2.2]."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lobit.checkpoint import ROWS, Weights
from lobit.model import Config
from lobit.progress_callback import Progress
from lobit.quant_recipes.apply import layers_of
from lobit.quant_recipes.recipe import Recipe
from lobit.quant_recipes.rotate import rotated
from lobit.quant_recipes.sizes import checkpoint_sizes, kind_of

BINS = (16, 256, 4096)
"""Numbers of bins. Each divides the last one, so that one histogram gives all entropies."""


@dataclass(frozen=True)
class Entropy:
    """The entropy of all weights of one kind, over all layers."""

    kind: str
    """`embedding`, `attention`, `mlp` or `head`."""
    weights: int
    sigma: float
    """The weights' standard deviation."""
    gaussian_bits: float | None
    """Differential entropy of a Gaussian of this sigma, 0.5 log2(2 pi e sigma^2) [Figure 4]; None where all weights are equal."""
    shannon_bits: dict[int, float]
    """Entropy of the weights in N equal bins between the smallest and the largest, by N [Figure 3]."""
    recipe_bits: float
    """What the recipe spends on a weight in a checkpoint, scales included."""


@dataclass(frozen=True)
class Entropies:
    """The entropies of every kind of weights of a float model."""

    kinds: list[Entropy]
    source: str = "Spectra section 2.2, Figures 3 and 4"
    assumes: tuple[str, ...] = (
        "all layers of a kind together",
        "Gaussian: differential entropy at the same sigma, below 0 where sigma is below 0.24",
        "bins: equal ones from the smallest to the largest weight",
        "the recipe spends scales too",
    )


class _Range:
    """Number, variance, minimum and maximum of weights; a histogram needs the last two before it can count."""

    def __init__(self, parts: Iterable[Tensor]) -> None:
        self.count, total, squares, self.low, self.high = 0, 0.0, 0.0, math.inf, -math.inf
        for part in parts:
            self.count += part.numel()
            total += part.sum(dtype=torch.float64).item()
            squares += part.square().sum(dtype=torch.float64).item()
            low, high = torch.aminmax(part)
            self.low, self.high = min(self.low, low.item()), max(self.high, high.item())
        self.variance = max(squares / self.count - (total / self.count) ** 2, 0.0)


def entropies(weights: Weights, recipe: Recipe, progress: Progress | None = None) -> Entropies:
    """The entropies of each kind of weights. Two passes over the weights, one tensor in memory at a time.

    Args:
        weights: the weights of a float model.
        recipe: whose bits per weight are compared; where it rotates, the rotated weights are measured.
        progress: called after each tensor.
    """
    kinds: dict[str, list[str]] = {}
    for name, _ in layers_of(weights.model):
        if not (name == "head" and weights.config.tied):
            kinds.setdefault(kind_of(name), []).append(f"{name}.weight")
    count = itertools.count(1)
    read = rotated(weights.config, recipe, weights.read)
    total = 2 * sum(map(len, kinds.values()))

    def parts(kind: str) -> Iterator[Tensor]:
        for name in kinds[kind]:
            yield from read(name).split(ROWS)
            if progress:
                progress("entropy", next(count), total)

    return Entropies([_entropy(kind, functools.partial(parts, kind), weights.config, recipe) for kind in kinds])


def _entropy(kind: str, parts: Callable[[], Iterator[Tensor]], config: Config, recipe: Recipe) -> Entropy:
    """The entropy of one kind; each call of `parts` gives all its weights again."""
    known, counts = _Range(parts()), torch.zeros(BINS[-1], dtype=torch.float64)
    for part in parts():
        counts += torch.histc(part, BINS[-1], known.low, known.high)
    return Entropy(
        kind=kind,
        weights=known.count,
        sigma=math.sqrt(known.variance),
        gaussian_bits=gaussian_bits(known.variance),
        shannon_bits={bins: shannon_bits(counts.reshape(bins, -1).sum(1)) for bins in BINS},
        recipe_bits=8 * sum(size.bytes for size in checkpoint_sizes(config, recipe) if size.kind == kind) / known.count,
    )


def shannon_bits(counts: Tensor) -> float:
    """The entropy -Σ p log2 p of a distribution over bins with these counts."""
    shares = counts[counts > 0] / counts.sum()
    return -(shares * shares.log2()).sum().item() + 0.0


def gaussian_bits(variance: float) -> float | None:
    """The differential entropy of a Gaussian, 0.5 log2(2 pi e sigma^2); None where sigma is 0."""
    return 0.5 * math.log2(2 * math.pi * math.e * variance) if variance > 0 else None
