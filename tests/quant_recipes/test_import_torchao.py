"""torchao's integers and scales are taken in as they are, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save, save_file
from torch import nn

from lobit.checkpoint import load_model
from lobit.errors import ModelError
from lobit.quant_recipes.quantized import integer_layers
from tests.intakes import (
    LLAMA,
    LLAMA4,
    PHI3,
    TOKENS,
    SmallModels,
    assert_exact,
    copied,
    equal_share,
    metadata_of,
    our_rows,
    stored_rows,
    taken,
    with_float_inputs,
)
from tests.mutations import Damage, Refusal, dumped, outcome
from tests.oracles import LAYERS_OF_WEIGHTS, randomize
from tests.small_models import oracle_logits

pytest.importorskip("torchao")
pytestmark = pytest.mark.usefixtures("one_thread")


def intx(bits: int, group: int | None, dynamic: bool, symmetric: bool = True) -> Any:
    """A configuration of torchao."""
    from torchao import quantization as ao
    from torchao.quantization.granularity import PerAxis, PerGroup

    kind = getattr(torch, f"int{bits}")
    granularity = PerAxis(0) if group is None else PerGroup(group)
    mapping = ao.MappingType.SYMMETRIC if symmetric else ao.MappingType.ASYMMETRIC
    if dynamic:
        return ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=kind, weight_granularity=granularity, weight_mapping_type=mapping)
    return ao.IntxWeightOnlyConfig(weight_dtype=kind, granularity=granularity, mapping_type=mapping)


def write_torchao(
    folder: Path, config: transformers.PreTrainedConfig, *steps: tuple[Any, Callable[[nn.Module, str], bool]], dtype: Any = torch.float32
) -> nn.Module:
    """A folder of a model that torchao quantized; gives torchao's model."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import quantize_

    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomize(model)
    model.to(dtype)
    for one, chosen in steps:
        quantize_(model, one, chosen)
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={**metadata, "format": "pt"})
    values = {**config.to_dict(), "quantization_config": {"quant_method": "torchao", "quant_type": {}}}
    (folder / "config.json").write_text(json.dumps(values))
    return model  # type: ignore[no-any-return]


