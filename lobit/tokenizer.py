"""A model's tokenizer: tokenizer.json read by the `tokenizers` library, and what the files beside it say of special tokens."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from lobit.errors import InputError, shown
from lobit.tokenizer_files import (
    CONFIG_NAME,
    FILE_NAME,
    chat_template_of,
    check_vocabulary,
    declared_stops,
    first_added,
    guarded,
    is_unicode,
    load,
    read_optional,
    special_tokens,
)

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token that stands for one byte in vocabularies with byte fallback."""
IN_USE = "the model's tokenizer.json is damaged, which shows only in use"
KEPT = 8
"""Earlier tokens that a stream decodes together with new ones, so that the spaces between words are right."""


class Tokenizer:
    """Text to tokens and back, as Hugging Face's fast tokenizers do it.

    Attributes:
        bos: the token that `encode` puts before a text; None where it puts none.
        stop: generation ends at any of these.
        chat_template: Jinja source; None where the model has none.
        special: the texts of `bos_token`, `eos_token`, …, which the template may name.
        vocab_size: the size of the model's vocabulary; None: not known.
        size: one more than the largest id that the tokenizer has.
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
            folder: a folder with tokenizer.json; the other files may be absent.
            vocab_size: the size of the model's vocabulary; None: it is not compared.

        Raises:
            ModelError: missing, damaged or too large files, or a tokenizer that does not fit the vocabulary.
        """
        config = read_optional(folder / CONFIG_NAME)
        special = special_tokens(folder, config)
        inner = load(folder / FILE_NAME, special, config)
        template = chat_template_of(folder, config)
        eos = inner.token_to_id(special.get("eos_token", ""))
        stop = sorted({*declared_stops(folder), *([] if eos is None else [eos])})
        bos = first_added(inner)
        check_vocabulary(inner, stop, bos, vocab_size, folder)
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
            vocab_size: the size of the model's vocabulary; None: it is not compared.

        Raises:
            ModelError: the file is missing, damaged or too large, or does not fit the vocabulary.
        """
        inner = load(tokenizer_json, special)
        check_vocabulary(inner, stop, bos, vocab_size, tokenizer_json.parent)
        return Tokenizer(inner, bos=bos, stop=list(stop), chat_template=chat_template, special=dict(special), vocab_size=vocab_size)

    def encode_lines(self, text: str, count: int) -> tuple[list[int], list[int]]:
        """The first tokens of a text, without what the tokenizer puts around it, and the indices of those that begin a line.

        Args:
            text: as `encode` takes it.
            count: how many tokens, at most.

        Raises:
            InputError: as `encode` does.
            ModelError: as `encode` does.
        """
        encoding = self._encoded(text, bos=False)
        begins = (i for i, (start, end) in enumerate(encoding.offsets[:count]) if end > start and (start == 0 or text[start - 1] == "\n"))
        return encoding.ids[:count], list(begins)

    def encode_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a text, without what the tokenizer puts around it, and how many characters of it are read with each.

        Raises:
            InputError: as `encode` does.
            ModelError: as `encode` does.
        """
        encoding = self._encoded(text, bos=False)
        return encoding.ids, list(itertools.accumulate((end for _, end in encoding.offsets), max))

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The tokens of a text.

        Args:
            text: special tokens in it are read as such.
            bos: whether to add the tokens that the tokenizer puts around a text (Hugging Face's `add_special_tokens`).

        Raises:
            InputError: the text is not Unicode, or has a token that the model does not have.
            ModelError: the tokenizer is damaged in a way that shows only now.
        """
        return self._encoded(text, bos).ids

    def _encoded(self, text: str, bos: bool) -> tokenizers.Encoding:
        if not is_unicode(text):
            raise InputError("the text has half a surrogate pair, which is no character: read it as UTF-8")
        with guarded(IN_USE):
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
            special: whether to include the text of special tokens.

        Raises:
            ModelError: the tokenizer is damaged in a way that shows only now.
        """
        with guarded(IN_USE):
            return self._inner.decode(list(ids), skip_special_tokens=not special)

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """A decoder for tokens that come one by one.

        Args:
            after: the tokens of a text that they continue: the space between this and the first new word then stays.
        """
        return TextStream(self._inner, self._hidden, after)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model reads; encode it with `bos=False`, as the template adds special tokens.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: whether to end with the words that begin an answer.

        Raises:
            InputError: the model has no chat template, or the template refuses the messages.
            ModelError: the template is broken.
        """
        from lobit.chat_template import render

        if self.chat_template is None:
            raise InputError("this model has no chat template, it was not trained to chat: give a text to continue (--prompt)")
        return render(self.chat_template, messages, self.special, add_generation_prompt)


class TextStream:
    """Turns tokens into text as they come: the pieces joined are `Tokenizer.decode` of all tokens, less the text that they continue.

    A piece is returned when no later token can change it: never half a character, and no byte of a run of byte tokens before
    the run ends, because one byte that fits no character makes the whole run unreadable.
    """

    def __init__(self, inner: tokenizers.Tokenizer, hidden: set[int], after: Sequence[int] = ()) -> None:
        self._inner, self._hidden = inner, hidden
        self._window: list[int] = []
        """The last tokens; older ones cannot change the text of those to come."""
        for token in after[-KEPT:]:
            # Bytes that follow could make the text of bytes before them unreadable.
            self._window = [] if self._is_byte(token) else [*self._window, *([] if token in hidden else [token])]
        self._given = self._decoded(self._window)
        """The text of the window's tokens that has been returned."""

    def push(self, token: int) -> str:
        """Takes the next token and returns the text that it makes final; often empty."""
        if self._inner.id_to_token(token) is None or token in self._hidden:
            return ""
        self._window.append(token)
        if self._is_byte(token):
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

    def _is_byte(self, token: int) -> bool:
        return BYTE.fullmatch(self._inner.id_to_token(token) or "") is not None

    def finish(self) -> str:
        """Returns the text that was held back; call it after the last token."""
        text = self._decoded(self._window)[len(self._given) :]
        self._window, self._given = [], ""
        return text

    def _decoded(self, tokens: list[int]) -> str:
        with guarded(IN_USE):
            return self._inner.decode(tokens)
