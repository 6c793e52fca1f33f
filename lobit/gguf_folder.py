"""A Hugging Face folder from a GGUF file: a Llama's weights as bfloat16, and the tokenizer from the tokens and merges in the file.

Source: ggml `docs/gguf.md`; llama.cpp `src/llama-vocab.cpp` for the meaning of the names of pre-tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from lobit.checkpoint import save_model
from lobit.errors import MissingPartError, ModelError, listed, reason, shown, shown_name
from lobit.families import read_config
from lobit.layout import from_gguf, gguf_name, layout
from lobit.model import Config, Transformer
from lobit.progress_callback import Progress

if TYPE_CHECKING:
    from gguf import ReaderTensor

    from lobit.gguf_reader import GgufContents

FAMILY = "llama"
CONFIG = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
"""Fields of config.json, and GGUF's names of them."""
IMPLIED: dict[str, Callable[[Config], int]] = {
    "vocab_size": lambda config: config.vocab_size,
    "attention.value_length": lambda config: config.head_dim,
    "rope.dimension_count": lambda config: config.head_dim,
}
"""Fields of the family in GGUF that repeat what other fields say, and the value that each must have."""
TOKENIZER = {"model": "gpt2", "pre": "smollm"}
"""The only tokenizer that is read: byte-level BPE, where each digit is a word of its own and the text between is cut into GPT-2's words."""
UNUSED = ("add_bos_token", "add_eos_token", "add_space_prefix")
"""Fields for what that tokenizer does not do: false, where a file has them."""
LISTS = ("tokens", "merges", "token_type")
"""Fields that a tokenizer is made from."""
NORMAL, CONTROL = 1, 3
"""GGUF's types of tokens: those found by merging, and special ones."""
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Special tokens of tokenizer_config.json, and GGUF's names of them."""



def write_folder(path: Path, folder: Path, progress: Progress | None = None) -> None:
    """Writes config.json, model.safetensors, generation_config.json, tokenizer.json and tokenizer_config.json.

    Args:
        path: the GGUF file.
        folder: an empty folder to write into.
        progress: called after each tensor.

    Raises:
        MissingPartError: the package gguf is not installed.
        ModelError: it is no GGUF file, or holds something else than a Llama with SmolLM's tokenizer; the message lists the reasons.
    """
    fields, tensors = _read(path)
    _check_architecture(fields, path)
    values = _config_values(fields, tied=gguf_name("head.weight") not in tensors)
    config = read_config(values)
    _check_fields(fields, config, path)
    tokenizer = build_tokenizer(*(fields[f"tokenizer.ggml.{name}"] for name in LISTS))
    save_model(_model(tensors, config, path, progress), values, folder)
    _write_json(folder / "generation_config.json", {name: value for name, value in values.items() if name.endswith("_token_id")})
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", _tokenizer_values(fields))


def require_gguf() -> None:
    """Refuses to go on without the package gguf.

    Raises:
        MissingPartError: it is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingPartError(f"reading GGUF files needs the package gguf ({error}): pip install 'lobit[fetch]'") from None


def _read(path: Path) -> GgufContents:
    require_gguf()
    from lobit.gguf_reader import read_gguf

    try:
        return read_gguf(path)
    except ValueError as error:
        raise ModelError(f"{path} is no GGUF file that can be read ({error}): fetch it again") from None


def _check_architecture(fields: Mapping[str, Any], path: Path) -> None:
    found = fields.get("general.architecture")
    if found != FAMILY:
        raise ModelError(f"{path.name} holds a model of architecture {shown(found)}, {FAMILY} alone is read: take the model's own folder")


def _config_values(fields: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The contents of config.json; fields that the GGUF file lacks are left out."""
    values = {name: fields.get(f"{FAMILY}.{theirs}") for name, theirs in CONFIG.items()}
    values |= {f"{name}_id": fields.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in NAMED.items() if name != "unk_token"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": FAMILY,
        "vocab_size": len(fields.get("tokenizer.ggml.tokens", [])),
        **{name: _shortest(value) for name, value in values.items() if value is not None},
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }


