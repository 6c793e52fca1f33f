"""The interface of a target: a module with the names of `Target`, which is found here by the target's name and imported on use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lobit.errors import MissingPartError, TargetError, listed, shown
from lobit.export.stages import Count
from lobit.model import Config, Transformer, twin
from lobit.quant_recipes.integer import IntegerLinear
from lobit.quant_recipes.recipe import Recipe, Rule
from lobit.quiet import quiet_python
from lobit.runtime.manifest import CacheInfo, ClientInputs, Delegation, FileEntry, Method, State, TensorGroup
from lobit.stage_cache import StageCache
from lobit.targets import TARGETS


@dataclass(frozen=True)
class Spec:
    """What a program is made for."""

    recipe: Recipe
    context: int
    """Number of positions that the program can hold."""
    chunk: int
    """The most tokens in one call."""
    portable: bool = False
    """Whether to use standard operators alone, where the target has others too."""
    all_logits: bool = False
    """Whether a call gives the logits of all its tokens, not of the last alone."""
    bos: int | None = None
    """Id of the token that begins a text; None: there is none."""
    stop: tuple[int, ...] = ()
    """Ids of the tokens that end a text."""
    threads: int = 0
    """Threads that the runtime uses unless the user asks for another number; 0: one per core."""
    soc: str | None = None
    """The chip that the program is compiled for; None: the target's default, or the target has no such choice."""
    float32: bool = False
    """Whether to compute in float32, where the target computes in half precision otherwise."""
    explicit_cache: bool = False
    """Whether keys and values are inputs and outputs, where the target has states for them otherwise."""
    executorch: bool = False
    """Whether to write an ExecuTorch program, where the target has a form of its own otherwise."""
    smallest: bool = False
    """Whether weights take the fewest bytes that the target has for them, where others are read faster."""
    activations: Literal["int16"] | None = None
    """What the program computes with between its products, where the target has that choice; None: floats."""
    sequences: tuple[tuple[int, ...], ...] = ()
    """Tokens of a text, in sequences, on which the ranges of such integers are found."""
    encodings: Path | None = None
    """The file that says what such integers stand for, where they are found already."""


OWN_OPTIONS = {"portable": "onnx", "soc": "qnn", "activations": "qnn", "smallest": "gguf"} | dict.fromkeys(
    ("float32", "explicit_cache", "executorch"), "coreml"
)
"""Fields of `Spec` that one target alone has, and that target; the names of its options in a manifest, and on the command line."""


def odd_options(options: Mapping[str, Any]) -> list[str]:
    """Messages about values that no option of one target has; export makes none, and a manifest that was edited may."""
    kinds: dict[str, Callable[[Any], bool]] = {"soc": lambda value: isinstance(value, str), "activations": lambda value: value == "int16"}
    odd = {name: value for name, value in options.items() if not kinds.get(name, lambda value: isinstance(value, bool))(value)}
    return [f"option {name} is {shown(value)}" for name, value in odd.items()]


def foreign_options(spec: Spec, target: str) -> list[str]:
    """Messages about options that another target has."""
    given = {name: getattr(spec, name) for name, owner in OWN_OPTIONS.items() if owner != target and getattr(spec, name)}
    told = {name: f"--{name.replace('_', '-')}" + (f" {value}" if isinstance(value, str) else "") for name, value in given.items()}
    return [f"{option} is for target {OWN_OPTIONS[name]}: leave it out" for name, option in told.items()]


RunGraph = Callable[[Tensor, Tensor], Tensor]
"""(tokens int64 [1, T], input_pos int64 [1]) -> logits float32 [1, 1, V] of the last token, or [1, T, V]; keeps keys and values."""


class Reader(Protocol):
    """A model that reads a whole sequence at once (`runtime.parity.Scorer`)."""

    def read(self, tokens: list[int]) -> Callable[[Sequence[int]], NDArray[np.float32]]:
        """Reads tokens [T] from position 0; returns what gives the logits [n, V] at any positions [n] of them."""


@dataclass
class Lowered:
    """A program in the target's own form."""

    payload: Any
    """What the target's `write` puts into files."""
    methods: list[Method]
    states: list[State]
    delegation: Delegation
    client: ClientInputs | None = None


@dataclass(frozen=True)
class Needs:
    """What lowering and running a program takes, besides the weights in its files."""

    parts: int
    """Number of graphs that are lowered."""
    overhead_bytes: int
    """Bytes of the program's files that are not weights."""
    device_peak_bytes: int
    """Peak memory on the device when the context is full, weights included."""


@dataclass(frozen=True)
class Costs:
    """The time and memory of exports to a target on the machine where they run, fitted to exports of many sizes."""

    imports_seconds: float
    """Seconds that loading the exporter takes."""
    imports_bytes: int
    """Memory of the exporter before it has a model."""
    model_copies: float
    """Memory that the quantized model takes, as a multiple of its size."""
    head_copies: float
    """Memory that the head takes besides, as a multiple of its size."""
    seconds_per_parameter: Mapping[str, float]
    """Seconds of each stage for every parameter of the model."""
    seconds_per_part: float
    """Seconds for each graph that is lowered."""


