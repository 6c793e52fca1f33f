"""Specialists merged into one model: the weighted average of their parameters, with weights searched on held-out text.

Specialists are trained side by side from one base, with small updates: far from each other, their average is no model.

Source: MobileLLM-Pro section 6.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lobit.checkpoint import Weights, load_config
from lobit.errors import InputError, ModelError, listed, shown
from lobit.model import Config, Transformer, weight_of
from lobit.prequantized import FLOATS
from lobit.quant_recipes.apply import Progress, skeleton
from lobit.quant_recipes.quantized import is_checkpoint
from lobit.tokenizer_files import FILE_NAME

LONGEST_SEQUENCE = 512
"""Tokens that are read at once: their logits and the logits' gradients are in memory together."""
SHORTEST_TEXT = 16
"""Predicted tokens below which a loss says nothing."""
STEPS = 8
"""Of the search: more lowered the loss by less than 1e-4 nats, of trained specialists and of copies with noise."""

TINY = 1e-30
"""In the place of a slope of 0, which models that are equal have."""


class Specialists:
    """Float models of one architecture, read tensor by tensor.

    Attributes:
        config: of them all.
        weights: of each.
        dtype: holds the floats of every folder.

    Raises:
        InputError: fewer than two folders.
        ModelError: they cannot be read or averaged; every reason is named.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        if len(folders) < 2:
            raise InputError(f"{len(folders)} models are given, at least 2 are needed: name every model to merge")
        self.weights: list[Weights] = []
        problems = [problem for folder in folders for problem in self._open(folder)]
        problems += [problem for other in self.weights[1:] for problem in _differences(self.weights[0], other)]
        if problems:
            raise ModelError(listed(problems, "these models cannot be merged, give float models that were trained from one base:"))
        self.config = self.weights[0].config
        kinds = {FLOATS[one.headers[place.name][2]] for one in self.weights for place in one.places.values()}
        self.dtype = reduce(torch.promote_types, kinds)

    def _open(self, folder: Path) -> list[str]:
        """Adds a folder, or tells why not."""
        if is_checkpoint(folder):
            return [f"{folder} is a quantized checkpoint: merge the float models, and quantize the result"]
        try:
            weights = Weights(folder, load_config(folder))
        except ModelError as error:
            return [str(error).replace("\n", "\n  ")]
        if any(place.quantized for place in weights.places.values()):
            return [f"{folder} has quantized weights, and an average of them is not of their grid: merge the floats before rounding"]
        self.weights.append(weights)
        return []

    def average(self, name: str, weights: Sequence[float]) -> Tensor:
        """The average of one tensor, float32.

        The heaviest and what the others differ from it: equal tensors stay as they are, whatever the weights.
        """
        heaviest = max(range(len(weights)), key=weights.__getitem__)
        base = self.weights[heaviest].read(name)
        others = [i for i, weight in enumerate(weights) if weight and i != heaviest]
        return sum((weights[i] * (self.weights[i].read(name) - base) for i in others), start=base)


def _differences(first: Weights, other: Weights) -> list[str]:
    """Why a folder cannot be averaged with the first."""
    told = []
    for field in fields(Config):
        ours, theirs = (getattr(one.config, field.name) for one in (first, other))
        if ours != theirs:
            if isinstance(ours, tuple):  # the first of the layers that differ
                ours, theirs = next(pair for pair in itertools.zip_longest(ours, theirs) if pair[0] != pair[1])
            told.append(f"{other.folder} has {field.name} {shown(theirs)}, {first.folder} {shown(ours)}")
    ours, theirs = (one.folder / FILE_NAME for one in (first, other))
    if (ours.read_bytes() if ours.is_file() else None) != (theirs.read_bytes() if theirs.is_file() else None):
        told.append(f"{theirs} is not {ours} byte for byte: put the base's into both folders, if both were trained with it")
    return told


def normalize(weights: Sequence[float], count: int) -> list[float]:
    """Weights that sum to 1.

    Raises:
        InputError: not `count` numbers from 0, or all of them 0.
    """
    total = sum(weights)
    if len(weights) != count or not all(weight >= 0 for weight in weights) or not 0 < total < math.inf:
        raise InputError(f"weights {shown(list(weights))} are not usable: give {count} numbers from 0, not all 0, one for each model")
    return [weight / total for weight in weights]


def merge(specialists: Specialists, weights: Sequence[float]) -> Transformer:
    """M = Σ w_b θ_b in float32, for inference. Memory: one model and a few tensors.

    Equation 2 has a factor 1/n before the sum. With weights that sum to 1, as the paper has them, it would shrink the model
    by n; it is left out as a slip.

    Args:
        specialists: the θ_b.
        weights: as `normalize` gives them.

    Source: MobileLLM-Pro equation 2.
    """
    model = skeleton(specialists.config)
    state = {name: specialists.average(name, weights) for name in specialists.weights[0].places}
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tied:
        model.head.weight = weight_of(model.embedding)
    return model.eval().requires_grad_(False)


def held_out(tokens: Sequence[int], config: Config, bos: int | None, most: int) -> list[Tensor]:
    """Sequences [T] to measure the loss on, spread evenly over a text.

    Args:
        tokens: of the whole text.
        config: a sequence fits its context and has at most `LONGEST_SEQUENCE` tokens.
        bos: begins every sequence; None: nothing does.
        most: tokens of the text in all sequences together.

    Raises:
        InputError: fewer than `SHORTEST_TEXT` tokens would be predicted.
    """
    head = [] if bos is None else [bos]
    room = max(1, min(config.max_context - len(head), LONGEST_SEQUENCE - len(head), most))
    pieces = [head + list(tokens[start : start + room]) for start in range(0, len(tokens), room)]
    count = min(len(pieces), max(1, most // room))
    sequences = [torch.tensor(pieces[i * len(pieces) // count]) for i in range(count)]
    predicted = sum(len(sequence) - 1 for sequence in sequences)
    if predicted < SHORTEST_TEXT:
        raise InputError(f"{predicted} tokens of the held-out text would be predicted, at least {SHORTEST_TEXT} are needed: give more text")
    return [sequence for sequence in sequences if len(sequence) > 1]


def held_out_loss(model: Transformer, sequences: Sequence[Tensor]) -> float:
    """Nats per predicted token; parameters that require gradients get them."""
    count, total = sum(len(sequence) - 1 for sequence in sequences), 0.0
    for sequence in sequences:
        loss = F.cross_entropy(model(sequence[None, :-1])[0], sequence[1:], reduction="sum") / count
        if loss.requires_grad:
            loss.backward()
        total += loss.item()
    return total


@dataclass(frozen=True)
class Found:
    """Weights and held-out losses in nats per token, of float32 averages."""

    weights: list[float]
    """The best that was measured."""
    loss: float
    """With these weights."""
    uniform: float
    """Of the average with equal weights."""
    singles: list[float]
    """Of each specialist."""


def search(specialists: Specialists, sequences: Sequence[Tensor], steps: int = STEPS, progress: Progress | None = None) -> Found:
    """The weights with the least held-out loss.

    Exponentiated gradient descent over the simplex from equal weights: w ← softmax(log w - rate · ∂L/∂w), on all sequences at
    once. A step that does not lower the loss is taken back and tried shorter. The best of the walk, of equal weights and of
    each single specialist is chosen, by losses of models that were really averaged.

    Memory: the average, its gradient, and what one sequence needs.

    Args:
        specialists: what to merge.
        sequences: as `held_out` gives them.
        steps: of the walk; 0: only equal weights and single specialists are measured.
        progress: called after each model that was measured.
    """
    count = len(specialists.weights)
    done, total = itertools.count(1), count + 1 + steps

    def measure(weights: Tensor, with_slope: bool = False) -> tuple[float, Tensor]:
        model = merge(specialists, weights.tolist()).requires_grad_(with_slope)
        loss = held_out_loss(model, sequences)
        if progress:
            progress("held-out loss", next(done), total)
        return loss, _slope(model, specialists) if with_slope else weights

    corners = torch.eye(count, dtype=torch.float64)
    singles = [measure(corner)[0] for corner in corners]
    weights = corners.mean(0)
    uniform, slope = measure(weights, steps > 0)
    loss, rate = uniform, 1 / max(float(slope.max() - slope.min()), TINY)
    for _ in range(steps):
        tried = torch.softmax(weights.log() - rate * slope, 0)
        tried_loss, tried_slope = measure(tried, True)
        if tried_loss < loss:
            weights, loss, slope, rate = tried, tried_loss, tried_slope, 2 * rate
        else:
            rate /= 4
    best, chosen = min([(loss, weights.tolist()), *zip(singles, corners.tolist(), strict=True)])
    return Found(chosen, best, uniform, singles)


def _slope(model: Transformer, specialists: Specialists) -> Tensor:
    """∂L/∂w [n] along the simplex: the loss's gradient times the way from the average to each specialist."""
    slope = torch.zeros(len(specialists.weights), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        for i, specialist in enumerate(specialists.weights):
            way = specialist.read(name) - parameter.detach()
            slope[i] += (way * cast(Tensor, parameter.grad)).sum(dtype=torch.float64)
    return slope
