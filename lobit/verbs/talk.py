"""Run and chat: text from a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobit.errors import BundleError, InputError

if TYPE_CHECKING:
    from lobit.runtime.bundle import Bundle
    from lobit.runtime.generate import GenerationStats
    from lobit.tokenizer import Tokenizer


def bundle_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer in a bundle.

    Raises:
        BundleError: it has none.
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
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
    on_text: Callable[[str], None] | None = None,
    echo: bool = False,
) -> dict[str, Any]:
    """Continues a prompt.

    Args:
        bundle: the bundle's folder.
        prompt: the text.
        max_new_tokens: at most.
        temperature: 0: the most probable token each time.
        seed: of the sampling.
        threads: of the runtime.
        on_text: called with each piece of text as it becomes final.
        echo: begin with the prompt, once it is known that it can be continued.

    Returns:
        `{"prompt", "text", "tokens", "stats"}`.
    """
    from lobit.runtime.bundle import open_bundle
    from lobit.runtime.engine import open_engine
    from lobit.runtime.generate import generate, text_pieces

    opened = open_bundle(bundle)
    tokenizer, engine = bundle_tokenizer(opened), open_engine(opened, threads)
    generation = generate(
        engine,
        tokenizer.encode(prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop=tokenizer.stop,
    )
    if echo and on_text:
        on_text(prompt)
    pieces = []
    for piece in text_pieces(generation, tokenizer.stream()):
        pieces.append(piece)
        if on_text:
            on_text(piece)
    return {"prompt": prompt, "text": "".join(pieces), "tokens": generation.tokens, "stats": _speed(generation.stats)}


def _speed(stats: GenerationStats) -> dict[str, Any]:
    """Counts, seconds and tokens per second."""
    import dataclasses

    rates = ("prefill_tokens_per_second", "decode_tokens_per_second")
    return dataclasses.asdict(stats) | {name: getattr(stats, name) for name in rates}


def chat(
    bundle: Path,
    lines: Iterable[str],
    on_text: Callable[[str], None],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
    on_turn: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """A conversation: a line is a turn of the user's; the answer comes in pieces.

    Args:
        bundle: the bundle's folder; its tokenizer must have a chat template.
        lines: the user's turns.
        on_text: called with each piece of an answer, and with a line break after it.
        max_new_tokens: of an answer, at most.
        temperature: 0: the most probable token each time.
        seed: of the sampling.
        threads: of the runtime.
        on_turn: called with the counts and speed of each turn.

    Raises:
        InputError: the model has no chat template.
    """
    from lobit.runtime.bundle import open_bundle
    from lobit.runtime.engine import open_engine
    from lobit.runtime.generate import Chat, Sampling

    opened = open_bundle(bundle)
    tokenizer = bundle_tokenizer(opened)
    if tokenizer.chat_template is None:
        raise InputError(f"{bundle} has no chat template, its model continues text: give one with --prompt")
    conversation = Chat(open_engine(opened, threads), tokenizer)
    for line in lines:
        if line.strip():
            for piece in conversation.say(line.strip(), max_new_tokens=max_new_tokens, sampling=Sampling(temperature, seed=seed)):
                on_text(piece)
            on_text("\n")
            if on_turn:
                on_turn(_speed(conversation.stats))
