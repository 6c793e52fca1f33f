"""Specialists merged: the average, the search for its weights, what is refused."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lobit.checkpoint import load_config, load_model, read_json, save_model
from lobit.errors import BundleError, InputError, ModelError
from lobit.quant_recipes.catalog import find_recipe
from lobit.quant_recipes.merge import (
    LONGEST_SEQUENCE,
    SHORTEST_TEXT,
    Specialists,
    held_out,
    held_out_loss,
    merge,
    normalize,
    search,
)
from lobit.tokenizer import Tokenizer
from lobit.verbs.make import quantize
from lobit.verbs.merge import merge as merge_models

pytestmark = pytest.mark.usefixtures("one_thread")
RANDOM = ("llama", "qwen3", "mobilellm_p1")
TOKENS = 512
WEIGHTS = (0.5, 0.2, 0.3)
Copy = Callable[..., Path]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """`copy(folder, name, noise, layers, dtype)`: a model with noise on the matrices whose name begins with `layers`."""

    def make(folder: Path, name: str, noise: float = 0.0, layers: str = "", dtype: torch.dtype = torch.float32) -> Path:
        model, generator = load_model(folder), torch.Generator().manual_seed(len(name))
        for key, parameter in model.named_parameters():
            if key.startswith(layers) and parameter.ndim == 2:
                parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
        save_model(model, read_json(folder / "config.json"), tmp_path / name, dtype)
        if (folder / "tokenizer.json").is_file():
            shutil.copyfile(folder / "tokenizer.json", tmp_path / name / "tokenizer.json")
        return tmp_path / name

    return make


@pytest.fixture(scope="module")
def text(shared: Callable[[str], Path]) -> str:
    return shared("text/tinystories_sample.txt").read_text(encoding="utf-8")[:20_000]


@pytest.fixture
def noisy(copy: Copy, stories: Path) -> list[Path]:
    """stories260k with noise at its beginning, at its end, and everywhere."""
    return [copy(stories, "a", 0.3, "layers.0"), copy(stories, "bb", 0.4, "layers.4"), copy(stories, "ccc", 0.5)]


def sequences_of(folder: Path, text: str, tokens: int = TOKENS) -> list[torch.Tensor]:
    tokenizer = Tokenizer.from_folder(folder)
    return held_out(tokenizer.encode(text, bos=False), load_config(folder), tokenizer.bos, tokens)


def weights_file(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def change_config(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | values))


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("weights", [None, (1, 2, 4), (0.1, 0.7, 0.2)])
def test_the_average_of_a_model_with_itself_is_the_model_bit_for_bit(
    name: str, weights: Sequence[float] | None, models: Callable[[str], Path], tmp_path: Path
) -> None:
    merge_models([str(models(name))] * 3, tmp_path / "out", weights=weights)
    assert_same_tensors(weights_file(tmp_path / "out"), weights_file(models(name)))
    assert load_config(tmp_path / "out") == load_config(models(name))


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("chosen", [0, 1])
def test_all_weight_on_one_model_gives_that_model_bit_for_bit(
    name: str, chosen: int, models: Callable[[str], Path], copy: Copy, tmp_path: Path
) -> None:
    folders = [models(name), copy(models(name), "other", 0.5)]
    merge_models([str(folder) for folder in folders], tmp_path / "out", weights=[1 - chosen, chosen])
    assert_same_tensors(weights_file(tmp_path / "out"), weights_file(folders[chosen]))


@pytest.mark.parametrize("name", RANDOM)
def test_the_average_is_that_of_numpy_and_weights_count_by_their_share(
    name: str, models: Callable[[str], Path], copy: Copy, tmp_path: Path
) -> None:
    folders = [models(name), copy(models(name), "other", 0.5), copy(models(name), "third", 1.0)]
    report = merge_models([str(folder) for folder in folders], tmp_path / "out", weights=[10 * weight for weight in WEIGHTS])
    assert [row["weight"] for row in report["models"]] == pytest.approx(WEIGHTS)
    stored = [weights_file(folder) for folder in folders]
    for key, tensor in weights_file(tmp_path / "out").items():
        expected = np.average([one[key].double().numpy() for one in stored], axis=0, weights=WEIGHTS)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_equal_weights_are_torchs_stochastic_weight_averaging(noisy: list[Path]) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(load_model(noisy[0]))
    for folder in noisy:
        averaged.update_parameters(load_model(folder))
    ours, theirs = merge(Specialists(noisy), [1 / 3] * 3), averaged.module
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_searched_weights_beat_every_model_and_the_uniform_average(noisy: list[Path], text: str) -> None:
    found = search(Specialists(noisy), sequences_of(noisy[0], text))
    assert sum(found.weights) == pytest.approx(1)
    assert found.loss < min(found.singles) - 0.1
    assert found.loss < found.uniform - 0.01
    assert found.weights[2] == min(found.weights)


@pytest.mark.parametrize("other", [1, 2], ids=["nearly as good", "much worse"])
def test_searched_weights_are_those_of_an_exhaustive_search(noisy: list[Path], text: str, other: int) -> None:
    specialists, sequences = Specialists([noisy[0], noisy[other]]), sequences_of(noisy[0], text, 256)
    grid = [held_out_loss(merge(specialists, [weight, 1 - weight]), sequences) for weight in np.linspace(0, 1, 21)]
    assert search(specialists, sequences).loss <= min(grid) + 1e-4


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_however_short_the_search_nothing_that_was_measured_is_better(noisy: list[Path], stories: Path, text: str, steps: int) -> None:
    folders = [noisy[2], stories, noisy[0]]
    sequences, done = sequences_of(stories, text, 256), []
    found = search(Specialists(folders), sequences, steps, lambda *progress: done.append(progress[1:]))
    assert found.loss <= min(found.uniform, *found.singles)
    assert found.singles == [held_out_loss(load_model(folder), sequences) for folder in folders]
    assert held_out_loss(merge(Specialists(folders), found.weights), sequences) == found.loss
    assert done == [(i, 4 + steps) for i in range(1, 5 + steps)]


def test_equal_models_can_be_searched(stories: Path, text: str) -> None:
    found = search(Specialists([stories, stories]), sequences_of(stories, text, 256))
    assert found.loss == found.uniform == found.singles[0]


@pytest.mark.parametrize(("weights", "chosen"), [(None, "searched"), ((1, 1, 2), "given")])
def test_the_figures_are_of_the_folders_that_are_there(
    noisy: list[Path], text: str, tmp_path: Path, weights: Sequence[float] | None, chosen: str
) -> None:
    names, out = [str(folder) for folder in noisy], tmp_path / "out"
    report = merge_models(names, out, weights=weights, text=text, tokens=256)
    assert json.loads((out / "merge.json").read_text()) == report
    sequences = sequences_of(out, text, 256)
    assert report["weights"] == chosen
    assert report["loss"] == held_out_loss(load_model(out), sequences)
    assert [row["loss"] for row in report["models"]] == [held_out_loss(load_model(folder), sequences) for folder in noisy]
    assert report["tokens"] == sum(len(sequence) - 1 for sequence in sequences) <= 256
    assert (out / "tokenizer.json").read_bytes() == (noisy[0] / "tokenizer.json").read_bytes()


def test_without_weights_and_text_the_weights_are_equal_and_nothing_is_measured(noisy: list[Path], tmp_path: Path) -> None:
    report = merge_models([str(folder) for folder in noisy[:2]], tmp_path / "out")
    assert report["weights"] == "equal"
    assert [row["weight"] for row in report["models"]] == [0.5, 0.5]
    assert report["loss"] is report["uniform_loss"] is report["models"][0]["loss"] is None


@pytest.mark.parametrize(
    ("kinds", "written"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
    ],
)
def test_transformers_reads_the_floats_that_hold_every_folders(
    kinds: tuple[torch.dtype, torch.dtype], written: torch.dtype, models: Callable[[str], Path], copy: Copy, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folders = [copy(models("qwen3"), name, noise, "", kind) for name, noise, kind in zip("ab", (0, 0.3), kinds, strict=True)]
    change_config(folders[0], dtype="bfloat16")
    merge_models([str(folder) for folder in folders], tmp_path / "out")
    theirs, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.arange(20)[None]
    assert {parameter.dtype for parameter in theirs.parameters()} == {written}
    with torch.inference_mode():
        torch.testing.assert_close(theirs.float()(tokens).logits, load_model(tmp_path / "out")(tokens), rtol=1e-4, atol=1e-4)


@given(st.integers(0, 5000), st.one_of(st.none(), st.integers(0, 9)), st.integers(1, 5000), st.integers(2, 2000))
@settings(deadline=None)
def test_held_out_sequences_fit_the_context_and_follow_the_text(
    stories: Path, length: int, bos: int | None, most: int, context: int
) -> None:
    config = replace(load_config(stories), max_context=context)
    try:
        sequences = held_out(range(100, 100 + length), config, bos, most)
    except InputError:
        assert min(length, most) < 2 * SHORTEST_TEXT or context == 2
        return
    assert all(2 <= len(sequence) <= min(context, LONGEST_SEQUENCE) for sequence in sequences)
    assert bos is None or all(sequence[0] == bos for sequence in sequences)
    tokens = torch.cat([sequence[bos is not None :] for sequence in sequences])
    assert len(tokens) <= most
    assert (tokens.diff() > 0).all()


def test_every_part_of_a_long_text_is_heard(stories: Path) -> None:
    sequences = held_out(range(100_000), load_config(stories), None, 2048)
    assert [int(sequence[0]) // 25_000 for sequence in sequences] == [0, 1, 2, 3]


@pytest.mark.parametrize("weights", [(1,), (1, 1, 1), (0, 0), (-1, 2), (float("nan"), 1), (float("inf"), 1), ()])
def test_weights_that_are_no_shares_are_refused(weights: Sequence[float]) -> None:
    with pytest.raises(InputError, match="give 2 numbers from 0, not all 0"):
        normalize(weights, 2)


def test_every_reason_is_named_at_once(
    models: Callable[[str], Path], small_models: Callable[[str], tuple[Path, Any]], stories: Path, copy: Copy, tmp_path: Path
) -> None:
    first, wider, lacking, mixed = (copy(stories, name) for name in ("first", "wider", "lacking", "mixed"))
    change_config(wider, rope_theta=5e5, max_position_embeddings=1024)
    save_file({name: tensor for name, tensor in weights_file(lacking).items() if "norm" not in name}, lacking / "model.safetensors")
    (mixed / "tokenizer.json").write_text("{}")
    quantize("demo", find_recipe("8da8w"), tmp_path / "quantized")
    folders = [first, wider, lacking, mixed, tmp_path / "quantized", small_models("bitnet")[0], models("llama")]
    with pytest.raises(ModelError) as refused:
        Specialists(folders)
    told = str(refused.value)
    assert f"{wider} has max_context 1024, {first} 512" in told
    assert f"{wider} has layers" in told
    assert "model.norm.weight is missing" in told
    assert "model.layers.4.input_layernorm.weight is missing" in told
    assert f"{mixed / 'tokenizer.json'} is not {first / 'tokenizer.json'} byte for byte" in told
    assert "quantized is a quantized checkpoint: merge the float models" in told
    assert "bitnet has quantized weights" in told
    assert f"{models('llama')} has vocab_size 96, {first} 512" in told


def test_a_single_model_is_refused(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 models are given, at least 2"):
        merge_models([str(stories)], tmp_path / "out")


def test_a_short_text_is_refused(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="5 tokens of the held-out text would be predicted, at least 16"):
        merge_models([str(stories)] * 2, tmp_path / "out", text="Once upon a time, there was a girl", tokens=5)


def test_nothing_is_left_after_a_failure(stories: Path, text: str, tmp_path: Path) -> None:
    def stop(*progress: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_models([str(stories)] * 2, tmp_path / "out", text=text, tokens=64, progress=stop)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_left_alone(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(BundleError, match="already there"):
        merge_models([str(stories)] * 2, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["phi3", "gemma3", "mobilellm-ls", "mobilellm-r1"])
def test_every_layout_is_averaged_as_it_is_stored(
    name: str, small_models: Callable[[str], tuple[Path, Any]], copy: Copy, tmp_path: Path
) -> None:
    folders = [small_models(name)[0], copy(small_models(name)[0], "other", 0.5)]
    merge_models([str(folder) for folder in folders], tmp_path / "out", weights=(3, 1))
    first, other = (weights_file(folder) for folder in folders)
    for key, tensor in weights_file(tmp_path / "out").items():
        torch.testing.assert_close(tensor, 0.75 * first[key] + 0.25 * other[key], rtol=1e-6, atol=1e-6)
