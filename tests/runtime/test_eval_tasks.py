"""Task files: what is read of them, and one message with file and line for what is not as it should be."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobit.errors import InputError
from lobit.runtime import eval_tasks
from lobit.runtime.eval_tasks import Task, read_task

GOOD = {"query": "The sun is", "choices": ["hot", "cold"], "gold": 0}
FIELDS = ("query", "choices", "gold", "context", "continuation", *eval_tasks.SETTINGS)
WORDS = {"context": "Once upon a", "continuation": "time"}


def written(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def task(folder: Path, *lines: Any) -> Task:
    return read_task(written(folder / "task.jsonl", *lines))


def test_questions_and_last_words_are_told_apart(tmp_path: Path) -> None:
    questions, words = task(tmp_path, GOOD, "", GOOD | {"gold": 1}), task(tmp_path, WORDS)
    assert [(item.line, item.gold, item.choices) for item in questions.items] == [(1, 0, ("hot", "cold")), (3, 1, ("hot", "cold"))]
    assert questions.is_choice and not words.is_choice
    assert [(item.prompt, item.choices) for item in words.items] == [("Once upon a", ("time",))]
    assert questions.name == "task" and questions.delimiter == " " and questions.without_context is None


@pytest.mark.parametrize(
    ("settings", "query", "prompt"),
    [
        ({}, "Question: why?\n", "Question: why?\nAnswer:"),
        ({}, "Why?", "Why?"),
        ({"cue": " =>"}, "Question: why?", "Question: why? =>"),
        ({"cue": ""}, "Question: why?", "Question: why?"),
    ],
)
def test_a_question_is_followed_by_a_cue(settings: dict[str, str], query: str, prompt: str, tmp_path: Path) -> None:
    lines = [settings] if settings else []
    assert task(tmp_path, *lines, GOOD | {"query": query}).items[0].prompt == prompt


def test_the_first_line_may_be_settings(tmp_path: Path) -> None:
    found = task(tmp_path, {"name": "suns", "delimiter": "", "without_context": "Answer:"}, GOOD)
    assert (found.name, found.delimiter, found.without_context, len(found.items)) == ("suns", "", "Answer:", 1)


def test_shots_are_the_first_items_and_are_not_asked(tmp_path: Path) -> None:
    found = task(tmp_path, GOOD, GOOD | {"query": "Snow is", "gold": 1}, GOOD, GOOD).with_shots(2).first(1)
    assert found.examples == "The sun is hot\n\nSnow is cold\n\n"
    assert [item.line for item in found.items] == [3]
    with pytest.raises(InputError, match=r"has 1 items, and 1 of them would be examples"):
        task(tmp_path, GOOD).with_shots(1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"query": "Why?", "gold": 0}, "choices missing: an item has query, choices, gold"),
        ({"context": "Once"}, "continuation missing"),
        ({"text": "Once"}, "neither query nor context is there, and 'text' is no setting"),
        (GOOD | {"choices": []}, "0 choices: give a list of 2"),
        (GOOD | {"choices": ["hot"]}, "1 choices: give a list of 2"),
        (GOOD | {"choices": "hot"}, "choices 'hot': give a list"),
        (GOOD | {"choices": ["hot", 3]}, "choice 1 is 3: give a text"),
        (GOOD | {"choices": ["hot", " "]}, "choice 1 is empty"),
        (GOOD | {"gold": 2}, "gold is 2: give the index of the right one of 2 choices"),
        (GOOD | {"gold": -1}, "gold is -1"),
        (GOOD | {"gold": True}, "gold is True"),
        (GOOD | {"gold": "hot"}, "gold is 'hot'"),
        (GOOD | {"query": " \n"}, "query is empty"),
        (GOOD | {"query": 5}, "query is 5: give a text"),
        (WORDS | {"continuation": ""}, "continuation is empty"),
        ('{"query": "\\ud800", "choices": ["a", "b"], "gold": 0}', "half a surrogate pair"),
        ("[1, 2]", r"\[1, 2\] is no object"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_number(line: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"(?s)task\.jsonl is no task to evaluate:.*line 1: .*{said}"):
        task(tmp_path, line)


def test_all_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)line 2: gold is 7.*line 3: the lines before have the other fields"):
        task(tmp_path, GOOD, GOOD | {"gold": 7}, WORDS)


@pytest.mark.parametrize("text", ["", "\n\n", '{"name": "only settings"}\n'])
def test_a_file_without_items_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no items"):
        task(tmp_path, text)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_refused_by_line(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(json.dumps(GOOD | {"query": "Où est la mer ?"}, ensure_ascii=False).encode(encoding))
    with pytest.raises(InputError, match=r"line 1: not UTF-8 text \(byte \d+ of the line\)"):
        read_task(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=6),
    max_leaves=12,
)


@given(st.lists(st.one_of(JSON, st.dictionaries(st.sampled_from(FIELDS), JSON)), max_size=4))
def test_whatever_json_is_there_is_read_or_refused_in_one_message(lines: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "task.jsonl", *lines)
        with contextlib.suppress(InputError):
            assert all(0 <= item.gold < len(item.choices) and item.prompt for item in read_task(path).items)


def test_a_name_is_shown_without_control_characters(tmp_path: Path) -> None:
    assert task(tmp_path, {"name": "a\n\x1b[31mb"}, GOOD).name == r"a\n\x1b[31mb"


def test_a_byte_order_mark_and_windows_line_ends_are_read_over(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps(GOOD).encode() + b"\r\n")
    assert len(read_task(path).items) == 2


def test_a_huge_line_and_a_huge_file_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"task\.jsonl line 2 has more than 1048576 bytes"):
        task(tmp_path, GOOD, GOOD | {"query": "x" * eval_tasks.LONGEST_LINE})
    monkeypatch.setattr(eval_tasks, "LARGEST_TASK", 10)
    with pytest.raises(InputError, match=r"at most 10 are read"):
        task(tmp_path, GOOD)


@pytest.mark.parametrize("name", ["", "missing.jsonl"])
def test_what_is_no_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_task(tmp_path / name)
