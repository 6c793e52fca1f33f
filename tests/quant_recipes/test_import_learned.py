"""Integers of learned ranges are those of the floats and scales beside them (MobileLLM-Pro's checkpoint for accelerators)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lobit.checkpoint import load_model, read_json
from lobit.errors import ModelError
from lobit.quant_recipes.apply import convert
from lobit.quant_recipes.catalog import find_recipe
from lobit.quant_recipes.quantized import fingerprint
from lobit.quant_recipes.recipe import WeightGrid
from lobit.verbs.make import converted
from tests.intakes import SmallModels, assert_exact, copied, taken
from tests.oracles import write_folder

pytestmark = pytest.mark.usefixtures("one_thread")

LEARNED = "weight_fake_quantizer.scale"


def write_learned(
    folder: Path, name: str, small_models: SmallModels, group: int | None = None, shape: str = "groups", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The small model of a family with scales that torchao's training would have learned; gives them."""
    source, _ = small_models(name)
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(source / "model.safetensors").items()}
    generator, scales = torch.Generator().manual_seed(1), {}
    for key, weight in list(tensors.items()):
        if weight.dim() == 2:
            largest = weight.float().abs().reshape(len(weight), -1, group or weight.shape[1]).amax(2)
            scale = (largest * (0.5 + torch.rand(largest.shape, generator=generator)) / 7.5).to(dtype)
            scales[key] = scale
            tensors[key.removesuffix("weight") + LEARNED] = scale[:, 0] if shape == "rows" else scale
    write_folder(folder, read_json(source / "config.json"), tensors)
    return scales


@pytest.mark.parametrize(
    ("group", "shape", "dtype"),
    [(None, "groups", torch.float32), (None, "rows", torch.float32), (32, "groups", torch.float32), (None, "groups", torch.bfloat16)],
)
@pytest.mark.parametrize("name", ["mobilellm-pro", "tinyllama", "phi3"])
def test_learned_ranges_are_taken_in_exactly(
    name: str, group: int | None, shape: str, dtype: torch.dtype, small_models: SmallModels, tmp_path: Path
) -> None:
    scales = write_learned(tmp_path / "model", name, small_models, group, shape, dtype)
    model, recipe = assert_exact(tmp_path / "model", tmp_path / "checkpoint")
    assert recipe.rules[0].weights == WeightGrid(4, group, "exact")
    assert recipe.rules[0].activation_bits is None
    assert recipe.name == "taken-in learned-ranges"
    tensors = load_file(tmp_path / "model/model.safetensors")
    key = "model.layers.1.self_attn.o_proj.weight"
    weight, scale = tensors[key].float(), scales[key].float()
    expected = (weight.reshape(*scale.shape, -1) / scale[:, :, None]).round().clamp(-8, 7).reshape(weight.shape)
    assert torch.equal(model.blocks[1].attention.o.integers.float(), expected)
    assert torch.equal(model.blocks[1].attention.o.scale, scale)
    assert {-8, 7} <= set(expected.unique().tolist())


def test_integers_of_learned_ranges_are_those_that_torchao_converts_to(small_models: SmallModels, tmp_path: Path) -> None:
    """torchao multiplies with 1 / s where eq. 4 divides by s: only what lies between two integers may differ."""
    ao = pytest.importorskip("torchao.quantization")
    scales = write_learned(tmp_path, "mobilellm-pro", small_models)
    tensors, (model, _) = load_file(tmp_path / "model.safetensors"), taken(tmp_path)
    differences = 0
    for i, block in enumerate(model.blocks):
        for part in ("gate", "up", "down"):
            key = f"model.layers.{i}.feed_forward.{part}_proj.weight"
            theirs = ao.IntxUnpackedToInt8Tensor.from_hp(
                tensors[key],
                (1, tensors[key].shape[1]),
                torch.int4,
                intx_choose_qparams_algorithm=None,
                custom_scale=scales[key],
                custom_zero_point=torch.zeros_like(scales[key], dtype=torch.int8),
            )
            ours = getattr(block.mlp, part).integers
            differs = ours != theirs.qdata
            differences += int(differs.sum())
            between = ((tensors[key] / scales[key]).frac().abs() - 0.5).abs() < 1e-5
            assert not (differs & ~between).any()
    assert differences < 5


