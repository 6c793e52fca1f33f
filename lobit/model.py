"""One Transformer for the dense Llama-like families.

A family is a `Config`: families differ by flags here and by a map of names in `families.py`.
Attention is left to the caller (`Attend`), because every runtime keeps its key-value cache in its own way.

Shapes: B batch, T tokens, D hidden size, H query heads, K key-value heads, E head size, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lobit.rope import Rope, RotateHalf, Table, Tables, rotary_table


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer."""

    window: int | None = None
    """Tokens that a query sees, its own included; None: its own and all before it."""
    rope: Rope | None = None
    """None: a layer without rotary embedding (SmolLM3's NoPE layers)."""


@dataclass(frozen=True)
class Config:
    """A dense decoder. Sizes are numbers of elements; `layers` has one entry per executed layer."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    max_context: int
    norm_eps: float
    tied: bool
    """Whether the head shares the embedding's weight."""
    activation: Literal["silu", "gelu_tanh", "relu2"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "weighted", "weightless"] = "none"
    post_norms: bool = False
    """Norms after attention and after the feed-forward, before each is added (Gemma 3)."""
    sub_norms: bool = False
    """Norms before the attention output product and before the down product (BitNet b1.58 2B4T)."""
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    """Factor on q·k; None: head_dim ** -0.5."""
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    repeats: int = 1
    """How often each block runs in a row with the same weights (MobileLLM's layer sharing)."""
    ternary: Literal["none", "multiply", "divide", "online"] = "none"
    """How checkpoints keep the layers' linear weights: as floats, as ternary codes to multiply with a scale or to divide by one, or
    as floats that are rounded to ternary on use (transformers' `bitnet` quantization). The model here holds the resulting floats."""

    @property
    def scale(self) -> float:
        """Factor on q·k."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def cache_slots(self, context: int) -> list[int]:
        """Positions that each layer's key-value cache keeps: its window where it has one, else the context."""
        return [min(layer.window or context, context) for layer in self.layers]

    @property
    def largest_window(self) -> int:
        """The longest window of a windowed layer; 0 where there is none."""
        return max((layer.window or 0 for layer in self.layers), default=0)


Kind = TypeVar("Kind", bound=nn.Module)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [B, T, H, E], k [B, T, K, E], v [B, T, K, E]) -> [B, T, H, E]; keeps k and v where it has a cache."""


def rotary_tables(config: Config, positions: Tensor) -> Tables:
    """Cosine and sine of `positions` [T] for each kind of rotary embedding in the model."""
    tables: Tables = {}
    for rope in {layer.rope for layer in config.layers if layer.rope}:
        frequencies, factors = rope.spectrum(config.head_dim)
        tables[rope] = rotary_table(positions, frequencies.to(positions.device), factors.to(positions.device))
    return tables


def softcap(scores: Tensor, cap: float | None) -> Tensor:
    """Scores squashed into (-cap, cap) by tanh, or unchanged where there is no cap."""
    return scores if cap is None else torch.tanh(scores / cap) * cap


class RMSNorm(nn.Module):
    """x · w / sqrt(mean(x²) + eps) over the last axis; no w where `weighted` is false."""

    def __init__(self, size: int, eps: float, weighted: bool = True) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size)) if weighted else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.size,), self.weight, self.eps)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer or an embedding, which may hold floats, fake-quantized floats or integers."""
    return cast(Tensor, layer.weight)


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias [out] of a linear layer of any kind, or None."""
    return cast("Tensor | None", linear.bias)


class Attention(nn.Module):
    """Grouped-query attention: projections, head norms and rotary embedding; the caller combines q, k and v (`Attend`)."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        d, h, k, e = config.hidden_size, config.heads, config.kv_heads, config.head_dim
        self.q: nn.Module = nn.Linear(d, h * e, bias=config.qkv_bias)
        self.k: nn.Module = nn.Linear(d, k * e, bias=config.qkv_bias)
        self.v: nn.Module = nn.Linear(d, k * e, bias=config.qkv_bias)
        self.o: nn.Module = nn.Linear(h * e, d, bias=config.o_bias)
        if config.qk_norm != "none":
            self.q_norm = RMSNorm(e, config.norm_eps, config.qk_norm == "weighted")
            self.k_norm = RMSNorm(e, config.norm_eps, config.qk_norm == "weighted")
        if config.sub_norms:
            self.sub_norm = RMSNorm(h * e, config.norm_eps)
        self.rope = config.layers[index * config.repeats].rope
        self.turn: nn.Module = RotateHalf(self.rope.dim) if self.rope else nn.Identity()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H·E], k and v [B, T, K·E]."""
        return self.q(x), self.k(x), self.v(x)

    def heads(self, x: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, E], k and v [B, T, K, E] after head norms and rotary embedding."""
        q, k, v = (part.reshape(*x.shape[:2], -1, self.config.head_dim) for part in self.project(x))
        if self.config.qk_norm != "none":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self._rotate(q, tables[self.rope]), self._rotate(k, tables[self.rope])
        return q, k, v

    def _rotate(self, x: Tensor, table: Table) -> Tensor:
        """Rotary embedding of x [B, T, heads, E]."""
        return x * table.cos + self.turn(x) * table.sin  # type: ignore[no-any-return]

    def output(self, y: Tensor) -> Tensor:
        """The output projection [B, T, D] of attention y [B, T, H, E]."""
        y = y.reshape(*y.shape[:2], -1)
        return self.o(self.sub_norm(y) if self.config.sub_norms else y)  # type: ignore[no-any-return]


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh formula, written out: XNNPACK's partitioner would take torch's for the exact GELU."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


