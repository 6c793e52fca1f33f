"""How a target keeps keys and values. Here: caches that are written in place by ExecuTorch's own operators.

A layer with a window has a ring of exactly that many slots. A query of a chunk may need keys that the chunk itself overwrites,
so attention reads the ring as it was before the chunk, joined with the chunk, and the chunk is written afterwards.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from lobit.model import Attend, Config, visible

HIDDEN = -1e9
"""Added to the score of a key that a query must not see: finite, since a block of keys may be hidden as a whole."""


class InPlaceCaches(nn.Module):
    """Key-value caches of every layer as buffers of the program.

    Args:
        config: the model.
        context: positions that a layer without a window keeps.
        chunk: the most tokens in one call.
    """

    steps: Tensor

    def __init__(self, config: Config, context: int, chunk: int) -> None:
        super().__init__()
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers torch.ops.llama)

        self.config = config
        self.slots = config.cache_slots(context)
        self.ring = [layer.window is not None and layer.window < context for layer in config.layers]
        self.register_buffer("steps", torch.arange(chunk), persistent=False)
        self.windows = sorted({slots for slots, ring in zip(self.slots, self.ring, strict=True) if ring})
        for window in self.windows:
            self.register_buffer(f"ring_{window}", torch.arange(window), persistent=False)

    @abstractmethod
    def attend_all(self, layer: int, position: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes k and v at `position`, then attends to all positions up to each query."""

    @abstractmethod
    def attend_ring(self, layer: int, view: RingView, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends to the ring and the chunk, then writes the chunk into the ring."""

    def at(self, input_pos: Tensor, length: int) -> Attend:
        """The attention of one call whose first token is at `input_pos` [1]."""
        position = cast(int, input_pos.item())
        torch._check(position >= 0)
        torch._check(position < max(self.slots))
        views = {window: self._view(window, input_pos, length) for window in self.windows}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.ring[layer]:
                return self.attend_ring(layer, views[self.slots[layer]], q, k, v)
            return self.attend_all(layer, position, q, k, v)

        return attend

    def _view(self, window: int, input_pos: Tensor, length: int) -> RingView:
        ring: Tensor = getattr(self, f"ring_{window}")
        queries = input_pos + self.steps[:length]
        last = input_pos - 1
        # ExecuTorch's portable remainder follows C's sign, so its operand is kept from being negative.
        held = last - torch.remainder(last + window - ring, window)
        seen = visible(queries, torch.cat([held, queries]), window)
        mask = torch.where(seen, 0.0, HIDDEN)
        return RingView(mask, (held >= 0)[None, :, None, None], torch.remainder(queries, window)[None])


class RingView:
    """A ring as one call sees it.

    Args:
        mask: added to the scores, float [T, window + T].
        filled: whether a slot has been written, bool [1, window, 1, 1].
        indices: the slots that the chunk goes to, int64 [1, T].
    """

    def __init__(self, mask: Tensor, filled: Tensor, indices: Tensor) -> None:
        self.mask, self.filled, self.indices = mask, filled, indices

    def join(self, cache: Tensor, new: Tensor, clean: bool = False) -> Tensor:
        """The ring [1, window, K, ·] and the chunk [1, T, K, ·], one after the other; `clean`: never written slots become 0."""
        return torch.cat([torch.where(self.filled, cache, 0.0) if clean else cache, new], dim=1)

    def write(self, cache: Tensor, new: Tensor) -> None:
        """Puts the chunk into the ring; of positions that share a slot the last stays."""
        torch.ops.llama.update_cache_with_indices(new, cache, 0, self.indices)


class FloatCaches(InPlaceCaches):
    """Keys and values in float32: per layer 2 · slots · K · E · 4 bytes."""

    def __init__(self, config: Config, context: int, chunk: int) -> None:
        super().__init__(config, context, chunk)
        for layer, slots in enumerate(self.slots):
            for part in "kv":
                self.register_buffer(f"{part}_{layer}", torch.zeros(1, slots, config.kv_heads, config.head_dim), persistent=False)

    def _caches(self, layer: int) -> tuple[Tensor, Tensor]:
        return getattr(self, f"k_{layer}"), getattr(self, f"v_{layer}")

    def attend_all(self, layer: int, position: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._caches(layer)
        torch.ops.llama.update_cache(k, keys, position)
        torch.ops.llama.update_cache(v, values, position)
        return torch.ops.llama.custom_sdpa(q, keys, values, position, None, 0.0, True, self.config.scale)  # type: ignore[no-any-return]

    def attend_ring(self, layer: int, view: RingView, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._caches(layer)
        joined_keys, joined_values = view.join(keys, k, clean=True), view.join(values, v, clean=True)
        y = torch.ops.llama.custom_sdpa(q, joined_keys, joined_values, 0, view.mask, 0.0, False, self.config.scale)
        view.write(keys, k)
        view.write(values, v)
        return y  # type: ignore[no-any-return]


class Int8Caches(InPlaceCaches):
    """Keys and values in INT8 with a scale and a zero point per token and head: per layer 2 · slots · K · (E + 5) bytes."""

    PARTS = ("integers", "scale", "zero_point")

    def __init__(self, config: Config, context: int, chunk: int) -> None:
        super().__init__(config, context, chunk)
        dtypes = {"integers": torch.int8, "scale": torch.float32, "zero_point": torch.int8}
        for layer, slots in enumerate(self.slots):
            for side in "kv":
                for part in self.PARTS:
                    width = config.head_dim if part == "integers" else 1
                    zeros = torch.zeros(1, slots, config.kv_heads, width, dtype=dtypes[part])
                    self.register_buffer(f"{side}_{part}_{layer}", zeros, persistent=False)

    def _caches(self, side: str, layer: int) -> list[Tensor]:
        return [getattr(self, f"{side}_{part}_{layer}") for part in self.PARTS]

    @staticmethod
    def quantize(x: Tensor) -> list[Tensor]:
        """x [1, T, heads, E] as integers, and scale and zero point [1, T, heads, 1]."""
        ops = torch.ops.quantized_decomposed
        scale, zero_point = ops.choose_qparams_per_token_asymmetric.default(x, torch.int8)
        integers = ops.quantize_per_token.default(x, scale, zero_point, -128, 127, torch.int8)
        return [integers, scale.to(torch.float32), zero_point.to(torch.int8)]

    def _attend(
        self, q: Tensor, keys: list[Tensor], values: list[Tensor], position: int, mask: Tensor | None
    ) -> Tensor:
        qi, qs, qz = self.quantize(q)
        (ki, ks, kz), (vi, vs, vz) = keys, values
        causal = mask is None
        return torch.ops.llama.custom_quantized_sdpa(  # type: ignore[no-any-return]
            qi, ki, vi, position, mask, 0.0, causal, self.config.scale, qz, qs, kz, ks, vz, vs
        )

    def attend_all(self, layer: int, position: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._caches("k", layer), self._caches("v", layer)
        for cache, new in zip(keys + values, self.quantize(k) + self.quantize(v), strict=True):
            torch.ops.llama.update_cache(new, cache, position)
        return self._attend(q, keys, values, position, None)

    def attend_ring(self, layer: int, view: RingView, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        caches = self._caches("k", layer) + self._caches("v", layer)
        chunk = self.quantize(k) + self.quantize(v)
        # A slot that was never written may hold anything; with a scale of 0 it stands for 0.
        joined = [view.join(cache, new, clean=cache.is_floating_point()) for cache, new in zip(caches, chunk, strict=True)]
        y = self._attend(q, joined[:3], joined[3:], 0, view.mask)
        for cache, new in zip(caches, chunk, strict=True):
            view.write(cache, new)
        return y


MakeCaches = Callable[[Config, int, int], InPlaceCaches]


def in_place_caches(kv_bits: int | None) -> MakeCaches:
    """The caches that a recipe asks for."""
    return FloatCaches if kv_bits is None else Int8Caches
