"""Predicts the sizes, memory and time of an export before anything slow is done.

The figures come from the shapes alone. File sizes follow from the formats and are within 3 %; memory and time were fitted to exports
of models from 0.1 to 1100 million parameters, and memory is within 25 %.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobit.errors import LobitError
from lobit.export.bundle import check_context, parameter_count
from lobit.export.target import Costs, Needs, Spec, find_target, problems_of
from lobit.model import Config
from lobit.quant_recipes.apply import layer_plans, problems
from lobit.quant_recipes.quantized import empty_model
from lobit.quant_recipes.recipe import Recipe
from lobit.quant_recipes.sizes import Size, checkpoint_sizes
from lobit.runtime.manifest import CacheInfo, TensorGroup

if TYPE_CHECKING:
    from lobit.export.plan_detail import Detail

COMPARED, COMPARED_TOKENS, COMPARED_BYTES = 4 << 20, 2048, 64
"""Logits that parity compares at once, the tokens that it reads by default, and bytes that a compared logit takes in all stages."""


@dataclass(frozen=True)
class Plan:
    """The predicted sizes, memory and time of an export."""

    parameters: int
    checkpoint: list[Size]
    """Bytes of each kind of weights in the quantized checkpoint, which is the same for every target."""
    checkpoint_bytes: int
    checkpoint_bits_per_weight: float
    """The checkpoint's bits over the float model's parameters; a head that the recipe unties adds to the bits alone."""
    weights: list[TensorGroup]
    """Bytes of the program's weights, by kind and format."""
    file_bytes: int
    """Bytes of the program, its weights included."""
    bits_per_weight: float
    """The program's bits over the float model's parameters."""
    cache: CacheInfo
    context: int
    chunk: int
    host_peak_bytes: int
    """Peak memory of the export, on the machine where it runs."""
    parity_peak_bytes: int
    """Peak memory of `lobit parity` on the machine where it runs; 0 where the export is not possible."""
    device_peak_bytes: int
    """Peak memory of the program when the context is full; what an app itself needs comes on top."""
    export_seconds: float
    problems: list[str]
    """Every reason why the export is not possible; empty where it is."""
    detail: Detail | None = None
    """Speed, energy and entropy as the papers model them; None where they were not asked for."""

    def to_json(self) -> dict[str, Any]:
        """The plan as the command prints it."""
        values = asdict(self)
        cache = values.pop("cache")
        values["detail"] = self.detail and self.detail.to_json()
        return {"kind": "plan", "kv_cache_bytes": self.cache.bytes, "kv_cache": cache, **values}


def plan(config: Config, spec: Spec, target: str, folder: Path | None = None) -> Plan:
    """The plan of an export.

    Args:
        config: the model.
        spec: what the program is made for.
        target: name of the target.
        folder: the model's, which has the tokenizer; None: that is not asked for.

    Raises:
        TargetError: there is no such target.
    """
    module, recipe = find_target(target), spec.recipe
    found = [*problems(config, recipe), *problems_of(target, spec, config, folder)]
    try:
        check_context(config, spec.context, spec.chunk)
    except LobitError as error:
        found.append(str(error))
        context = min(max(spec.context, 1), config.max_context)
        spec = replace(spec, context=context, chunk=min(max(spec.chunk, 1), context))
    cache, parameters = module.cache(spec, config), parameter_count(config)
    weights = module.weights(spec, config)
    needs = Needs(0, 0, 0)
    if not found:
        needs = module.needs(empty_model(config, recipe), spec)
    file_bytes = sum(group.bytes for group in weights) + needs.overhead_bytes
    seconds = expected_seconds(parameters, needs, module.COSTS)
    checkpoint = checkpoint_sizes(config, recipe)
    checkpoint_bytes = sum(size.bytes for size in checkpoint)
    return Plan(
        parameters=parameters,
        checkpoint=checkpoint,
        checkpoint_bytes=checkpoint_bytes,
        checkpoint_bits_per_weight=8 * checkpoint_bytes / parameters,
        weights=weights,
        file_bytes=file_bytes,
        bits_per_weight=8 * file_bytes / parameters,
        cache=cache,
        context=spec.context,
        chunk=module.step(spec),
        host_peak_bytes=host_peak(config, recipe, module.COSTS),
        parity_peak_bytes=0 if found else parity_peak(config, recipe, module.COSTS, needs),
        device_peak_bytes=needs.device_peak_bytes,
        export_seconds=module.COSTS.imports_seconds + sum(seconds.values()),
        problems=found,
    )


def expected_seconds(parameters: int, needs: Needs, costs: Costs) -> dict[str, float]:
    """Seconds of each stage of an export, on two cores of a server."""
    seconds = {name: rate * parameters for name, rate in costs.seconds_per_parameter.items()}
    seconds["lower"] += costs.seconds_per_part * needs.parts
    return seconds


def host_peak(config: Config, recipe: Recipe, costs: Costs) -> int:
    """Peak memory of an export in bytes: the exporter, the quantized model, and the largest working memory, which the head takes."""
    model, head = _integer_model(config, recipe)
    return round(costs.imports_bytes + costs.model_copies * model + costs.head_copies * head)


def parity_peak(config: Config, recipe: Recipe, costs: Costs, needs: Needs) -> int:
    """Bytes of memory that `lobit parity` needs, with its default number of tokens.

    These are the float model and the quantized one, the program as it is and opened into its parts, and what is computed of the logits
    that are compared at once.
    """
    model, _ = _integer_model(config, recipe)
    compared = COMPARED_BYTES * min(COMPARED, COMPARED_TOKENS * config.vocab_size)
    return costs.imports_bytes + 4 * parameter_count(config) + model + 2 * needs.device_peak_bytes + compared


def _integer_model(config: Config, recipe: Recipe) -> tuple[int, int]:
    """Bytes that the quantized model takes in memory, where integers take a byte, and bytes of its head alone."""
    model = head = 0
    for layer_plan in layer_plans(config, recipe):
        head = layer_plan.shape[0] * layer_plan.shape[1] * (1 if layer_plan.rule else 4)
        model += 0 if layer_plan.shared_with else head
    return model, head
