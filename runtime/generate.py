"""Generation: chooses tokens one by one from an engine's logits, and holds conversations that stay in its cache."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from lobit.errors import BundleError, InputError
from lobit.runtime.engine import Engine, Logits, check_tokens


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits: as transformers' `generate` does it, in this order."""

    repetition_penalty: float = 1.0
    """Logits of tokens that were read or given out before are divided by it, or multiplied where they are negative; 1: no penalty."""
    temperature: float = 0.0
    """0: the likeliest token, the lowest id of equal ones; else logits are divided by it."""
    top_k: int = 0
    """Only this many of the likeliest tokens are drawn from, and any that is as likely as the last of them; 0: all tokens."""
    top_p: float = 1.0
    """Of these, only the fewest likeliest tokens whose probabilities together reach this share are drawn from."""
    seed: int = 0
    """The same seed, prompt and engine give the same tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}: give 0 for the likeliest token, or a positive number")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}: give a share above 0 and at most 1")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}: give a number of tokens, or 0 for all")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty is {self.repetition_penalty}: give 1 for none, or more, such as 1.1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}: give a whole number from 0")


GREEDY = Sampling()


class Sampler:
    """Chooses tokens, one after the other, from one stream of random numbers."""

    def __init__(self, sampling: Sampling = GREEDY) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: Logits, seen: Collection[int] = ()) -> int:
        """Chooses a token.

        Args:
            logits: [V], one for every token of the vocabulary.
            seen: tokens that were read or given out before.

        Raises:
            BundleError: the logits are not finite.
        """
        logits = self._penalized(logits, seen)
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise BundleError(f"the logits are not finite (token {best}: {logits[best]}): check the bundle with `lobit parity`")
        temperature, top_p = self.sampling.temperature, self.sampling.top_p
        if temperature == 0:
            return best
        with np.errstate(over="ignore"):
            weights = np.exp((logits.astype(np.float64) - float(logits[best])) / temperature)
        share = weights / weights.sum()
        tokens = np.arange(len(share))
        if 0 < self.sampling.top_k < len(share):
            share = np.where(share < np.partition(share, -self.sampling.top_k)[-self.sampling.top_k], 0.0, share)
            share, tokens = share / share.sum(), np.flatnonzero(share)
        if top_p < 1:
            # Tokens below this bound together have less than 1 - top_p, so the nucleus is among the others: few are left to sort.
            tokens = np.flatnonzero(share >= (1 - top_p) / len(share))
            tokens = tokens[np.argsort(-share[tokens], kind="stable")]
            reached = np.cumsum(share[tokens])
            tokens = tokens[: int(np.searchsorted(reached, top_p)) + 1]
        sums = np.cumsum(share[tokens])
        return int(tokens[min(int(np.searchsorted(sums, self._random.random() * sums[-1], side="right")), len(tokens) - 1)])

    def _penalized(self, logits: Logits, seen: Collection[int]) -> Logits:
        penalty = self.sampling.repetition_penalty
        if penalty == 1 or not seen:
            return logits
        tokens, changed = list(seen), logits.copy()
        changed[tokens] = np.where(logits[tokens] < 0, logits[tokens] * penalty, logits[tokens] / penalty)
        return changed


@dataclass
class GenerationStats:
    """Counts and times of a generation so far; the time that its consumer spends between tokens is not counted."""

    prompt_tokens: int = 0
    """Tokens read by prefill."""
    new_tokens: int = 0
    """Tokens given out, without the stop token."""
    prefill_seconds: float = 0.0
    first_token_seconds: float = 0.0
    """From the start of prefill until the first token was chosen."""
    decode_steps: int = 0
    decode_seconds: float = 0.0
    """Time of all decode steps, each of which reads a token and chooses the next."""
    stopped: bool = False
    """Whether the model ended the generation with a stop token; if not, a limit ended it, or it is not over."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """0 where nothing was timed."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """0 where nothing was timed."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0


class Generation(Iterator[int]):
    """An iterator over new tokens, each computed when it is asked for; `generate` makes it.

    Attributes:
        tokens: the tokens given out so far.
        stats: counts and times so far.
    """

    def __init__(
        self,
        engine: Engine,
        prompt_tokens: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop: Collection[int],
        seen: Iterable[int] = (),
    ) -> None:
        self.tokens: list[int] = []
        self.stats = GenerationStats()
        self._engine, self._prompt, self._stop = engine, list(prompt_tokens), frozenset(stop)
        self._left = max_new_tokens
        self._seen = {*seen, *prompt_tokens}
        self._sampler = Sampler(sampling)

    def __next__(self) -> int:
        if self._left == 0 or (self.tokens and self._engine.position >= self._engine.context):
            raise StopIteration
        token = self._following(self.tokens[-1]) if self.tokens else self._first()
        if token in self._stop:
            self._left, self.stats.stopped = 0, True
            raise StopIteration
        self.tokens.append(token)
        self._seen.add(token)
        self._left -= 1
        self.stats.new_tokens += 1
        return token

    def _first(self) -> int:
        start = perf_counter()
        logits = self._engine.prefill(self._prompt)
        self.stats.prefill_seconds = perf_counter() - start
        token = self._sampler.choose(logits, self._seen)
        self.stats.first_token_seconds = perf_counter() - start
        self.stats.prompt_tokens = len(self._prompt)
        return token

    def _following(self, last: int) -> int:
        start = perf_counter()
        token = self._sampler.choose(self._engine.decode(last), self._seen)
        self.stats.decode_seconds += perf_counter() - start
        self.stats.decode_steps += 1
        return token


