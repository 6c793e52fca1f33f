"""How checkpoints lay out lobit's tensors: the family's names, fused rows, paired rotary rows, shifted norms, quantized weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lobit.families import FAMILIES
from lobit.model import Config, Transformer
from lobit.prequantized import FLOATS, Header, Kind, Quantized, Shapes, integers, product, quantized

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
"""lobit's name of every module, and Llama's; the names that differ in a family are in its entry of `FAMILIES`."""
GGUF = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    **{f"attention.{part}": f"attn_{part}" for part in "qkv"},
    "attention.o": "attn_output",
    **{f"mlp.{part}": f"ffn_{part}" for part in ("gate", "up", "down")},
    **{f"attention.{part}_norm": f"attn_{part}_norm" for part in ("q", "k", "sub")},
    "mlp.sub_norm": "ffn_sub_norm",
    "post_attention_norm": "post_attention_norm",
    "post_mlp_norm": "post_ffw_norm",
}
"""lobit's names, and those in GGUF files (gguf-py `gguf/constants.py`, `TENSOR_NAMES`)."""
LINEARS = {f"attention.{part}" for part in "qkvo"} | {f"mlp.{part}" for part in ("gate", "up", "down")}


@dataclass(frozen=True)
class Stored:
    """Where a checkpoint keeps one of lobit's tensors."""

    name: str
    shape: tuple[int, ...]
    """Shape of the stored tensor, which has more rows than lobit's where the family fuses several."""
    first: int
    """First row of the stored tensor that belongs to lobit's."""
    last: int
    """The row after the last one that belongs to it."""
    quantized: Quantized | None = None
    """How the checkpoint quantized the tensor; None: it is kept as floats."""

    @property
    def ternary(self) -> str:
        """The kind of a quantized weight, or `none`."""
        return self.quantized.kind if self.quantized else "none"

    def tensors(self) -> dict[str, Shapes]:
        """The tensors of the checkpoint that the stored one consists of, by their names."""
        if self.quantized is None:
            return {self.name: dict.fromkeys(FLOATS, self.shape)}
        return self.quantized.tensors(self.shape)


def layout(
    model: Transformer, headers: Mapping[str, Header] | None = None, torchao: Mapping[str, Quantized] | None = None
) -> dict[str, Stored]:
    """Where a checkpoint keeps each tensor of the model; a head that shares the embedding's weight is left out.

    Args:
        model: only its shapes count; it may be on the meta device.
        headers: of the checkpoint's tensors; None: all are floats.
        torchao: as `torchao_weights` gives it.
    """
    config, headers = model.config, headers or {}
    names = {**LLAMA, **FAMILIES[config.family].names}
    ternary: Kind | None = config.ternary if config.ternary != "none" else None
    if ternary is None and any(name.endswith(".scales") for name in headers):
        ternary = "channels"
    tensors = {ours: tensor for ours, tensor in model.state_dict().items() if not (config.tied and ours == "head.weight")}
    fused: dict[str, list[str]] = {}
    for ours in tensors:
        fused.setdefault(_stored_name(names, ours), []).append(ours)
    places = {}
    for theirs, parts in fused.items():
        ends = list(accumulate(len(tensors[ours]) for ours in parts))
        shape = (ends[-1], *tensors[parts[0]].shape[1:])
        of_layer = ternary if _parts(parts[0])[1] in LINEARS else None
        kept = quantized(theirs, shape, of_layer, headers, torchao or {}) if len(shape) == 2 else None
        for ours, last in zip(parts, ends, strict=True):
            places[ours] = Stored(kept.values if kept else theirs, shape, last - len(tensors[ours]), last, kept)
    return {ours: places[ours] for ours in tensors}


def _parts(ours: str) -> tuple[str | None, str, str]:
    """The layer's number, the module and the kind of a tensor: layers.3.mlp.up.weight -> 3, mlp.up, weight."""
    path, _, kind = ours.rpartition(".")
    if not path.startswith("layers."):
        return None, path, kind
    _, layer, module = path.split(".", 2)
    return layer, module, kind


def _stored_name(names: Mapping[str, str], ours: str, layers: str = "model.layers") -> str:
    layer, module, kind = _parts(ours)
    return ("" if layer is None else f"{layers}.{layer}.") + f"{names[module]}.{kind}"


def gguf_name(ours: str) -> str:
    """What GGUF files call a tensor: layers.3.mlp.up.weight is blk.3.ffn_up.weight."""
    return _stored_name(GGUF, ours, "blk")


def from_gguf(config: Config, ours: str, tensor: Tensor) -> Tensor:
    """A tensor of a Llama's GGUF file as lobit's model holds it: llama.cpp's rotary embedding pairs neighbouring rows, lobit's halves."""
    return _halves(config, tensor) if _parts(ours)[1] in ("attention.q", "attention.k") else tensor


def to_gguf(config: Config, ours: str, tensor: Tensor) -> Tensor:
    """The inverse of `from_gguf`."""
    return _neighbours(config, tensor) if _parts(ours)[1] in ("attention.q", "attention.k") else tensor


def read(config: Config, ours: str, stored: Stored, get: Callable[[str], Tensor], dtype: torch.dtype | None = torch.float32) -> Tensor:
    """A tensor of a checkpoint as lobit's model holds it.

    Args:
        config: of the model.
        ours: lobit's name of the tensor.
        stored: where the checkpoint keeps it.
        get: gives a tensor of the checkpoint by its name.
        dtype: of the result, float32 where the checkpoint has float64; None: as in the checkpoint where that holds floats, so that a
            file that is mapped to memory is not copied.

    Raises:
        ModelError: as `prequantized.integers`.
    """
    values = get(stored.name) if stored.quantized is None else product(*integers(stored.quantized, get))
    rows = values[stored.first : stored.last]
    dtype = torch.float32 if values.dtype == torch.float64 else dtype
    if dtype is not None:
        rows = rows.to(dtype, copy=len(rows) < len(values))
    return from_checkpoint(config, ours, rows)


def read_integers(config: Config, ours: str, stored: Stored, get: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """Integers [out, in], as floats, and scales [out, groups] of a weight that the checkpoint keeps quantized; else like `read`."""
    assert stored.quantized is not None
    values, scale = integers(stored.quantized, get)
    rows, scales = (part[stored.first : stored.last] for part in (values, scale.expand(len(values), -1)))
    return from_checkpoint(config, ours, rows), from_checkpoint(config, ours, scales)


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
    """A float tensor of a checkpoint as lobit's model holds it.

    In interleaved families, the even rows of each head of q and k are put first, then the odd. A norm that multiplies by 1 + w
    becomes one that multiplies by w.
    """
    if _is_shifted(config, ours):
        return tensor + 1
    return _halves(config, tensor) if _is_paired(config, ours) else tensor


def _halves(config: Config, tensor: Tensor) -> Tensor:
    """Puts the even rows of each head first, then the odd."""
    heads = tensor.reshape(-1, config.head_dim // 2, 2, *tensor.shape[1:])
    return heads.transpose(1, 2).reshape(tensor.shape)


def to_checkpoint(config: Config, ours: str, tensor: Tensor) -> Tensor:
    """The inverse of `from_checkpoint`."""
    if _is_shifted(config, ours):
        return tensor - 1
    return _neighbours(config, tensor) if _is_paired(config, ours) else tensor


def _neighbours(config: Config, tensor: Tensor) -> Tensor:
    """The inverse of `_halves`."""
    heads = tensor.reshape(-1, 2, config.head_dim // 2, *tensor.shape[1:])
    return heads.transpose(1, 2).reshape(tensor.shape)
