"""Products whose runtime rounds their inputs itself, in plain PyTorch: to INT8 in blocks, or to half precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lobit.model import bias_of, weight_of


def round_blocks(x: Tensor, block: int, half_scales: bool = False) -> Tensor:
    """x [..., n] with every `block` entries rounded to a grid of their own: s = max |x| / 127, no zero point.

    ONNX Runtime's MatMulNBits rounds its inputs in this way at accuracy level 4 (`QuantizeARow_CompInt8`), and llama.cpp those of all
    products with integers (`quantize_row_q8_0`, `quantize_row_q8_K`).

    Args:
        x: float32.
        block: entries that share a scale; the last block may be shorter.
        half_scales: whether the scales are kept in half precision. The integers are chosen before that.
    """
    blocks = F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    integers = (blocks * torch.where(scale > 0, 1 / scale, 0.0)).round_()
    kept = scale.half().float() if half_scales else scale
    rounded: Tensor = integers.mul_(kept).flatten(-2)[..., : x.shape[-1]]
    return rounded


class RoundedInputs(nn.Module):
    """A linear layer of any kind whose inputs are rounded before the product; the layer's own rule for inputs does not count.

    Args:
        linear: the layer.
        rounding: what rounds the inputs [..., in].
    """

    def __init__(self, linear: nn.Module, rounding: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.rounding = linear, rounding

    @property
    def weight(self) -> Tensor:
        """The layer's weight [out, in]."""
        return weight_of(self.linear)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.rounding(x), self.weight, bias_of(self.linear))
