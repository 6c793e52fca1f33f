"""A conversation on the real runtime: turns stay in the cache; the template is the bundle's."""

import io
import json
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from lobit import cli, verbs
from lobit.errors import InputError
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import open_engine
from lobit.runtime.generate import generate
from lobit.runtime.manifest import sealed
from lobit.verbs.talk import bundle_tokenizer

Lobit = Callable[..., Any]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture
def talking(bundles: Any, tmp_path: Path) -> Path:
    """stories260k's bundle with a chat template."""
    folder = tmp_path / "talking"
    shutil.copytree(bundles("stories260k", "fp"), folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokens"]["chat_template"] = TEMPLATE
    (folder / "manifest.json").write_text(sealed(manifest))
    return folder


def test_the_second_turn_continues_the_first(talking: Path) -> None:
    pieces: list[str] = []
    turns: list[dict[str, Any]] = []
    verbs.chat(talking, ["Lily had a cat.", "The cat was"], pieces.append, max_new_tokens=12, on_turn=turns.append)
    first, second = "".join(pieces).split("\n")[0], "".join(pieces)
    bundle = open_bundle(talking)
    tokenizer, engine = bundle_tokenizer(bundle), open_engine(bundle)
    whole = f"Lily had a cat.\n{first}\nThe cat was\n"
    expected = list(generate(engine, tokenizer.encode(whole, bos=False), max_new_tokens=12, stop=tokenizer.stop))
    assert tokenizer.decode(expected).strip() in second
    assert len(turns) == 2 and turns[0]["new_tokens"] > 0


def test_the_command_reads_turns_from_standard_input(
    talking: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lobit", "run", str(talking), "--max-new-tokens", "5"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Lily had a cat.\n\n"))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    shown = capsys.readouterr()
    assert shown.out.strip() and "t/s" in shown.err


def spoken(talking: Path, lines: Iterable[str], on_text: Callable[[str], None], **options: Any) -> list[BaseException]:
    """Talks, and gives what ended turns early."""
    problems: list[BaseException] = []
    verbs.chat(talking, lines, on_text, max_new_tokens=12, on_problem=problems.append, **options)
    return problems


def test_ctrl_c_stops_an_answer_and_not_the_chat(talking: Path) -> None:
    pieces: list[str] = []

    def interrupted(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    turns: list[dict[str, Any]] = []
    problems = spoken(talking, ["Lily had a cat.", "The cat was"], interrupted, on_turn=turns.append)
    assert [type(problem) for problem in problems] == [KeyboardInterrupt]
    assert pieces[3] == "\n" and len(pieces) > 5, "the second turn is answered"
    assert len(turns) == 1


def test_an_end_that_the_system_wants_ends_the_chat(talking: Path) -> None:
    def terminated(piece: str) -> None:
        raise KeyboardInterrupt(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        spoken(talking, ["Lily had a cat.", "The cat was"], terminated)


def test_a_conversation_that_is_too_long_is_told_and_can_begin_anew(talking: Path) -> None:
    pieces: list[str] = []
    problems = spoken(talking, ["cat " * 400, "/reset", "Lily had a cat."], pieces.append)
    assert len(problems) == 1
    assert re.match(r"the conversation has \d+ tokens, more than the context of 192: begin a new one", str(problems[0]))
    assert "".join(pieces).strip()


def test_a_new_conversation_knows_nothing_of_the_one_before(talking: Path) -> None:
    turns: list[dict[str, Any]] = []
    verbs.chat(talking, ["Lily had a cat.", "/reset", "Lily had a cat."], print, max_new_tokens=9, on_turn=turns.append)
    assert turns[0]["prompt_tokens"] == turns[1]["prompt_tokens"]


def test_typed_turns_have_a_prompt_and_an_interrupted_line_is_asked_again(
    talking: Path, monkeypatch: pytest.MonkeyPatch, lobit: Lobit
) -> None:
    asked = iter([KeyboardInterrupt(), "Lily had a cat.", EOFError()])

    def typed(prompt: str) -> str:
        assert prompt == "> "
        line = next(asked)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    answer = lobit("run", talking, "--max-new-tokens", 5)
    assert answer.code == 0
    assert answer.out.strip()
    assert re.match(r"talking, loaded in .* s\. Ctrl-C stops an answer, /reset begins anew, Ctrl-D ends\nprefill ", answer.err)


def test_a_prompt_is_answered_by_the_template_and_continued_raw(talking: Path, lobit: Lobit) -> None:
    command = ["run", talking, "--prompt", "Lily had a cat.", "--max-new-tokens", 12]
    answered, raw = (lobit(*command, "--json", *options).json for options in ([], ["--raw"]))
    bundle = open_bundle(talking)
    tokenizer = bundle_tokenizer(bundle)
    for result, tokens in ((answered, tokenizer.encode("Lily had a cat.\n", bos=False)), (raw, tokenizer.encode("Lily had a cat."))):
        assert result["tokens"] == list(generate(open_engine(bundle), tokens, max_new_tokens=12, stop=tokenizer.stop))
        assert result["stats"]["prompt_tokens"] == len(tokens)
    assert (answered["chat"], raw["chat"]) == (True, False)
    assert not lobit(*command).out.startswith("Lily had a cat."), "an answer does not repeat the question"
    assert lobit(*command, "--raw").out == f"Lily had a cat.{raw['text']}\n"


def test_a_system_message_begins_the_conversation(talking: Path, lobit: Lobit) -> None:
    command = ["run", talking, "--prompt", "Lily had a cat.", "--system", "Tell of a dog.", "--max-new-tokens", 12]
    tokenizer = bundle_tokenizer(open_bundle(talking))
    messages = [{"role": "system", "content": "Tell of a dog."}, {"role": "user", "content": "Lily had a cat."}]
    result = lobit(*command, "--json").json
    assert result["stats"]["prompt_tokens"] == len(tokenizer.encode(tokenizer.render_chat(messages), bos=False))
    refused = lobit(*command, "--raw")
    assert refused.code == 2
    assert "a system message is for a chat" in refused.err


@pytest.mark.parametrize("option", ["--raw", "--json"])
def test_what_is_for_one_text_needs_a_prompt(option: str, talking: Path, lobit: Lobit) -> None:
    answer = lobit("run", talking, option)
    assert answer.code == 2
    assert answer.err == "lobit: --raw and --json are for one text: give it with --prompt\n"


def test_a_model_without_a_template_says_how_to_use_it(bundles: Any) -> None:
    with pytest.raises(InputError, match="--prompt"):
        verbs.chat(bundles("stories260k", "fp"), ["hello"], print)
