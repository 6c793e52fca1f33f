"""A model's tokenizer: tokenizer.json read by the `tokenizers` library, and what the files beside it say of special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from lobit.errors import InputError, ModelError, listed, reason, shown
from lobit.quiet import quiet_native

FILE_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
SLOW = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "tekken.json")
"""Tokenizers of other kinds."""
SAVE_FAST = "save one with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""What tokenizer.json says of an added token besides its content."""
LARGEST_TOKENIZER = 64 << 20
"""Bytes; the files of vocabularies of a quarter million tokens have about 30 MB."""
LARGEST_TEMPLATE = 1 << 20
"""Characters; real chat templates have a few thousand."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that a chat template may name (transformers `SPECIAL_TOKENS_ATTRIBUTES`)."""
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token that stands for one byte in vocabularies with byte fallback."""
SURROGATE = re.compile("[\ud800-\udfff]")
IN_USE = "the model's tokenizer.json is damaged, which shows only in use"
KEPT = 8
"""Tokens before the new ones that a stream decodes with them, for the spaces between words."""


class Tokenizer:
    """Text to tokens and back, as Hugging Face's fast tokenizers do it.

    Attributes:
        bos: the token that `encode` puts before a text; None where it puts none.
        stop: generation ends at any of these.
        chat_template: Jinja source; None where the model has none.
        special: `bos_token`, `eos_token`, … as text: what the template may name.
        vocab_size: of the model; None: not known.
        size: one more than the largest id.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        bos: int | None,
        stop: list[int],
        chat_template: str | None,
        special: dict[str, str],
        vocab_size: int | None = None,
    ) -> None:
        self.bos, self.stop, self.chat_template, self.special, self.vocab_size = bos, stop, chat_template, special, vocab_size
        self._inner = inner
        added = inner.get_added_tokens_decoder()
        self._hidden = {token for token, entry in added.items() if entry.special}
        self.size = 1 + max([*inner.get_vocab(with_added_tokens=True).values(), -1])

    @staticmethod
    def from_folder(folder: Path, vocab_size: int | None = None) -> Tokenizer:
        """The tokenizer of a Hugging Face folder.

        Stop ids are those of generation_config.json, or of config.json where it has none, and the tokenizer's `eos_token`.

        Args:
            folder: with tokenizer.json; the other files may be absent.
            vocab_size: of the model; None: not compared.

        Raises:
            ModelError: missing, damaged or too large files, or a tokenizer that does not fit the vocabulary.
        """
        config = _read_optional(folder / CONFIG_NAME)
        special = _special_tokens(folder, config)
        inner = _load(folder / FILE_NAME, special, config)
        template = _chat_template(folder, config)
        eos = inner.token_to_id(special.get("eos_token", ""))
        stop = sorted({*_declared_stops(folder), *([] if eos is None else [eos])})
        bos = _first_added(inner)
        _check_vocabulary(inner, stop, bos, vocab_size, folder)
        return Tokenizer(inner, bos=bos, stop=stop, chat_template=template, special=special, vocab_size=vocab_size)

    @staticmethod
    def from_file(
        tokenizer_json: Path,
        *,
        bos: int | None,
        stop: Sequence[int],
        chat_template: str | None,
        special: Mapping[str, str],
        vocab_size: int | None = None,
    ) -> Tokenizer:
        """The tokenizer of a bundle: its tokenizer.json and what its manifest says.

        Args:
            tokenizer_json: the file.
            bos: as `Tokenizer` has it; so are `stop`, `chat_template` and `special`.
            vocab_size: of the model; None: not compared.

        Raises:
            ModelError: the file is missing, damaged or too large, or does not fit the vocabulary.
        """
        inner = _load(tokenizer_json, special)
        _check_vocabulary(inner, stop, bos, vocab_size, tokenizer_json.parent)
        return Tokenizer(inner, bos=bos, stop=list(stop), chat_template=chat_template, special=dict(special), vocab_size=vocab_size)

    def encode_lines(self, text: str, count: int) -> tuple[list[int], list[int]]:
        """The first tokens of a text, without what the tokenizer puts around it, and the indices of those that begin a line.

        Args:
            text: as `encode` takes it.
            count: tokens, at most.

        Raises:
            InputError: as `encode` does.
            ModelError: as `encode` does.
        """
        encoding = self._encoded(text, bos=False)
        begins = (i for i, (start, end) in enumerate(encoding.offsets[:count]) if end > start and (start == 0 or text[start - 1] == "\n"))
        return encoding.ids[:count], list(begins)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The tokens of a text.

        Args:
            text: special tokens in it are read as such.
            bos: with the tokens that the tokenizer puts around a text (Hugging Face's `add_special_tokens`).

        Raises:
            InputError: the text is not Unicode, or has a token that the model does not have.
            ModelError: the tokenizer is damaged in a way that shows only now.
        """
        return self._encoded(text, bos).ids

    def _encoded(self, text: str, bos: bool) -> tokenizers.Encoding:
        if not _is_unicode(text):
            raise InputError("the text has half a surrogate pair, which is no character: read it as UTF-8")
        with _guarded(IN_USE):
            encoding = self._inner.encode(text, add_special_tokens=bos)
        ids = encoding.ids
        if self.vocab_size is not None and max(ids, default=0) >= self.vocab_size:
            token = next(token for token in ids if token >= self.vocab_size)
            raise InputError(
                f"the text has token {token} ({shown(self._inner.id_to_token(token))}), and the model's vocabulary ends at "
                f"{self.vocab_size - 1}: leave it out of the text, or take the model's own tokenizer"
            )
        return encoding

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of tokens.

        Args:
            ids: tokens that the vocabulary does not have are left out.
            special: with the text of special tokens.

        Raises:
            ModelError: the tokenizer is damaged in a way that shows only now.
        """
        with _guarded(IN_USE):
            return self._inner.decode(list(ids), skip_special_tokens=not special)

    def stream(self) -> TextStream:
        """A decoder for tokens that come one by one."""
        return TextStream(self._inner, self._hidden)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model reads; encode it with `bos=False`, the template writes its own.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: end with the words that begin an answer.

        Raises:
            InputError: the model has no chat template, or the template refuses the messages.
            ModelError: the template is broken.
        """
        from lobit.chat_template import render

        if self.chat_template is None:
            raise InputError("this model has no chat template, it was not trained to chat: give a text to continue (--prompt)")
        return render(self.chat_template, messages, self.special, add_generation_prompt)


class TextStream:
    """Turns tokens into text as they come: the pieces joined are `Tokenizer.decode` of all tokens.

    A piece is given out when no later token can change it: never half a character, and no byte of a run of byte tokens before
    the run ends, because one byte that fits no character makes the whole run unreadable.
    """

    def __init__(self, inner: tokenizers.Tokenizer, hidden: set[int]) -> None:
        self._inner, self._hidden = inner, hidden
        self._window: list[int] = []
        """The last tokens; older ones cannot change what comes."""
        self._given = ""
        """The text of the window's tokens that was given out."""

    def push(self, token: int) -> str:
        """The text that is final now and was not before; often empty."""
        piece = self._inner.id_to_token(token)
        if piece is None or token in self._hidden:
            return ""
        self._window.append(token)
        if BYTE.fullmatch(piece):
            return ""
        text = self._decoded(self._window)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new = text[len(self._given) :]
        kept = self._window[-KEPT:]
        self._given = self._decoded(kept)
        if self._given and text.endswith(self._given):
            self._window = kept
        else:  # the kept tokens begin inside a character, or are only the space that a text never begins with
            self._given = text
        return new

    def finish(self) -> str:
        """What was held back; call it after the last token."""
        text = self._decoded(self._window)[len(self._given) :]
        self._window, self._given = [], ""
        return text

    def _decoded(self, tokens: list[int]) -> str:
        with _guarded(IN_USE):
            return self._inner.decode(tokens)


@contextmanager
def _guarded(what: str) -> Iterator[None]:
    """Turns what a damaged tokenizer.json raises into one message."""
    try:
        yield
    except BaseException as error:  # the library raises bare Exception, and BaseException where its Rust code panics
        if isinstance(error, (ModelError, KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ModelError(f"{what} ({reason(error)}): fetch it again") from None


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text: no half of a surrogate pair."""
    return not SURROGATE.search(text)


def _load(path: Path, special: Mapping[str, str], config: Mapping[str, Any] | None = None) -> tokenizers.Tokenizer:
    """tokenizer.json, without the truncation and padding that it may carry; the named tokens of its vocabulary are special.

    Args:
        path: the file.
        special: the named tokens.
        config: tokenizer_config.json.
    """
    with _guarded(f"{path} is no tokenizer that can be read"), quiet_native():
        text = _whole(path, config or {})
        inner = tokenizers.Tokenizer.from_str(text)
        _check_ids(inner, json.loads(text).get("added_tokens") or [], path)
        inner.no_truncation()
        inner.no_padding()
        added = {entry.content for entry in inner.get_added_tokens_decoder().values()}
        plain = [token for token in special.values() if token not in added and inner.token_to_id(token) is not None]
        inner.add_special_tokens(plain)
        inner.decode(inner.encode("a").ids)  # some damage shows only in use
    return inner


def _whole(path: Path, config: Mapping[str, Any]) -> str:
    """The text of tokenizer.json, with the added tokens that tokenizer_config.json alone knows (transformers adds them too).

    Raises:
        ModelError: it is missing or too large, or an added token is unusable.
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
    return json.dumps({**values, "added_tokens": added}, ensure_ascii=False) if missing else text


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Writes a folder's tokenizer.json to another one, with all added tokens in it, so that a reader of this file alone knows them."""
    path = source / FILE_NAME
    with _guarded(f"{path} is no tokenizer that can be read"):
        text = _whole(path, _read_optional(source / CONFIG_NAME))
    (folder / FILE_NAME).write_text(text, encoding="utf-8", newline="")


def _check_ids(inner: tokenizers.Tokenizer, added: list[dict[str, Any]], path: Path) -> None:
    """One token an id, and added tokens have the file's: the library numbers them itself."""
    ids = list(inner.get_vocab(with_added_tokens=False).values())
    problems = [f"{len(ids)} tokens have {len(set(ids))} ids"] if len(set(ids)) < len(ids) else []
    for entry in added:
        found = inner.token_to_id(entry["content"])
        if found != entry["id"]:
            problems.append(f"{shown(entry['content'])} is token {found}, and {shown(entry['id'])} in the list of added tokens")
    if problems:
        raise ModelError(listed(problems, f"{path} contradicts itself, fetch it again:"))


def _first_added(inner: tokenizers.Tokenizer) -> int | None:
    """The token that the tokenizer puts before a text."""
    encoding = inner.encode("a")
    return encoding.ids[0] if encoding.special_tokens_mask[:1] == [1] else None


def _read_optional(path: Path) -> dict[str, Any]:
    from lobit.checkpoint import read_json  # brings torch, which a bundle's tokenizer does not need

    return read_json(path) if path.is_file() else {}


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens; special_tokens_map.json decides for folders of old (no `added_tokens_decoder`)."""
    values = dict(config)
    if "added_tokens_decoder" not in config:
        values |= _read_optional(folder / "special_tokens_map.json")
    tokens: dict[str, str] = {}
    problems = []
    for name in NAMED:
        value = values.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and _is_unicode(content):
            tokens[name] = content
        elif value is not None:
            problems.append(f"{name} is {shown(value)}: a text, or an object with `content`, is needed")
    if problems:
        raise ModelError(listed(problems, f"{folder / 'tokenizer_config.json'} has {len(problems)} unusable tokens:"))
    return tokens


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or tokenizer_config.json's text, or the one named `default` in its list."""
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
    if template is None or (isinstance(template, str) and _is_unicode(template) and len(template) <= LARGEST_TEMPLATE):
        return template
    told = f"{len(template)} characters" if isinstance(template, str) else type(template).__name__
    raise ModelError(
        f"chat_template in {folder / 'tokenizer_config.json'} is {told}: a text of at most {LARGEST_TEMPLATE} Unicode characters is needed"
    )


STOP_FILES = ("generation_config.json", "config.json")
"""Where stop tokens are declared; the first that has any counts."""
NO_TOKEN = -1
"""What some config.json files say for none."""


def _declared_stops(folder: Path) -> list[int]:
    """`eos_token_id`, one or several, of generation_config.json or else of config.json."""
    for name in STOP_FILES:
        values = _read_optional(folder / name)
        inner = values.get("text_config")
        value = values.get("eos_token_id", inner.get("eos_token_id") if isinstance(inner, dict) else None)
        if value in (None, NO_TOKEN):
            continue
        stops = value if isinstance(value, list) else [value]
        if all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in stops):
            return stops
        raise ModelError(f"eos_token_id in {folder / name} is {shown(value)}: token ids are needed, whole numbers from 0")
    return []


def _check_vocabulary(inner: tokenizers.Tokenizer, stop: Sequence[int], bos: int | None, vocab_size: int | None, folder: Path) -> None:
    """Compares with the model.

    Tokens that were added behind the vocabulary may lie outside it (Gemma 3's image token does), unless they begin or stop a text.
    """
    if vocab_size is None:
        return
    outside = sorted(token for token in stop if token >= vocab_size)
    if outside:
        where = next((name for name in STOP_FILES if (folder / name).is_file() and _is_declared(folder / name, outside[0])), CONFIG_NAME)
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


def _is_declared(path: Path, stop: int) -> bool:
    """Whether a file names a stop token."""
    value = _read_optional(path).get("eos_token_id")
    return stop in value if isinstance(value, list) else value == stop
