"""The bytes of checkpoints, against saved ones and against the papers' tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lobit.checkpoint import save_model
from lobit.families import read_config
from lobit.model import Config, Layer, Transformer, weight_of
from lobit.quant_recipes.apply import convert, layer_plans, layers_of, skeleton
from lobit.quant_recipes.catalog import CATALOG
from lobit.quant_recipes.integer import quantize_linear
from lobit.quant_recipes.quantized import WEIGHTS_FILE, save_checkpoint
from lobit.quant_recipes.recipe import Recipe
from lobit.quant_recipes.sizes import Size, checkpoint_bytes, checkpoint_sizes, kind_of

WIDTHS = {"hidden_size": 55, "intermediate_size": 25, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}
"""Rows of 55, 30 and 25 integers: few fill their bytes."""
GROUPS = {"biases": 5, "tied, weighted norms of q and k": 5, "rows of 52": 1}
MODELS: dict[str, dict[str, Any]] = {
    "biases": {"model_type": "llama", "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "tied, weighted norms of q and k": {"model_type": "qwen3", "tie_word_embeddings": True},
    "rows of 52": {"model_type": "llama", "tie_word_embeddings": True, "hidden_size": 52, "num_attention_heads": 4, "head_dim": 12},
}
HALF = CATALOG["fp16"]
"""A float model in half precision, as the papers count it."""


def with_small_groups(recipe: Recipe, size: int) -> Recipe:
    return recipe.with_changes(group_size=size) if any(rule.weights.group_size for rule in recipe.rules) else recipe


def saved(values: dict[str, Any], recipe: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a random model's checkpoint."""
    model = Transformer(read_config(values))
    save_model(model, values, folder / "float")
    rules = {name: (module, recipe.rule_for(name)) for name, module in layers_of(model)}
    calibrated = {name: quantize_linear(weight_of(module).detach(), rule.weights) for name, (module, rule) in rules.items() if rule}
    save_checkpoint(convert(model, recipe, calibrated=calibrated), recipe, folder / "float", folder)
    return load_file(folder / WEIGHTS_FILE)


def kind_of_tensor(name: str) -> str:
    return "norms" if "norm" in name else "biases" if name.endswith(".bias") else kind_of(name)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CATALOG)
def test_every_recipe_takes_the_bytes_of_a_saved_checkpoint(name: str, model: str, tmp_path: Path) -> None:
    values = {"vocab_size": 37, "num_hidden_layers": 2, "max_position_embeddings": 16, "rms_norm_eps": 1e-5} | WIDTHS | MODELS[model]
    config = read_config(values)
    recipe = with_small_groups(CATALOG[name], GROUPS[model])
    tensors = saved(values, recipe, tmp_path)
    sizes = checkpoint_sizes(config, recipe)
    found: dict[str, int] = {}
    for key, tensor in tensors.items():
        found[kind_of_tensor(key)] = found.get(kind_of_tensor(key), 0) + tensor.nbytes
    assert {size.kind: size.bytes for size in sizes} == found
    assert checkpoint_bytes(config, recipe) == sum(found.values())
    untied = config.vocab_size * config.hidden_size if recipe.untied and config.tied else 0
    assert sum(size.parameters for size in sizes) == parameters(config) + untied


def test_kinds_in_two_formats_are_told_apart() -> None:
    recipe = CATALOG["8da8w"].with_changes(exclude=("layers.0.*",))
    found = {(size.kind, size.format): size.parameters for size in checkpoint_sizes(llama(3, 64, 128, 4, vocab=96), recipe)}
    assert found["mlp", "int8 per channel"] == 2 * found["mlp", "float32"] == 2 * 3 * 64 * 128


def test_a_recipe_that_does_not_fit_has_a_size_all_the_same() -> None:
    config = llama(1, 100, 36, 2, vocab=8)
    assert any(layer_plan.problem for layer_plan in layer_plans(config, CATALOG["8da4w-g32"]))
    assert checkpoint_bytes(config, CATALOG["8da4w-g32"]) > 0


def llama(
    layers: int,
    hidden: int,
    width: int,
    heads: int,
    *,
    vocab: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    tied: bool = False,
    qkv_bias: bool = False,
    qk_norm: Any = "none",
    sub_norms: bool = False,
) -> Config:
    """A model of the papers, by its shape."""
    return Config(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=width,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or hidden // heads,
        layers=(Layer(),) * layers,
        max_context=2048,
        norm_eps=1e-5,
        tied=tied,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        sub_norms=sub_norms,
    )


def parameters(config: Config) -> int:
    return sum(parameter.numel() for parameter in skeleton(config).parameters())


def gigabits(config: Config, recipe: Recipe) -> float:
    return 8 * checkpoint_bytes(config, recipe) / 1e9


