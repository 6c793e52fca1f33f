"""Weights that checkpoints store quantized: which tensors hold their integers and scales, and what those stand for.

| kind       | integers                                           | scale                         | kept by                               |
|------------|----------------------------------------------------|-------------------------------|---------------------------------------|
| `multiply` | -1, 0, 1, as packed codes or as floats             | `weight_scale`                | transformers' bitnet, `autobitlinear` |
| `divide`   | -1, 0, 1, as packed codes or as floats             | 1 / `weight_scale`            | transformers' bitnet, `bitlinear`     |
| `online`   | floats over their mean magnitude, rounded, clipped | that mean                     | transformers' bitnet, masters         |
| `channels` | floats, clipped and rounded                        | `scales`, one a row           | deepgrove-ai/Bonsai                   |
| `torchao`  | `_weight_qdata`                                    | `_weight_scale`, one a group  | torchao, `IntxUnpackedToInt8Tensor`   |
| `learned`  | floats over their scale, rounded, clipped          | `weight_fake_quantizer.scale` | torchao's training of INT4 ranges     |

MobileLLM-Pro's checkpoint for accelerators is of the last kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from lobit.errors import ModelError, listed, reason, shown
from lobit.from_json import build

Kind = Literal["multiply", "divide", "online", "channels", "torchao", "learned"]
Bits = Literal[2, 3, 4, 6, 8]
Header = tuple[Path, list[int], str]
"""File, shape and dtype of a tensor."""
Shapes = dict[str, tuple[int, ...]]
"""The dtypes that a tensor may have, and the shape that it must have with each."""
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""The floating-point dtypes that are read, by safetensors' names."""
CODES = 4
"""Ternary codes in a byte of transformers' packing."""
QDATA = "_weight_qdata"
FAKE_QUANTIZER = "weight_fake_quantizer."
MOST_CLIPPED = 0.25
"""Share of a weight's values that may lie beyond its integers; more do so only where the scales were learned for other integers."""
TORCHAO_BITS: dict[str, Bits] = {"int3": 3, "int4": 4, "int6": 6, "int8": 8}
DYNAMIC_INT8 = "int8_asym_per_token"