def _shortest(value: Any) -> Any:
    """The shortest number that is the same float32: 1e-05, and not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _check_fields(fields: Mapping[str, Any], config: Config, path: Path) -> None:
    """Checks that lobit understands all that the file says about the family and the tokenizer.

    Raises:
        ModelError: it does not; the message lists the fields.
    """
    problems = []
    for name, value in fields.items():
        family, _, field = name.partition(".")
        if family != FAMILY or field in CONFIG.values():
            continue
        needed = IMPLIED[field](config) if field in IMPLIED else None
        if needed is None or value != needed:
            problems.append(f"{shown_name(name)} is {shown(value)}: " + ("this is not known" if needed is None else f"{needed} is needed"))
    problems += _tokenizer_problems(fields, config.vocab_size)
    if problems:
        raise ModelError(listed(problems, f"{path.name} says what cannot be taken over, take the model's own folder:"))


def _tokenizer_problems(fields: Mapping[str, Any], vocabulary: int) -> list[str]:
    """Reasons why the file's tokenizer is not the one that `build_tokenizer` builds."""
    values = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    needed = {**TOKENIZER, **{name: False for name in UNUSED if name in values}}
    wrong = {name: known for name, known in needed.items() if values.get(name) != known}
    problems = [f"the tokenizer's {name} is {shown(values.get(name))}: {shown(known)} alone is read" for name, known in wrong.items()]
    problems += [f"the tokenizer's {name} are missing" for name in LISTS if name not in values]
    for name in (f"{theirs}_token_id" for theirs in NAMED.values()):
        value = values.get(name, 0)
        if not isinstance(value, int) or not 0 <= value < vocabulary:
            problems.append(f"the tokenizer's {name} is {shown(value)}: a token below {vocabulary} is needed")
    return problems


def _model(tensors: Mapping[str, ReaderTensor], config: Config, path: Path, progress: Progress | None) -> Transformer:
    """The model with the file's weights in bfloat16."""
    with torch.device("meta"):
        model = Transformer(config)
    names = {gguf_name(ours): ours for ours in layout(model)}
    if problems := _tensor_problems(tensors, {name: list(model.state_dict()[ours].shape) for name, ours in names.items()}):
        raise ModelError(listed(problems, f"{path.name} does not fit a {FAMILY} model, take the model's own folder:"))
    state = {}
    for done, (name, ours) in enumerate(names.items(), 1):
        state[ours] = from_gguf(config, ours, _floats(tensors[name])).bfloat16()
        if progress:
            progress("weights", done, len(names))
    if config.tied:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state, assign=True)
    return model


def _tensor_problems(tensors: Mapping[str, ReaderTensor], shapes: Mapping[str, list[int]]) -> list[str]:
    """Every tensor that is missing, misshapen or left over."""
    found = {name: tensor.shape.tolist()[::-1] for name, tensor in tensors.items()}
    problems = [f"{name} is missing" for name in shapes if name not in found]
    problems += [f"{shown_name(name)} is not used" for name in found if name not in shapes]
    wrong = [name for name in shapes if name in found and found[name] != shapes[name]]
    return problems + [f"{name} has shape {shown(found[name])}: {shapes[name]} is needed" for name in wrong]


def _floats(tensor: ReaderTensor) -> Tensor:
    """The values of a tensor, dequantized to float32."""
    from gguf.quants import dequantize

    try:
        return torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise ModelError(f"{shown_name(tensor.name)} is {kind}, which gguf does not read: take the model's own folder") from None


def build_tokenizer(tokens: list[str], merges: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """The tokenizer that `TOKENIZER` describes.

    Args:
        tokens: the vocabulary in GPT-2's letters for bytes, by id.
        merges: each as `left right`, in order of priority.
        types: GGUF's types of the tokens.

    Raises:
        ModelError: there are types or merges that such a tokenizer does not have.
    """
    other = [(token, kind) for token, kind in zip(tokens, types, strict=False) if kind not in (NORMAL, CONTROL)]
    problems = [f"{shown_name(token)} is of type {kind}" for token, kind in other]
    problems += [f"merge {shown(merge)} is no pair" for merge in merges if merge.count(" ") != 1]
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        problems.append(f"{len(tokens)} tokens, {len(set(tokens))} of them different, have {len(types)} types")
    if problems:
        raise ModelError(listed(problems, "the file has other tokens than a byte-level BPE, take the model's own folder:"))
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        inner = tokenizers.Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, pairs))
    except Exception as error:  # the library raises no narrower class, such as for a merge into a token that does not exist
        raise ModelError(f"the file's tokens and merges do not fit together ({reason(error)}): fetch it again") from None
    digits = pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    inner.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special])
    return inner


def _tokenizer_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of tokenizer_config.json."""
    tokens, ids = fields["tokenizer.ggml.tokens"], {name: f"tokenizer.ggml.{theirs}_token_id" for name, theirs in NAMED.items()}
    template = fields.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "GPT2Tokenizer",
        **{name: tokens[fields[field]] for name, field in ids.items() if field in fields},
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields[f"{FAMILY}.context_length"],
        **({} if template is None else {"chat_template": template}),
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