class Target(Protocol):
    """The names that a target's module has. Models that are given to it stay as they are."""

    COSTS: Costs
    CHUNK: int
    """The most tokens in one call unless the user asks for another number."""
    OPERATOR_ERROR: float
    """Root mean square of an operator's errors relative to its results, where the device computes less exactly than `arithmetic` says;
    0: it does not. Parity's limit reckons with it."""
    SLOW_GRAPH: bool
    """Whether `graph` runs so many operators one by one that a large model takes minutes."""

    def versions(self) -> dict[str, str]:
        """Versions of the packages that models are lowered with."""

    def arithmetic(self, model: Transformer, spec: Spec) -> tuple[Transformer, Recipe]:
        """What the target computes, in plain PyTorch.

        Returns:
            A model whose products round their inputs as the target's do, the given one where these are the recipe's own; and the recipe
            with the key-value cache and the precision that the target has.
        """

    def graph(self, model: Transformer, spec: Spec) -> RunGraph | None:
        """The converted model's program before it is lowered or written, run by PyTorch.

        Returns:
            The program as a function; None: its operators are the runtime's own, and `arithmetic` gives what they compute.
        """

    def floor(self, model: Transformer, spec: Spec) -> tuple[Reader, Reader] | None:
        """What the program should compute, and the same with every operator off by as much as the device's are.

        Returns:
            None: `arithmetic` says what the program computes, and only the inputs of its products differ.
        """

    def check(self, spec: Spec, config: Config) -> list[str]:
        """Every reason why the target cannot hold the model, found before anything slow is done."""

    def step(self, spec: Spec) -> int:
        """The most tokens that one call reads: the `chunk` that was asked for, or fewer."""

    def options(self, spec: Spec) -> dict[str, str | int | bool]:
        """Options by the target's own names: what else the program is made for, and how it is to be run."""

    def weights(self, spec: Spec, config: Config) -> list[TensorGroup]:
        """The bytes that each kind of weights will take in the files."""

    def cache(self, spec: Spec, config: Config) -> CacheInfo:
        """The size of the key-value cache."""

    def needs(self, model: Transformer, spec: Spec) -> Needs:
        """What lowering and running a program of the converted model will take; the model may have no memory for its weights."""

    def lower(self, model: Transformer, spec: Spec, kept: StageCache, count: Count) -> Lowered:
        """The converted model in the target's own form; finished parts are put into `kept`."""

    def write(self, lowered: Lowered, folder: Path, count: Count) -> list[FileEntry]:
        """Writes the target's files into the folder."""


def with_rules(model: Transformer, change: Callable[[Rule], Rule]) -> Transformer:
    """A twin of a converted model, each of whose products has its rule changed; the model itself where none changes."""
    changed, other = twin(model), False
    for module in changed.modules():
        if isinstance(module, IntegerLinear):
            rule = change(module.rule)
            other, module.rule = other or rule != module.rule, rule
    return changed if other else model


def float_inputs(model: Transformer, recipe: Recipe) -> tuple[Transformer, Recipe]:
    """A converted model and its recipe without the rounding of products' inputs, for targets that compute these as floats."""
    rules = tuple(replace(rule, activation_bits=None) for rule in recipe.rules)
    return with_rules(model, lambda rule: replace(rule, activation_bits=None)), replace(recipe, rules=rules)


def find_target(name: str) -> Target:
    """The module of a target.

    Raises:
        TargetError: there is no such target.
        MissingPartError: a package that the target needs is not installed.
    """
    if name not in TARGETS:
        raise TargetError(f"there is no target {name!r}: choose one of {', '.join(TARGETS)}")
    try:
        with quiet_python():
            return cast(Target, importlib.import_module(TARGETS[name].export))
    except ImportError as error:
        raise MissingPartError(f"target {name} needs a package that is not installed ({error}): pip install 'lobit[{name}]'") from None


def problems_of(name: str, spec: Spec, config: Config, folder: Path | None) -> list[str]:
    """Every reason why a target cannot hold a model or its tokenizer, found before anything slow is done.

    Args:
        name: of the target. Where its files hold the tokenizer too, its module has `check_tokenizer(config, folder)`.
        spec: what the program is made for.
        config: the model.
        folder: the model's, which has the tokenizer; None: that is not asked for.
    """
    module = find_target(name)
    check_tokenizer: Callable[[Config, Path], list[str]] | None = getattr(module, "check_tokenizer", None)
    return module.check(spec, config) + (check_tokenizer(config, folder) if check_tokenizer and folder else [])


def check_target(name: str, spec: Spec, config: Config, folder: Path | None = None) -> None:
    """Refuses what a target cannot hold (`problems_of`).

    Raises:
        TargetError: with all reasons at once.
    """
    problems = problems_of(name, spec, config, folder)
    if problems:
        raise TargetError(listed(problems, f"target {name} cannot hold recipe {spec.recipe.name}:"))
