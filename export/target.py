"""What every target has: one module with the same names, found here by the target's name and imported on use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from lobit.errors import MissingPartError, TargetError, listed
from lobit.export.stages import Count
from lobit.model import Config, Transformer
from lobit.quant_recipes.recipe import Recipe
from lobit.quiet import quiet_python
from lobit.runtime.manifest import CacheInfo, Delegation, FileEntry, Method, State, TensorGroup
from lobit.stage_cache import StageCache
from lobit.targets import TARGETS


@dataclass(frozen=True)
class Spec:
    """What a program is made for."""

    recipe: Recipe
    context: int
    """Positions that it holds."""
    chunk: int
    """The most tokens in one call."""
    portable: bool = False
    """Standard operators alone, where the target has others too."""
    all_logits: bool = False
    """Of every token of a call, not of the last alone."""
    bos: int | None = None
    """The token that begins a text."""
    stop: tuple[int, ...] = ()
    """Tokens that end one."""
    threads: int = 0
    """Of the runtime, where it is not told otherwise; 0: one per core."""


RunGraph = Callable[[Tensor, Tensor], Tensor]
"""(tokens int64 [1, T], input_pos int64 [1]) -> logits float32 [1, 1, V] of the last; keeps what it read."""


@dataclass
class Lowered:
    """A program in the target's own form."""

    payload: Any
    """What the target's `write` puts into files."""
    methods: list[Method]
    states: list[State]
    delegation: Delegation


@dataclass(frozen=True)
class Needs:
    """What a program takes besides its weights."""

    parts: int
    """Graphs that are lowered."""
    overhead_bytes: int
    """Of the file."""
    device_peak_bytes: int
    """Of memory when the context is full, weights included."""


@dataclass(frozen=True)
class Costs:
    """What exports to a target take on the machine where they run, fitted to exports of many sizes."""

    imports_seconds: float
    """Of loading the exporter."""
    imports_bytes: int
    """Of the exporter before it has a model."""
    model_copies: float
    """Of the quantized model in memory."""
    head_copies: float
    """Of the head, besides."""
    seconds_per_parameter: Mapping[str, float]
    """Of each stage."""
    seconds_per_part: float
    """Of what is lowered."""


class Target(Protocol):
    """The names that a target's module has."""

    COSTS: Costs
    SLOW_GRAPH: bool
    """Whether `graph` runs so many operators one by one that a large model takes minutes."""

    def versions(self) -> dict[str, str]:
        """Of the packages that the target is lowered with."""

    def arithmetic(self, model: Transformer, spec: Spec) -> Recipe | None:
        """Changes the converted model, in place, to round its inputs as the target's products do.

        Returns:
            The recipe, with the key-value cache that the target has; None: the target computes as the recipe says, nothing is changed.
        """

    def graph(self, model: Transformer, spec: Spec) -> RunGraph | None:
        """The converted model's program before it is lowered or written, run by PyTorch; takes the model's layers over.

        Returns:
            None: its operators are the runtime's own, and `arithmetic` is what they compute.
        """

    def check(self, spec: Spec, config: Config) -> list[str]:
        """Every reason why the target cannot hold the model, before anything slow."""

    def step(self, spec: Spec) -> int:
        """The most tokens that are read in one call, of the `chunk` that was asked for."""

    def options(self, spec: Spec) -> dict[str, str | int | bool]:
        """What the program is made for besides, and how it is to be run, by names of the target's own."""

    def weights(self, spec: Spec, config: Config) -> list[TensorGroup]:
        """The bytes that each kind of weights will take in the files."""

    def cache(self, spec: Spec, config: Config) -> CacheInfo:
        """The key-value cache in bytes."""

    def needs(self, model: Transformer, spec: Spec) -> Needs:
        """What a program of the converted model will take; the model may have no memory for its weights."""

    def lower(self, model: Transformer, spec: Spec, kept: StageCache, count: Count) -> Lowered:
        """The converted model in the target's own form; takes its layers over, and keeps what is finished."""

    def write(self, lowered: Lowered, folder: Path, count: Count) -> list[FileEntry]:
        """Writes the target's files into the folder."""


def find_target(name: str) -> Target:
    """The module of a target.

    Raises:
        TargetError: there is no such target.
        MissingPartError: what it needs is not installed.
    """
    if name not in TARGETS:
        raise TargetError(f"there is no target {name!r}: choose one of {', '.join(TARGETS)}")
    try:
        with quiet_python():
            return cast(Target, importlib.import_module(TARGETS[name].export))
    except ImportError as error:
        raise MissingPartError(f"target {name} needs a package that is not installed ({error}): pip install 'lobit[{name}]'") from None


def check_target(name: str, spec: Spec, config: Config) -> None:
    """Refuses what a target cannot hold.

    Raises:
        TargetError: with all reasons at once.
    """
    problems = find_target(name).check(spec, config)
    if problems:
        raise TargetError(listed(problems, f"target {name} cannot hold recipe {spec.recipe.name}:"))
