"""GPTQ: each weight makes up for the rounding of those before it, so that a layer's output on a calibration text changes least.

Source: Frantar et al. 2022, arXiv 2210.17323; Spectra section 4 and appendix A.1 (QuantLM: symmetric, groups of 128 at 3 and 4
bits, 512 sequences of 2048 tokens, embedding and head not quantized).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lobit.errors import InputError, RecipeError
from lobit.model import Block, CausalAttention, Transformer, rotary_tables, weight_of
from lobit.quant_recipes.apply import Integers, Progress, check, untie
from lobit.quant_recipes.fake_quant import FakeQuantizedAttention
from lobit.quant_recipes.grid import choose_scale, dequantize, least_squares_scale
from lobit.quant_recipes.integer import quantize_linear
from lobit.quant_recipes.recipe import Recipe, WeightGrid

DAMPING = 0.01
"""Of the Hessian's mean diagonal, added to its diagonal [GPTQ section 4, step 3]."""
STRONGER = (0.1, 1.0)
"""Damping that is tried where less is not enough."""
RUN = 128
"""Columns that are rounded before the columns after them are updated [GPTQ section 4, step 2]."""
TINY = 1e-30
"""In the place of an output of 0."""
TOGETHER = 2048
"""Tokens that go through a block at once: what they need stays in the processor's cache."""
STRIP = 256
"""Columns of a Hessian that are summed at once, from the diagonal on: the rest is their mirror image."""
PRODUCT = torch.bfloat16 if torch.cpu.get_capabilities().get("avx512_bf16") else torch.float32
"""What linear layers and attention are computed in: bfloat16 where the processor multiplies it natively, which is several times
quicker than float32. On stories260k the KL after calibration is the same within the spread of the choice of sequences."""


def sequences_of(tokens: Sequence[int], samples: int, length: int, seed: int = 0, bos: int | None = None) -> Tensor:
    """Calibration sequences [n, length], int64: random windows of a text that do not overlap.

    Args:
        tokens: of the whole text.
        samples: n, or all windows where the text has fewer.
        length: of a sequence, in tokens.
        seed: of the choice.
        bos: begins every sequence; None: nothing does.

    Raises:
        InputError: no sequence is asked for, or the text is shorter than one.
    """
    head = [] if bos is None else [bos]
    room = length - len(head)
    if samples < 1 or room < 1:
        raise InputError(f"{samples} sequences of {length} tokens are no calibration: ask for at least 1 of {len(head) + 1} or more")
    windows = len(tokens) // room
    if not windows:
        raise InputError(f"the calibration text has {len(tokens)} tokens, one sequence takes {room}: give more text, or a smaller length")
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(tokens) - windows * room + 1, (), generator=generator))
    chosen = torch.randperm(windows, generator=generator)[:samples]
    text = torch.tensor(tokens[first : first + windows * room]).reshape(windows, room)[chosen]
    return torch.cat([torch.tensor(head, dtype=torch.int64).expand(len(text), -1), text], 1)


def round_with_hessian(
    weight: Tensor, hessian: Tensor, grid: WeightGrid, *, act_order: bool = False, damping: float = DAMPING, block: int = RUN
) -> tuple[Tensor, Tensor, float]:
    """Integers [out, in] int8, scales [out, groups] float32 and `relative_error` of a weight [out, in].

    Weights of an input that is always 0 are rounded to nearest: no other weight can make up for them, nor they for another.

    Args:
        weight: float.
        hessian: Σ x xᵀ of the layer's inputs, [in, in].
        grid: whose scales are those of the range, or searched with the inputs' mean squares as weights. A group's scale is that
            of its weights as corrected when its turn comes.
        act_order: inputs with the largest diagonal first; the scales are then those of the weights as they were.
        damping: of the mean diagonal; more is tried where it is not enough.
        block: columns that are rounded before the columns after them are updated; it changes speed only.

    Raises:
        RecipeError: the grid has another rule.
        InputError: the Hessian is not that of any inputs.

    Source: GPTQ Algorithm 1; `act_order` as in IST-DASLab/gptq `gptq.py` with `static_groups`.
    """
    if not grid.is_searched:
        told = f"{grid} with scale rule {grid.scale_rule}"
        raise RecipeError(f"{told} cannot be rounded by GPTQ: take rule least_squares or range, and at least 3 bits")
    weight, (out, inner) = weight.detach().float(), weight.shape
    size = grid.group_size or inner
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(inner)
    factor = _inverse_factor(hessian[order][:, order], damping)
    diagonal, places = factor.diagonal().tolist(), order.tolist()
    columns, integers = weight.T[order], torch.empty(inner, out, dtype=torch.int8)
    squares = hessian.diagonal()
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


