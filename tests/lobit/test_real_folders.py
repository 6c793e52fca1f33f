"""Folders that people really have (../shared/cases): read as transformers reads them, or refused with the way out; never another model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lobit.checkpoint import load_model
from tests import small_models as zoo

Answer = Any
Lobit = Callable[..., Answer]
DONE, MISTAKE = 0, 2
TAKEN = {
    "stale-shards": ["tokens of a sentence", "logits"],
    "stale-index": ["tokens of a sentence", "logits"],
    "added-in-config": ["tokens of a sentence", "a chat in the template", "tokens of the chat", "stop tokens", "logits"],
    "extra-pad": ["tokens of a sentence", "logits"],
    "codellama-vocabulary": ["tokens of a sentence", "logits"],
    "huge-logits": ["logits"],
    "rope-dynamic": ["logits"],
    "eos-minus-one": ["tokens of a sentence", "logits"],
    "head-name-only": [],
    "no-prefix": [],
}
"""Cases, and what of each transformers reads as well."""
REFUSED = {
    "tied-both": ["lm_head.weight is another matrix than model.embed_tokens.weight", "tie_word_embeddings: false"],
    "no-head": ["lm_head.weight is missing", "tie_word_embeddings is false in config.json: write true"],
    "stale-eos": ["generation_config.json", "50256", "511"],
    "lora-only": ["merge the adapter first"],
    "lora-beside": ["merge the adapter first"],
    "no-fast-tokenizer": ["tokenizer.model", "save_pretrained"],
}
EXPORT = ("--recipe", "8da8w", "--target", "onnx", "--context", 64, "--chunk", 16)


@pytest.fixture(scope="session")
def cases(shared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all cases."""
    out = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, shared("cases/make_cases.py"), shared("models/stories260k"), out], check=True)
    return out


def test_every_case_is_tested(cases: Path) -> None:
    assert {path.name for path in cases.iterdir() if path.is_dir()} == {*TAKEN, *REFUSED, "half-overflow"}


@pytest.mark.parametrize("case", TAKEN)
def test_a_folder_that_is_sound_is_read_as_transformers_reads_it(case: str, cases: Path, lobit: Lobit, tmp_path: Path) -> None:
    answer = lobit("doctor", cases / case, "--json")
    assert answer.code == DONE, answer.out
    same = [check["what"] for check in answer.json["checks"] if check["same"]]
    assert [what for what in TAKEN[case] if not any(name.startswith(what) for name in same)] == []
    exported = lobit("export", cases / case, *EXPORT, "-o", tmp_path / "bundle")
    assert exported.code == DONE, exported.err


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_not_sound_is_refused_with_the_way_out(case: str, cases: Path, lobit: Lobit, tmp_path: Path) -> None:
    answer = lobit("export", cases / case, *EXPORT, "-o", tmp_path / "bundle")
    assert answer.code == MISTAKE
    assert [told for told in REFUSED[case] if told not in answer.err] == []
    message = answer.err[answer.err.index("lobit: ") :]
    assert len(message.splitlines()) < 5
    assert list(tmp_path.iterdir()) == []


def test_names_without_a_prefix_and_a_head_of_that_name_are_the_same_model(cases: Path, stories: Path) -> None:
    tokens = torch.arange(1, 33)[None]
    expected = load_model(stories)(tokens)
    for case in ("head-name-only", "no-prefix", "stale-shards", "stale-index"):
        assert torch.equal(load_model(cases / case)(tokens), expected), case


