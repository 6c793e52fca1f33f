"""Ternary models that were quantized before keep the integers and scales that they had, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.integrations.bitnet import replace_with_bitnet_linear, unpack_weights

from lobit.checkpoint import load_config, load_model, read_json
from lobit.errors import InputError, ModelError
from lobit.quant_recipes.apply import convert
from lobit.quant_recipes.catalog import find_recipe
from lobit.quant_recipes.import_prequantized import take_in, ternary_grid, ternary_scale
from lobit.quant_recipes.quantized import fingerprint, integer_layers
from lobit.quant_recipes.recipe import WeightGrid
from lobit.verbs.make import converted
from tests.intakes import (
    LLAMA,
    LLAMA4,
    PHI3,
    RELATIVE,
    TOKENS,
    SmallModels,
    assert_exact,
    copied,
    equal_share,
    our_rows,
    relative_error,
    stored_rows,
    taken,
    with_float_inputs,
)
from tests.oracles import SMALL, bitnet, linears, randomize
from tests.small_models import FAMILIES, oracle_logits

pytestmark = pytest.mark.usefixtures("one_thread")

# --- BitNet -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bitnets(small_models: SmallModels, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`bitnets(name)`: a folder of transformers' bitnet quantization."""
    made = {name: small_models(name)[0] for name in ("bitnet", "bitnet-masters", "llama-bitnet")}
    for name, config, linear_class in (("phi3", PHI3, "bitlinear"), ("llama4", LLAMA4, "autobitlinear")):
        made[name] = tmp_path_factory.mktemp("bitnets") / name
        bitnet(config, linear_class)(made[name])
    return made.__getitem__


BITNETS = ("bitnet", "bitnet-masters", "llama-bitnet", "phi3", "llama4")


@pytest.mark.parametrize("name", BITNETS)
def test_bitnet_is_taken_in_exactly(name: str, bitnets: Callable[[str], Path], tmp_path: Path) -> None:
    model, recipe = assert_exact(bitnets(name), tmp_path / "checkpoint")
    (rule,) = recipe.rules
    assert recipe.name == "taken-in bitnet"
    assert (rule.match, rule.weights) == (("layers.*",), WeightGrid(2, None, "exact", shards=1))
    assert (rule.activation_bits, rule.activation_rule) == (8, "absmax")
    assert relative_error(with_float_inputs(model)(TOKENS), load_model(bitnets(name))(TOKENS)) < RELATIVE


@pytest.mark.parametrize(("name", "divided"), [("bitnet", False), ("llama-bitnet", True), ("phi3", True), ("llama4", False)])
def test_integers_are_the_codes_and_scales_are_the_files(name: str, divided: bool, bitnets: Callable[[str], Path]) -> None:
    model, _ = taken(bitnets(name))
    tensors = load_file(bitnets(name) / "model.safetensors")
    ours = {layer: (integers, scale) for layer, integers, scale, _ in integer_layers(model)}
    for key in [key for key, tensor in tensors.items() if tensor.dtype == torch.uint8]:
        with torch.compiler.set_stance("force_eager"):
            codes, scale = unpack_weights(tensors[key], torch.float32), tensors[f"{key}_scale"].float()
        for layer, rows in our_rows(key).items():
            integers, found = ours.pop(layer)
            assert torch.equal(stored_rows(model, layer, integers), codes[rows]), layer
            assert torch.equal(found, (1 / scale if divided else scale).expand(found.shape)), layer
    assert not ours


def their_model(folder: Path) -> nn.Module:
    """transformers' own model of a folder, with its own ternary layers; its loader would need another package."""
    config = transformers.AutoConfig.from_pretrained(folder)
    quantization = transformers.BitNetQuantConfig(**read_json(folder / "config.json")["quantization_config"])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    replace_with_bitnet_linear(model, ["lm_head"], quantization)
    tensors = load_file(folder / "model.safetensors")
    if quantization.linear_class == "autobitlinear":
        tensors = {key: unpack_weights(value, torch.float32) if value.dtype == torch.uint8 else value for key, value in tensors.items()}
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    for module in model.modules():
        if type(module).__name__ == "BitLinear":
            module.dtype = torch.float32
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["bitnet", "bitnet-masters", "llama-bitnet"])
def test_logits_are_those_of_transformers_own_layers(name: str, bitnets: Callable[[str], Path]) -> None:
    """Which round their inputs to INT8 too."""
    model, _ = taken(bitnets(name))
    with torch.compiler.set_stance("force_eager"):
        expected = oracle_logits(their_model(bitnets(name)), TOKENS)
    assert equal_share(model(TOKENS), expected) > 0.8
    assert equal_share(with_float_inputs(model)(TOKENS), expected) == 0


