"""A model's tokenizer as GGUF has it, proved by llama.cpp: it must cut texts into the same tokens.

Byte-level BPE becomes `gpt2`, whose pre-tokenizer llama.cpp knows by names alone: the name is found by what each does to `TEXTS`. BPE
with bytes to fall back on, which was SentencePiece once, becomes `llama`, and Unigram `t5`.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lobit.errors import MissingPartError, TargetError, shown
from lobit.export.gguf.file import write
from lobit.runtime.gguf_ports import QUIET_END
from lobit.tokenizer import BYTE, Tokenizer
from lobit.tokenizer_files import FILE_NAME, guarded

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, AS_BYTE = 1, 2, 3, 4, 5, 6
"""GGUF's types of tokens."""
TEXTS = (
    "The capital of France is Paris. 2 + 2 = 4, isn't it?\n",
    "I'm sure we'll see; they've said it's DON'T, WE'LL, I'VE 'tis 'S'",
    "1 12 123 1234 12345 123456 3.14159 1,000,000 0x1F x2y 7a 2nd",
    "one  two   three    four\tfive\t\tsix  \n  seven\n\n\neight \n \n nine\r\nten  ",
    "!? ?! ... (a) [b] {c} <d> a_b __init__ x=1;//y a+b %%% $$ ^^ ~~ -- --- 'quoted' \"said\" #tag @name",
    "camelCase HTMLParser iPhone ABCdef éÉàÀ ñandú STRASSE straße Ünïcödé",
    "Привет, мир! Γειά σου Κόσμε שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก ជំរាបសួរ",  # noqa: RUF001
    "你好，世界。こんにちは世界 안녕하세요 세계 一二三123四五 ①②③ ½ ²³",  # noqa: RUF001
    "😀😃 👩‍👩‍👧 🇫🇷 ✅ → ∑ ± × ÷ € £ ¥ © ™ “curly” ‘quotes’ — – … \u00a0 \u2003x",  # noqa: RUF001
    "if (a > b):\n    return [i for i in range(10)]\n\t\tprint('%d' % x)\n",
)
"""Texts on which llama.cpp's pre-tokenizers differ: numbers, contractions, spaces, scripts, signs, code. No sentence of a data set."""
PRE_TOKENIZERS = (
    "gpt-2", "llama-bpe", "qwen2", "smollm", "gpt-4o", "tekken", "deepseek-v3", "deepseek-llm", "deepseek-coder", "falcon", "mpt",
    "starcoder", "stablelm2", "command-r", "olmo", "dbrx", "refact", "exaone", "exaone4", "exaone-moe", "chatglm-bpe", "glm4", "qwen35",
    "minerva-7b", "megrez", "bloom", "gpt3-finnish", "poro-chat", "viking", "jais", "jais-2", "codeshell", "superbpe", "trillion",
    "granite-docling", "granite-embed-multi-97m", "bailingmoe", "seed-coder", "hunyuan", "hunyuan-dense", "joyai-llm", "kimi-k2",
    "grok-2", "afmoe", "laguna", "minimax-m2", "solar-open", "mellum2", "smaug-bpe", "tiny_aya", "youtu", "chameleon", "sarvam-moe",
    "minicpm5", "roberta-bpe", "default",
)  # fmt: skip
"""llama.cpp's names (`src/llama-vocab.cpp`), the most used first; of those that are the same one name alone."""
STRIPS, MOST_STRIPPING = "Phi-3", 4
"""The name of a model by which alone llama.cpp takes away the spaces behind special tokens; number of such tokens that are tried."""
LONGEST_WAIT = 300
"""Seconds that llama.cpp may take to try all of them."""
OTHER = "take target onnx or xnnpack, or give the model the tokenizer that it was trained with"


def fields_of(folder: Path, vocab_size: int, bos: int | None, stop: tuple[int, ...]) -> dict[str, Any]:
    """The fields of a file that describe the tokenizer of a folder; those of no tokenizer where it has none.

    Args:
        folder: with tokenizer.json and what is beside it.
        vocab_size: the model's; tokens beyond it are left out, those that are missing are filled up.
        bos: the token that begins a text; None: there is none.
        stop: tokens that end a text.

    Raises:
        TargetError: llama.cpp has no tokenizer that cuts texts into the same tokens, or goes on behind a token that ends a text.
        MissingPartError: llama.cpp is not installed.
        ModelError: the tokenizer is damaged.
    """
    if not (folder / FILE_NAME).is_file():
        return {"tokenizer.ggml.model": "none"}
    tokenizer = Tokenizer.from_folder(folder, vocab_size)
    with guarded(f"{folder / FILE_NAME} is no tokenizer that can be read"):
        values = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    kind = values["model"]["type"]
    if kind not in ("BPE", "Unigram"):
        raise TargetError(f"tokenizer.json is of the kind {shown(kind)}, of which llama.cpp has no form that generates: {OTHER}")
    with guarded(f"{folder / FILE_NAME} is no tokenizer that can be read"):
        tries = list(_tries(values, vocab_size))
    around = _around(tokenizer, bos, stop, values, vocab_size)
    stripping = [entry["content"] for entry in values.get("added_tokens") or [] if entry.get("rstrip")]
    names: list[dict[str, str]] = [{}, *([{"general.name": STRIPS}] if stripping else [])]
    texts = [*TEXTS, *(f"one{token}\n two" for token in stripping[:MOST_STRIPPING])]
    asked = {"texts": texts, "tokens": [tokenizer.encode(text, bos=False) for text in texts], "stop": stop}
    return _proved([{**name, **fields, **around} for name in names for fields in tries], asked, vocab_size)