@dataclass(frozen=True)
class Quantized:
    """How a checkpoint stores a quantized weight [rows, in]: its tensors and its grid."""

    kind: Kind
    values: str
    """The tensor of integers, of codes, or of the floats that are rounded to them."""
    scale: str | None = None
    """The tensor of scales; None: they are computed from the values."""
    scale_shape: tuple[int, ...] = (1,)
    zero_point: str | None = None
    """A tensor of zero points, which must all be 0."""
    bits: Bits = 2
    """Bits of an integer; 2 stands for ternary ones."""
    group_size: int | None = None
    """Weights along the input that share a scale; None: a row, or the whole matrix where `scale_shape` is (1,)."""
    dynamic_input: bool = False
    """Whether the layer's input is rounded to INT8 per token, with a zero point."""

    @property
    def one_scale(self) -> bool:
        """Whether the whole matrix has one scale."""
        return self.scale_shape == (1,)

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        return (-1, 1) if self.bits == 2 else (-(1 << self.bits - 1), (1 << self.bits - 1) - 1)

    def tensors(self, shape: tuple[int, ...]) -> dict[str, Shapes]:
        """The names of the tensors that a weight of that shape needs, with the dtypes and shapes that each may have."""
        packed = self.kind in ("multiply", "divide") and shape[0] % CODES == 0
        values: Shapes = {"I8": shape} if self.kind == "torchao" else dict.fromkeys(FLOATS, shape)
        values |= {"U8": (shape[0] // CODES, *shape[1:])} if packed else {}
        kinds = {self.scale: tuple(FLOATS), self.zero_point: (*FLOATS, "I8", "I32", "I64")}
        return {self.values: values} | {name: dict.fromkeys(allowed, self.scale_shape) for name, allowed in kinds.items() if name}


def quantized(
    name: str, shape: tuple[int, ...], ternary: Kind | None, headers: Mapping[str, Header], torchao: Mapping[str, Quantized]
) -> Quantized | None:
    """How a checkpoint stores the weight `name`; None: as floats.

    Args:
        name: the weight's name in the checkpoint, such as `model.layers.0.mlp.up_proj.weight`.
        shape: the shape of the whole weight, before any packing.
        ternary: the kind of the checkpoint's ternary weights, if this layer is one that is ternary there.
        headers: the headers of all tensors.
        torchao: as `torchao_weights` gives it.
    """
    module = name.removesuffix("weight")
    learned, zero_point = (module + FAKE_QUANTIZER + part for part in ("scale", "zero_point"))
    if name in torchao:
        return torchao[name]
    if learned in headers:
        scale_shape, group_size = _learned_groups(shape, tuple(headers[learned][1]))
        return Quantized("learned", name, learned, scale_shape, zero_point if zero_point in headers else None, 4, group_size)
    if ternary == "channels":
        return Quantized(ternary, name, module + "scales", shape[:1])
    return Quantized(ternary, name, None if ternary == "online" else module + "weight_scale") if ternary else None


def _learned_groups(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[tuple[int, ...], int | None]:
    """The shape that learned scales must have, as near to the shape they have as possible, and the group size that it implies."""
    rows, inner = shape
    groups = scale[1] if len(scale) == 2 and 0 < scale[1] < inner and inner % scale[1] == 0 else 1
    return (rows,) if scale == (rows,) else (rows, groups), None if groups == 1 else inner // groups


# --- torchao's description of its tensors -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Dtype:
    _type: Literal["torch.dtype"]
    _data: str


@dataclass(frozen=True)
class _Attributes:
    target_dtype: _Dtype
    block_size: list[int]
    dtype: _Dtype
    activation_quantization: str | None


@dataclass(frozen=True)
class _Entry:
    """What a file's metadata say of one tensor (torchao prototype/safetensors/safetensors_utils.py)."""

    _type: Literal["IntxUnpackedToInt8Tensor"]
    _data: _Attributes
    _tensor_data_names: list[str]

    def quantized(self, module: str, shape: tuple[int, ...]) -> Quantized:
        """How the weight of a module is stored, whose integers have that shape.

        Raises:
            ValueError: the weight is of a kind that is not read.
        """
        kept, activation = self._data, self._data.activation_quantization
        bits = TORCHAO_BITS.get(kept.target_dtype._data)
        if bits is None:
            raise ValueError(f"its integers are {shown(kept.target_dtype._data)}: {', '.join(TORCHAO_BITS)} are read")
        if activation not in (None, DYNAMIC_INT8):
            raise ValueError(f"its input is quantized as {shown(activation)}: {DYNAMIC_INT8} and floats are known")
        size = kept.block_size[1] if len(kept.block_size) == 2 else 0
        if len(shape) != 2 or kept.block_size != [1, size] or not size or shape[1] % size:
            raise ValueError(f"its block_size is {shown(kept.block_size)}, its shape {shown(list(shape))}: groups along the input are read")
        values, scale, zero_point = (f"{module}_weight_{part}" for part in ("qdata", "scale", "zero_point"))
        scale_shape, group_size = (shape[0], shape[1] // size), None if size == shape[1] else size
        return Quantized("torchao", values, scale, scale_shape, zero_point, bits, group_size, activation is not None)


def torchao_weights(headers: Mapping[str, Header], metadata: Mapping[str, str]) -> dict[str, Quantized]:
    """The weights that torchao quantized, by the names that they would have as floats (`….weight`).

    Args:
        headers: the headers of all tensors.
        metadata: the metadata of all files together: JSON under the name of each weight.

    Raises:
        ModelError: there are tensors of kinds that are not read; all are named.
    """
    found, problems = {}, []
    for values, (_, shape, _) in sorted(headers.items()):
        module, suffix, _ = values.partition(QDATA)
        if suffix and module + suffix == values:
            try:
                entry = cast(_Entry, build(_Entry, json.loads(metadata[f"{module}weight"]), f"{module}weight"))
                found[f"{module}weight"] = entry.quantized(module, tuple(shape))
            except KeyError:
                problems.append(f"{shown(values)}: the file's metadata have no word of it")
            except (ValueError, RecursionError) as error:
                problems.append(f"{shown(values)}: {reason(error)}")
    if problems:
        heading = f"{len(problems)} tensors of torchao's are not read (take the float checkpoint, or symmetric IntxUnpackedToInt8Tensor):"
        raise ModelError(listed(problems, heading))
    return found


# --- what the tensors stand for ---------------------------------------------------------------------------------------------------


def unpack_ternary(packed: Tensor, name: str) -> Tensor:
    """Unpacks -1, 0, 1 [4 R, in] from transformers' uint8 [R, in]: bits 2i and 2i + 1 of row r hold 1 more than row r + i R.

    Raises:
        ModelError: a code is 3.

    Source: transformers integrations/bitnet.py, `unpack_weights`.
    """
    codes = torch.cat([packed >> shift & 3 for shift in range(0, 2 * CODES, 2)])
    wrong = int((codes == 3).sum())
    if wrong:
        raise ModelError(f"{wrong} of {codes.numel()} codes in {name} are 3: ternary ones are 0, 1 and 2, fetch the file again")
    return codes.float() - 1


def integers(kept: Quantized, get: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """Integers [rows, in], as floats, and scales [rows, groups] or, for the whole matrix, [1, 1]: their product is the weight.

    No runtime refuses the scales: a negative ternary scale becomes positive and its integers change sign; for a scale of 0 the scale
    becomes 1 and its integers 0.

    Args:
        kept: how the checkpoint stores the weight.
        get: returns a tensor of the checkpoint by its name.

    Raises:
        ModelError: there are codes without a meaning, zero points that are not 0, values that are not finite or lie beyond their range.

    Source: transformers integrations/bitnet.py, `WeightQuant`, `AutoBitLinear` and `BitLinear`; deepgrove-ai/Bonsai, `QLinear`;
    torchao, `IntxUnpackedToInt8Tensor`; MobileLLM-Pro eq. 4.
    """
    values = get(kept.values)
    values = unpack_ternary(values, kept.values) if values.dtype == torch.uint8 else values.float()
    scale = get(kept.scale).float() if kept.scale else values.abs().mean().clamp(min=1e-5)
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    if kept.zero_point:
        _check_zero_points(get(kept.zero_point), kept.zero_point)
    if kept.kind == "torchao":
        return values, scale
    if kept.kind in ("channels", "learned") and not values.isfinite().all():
        raise ModelError(f"{kept.values} has values that are not finite: train or fetch it again")
    if kept.kind == "learned":
        return _rounded(values, scale, kept), scale
    if kept.kind in ("online", "channels"):
        values = (values * (1 / scale) if kept.kind == "online" else values).clamp(-1, 1).round()
    # transformers rounds 1 / mean to float32, and divides by it
    scale = 1 / (1 / scale) if kept.kind == "online" else 1 / scale if kept.kind == "divide" else scale
    return values * scale.sign(), torch.where(scale == 0, 1.0, scale.abs())


def _rounded(values: Tensor, scale: Tensor, kept: Quantized) -> Tensor:
    """Integers clip(round(w / s)), with halves rounded to even [MobileLLM-Pro eq. 4]."""
    low, high = kept.range
    ratio = values.reshape(len(values), scale.shape[1], -1) / scale[:, :, None]
    clipped = int(((ratio < low - 0.5) | (ratio > high + 0.5)).sum())
    if clipped > MOST_CLIPPED * ratio.numel():
        raise ModelError(
            f"{clipped} of {ratio.numel()} values of {kept.values} lie beyond [{low}, {high}] times their scale: {kept.scale} is not that "
            "of INT4, take the float checkpoint"
        )
    return ratio.round_().clamp_(low, high).reshape(values.shape)


def _check_zero_points(zero_points: Tensor, name: str) -> None:
    wrong = int((zero_points != 0).sum())
    if wrong:
        raise ModelError(
            f"{wrong} of {zero_points.numel()} zero points in {name} are not 0: symmetric integers are read, quantize with a symmetric "
            "mapping, or take the float checkpoint"
        )


def product(values: Tensor, scale: Tensor) -> Tensor:
    """Weights [rows, in] of integers [rows, in] and scales [rows, groups] or [1, 1]."""
    return (values.reshape(len(values), scale.shape[1], -1) * scale[:, :, None]).reshape(values.shape)
