"""The recipes by name."""

from __future__ import annotations

from lobit.errors import RecipeError
from lobit.quant_recipes.recipe import Recipe, Rule, WeightGrid

EVERYWHERE = ("embedding", "head", "layers.*")

_ALL = (
    Recipe(
        name="fp",
        summary="Nothing quantized: the float model on the target's runtime.",
        rules=(),
    ),
    Recipe(
        name="8da4w-g32",
        summary="INT4 weights and embedding in groups of 32, INT8 dynamic activations, INT8 KV cache.",
        rules=(Rule(EVERYWHERE, WeightGrid(bits=4, group_size=32), activation_bits=8),),
        kv_bits=8,
        source="MobileLLM-Pro, Table 3 (CPU), eq. 3 and 4",
    ),
    Recipe(
        name="8da8w",
        summary="INT8 weights and embedding per output channel, INT8 dynamic activations, INT8 KV cache.",
        rules=(Rule(EVERYWHERE, WeightGrid(bits=8, group_size=None), activation_bits=8),),
        kv_bits=8,
        source="MobileLLM-Pro, eq. 3 and 4 at 8 bits and per channel",
    ),
    Recipe(
        name="w4-channel",
        summary="INT4 weights and embedding per output channel, 16-bit float activations and KV cache, head untied.",
        rules=(Rule(EVERYWHERE, WeightGrid(bits=4, group_size=None)),),
        untied=True,
        source="MobileLLM-Pro, Table 3 (accelerator), vanilla ranges",
    ),
)
CATALOG: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        RecipeError: there is none; the message lists the names.
    """
    if name not in CATALOG:
        raise RecipeError(f"there is no recipe {name!r}: choose one of {', '.join(CATALOG)} (`lobit recipes` describes them)")
    return CATALOG[name]
