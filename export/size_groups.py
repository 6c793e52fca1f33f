"""The bytes of a program's weights, kind by kind and format by format."""

from __future__ import annotations

from lobit.model import Config
from lobit.quant_recipes.recipe import WeightGrid
from lobit.quant_recipes.sizes import FLOAT, norms_and_biases
from lobit.runtime.manifest import TensorGroup


class Tally:
    """Adds up the parameters and bytes of each kind and format of weights."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], tuple[int, int]] = {}

    def add(self, kind: str, format: str, parameters: int, size: int) -> None:
        """Adds `parameters` weights of a kind and format, which take `size` bytes."""
        before = self._groups.get((kind, format), (0, 0))
        self._groups[kind, format] = before[0] + parameters, before[1] + size

    def add_norms_and_biases(self, config: Config) -> None:
        """Adds the norms and biases, which every target keeps in float32."""
        for kind, count in norms_and_biases(config):
            self.add(kind, "float32", count, FLOAT * count)

    def groups(self) -> list[TensorGroup]:
        """The sums, in the order in which their kinds and formats were first added."""
        return [TensorGroup(kind, format, *sizes) for (kind, format), sizes in self._groups.items()]


def stored_as(grid: WeightGrid, bits: int) -> str:
    """A grid's name and, where wider integers store it, their type: `ternary per channel as int4`."""
    return str(grid) if grid.bits == bits else f"{grid} as int{bits}"
