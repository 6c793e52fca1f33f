"""Builds the model in parts, as a target runs it: one call takes a chunk of tokens at a position and gives the last token's logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lobit.export.composed import ropes as ropes_of
from lobit.export.xnnpack.attention import Caches
from lobit.export.xnnpack.parts import INPUTS, OUTPUT, Parts, PerToken, Step, Value
from lobit.model import Block, Config, Transformer, softcap
from lobit.rope import Rope, Table, Tables, rotary_table


class Positions(nn.Module):
    """Computes all that depends on the position and the number of tokens alone; `outputs` has the names of the results.

    Args:
        config: the model.
        caches: the caches, which need to know positions.
        ropes: the kinds of rotary embedding.
    """

    steps: Tensor

    def __init__(self, config: Config, caches: Caches, ropes: list[Rope]) -> None:
        super().__init__()
        self.group = config.heads // config.kv_heads
        self.ropes, self.rings, self.bounds = len(ropes), caches.rings, caches.bounds[:-1]
        self.register_buffer("steps", torch.arange(caches.chunk), persistent=False)
        for number, rope in enumerate(ropes):
            frequencies, factors = rope.spectrum(config.head_dim)
            self.register_buffer(f"frequencies_{number}", frequencies, persistent=False)
            self.register_buffer(f"factors_{number}", factors, persistent=False)
        self.outputs: dict[str, Value] = {}
        for number in range(len(ropes)):
            for part in ("cos", "sin"):
                self.outputs[f"{part}_{number}"] = Value((PerToken(), 1, config.head_dim))
        self.outputs |= {name: Value((1,), torch.bool) for name in ("first", "single", *(f"up_to_{bound}" for bound in self.bounds))}
        self.outputs["queries"] = Value((PerToken(self.group), 1))
        for ring in self.rings:
            self.register_buffer(f"slots_{ring}", torch.arange(ring), persistent=False)
            self.outputs[f"indices_{ring}"] = Value((1, PerToken()), torch.int64)
            self.outputs[f"held_{ring}"] = Value((ring,))
            self.outputs[f"joined_{ring}"] = Value((PerToken(plus=ring),))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> tuple[Tensor, ...]:
        length = tokens.shape[1]
        queries = input_pos + self.steps[:length]
        last = queries[-1:]
        made: list[Tensor] = []
        for number in range(self.ropes):
            made += rotary_table(queries, getattr(self, f"frequencies_{number}"), getattr(self, f"factors_{number}"))
        made += [input_pos == 0, last == input_pos, *(last < bound for bound in self.bounds)]
        made += [queries.float()[:, None].expand(-1, self.group).reshape(-1, 1)]
        for ring in self.rings:
            slots = getattr(self, f"slots_{ring}")
            made += [torch.remainder(queries, ring)[None], position_in(last, slots).float()]
            made += [torch.cat([position_in(input_pos - 1, slots), queries]).float()]
        return tuple(made)


def position_in(last: Tensor, slots: Tensor) -> Tensor:
    """The position that each slot of a ring holds after position `last` [1] was written; negative where the slot is empty."""
    # ExecuTorch's portable remainder follows C's sign, so its operand is kept from being negative.
    count = slots.shape[0]
    return last - torch.remainder(last + count - slots, count)


class Embed(nn.Module):
    """Embeds tokens [1, T] as the residual stream [1, T, D]; the table is an input."""

    def __init__(self, embedding: nn.Module, scale: float) -> None:
        super().__init__()
        self.look_up: Callable[..., Tensor] = getattr(embedding, "look_up", F.embedding)
        self.scale = scale

    def forward(self, tokens: Tensor, *table: Tensor) -> Tensor:
        x = self.look_up(tokens, *table)
        return x if self.scale == 1.0 else x * self.scale


class Enter(nn.Module):
    """Computes q [1, T, H, E], k and v [1, T, K, E] of a block from the residual stream [1, T, D]."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rope = self.block.attention.rope
        tables: Tables = {rope: Table(*table)} if rope else {}
        return self.block.enter(x, tables)


