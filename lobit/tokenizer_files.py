"""Reads a tokenizer's files (tokenizer.json and those beside it), checks them against each other and the model, and copies them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from lobit.errors import ModelError, listed, reason, shown
from lobit.quiet import quiet_native

FILE_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
SLOW = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "tekken.json")
"""Files of other kinds of tokenizers, which are not read."""
SAVE_FAST = "save one with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""What tokenizer.json says of an added token besides its content."""
LARGEST_TOKENIZER = 64 << 20
"""Most bytes of a tokenizer.json; those of vocabularies of a quarter million tokens have about 30 MB."""
LARGEST_TEMPLATE = 1 << 20
"""Most characters of a chat template; real ones have a few thousand."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that a chat template may name (transformers `SPECIAL_TOKENS_ATTRIBUTES`)."""
STOP_FILES = ("generation_config.json", "config.json")
"""Where stop tokens are declared; the first file that has any counts."""
DRAWING = {"temperature": (0, 100), "top_k": (0, 1 << 31), "top_p": (0, 1), "repetition_penalty": (0.01, 100)}
"""Fields of generation_config.json that say how tokens are drawn, and the least and largest value of each."""
NO_TOKEN = -1
"""The `eos_token_id` of some config.json files that declare none."""
SURROGATE = re.compile("[\ud800-\udfff]")


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Turns what a damaged tokenizer.json raises into one message."""
    try:
        yield
    except BaseException as error:  # the library raises bare Exception, and BaseException where its Rust code panics
        if isinstance(error, (ModelError, KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ModelError(f"{what} ({reason(error)}): fetch it again") from None


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text: no half of a surrogate pair."""
    return not SURROGATE.search(text)


def load(path: Path, special: Mapping[str, str], config: Mapping[str, Any] | None = None) -> tokenizers.Tokenizer:
    """Loads tokenizer.json without the truncation and padding that it may have, and makes the named tokens of its vocabulary special.

    Args:
        path: the file.
        special: the named tokens (`special_tokens`).
        config: the content of tokenizer_config.json.
    """
    with guarded(f"{path} is no tokenizer that can be read"), quiet_native():
        text, added_tokens = _whole(path, config or {})
        inner = tokenizers.Tokenizer.from_str(text)
        _check_ids(inner, added_tokens, path)
        inner.no_truncation()
        inner.no_padding()
        added = {entry.content for entry in inner.get_added_tokens_decoder().values()}
        plain = [token for token in special.values() if token not in added and inner.token_to_id(token) is not None]
        inner.add_special_tokens(plain)
        inner.decode(inner.encode("a").ids)  # some damage shows only in use
    return inner


