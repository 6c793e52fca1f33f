"""What every target has: one module with the same names, found here by the target's name and imported on use."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from lobit.errors import MissingPartError, TargetError, listed
from lobit.export.parts import Interpreter, Parts
from lobit.export.stages import Count
from lobit.kept import Kept
from lobit.model import Config, Transformer
from lobit.quant_recipes.recipe import Recipe
from lobit.quiet import quiet_python
from lobit.runtime.manifest import Delegation, FileEntry, Port, TensorGroup

TARGETS = {"xnnpack": "lobit.export.xnnpack"}
"""A target's name and its module."""


@dataclass(frozen=True)
class Spec:
    """What a program is made for."""

    recipe: Recipe
    context: int
    """Positions that it holds."""
    chunk: int
    """The most tokens in one call."""
    bos: int | None = None
    stop: tuple[int, ...] = ()


@dataclass
class Lowered:
    """A program in the target's own form."""

    payload: Any
    """What the target's `write` puts into files."""
    inputs: list[Port]
    outputs: list[Port]
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


class Target(Protocol):
    """The names that a target's module has."""

    def versions(self) -> dict[str, str]:
        """Of the packages that the target is lowered with."""

    def check(self, recipe: Recipe, config: Config) -> list[str]:
        """Every reason why the target cannot hold the model under the recipe, before anything slow."""

    def weights(self, recipe: Recipe, config: Config) -> list[TensorGroup]:
        """The bytes that each kind of weights will take in the files."""

    def needs(self, model: Transformer, spec: Spec) -> Needs:
        """What a program of the converted model will take; the model may have no memory for its weights."""

    def program(self, model: Transformer, spec: Spec) -> Parts:
        """The converted model in the target's form; takes the model's layers over."""

    def trace(self, parts: Parts, spec: Spec) -> Any:
        """The program's parts as exported graphs."""

    def run(self, parts: Parts, graphs: Any) -> Interpreter:
        """The traced graphs, run by PyTorch."""

    def lower(self, parts: Parts, spec: Spec, kept: Kept, count: Count) -> Lowered:
        """The program in the target's own form; what is finished is kept."""

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
            return cast(Target, importlib.import_module(TARGETS[name]))
    except ImportError as error:
        raise MissingPartError(f"target {name} needs a package that is not installed ({error}): pip install 'lobit[{name}]'") from None


def check_target(name: str, recipe: Recipe, config: Config) -> None:
    """Refuses what a target cannot hold.

    Raises:
        TargetError: with all reasons at once.
    """
    problems = find_target(name).check(recipe, config)
    if problems:
        raise TargetError(listed(problems, f"target {name} cannot hold recipe {recipe.name}:"))