def is_layer(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.endswith(LAYERS_OF_WEIGHTS)


def is_attention(module: nn.Module, name: str) -> bool:
    return "attn" in name and is_layer(module, name)


def is_head(module: nn.Module, name: str) -> bool:
    return name == "lm_head"


def is_embedding(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Embedding)


TORCHAO: dict[str, tuple[Any, list[tuple[Any, Callable[[nn.Module, str], bool]]]]] = {
    "8da4w": (LLAMA, [(intx(4, 32, True), is_layer)]),
    "8da4w, INT8 ends": (LLAMA, [(intx(8, None, False), is_embedding), (intx(8, None, True), is_head), (intx(4, 32, True), is_layer)]),
    "weights alone, by channel": (LLAMA, [(intx(4, None, False), is_layer)]),
    "3 and 6 bits": (LLAMA, [(intx(3, 32, True), is_attention), (intx(6, 64, True), is_head)]),
    "fused": (PHI3, [(intx(4, 32, True), is_layer)]),
    "interleaved": (LLAMA4, [(intx(4, 32, True), is_layer)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TORCHAO)
def test_torchaos_integers_and_scales_are_taken_in_exactly(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config, steps = TORCHAO[name]
    oracle = write_torchao(tmp_path / "model", config, *steps, dtype=dtype)
    model, recipe = assert_exact(tmp_path / "model", tmp_path / "checkpoint")
    assert recipe.name == "taken-in torchao"
    theirs = {key: tensor for key, tensor in oracle.state_dict().items() if hasattr(tensor, "dequantize") and hasattr(tensor, "qdata")}
    ours = {layer: (integers, scale, grid) for layer, integers, scale, grid in integer_layers(model)}
    assert theirs
    for key, tensor in theirs.items():
        for layer, rows in our_rows(key).items():
            integers, scale, grid = ours.pop(layer)
            assert torch.equal(stored_rows(model, layer, integers), tensor.qdata[rows].float())
            assert torch.equal(stored_rows(model, layer, scale), tensor.scale[rows].float())
            weight = stored_rows(model, layer, integers.float().reshape(*scale.shape, -1).mul(scale[:, :, None]).reshape(integers.shape))
            assert torch.equal(weight.to(dtype), tensor.dequantize()[rows])
            assert (f"int{grid.bits}", grid.scale_rule) == (str(tensor.target_dtype).removeprefix("torch."), "exact")
            rule = recipe.rule_for(layer)
            assert rule is not None
            assert (rule.activation_bits, rule.activation_rule) == (8 if tensor.activation_quantization else None, "range")
    assert not ours


def test_logits_of_torchaos_model_are_the_same(tmp_path: Path) -> None:
    config, steps = TORCHAO["8da4w, INT8 ends"]
    expected = oracle_logits(write_torchao(tmp_path / "model", config, *steps), TOKENS)
    model, recipe = taken(tmp_path / "model")
    assert equal_share(model(TOKENS), expected) > 0.8
    assert equal_share(with_float_inputs(model)(TOKENS), expected) == 0
    assert {(str(rule.weights), rule.match, rule.activation_bits) for rule in recipe.rules} == {
        ("int8 per channel", ("embedding",), None),
        ("int8 per channel", ("head",), 8),
        ("int4 group 32", ("layers.*",), 8),
    }


def test_what_transformers_saved_of_torchaos_model_is_taken_in(small_models: SmallModels, tmp_path: Path) -> None:
    quantization = transformers.TorchAoConfig(intx(4, 32, True))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        small_models("tinyllama")[0], quantization_config=quantization, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    model, recipe = assert_exact(tmp_path / "model", tmp_path / "checkpoint")
    assert equal_share(model(TOKENS), oracle_logits(theirs, TOKENS)) > 0.8
    assert [rule.match for rule in recipe.rules] == [("layers.*",)]


@pytest.fixture(scope="module")
def torchao_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchao") / "model"
    write_torchao(folder, *(LLAMA, *TORCHAO["8da4w"][1]))
    return folder


def test_zero_points_that_are_not_0_are_refused(tmp_path: Path) -> None:
    write_torchao(tmp_path / "model", LLAMA, (intx(4, 32, True, symmetric=False), is_layer))
    for read in (taken, load_model):
        with pytest.raises(ModelError, match=r"of 128 zero points in model\.layers\.0\.self_attn\.q_proj\._weight_zero_point are not 0"):
            read(tmp_path / "model")


@pytest.mark.parametrize(("bits", "named"), [(5, r"'int5': int3, int4, int6, int8 are read"), (2, r"'int2'"), (1, r"'int1'")])
def test_widths_that_have_no_grid_are_refused(bits: int, named: str, tmp_path: Path) -> None:
    write_torchao(tmp_path / "model", LLAMA, (intx(bits, 32, True), is_layer))
    with pytest.raises(ModelError, match=named) as error:
        taken(tmp_path / "model")
    assert "28 tensors of torchao's are not read" in str(error.value)


def test_integers_beyond_their_width_are_refused(torchao_folder: Path, tmp_path: Path) -> None:
    key = "model.layers.2.mlp.gate_proj._weight_qdata"
    folder = copied(torchao_folder, tmp_path / "model", lambda tensors: tensors[key][3, 5].fill_(8))
    with pytest.raises(ModelError, match=r"1 of 8192 values of .*\.2\.mlp\.gate_proj\._weight_qdata are no integers in \[-8, 7\]"):
        taken(folder)


@pytest.mark.parametrize("value", [0.0, -0.25, float("inf"), float("nan")])
def test_scales_that_no_runtime_holds_are_refused(value: float, torchao_folder: Path, tmp_path: Path) -> None:
    key = "model.layers.2.mlp.gate_proj._weight_scale"
    folder = copied(torchao_folder, tmp_path / "model", lambda tensors: tensors[key][3, 1].fill_(value))
    with pytest.raises(ModelError, match=r"1 of 256 scales of model\.layers\.2\.mlp\.gate_proj"):
        taken(folder)


def test_another_tensor_of_torchaos_is_refused(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    write_torchao(tmp_path / "model", LLAMA, (Int8WeightOnlyConfig(version=2), is_layer))
    with pytest.raises(ModelError, match="28 tensors of torchao's are not read"):
        taken(tmp_path / "model")


def test_a_file_without_torchaos_word_is_refused(torchao_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(torchao_folder, folder)
    save_file(load_file(torchao_folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="metadata have no word of it"):
        taken(folder)


def test_damaged_words_of_torchaos_are_refused_or_are_a_models(torchao_folder: Path, tmp_path: Path) -> None:
    tensors, metadata, damage = load_file(torchao_folder / "model.safetensors"), metadata_of(torchao_folder), Damage(7)
    shutil.copyfile(torchao_folder / "config.json", tmp_path / "config.json")
    key, read = "model.layers.1.mlp.up_proj.weight", 0
    shape = tensors["model.layers.1.mlp.up_proj._weight_qdata"].shape
    for damaged in damaged_words(metadata[key], damage):
        (tmp_path / "model.safetensors").write_bytes(save(tensors, {**metadata, key: damaged}))
        found = outcome(lambda: taken(tmp_path))
        if not isinstance(found, Refusal):
            read += 1
            assert found[0].blocks[1].mlp.up.integers.shape == shape
    assert 0 < read < 60


def damaged_words(words: str, damage: Damage) -> Iterator[str]:
    """JSON with values, or characters, that are others."""
    for i in range(120):
        yield dumped(damage.json(json.loads(words), 1 + i % 2)) if i % 3 else damage.text(words)
