"""Runs a calibration text through a model, block by block, and rounds the layers on the inputs that they get.

A layer is rounded on the inputs that the rounded layers before it give, so that it also makes up for their errors: the text runs through
the float model too, and a layer is to give on the rounded model's inputs what it gives on the float model's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lobit.errors import InputError
from lobit.model import Attend, Block, CausalAttention, Transformer, rotary_tables, weight_of
from lobit.progress_callback import Progress
from lobit.quant_recipes.apply import Integers, arrange
from lobit.quant_recipes.fake_quant import attention_for
from lobit.quant_recipes.gptq import DAMPING, catch_up, relative_error, round_with_hessian
from lobit.quant_recipes.grid import dequantize
from lobit.quant_recipes.integer import quantize_linear
from lobit.quant_recipes.moments import moments, squares
from lobit.quant_recipes.recipe import Recipe, WeightGrid
from lobit.rope import Tables

TOGETHER = 2048
"""Tokens that go through a block at once: few enough that their activations stay in the processor's cache."""
PRODUCT = torch.bfloat16 if torch.cpu.get_capabilities().get("avx512_bf16") else torch.float32
"""The type in which linear layers and attention are computed: bfloat16 where the processor multiplies it natively, which is several times
quicker than float32. On stories260k the KL after calibration is the same within the spread of the choice of sequences."""


class LayerError(NamedTuple):
    """`relative_error` of one layer, on inputs that come through the rounded layers before it.

    The weight that it compares with is already corrected for the rounding of the layers before (`gptq.catch_up`).
    """

    name: str
    nearest: float
    """The error when the original weight is rounded to nearest."""
    gptq: float


@dataclass(frozen=True)
class Calibrated:
    """The layers that were rounded, as `apply.convert` takes them, and each one's error."""

    integers: dict[str, Integers] = field(default_factory=dict)
    errors: list[LayerError] = field(default_factory=list)


@torch.no_grad()
def calibrate(
    model: Transformer,
    recipe: Recipe,
    sequences: Tensor,
    *,
    act_order: bool = False,
    damping: float = DAMPING,
    progress: Progress | None = None,
) -> Calibrated:
    """Rounds the layers whose rule says so, one after the other, on inputs that come through the rounded layers before them.

    On these inputs a layer is to give what it gives in the float model.

    An embedding that is the head too is rounded first, on what the head reads in the float model; another one to nearest.

    In place: the model then holds the rounded weights, as floats. Layers under other rules stay floats as they are. A block that runs
    several times is rounded on the inputs of all its runs; those of the later runs come from the block before it was rounded.

    Memory: the model; for the rounded and the float model each, the residual stream of all sequences in float32 and the attention's
    output or the feed-forward's input in `PRODUCT`; and two sums of products at a time.

    Args:
        model: in float32.
        recipe: says which layers are rounded, and to which grids.
        sequences: tokens [n, length], int64.
        act_order: as in `round_with_hessian`.
        damping: as in `round_with_hessian`.
        progress: called after each step.

    Raises:
        RecipeError: the recipe does not fit the model.
        InputError: weights, or what they compute, are not finite.
    """
    arrange(model, recipe)
    layers = _LayerByLayer(model, recipe, sequences, act_order, damping, progress)
    with _QuickProducts():
        layers.embedding()
        for index in range(len(model.blocks)):
            layers.block(index)
        layers.head()
    return layers.found


