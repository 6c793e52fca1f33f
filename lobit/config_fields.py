"""Reading the fields of a config.json: sizes, numbers, flags, and the rotary embeddings and windows that several families share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lobit.errors import shown
from lobit.rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling

LARGEST_SIZE = 1 << 24
"""No real config.json holds a larger width, context or vocabulary; a larger one is a damaged file."""
LARGEST = {"num_hidden_layers": 1 << 10, "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12, "head_dim": 1 << 14}
"""Largest values of fields that need a tighter bound, so that a damaged file costs neither time nor memory."""
NUMBERS = (1e-12, 1e12)
"""Smallest and largest value of any factor, base or epsilon; float32 can hold their products."""


class Fields:
    """The fields of a config.json; a missing or absurd value is noted in `problems` and does not stop the reading."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.problems: list[str] = []

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number, or 1 where the field is not usable."""
        value, largest = self.values.get(name), LARGEST.get(name, LARGEST_SIZE)
        value = default if value is None else value
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest:
            return value
        self.problems.append(f"{name} is {shown(value)}: a whole number from 1 to {largest} is needed")
        return 1

    def number(self, name: str, default: float | None = None, least: float = NUMBERS[0], largest: float = NUMBERS[1]) -> float:
        """A number from `least` to `largest`, or 1 where the field is not usable."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= largest:
            return float(value)
        self.problems.append(f"{name} is {shown(value)}: a number from {least:g} to {largest:g} is needed")
        return 1.0

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false; `default` where the field is missing or not usable."""
        value = self.values.get(name)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.problems.append(f"{name} is {shown(value)}: true or false is needed")
        return default

    def numbers(self, name: str, length: int) -> list[Any] | None:
        """A list of `length` entries, or None where the field is missing or not usable."""
        value = self.values.get(name)
        if value is None or (isinstance(value, list) and len(value) == length):
            return value
        self.problems.append(f"{name} has {len(value) if isinstance(value, list) else shown(value)}: {length} entries are needed")
        return None

    def nested(self, name: str) -> Fields:
        """The object under `name`, empty where there is none; its problems are added to those of this object."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            self.problems.append(f"{name} is {shown(value)}: an object is needed")
        inner = Fields(value if isinstance(value, dict) else {})
        inner.problems = self.problems
        return inner


FULL, SLIDING = "full_attention", "sliding_attention"
"""transformers' names of kinds of layers."""
ROPE_FIELDS: dict[str, set[str]] = {
    "default": set(),
    "dynamic": {"factor"},
    "linear": {"factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "longrope": {"factor", "short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"},
}
"""Parameters that each kind of rotary embedding has."""
ANY_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "finetuned"}
"""Parameters that any kind may have, whether it uses them or not."""
NO_CHANGE = {"factor": 1, "attention_factor": 1}
"""Parameters that have no effect with these values, whatever the kind."""


def _rope_parameters(fields: Fields) -> Fields:
    """transformers 4's `rope_scaling` or 5's `rope_parameters`; the former takes precedence, as in transformers.

    `partial_rotary_factor` may also be a field of config.json itself.
    """
    parameters = fields.nested("rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters")
    parameters.values = {"partial_rotary_factor": fields.values.get("partial_rotary_factor"), **parameters.values}
    return parameters


def _rope_kind(parameters: Fields, known: Sequence[str], aliases: Mapping[str, str] | None = None) -> str:
    """The kind of rotary embedding, or `default` where the field is not usable.

    Args:
        parameters: of the rotary embedding.
        known: kinds that the family can have.
        aliases: other names of kinds, and the kinds that they mean.
    """
    kind = parameters.values.get("rope_type", parameters.values.get("type", "default"))
    kind = (aliases or {}).get(kind, kind) if isinstance(kind, str) else kind
    if kind not in known:
        parameters.problems.append(f"rope_type is {shown(kind)}: {', '.join(known)} are known for this family")
        return "default"
    given = {key for key, value in parameters.values.items() if value is not None and value != NO_CHANGE.get(key)}
    unknown = sorted(map(shown, given - ROPE_FIELDS[kind] - ANY_ROPE))
    if unknown:
        parameters.problems.append(f"rotary embedding of rope_type {kind} has {', '.join(unknown[:9])}: {kind} has no such field")
    return str(kind)


def _turned_share(parameters: Fields) -> float:
    """The share of each head's entries that the rotary embedding rotates."""
    return parameters.number("partial_rotary_factor", 1.0, largest=1)


