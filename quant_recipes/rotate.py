"""Rotation: spreads outliers over all channels before anything is rounded, folded into the weights so that nothing more is computed.

A few channels of a trained model's stream are far larger than the others, and INT8 inputs with one scale per token lose all that is
small beside them. A tensor that products write and only products read can be in any orthonormal basis R, since x R R^T W^T is x W^T.
There are two such tensors:

* `stream`: the embedding, o and down write it, and q, k, v, gate, up and the head read it. The norms in between divide by a length, which
  R keeps, and multiply each channel by a weight, which R would mix: that weight is first multiplied into the products after the norm,
  and is 1 from then on. The embedding then differs from the head's matrix, so the recipe is `untied`.
* `heads`: v writes it and o reads it through attention, which takes weighted sums over tokens and never mixes the entries of a head.

R is D H: D of random signs, H the Hadamard matrix of the largest power of two that divides the size, in the Kronecker product with a
random orthonormal matrix of the odd rest, where there is one (QuaRot, Ashkboos et al. 2024, does so without the rest).

The same float model gives the same weights, bit by bit, on every machine: the signs come from SHAKE-256, and no number depends on the order
in which a library sums. All computations are single sums, differences, products and quotients of float64 in an order that is fixed here,
sums by `math.fsum`, and square roots, which IEEE 754 rounds in one way. Each weight is rounded to float32 once, at the end.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, reduce

import torch
from torch import Tensor, nn

from lobit.model import Config, Transformer
from lobit.quant_recipes.recipe import Recipe, Turn

Read = Callable[[str], Tensor]
"""Returns the parameter of that name."""
LARGEST_ODD = 127
"""The largest odd part of a size that can be rotated: that part is multiplied one channel after the other."""
CHUNK = 1 << 18
"""Weights that are rotated at once: as many as a core's cache holds in float64."""
BEHIND = {
    "attention.q": "attention_norm",
    "attention.k": "attention_norm",
    "attention.v": "attention_norm",
    "mlp.gate": "mlp_norm",
    "mlp.up": "mlp_norm",
    "head": "norm",
}
"""The products that read the stream, and the norm before each."""
WRITE = ("attention.o", "mlp.down")
"""The products that write to the stream, besides the embedding."""


@dataclass(frozen=True)
class Basis:
    """An orthonormal matrix R [size, size]."""

    signs: Tensor
    """The diagonal of D, each -1 or 1: [size], float64."""
    rest: tuple[tuple[float, ...], ...]
    """The orthonormal matrix of the odd part [odd, odd]."""

    def turn(self, x: Tensor) -> Tensor:
        """x R for each run of `size` entries along the last axis of x [..., n · size]; float64."""
        size, odd = len(self.signs), len(self.rest)
        power = size // odd
        y = (x.reshape(-1, size) * self.signs).reshape(-1, power, odd)
        if odd > 1:
            parts, columns = y.unbind(-1), zip(*self.rest, strict=True)
            y = torch.stack([reduce(torch.add, (part * q for part, q in zip(parts, column, strict=True))) for column in columns], -1)
        for half in (1 << i for i in range(power.bit_length() - 1)):
            a, b = y.reshape(-1, 2, half, odd).unbind(1)
            y = torch.stack([a + b, a - b], 1)
        return (y * (1 / math.sqrt(power))).reshape(x.shape)


@cache
def basis(size: int, turn: Turn) -> Basis:
    """The basis of a stream, or of a head, of `size` channels."""
    odd = _odd(size)
    bits = hashlib.shake_256(f"lobit {turn} {size}".encode()).digest(size + odd * odd)
    signs = torch.tensor([1.0 if bit & 1 else -1.0 for bit in bits[:size]], dtype=torch.float64)
    return Basis(signs, _orthonormal([[byte - 127.5 for byte in bits[size + i * odd :][:odd]] for i in range(odd)]))


def _odd(size: int) -> int:
    return size // (size & -size)


