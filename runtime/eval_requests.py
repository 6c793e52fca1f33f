"""Texts of an evaluation as tokens: whose likelihood is asked, given which, as lm-evaluation-harness counts it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lobit.errors import InputError
from lobit.runtime.eval_tasks import Item, Task

if TYPE_CHECKING:
    from lobit.tokenizer import Tokenizer


@dataclass(frozen=True)
class Asked:
    """The likelihood of the last `count` of some tokens, each given all before it.

    Attributes:
        tokens: the given ones and the asked ones.
        count: how many are asked.
        cut: how many tokens at the beginning were left out, because they did not fit.
    """

    tokens: tuple[int, ...]
    count: int
    cut: int = 0

    @property
    def context(self) -> tuple[int, ...]:
        """The tokens that are given, at least one."""
        return self.tokens[: -self.count]

    @property
    def continuation(self) -> tuple[int, ...]:
        """The tokens whose likelihood is asked, at least one."""
        return self.tokens[-self.count :]


class Encoder:
    """Makes tokens of texts as lm-evaluation-harness's backend for Hugging Face models does.

    A context and what follows are encoded together, then cut where the context alone would end. Spaces at the end of a context count to
    what follows. The tokenizer adds the tokens that it puts around a text, bos as a rule. An empty context is bos, or eos where the
    tokenizer has none.

    Args:
        tokenizer: the model's.
        context: the most tokens that a model reads; longer texts lose their beginning.
    """

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context
        self.prefix = prefix_of(tokenizer)
        self._prefix_text = "" if self.prefix is None else tokenizer.decode([self.prefix], special=True)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; a text that begins with bos gets none put before it."""
        return self.tokenizer.encode(text, bos=not (self._prefix_text and text.startswith(self._prefix_text)))

    def pair(self, context: str, continuation: str) -> Asked:
        """A context and what follows it.

        Raises:
            InputError: what follows has no token, or more than fit.
        """
        if not context:
            asked = self.tokenizer.encode(continuation, bos=False)
            begin = self._begin()
            return self.asked([begin], asked[1:] if asked[:1] == [begin] else asked)
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        given = self.encode(context)
        return self.asked(given or [self._begin()], self.encode(context + continuation)[len(given) :])

    def _begin(self) -> int:
        if self.prefix is None:
            raise InputError("the tokenizer has neither bos nor eos to stand for an empty context: give a context")
        return self.prefix

    def asked(self, given: list[int], asked: list[int]) -> Asked:
        """What follows some tokens, which lose their beginning where all do not fit.

        Raises:
            InputError: nothing follows, or more than fits.
        """
        if not asked:
            raise InputError("no token is left whose likelihood could be asked: give a longer text")
        if len(asked) > self.context:
            more = f"{len(asked)} tokens are more than the context of {self.context}"
            raise InputError(f"{more}: shorten it, or export with a larger --context")
        whole = given + asked
        cut = max(0, len(whole) - self.context - 1)
        return Asked(tuple(whole[cut:]), len(asked), cut)

    def rolling(self, tokens: Sequence[int]) -> Iterator[Asked]:
        """Windows of the context's length over a text, in which each token is asked once, with as many before it as its window has."""
        all_tokens = [self._begin(), *tokens]
        for start in range(0, len(tokens), self.context):
            end = min(start + self.context, len(tokens))
            window = all_tokens[max(end - self.context, 0) : end + 1]
            yield Asked(tuple(window), end - start)


def prefix_of(tokenizer: Tokenizer) -> int | None:
    """The token that stands for an empty context: bos, or else eos; None where the tokenizer has neither."""
    for name in ("bos_token", "eos_token"):
        text = tokenizer.special.get(name)
        found = tokenizer.encode(text, bos=False) if text else []
        if len(found) == 1:
            return found[0]
    return tokenizer.bos if tokenizer.bos is not None else next(iter(tokenizer.stop), None)


@dataclass(frozen=True)
class Query:
    """An item as tokens.

    Attributes:
        asked: one for each choice; then, where the task asks for it, one for each choice without the question.
    """

    asked: tuple[Asked, ...]

    @property
    def is_cut(self) -> bool:
        """Whether some context lost its beginning."""
        return any(one.cut for one in self.asked)


def queries(task: Task, encoder: Encoder) -> list[Query]:
    """The items of a task as tokens.

    Raises:
        InputError: one does not fit; the message has its line.
    """
    return [_query(task, item, encoder) for item in task.items]


def _query(task: Task, item: Item, encoder: Encoder) -> Query:
    prompts = [task.examples + item.prompt, *([] if task.without_context is None else [task.without_context])]
    texts = [(prompt, task.delimiter + choice) for prompt in prompts for choice in item.choices]
    asked = []
    for number, (prompt, choice) in enumerate(texts):
        try:
            asked.append(encoder.pair(prompt, choice))
        except InputError as error:
            what = f"choice {number % len(item.choices)}" if task.is_choice else "continuation"
            raise InputError(f"{task.path} line {item.line}, {what}: {error}") from None
    return Query(tuple(asked))


def beginning_of(task: Task, encoder: Encoder) -> tuple[int, ...]:
    """The tokens of a task's examples, with which every context that was not cut begins; empty: it has none.

    Space at their end is left out: many tokenizers split it otherwise where a question follows.
    """
    return tuple(encoder.encode(task.examples.rstrip())) if task.examples else ()