def calibrated_scale(weight: Tensor, grid: WeightGrid, squares: Tensor) -> Tensor:
    """Scales [out, groups] of weight [out, in] by the grid's rule, knowing the inputs' sums of squares [in]."""
    return least_squares_scale(weight, grid, squares) if grid.scale_rule == "least_squares" else choose_scale(weight, grid)


def _runs(inner: int, size: int, block: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `block` columns; a group of `size` that begins inside of one also ends there."""
    step = max(block // size, 1) * size
    for first in range(0, inner, step):
        last = min(first + step, inner)
        yield from ((start, min(start + block, last)) for start in range(first, last, block))


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U [in, in], float32, with UᵀU = (H + λI)⁻¹ [GPTQ section 4, step 3].

    With both axes turned round, U is the inverse of H's Cholesky factor, and H⁻¹ is never needed. In float64.
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


class LayerError(NamedTuple):
    """`relative_error` of one layer, on inputs that come through the rounded layers before it."""

    name: str
    nearest: float
    """Rounded to nearest."""
    gptq: float


@dataclass(frozen=True)
class Calibrated:
    """The layers that were rounded, as `apply.convert` takes them, and how far rounding moves each."""

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

    In place: the model then holds the rounded weights, as floats. Layers under other rules, the embedding among them, stay floats
    as they are. A block that runs several times is rounded on the inputs of all its runs; the later runs begin where the block
    ended before it was rounded.

    Memory: the model, the stream of all sequences in float32, beside it the attention's output or the feed-forward's input in
    `PRODUCT`, and one Hessian at a time.

    Args:
        model: in float32.
        recipe: what is rounded, to which grids.
        sequences: tokens [n, length], int64.
        act_order: as in `round_with_hessian`.
        damping: as there.
        progress: called after each step.

    Raises:
        RecipeError: the recipe does not fit the model.
        InputError: weights, or what they compute, are not finite.
    """
    check(model.config, recipe)
    if recipe.untied and model.config.tied:
        untie(model)
    walk = _Walk(model, recipe, sequences, act_order, damping, progress)
    with _QuickProducts():
        for index in range(len(model.blocks)):
            walk.block(index)
        walk.head()
    return walk.found


class _Walk:
    """All sequences on their way through the model, block by block."""

    def __init__(
        self, model: Transformer, recipe: Recipe, sequences: Tensor, act_order: bool, damping: float, progress: Progress | None
    ) -> None:
        self.model, self.recipe, self.act_order, self.damping, self.progress = model, recipe, act_order, damping, progress
        self.found, self.done = Calibrated(), 0
        self.tables = rotary_tables(model.config, torch.arange(sequences.shape[1]))
        attend = _Attention(model.config)
        self.attend = FakeQuantizedAttention(attend) if recipe.kv_bits else attend
        parts = sequences.split(max(1, TOGETHER // sequences.shape[1]))
        self.streams = [model.embedding(part) * model.config.embedding_scale for part in parts]

    def block(self, index: int) -> None:
        """Rounds a block in four steps and takes the streams through it."""
        block, repeats, name = self.model.blocks[index], self.model.config.repeats, f"layers.{index}"
        attention, mlp, first = block.attention, block.mlp, index * repeats
        starts = [x.clone() for x in self.streams] if repeats > 1 else []
        runs = self._runs(block, first)
        self._round([f"{name}.attention.{part}" for part in "qkv"], (block.attention_norm(x) for _, x in runs))
        mixed = (attention.output(self.attend(layer, *block.enter(x, self.tables))) for layer, x in runs)
        kept = [y.to(PRODUCT) for y in _before(attention, "o", mixed)]
        self._round([f"{name}.attention.o"], kept)
        for i, (_, x) in enumerate(runs):
            x += block.post_attention_norm(attention.o(kept[i]))
            kept[i] = block.mlp_norm(x).to(PRODUCT)
        self._round([f"{name}.mlp.gate", f"{name}.mlp.up"], kept)
        self._round([f"{name}.mlp.down"], _before(mlp, "down", (mlp(y) for y in kept)))
        for (_, x), y in zip(runs, kept, strict=True):
            x += block.post_mlp_norm(mlp(y))
        for layer in range(first, first + repeats) if starts else ():
            starts = [block(x, layer, self.tables, self.attend) for x in starts]
        self.streams = starts or self.streams

    def head(self) -> None:
        """Rounds the head on what the last block gives, where it has integers of its own."""
        if not self.model.config.tied:
            self._round(["head"], (self.model.norm(x) for x in self.streams))

    def _runs(self, block: Block, first: int) -> list[tuple[int, Tensor]]:
        """The layer and stream of every run of a block on every part."""
        runs = [(first, x) for x in self.streams]
        for last in range(first, first + self.model.config.repeats - 1):
            runs += [(last + 1, block(x, last, self.tables, self.attend)) for layer, x in runs if layer == last]
        return runs

    def _round(self, names: list[str], inputs: Iterable[Tensor]) -> None:
        """Rounds those of the layers with these inputs whose rule says so."""
        grids = {name: rule.weights for name in names if (rule := self.recipe.rule_for(name)) and rule.rounding == "gptq"}
        if grids:
            hessian = _hessian(inputs)
            for name, grid in grids.items():
                self._round_layer(name, grid, hessian)
        self.done += 1
        if self.progress:
            self.progress("calibrate", self.done, 4 * len(self.model.blocks) + (not self.model.config.tied))

    def _round_layer(self, name: str, grid: WeightGrid, hessian: Tensor) -> None:
        weight = weight_of(self.model.get_submodule(name)).detach()
        for what, values in {"weights": weight, "sums of inputs on the calibration text": hessian}.items():
            if not values.isfinite().all():
                count = f"{int((~values.isfinite()).sum())} of {values.numel()}"
                raise InputError(f"{count} {what} of {name} are not finite: take another text, or a model whose weights are finite")
        integers, scales, error = round_with_hessian(weight, hessian, grid, act_order=self.act_order, damping=self.damping)
        nearest = relative_error(weight, *quantize_linear(weight, grid), hessian)
        self.found.integers[name] = integers, scales
        self.found.errors.append(LayerError(name, nearest, error))
        weight.copy_(dequantize(integers, scales))


def _before(part: nn.Module, name: str, outputs: Iterator[Tensor]) -> Iterator[Tensor]:
    """The inputs of a part's last product, where `outputs` computes what it gives."""
    product = getattr(part, name)
    setattr(part, name, nn.Identity())
    try:
        yield from outputs
    finally:
        setattr(part, name, product)


def _hessian(inputs: Iterable[Tensor]) -> Tensor:
    """Σ x xᵀ [in, in] of inputs [..., in]."""
    total = torch.zeros(0)
    for part in inputs:
        x = part.flatten(0, -2).float()
        total = total if len(total) else torch.zeros(x.shape[1], x.shape[1])
        _add_squares(total, x)
    return total.triu() + total.triu(1).T


def _add_squares(total: Tensor, x: Tensor) -> None:
    """Adds x [tokens, in] to the upper half of the sum [in, in]."""
    with _quick_sums():
        for start in range(0, len(total), STRIP):
            total[start : start + STRIP, start:].addmm_(x[:, start : start + STRIP].T, x[:, start:])


@contextlib.contextmanager
def _quick_sums() -> Iterator[None]:
    """Lets oneDNN round the inputs of float32 products to bfloat16, and only them: a sum of squares stays one."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _QuickProducts(TorchFunctionMode):
    """Linear layers and attention in `PRODUCT`, norms in float32."""

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
    """Attention over whole sequences, without a mask where every token before is seen: less than half the time."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self.config.layers[layer].window
        if self.config.attention_softcap is not None or (window is not None and window < q.shape[1]):
            return super().__call__(layer, q, k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.config.scale, enable_gqa=True).transpose(1, 2)
