"""Key-value caches that ExecuTorch's own operators write in place and the delegate reads, and the attention over them.

Attention is two batched products and a softmax, which the delegate runs many times as fast as ExecuTorch's attention operators run
on the host. The number of keys in a product must be fixed or follow from the number of tokens, so that a cache is read up to the
next of a few bounds, and the slots behind the last token are masked.

A layer with a window has a ring of exactly that many slots. The tokens of a call may need keys that the call itself overwrites,
so they attend to the ring as it was before, joined with the call's own keys and values; a single token needs no key that it
overwrites, and attends to the ring as it is afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from lobit.export.xnnpack.parts import Choice, Parts, PerToken, Step, Value
from lobit.model import Config

HIDDEN = -1e9
"""Added to the score of a key that a query must not see: finite, since a block of keys may be hidden as a whole."""
SMALLEST_BOUND = 64
HALVED_FROM = 1024
"""From this number of slots on there is also a bound half way to its double."""


def bounds(context: int) -> list[int]:
    """The numbers of slots that a call may read, up to the context: 64, 128, 256, 512, 1024, 1536, 2048, 3072 and so on."""
    found, bound = [], SMALLEST_BOUND
    while bound < context:
        found += [bound, bound * 3 // 2] if bound >= HALVED_FROM else [bound]
        bound *= 2
    return [*(one for one in found if one < context), context]


class FloatEntries:
    """Keys and values in float32."""

    names = ("values",)
    dtypes = (torch.float32,)

    @staticmethod
    def widths(head_dim: int) -> tuple[int, ...]:
        """Elements per token and head of each tensor."""
        return (head_dim,)

    @staticmethod
    def encode(x: Tensor) -> tuple[Tensor, ...]:
        """x [1, T, heads, E] as the cache keeps it. It is cloned because a part's output must not be its input."""
        return (x.clone(),)

    @staticmethod
    def decode(entries: tuple[Tensor, ...]) -> Tensor:
        """The inverse of `encode`: floats [1, S, heads, E]."""
        return entries[0]


class Int8Entries:
    """Keys and values in INT8 with a scale and a zero point per token and head."""

    names = ("integers", "scale", "zero_point")
    dtypes = (torch.int8, torch.float32, torch.int8)

    @staticmethod
    def widths(head_dim: int) -> tuple[int, ...]:
        """See `FloatEntries`."""
        return head_dim, 1, 1

    @staticmethod
    def encode(x: Tensor) -> tuple[Tensor, ...]:
        """See `FloatEntries`."""
        ops = torch.ops.quantized_decomposed
        scale, zero_point = ops.choose_qparams_per_token_asymmetric.default(x, torch.int8)
        integers = ops.quantize_per_token.default(x, scale, zero_point, -128, 127, torch.int8)
        return integers, scale.to(torch.float32), zero_point.to(torch.int8)

    @staticmethod
    def decode(entries: tuple[Tensor, ...]) -> Tensor:
        """See `FloatEntries`. Dequantizing with a scale of 1 is what the delegate has for a plain change of type."""
        convert = torch.ops.quantized_decomposed.dequantize_per_tensor.default
        integers, scale, zero_point = entries
        return (convert(integers, 1.0, 0, -128, 127, torch.int8) - convert(zero_point, 1.0, 0, -128, 127, torch.int8)) * scale  # type: ignore[no-any-return]


Entries = type[FloatEntries] | type[Int8Entries]


class Encode(nn.Module):
    """Keys and values [1, T, K, E] as the cache keeps them."""

    def __init__(self, entries: Entries) -> None:
        super().__init__()
        self.entries = entries

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return *self.entries.encode(k), *self.entries.encode(v)


class Write(nn.Module):
    """Puts new entries [1, T, K, ·] into caches: from a position on, or into the slots of a ring."""

    def __init__(self, ring: bool) -> None:
        super().__init__()
        self.ring = ring

    def extra_repr(self) -> str:
        """Whether the caches are rings."""
        return "ring" if self.ring else ""

    def forward(self, where: Tensor, *tensors: Tensor) -> tuple[()]:
        half = len(tensors) // 2
        for new, cache in zip(tensors[:half], tensors[half:], strict=True):
            if self.ring:
                torch.ops.llama.update_cache_with_indices(new, cache, 0, where)
            else:
                torch.ops.llama.update_cache(new, cache, position_of(where, new.shape[1], cache.shape[1]))
        return ()


