"""Merges specialists into one model: the weighted average of their parameters, with weights searched on held-out text.

Specialists are trained in parallel from one base, with small updates: if they are far apart, their average is no useful model.

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
from lobit.progress_callback import Progress
from lobit.quant_recipes.apply import skeleton
from lobit.quant_recipes.quantized import is_checkpoint
from lobit.tokenizer_files import FILE_NAME

LONGEST_SEQUENCE = 512
"""Most tokens of a sequence: its logits and their gradients are in memory together."""
SHORTEST_TEXT = 16
"""With fewer predicted tokens than this, a loss says nothing."""
STEPS = 8
"""Steps of the search: more lowered the loss by less than 1e-4 nats, with trained specialists and with copies with noise."""

TINY = 1e-30
"""Stands in place of a difference of 0 between the slopes, which equal models have."""


class Specialists:
    """Float models of one architecture, read tensor by tensor.

    Attributes:
        config: the one that they all have.
        weights: the tensors of each.
        dtype: the narrowest type that holds the floats of every folder.

    Raises:
        InputError: there are fewer than two folders.
        ModelError: the folders cannot be read or averaged; every reason is named.
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
        """Adds a folder; returns why it cannot, or nothing."""
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
        """The weighted average of one tensor, float32.

        Computed as the heaviest specialist's tensor plus the weighted differences of the others from it: equal tensors stay as they are.
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
        InputError: they are not `count` numbers from 0 on, or all are 0.
    """
    total = sum(weights)
    if len(weights) != count or not all(weight >= 0 for weight in weights) or not 0 < total < math.inf:
        raise InputError(f"weights {shown(list(weights))} are not usable: give {count} numbers from 0, not all 0, one for each model")
    return [weight / total for weight in weights]


def merge(specialists: Specialists, weights: Sequence[float]) -> Transformer:
    """M = Σ w_b θ_b in float32, for inference. Memory: one model and a few tensors.

    Equation 2 has a factor 1/n before the sum. With weights that sum to 1, as they do in the paper, it would shrink the
    model by n; it is taken for a slip and left out.

    Args:
        specialists: the models with parameters θ_b.
        weights: the w_b, as `normalize` gives them.

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
        tokens: the tokens of the whole text.
        config: its context bounds a sequence, and so does `LONGEST_SEQUENCE`.
        bos: the token to put before every sequence, or None.
        most: the most tokens of the text in all sequences together.

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
    """The loss in nats per predicted token; parameters that require gradients get them."""
    count, total = sum(len(sequence) - 1 for sequence in sequences), 0.0
    for sequence in sequences:
        loss = F.cross_entropy(model(sequence[None, :-1])[0], sequence[1:], reduction="sum") / count
        if loss.requires_grad:
            loss.backward()
        total += loss.item()
    return total


@dataclass(frozen=True)
class Found:
    """The weights that the search chose, and held-out losses in nats per token, all of averages in float32."""

    weights: list[float]
    """The best weights that were measured."""
    loss: float
    """The loss with these weights."""
    uniform: float
    """The loss with equal weights."""
    singles: list[float]
    """The loss of each specialist alone."""


def search(specialists: Specialists, sequences: Sequence[Tensor], steps: int = STEPS, progress: Progress | None = None) -> Found:
    """The weights with the least held-out loss.

    Exponentiated gradient descent over the simplex from equal weights: w ← softmax(log w - rate · ∂L/∂w), on all sequences at
    once. A step that does not lower the loss is taken back and tried again at a quarter of its rate. The best of all steps, equal weights
    and single specialists is chosen, by losses of models that were actually averaged.

    Memory: the average, its gradient, and what one sequence needs.

    Args:
        specialists: what to merge.
        sequences: as `held_out` gives them.
        steps: of the descent; 0: only equal weights and single specialists are measured.
        progress: called after each model that is measured.
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
    """∂L/∂w [n] along the simplex: the loss's gradient times the difference of each specialist from the average."""
    slope = torch.zeros(len(specialists.weights), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        for i, specialist in enumerate(specialists.weights):
            way = specialist.read(name) - parameter.detach()
            slope[i] += (way * cast(Tensor, parameter.grad)).sum(dtype=torch.float64)
    return slope
