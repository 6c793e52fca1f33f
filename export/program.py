"""The model as a target runs it: one call takes a chunk of tokens at a position and gives the last token's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from lobit.export.attention import InPlaceCaches
from lobit.model import MLP, Attention, Config, Table, Tables, Transformer, bias_of, rotary_tables, weight_of
from lobit.quant_recipes.integer import IntegerLinear


class FusedAttention(Attention):
    """Attention whose q, k and v are one product."""

    def __init__(self, plain: Attention, qkv: nn.Module) -> None:
        nn.Module.__init__(self)
        self.config, self.index = plain.config, plain.index
        self.qkv, self.o = qkv, plain.o
        for name in ("q_norm", "k_norm", "sub_norm"):
            if hasattr(plain, name):
                setattr(self, name, getattr(plain, name))
        width = self.config.kv_heads * self.config.head_dim
        self.widths = [self.config.heads * self.config.head_dim, width, width]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).split(self.widths, dim=-1)
        return q, k, v


class FusedMLP(MLP):
    """Feed-forward whose gate and up are one product."""

    def __init__(self, plain: MLP, gate_up: nn.Module) -> None:
        nn.Module.__init__(self)
        self.config = plain.config
        self.gate_up, self.down = gate_up, plain.down
        if self.config.sub_norms:
            self.sub_norm = plain.sub_norm

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return gate, up


def join_linears(parts: Sequence[nn.Module]) -> nn.Module | None:
    """One linear layer with the rows of all parts, or None where they are not of one kind."""
    biases = [bias for bias in map(bias_of, parts) if bias is not None]
    if len(biases) not in (0, len(parts)):
        return None
    bias = torch.cat(biases) if biases else None
    integer = [part for part in parts if isinstance(part, IntegerLinear)]
    if len(integer) == len(parts) and len({part.rule for part in integer}) == 1:
        integers, scale = torch.cat([part.integers for part in integer]), torch.cat([part.scale for part in integer])
        return IntegerLinear(integers, scale, bias, integer[0].rule)
    if all(isinstance(part, nn.Linear) for part in parts):
        weight = torch.cat([weight_of(part) for part in parts])
        joined = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        joined.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            joined.bias = nn.Parameter(bias, requires_grad=False)
        return joined
    return None


def fuse(model: Transformer) -> None:
    """Makes q, k, v one product and gate, up one product in every block where they are of one kind. In place."""
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        qkv = join_linears([attention.q, attention.k, attention.v])
        if qkv is not None:
            block.attention = FusedAttention(attention, qkv)
        gate_up = join_linears([mlp.gate, mlp.up])
        if gate_up is not None:
            block.mlp = FusedMLP(mlp, gate_up)


class Program(nn.Module):
    """A quantized model with the caches of its target.

    forward(tokens int64 [1, T], input_pos int64 [1]) -> logits float32 [1, 1, V] of the last token, for 1 <= T <= chunk.

    Args:
        model: float or converted; its layers are taken over.
        caches: the target's attention.
        context: positions that the program can hold.
        chunk: the most tokens in one call.
    """

    def __init__(self, model: Transformer, caches: InPlaceCaches, context: int, chunk: int) -> None:
        super().__init__()
        self.model, self.caches, self.context, self.chunk = model, caches, context, chunk
        self.ropes = sorted({layer.rope for layer in model.config.layers if layer.rope}, key=repr)
        tables = rotary_tables(model.config, torch.arange(context))
        for i, rope in enumerate(self.ropes):
            self.register_buffer(f"cos_{i}", tables[rope].cos, persistent=False)
            self.register_buffer(f"sin_{i}", tables[rope].sin, persistent=False)

    @property
    def config(self) -> Config:
        """The model's config."""
        return self.model.config

    def tables(self, position: int, length: int) -> Tables:
        """The rotary tables of one call."""
        return {
            rope: Table(
                getattr(self, f"cos_{i}").narrow(0, position, length), getattr(self, f"sin_{i}").narrow(0, position, length)
            )
            for i, rope in enumerate(self.ropes)
        }

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        length = tokens.shape[1]
        position = cast(int, input_pos.item())
        torch._check(position >= 0)
        torch._check(position + length <= self.context)
        x = self.model.hidden(tokens, self.tables(position, length), self.caches.at(input_pos, length))
        return self.model.logits(x[:, -1:])


Kind = TypeVar("Kind", bound=nn.Module)


def replace_layers(model: Transformer, kind: type[Kind], replace: Callable[[Kind], nn.Module]) -> None:
    """Puts `replace(module)` where a module of `kind` is; a module in two places stays one. In place."""
    made: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, kind):
            made[module] = made.get(module) or replace(module)
            model.set_submodule(name, made[module])