NEOX = 50304
"""GPT-NeoX's 50257 tokens rounded up to a multiple of 128. Rounding up to 128 x MP, as GPT-NeoX does, gives 50432 with MP 2 and 50688
with MP 6: Table 4's FloatLM 3.9B would then have 63.87, not 63.83."""
SPECTRA = {
    "99M": (99.74, llama(16, 512, 1280, 8, vocab=NEOX)),
    "190M": (190.0, llama(16, 768, 2048, 12, vocab=NEOX)),
    "390M": (392.4, llama(24, 1024, 2560, 16, vocab=NEOX)),
    "560M": (569.2, llama(24, 1280, 3072, 20, vocab=NEOX)),
    "830M": (834.0, llama(24, 1536, 4096, 24, vocab=NEOX)),
    "1.1B": (1149, llama(24, 1792, 5120, 28, vocab=NEOX)),
    "1.5B": (1515, llama(24, 2048, 6144, 32, vocab=NEOX)),
    "2.4B": (2461, llama(30, 2304, 7680, 36, vocab=NEOX)),
    "3.9B": (3989, llama(30, 3072, 9216, 24, vocab=NEOX)),
}
"""Million parameters and shape [Spectra Table 3]."""
TABLE_4 = {
    "FloatLM": (HALF, (1.60, 3.05, 6.28, 9.11, 13.34, 18.39, 24.23, 39.38, 63.83)),
    "QuantLM 8-Bit": (CATALOG["gptq-w8"], (1.21, 2.14, 3.96, 5.58, 7.91, 10.64, 13.77, 21.55, 34.39)),
    "QuantLM 6-Bit": (CATALOG["gptq-w6"], (1.11, 1.92, 3.38, 4.70, 6.55, 8.70, 11.15, 17.09, 27.03)),
    "QuantLM 4-Bit": (CATALOG["gptq-w4"], (1.03, 1.72, 2.88, 3.93, 5.36, 7.00, 8.86, 13.18, 20.59)),
    "QuantLM 3-Bit": (CATALOG["gptq-w3"], (0.98, 1.60, 2.59, 3.49, 4.68, 6.03, 7.55, 10.95, 16.91)),
    "TriLM": (CATALOG["trilm"], (0.90, 1.42, 2.11, 2.76, 3.55, 4.42, 5.36, 7.23, 10.76)),
}
"""Recipe and gigabits by size [Spectra Table 4]. Ternary weights are counted at 1.58 bits there and take 1.6 here, and each row has a
float32 scale here: that is all that differs, at most 1.1 %."""


@pytest.mark.parametrize("size", SPECTRA)
def test_spectra_table_3_has_these_parameters(size: str) -> None:
    millions, config = SPECTRA[size]
    assert parameters(config) / 1e6 == pytest.approx(millions, rel=0.003)


@pytest.mark.parametrize("size", SPECTRA)
@pytest.mark.parametrize("suite", TABLE_4)
def test_spectra_table_4(suite: str, size: str) -> None:
    recipe, row = TABLE_4[suite]
    assert gigabits(SPECTRA[size][1], recipe) == pytest.approx(row[list(SPECTRA).index(size)], rel=0.012)


QWEN = llama(24, 896, 4864, 14, kv_heads=2, vocab=151936, tied=True, qkv_bias=True)
BITNET_700M = llama(24, 1536, 4096, 16, vocab=32002, tied=True, sub_norms=True)
FALCON_1B = llama(18, 2048, 8192, 8, kv_heads=4, head_dim=256, vocab=131072)
MOBILLAMA = llama(22, 2048, 5632, 32, vocab=32000)
BONSAI_TABLE_1 = {
    "Bonsai": (llama(16, 1536, 4096, 16, kv_heads=8, vocab=32000), CATALOG["bonsai"], 2.23),
    "TriLM 560M": (SPECTRA["560M"][1], CATALOG["trilm"], 2.76),
    "Qwen 2.5 0.5B": (QWEN, HALF, 7.90),
    "Qwen 2 0.5B": (QWEN, HALF, 7.90),
    "MobileLLM 600M": (llama(40, 1152, 3072, 18, kv_heads=6, vocab=32000, tied=True), HALF, 9.65),
}
"""Shape (of the models' public configs), recipe and gigabits [Bonsai Table 1]."""


@pytest.mark.parametrize("name", BONSAI_TABLE_1)
def test_bonsai_table_1(name: str) -> None:
    config, recipe, paper = BONSAI_TABLE_1[name]
    assert gigabits(config, recipe) == pytest.approx(paper, rel=0.01)


