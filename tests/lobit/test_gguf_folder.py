"""A GGUF file becomes a Hugging Face folder: transformers reads the same weights out of both, and the tokenizer is SmolLM's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from lobit.checkpoint import load_config, load_model
from lobit.errors import ModelError
from lobit.gguf_folder import CONTROL, NORMAL, build_tokenizer, write_folder
from lobit.tokenizer import Tokenizer
from tests.gguf_files import CONTEXT, ENDLESS, HIDDEN, LAYERS, MERGES, SHAPES, TEMPLATE, TOKENS, write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")
RELATIVE = 2e-5
"""Of the largest logit: sums of float32 in another order."""
TEXTS = [
    "It's 1234567890 o'clock, 3.14 or ½ or ², isn't it? We'll see: they've 42 of 1 000 000.",
    "def f(x: int = 0x7f) -> str:\n\treturn f'{x!r:>8}'  # ok\n\n\n    if a<=b and not c: pass\r\n",
    "😀👩‍👩‍👧 naïve café 𝄞 الكلمة 한국어 ไทย",
    "价值観は値と１２３と四である。",
    "  two   three    four     \n\n \t \n x",
    "<|im_start|>user\nWhat is <|endoftext|> here?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|> <|im_ start|> <jupyter_code>1+1<empty_output>",
]
PIECES = st.sampled_from(
    [*TEXTS[5].split("\n"), "<file_sep>", "12", "٣", "Ⅳ", " ", "\n", "\t", "'ll", "é", "値", "😀", "\u200d", "\u00a0", "_"]
)


def folder_of(file: Path, folder: Path) -> Path:
    folder.mkdir()
    write_folder(file, folder)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf")


@pytest.fixture(scope="module")
def folder(file: Path) -> Path:
    return folder_of(file, file.parent / "small")


# --- weights and files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_that_transformers_reads_from_the_file(tied: bool, tmp_path: Path) -> None:
    head: dict[str, tuple[int, ...]] = {} if tied else {"output.weight": SHAPES["token_embd.weight"]}
    file = write_gguf(tmp_path / "small.gguf", shapes=head)
    folder = folder_of(file, tmp_path / "small")
    with torch.device("meta"):
        model = LlamaForCausalLM(AutoConfig.from_pretrained(folder))
    theirs = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    ours = load_file(folder / "model.safetensors")
    assert set(ours) == set(theirs)
    assert load_config(folder).tied == tied
    assert [name for name, tensor in ours.items() if not tensor.equal(theirs[name].bfloat16())] == []


def test_the_folder_computes_what_transformers_does(folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, len(TOKENS), (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
    error = (load_model(folder)(tokens) - expected).abs().max() / expected.abs().max()
    assert error < RELATIVE


def test_the_config_says_what_the_file_says(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["max_position_embeddings"], config["vocab_size"]) == (LAYERS, CONTEXT, len(TOKENS))
    assert config["rms_norm_eps"] == 1e-5, "the number that was meant, not the one that float32 made of it"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


def test_the_tokenizer_has_the_files_special_tokens_and_template(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder, len(TOKENS))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
    assert (tokenizer.bos, tokenizer.stop, tokenizer.special) == (None, [2], names)
    assert tokenizer.render_chat([{"role": "user", "content": "the"}]) == "<|im_start|>the<|im_end|>\n"
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.encode(" the in") == [TOKENS.index(token) for token in ("Ġthe", "Ġ", "in")]


def test_the_same_file_gives_the_same_bytes(file: Path, folder: Path, tmp_path: Path) -> None:
    again = folder_of(file, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {path.name: path.read_bytes() for path in folder.iterdir()}


# --- SmolLM's tokenizer ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pair(shared: Callable[[str], Path]) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """Built from tokens, merges and types as a GGUF file has them; and the model's own."""
    path = shared("tokenizers/smollm2.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    special = {entry["content"] for entry in values["added_tokens"]}
    tokens = sorted(values["model"]["vocab"], key=values["model"]["vocab"].__getitem__)
    types = [CONTROL if token in special else NORMAL for token in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in values["model"]["merges"]]
    return build_tokenizer(tokens, merges, types), tokenizers.Tokenizer.from_file(str(path))


Pair = tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]


def assert_same(pair: Pair, text: str) -> None:
    built, own = pair
    ids = own.encode(text).ids
    assert built.encode(text).ids == ids
    assert built.decode(ids) == own.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_that_is_built_is_smollms(pair: Pair, text: str) -> None:
    assert_same(pair, text)


