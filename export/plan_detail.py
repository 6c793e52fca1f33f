"""Adds to a plan what papers reason with: the bytes that decoding a token reads, and the energy of its matrix products.

Both are models on paper, not measurements: each names its source and what it assumes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from lobit.model import Config
from lobit.quant_recipes.apply import layer_plans
from lobit.quant_recipes.entropy import Entropies
from lobit.quant_recipes.recipe import Recipe, Rule
from lobit.quant_recipes.sizes import kind_of
from lobit.runtime.manifest import CacheInfo

HALF = 2
"""Bytes of a half-precision float."""


class Group(Protocol):
    """A kind of weights and its bytes: a `manifest.TensorGroup`, or a `sizes.Size`."""

    @property
    def kind(self) -> str: ...
    @property
    def parameters(self) -> int: ...
    @property
    def bytes(self) -> int: ...


@dataclass(frozen=True)
class Decode:
    """How fast decoding could be if it did nothing but read memory [Spectra section 2.1 and Figure 2b]."""

    weight_bytes: int
    """Bytes of the program's weights that decoding a token reads."""
    cache_bytes: int
    """Bytes of the key-value cache when the context is full."""
    half_weight_bytes: int
    """Bytes of the same weights in half precision."""
    half_cache_bytes: int
    """Bytes of the same cache in half precision."""
    bandwidth_gb_s: float
    """Memory bandwidth in 10^9 bytes a second."""
    bandwidth_of: str
    """Where the figure of the bandwidth comes from."""
    source: str = "Spectra section 2.1 and Figure 2b, after Kim et al. 2024: decoding takes as long as reading memory does"
    assumes: tuple[str, ...] = (
        "each token reads the program's weights once, of an embedding that is not the head nothing, and the whole cache of a full context",
        "no weight stays in the processor's caches: a model that fits there can be faster",
        "arithmetic takes no time",
    )

    @property
    def speedup(self) -> float:
        """How many times as fast decoding could be as in half precision."""
        return (self.half_weight_bytes + self.half_cache_bytes) / (self.weight_bytes + self.cache_bytes)

    @property
    def tokens_per_second(self) -> float:
        """The most tokens that could be decoded in a second."""
        return self.bandwidth_gb_s * 1e9 / (self.weight_bytes + self.cache_bytes)


def read_groups(groups: Iterable[Group]) -> list[Group]:
    """The weights that decoding a token reads: all, but the embedding only where it is the head too."""
    found = list(groups)
    own_head = any(group.kind == "head" for group in found)
    return [group for group in found if not group.kind.startswith("embedding") or (group.kind == "embedding" and not own_head)]


def decode(config: Config, weights: Iterable[Group], cache: CacheInfo, bandwidth_gb_s: float, bandwidth_of: str) -> Decode:
    """What decoding a token reads from memory.

    Args:
        config: the model.
        weights: the program's weights by kind.
        cache: the key-value cache of a full context.
        bandwidth_gb_s: bandwidth of the memory that they are read from, in 10^9 bytes a second.
        bandwidth_of: where the figure of the bandwidth comes from.
    """
    read = read_groups(weights)
    between = [group for group in read if group.kind not in ("embedding", "head")]
    return Decode(
        weight_bytes=sum(group.bytes for group in read),
        cache_bytes=cache.bytes,
        half_weight_bytes=HALF * (config.vocab_size * config.hidden_size + sum(group.parameters for group in between)),
        half_cache_bytes=HALF * 2 * sum(cache.slots) * config.kv_heads * config.head_dim,
        bandwidth_gb_s=bandwidth_gb_s,
        bandwidth_of=bandwidth_of,
    )


PICOJOULES = {"FP16": (0.16, 0.34), "INT8": (0.007, 0.07)}
"""Energy of an addition and of a multiplication at 7 nm [BitNet (Wang et al. 2023) Table 2, after Horowitz 2014 and Zhang et al. 2022]."""
FLOAT_OPERATION = sum(PICOJOULES["FP16"])


@dataclass(frozen=True)
class Products:
    """Matrix products of one kind for one token."""

    kind: str
    """`attention` and `mlp`: the layers' linears; `head`; `scores and sums`: q·k and what follows the softmax."""
    operation: str
    """The operation that each weight takes, such as `INT8 addition`."""
    number: int
    """Number of operations: one for each weight, or for each entry of the cache and each query head that reads it."""
    picojoules: float
    """Energy of one operation."""

    @property
    def saving(self) -> float:
        """The energy of a multiply-add in FP16 over that of one operation here."""
        return FLOAT_OPERATION / self.picojoules


@dataclass(frozen=True)
class Energy:
    """Energy of the arithmetic in a token's matrix products [BitNet b1.58 section 3 and Figure 3]."""

    products: list[Products]
    source: str = "BitNet b1.58 Figure 3; pJ at 7 nm: BitNet (Wang et al. 2023) Table 2, after Horowitz 2014 and Zhang et al. 2022"
    assumes: tuple[str, ...] = (
        "an addition and a multiplication for each weight, an addition alone where it is ternary or binary, whatever the target does",
        "floats count as FP16, other integers as INT8 where activations are INT8 and as FP16 where they are not",
        "attention over a full context",
        "scales, norms and the softmax are left out, and so is moving data, which takes more than arithmetic",
    )

    @property
    def microjoules(self) -> float:
        """Energy for one token."""
        return sum(row.number * row.picojoules for row in self.products) / 1e6

    @property
    def half_microjoules(self) -> float:
        """Energy for one token with everything in FP16."""
        return sum(row.number for row in self.products) * FLOAT_OPERATION / 1e6

    @property
    def saving(self) -> float:
        """The energy for a token in FP16 over the energy here."""
        return self.half_microjoules / self.microjoules


def operation_of(rule: Rule | None) -> tuple[str, float]:
    """The operation that a weight under a rule takes in a product, and its picojoules."""
    kind = "INT8" if rule and rule.activation_bits else "FP16"
    addition, multiplication = PICOJOULES[kind]
    if rule and rule.weights.bits <= 2:
        return f"{kind} addition", addition
    return f"{kind} multiply-add", addition + multiplication


def energy(config: Config, recipe: Recipe, slots: Iterable[int]) -> Energy:
    """The energy of a token's matrix products.

    Args:
        config: the model.
        recipe: the recipe that it is quantized with.
        slots: positions that each layer attends to.
    """
    numbers: dict[tuple[str, str, float], int] = {}
    for layer_plan in layer_plans(config, recipe):
        if layer_plan.name != "embedding":
            key = (kind_of(layer_plan.name), *operation_of(layer_plan.rule))
            runs = 1 if layer_plan.name == "head" else config.repeats
            numbers[key] = numbers.get(key, 0) + runs * layer_plan.shape[0] * layer_plan.shape[1]
    numbers["scores and sums", *operation_of(None)] = 2 * sum(slots) * config.heads * config.head_dim
    return Energy([Products(kind, operation, number, each) for (kind, operation, each), number in numbers.items()])


@dataclass(frozen=True)
class Detail:
    """Speed, energy and entropy as the papers model them."""

    decode: Decode
    energy: Energy
    entropy: Entropies | None
    """Entropies of the float model's weights; None where the model is quantized already."""

    def to_json(self) -> dict[str, Any]:
        """The detail as the command prints it."""
        decode, energy = self.decode, self.energy
        return asdict(self) | {
            "decode": asdict(decode) | {"speedup": decode.speedup, "tokens_per_second": decode.tokens_per_second},
            "energy": asdict(energy) | {"microjoules": energy.microjoules, "half_microjoules": energy.half_microjoules},
        }