@pytest.mark.parametrize("own_weight", [True, False])
def test_a_head_with_ranges_of_its_own_is_untied(own_weight: bool, small_models: SmallModels, tmp_path: Path) -> None:
    write_learned(tmp_path / "whole", "mobilellm-pro", small_models)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"lm_head.{LEARNED}"] = tensors[f"model.embed_tokens.{LEARNED}"] * 0.75
        if own_weight:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.25

    folder = copied(tmp_path / "whole", tmp_path / "model", change)
    model, recipe = assert_exact(folder, tmp_path / "checkpoint")
    assert recipe.untied
    assert not model.config.tied
    assert not torch.equal(model.head.integers, model.embedding.integers)
    again, asked = converted(folder, find_recipe("8da8w"))
    assert asked.untied
    assert torch.equal(again.head.integers, convert(load_model(folder), asked).head.integers)


def test_a_tied_head_shares_the_embeddings_integers(small_models: SmallModels, tmp_path: Path) -> None:
    write_learned(tmp_path, "mobilellm-pro", small_models)
    model, recipe = taken(tmp_path)
    assert model.head.integers.data_ptr() == model.embedding.integers.data_ptr()
    assert not recipe.untied


def test_zero_points_of_0_and_ranges_of_inputs_are_accepted(small_models: SmallModels, tmp_path: Path) -> None:
    write_learned(tmp_path / "whole", "tinyllama", small_models)
    module = "model.layers.1.mlp.up_proj"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{module}.weight_fake_quantizer.zero_point"] = torch.zeros(128, 1, dtype=torch.int32)
        tensors[f"{module}.activation_fake_quantizer.scale"] = torch.ones(1)
        tensors[f"{module}.activation_fake_quantizer.zero_point"] = torch.ones(1)

    folder = copied(tmp_path / "whole", tmp_path / "model", change)
    assert fingerprint(taken(folder)[0]) == fingerprint(taken(tmp_path / "whole")[0])

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{module}.weight_fake_quantizer.zero_point"][7] = 3

    with pytest.raises(ModelError, match="1 of 128 zero points"):
        taken(copied(folder, tmp_path / "spoilt", spoil))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda scale: scale[:5].clone(), r"scale has shape \[5, 1\]: \[128, 1\] is needed"),
        (lambda scale: scale.repeat(1, 5), r"scale has shape \[128, 5\]: \[128, 1\] is needed"),
        (lambda scale: scale.to(torch.int32), "scale is I32"),
        (lambda scale: scale * 0, "lie beyond|scales"),
        (lambda scale: -scale, r"128 of 128 scales of model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda scale: scale / 17, r"lie beyond \[-8, 7\] times their scale: .*up_proj\.weight_fake_quantizer\.scale is not that of INT4"),
    ],
)
def test_scales_that_do_not_fit_are_refused_by_name(
    change: Callable[[Tensor], Tensor], named: str, small_models: SmallModels, tmp_path: Path
) -> None:
    write_learned(tmp_path / "whole", "tinyllama", small_models)
    key = f"model.layers.1.mlp.up_proj.{LEARNED}"
    folder = copied(tmp_path / "whole", tmp_path / "model", lambda tensors: tensors.update({key: change(tensors[key])}))
    with pytest.raises(ModelError, match=named):
        taken(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_floats_that_are_not_finite_are_refused(value: float, small_models: SmallModels, tmp_path: Path) -> None:
    write_learned(tmp_path / "whole", "tinyllama", small_models)
    key = "model.layers.1.mlp.up_proj.weight"
    folder = copied(tmp_path / "whole", tmp_path / "model", lambda tensors: tensors[key][3, 5].fill_(value))
    for read in (taken, load_model):
        with pytest.raises(ModelError, match=r"up_proj\.weight.* not finite"):
            read(folder)


def test_some_layers_may_stay_float(small_models: SmallModels, tmp_path: Path) -> None:
    write_learned(tmp_path / "whole", "tinyllama", small_models)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(LEARNED) and ("o_proj" in name or "layers.2.mlp.up" in name)]:
            del tensors[name]

    folder = copied(tmp_path / "whole", tmp_path / "model", change)
    model, recipe = assert_exact(folder, tmp_path / "checkpoint")
    (rule,) = recipe.rules
    assert "layers.*.mlp.gate" in rule.match
    assert {"layers.0.mlp.up", "layers.1.mlp.up", "layers.3.mlp.up"} <= set(rule.match)
    assert isinstance(model.blocks[2].mlp.up, nn.Linear)