def test_bonsai_table_1_of_a_model_whose_blocks_share_a_feed_forward() -> None:
    """MobiLlama 0.5B has one feed-forward for its 22 blocks, which no family here has."""
    sizes = checkpoint_sizes(MOBILLAMA, HALF)
    assert sum(size.bytes / (22 if size.kind == "mlp" else 1) for size in sizes) * 8e-9 == pytest.approx(8.56, rel=0.001)


DIFFERENT = {
    # Unexplained. The released model's head is its embedding (1.89). A head of its own would give 2.68; and 2.57 come out where the
    # released model's 729M parameters are taken for two embeddings in half precision and the rest ternary.
    "BitNet 700M": (BITNET_700M, 2.56, 1.895),
    # Unexplained. Embedding and head alone have 8.59; the 1.13 billion weights of the layers at 1.58 bits add 1.79, the paper's 0.85
    # would be half of them.
    "Falcon 3 1B": (FALCON_1B, 9.44, 10.42),
}
"""Shape, the paper's gigabits and ours, where they differ by more than 2 % [Bonsai Table 1]."""


@pytest.mark.parametrize("name", DIFFERENT)
def test_bonsai_table_1_differs_where_it_is_said(name: str) -> None:
    config, paper, ours = DIFFERENT[name]
    assert gigabits(config, CATALOG["bitnet"]) == pytest.approx(ours, rel=0.001)
    assert ours != pytest.approx(paper, rel=0.02)


def test_bonsai_table_1_counts_two_embeddings_of_bitnet_700m() -> None:
    embedding = BITNET_700M.vocab_size * BITNET_700M.hidden_size
    assert (2 * embedding * 16 + (parameters(BITNET_700M) - 2 * embedding) * 1.58) / 1e9 == pytest.approx(2.56, rel=0.005)


PRO = llama(30, 1280, 6144, 20, kv_heads=4, head_dim=64, vocab=202048, tied=True, qk_norm="weightless")


def by_kind(config: Config, recipe: str) -> dict[str, Size]:
    return {size.kind: size for size in checkpoint_sizes(config, CATALOG[recipe])}


def test_mobilellm_pro_on_the_cpu() -> None:
    """590 MB [MobileLLM-Pro section 7]: 610 with scales of two bytes, which are 582 MiB; the paper does not say which.

    A checkpoint has scales of four bytes, and 678 MB.
    """
    assert parameters(PRO) / 1e9 == pytest.approx(1.084, rel=0.001)
    assert checkpoint_bytes(PRO, HALF) == pytest.approx(2.2e9, rel=0.02)
    ours = checkpoint_bytes(PRO, CATALOG["8da4w-g32"])
    assert ours == pytest.approx(678e6, rel=0.001)
    assert (ours - 2 * parameters(PRO) / 32) / 2**20 == pytest.approx(590, rel=0.02)


def test_mobilellm_pro_on_an_accelerator() -> None:
    """720 MB [MobileLLM-Pro section 7] are the 590 MB above and a head of its own.

    Unexplained: one scale for each channel takes 675 MB, 6 % less. All INT4 weights are 671 MB.
    """
    found = by_kind(PRO, "w4-channel")
    assert found["head"].bytes == found["embedding"].bytes == pytest.approx(720e6 - 590e6, rel=0.002)
    assert checkpoint_bytes(PRO, CATALOG["w4-channel"]) == pytest.approx(675e6, rel=0.001)


BITNET_TABLE_1 = {
    "700M": (llama(24, 1536, 4096, 24, vocab=32002), 2.08, 0.80),
    "1.3B": (llama(24, 2048, 5460, 32, vocab=32002), 3.34, 1.14),
    "3B": (llama(26, 3200, 8640, 32, vocab=32002), 7.89, 2.22),
}
"""Shape (of the reproduction's configs), and gigabytes of LLaMA and of BitNet [BitNet b1.58 Table 1]; the shape of 3.9B is not told."""


@pytest.mark.parametrize("size", BITNET_TABLE_1)
def test_bitnet_table_1_has_the_weights_and_as_much_again_for_both_models(size: str) -> None:
    """The table is a GPU's memory while it runs, with a kernel of 2 bits a weight: 0.4 to 1.1 GB more than the weights.

    Activations, the cache and work space are the same for both models, and so is what is left after the weights, within 0.1 GB.
    """
    config, llama_gb, bitnet_gb = BITNET_TABLE_1[size]
    layers = sum(size.parameters for size in checkpoint_sizes(config, HALF) if size.kind in ("attention", "mlp"))
    half = checkpoint_bytes(config, HALF) / 1e9
    two_bits = half - layers * (16 - 2) / 8e9
    assert llama_gb - half == pytest.approx(bitnet_gb - two_bits, abs=0.1)
    assert 0.4 < bitnet_gb - two_bits < 1.1
    assert checkpoint_bytes(config, CATALOG["bitnet"]) / 1e9 < two_bits, "five weights a byte take less than four"