def generate(
    engine: Engine,
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Collection[int] = (),
    seen: Iterable[int] = (),
) -> Generation:
    """Continues a prompt, after what the engine has already read.

    The generation ends at a stop token, which is not given out, after `max_new_tokens`, or where the context is full. The engine
    does not read the last token.

    Args:
        engine: its cache holds the prompt and the new tokens afterwards.
        prompt_tokens: at least one.
        max_new_tokens: at least one.
        sampling: how tokens are chosen.
        stop: tokens that end it.
        seen: tokens that the engine has read before.

    Raises:
        InputError: an argument is out of its range, or the prompt does not fit the engine.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}: give at least 1")
    check_tokens(engine, prompt_tokens)
    return Generation(engine, prompt_tokens, max_new_tokens, sampling, stop, seen)


class TextStream(Protocol):
    """The methods of `lobit.tokenizer.TextStream` that generation uses."""

    def push(self, token: int) -> str: ...
    def finish(self) -> str: ...


class ChatTokenizer(Protocol):
    """What a conversation needs of `lobit.tokenizer.Tokenizer`."""

    stop: list[int]

    def encode(self, text: str, bos: bool = True) -> list[int]: ...
    def stream(self) -> TextStream: ...
    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str: ...


def text_pieces(tokens: Iterable[int], stream: TextStream) -> Iterator[str]:
    """Yields the text of tokens in pieces, each as soon as it is final and never empty."""
    for token in tokens:
        if piece := stream.push(token):
            yield piece
    if rest := stream.finish():
        yield rest


class Chat:
    """A conversation that stays in the engine's cache: a turn reads only what is new in the rendered conversation.

    The tokens that were read may differ from the rendered conversation's: a template may rewrite old turns, and the tokenizer may
    split an answer into other tokens. The engine is then rewound to the first difference, or reset where it cannot be rewound.

    Attributes:
        messages: the conversation; an answer that was cut short is in it as far as it came.
        stats: counts and times of the last turn.
    """

    def __init__(self, engine: Engine, tokenizer: ChatTokenizer, system: str | None = None) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.stats = GenerationStats()
        self._read: list[int] = []

    def reset(self) -> None:
        """Begins a new conversation with the same system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self._forget()

    def say(self, text: str, *, max_new_tokens: int, sampling: Sampling = GREEDY) -> Iterator[str]:
        """Takes one turn of the user's, and yields the pieces of the answer as they become final.

        A turn that fails leaves the conversation as it was. After an interrupted turn it has the answer as far as it came.

        Raises:
            InputError: the conversation is longer than the context, or the template refuses it.
            ModelError: the template is broken.
        """
        turn = {"role": "user", "content": text}
        tokens = self.tokenizer.encode(self.tokenizer.render_chat([*self.messages, turn]), bos=False)
        context = self.engine.context
        if len(tokens) > context:
            raise InputError(
                f"the conversation has {len(tokens)} tokens, more than the context of {context}: begin a new one, "
                "or export with a larger --context"
            )
        known = self._reusable(tokens)
        generation = generate(
            self.engine, tokens[known:], max_new_tokens=max_new_tokens, sampling=sampling, stop=self.tokenizer.stop, seen=tokens[:known]
        )
        self.stats = generation.stats
        return self._answer(turn, tokens, generation)

    def _answer(self, turn: dict[str, str], tokens: list[int], generation: Generation) -> Iterator[str]:
        pieces: list[str] = []
        try:
            for piece in text_pieces(generation, self.tokenizer.stream()):
                pieces.append(piece)
                yield piece
        except GeneratorExit:
            self._keep(turn, pieces, tokens + generation.tokens)
            raise
        except BaseException as error:  # the engine may have been stopped between two of its states
            if pieces and isinstance(error, KeyboardInterrupt):
                self._keep(turn, pieces, [])
            self._forget()
            raise
        self._keep(turn, pieces, tokens + generation.tokens)

    def _reusable(self, tokens: list[int]) -> int:
        """Rewinds the engine to the first token that differs from `tokens`, or resets it; returns how many of `tokens` it has read."""
        read, last = self._read, len(tokens) - 1  # at least one token must be read anew, for its logits
        same = next((i for i, (old, new) in enumerate(zip(read, tokens[:last], strict=False)) if old != new), min(len(read), last))
        if self.engine.position == len(read) and self.engine.rewind(same):
            return same
        self._forget()
        return 0

    def _forget(self) -> None:
        self._read = []
        self.engine.reset()

    def _keep(self, turn: dict[str, str], pieces: list[str], tokens: list[int]) -> None:
        self.messages += [turn, {"role": "assistant", "content": "".join(pieces)}]
        self._read = tokens[: self.engine.position]
