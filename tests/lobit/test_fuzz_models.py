"""Damaged configs, weights and checkpoints are refused in one message, or read as what they say: never a crash, never another model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from lobit.checkpoint import load_model, read_json
from lobit.errors import ModelError
from lobit.families import FAMILIES, read_config
from lobit.model import Config, Transformer
from lobit.quant_recipes.apply import skeleton
from lobit.quant_recipes.catalog import find_recipe
from lobit.quant_recipes.quantized import fingerprint, load_checkpoint
from lobit.quant_recipes.recipe import Recipe
from tests.mutations import ABSURD, Damage, Refusal, dumped, every_single, outcome, replaced, without

RANDOM_CONFIGS = 3000
"""Of each family, beside every single damage."""
WEIGHTS = 500
"""Files of each layout: plain, fused, packed ternary, ternary with a scale for each channel."""
LAYOUTS = ["tinyllama", "phi3", "bitnet", "bonsai"]
CHECKPOINTS = 400
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": LLAMA3, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"},
    "mobilellm": {"share_embedding": True, "layer_sharing": True},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 16},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0], "layer_types": [FULL] * 4},
    "mistral": {"sliding_window": 16},
    "phi3": {"rope_scaling": LONGROPE, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64},
    "gemma3_text": {
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
        "sliding_window": 16,
        "query_pre_attn_scalar": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "dtype": "float32",
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "llama4_text": {
        "moe_layers": [],
        "no_rope_layers": [1] * 4,
        "attn_temperature_tuning": False,
        "layer_types": [CHUNKED] * 4,
        "intermediate_size_mlp": 128,
    },
    "mobilellm_p1": {"use_qk_norm": True, "layer_types": [FULL, SLIDING, SLIDING, FULL], "sliding_window": 16},
    "bitnet": {"quantization_config": {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}},
}
"""What each family's file has of its own."""
SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
}
"""Fields whose value is the model's, whatever else the file says."""


def sample(family: str) -> dict[str, Any]:
    return {"model_type": family, **SMALL, **OWN.get(family, {})}


def assert_sound(config: Config, values: dict[str, Any]) -> None:
    """What any model that can be computed has, and what the file says."""
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.heads, config.kv_heads, config.head_dim)
    assert all(type(size) is int and 0 < size <= 1 << 24 for size in (*sizes, config.max_context, config.repeats))
    assert config.heads % config.kv_heads == 0
    assert 0 < len(config.layers) <= 2048 and len(config.layers) % config.repeats == 0
    assert 0 < config.norm_eps <= 0.1
    for layer in set(config.layers):
        assert layer.window is None or (type(layer.window) is int and layer.window > 0)
        if layer.rope:
            frequencies, factor = layer.rope.frequencies()
            assert layer.rope.dim == 2 * len(frequencies) and 0 < layer.rope.dim <= config.head_dim
            assert frequencies.isfinite().all() and (frequencies > 0).all() and 0 < factor < math.inf
    assert math.isfinite(config.scale) and config.scale > 0
    for name, ours in SAME.items():
        assert values.get(name) is None or values[name] == getattr(config, ours), name
    depth = values.get("num_hidden_layers")
    assert len(config.layers) == depth * config.repeats


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """No file makes us ask for a gigabyte."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").is_file() else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_damaged_config_is_refused_or_read_as_it_is(family: str) -> None:
    values, damage, read = sample(family), Damage(1), 0
    assert_sound(read_config(values), values)
    for damaged in [*every_single(values), *(damage.json(values, 1 + i % 3) for i in range(RANDOM_CONFIGS))]:
        config = outcome(lambda damaged=damaged: read_config(damaged))
        if isinstance(config, Config):
            assert_sound(config, damaged)
            read += 1
    assert read > 50  # what is harmless is not refused


def test_the_largest_model_of_a_config_takes_no_time_and_no_memory() -> None:
    values = {**sample("llama"), "num_hidden_layers": 1 << 10, "vocab_size": 1 << 24, "hidden_size": 1 << 24, "intermediate_size": 1 << 24}
    config = read_config(values)
    assert isinstance(outcome(lambda: skeleton(config)), Transformer)


@pytest.fixture(scope="module")
def small(small_models: Callable[[str], tuple[Path, Any]]) -> Path:
    return small_models("tinyllama")[0]


def headers(data: bytes, damage: Damage) -> Iterator[bytes]:
    """Damaged safetensors files: the length, the header's values, its bytes, what follows."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for i in range(WEIGHTS):
        kind = i % 5
        if kind == 0:
            yield damage.random.choice([damage.random.randrange(1 << bits) for bits in range(1, 65)]).to_bytes(8, "little") + data[8:]
        elif kind == 1:
            yield data[:8] + damage.bytes(data[8 : 8 + length], 1 + i % 3) + body
        elif kind == 2:
            yield damage.bytes(data, 1 + i % 3)
        else:
            text = damage.json(header, 1 + i % 2)
            encoded = (dumped(text) if kind == 3 else twice(header, damage)).encode("utf-8", "surrogatepass")
            yield len(encoded).to_bytes(8, "little") + encoded + body