class _Side:
    """Takes all sequences through one version of the model, rounded or float, block by block.

    Args:
        streams: the embedded tokens [B, T, D] of each part of the text.
        tables: of the rotary embedding.
        attend: attention over whole sequences.
        repeats: how often each block runs in a row.
    """

    def __init__(self, streams: list[Tensor], tables: Tables, attend: Attend, repeats: int) -> None:
        self.streams, self.tables, self.attend, self.repeats = streams, tables, attend, repeats

    def enter(self, block: Block, first: int) -> None:
        """Begins a block, whose first run is layer `first`."""
        self.block, self.first = block, first
        self.starts = [x.clone() for x in self.streams] if self.repeats > 1 else []
        self.runs = [(first, x) for x in self.streams]
        for last in range(first, first + self.repeats - 1):
            self.runs += [(last + 1, self._through(x, last)) for layer, x in self.runs if layer == last]
        self.kept: list[Tensor] = []

    def _through(self, x: Tensor, layer: int) -> Tensor:
        return self.block(x, layer, self.tables, self.attend)  # type: ignore[no-any-return]

    def to_attention(self) -> Iterator[Tensor]:
        """The inputs of q, k and v."""
        return (self.block.attention_norm(x) for _, x in self.runs)

    def to_output(self) -> Iterator[Tensor]:
        """The inputs of attention's output product; they also stay in `self.kept`."""
        attention, block = self.block.attention, self.block
        mixed = (attention.output(self.attend(layer, *block.enter(x, self.tables))) for layer, x in self.runs)
        self.kept = [y.to(PRODUCT) for y in _before(attention, "o", mixed)]
        return iter(self.kept)

    def to_mlp(self) -> Iterator[Tensor]:
        """Adds attention to the streams and returns the inputs of gate and up; they also stay in `self.kept`."""
        for i, (_, x) in enumerate(self.runs):
            x += self.block.post_attention_norm(self.block.attention.o(self.kept[i]))
            self.kept[i] = self.block.mlp_norm(x).to(PRODUCT)
        return iter(self.kept)

    def to_down(self) -> Iterator[Tensor]:
        """The inputs of the down product."""
        return _before(self.block.mlp, "down", (self.block.mlp(y) for y in self.kept))

    def leave(self) -> None:
        """Adds the feed-forward to the streams, or takes them through all runs of a block that runs several times."""
        for (_, x), y in zip(self.runs, self.kept, strict=True):
            x += self.block.post_mlp_norm(self.block.mlp(y))
        for layer in range(self.first, self.first + self.repeats) if self.starts else ():
            self.starts = [self._through(x, layer) for x in self.starts]
        self.streams = self.starts or self.streams