def problems_of(folder: Path, vocab_size: int) -> list[str]:
    """Why no file can have the tokenizer of a model's folder.

    Args:
        folder: as `fields_of` has it; tokens that begin and end a text are those of its own files.
        vocab_size: as `fields_of` has it.

    Raises:
        MissingPartError: as `fields_of` does.
        ModelError: as `fields_of` does.
    """
    if not (folder / FILE_NAME).is_file():
        return []
    tokenizer = Tokenizer.from_folder(folder, vocab_size)
    try:
        fields_of(folder, vocab_size, tokenizer.bos, tuple(tokenizer.stop))
    except TargetError as error:
        return [str(error)]
    return []


def _tries(values: Mapping[str, Any], vocab_size: int) -> Iterator[dict[str, Any]]:
    """What the file may say of the vocabulary, one of which must be right."""
    model = values["model"]
    tokens, types = _tokens(values, vocab_size)
    named = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if model["type"] == "BPE" and not model.get("byte_fallback"):
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        yield {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "", **named, "tokenizer.ggml.merges": merges or [" "]}
    else:
        kind = {"tokenizer.ggml.model": "llama" if model["type"] == "BPE" else "t5"}
        scores = {"tokenizer.ggml.scores": _scores(model, tokens)}
        charsmap = _charsmap(values.get("normalizer"))
        more = {"tokenizer.ggml.precompiled_charsmap": charsmap} if charsmap and model["type"] == "Unigram" else {}
        for prefix in (True, False):
            yield {**kind, **named, **scores, **more, "tokenizer.ggml.add_space_prefix": prefix}