def twice(header: dict[str, Any], damage: Damage) -> str:
    """A header that names two tensors alike, or says of one what another is."""
    first, second = damage.random.sample([name for name in header if name != "__metadata__"], 2)
    if damage.random.random() < 0.5:
        return dumped(header).replace(f'"{first}"', f'"{second}"', 1)
    field = damage.random.choice(["shape", "data_offsets", "dtype"])
    return dumped({**header, first: {**header[first], field: damage.random.choice(ABSURD)}})


@pytest.mark.parametrize("family", LAYOUTS)
def test_damaged_weights_are_refused_or_are_a_models(family: str, small_models: Any, tmp_path: Path) -> None:
    folder, read = small_models(family)[0], 0
    whole = load_model(folder).state_dict()
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    data = save(load_file(folder / "model.safetensors"), {"format": "pt"})
    for damaged in headers(data, Damage(2)):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        model = outcome(lambda: load_model(tmp_path))
        if not isinstance(model, Refusal):
            read += 1
            for name, tensor in model.state_dict().items():
                assert tensor.shape == whole[name].shape and tensor.dtype == torch.float32 and tensor.isfinite().all()
    assert 0 < read < WEIGHTS / 2


def test_a_damaged_index_of_shards_is_refused(small: Path, tmp_path: Path) -> None:
    tensors = load_file(small / "model.safetensors")
    shutil.copyfile(small / "config.json", tmp_path / "config.json")
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        (tmp_path / f"{number}.safetensors").write_bytes(save({name: tensors[name] for name in part}))
    index = {"metadata": {"total_size": 1}, "weight_map": {name: f"{i % 2}.safetensors" for i, name in enumerate(names)}}
    path, damage, whole = tmp_path / "model.safetensors.index.json", Damage(3), load_model(small).state_dict()
    for damaged in [index, *(damage.json(index, 1 + i % 3) for i in range(300))]:
        path.write_text(dumped(damaged), encoding="utf-8")
        model = outcome(lambda: load_model(tmp_path))
        assert isinstance(model, Refusal) or all(tensor.equal(whole[name]) for name, tensor in model.state_dict().items())
    path.write_text(dumped(index), encoding="utf-8")
    shutil.copyfile(tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    with pytest.raises(ModelError, match=r"is in 0\.safetensors and in 1\.safetensors"):
        load_model(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lobit import verbs

    return verbs.quantize(str(small), find_recipe("8da4w-g32"), tmp_path_factory.mktemp("fuzz") / "checkpoint")


def test_a_damaged_checkpoint_is_refused_or_is_the_same(checkpoint: Path, tmp_path: Path) -> None:
    whole, recipe = load_checkpoint(checkpoint)
    told, damage, folder = fingerprint(whole), Damage(4), tmp_path / "damaged"
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    documents = {name: read_json(checkpoint / name) for name in ("recipe.json", "config.json")}
    folder.mkdir()
    for i in range(CHECKPOINTS):
        name = ("model.safetensors", "recipe.json", "config.json")[i % 3]
        for other, data in files.items():
            (folder / other).write_bytes(data)
        changed = damage.bytes(files[name]) if i % 3 == 0 or i % 2 else dumped(damage.json(documents[name])).encode()
        (folder / name).write_bytes(changed)
        found = outcome(lambda: load_checkpoint(folder))
        if not isinstance(found, Refusal):
            assert fingerprint(found[0]) == told and found[1] == recipe and found[0].config == whole.config


def test_every_byte_of_a_checkpoints_weights_counts(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    data = bytearray((checkpoint / "model.safetensors").read_bytes())
    for position in range(8, len(data), len(data) // 150):
        data[position] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        data[position] ^= 1
        assert isinstance(outcome(lambda: load_checkpoint(folder)), Refusal), position


@pytest.mark.parametrize("name", ["8da4w-g32", "fp", "w4-channel"])
def test_a_damaged_recipe_is_refused_or_read_as_it_is(name: str) -> None:
    values, damage = find_recipe(name).to_json(), Damage(5)
    for damaged in [*every_single(values), *(damage.json(values, 1 + i % 3) for i in range(500))]:
        recipe = outcome(lambda damaged=damaged: Recipe.from_json(damaged))
        if isinstance(recipe, Recipe):
            assert recipe.to_json() == damaged
            assert recipe.rule_for("layers.0.mlp.down") is None or recipe.rules


def test_nothing_is_lost_of_a_sound_config() -> None:
    values = sample("llama")
    with pytest.raises(ModelError, match="rope_scaling is 5: an object is needed"):
        read_config(replaced(values, ("rope_scaling",), 5))
    with pytest.raises(ModelError, match="factor"):
        read_config(without(values, ("rope_scaling", "rope_type")))