class MLP(nn.Module):
    """down(activation(gate(x)) · up(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate: nn.Module = nn.Linear(d, f, bias=bias)
        self.up: nn.Module = nn.Linear(d, f, bias=bias)
        self.down: nn.Module = nn.Linear(f, d, bias=bias)
        if config.sub_norms:
            self.sub_norm = RMSNorm(f, config.norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """gate and up, each [B, T, F]."""
        return self.gate(x), self.up(x)

    def activate(self, x: Tensor) -> Tensor:
        """The activation of the gate."""
        match self.config.activation:
            case "gelu_tanh":
                return gelu_tanh(x)
            case "relu2":
                return F.relu(x).square()
        return F.silu(x)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x)
        y = self.activate(gate) * up
        return self.down(self.sub_norm(y) if self.config.sub_norms else y)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and feed-forward, each applied after a norm and added to the residual stream."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.norm_eps
        self.attention_norm = RMSNorm(d, eps)
        self.attention = Attention(config, index)
        self.mlp_norm = RMSNorm(d, eps)
        self.mlp = MLP(config)
        self.post_attention_norm: nn.Module = RMSNorm(d, eps) if config.post_norms else nn.Identity()
        self.post_mlp_norm: nn.Module = RMSNorm(d, eps) if config.post_norms else nn.Identity()

    def forward(self, x: Tensor, layer: int, tables: Tables, attend: Attend) -> Tensor:
        q, k, v = self.enter(x, tables)
        return self.leave(x, attend(layer, q, k, v))

    def enter(self, x: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, E], k and v [B, T, K, E] of the residual stream x [B, T, D]."""
        return self.attention.heads(self.attention_norm(x), tables)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual stream x [B, T, D] with attention y [B, T, H, E] and then the feed-forward added."""
        x = x + self.post_attention_norm(self.attention.output(y))
        return x + self.post_mlp_norm(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Embedding, blocks, final norm, head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(len(config.layers) // config.repeats))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.rotated: tuple[str, ...] = ()
        """The parts of the model that a recipe has rotated (`Recipe.rotate`)."""

    @property
    def blocks(self) -> list[Block]:
        """The blocks, each once, however often it runs."""
        return cast("list[Block]", list(self.layers))

    def embed(self, tokens: Tensor) -> Tensor:
        """The residual stream [B, T, D] that tokens [B, T] begin with."""
        return self.embedding(tokens) * self.config.embedding_scale  # type: ignore[no-any-return]

    def run(self, x: Tensor, tables: Tables, attend: Attend, layers: range | None = None) -> Tensor:
        """The residual stream x [B, T, D] after the given layers, by the order of execution; None: after all."""
        for layer in range(len(self.config.layers)) if layers is None else layers:
            x = self.layers[layer // self.config.repeats](x, layer, tables, attend)
        return x

    def score(self, x: Tensor) -> Tensor:
        """Logits [B, T, V] of the residual stream x [B, T, D] after the last layer."""
        return self.cap(self.head(self.norm(x)))

    def cap(self, scores: Tensor) -> Tensor:
        """What the head gives, capped where the family caps its logits."""
        return softcap(scores, self.config.logits_softcap)

    def forward(self, tokens: Tensor, tables: Tables | None = None, attend: Attend | None = None) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]; without tables and attention, the tokens are a whole sequence that begins at position 0."""
        if tables is None:
            tables = rotary_tables(self.config, torch.arange(tokens.shape[1], device=tokens.device))
        return self.score(self.run(self.embed(tokens), tables, attend or CausalAttention(self.config)))


def replace_layers(model: Transformer, kind: type[Kind], replace: Callable[[Kind], nn.Module]) -> None:
    """Replaces every module of `kind` by `replace(module)`, in place; a module that is in two places is replaced by one."""
    made: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, kind):
            made[module] = made.get(module) or replace(module)
            model.set_submodule(name, made[module])


def twin(model: Transformer) -> Transformer:
    """A copy of a model that shares all tensors with it: layers of the copy can be replaced without memory for the others."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees, from their positions: bool [queries, keys]; keys at negative positions are empty slots."""
    distance = queries[:, None] - keys[None, :]
    seen = (distance >= 0) & (keys >= 0)[None, :]
    return seen if window is None else seen & (distance < window)


def dot_product_attention(config: Config, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """softmax(scale · q kᵀ) v of q [B, T, H, E] over k, v [B, S, K, E], only where `seen` [T, S] is true; [B, T, H, E]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if config.attention_softcap is None:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=config.scale, enable_gqa=True)
        return mixed.transpose(1, 2)
    groups = config.heads // config.kv_heads
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = softcap(q @ k.transpose(2, 3) * config.scale, config.attention_softcap)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(1, 2)


class CausalAttention:
    """Attention over one whole sequence, without a cache."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[1], device=q.device)
        seen = visible(positions, positions, self.config.layers[layer].window)
        return dot_product_attention(self.config, q, k, v, seen)


class FloatAttention(CausalAttention):
    """Causal attention in float32 where the rest of the model is autocast: it is faster on a CPU and rounds less."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return super().__call__(layer, q.float(), k.float(), v.float())
