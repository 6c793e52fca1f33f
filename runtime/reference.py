"""The reference engine: runs the model in plain PyTorch, as it was trained (float32), or as a recipe rounds it and what it computes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lobit.model import CausalAttention, Config, Transformer, dot_product_attention, rotary_tables, twin, visible, weight_of
from lobit.quant_recipes.apply import layers_of
from lobit.quant_recipes.fake_quant import attention_for
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear
from lobit.quant_recipes.precision import computing
from lobit.quant_recipes.recipe import Recipe
from lobit.runtime.engine import Logits, SteppingEngine, check_tokens
from lobit.runtime.stored import StoredLayer


class FloatCache:
    """Keys and values of every position in float32, [1, context, K, E] for each layer; layers with a window mask older positions."""

    def __init__(self, config: Config, context: int) -> None:
        shape = (len(config.layers), 1, context, config.kv_heads, config.head_dim)
        self.config = config
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.position = 0

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start, end = self.position, self.position + q.shape[1]
        self.keys[layer, :, start:end], self.values[layer, :, start:end] = k, v
        seen = visible(torch.arange(start, end), torch.arange(end), self.config.layers[layer].window)
        return dot_product_attention(self.config, q, self.keys[layer, :, :end], self.values[layer, :, :end], seen)


class ReferenceEngine(SteppingEngine):
    """A float or converted model as an engine.

    Args:
        model: the model that `load_model` or `load_checkpoint` returned.
        recipe: the recipe that the model was converted with; None: it is a float model.
        context: number of positions to hold; None: the model's own context.
    """

    def __init__(self, model: Transformer, recipe: Recipe | None = None, context: int | None = None) -> None:
        config = model.config
        context = context or config.max_context
        super().__init__(self._step, context, context, config.vocab_size)
        self.model = model
        self.recipe = recipe
        self.cache: FloatCache | None = None

    @torch.inference_mode()
    def _step(self, tokens: list[int], position: int, count: int = 1) -> Logits:
        if self.cache is None:
            self.cache = FloatCache(self.model.config, self.context)
        self.cache.position = position
        tables = rotary_tables(self.model.config, torch.arange(position, position + len(tokens)))
        attend = attention_for(self.recipe, self.cache)
        with computing(self.recipe):
            x = self.model.run(self.model.embed(torch.tensor([tokens])), tables, attend)
            return self.model.score(x[:, -count:])[0].numpy()

    def score(self, tokens: Sequence[int], count: int | None = None) -> Logits:
        """See `Engine.score`."""
        check_tokens(self, tokens)
        logits = self._step(list(tokens), self.position, len(tokens) if count is None else count)
        self.position += len(tokens)
        return logits

    @torch.inference_mode()
    def read(self, tokens: list[int]) -> Callable[[Sequence[int]], Logits]:
        """Reads a sequence from position 0, apart from the engine's cache, which stays as it is.

        Returns:
            A function that computes the logits [n, V] at any positions of the sequence.
        """
        config = self.model.config
        attend = attention_for(self.recipe, CausalAttention(config))
        tables = rotary_tables(config, torch.arange(len(tokens)))
        with computing(self.recipe):
            stream = self.model.run(self.model.embed(torch.tensor([tokens])), tables, attend)

        @torch.inference_mode()
        def logits(positions: Sequence[int]) -> Logits:
            with computing(self.recipe):
                return self.model.score(stream[:, list(positions)])[0].numpy()

        return logits


MOVED = 1e-6
"""Share of an input. A sum of some hundred float32 products depends on their order by about as much (2^-24 for each, at random)."""
MOVED_FAR = 1e-4
"""Share of an input that is enough for entries to fall over rounding boundaries in every text of a small model too; with `MOVED` it is
left to chance whether any does (KL of small models from themselves: 1e-5 to 2e-4 with `MOVED`, 3e-4 to 8e-4 with this, 5e-4 to 1e-3 with
ten times this). Where nothing is rounded it costs 1e-9 to 1e-7 nats."""


MOVED_HALF = 2**-11
"""Share of an input that rounding to half precision changes at most: operations in another order, or in fewer steps, round elsewhere."""


def order_share(recipe: Recipe) -> float:
    """The share of an input by which two right implementations of a recipe's arithmetic may differ, as `moved` takes it."""
    if recipe.compute_bits == 16:
        return MOVED_HALF
    return MOVED_FAR if recipe.rules else MOVED


def moved(model: Transformer, share: float = MOVED) -> Transformer:
    """A twin that stands for sums in another order: the input of every product is changed at random by up to a share of itself.

    Two right implementations of one arithmetic differ by no less than `MOVED`. Where inputs are rounded to INT8, such a difference now
    and then takes an entry over a rounding boundary, by a whole step. What follows differs by more, and more and more entries fall over
    a boundary, until their number no longer depends on the first difference. So how far apart two right implementations end is a
    property of the model, and only a measurement tells it.
    """
    changed = twin(model)
    for number, (name, module) in enumerate(changed.named_modules()):
        if name == "head" or name.rpartition(".")[2] in LINEARS:
            module.register_forward_pre_hook(functools.partial(_move, number, share))
    return changed


def _move(seed: int, share: float, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)  # the same on every call
    return tuple(x * (1 + share * torch.empty(x.shape).uniform_(-1, 1, generator=generator)) for x in inputs)


VECTORS = (
    "attention_norm.weight",
    *(f"attention.{part}.bias" for part in "qkv"),
    *(f"attention.{part}_norm.weight" for part in "qk"),
    "attention.sub_norm.weight",
    "attention.o.bias",
    "post_attention_norm.weight",
    "mlp_norm.weight",
    "mlp.gate.bias",
    "mlp.up.bias",
    "mlp.sub_norm.weight",
    "mlp.down.bias",
    "post_mlp_norm.weight",
)
"""Norms and biases of a block in the order of execution."""
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
"""Products of a block, by the names of their modules."""


def stored_layers(model: Transformer) -> list[StoredLayer]:
    """The model's embedding and linear layers in the order of execution, for `verify`; a block that runs several times is repeated."""
    layers = []
    for name, module in _executed(model):
        if isinstance(module, (IntegerLinear, IntegerEmbedding)):
            layers.append(StoredLayer(name, module.integers.numpy(), module.scale.numpy()))
        else:
            layers.append(StoredLayer(name, weight_of(module).detach().numpy(), None))
    return layers


def stored_vectors(model: Transformer) -> list[StoredLayer]:
    """The model's norms and biases in the order of execution, for `verify`."""
    tensors = model.state_dict()
    names = [f"layers.{i}.{part}" for i in range(len(model.blocks)) for part in VECTORS * model.config.repeats]
    return [StoredLayer(name, tensors[name].float().numpy(), None) for name in (*names, "norm.weight") if name in tensors]


def _executed(model: Transformer) -> Iterator[tuple[str, nn.Module]]:
    """The layers of `layers_of`, those of a block as often as it runs."""
    for block, members in itertools.groupby(layers_of(model), key=lambda layer: layer[0].split(".")[:2]):
        yield from list(members) * (model.config.repeats if block[0] == "layers" else 1)
