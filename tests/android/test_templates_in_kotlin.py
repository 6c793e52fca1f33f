"""Chat templates in the app's code: the same text as lobit writes, or both refuse."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lobit.chat_template import render
from lobit.errors import LobitError
from tests.android.kotlin_tool import kotlin
from tests.mutations import Damage

TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
"""Templates that use what those of the named family use, in the same way; the published texts are longer."""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CONTENTS = ["Hi", "", "  two\n lines \n", "héllo 🙂 中文 \u00a0", "<b>&'\"\\</b>", "</think>\n\nso", "a\r\nb\tc", "{{ x }} {% y %}"]
REFUSED = "refused"


@pytest.fixture(autouse=True)
def tools(android_tools: Callable[[str], None]) -> None:
    android_tools("native")


def by_python(template: str, messages: list[Any], special: dict[str, str] = SPECIAL, prompt: bool = True) -> str:
    try:
        return render(template, messages, special, prompt)
    except LobitError:
        return REFUSED



def conversations() -> list[list[dict[str, Any]]]:
    """With and without a system message, of one to five turns, with every content in every place."""
    found: list[list[dict[str, Any]]] = []
    for i, content in enumerate(CONTENTS):
        for turns in range(1, 6):
            others = [CONTENTS[(i + k) % len(CONTENTS)] for k in range(turns)]
            talk = [{"role": "user" if k % 2 == 0 else "assistant", "content": text} for k, text in enumerate(others)]
            found += [talk, [{"role": "system", "content": content}, *talk]]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, 2.5, None, True, "é"]}}}
    user, parts = {"role": "user", "content": "u"}, [{"type": "text", "text": " t "}, {"type": "image"}]
    found += [
        [{"role": "assistant", "content": "a"}],
        [user, user],
        [user, {"role": "assistant", "content": None, "tool_calls": [call]}, *({"role": "tool", "content": text} for text in "rs")],
        [user, {"role": "assistant", "content": "a", "tool_calls": [call, call]}],
        [user, {"role": "tool", "content": {"content": 7}}],
        [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}],
        [{"role": "user", "content": [{"type": "sound"}]}],
        [user, {"role": "assistant", "content": "a", "reasoning_content": "why"}],
        [{"role": "user"}],
        [{"content": "c"}],
        [],
    ]
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_familys_template_gives_the_same_text(name: str) -> None:
    texts = set()
    for messages in conversations():
        for prompt in (True, False):
            while True:
                day = datetime.now().date()
                expected = by_python(TEMPLATES[name], messages, prompt=prompt)
                answer = kotlin().render(TEMPLATES[name], messages, SPECIAL, prompt)
                if day == datetime.now().date():  # otherwise midnight has passed, and the texts may have two dates
                    break
            assert answer.get("text", REFUSED) == expected, (messages, answer)
            texts.add(expected)
    assert len(texts) > 10


CONSTRUCTS: list[str] = json.loads((Path(__file__).parent / "templates" / "constructs.json").read_text(encoding="ascii"))
"""Small templates, each for a part of the language, some of them broken."""


@pytest.mark.parametrize("template", CONSTRUCTS)
def test_a_construct_means_what_it_means_to_jinja(template: str) -> None:
    messages = [{"role": "user", "content": "x'y"}, {"role": "assistant", "content": None, "n": 1.5, "o": {"k": [None, 2]}}]
    answer = kotlin().render(template, messages, SPECIAL, True)
    assert answer.get("text", REFUSED) == by_python(template, messages), answer


UNKNOWN = {
    "{{ 'x' | center(9) }}": "the filter center in line 1",
    "{{ 'x'.zfill(3) }}": "zfill of text in line 1",
    "\n{{ '%s' % 'x' }}": "the operator % on text in line 2",
    "{% include 'x' %}": "the tag include in line 1",
    "{{ cycler(1, 2) }}": "the name cycler in line 1",
    "{% for x in [1] recursive %}{% endfor %}": "a recursive loop in line 1",
    "{{ ''.__class__ }}": "__class__ of text in line 1",
    "{{ dict(*[]) }}": "arguments with * before them in line 1",
    "{{ 9223372036854775808 }}": "a number as large as 9223372036854775808",
    "{{ ('a' | safe) + '<' }}": "the operator + on text after the filter safe",
}


@pytest.mark.parametrize("template", UNKNOWN)
def test_what_the_app_does_not_know_is_refused_by_its_name_and_line(template: str) -> None:
    answer = kotlin().render(template, [{"role": "user", "content": "x"}])
    assert f"uses {UNKNOWN[template]}" in answer["error"] and "which this app does not know" in answer["error"]


def test_a_template_that_refuses_says_why() -> None:
    answer = kotlin().render(TEMPLATES["danube"], [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    assert answer["error"].startswith("the model's chat template refuses these 2 messages: no system role: ")


ENDLESS = {
    "steps": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "text": "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "doubled": "{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "product": "{{ 'a' * 10 ** 10 }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "lists": "{% set ns = namespace(x=[1]) %}{% for a in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested": "{% set ns = namespace(x=[1]) %}{% for a in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "calls": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "replaced": "{{ ('a' * 9999) | replace('a', 'b' * 9999) }}",
    "compared": "{% set n = namespace(x=[], y=[]) %}{% for a in range(60) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}"
    "{% endfor %}{{ n.x == n.y }}",
}  # fmt: skip


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_that_would_fill_memory_or_never_end_is_refused(template: str) -> None:
    start = time.monotonic()
    answer = kotlin().render(ENDLESS[template], [{"role": "user", "content": "x"}])
    assert "does not work" in answer["error"]
    assert time.monotonic() - start < 30
    assert kotlin().render("{{ 1 }}", [{"role": "user", "content": "x"}])["text"] == "1", "the process goes on"


def names_what_nobody_knows(template: str) -> bool:
    try:
        render(template, [{"role": "user", "content": "x"}], SPECIAL, True)
    except LobitError as error:
        return "No filter named" in str(error) or "No test named" in str(error)
    return False


def test_a_damaged_template_is_refused_by_both_or_means_the_same() -> None:
    """What the app alone refuses, it names as unknown. Jinja alone refuses filters and tests that nobody knows where they are not used."""
    damage, same, messages = Damage(7), 0, [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "ho"}]
    for i in range(3000):
        text = TEMPLATES[sorted(TEMPLATES)[i % len(TEMPLATES)]]
        for _ in range(1 + i % 3):
            text = damage.text(text)
        expected, answer = by_python(text, messages), kotlin().render(text, messages, SPECIAL, True)
        if "which this app does not know" in answer.get("error", "") or (expected == REFUSED and names_what_nobody_knows(text)):
            continue
        assert answer.get("text", REFUSED) == expected, (text, answer)
        same += expected != REFUSED
    assert same > 500


FILTERS = ["length", "upper", "trim", "list", "first", "join('-')", "default(1)", "tojson", "int", "last"]
VALUES = st.recursive(
    st.sampled_from(["1", "2.5", "'a'", "' B '", "true", "none", "x", "nothing", "messages", "''", "-3"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "*", "~", "==", "<", "in", "and", "or", "-", "%", "is"]), inner).map(
            lambda parts: f"({' '.join(parts)})" if parts[1] != "is" else f"({parts[0]} is string)"
        ),
        st.tuples(inner, st.sampled_from(FILTERS)).map(lambda parts: f"({parts[0]} | {parts[1]})"),
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.tuples(inner, inner).map(lambda parts: f"{{'k': {parts[0]}, 'l': {parts[1]}}}"),
        st.tuples(inner, st.sampled_from(["[0]", "[-1:]", "['k']", ".k", "[::-1]", ".strip()", ".split()"])).map("".join),
        st.tuples(inner, inner, inner).map(lambda parts: f"({parts[0]} if {parts[1]} else {parts[2]})"),
    ),
    max_leaves=6,
)


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(VALUES)
def test_an_expression_has_the_value_that_it_has_to_jinja(value: str) -> None:
    template = f"{{% set x = 'xyz' %}}{{{{ {value} }}}}"
    messages = [{"role": "user", "content": "x"}]
    expected, answer = by_python(template, messages), kotlin().render(template, messages, SPECIAL, True)
    if "which this app does not know" not in answer.get("error", ""):
        assert answer.get("text", REFUSED) == expected, answer