def _tokens(values: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The tokens by their ids, and GGUF's types of them."""
    model = values["model"]
    listed = isinstance(model["vocab"], list)  # Unigram has pairs of a text and a score
    texts: dict[int, str] = {i: text for i, (text, _) in enumerate(model["vocab"])} if listed else {i: t for t, i in model["vocab"].items()}
    fallback = listed or model.get("byte_fallback")
    types = {number: AS_BYTE if fallback and BYTE.fullmatch(text) else NORMAL for number, text in texts.items()}
    for entry in values.get("added_tokens") or []:
        texts[entry["id"]] = entry["content"]
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    unknown = _unknown(model)
    types |= {} if unknown is None else {unknown: UNKNOWN}
    numbers = range(vocab_size)
    return [texts.get(i, f"[unused {i}]") for i in numbers], [types.get(i, UNUSED) for i in numbers]


def _unknown(model: Mapping[str, Any]) -> int | None:
    """The token for what the vocabulary does not have."""
    number = model.get("unk_id") if isinstance(model["vocab"], list) else model["vocab"].get(model.get("unk_token"))
    return int(number) if number is not None else None


def _scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """The scores of tokens: Unigram's own; of a BPE, the token that is merged first has the highest."""
    if model["type"] == "Unigram":
        found = {text: float(score) for text, score in model["vocab"]}
    else:
        found = {}
        for rank, merge in enumerate(model["merges"]):
            left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
            found.setdefault(left + right, -float(rank))
    return [found.get(token, -1e6 if model["type"] == "BPE" else 0.0) for token in tokens]


def _charsmap(normalizer: Mapping[str, Any] | None) -> bytes | None:
    """The table of characters that SentencePiece replaces, where the tokenizer has one."""
    if normalizer is None:
        return None
    if normalizer["type"] == "Sequence":
        return next((found for one in normalizer["normalizers"] if (found := _charsmap(one))), None)
    return base64.b64decode(normalizer["precompiled_charsmap"]) if normalizer["type"] == "Precompiled" else None


def _around(tokenizer: Tokenizer, bos: int | None, stop: tuple[int, ...], values: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The fields of special tokens and of the chat template.

    llama.cpp has fields for three tokens that end a text: `eos`, `eot` and `eom`. Some others it knows by their names.
    """
    ids = {entry["content"]: entry["id"] for entry in values.get("added_tokens") or []}
    named = {name: ids.get(tokenizer.special.get(f"{name}_token", "")) for name in ("bos", "eos", "unk", "pad")}
    eos = named["eos"] if named["eos"] is not None else next(iter(stop), None)
    rest = [token for token in stop if token != eos]
    found = {
        "bos_token_id": bos if bos is not None else named["bos"],
        "eos_token_id": eos,
        "unknown_token_id": _unknown(values["model"]) if named["unk"] is None else named["unk"],
        "padding_token_id": named["pad"],
        **dict(zip(("eot_token_id", "eom_token_id"), rest, strict=False)),
    }
    fields: dict[str, Any] = {f"tokenizer.ggml.{name}": token for name, token in found.items() if token is not None and token < vocab_size}
    fields |= {"tokenizer.ggml.add_bos_token": bos is not None, "tokenizer.ggml.add_eos_token": False}
    return fields | ({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {})


def _proved(tries: list[dict[str, Any]], asked: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The first of the tries with which llama.cpp has the tokenizer's tokens; its pre-tokenizer is found and named.

    Args:
        tries: the fields of each.
        asked: texts, the tokens of each, and tokens that end a text, as `runtime/llama_tokens.py` has them.
        vocab_size: the model's.

    Raises:
        TargetError: none is, or llama.cpp goes on behind a token that ends a text.
        MissingPartError: llama.cpp is not installed.
    """
    for fields in tries:
        names = PRE_TOKENIZERS if "tokenizer.ggml.pre" in fields else (None,)
        answer = _asked(fields, vocab_size, {"pre": names, **asked})
        if "pre" in answer:
            _check_ends(answer["runs_on"], fields)
            return {**fields, "tokenizer.ggml.pre": answer["pre"]} if "tokenizer.ggml.pre" in fields else fields
    if "error" in answer:
        raise TargetError(f"llama.cpp refuses this vocabulary ({answer['error']}): {OTHER}")
    own = asked["tokens"][asked["texts"].index(answer["text"])]
    place = next(i for i in range(len(own) + 1) if own[i : i + 1] != answer["found"][i : i + 1])
    raise TargetError(
        f"llama.cpp has no tokenizer like this model's: the last of those that it knows gives {answer['found'][place : place + 3]} where "
        f"the tokenizer gives {own[place : place + 3]}, in {shown(answer['text'])}: {OTHER}"
    )


def _check_ends(runs_on: list[int], fields: Mapping[str, Any]) -> None:
    """Refuses tokens that end a text for the model, and not for llama.cpp."""
    if runs_on:
        told = ", ".join(f"{token} ({shown(fields['tokenizer.ggml.tokens'][token])})" for token in runs_on)
        raise TargetError(
            f"llama.cpp would go on behind {told}, where the model ends a text: a GGUF file has fields for three such tokens; leave three "
            f"in the eos_token_id of generation_config.json, that of the tokenizer among them, or take target onnx or xnnpack"
        )


def _asked(fields: Mapping[str, Any], vocab_size: int, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `runtime/llama_tokens.py` answers for a file with these fields alone; see `reply`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write(path, "llama", {"llama.vocab_size": vocab_size, **fields}, [], lambda done, total: None)
        return reply(path.read_bytes(), json.dumps(request))


@functools.lru_cache(maxsize=4)  # an export asks before the work, and again when it writes
def reply(vocabulary: bytes, request: str) -> Mapping[str, Any]:
    """What `runtime/llama_tokens.py` answers for a file.

    Args:
        vocabulary: the file.
        request: what is asked of it, in JSON, without its path.

    Raises:
        TargetError: llama.cpp comes to no end, or ends the process.
        MissingPartError: it is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        path.write_bytes(vocabulary)
        command = [sys.executable, "-m", "lobit.runtime.llama_tokens"]
        given = json.dumps({"path": str(path), **json.loads(request)})
        environment = {**os.environ, **QUIET_END}
        try:
            done = subprocess.run(
                command, input=given, capture_output=True, text=True, encoding="utf-8", timeout=LONGEST_WAIT, env=environment
            )
        except subprocess.TimeoutExpired:
            raise TargetError(f"llama.cpp has not read this vocabulary in {LONGEST_WAIT} seconds: {OTHER}") from None
    try:
        told: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise TargetError(f"llama.cpp ended with code {done.returncode} at this vocabulary ({'; '.join(lines[-2:])}): {OTHER}") from None
    if "missing" in told:
        raise MissingPartError(told["missing"])
    return told