@settings(deadline=None, max_examples=300)
@given(text=st.text() | st.lists(PIECES | st.text(max_size=3)).map("".join))
def test_the_tokenizer_that_is_built_is_smollms_for_any_text(pair: Pair, text: str) -> None:
    assert_same(pair, text)


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "tinystories_sample.txt", "war_and_peace.txt"])
def test_the_tokenizer_that_is_built_is_smollms_for_books(pair: Pair, name: str, shared: Callable[[str], Path]) -> None:
    text = shared(f"text/{name}").read_text(encoding="utf-8")
    assert_same(pair, text[:50_000] + text[-50_000:])


# --- what is refused --------------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another architecture": ({"architecture": "gemma"}, ["architecture 'gemma'", "llama alone"]),
    "no architecture's fields": ({"without": ["llama.block_count"]}, ["num_hidden_layers"]),
    "experts": ({"fields": {"llama.expert_count": 8}}, ["llama.expert_count is 8: this is not known"]),
    "scaled frequencies": ({"fields": {"llama.rope.scaling.type": "yarn"}}, ["llama.rope.scaling.type is 'yarn'"]),
    "a part of each head turned": ({"fields": {"llama.rope.dimension_count": 8}}, ["rope.dimension_count is 8: 16 is needed"]),
    "heads of one kind in each layer": ({"fields": {"llama.attention.head_count_kv": [1, 2]}}, ["num_key_value_heads is [1, 2]"]),
    "another tokenizer": ({"fields": {"tokenizer.ggml.model": "llama"}}, ["model is 'llama': 'gpt2' alone"]),
    "another cut into words": ({"fields": {"tokenizer.ggml.pre": "llama-bpe"}}, ["pre is 'llama-bpe': 'smollm' alone"]),
    "no cut into words": ({"without": ["tokenizer.ggml.pre"]}, ["pre is None: 'smollm' alone"]),
    "a token before each text": ({"fields": {"tokenizer.ggml.add_bos_token": True}}, ["add_bos_token is True"]),
    "no merges": ({"without": ["tokenizer.ggml.merges"]}, ["merges are missing"]),
    "a stop token beyond the vocabulary": ({"fields": {"tokenizer.ggml.eos_token_id": 9999}}, ["eos_token_id is 9999"]),
    "a stop token that is a text": ({"fields": {"tokenizer.ggml.eos_token_id": "2"}}, ["eos_token_id is '2'"]),
    "a merge of three": ({"fields": {"tokenizer.ggml.merges": ["a b c"]}}, ["'a b c' is no pair"]),
    "a merge into no token": ({"fields": {"tokenizer.ggml.merges": [*MERGES, "x y"]}}, ["do not fit together", "xy"]),
    "a token twice": ({"fields": {"tokenizer.ggml.tokens": [*TOKENS[:-1], "!"]}}, [f"{len(TOKENS) - 1} of them different"]),
    "types of other tokens": ({"fields": {"tokenizer.ggml.token_type": [1, 3]}}, ["have 2 types"]),
    "bytes for tokens": ({"fields": {"tokenizer.ggml.token_type": [6] * len(TOKENS)}}, ["is of type 6"]),
    "a tensor too few": ({"without": ["blk.1.ffn_up.weight"]}, ["blk.1.ffn_up.weight is missing"]),
    "a tensor too many": ({"shapes": {"blk.0.attn_q.bias": (HIDDEN,)}}, ["blk.0.attn_q.bias is not used"]),
    "a misshapen tensor": ({"shapes": {"blk.0.attn_k.weight": (HIDDEN, HIDDEN)}}, ["attn_k.weight has shape [64, 64]: [32, 64]"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_known_is_refused_by_name(what: str, tmp_path: Path) -> None:
    changes, parts = REFUSED[what]
    file = write_gguf(tmp_path / "small.gguf", **changes)
    with pytest.raises(ModelError) as refused:
        write_folder(file, tmp_path)
    assert [part for part in parts if part not in str(refused.value)] == []
    assert list(tmp_path.iterdir()) == [file]


def test_every_reason_is_named_at_once(tmp_path: Path) -> None:
    file = write_gguf(
        tmp_path / "small.gguf", {"llama.expert_count": 8, "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_eos_token": True}
    )
    with pytest.raises(ModelError, match=r"(?s)expert_count.*qwen2.*add_eos_token"):
        write_folder(file, tmp_path)


@pytest.mark.parametrize("length", [0, 3, 20, 1000, -100])
def test_a_damaged_file_is_one_clear_error(length: int, file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"damaged\.gguf is no GGUF file that can be read"):
        write_folder(damaged, tmp_path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", ENDLESS)
def test_a_file_that_announces_more_than_it_has_is_refused_at_once(what: str, tmp_path: Path) -> None:
    (tmp_path / "endless.gguf").write_bytes(ENDLESS[what])
    with pytest.raises(ModelError, match=r"endless\.gguf is no GGUF file that can be read .*fetch it again"):
        write_folder(tmp_path / "endless.gguf", tmp_path)