class _LayerByLayer:
    """Takes the text through the rounded and the float model at the same time, and rounds layer after layer."""

    def __init__(
        self, model: Transformer, recipe: Recipe, sequences: Tensor, act_order: bool, damping: float, progress: Progress | None
    ) -> None:
        self.model, self.recipe, self.act_order, self.damping, self.progress = model, recipe, act_order, damping, progress
        self.found, self.done = Calibrated(), 0
        self.tables = rotary_tables(model.config, torch.arange(sequences.shape[1]))
        self.parts = sequences.split(max(1, TOGETHER // sequences.shape[1]))
        self.tied = model.config.tied
        rounds_table = self.tied and bool(self._grids(["embedding"]))
        self.steps = 4 * len(model.blocks) + (len(self.parts) if rounds_table else 0) + (not self.tied)

    def _side(self, attend: Attend) -> _Side:
        """A side at the first block, its streams embedded with the embedding as it is now."""
        streams = [self.model.embed(part) for part in self.parts]
        return _Side(streams, self.tables, attend, self.model.config.repeats)

    def embedding(self) -> None:
        """Rounds the embedding, on what the head reads in the float model if the head shares it, and begins both sides."""
        plain = _Attention(self.model.config)
        self.exact, grids = self._side(plain), self._grids(["embedding"])
        if grids:
            weight = weight_of(self.model.embedding)
            hessian = squares(self._to_head(plain)) if self.tied else torch.eye(weight.shape[1])
            self._round_layers(grids, hessian, torch.zeros_like(hessian))
        self.rounded = self._side(attention_for(self.recipe, plain))

    def _to_head(self, attend: Attend) -> Iterator[Tensor]:
        """The inputs of the head in the model as it is now."""
        for part in self.parts:
            yield self.model.norm(self.model.run(self.model.embed(part), self.tables, attend))
            self._advance()

    def block(self, index: int) -> None:
        """Rounds a block in four steps and takes both sides through it."""
        block, name = self.model.blocks[index], f"layers.{index}"
        for side, version in ((self.exact, copy.deepcopy(block)), (self.rounded, block)):
            side.enter(version, index * self.model.config.repeats)
        self._round([f"{name}.attention.{part}" for part in "qkv"], _Side.to_attention)
        self._round([f"{name}.attention.o"], _Side.to_output)
        self._round([f"{name}.mlp.gate", f"{name}.mlp.up"], _Side.to_mlp)
        self._round([f"{name}.mlp.down"], _Side.to_down)
        for side in (self.exact, self.rounded):
            side.leave()

    def head(self) -> None:
        """Rounds a head that does not share the embedding, on what the last block gives."""
        if not self.model.config.tied:
            self._round(["head"], lambda side: (self.model.norm(x) for x in side.streams))

    def _grids(self, names: list[str]) -> dict[str, WeightGrid]:
        """The grids of those of the layers that GPTQ rounds."""
        return {name: rule.weights for name in names if (rule := self.recipe.rule_for(name)) and rule.rounding == "gptq"}

    def _round(self, names: list[str], inputs: Callable[[_Side], Iterator[Tensor]]) -> None:
        """Rounds those of the layers whose rule says so; all have the same inputs."""
        rounded, exact, grids = inputs(self.rounded), inputs(self.exact), self._grids(names)
        if grids:
            self._round_layers(grids, *moments(rounded, exact))
        self._advance()

    def _advance(self) -> None:
        self.done += 1
        if self.progress:
            self.progress("calibrate", self.done, self.steps)

    def _round_layers(self, grids: dict[str, WeightGrid], hessian: Tensor, drift: Tensor) -> None:
        """Rounds layers that have the same inputs."""
        weights = {name: weight_of(self.model.get_submodule(name)).detach() for name in grids}
        for name, weight in weights.items():
            _check_finite(name, weight, hessian + drift)
        move = catch_up(hessian, drift, self.damping)
        for name, weight in weights.items():
            self._round_layer(name, weight, grids[name], hessian, move)

    def _round_layer(self, name: str, weight: Tensor, grid: WeightGrid, hessian: Tensor, move: Tensor) -> None:
        wanted = weight + weight @ move
        integers, scales, error = round_with_hessian(wanted, hessian, grid, act_order=self.act_order, damping=self.damping)
        nearest = relative_error(wanted, *quantize_linear(weight, grid), hessian)
        self.found.integers[name] = integers, scales
        self.found.errors.append(LayerError(name, nearest, error))
        weight.copy_(dequantize(integers, scales))


def _check_finite(name: str, weight: Tensor, sums: Tensor) -> None:
    for what, values in {"weights": weight, "sums of inputs on the calibration text": sums}.items():
        if not values.isfinite().all():
            count = f"{int((~values.isfinite()).sum())} of {values.numel()}"
            raise InputError(f"{count} {what} of {name} are not finite: take another text, or a model whose weights are finite")


def _before(part: nn.Module, name: str, outputs: Iterator[Tensor]) -> Iterator[Tensor]:
    """The inputs of a part's last product `name`, where `outputs` computes what the part gives."""
    product = getattr(part, name)
    setattr(part, name, nn.Identity())
    try:
        yield from outputs
    finally:
        setattr(part, name, product)


class _QuickProducts(TorchFunctionMode):
    """Computes linear layers and attention in `PRODUCT`, norms in float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.linear, F.scaled_dot_product_attention):
            rounded = [x.to(PRODUCT) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
            return func(*rounded, **(kwargs or {})).to(args[0].dtype)
        if func is F.rms_norm:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


class _Attention(CausalAttention):
    """Attention over whole sequences, without a mask where a token sees all tokens before it, which takes less than half the time."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self.config.layers[layer].window
        if self.config.attention_softcap is not None or (window is not None and window < q.shape[1]):
            return super().__call__(layer, q, k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.config.scale, enable_gqa=True).transpose(1, 2)