def test_tokens_that_the_config_alone_knows_are_in_the_bundle(cases: Path, lobit: Lobit, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    out = tmp_path / "bundle"
    assert lobit("export", cases / "added-in-config", *EXPORT, "-o", out).code == DONE
    inner = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert [inner.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>")] == [512, 513]
    assert 513 in json.loads((out / "manifest.json").read_text(encoding="utf-8"))["tokens"]["stop"]


def test_weights_beyond_halves_are_refused_where_halves_are_kept(cases: Path, lobit: Lobit, tmp_path: Path) -> None:
    answer = lobit("quantize", cases / "half-overflow", "--recipe", "fp16", "-o", tmp_path / "out")
    assert answer.code == MISTAKE
    assert "1 of 32768 weights of embedding are beyond 65504" in answer.err
    assert lobit("quantize", cases / "half-overflow", "--recipe", "8da8w", "-o", tmp_path / "out").code == DONE


# --- texts ------------------------------------------------------------------------------------------------------------------------

WITH_TEXT = {
    "quantize": lambda p, text: ["--recipe", "8da8w", "--calibration", text, "-o", p / "out"],
    "sensitivity": lambda p, text: ["--recipe", "8da8w", "--text", text],
    "train": lambda p, text: ["--recipe", "8da8w", "--text", text, "--steps", "1", "-o", p / "out"],
    "merge": lambda p, text: ["--text", text, "-o", p / "out"],
}


@pytest.mark.parametrize("verb", WITH_TEXT)
def test_a_token_that_the_model_lacks_is_one_message(verb: str, cases: Path, lobit: Lobit, tmp_path: Path) -> None:
    models = [cases / "extra-pad"] * (2 if verb == "merge" else 1)
    answer = lobit(verb, *models, *WITH_TEXT[verb](tmp_path, cases / "pad.txt"))
    assert answer.code == MISTAKE
    assert "the text has token 512 ('[PAD]'), and the model's vocabulary ends at 511" in answer.err
    assert list(tmp_path.iterdir()) == []


def test_parity_tells_of_a_token_that_the_model_lacks(cases: Path, lobit: Lobit, tmp_path: Path) -> None:
    bundle, model = tmp_path / "bundle", cases / "extra-pad"
    assert lobit("export", model, *EXPORT, "-o", bundle).code == DONE
    answer = lobit("parity", bundle, "--reference", model, "--text", cases / "pad.txt")
    assert answer.code == MISTAKE
    assert "token 512" in answer.err
    answer = lobit("run", bundle, "--prompt", "a [PAD]")
    assert answer.code == MISTAKE
    assert "token 512" in answer.err


def test_parity_survives_logits_that_no_exponential_holds(cases: Path, lobit: Lobit, tmp_path: Path) -> None:
    bundle, model = tmp_path / "bundle", cases / "huge-logits"
    assert lobit("export", model, "--recipe", "fp", *EXPORT[2:], "-o", bundle).code == DONE
    answer = lobit("parity", bundle, "--reference", model, "--text", cases / "plain.txt", "--tokens", 64, "--json")
    assert answer.json["stages"], answer.err


def test_a_byte_order_mark_is_no_text(cases: Path, stories: Path, lobit: Lobit) -> None:
    command = ("sensitivity", stories, "--recipe", "8da8w", "--json", "--text")
    plain, marked = (lobit(*command, cases / f"{name}.txt").json for name in ("plain", "bom"))
    assert plain == marked


# --- every family -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_is_read_as_transformers_reads_it(family: str, small_models: Any, lobit: Lobit) -> None:
    answer = lobit("doctor", small_models(family)[0], "--json")
    assert answer.code == DONE, answer.out + answer.err


def test_a_model_that_is_read_wrongly_is_found(stories: Path, tmp_path: Path, lobit: Lobit, monkeypatch: pytest.MonkeyPatch) -> None:
    from lobit import checkpoint

    read = checkpoint.read

    def wrong(config: Any, ours: str, *rest: Any) -> Any:
        return read(config, ours, *rest) * (1.05 if ours.endswith("norm.weight") else 1)

    monkeypatch.setattr(checkpoint, "read", wrong)
    answer = lobit("doctor", stories)
    assert answer.code == MISTAKE
    assert "NO" in answer.out


def test_the_text_model_of_a_model_of_images_is_read_as_transformers_reads_it(tmp_path: Path, lobit: Lobit) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    text = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "sliding_window": 16}
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision.to_dict(), mm_tokens_per_image=4, image_token_index=127, boi_token_index=126)
    )
    model.save_pretrained(tmp_path / "model")
    answer = lobit("doctor", tmp_path / "model", "--json")
    assert answer.code == DONE, answer.err
    assert answer.json["checks"][-1]["same"]


def test_double_precision_is_read(stories: Path, tmp_path: Path, lobit: Lobit) -> None:
    for path in stories.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor.double() for name, tensor in load_file(stories / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.arange(1, 33)[None]
    assert torch.equal(load_model(tmp_path)(tokens), load_model(stories)(tokens))
    assert lobit("quantize", tmp_path, "--recipe", "8da8w", "-o", tmp_path / "out").code == DONE