def read_rope(parameters: Fields, head_dim: int, theta: float, context: int) -> Rope:
    """Rotary embedding of whole heads.

    The kind `dynamic` is the same as `default` up to the model's context, and lobit does not go beyond that.

    Args:
        parameters: of the rotary embedding, under transformers 5's names.
        head_dim: entries of a head.
        theta: the base where the parameters have none.
        context: of the model.
    """
    kind = _rope_kind(parameters, ("default", "dynamic", "linear", "llama3", "yarn"))
    scaling: Llama3Scaling | LinearScaling | YarnScaling | None = None
    if kind == "llama3":
        scaling = Llama3Scaling(
            parameters.number("factor", least=1),
            parameters.number("low_freq_factor"),
            parameters.number("high_freq_factor"),
            parameters.size("original_max_position_embeddings"),
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            parameters.problems.append("rope scaling llama3: low_freq_factor must be below high_freq_factor")
    elif kind == "linear":
        scaling = LinearScaling(parameters.number("factor", least=1))
    elif kind == "yarn":
        scaling = _yarn(parameters, context)
    if _turned_share(parameters) != 1:
        parameters.problems.append("partial_rotary_factor is below 1: this family turns whole heads")
    base = parameters.number("rope_theta", theta, least=1)
    if kind == "yarn" and base == 1:
        parameters.problems.append("rope_theta is 1: yarn needs frequencies that differ")
        scaling = None
    return Rope(base, head_dim, scaling)


def _yarn(parameters: Fields, context: int) -> YarnScaling:
    """YaRN, with transformers' defaults (`_compute_yarn_parameters`)."""
    factor = parameters.number("factor", least=1)
    default = 0.1 * math.log(factor) + 1
    if parameters.values.get("mscale") and parameters.values.get("mscale_all_dim"):
        above, below = (0.1 * parameters.number(name) * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim"))
        default = above / below
    return YarnScaling(
        factor,
        parameters.number("attention_factor", default),
        parameters.size("original_max_position_embeddings", context),
        parameters.number("beta_fast", 32.0),
        parameters.number("beta_slow", 1.0),
        parameters.flag("truncate", True),
    )


def only_rope(fields: Fields, head_dim: int) -> Rope:
    """The rotary embedding of families that have only one."""
    theta, context = fields.number("rope_theta", 10000.0, least=1), fields.size("max_position_embeddings")
    return read_rope(_rope_parameters(fields), head_dim, theta, context)


def long_rope(fields: Fields, head_dim: int, context: int) -> tuple[Rope, int]:
    """Phi-3's rotary embedding, and the context up to which it is valid.

    A longrope has one set of factors up to the original context and another beyond it, chosen anew by the length of each
    sequence (transformers `longrope_frequency_update`). A program has one table, so lobit uses the first set and ends at the
    original context.
    """
    parameters = _rope_parameters(fields)
    kind = _rope_kind(parameters, ("default", "longrope"), {"su": "longrope", "yarn": "longrope"})
    theta = parameters.number("rope_theta", fields.number("rope_theta", 10000.0, least=1), least=1)
    dim = int(head_dim * _turned_share(parameters))
    if kind == "default":
        return Rope(theta, dim), context
    original = fields.size("original_max_position_embeddings", 4096)
    stretch = parameters.number("factor", context / original)
    default = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 and original > 1 else 1.0
    scaling = LongRopeScaling(_factors(parameters, "short_factor", dim // 2), parameters.number("attention_factor", default))
    return Rope(theta, dim, scaling), min(context, original)


def _factors(parameters: Fields, name: str, length: int) -> tuple[float, ...]:
    """Positive numbers, one for each of `length` frequencies."""
    values = parameters.numbers(name, length)
    if values is None:
        parameters.problems.append(f"{name} is needed: {length} numbers")
        return (1.0,) * length
    entries = Fields({str(i): value for i, value in enumerate(values)})
    factors = tuple(entries.number(str(i)) for i in range(length))
    parameters.problems += [f"{name}, entry {problem}" for problem in entries.problems]
    return factors


def read_windows(fields: Fields, kinds: Sequence[str]) -> list[int | None]:
    """The window of each layer; None for full attention.

    Args:
        fields: with `sliding_window`, and `layer_types` where the file has them.
        kinds: the kind of each layer where the file has no `layer_types`.
    """
    kinds = fields.numbers("layer_types", len(kinds)) or kinds
    unknown = [shown(kind) for kind in kinds if kind not in (FULL, SLIDING)]
    if unknown:
        fields.problems.append(f"layer_types has {', '.join(unknown[:9])}: {FULL} and {SLIDING} are known")
    window = fields.size("sliding_window") if SLIDING in kinds else None
    return [window if kind == SLIDING else None for kind in kinds]


def layers_with_rope(fields: Fields, depth: int) -> list[bool]:
    """Which layers have rotary embedding: those with a 1 in `no_rope_layers`, despite its name.

    The list may be longer than the model is deep. Source: transformers `SmolLM3Config` and `Llama4TextConfig`.
    """
    flags = fields.values.get("no_rope_layers")
    if flags is None or flags == []:
        interval = fields.size("no_rope_layer_interval", 4)
        return [(i + 1) % interval != 0 for i in range(depth)]
    if not isinstance(flags, list) or len(flags) < depth or any(flag not in (0, 1) for flag in flags):
        fields.problems.append(f"no_rope_layers is {shown(flags)}: an entry of 0 or 1 for each of {depth} layers is needed")
        return [True] * depth
    return [flag == 1 for flag in flags[:depth]]