def _orthonormal(rows: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    """The rows made orthonormal by Gram-Schmidt, applied twice so that they are orthogonal to the last bits; sums are rounded once."""
    done: list[tuple[float, ...]] = []
    for row in rows:
        for other in done * 2:
            shadow = math.fsum(a * b for a, b in zip(row, other, strict=True))
            row = [a - shadow * b for a, b in zip(row, other, strict=True)]
        length = math.sqrt(math.fsum(a * a for a in row))
        done.append(tuple(a / length for a in row))
    return tuple(done)


def problems(config: Config, recipe: Recipe) -> list[str]:
    """Every reason why a model cannot be rotated as the recipe says, each with what to do about it."""
    found = []
    if recipe.rotate and not recipe.rules:
        found.append("it quantizes nothing, and rotation changes nothing but what rounding costs: leave --rotate out")
    if "stream" in recipe.rotate and config.post_norms:
        found.append(
            "the stream cannot be rotated: this family has weighted norms after each part, with no product behind that could take "
            "their weights in: leave stream out of --rotate (heads alone can be)"
        )
    if "stream" in recipe.rotate and config.tied and not recipe.untied:
        found.append("a rotated stream needs a head of its own, and the recipe ties it to the embedding: set untied, as --rotate does")
    for turn, size in (("stream", config.hidden_size), ("heads", config.head_dim)):
        if turn in recipe.rotate and _odd(size) > LARGEST_ODD:
            found.append(
                f"{turn} of {size} channels, {size // _odd(size)} times {_odd(size)}, cannot be rotated: powers of two times at most "
                f"{LARGEST_ODD} can: leave {turn} out of --rotate"
            )
    return found


class Rotation:
    """Computes the parameters of a rotated model from those of the trained one.

    Args:
        config: the model's.
        recipe: one in which `problems` finds nothing.
    """

    def __init__(self, config: Config, recipe: Recipe) -> None:
        self.stream = basis(config.hidden_size, "stream") if "stream" in recipe.rotate else None
        self.heads = basis(config.head_dim, "heads") if "heads" in recipe.rotate else None
        self.sub_norms = config.sub_norms

    def changes(self, name: str) -> bool:
        """Whether the rotation changes a parameter."""
        return self._becomes_one(name) or any(self._turns(name))

    def read(self, name: str, read: Read) -> Tensor:
        """The rotated model's parameter `name`; `read` returns those of the trained one."""
        x = read(name)
        if self._becomes_one(name):
            return torch.ones_like(x, dtype=torch.float32)
        inner, outer = self._turns(name)
        if not (inner or outer):
            return x
        norm = self._norm_before(name) if inner else None
        weight = read(norm).double() if norm else None
        if inner:
            x = _by_rows(lambda rows: inner.turn(rows if weight is None else rows * weight), x, torch.float64 if outer else torch.float32)
        return _by_rows(outer.turn, x.T if x.ndim > 1 else x[None], torch.float32).T.reshape(x.shape) if outer else x

    def _turns(self, name: str) -> tuple[Basis | None, Basis | None]:
        """The bases to which a parameter's inputs and its outputs are rotated, or None."""
        layer, kind = _place(name)
        inner = self.stream if layer in BEHIND or layer == "embedding" else self.heads if layer == "attention.o" else None
        outer = self.stream if layer in WRITE else self.heads if layer == "attention.v" else None
        return inner if kind == "weight" else None, outer

    def _norm_before(self, name: str) -> str | None:
        """The name of the norm weight that is multiplied into a product's weight, or None."""
        layer, _ = _place(name)
        if layer == "attention.o":
            return name.replace("attention.o", "attention.sub_norm") if self.sub_norms else None
        return name.replace(layer, BEHIND[layer]) if layer in BEHIND else None

    def _becomes_one(self, name: str) -> bool:
        """Whether the parameter is a norm weight that is multiplied into the products after it."""
        layer, _ = _place(name)
        return bool(layer in BEHIND.values() and self.stream) or bool(layer == "attention.sub_norm" and self.heads)


def _place(name: str) -> tuple[str, str]:
    """`layers.3.mlp.down.weight` as `mlp.down` and `weight`."""
    layer, _, kind = name.rpartition(".")
    return layer.split(".", 2)[-1] if layer.startswith("layers.") else layer, kind


def _by_rows(turn: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """Applies `turn` to x [out, in] in float64, some rows at a time."""
    return torch.cat([turn(rows.double()).to(dtype) for rows in x.split(max(1, CHUNK // x.shape[1]))])


def rotated(config: Config, recipe: Recipe, read: Read) -> Read:
    """Returns a function that reads the rotated model's parameters, given one for the float model's; those that change are float32."""
    if not recipe.rotate:
        return read
    rotation = Rotation(config, recipe)
    return lambda name: rotation.read(name, read)


def rotate(model: Transformer, recipe: Recipe) -> Transformer:
    """Rotates a float model in place, with new parameters; a model that is rotated already stays as it is.

    Args:
        model: has a head of its own where the stream is rotated; parameters without memory stay so.
        recipe: says what to rotate; `problems` finds nothing in it.
    """
    if model.rotated or not recipe.rotate:
        return model
    rotation, parameters = Rotation(model.config, recipe), dict(model.named_parameters())
    norms = {name: parameter.detach() for name, parameter in parameters.items() if "norm" in name}
    read = _reader(model, norms)
    for name, parameter in parameters.items():
        if rotation.changes(name) and not parameter.is_meta:
            layer, _, kind = name.rpartition(".")
            setattr(model.get_submodule(layer), kind, nn.Parameter(rotation.read(name, read), parameter.requires_grad))
    model.rotated = recipe.rotate
    return model


def _reader(model: Transformer, norms: Mapping[str, Tensor]) -> Read:
    """Returns a function that reads a model's parameters, the norms from `norms`, since the model's own change meanwhile."""
    return lambda name: norms[name] if name in norms else model.get_parameter(name).detach()