class Join(nn.Module):
    """Joins a ring's entries [1, R, K, ·] and new ones [1, T, K, ·], one after the other."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        half = len(tensors) // 2
        return tuple(torch.cat(pair, dim=1) for pair in zip(tensors[half:], tensors[:half], strict=True))


class Mask(nn.Module):
    """A mask [queries, keys] from float positions [queries, 1] and [keys]: 0 where a query sees a key, else `HIDDEN` or less.

    With a window, a key at a negative position is an empty slot, which is hidden.
    """

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window

    def extra_repr(self) -> str:
        """The window."""
        return str(self.window)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        later = keys - queries
        hidden = later.clamp(0, 1)
        if self.window is not None:
            hidden = hidden + (-later - (self.window - 1)).clamp(0, 1) + (-keys).clamp(0, 1)
        return hidden * HIDDEN


class Attend(nn.Module):
    """Attention as two batched products: q [1, T, H, E] over entries [1, S, K, ·] -> [1, T, H, E].

    Args:
        config: the model.
        entries: how keys and values are kept.
        slots: S of a cache whose slots are positions, so that the mask follows from the queries' positions; None: a mask is given.
    """

    keys: Tensor

    def __init__(self, config: Config, entries: Entries, slots: int | None = None) -> None:
        super().__init__()
        self.config, self.entries, self.slots = config, entries, slots
        if slots is not None:
            self.mask = Mask(None)
            self.register_buffer("keys", torch.arange(slots).float(), persistent=False)

    def forward(self, mask: Tensor, q: Tensor, *caches: Tensor) -> Tensor:
        """`mask` is that of `Mask`; where `slots` is given, it is the positions [T · H / K, 1] of the queries instead."""
        c, half = self.config, len(caches) // 2
        group = c.heads // c.kv_heads
        mask = mask if self.slots is None else self.mask(mask, self.keys)
        keys, values = (self.entries.decode(part).reshape(-1, c.kv_heads, c.head_dim) for part in (caches[:half], caches[half:]))
        queries = (q * c.scale).reshape(-1, c.kv_heads, group, c.head_dim).transpose(0, 1).reshape(c.kv_heads, -1, c.head_dim)
        scores = torch.bmm(queries, keys.permute(1, 2, 0)) + mask
        mixed = torch.bmm(torch.softmax(scores, dim=-1), values.permute(1, 0, 2))
        return mixed.reshape(c.kv_heads, -1, group, c.head_dim).transpose(0, 1).reshape(1, -1, c.heads, c.head_dim)


class Clear(nn.Module):
    """Fills caches with zeros: slots that were never written are multiplied by 0, so they must hold finite numbers."""

    def forward(self, *caches: Tensor) -> tuple[()]:
        for cache in caches:
            cache.zero_()
        return ()


def position_of(input_pos: Tensor, length: int, slots: int) -> int:
    """The position [1] as a number, checked so that `length` tokens from it on fit into the `slots` of a cache."""
    position = cast(int, input_pos.item())
    torch._check(position >= 0)
    torch._check(position < slots)
    torch._check(position + length <= slots)
    return position


class Caches:
    """The key-value caches of a model and the steps that attend with them.

    Args:
        config: the model.
        kv_bits: 8, or else the cache is of float32.
        context: positions that a layer without a window keeps.
        chunk: the most tokens in one call.
    """

    def __init__(self, config: Config, kv_bits: int | None, context: int, chunk: int) -> None:
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers torch.ops.llama)

        self.config, self.context, self.chunk = config, context, chunk
        self.entries: Entries = Int8Entries if kv_bits == 8 else FloatEntries
        self.slots = config.cache_slots(context)
        self.rings = sorted({layer.window for layer in config.layers if layer.window and layer.window < context})
        self.bounds = bounds(context) if any(layer.window not in self.rings for layer in config.layers) else []
        self.names = [f"{side}_{name}" for side in "kv" for name in self.entries.names]

    def declare(self, parts: Parts) -> None:
        """Declares the caches, and the values that steps hand to each other."""
        c, dtypes = self.config, self.entries.dtypes * 2
        widths = self.entries.widths(c.head_dim) * 2
        for name, dtype, width in zip(self.names, dtypes, widths, strict=True):
            parts.values[name] = Value((1, PerToken(), c.kv_heads, width), dtype)
            for ring in self.rings:
                parts.values[f"{name}_joined_{ring}"] = Value((1, PerToken(plus=ring), c.kv_heads, width), dtype)
            for layer, slots in enumerate(self.slots):
                cache = f"{name}_{layer}"
                parts.memories[cache] = Value((1, slots, c.kv_heads, width), dtype)
                for bound in self.bounds if slots == self.context else [slots]:
                    parts.values[f"{cache}[{bound}]"] = Value((1, bound, c.kv_heads, width), dtype, memory=cache)
        group = c.heads // c.kv_heads
        for ring in self.rings:
            parts.values[f"mask_{ring}"] = Value((PerToken(group), ring), overlay=f"mask of {ring}")
            parts.values[f"mask_joined_{ring}"] = Value((PerToken(group), PerToken(plus=ring)), overlay=f"mask of {ring}")

    def begin(self) -> list[Step | Choice]:
        """The steps before the first layer: they clear the caches at position 0, and make the masks of rings."""
        multiplied = [name for name, dtype in zip(self.names, self.entries.dtypes * 2, strict=True) if dtype.is_floating_point]
        clean = tuple(
            Step("clear", Clear(), tuple(f"{name}_{layer}[{slots}]" for name in multiplied)) for layer, slots in enumerate(self.slots)
        )
        steps: list[Step | Choice] = [Choice((("first", clean),))]
        for ring in self.rings:
            single = Step("mask", Mask(ring), ("queries", f"held_{ring}"), (f"mask_{ring}",))
            joined = Step("mask", Mask(ring), ("queries", f"joined_{ring}"), (f"mask_joined_{ring}",))
            steps.append(self._by_length((single,), (joined,)))
        return steps

    def _by_length(self, single: tuple[Step, ...], several: tuple[Step, ...]) -> Choice:
        return Choice((("single", single), (None, several))) if self.chunk > 1 else Choice(((None, single),))

    def _by_bound(self, step: Callable[[int], Step]) -> Choice:
        """The step for the first bound that holds the call's last token."""
        return Choice(tuple((None if bound == self.context else f"up_to_{bound}", (step(bound),)) for bound in self.bounds))

    def attend(self, layer: int) -> list[Step | Choice]:
        """The steps of a layer's attention, from q, k and v to y."""
        names = tuple(self.names)
        encode = Step("encode", Encode(self.entries), ("k", "v"), names)
        window = self.config.layers[layer].window
        if window is not None and window in self.rings:
            return [encode, self._attend_ring(layer, window)]
        write = Step("write", Write(ring=False), ("input_pos", *names, *self._cached(layer, self.context)))
        return [encode, write, self._by_bound(lambda bound: self._attend("queries", self._cached(layer, bound), bound))]

    def _attend(self, mask: str, entries: tuple[str, ...], slots: int | None = None) -> Step:
        return Step("attend", Attend(self.config, self.entries, slots), (mask, "q", *entries), ("y",))

    def _attend_ring(self, layer: int, ring: int) -> Choice:
        names, cached = tuple(self.names), self._cached(layer, ring)
        joined = tuple(f"{name}_joined_{ring}" for name in names)
        write = Step("write", Write(ring=True), (f"indices_{ring}", *names, *cached))
        join = Step("join", Join(), (*names, *cached), joined)
        single = (write, self._attend(f"mask_{ring}", cached))
        return self._by_length(single, (join, write, self._attend(f"mask_joined_{ring}", joined)))

    def _cached(self, layer: int, slots: int) -> tuple[str, ...]:
        return tuple(f"{name}_{layer}[{slots}]" for name in self.names)
