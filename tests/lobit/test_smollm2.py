"""The real model that `lobit fetch` writes: its tokenizer, its logits, its answers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lobit import verbs
from lobit.checkpoint import load_model
from lobit.model import Transformer
from lobit.quant_recipes.apply import convert
from lobit.quant_recipes.catalog import find_recipe
from lobit.quant_recipes.corpus import Corpus
from lobit.quant_recipes.metrics import figures
from lobit.quant_recipes.quantized import load_checkpoint
from lobit.runtime.generate import Chat
from lobit.runtime.reference import ReferenceEngine
from lobit.tokenizer import Tokenizer
from lobit.verbs.calibrate import Calibration

pytestmark = pytest.mark.slow
VOCABULARY = 49152
RELATIVE = 2e-5
"""Of the largest logit: sums of float32 in another order."""
INT4_KL = 0.5
"""Nats a token on verse, of so short a calibration: 0.25 or so; rounded to nearest by the paper's eq. 4 it is past 0.6."""
CALIBRATED = 0.75
"""Of the KL of rounding to nearest that calibration leaves, at most."""
CHAT = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "What is 12 + 30?"}]
DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_folder(smollm2, VOCABULARY)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Transformer:
    return load_model(smollm2)


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "war_and_peace.txt"])
def test_its_tokens_are_those_of_its_own_tokenizer(name: str, smollm2: Path, shared: Callable[[str], Path]) -> None:
    text = shared(f"text/{name}").read_text(encoding="utf-8")[:300_000]
    built, own = (tokenizers.Tokenizer.from_file(str(path)) for path in (smollm2 / "tokenizer.json", shared("tokenizers/smollm2.json")))
    assert built.get_vocab() == own.get_vocab()
    assert built.encode(text).ids == own.encode(text).ids


def test_its_logits_are_those_of_transformers(
    smollm2: Path, model: Transformer, tokenizer: Tokenizer, shared: Callable[[str], Path]
) -> None:
    tokens = torch.tensor([tokenizer.encode(shared("text/tinystories_sample.txt").read_text(encoding="utf-8")[:1000])])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)(tokens).logits
        error = (model(tokens) - expected).abs().max() / expected.abs().max()
    assert error < RELATIVE


@pytest.mark.parametrize("messages", [CHAT, [{"role": "system", "content": "Be brief."}, *CHAT]], ids=["default", "given"])
def test_a_chat_reads_as_with_transformers(messages: list[dict[str, str]], smollm2: Path, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2)
    text = tokenizer.render_chat(messages)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith(DEFAULT_SYSTEM) == (messages[0]["role"] != "system")
    tokens = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.encode(text, bos=False) == tokens


def test_it_knows_capitals_and_stops(model: Transformer, tokenizer: Tokenizer) -> None:
    chat = Chat(ReferenceEngine(model, context=256), tokenizer)
    answers = ["".join(chat.say(text, max_new_tokens=40)) for text in ("Name the capital of France.", "And of Italy?")]
    assert "Paris" in answers[0] and "Rome" in answers[1]
    assert chat.stats.stopped, "at the end of its turn, not at the limit"
    assert not any("<|" in answer for answer in answers)


@pytest.fixture(scope="module")
def calibrated(smollm2: Path, shared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe that is advised where nothing is trained, rounded on a novel."""
    text = shared("text/war_and_peace.txt").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    given = Calibration(text, samples=16, length=256)
    return verbs.quantize(str(smollm2), find_recipe("8da4w-g32-e8"), folder, calibration=given)


@pytest.mark.parametrize("target", ["onnx", "xnnpack"])
def test_in_four_bits_it_answers_and_parity_passes(
    target: str, calibrated: Path, smollm2: Path, shared: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    verbs.export(str(calibrated), target, bundle, context=512)
    assert "Paris" in verbs.run(bundle, "Name the capital of France.", max_new_tokens=24)["text"]
    text = shared("text/tinyshakespeare.txt").read_text(encoding="utf-8")
    proved = verbs.parity(bundle, str(smollm2), text, tokens=256, checkpoint=str(calibrated))
    assert proved["passed"] and not proved["parts"]["faults"]
    assert proved["stages"][-1]["kl_mean"] < INT4_KL


def test_what_calibration_is_worth(calibrated: Path, smollm2: Path, shared: Callable[[str], Path], tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(shared("text/tinyshakespeare.txt").read_text(encoding="utf-8"), bos=False)[:1025]
    corpus, floats, recipe = Corpus(torch.tensor([ids])), load_model(smollm2), find_recipe("8da4w-g32-e8")
    nearest = figures(convert(load_model(smollm2), recipe), corpus, recipe, floats)
    ours = figures(load_checkpoint(calibrated)[0], corpus, recipe, floats)
    assert nearest.kl is not None and ours.kl is not None
    assert ours.kl < CALIBRATED * nearest.kl