@pytest.mark.parametrize(("scale", "named"), [(0.0, None), (-0.5, None), (float("inf"), "not finite|positive"), (1e-39, "64 of 64 scales")])
def test_a_ternary_scale_is_made_positive_or_refused(
    scale: float, named: str | None, bitnets: Callable[[str], Path], tmp_path: Path
) -> None:
    key = "model.layers.1.mlp.down_proj.weight_scale"
    folder = copied(bitnets("bitnet"), tmp_path / "model", lambda tensors: tensors[key].fill_(scale))
    if named:
        with pytest.raises(ModelError, match=named):
            taken(folder)
        return
    model, _ = assert_exact(folder, tmp_path / "checkpoint")
    assert (model.blocks[1].mlp.down.scale > 0).all()


# --- Bonsai's own layers ----------------------------------------------------------------------------------------------------------


def test_bonsais_scales_of_channels_are_taken_in_exactly(small_models: SmallModels, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.scales"][3] = 0

    folder = copied(small_models("bonsai")[0], tmp_path / "model", change)
    model, recipe = assert_exact(folder, tmp_path / "checkpoint")
    tensors, up = load_file(folder / "model.safetensors"), model.blocks[1].mlp.up
    theirs = tensors["model.layers.1.mlp.up_proj.weight"].clamp(-1, 1).round()
    scales = tensors["model.layers.1.mlp.up_proj.scales"][:, None]
    assert (scales < 0).any()
    assert torch.equal(up.integers.float(), theirs * scales.sign())
    assert torch.equal(up.scale, torch.where(scales == 0, 1.0, scales.abs()))
    assert recipe.name == "taken-in bonsai"
    assert recipe.rules[0].weights == WeightGrid(2, None, "exact")
    assert recipe.rules[0].activation_bits is None
    assert relative_error(model(TOKENS), load_model(folder)(TOKENS)) < RELATIVE


# --- floats that are ternary ------------------------------------------------------------------------------------------------------

SHARDS = {"matrix": (1, 1), "shards": (2, 1), "rows": (None, 1), "columns": (1, 2)}
"""Blocks of rows and of columns, each with a scale of its own."""


def ternary_weight(out: int, inner: int, rows: int | None, columns: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Ternary values and their scales [out, columns] that `dtype` holds."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-1, 2, (out, inner), generator=generator).float()
    blocks = out if rows is None else rows
    scale = (0.01 + torch.rand(blocks, columns, generator=generator)).to(dtype).float()
    return values, scale.repeat_interleave(out // blocks, 0)


def write_ternary(config: transformers.PreTrainedConfig, folder: Path, kind: str, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """A folder whose linear layers are ternary times scales; gives their values and scales."""
    model, parts = transformers.AutoModelForCausalLM.from_config(config).eval(), {}
    randomize(model)
    for seed, (name, linear) in enumerate(linears(model)):
        values, scale = ternary_weight(*linear.weight.shape, *SHARDS[kind], dtype, seed)
        linear.weight.data = (values.reshape(len(values), scale.shape[1], -1) * scale[:, :, None]).reshape(values.shape)
        parts[name] = values, scale
    model.to(dtype).save_pretrained(folder)
    return parts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", SHARDS)
def test_ternary_floats_are_recognised_exactly(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 4})
    parts = write_ternary(config, tmp_path / "model", kind, dtype)
    model, recipe = assert_exact(tmp_path / "model", tmp_path / "checkpoint")
    found = {name: (integers, scale, grid) for name, integers, scale, grid in integer_layers(model)}
    assert len(found) == len(parts) == 28
    for theirs, (values, scale) in parts.items():
        layer = theirs.replace("model.", "").replace("self_attn", "attention").replace("_proj", "")
        integers, ours, grid = found[layer]
        assert torch.equal(integers.float(), values)
        assert torch.equal(ours, scale)
        rows, columns = SHARDS[kind]
        inner = values.shape[1]
        assert grid == WeightGrid(2, inner // columns if columns > 1 else None, "exact", rows if columns == 1 else None)
    assert recipe.name == "taken-in ternary"
    assert recipe.float_bits == (16 if dtype == torch.float16 else 32)


@pytest.mark.parametrize("config", [PHI3, LLAMA4], ids=["fused", "interleaved"])
def test_rows_of_ternary_floats_are_moved_with_their_scales(config: transformers.PreTrainedConfig, tmp_path: Path) -> None:
    write_ternary(config, tmp_path / "model", "rows", torch.float16)
    model, _ = assert_exact(tmp_path / "model", tmp_path / "checkpoint")
    assert relative_error(model(TOKENS), load_model(tmp_path / "model")(TOKENS)) < RELATIVE


@given(
    st.integers(1, 6), st.integers(1, 4), st.integers(1, 8), st.booleans(), st.lists(st.integers(0, 47), max_size=6), st.integers(0, 2**31)
)
def test_the_grid_of_a_ternary_weight_holds_it(shards: int, rows: int, width: int, by_row: bool, zeros: list[int], seed: int) -> None:
    out = shards * rows
    values, scale = ternary_weight(out, 8 * width, None if by_row else shards, 1, torch.float16, seed)
    values[[row for row in zeros if row < out]] = 0
    weight = values * scale
    grid = ternary_grid(weight)
    assert grid is not None
    assert grid.misfit(out, 8 * width) is None
    assert by_row or (grid.shards or out) <= shards
    ours = ternary_scale(weight, grid)
    assert torch.equal(weight.sign() * ours, weight)
    assert (ours > 0).all()
    if grid.shards:
        assert (ours.reshape(grid.shards, -1) == ours.reshape(grid.shards, -1)[:, :1]).all()


def test_a_row_of_zeros_has_its_shards_scale() -> None:
    values, scale = ternary_weight(8, 64, 2, 1, torch.float16, 0)
    values[5] = 0
    grid = ternary_grid(values * scale)
    assert grid == WeightGrid(2, None, "exact", shards=2)
    assert torch.equal(ternary_scale(values * scale, grid), scale)


def test_a_row_of_zeros_with_a_scale_of_its_own_has_1(tmp_path: Path) -> None:
    parts = write_ternary(LLAMA, tmp_path / "whole", "rows", torch.float16)
    key = "model.layers.0.self_attn.k_proj"
    folder = copied(tmp_path / "whole", tmp_path / "model", lambda tensors: tensors[f"{key}.weight"][5].zero_())
    model, _ = assert_exact(folder, tmp_path / "checkpoint")
    expected = parts[key][1].clone()
    expected[5] = 1
    assert torch.equal(model.blocks[0].attention.k.scale, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_weight_that_is_off_by_one_ulp_is_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    write_ternary(LLAMA, tmp_path / "whole", "matrix", dtype)

    def change(tensors: dict[str, Tensor]) -> None:
        row = tensors["model.layers.1.mlp.up_proj.weight"][3]
        place = int(row.abs().argmax())
        row[place] = torch.nextafter(row[place], row.new_tensor(2.0))

    folder = copied(tmp_path / "whole", tmp_path / "model", change)
    with pytest.raises(ModelError, match=r"1 of 28 layers .* are not ternary .*--recipe trilm") as error:
        taken(folder)
    assert "layers.1.mlp.up: 1 of 128 rows have more than one magnitude besides 0, row 3 has 2" in str(error.value)


def test_a_float_model_is_none(small_models: SmallModels, stories: Path) -> None:
    for folder in (stories, *(small_models(name)[0] for name in ("tinyllama", "phi3", "mobilellm-pro", "gemma3"))):
        assert take_in(folder, load_config(folder)) is None


def test_a_float_model_with_layers_of_zeros_is_none(small_models: SmallModels, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "o_proj" in name or "down_proj" in name or name.startswith("model.layers.0.mlp"):
                tensor.zero_()

    folder = copied(small_models("tinyllama")[0], tmp_path / "model", change)
    assert take_in(folder, load_config(folder)) is None


def test_trilm_is_taken_in(small_models: SmallModels, tmp_path: Path) -> None:
    folder, oracle = small_models("trilm")
    model, recipe = assert_exact(folder, tmp_path / "checkpoint")
    assert relative_error(model(TOKENS), oracle_logits(oracle, TOKENS)) < RELATIVE
    assert [str(rule.weights) for rule in recipe.rules] == ["ternary per matrix"]


# --- what verbs do with them ------------------------------------------------------------------------------------------------------


def test_a_folder_is_taken_in_without_a_recipe_and_requantized_with_one(small_models: SmallModels) -> None:
    folder, _ = small_models("trilm")
    model, recipe = converted(folder, None)
    assert recipe.name == "taken-in ternary"
    assert fingerprint(converted(folder, recipe)[0]) == fingerprint(model)
    anew, asked = converted(folder, find_recipe("trilm"))
    assert asked == find_recipe("trilm")
    assert fingerprint(anew) == fingerprint(convert(load_model(folder), asked))


def test_the_recipe_of_a_model_that_was_taken_in_quantizes_no_other(small_models: SmallModels) -> None:
    _, recipe = taken(small_models("trilm")[0])
    for name in ("tinyllama", "llama-bitnet"):
        with pytest.raises(InputError, match="does not hold integers of recipe taken-in ternary"):
            converted(small_models(name)[0], recipe)
    with pytest.raises(InputError, match="is a float model: say with --recipe"):
        converted(small_models("tinyllama")[0], None)


def test_every_family_with_floats_is_a_float_model_or_ternary(small_models: SmallModels) -> None:
    names = {name: take_in(small_models(name)[0], load_config(small_models(name)[0])) for name in FAMILIES}
    assert {name for name, found in names.items() if found} == {"trilm", "bonsai", "bitnet", "bitnet-masters", "llama-bitnet"}