def _whole(path: Path, config: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The text of tokenizer.json and its added tokens, with those that only tokenizer_config.json has (transformers adds them too).

    Raises:
        ModelError: the file is missing or too large, or an added token is unusable.
    """
    if not path.is_file():
        raise ModelError(f"{path} is missing: lobit needs a fast tokenizer, {SAVE_FAST}")
    size = path.stat().st_size
    if size > LARGEST_TOKENIZER:
        raise ModelError(f"{path} has {size} bytes, at most {LARGEST_TOKENIZER} are read: fetch it again")
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read()
    values = json.loads(text)
    vocabulary, added = values["model"].get("vocab") or {}, values.get("added_tokens") or []
    known = {entry["id"] for entry in added} | set(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
    missing = {int(name): entry for name, entry in (config.get("added_tokens_decoder") or {}).items() if int(name) not in known}
    unusable = [token for token, entry in missing.items() if not isinstance(entry.get("content"), str)]
    if unusable:
        raise ModelError(f"{path.parent / CONFIG_NAME} has added tokens without a content, {shown(unusable)}: {SAVE_FAST}")
    for token, entry in sorted(missing.items()):
        flags = {name: bool(entry.get(name, name == "normalized" and not entry.get("special"))) for name in ADDED_FLAGS}
        added.append({"id": token, "content": entry["content"], **flags})
    return json.dumps({**values, "added_tokens": added}, ensure_ascii=False) if missing else text, added


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Writes a folder's tokenizer.json to another one, with all added tokens in it, so that a reader of this file alone knows them."""
    path = source / FILE_NAME
    with guarded(f"{path} is no tokenizer that can be read"):
        text, _ = _whole(path, read_optional(source / CONFIG_NAME))
    (folder / FILE_NAME).write_text(text, encoding="utf-8", newline="")


def _check_ids(inner: tokenizers.Tokenizer, added: list[dict[str, Any]], path: Path) -> None:
    """Checks that no two tokens share an id, and that added tokens have the ids of the file: the library numbers them itself."""
    ids = list(inner.get_vocab(with_added_tokens=False).values())
    problems = [f"{len(ids)} tokens have {len(set(ids))} ids"] if len(set(ids)) < len(ids) else []
    for entry in added:
        found = inner.token_to_id(entry["content"])
        if found != entry["id"]:
            problems.append(f"{shown(entry['content'])} is token {found}, and {shown(entry['id'])} in the list of added tokens")
    if problems:
        raise ModelError(listed(problems, f"{path} contradicts itself, fetch it again:"))


def first_added(inner: tokenizers.Tokenizer) -> int | None:
    """The token that the tokenizer puts before a text; None where it puts none."""
    encoding = inner.encode("a")
    return encoding.ids[0] if encoding.special_tokens_mask[:1] == [1] else None


def read_optional(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file."""
    from lobit.checkpoint import read_json  # brings torch, which a bundle's tokenizer does not need

    return read_json(path) if path.is_file() else {}


def special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens; in older folders, without `added_tokens_decoder`, special_tokens_map.json takes precedence."""
    values = dict(config)
    if "added_tokens_decoder" not in config:
        values |= read_optional(folder / "special_tokens_map.json")
    tokens: dict[str, str] = {}
    problems = []
    for name in NAMED:
        value = values.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and is_unicode(content):
            tokens[name] = content
        elif value is not None:
            problems.append(f"{name} is {shown(value)}: a text, or an object with `content`, is needed")
    if problems:
        raise ModelError(listed(problems, f"{folder / CONFIG_NAME} has {len(problems)} unusable tokens:"))
    return tokens


def chat_template_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: chat_template.jinja, or tokenizer_config.json's text, or the text named `default` in the list there."""
    path = folder / "chat_template.jinja"
    template = config.get("chat_template")
    if path.is_file():
        if path.stat().st_size > LARGEST_TEMPLATE:
            raise ModelError(f"{path} has {path.stat().st_size} bytes, at most {LARGEST_TEMPLATE} are read: fetch it again")
        try:
            template = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ModelError(f"{path} is not text in UTF-8: fetch it again") from None
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is None or (isinstance(template, str) and is_unicode(template) and len(template) <= LARGEST_TEMPLATE):
        return template
    told = f"{len(template)} characters" if isinstance(template, str) else type(template).__name__
    raise ModelError(
        f"chat_template in {folder / CONFIG_NAME} is {told}: a text of at most {LARGEST_TEMPLATE} Unicode characters is needed"
    )


def declared_stops(folder: Path) -> list[int]:
    """The stop tokens: `eos_token_id`, one or several, of generation_config.json or else of config.json."""
    for name in STOP_FILES:
        stops = _stops_of(folder / name)
        if stops is None:
            continue
        if all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in stops):
            return stops
        told = shown(stops[0] if len(stops) == 1 else stops)
        raise ModelError(f"eos_token_id in {folder / name} is {told}: token ids are needed, whole numbers from 0")
    return []


def _stops_of(path: Path) -> list[Any] | None:
    """A file's `eos_token_id` as a list, unchecked, from the top level or from the text model's fields; None: there is none."""
    values = read_optional(path)
    inner = values.get("text_config")
    value = values.get("eos_token_id", inner.get("eos_token_id") if isinstance(inner, dict) else None)
    return value if isinstance(value, list) else None if value in (None, NO_TOKEN) else [value]


def declared_generation(folder: Path) -> dict[str, Any]:
    """How the model's authors draw tokens, as far as generation_config.json says; a temperature of 0 where they do not draw.

    Raises:
        ModelError: a value cannot be used; all of these are named.
    """
    path = folder / STOP_FILES[0]
    values = read_optional(path)
    found = {name: values[name] for name in DRAWING if values.get(name) is not None}
    wrong = [name for name, value in found.items() if not _draws(name, value)]
    if wrong:
        told = ", ".join(f"{name} is {shown(found[name])}" for name in wrong)
        raise ModelError(f"{told} in {path}: correct it or leave it out")
    if values.get("do_sample") is False:
        found["temperature"] = 0.0
    return {name: value if name == "top_k" else float(value) for name, value in found.items()}


def _draws(name: str, value: Any) -> bool:
    """Whether tokens can be drawn with the value."""
    low, high = DRAWING[name]
    whole = isinstance(value, int) and not isinstance(value, bool)
    return (whole or (name != "top_k" and isinstance(value, float))) and low <= value <= high


def check_vocabulary(inner: tokenizers.Tokenizer, stop: Sequence[int], bos: int | None, vocab_size: int | None, folder: Path) -> None:
    """Checks that the tokenizer fits the model's vocabulary.

    Tokens that were added behind the vocabulary may lie outside it (Gemma 3's image token does), unless they begin or stop a text.
    """
    if vocab_size is None:
        return
    outside = sorted(token for token in stop if token >= vocab_size)
    if outside:
        where = next((name for name in STOP_FILES if outside[0] in (_stops_of(folder / name) or [])), CONFIG_NAME)
        raise ModelError(
            f"eos_token_id of {folder / where} is token {outside[0]}, and the model's vocabulary ends at {vocab_size - 1}: correct it, or "
            "put the model's own file there"
        )
    added = inner.get_added_tokens_decoder()
    own = [token for token in inner.get_vocab(with_added_tokens=False).values() if token not in added]
    largest = max([*own, -1 if bos is None else bos])
    if largest >= vocab_size:
        raise ModelError(
            f"{folder} has a tokenizer that does not fit the vocabulary: its largest token is {shown(largest)}, "
            f"the model has {vocab_size}: put the model's own tokenizer there"
        )
