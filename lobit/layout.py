"""How checkpoints lay out our tensors: the family's names, fused rows, paired rotary rows, shifted norms, ternary codes.

What is read here is a float weight, whatever the file holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from lobit.errors import ModelError
from lobit.families import FAMILIES
from lobit.model import Config, Transformer

LLAMA = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{f"attention.{part}": f"self_attn.{part}_proj" for part in "qkvo"},
    **{f"attention.{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    **{f"mlp.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
"""Our name of every module, and Llama's; what a family calls otherwise is in its entry of `FAMILIES`."""
LINEARS = {f"attention.{part}" for part in "qkvo"} | {f"mlp.{part}" for part in ("gate", "up", "down")}
CODES = 4
"""Ternary codes in a byte of transformers' packing."""

Ternary = Literal["none", "multiply", "divide", "online", "channels"]
"""`Config.ternary`, and `channels`: rounded to -1, 0, 1 on use, and a factor for each output channel (Bonsai)."""


@dataclass(frozen=True)
class Stored:
    """Where a checkpoint keeps one of our tensors."""

    name: str
    shape: tuple[int, ...]
    """Of the stored tensor, which holds more than ours where the family fuses several."""
    first: int
    """Our first row of it."""
    last: int
    """The row after our last."""
    ternary: Ternary = "none"
    scale: str | None = None
    """The tensor that scales the ternary values."""

    @property
    def packed_shape(self) -> tuple[int, ...] | None:
        """The shape of the same tensor in packed codes; None where it cannot be packed."""
        can_be = self.ternary in ("multiply", "divide") and self.shape[0] % CODES == 0
        return (self.shape[0] // CODES, *self.shape[1:]) if can_be else None

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """One factor for the whole tensor, or one for each row."""
        return (self.shape[0],) if self.ternary == "channels" else (1,)


def layout(model: Transformer, present: Iterable[str] = ()) -> dict[str, Stored]:
    """Where a checkpoint keeps each tensor of the model; a head that is the embedding is left out.

    Args:
        model: only its shapes count, it may be on the meta device.
        present: the names in the checkpoint; `.scales` among them mean Bonsai's linear layers.
    """
    config = model.config
    names = {**LLAMA, **FAMILIES[config.family].names}
    ternary: Ternary = config.ternary
    if ternary == "none" and any(name.endswith(".scales") for name in present):
        ternary = "channels"
    tensors = {ours: tensor for ours, tensor in model.state_dict().items() if not (config.tied and ours == "head.weight")}
    fused: dict[str, list[str]] = {}
    for ours in tensors:
        fused.setdefault(_stored_name(names, ours), []).append(ours)
    places = {}
    for theirs, parts in fused.items():
        ends = list(accumulate(len(tensors[ours]) for ours in parts))
        for ours, last in zip(parts, ends, strict=True):
            shape, first = (ends[-1], *tensors[ours].shape[1:]), last - len(tensors[ours])
            places[ours] = Stored(theirs, shape, first, last, *_ternary(ours, theirs, ternary))
    return {ours: places[ours] for ours in tensors}


def _parts(ours: str) -> tuple[str | None, str, str]:
    """The layer's number, the module and the kind of a tensor: layers.3.mlp.up.weight -> 3, mlp.up, weight."""
    path, _, kind = ours.rpartition(".")
    if not path.startswith("layers."):
        return None, path, kind
    _, layer, module = path.split(".", 2)
    return layer, module, kind


def _stored_name(names: Mapping[str, str], ours: str) -> str:
    layer, module, kind = _parts(ours)
    return ("" if layer is None else f"model.layers.{layer}.") + f"{names[module]}.{kind}"


def _ternary(ours: str, theirs: str, ternary: Ternary) -> tuple[Ternary, str | None]:
    """How the tensor is kept, and the tensor of its scales."""
    _, module, kind = _parts(ours)
    if ternary == "none" or module not in LINEARS or kind != "weight":
        return "none", None
    if ternary == "online":
        return ternary, None
    return ternary, theirs.removesuffix("weight") + ("scales" if ternary == "channels" else "weight_scale")


def read(config: Config, ours: str, stored: Stored, get: Callable[[str], Tensor], dtype: torch.dtype | None = torch.float32) -> Tensor:
    """A tensor as our model holds it.

    Args:
        config: the model.
        ours: our name of the tensor.
        stored: where the checkpoint keeps it.
        get: gives a tensor of the checkpoint by its name.
        dtype: of the result; None: of the checkpoint where it holds floats, so that a file that is mapped to memory is not copied.

    Raises:
        ModelError: packed codes that are none.
    """
    values = get(stored.name)
    if stored.ternary != "none":
        values = _effective(values, stored, get)
    rows = values[stored.first : stored.last]
    if dtype is not None:
        rows = rows.to(dtype, copy=len(rows) < len(values))
    return from_checkpoint(config, ours, rows)


def write(model: Transformer) -> dict[str, Tensor]:
    """The tensors of a float checkpoint: the inverse of `read`."""
    parts: dict[str, list[Tensor]] = {}
    state = model.state_dict()
    for ours, stored in layout(model).items():
        parts.setdefault(stored.name, []).append(to_checkpoint(model.config, ours, state[ours].detach()))
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _is_paired(config: Config, ours: str) -> bool:
    return FAMILIES[config.family].interleaved and _parts(ours)[1] in ("attention.q", "attention.k")


def _is_shifted(config: Config, ours: str) -> bool:
    return FAMILIES[config.family].shifted_norms and _parts(ours)[1].endswith("norm")


def from_checkpoint(config: Config, ours: str, tensor: Tensor) -> Tensor:
    """A float tensor as our model holds it.

    Of interleaved families, the even rows of each head of q and k come first, then the odd. A norm that multiplies by 1 + w
    becomes one that multiplies by w.
    """
    if _is_shifted(config, ours):
        return tensor + 1
    if not _is_paired(config, ours):
        return tensor
    heads = tensor.reshape(-1, config.head_dim // 2, 2, *tensor.shape[1:])
    return heads.transpose(1, 2).reshape(tensor.shape)


def to_checkpoint(config: Config, ours: str, tensor: Tensor) -> Tensor:
    """The inverse of `from_checkpoint`."""
    if _is_shifted(config, ours):
        return tensor - 1
    if not _is_paired(config, ours):
        return tensor
    heads = tensor.reshape(-1, 2, config.head_dim // 2, *tensor.shape[1:])
    return heads.transpose(1, 2).reshape(tensor.shape)


def unpack_ternary(packed: Tensor, name: str) -> Tensor:
    """-1, 0, 1 [4 R, in] of transformers' packing uint8 [R, in]: bits 2i and 2i + 1 of row r are 1 more than row r + i R.

    Raises:
        ModelError: a code is 3.

    Source: transformers integrations/bitnet.py, `unpack_weights`.
    """
    codes = torch.cat([packed >> shift & 3 for shift in range(0, 2 * CODES, 2)])
    wrong = int((codes == 3).sum())
    if wrong:
        raise ModelError(f"{wrong} of {codes.numel()} codes in {name} are 3: ternary ones are 0, 1 and 2, fetch the file again")
    return codes.float() - 1


def _effective(values: Tensor, stored: Stored, get: Callable[[str], Tensor]) -> Tensor:
    """The float weight that ternary values, or what is rounded to them on use, stand for.

    Source: transformers integrations/bitnet.py, `WeightQuant`, `AutoBitLinear` and `BitLinear`; deepgrove-ai/Bonsai, `QLinear`.
    """
    values = unpack_ternary(values, stored.name) if values.dtype == torch.uint8 else values.float()
    if stored.scale is None:
        inverse = 1 / values.abs().mean().clamp(min=1e-5)
        return (values * inverse).round().clamp(-1, 1) / inverse
    scale = get(stored.scale).float()
    if stored.ternary == "channels":
        return values.clamp(-1, 1).round() * scale[:, None]
    return values / scale if stored.ternary == "divide" else values * scale