class Between(nn.Module):
    """From one layer's attention to the next layer's: (x, y, rotary table) -> (x, q, k, v)."""

    def __init__(self, block: Block, following: Block) -> None:
        super().__init__()
        self.block, self.enter = block, Enter(following)

    def extra_repr(self) -> str:
        """Whether both are one block (layer sharing): its tensors then have one name instead of two."""
        return "shared" if self.block is self.enter.block else ""

    def forward(self, x: Tensor, y: Tensor, *table: Tensor) -> tuple[Tensor, ...]:
        x = self.block.leave(x, y)
        return x, *self.enter(x, *table)


class Score(nn.Module):
    """From the last layer's attention to the logits: [1, 1, V] of the last token, or [1, T, V] of all."""

    def __init__(self, block: Block, model: Transformer, all_logits: bool) -> None:
        super().__init__()
        self.all_logits = all_logits
        self.block, self.norm, self.head, self.cap = block, model.norm, model.head, model.config.logits_softcap

    def extra_repr(self) -> str:
        """Whether all tokens get logits."""
        return "all" if self.all_logits else ""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.all_logits:
            x, y = x[:, -1:], y[:, -1:]
        return softcap(self.head(self.norm(self.block.leave(x, y))), self.cap)


def build(model: Transformer, caches: Caches, all_logits: bool = False) -> Parts:
    """Builds the model in parts, which use the model's own layers.

    A part reaches from one layer's attention to the next, so that all products between two attentions are one graph.
    """
    config, parts = model.config, Parts()
    ropes = ropes_of(config)
    positions = Positions(config, caches, ropes)
    _declare(parts, config, positions, all_logits)
    caches.declare(parts)
    table = _table(parts, model.embedding)
    blocks = [model.blocks[layer // config.repeats] for layer in range(len(config.layers))]
    numbers = [ropes.index(block.attention.rope) if block.attention.rope else None for block in blocks]
    tables = [() if number is None else (f"cos_{number}", f"sin_{number}") for number in numbers]
    # Not delegated: a delegate's sines need not be exact to the last bit where angles are large.
    parts.steps.append(Step("positions", positions, INPUTS, tuple(positions.outputs), delegated=False))
    parts.steps += caches.begin()
    parts.steps.append(Step("embed", Embed(model.embedding, config.embedding_scale), ("tokens", *table), ("x0",)))
    parts.steps.append(Step("enter", Enter(blocks[0]), ("x0", *tables[0]), ("q", "k", "v")))
    for layer, block in enumerate(blocks):
        parts.steps += caches.attend(layer)
        x = f"x{layer % 2}"
        if layer + 1 < len(blocks):
            step = Between(block, blocks[layer + 1])
            parts.steps.append(Step("between", step, (x, "y", *tables[layer + 1]), (f"x{1 - layer % 2}", "q", "k", "v")))
        else:
            parts.steps.append(Step("score", Score(block, model, all_logits), (x, "y"), (OUTPUT,)))
    return parts


def _declare(parts: Parts, config: Config, positions: Positions, all_logits: bool) -> None:
    """Declares the values that every program has."""
    heads, kv_heads = ((1, PerToken(), count, config.head_dim) for count in (config.heads, config.kv_heads))
    stream = Value((1, PerToken(), config.hidden_size))
    parts.values |= {"tokens": Value((1, PerToken()), torch.int64), "input_pos": Value((1,), torch.int64), **positions.outputs}
    parts.values |= {"x0": stream, "x1": stream, "q": Value(heads), "k": Value(kv_heads), "v": Value(kv_heads), "y": Value(heads)}
    parts.values[OUTPUT] = Value((1, PerToken() if all_logits else 1, config.vocab_size))


def _table(parts: Parts, embedding: nn.Module) -> list[str]:
    """Declares the embedding's constants and returns their names."""
    names = []
    for name, tensor in embedding.state_dict().items():
        names.append(f"embedding.{name}")
        parts.values[names[-1]] = Value(tuple(tensor.shape), tensor.dtype, constant=tensor.detach())
    return names
