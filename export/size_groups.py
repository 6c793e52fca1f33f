"""The bytes of a program's weights, kind by kind and format by format."""

from __future__ import annotations

from lobit.model import Config
from lobit.quant_recipes.recipe import WeightGrid
from lobit.quant_recipes.sizes import FLOAT, norms_and_biases
from lobit.runtime.manifest import TensorGroup


class Tally:
    """Adds up what kinds of weights take."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], tuple[int, int]] = {}

    def add(self, kind: str, format: str, parameters: int, size: int) -> None:
        """Counts `parameters` weights of a kind, and their bytes."""
        before = self._groups.get((kind, format), (0, 0))
        self._groups[kind, format] = before[0] + parameters, before[1] + size

    def add_norms_and_biases(self, config: Config) -> None:
        """Counts what every target keeps in float32."""
        for kind, count in norms_and_biases(config):
            self.add(kind, "float32", count, FLOAT * count)

    def groups(self) -> list[TensorGroup]:
        """The sums, in the order in which their kinds came."""
        return [TensorGroup(kind, format, *sizes) for (kind, format), sizes in self._groups.items()]


def stored_as(grid: WeightGrid, bits: int) -> str:
    """A grid's name, and the wider integers that hold its own where they do."""
    return str(grid) if grid.bits == bits else f"{grid} as int{bits}"
