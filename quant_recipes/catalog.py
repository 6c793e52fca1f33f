"""The recipes by name."""

from __future__ import annotations

from typing import Literal

from lobit.errors import RecipeError
from lobit.quant_recipes.recipe import ENDS, Recipe, Rule, WeightGrid

LINEARS = ("layers.*",)
EVERYWHERE = (*ENDS, *LINEARS)
_GPTQ: tuple[tuple[Literal[3, 4, 6, 8], int | None, str], ...] = (
    (3, 128, "in groups of 128"),
    (4, 128, "in groups of 128"),
    (6, None, "per output channel"),
    (8, None, "per output channel"),
)
"""Bits, group size [Spectra section 4], and the words for it in a summary."""

_ALL = (
    Recipe(
        name="fp",
        summary="Nothing quantized: the float model on the target's runtime.",
        rules=(),
    ),
    Recipe(
        name="fp16",
        summary="Weights and embedding in half precision, computed with in single.",
        rules=(),
        float_bits=16,
        source="Spectra, FloatLM (section 2.1)",
    ),
    Recipe(
        name="8da4w-g32",
        summary="INT4 weights and embedding in groups of 32, INT8 dynamic activations, INT8 KV cache.",
        rules=(Rule(EVERYWHERE, WeightGrid(bits=4, group_size=32), activation_bits=8),),
        kv_bits=8,
        source="MobileLLM-Pro, Table 3 (CPU), eq. 3 and 4",
    ),
    Recipe(
        name="8da4w-g32-e8",
        summary="As 8da4w-g32, embedding and head INT8 per row: what to take where nothing is trained.",
        rules=(
            Rule(ENDS, WeightGrid(bits=8, group_size=None), activation_bits=8),
            Rule(LINEARS, WeightGrid(bits=4, group_size=32), activation_bits=8),
        ),
        kv_bits=8,
        source="MobileLLM-Pro, Table 3 (CPU), with the embedding of 8da8w",
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
        kv_bits=16,
        compute_bits=16,
        untied=True,
        source="MobileLLM-Pro, Table 3 (accelerator), vanilla ranges",
    ),
    Recipe(
        name="w4-channel-learned",
        summary="As w4-channel, the ranges of its weights learned in training.",
        rules=(Rule(EVERYWHERE, WeightGrid(bits=4, group_size=None, scale_rule="learned")),),
        kv_bits=16,
        compute_bits=16,
        untied=True,
        source="MobileLLM-Pro, section 7.1, Tables 3 and 15",
    ),
    Recipe(
        name="bitnet",
        summary="Ternary weights, one scale per matrix, INT8 activations without zero point; embedding and head half.",
        rules=(Rule(LINEARS, WeightGrid(2, None, "absmean", shards=1), activation_bits=8, activation_rule="absmax"),),
        float_bits=16,
        source="BitNet b1.58, eq. 1 to 3",
    ),
    Recipe(
        name="trilm",
        summary="Ternary weights, one scale per matrix, float activations; embedding and head half.",
        rules=(Rule(LINEARS, WeightGrid(2, None, "absmean", shards=1)),),
        float_bits=16,
        source="Spectra, Table 1 and section 3.3",
    ),
    Recipe(
        name="bonsai",
        summary="Ternary weights, a learned scale per output channel, float activations; embedding and head half.",
        rules=(Rule(LINEARS, WeightGrid(2, None, "row_norm")),),
        float_bits=16,
        source="Bonsai, eq. 1 and 2",
    ),
    Recipe(
        name="bilm",
        summary="Binary weights, one scale per matrix, float activations; embedding and head half.",
        rules=(Rule(LINEARS, WeightGrid(1, None, "absmean", shards=1)),),
        float_bits=16,
        source="Spectra, Table 1 and appendix B.2",
    ),
    *(
        Recipe(
            name=f"gptq-w{bits}",
            summary=f"INT{bits} weights {where}, rounded by GPTQ on a calibration text; float activations, embedding and head half.",
            rules=(Rule(LINEARS, WeightGrid(bits, group), rounding="gptq"),),
            float_bits=16,
            source="Spectra, section 4 (QuantLM); Frantar et al. 2022 (GPTQ)",
        )
        for bits, group, where in _GPTQ
    ),
)
CATALOG: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        RecipeError: no recipe has that name; the message lists the names.
    """
    if name not in CATALOG:
        raise RecipeError(f"there is no recipe {name!r}: choose one of {', '.join(CATALOG)} (`lobit recipes` describes them)")
    return CATALOG[name]
