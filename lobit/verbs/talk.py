"""Run and chat: text from a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobit.errors import BundleError, InputError
from lobit.targets import THIS_MACHINE, Device, says_nothing_of_time

if TYPE_CHECKING:
    from lobit.runtime.bundle import Bundle
    from lobit.runtime.engine import Engine
    from lobit.runtime.generate import GenerationStats, Sampling
    from lobit.tokenizer import Tokenizer

ANSWER = 512
"""Most tokens of an answer by default: models mostly end their answers before that."""
CONTINUATION = 128
"""Most tokens of a continued text by default: it may go on for ever."""
RESET = "/reset"


def bundle_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer in a bundle.

    Raises:
        BundleError: the bundle has none.
    """
    from lobit.tokenizer import Tokenizer

    if not any(entry.role == "tokenizer" for entry in bundle.manifest.files):
        raise BundleError(f"bundle {bundle.folder} has no tokenizer: put tokenizer.json into the model's folder and export again")
    tokens = bundle.manifest.tokens
    return Tokenizer.from_file(
        bundle.path("tokenizer"),
        bos=tokens.bos,
        stop=tokens.stop,
        chat_template=tokens.chat_template,
        special=tokens.special,
        vocab_size=bundle.manifest.model.vocab_size,
    )


def run(
    bundle: Path,
    prompt: str,
    *,
    raw: bool = False,
    system: str | None = None,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    threads: int | None = None,
    device: Device = THIS_MACHINE,
    on_text: Callable[[str], None] | None = None,
    echo: bool = False,
) -> dict[str, Any]:
    """Answers a prompt where the model has a chat template, and continues it where the model has none.

    Args:
        bundle: the bundle's folder.
        prompt: the text.
        raw: whether to continue the prompt as it is, also where the model has a chat template.
        system: the system message before the prompt; None: no message.
        max_new_tokens: how many to generate, at most; None: `ANSWER` or `CONTINUATION`.
        sampling: how tokens are chosen; None: the most probable one each time.
        threads: how many the runtime uses; None: as the bundle says.
        device: where to run it.
        on_text: called with each piece of text as it becomes final.
        echo: whether `on_text` gets a prompt that is continued before the rest, once the prompt is known to fit.

    Returns:
        `{"prompt", "chat", "text", "tokens", "stats"}`; `chat` is true where the prompt was a turn of a conversation.

    Raises:
        InputError: the prompt does not fit the context, the template refuses it, or a system message is given where there is no chat.
    """
    from lobit.runtime.bundle import open_bundle
    from lobit.runtime.generate import GREEDY, generate, text_pieces

    opened = open_bundle(bundle)
    tokenizer = bundle_tokenizer(opened)
    chats = tokenizer.chat_template is not None and not raw
    if system is not None and not chats:
        raise InputError("a system message is for a chat: leave --raw and --system out, or take a model with a chat template")
    turn = [*_told(system), {"role": "user", "content": prompt}]
    tokens = tokenizer.encode(tokenizer.render_chat(turn), bos=False) if chats else tokenizer.encode(prompt)
    engine, seconds = _loaded(opened, threads, device)
    generation = generate(
        engine,
        tokens,
        max_new_tokens=max_new_tokens or (ANSWER if chats else CONTINUATION),
        sampling=sampling or GREEDY,
        stop=tokenizer.stop,
    )
    if echo and on_text and not chats:
        on_text(prompt)
    pieces = []
    for piece in text_pieces(generation, tokenizer.stream(() if chats else tokens)):
        pieces.append(piece)
        if on_text:
            on_text(piece)
    stats = {"load_seconds": seconds, **_speed(generation.stats, opened, device)}
    return {"prompt": prompt, "chat": chats, "text": "".join(pieces), "tokens": generation.tokens, "stats": stats}


def _told(system: str | None) -> list[dict[str, str]]:
    """The messages that a conversation begins with: the system message, if there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


def _loaded(bundle: Bundle, threads: int | None, device: Device) -> tuple[Engine, float]:
    """The engine, and the seconds that it took to load, without the time to import its Python modules."""
    from time import perf_counter

    from lobit.runtime.engine import import_runtime, open_engine

    import_runtime(bundle, device)
    start = perf_counter()
    return open_engine(bundle, threads, device), perf_counter() - start


def _speed(stats: GenerationStats, bundle: Bundle, device: Device) -> dict[str, Any]:
    """The counts, seconds and tokens per second of a generation; `emulated`: whether these say nothing of a device."""
    import dataclasses

    rates = ("prefill_tokens_per_second", "decode_tokens_per_second")
    emulated = says_nothing_of_time(bundle.manifest.target, device)
    return dataclasses.asdict(stats) | {name: getattr(stats, name) for name in rates} | {"emulated": emulated}


def chat(
    bundle: Path,
    lines: Iterable[str],
    on_text: Callable[[str], None],
    *,
    system: str | None = None,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    threads: int | None = None,
    device: Device = THIS_MACHINE,
    on_load: Callable[[float], None] | None = None,
    on_turn: Callable[[dict[str, Any]], None] | None = None,
    on_problem: Callable[[BaseException], None] | None = None,
) -> None:
    """Holds a conversation: a line is a turn of the user, or `/reset`, which begins a new one; the answer comes in pieces.

    Args:
        bundle: the bundle's folder; its tokenizer must have a chat template.
        lines: the user's turns.
        on_text: called with each piece of an answer, and with a line break after it.
        system: the system message of every conversation; None: no message.
        max_new_tokens: how many an answer has, at most; None: `ANSWER`.
        sampling: how tokens are chosen; None: the most probable one each time.
        threads: how many the runtime uses; None: as the bundle says.
        device: where to run it.
        on_load: called with the seconds that loading took, before the first line is asked for.
        on_turn: called with the counts and speed of each turn.
        on_problem: called with what ends a turn before its answer is whole, Ctrl-C or a conversation that is too long; the next line
            is asked for. None: the exception is raised.

    Raises:
        InputError: the model has no chat template.
    """
    from lobit.runtime.bundle import open_bundle
    from lobit.runtime.generate import GREEDY, Chat

    opened = open_bundle(bundle)
    tokenizer = bundle_tokenizer(opened)
    if tokenizer.chat_template is None:
        raise InputError(f"{bundle} has no chat template, its model continues text: give one with --prompt")
    engine, seconds = _loaded(opened, threads, device)
    conversation = Chat(engine, tokenizer, system)
    if on_load:
        on_load(seconds)
    for line in map(str.strip, lines):
        if line == RESET:
            conversation.reset()
        elif line:
            try:
                for piece in conversation.say(line, max_new_tokens=max_new_tokens or ANSWER, sampling=sampling or GREEDY):
                    on_text(piece)
            except (KeyboardInterrupt, InputError) as error:
                if on_problem is None or (isinstance(error, KeyboardInterrupt) and error.args):  # one from SIGTERM has the signal's number
                    raise
                on_text("\n")
                on_problem(error)
                continue
            on_text("\n")
            if on_turn:
                on_turn(_speed(conversation.stats, opened, device))
