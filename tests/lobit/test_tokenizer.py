"""The tokenizer: the same tokens, texts and conversations as Hugging Face's, whole and in a stream."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lobit.errors import InputError, ModelError
from lobit.tokenizer import Tokenizer
from lobit.tokenizer_files import LARGEST_TEMPLATE, LARGEST_TOKENIZER

Pair = tuple[Tokenizer, Any]
"""Ours and Hugging Face's."""

TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    " leading and trailing  spaces ",
    "",
    "\n\ttabs\r\nlines\n",
    "价值 is 値 👩‍👩‍👧 naïve 𝄞",
    "<s>special</s> <|im_start|>user<|im_end|>",
    "1234567890 == 0x7f",
]
NAMES = ["stories260k", "smollm2"]

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}"""
WITH_BOS = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
DEFAULT_SYSTEM = """{%- set ns = namespace(turns=0) -%}
{% if messages[0]['role'] == 'system' %}
  {%- set system, rest = messages[0]['content'], messages[1:] %}
{% else %}
  {%- set system, rest = 'You are a helpful assistant.', messages %}
{% endif %}
{{ '<|system|>' }}
{{ system + eos_token }}
{% for message in rest %}
    {% set ns.turns = ns.turns + 1 %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {% if loop.index > 40 %}{% break %}{% endif %}
<|{{ message.role }}|>{{ ns.turns }}
{% generation %}{{ message | tojson }}{% endgeneration %}

{% endfor %}
{%- if tools is not none %}tools{% endif -%}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
ALTERNATING = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant') }}
{% endif %}
{{ '[INST] ' ~ message['content'] ~ ' [/INST]' if message['role'] == 'user' else ' ' ~ message['content'] ~ eos_token }}
{%- endfor %}"""
DATED = """{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{%- set config = dict(cut='December 2023') %}
Cutting Knowledge Date: {{ config.cut }}
Today Date: {{ date_string }}
{{ '-' * 20 }}
{% for message in messages %}{{ message | tojson(indent=2) }}
{% endfor %}"""
TEMPLATES = {
    "chatml": CHATML,
    "with_bos": WITH_BOS,
    "default_system": DEFAULT_SYSTEM,
    "alternating": ALTERNATING,
    "dated": DATED,
}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello <there> & 'you' 你好"}],
    [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b\n"}, {"role": "user", "content": "c", "name": None}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "tool", "content": "42"}],
]


@pytest.fixture(scope="session")
def pairs(shared: Callable[[str], Path]) -> dict[str, Pair]:
    stories, smollm = shared("models/stories260k"), shared("tokenizers/smollm2.json")
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    ours = Tokenizer.from_file(smollm, bos=None, stop=[2], chat_template=None, special=special)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(smollm), **special)  # type: ignore[no-untyped-call]
    return {
        "stories260k": (Tokenizer.from_folder(stories, vocab_size=512), AutoTokenizer.from_pretrained(stories)),
        "smollm2": (ours, theirs),
    }


def streamed(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    stream = tokenizer.stream()
    return "".join([*(stream.push(token) for token in tokens), stream.finish()])


def with_folder(source: Path, target: Path, **files: Any) -> Path:
    """A copy of a tokenizer's folder with some JSON files replaced."""
    target.mkdir()
    for path in source.glob("*.json"):
        shutil.copyfile(path, target / path.name)
    for name, value in files.items():
        (target / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return target


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_are_hugging_faces(pairs: dict[str, Pair], name: str, text: str) -> None:
    ours, theirs = pairs[name]
    for bos in (True, False):
        tokens = theirs(text, add_special_tokens=bos)["input_ids"]
        assert ours.encode(text, bos=bos) == tokens
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
        assert ours.decode(tokens, special=True) == theirs.decode(tokens)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(data=st.data())
def test_encode_and_decode_are_hugging_faces_for_any_text(pairs: dict[str, Pair], name: str, data: st.DataObject) -> None:
    ours, theirs = pairs[name]
    text = data.draw(st.text())
    tokens = ours.encode(text)
    assert tokens == theirs(text)["input_ids"]
    assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)


def test_attributes_come_from_the_folder(pairs: dict[str, Pair]) -> None:
    tokenizer, _ = pairs["stories260k"]
    assert (tokenizer.bos, tokenizer.stop, tokenizer.size) == (1, [2], 512)
    assert tokenizer.special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert tokenizer.chat_template is None


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_stream_of_any_tokens_is_the_whole_decoded(pairs: dict[str, Pair], name: str, data: st.DataObject) -> None:
    tokenizer, _ = pairs[name]
    some_bytes = st.integers(3, 258) if name == "stories260k" else st.integers(17, 300)
    tokens = data.draw(st.lists(st.integers(0, tokenizer.size + 2) | some_bytes, max_size=40))
    assert streamed(tokenizer, tokens) == tokenizer.decode(tokens)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from("价值値👩🦙𝄞 é\u200d\ufffd"), max_size=40))
def test_stream_of_any_text_has_whole_characters(pairs: dict[str, Pair], name: str, text: str) -> None:
    tokenizer, _ = pairs[name]
    tokens = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokens]
    whole = tokenizer.decode(tokens)
    assert "".join(pieces) + stream.finish() == whole
    assert "\ufffd" in whole or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(data=st.data(), words=st.lists(st.text("abcdefghij", min_size=1, max_size=6), min_size=1, max_size=20))
def test_stream_that_continues_a_text_gives_what_the_text_lacks(
    pairs: dict[str, Pair], name: str, data: st.DataObject, words: list[str]
) -> None:
    """The space between the text and the first new word is not lost."""
    tokenizer, _ = pairs[name]
    tokens = tokenizer.encode(" ".join(words))
    count = data.draw(st.integers(1, len(tokens)))
    stream = tokenizer.stream(tokens[:count])
    told = "".join(map(stream.push, tokens[count:])) + stream.finish()
    assert tokenizer.decode(tokens[:count]) + told == tokenizer.decode(tokens)


def test_stream_gives_words_as_soon_as_they_are_final(pairs: dict[str, Pair]) -> None:
    tokenizer, _ = pairs["smollm2"]
    stream = tokenizer.stream()
    assert [stream.push(token) for token in tokenizer.encode("Hello my friends")] == ["Hello", " my", " friends"]


def test_stream_decodes_a_bounded_window(pairs: dict[str, Pair]) -> None:
    tokenizer, _ = pairs["stories260k"]
    stream = tokenizer.stream()
    tokens = tokenizer.encode("Once upon a time there was a little girl. 你 " * 20)
    longest = 0
    for token in tokens:
        stream.push(token)
        longest = max(longest, len(stream._window))
    assert longest < 16 < len(tokens)


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_renders_as_hugging_face(
    pairs: dict[str, Pair], template: str, conversation: list[dict[str, Any]], prompt: bool
) -> None:
    ours, theirs = pairs["smollm2"]
    ours.chat_template = TEMPLATES[template]
    try:
        expected = theirs.apply_chat_template(
            conversation, chat_template=TEMPLATES[template], tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:
        with pytest.raises(InputError, match=str(error)):
            ours.render_chat(conversation, prompt)
    else:
        rendered = ours.render_chat(conversation, prompt)
        assert rendered == expected
        tokens = theirs.apply_chat_template(conversation, chat_template=TEMPLATES[template], add_generation_prompt=prompt)
        assert ours.encode(rendered, bos=False) == tokens["input_ids"]


HOSTILE = {
    "syntax": "{% for %}",
    "undefined": "{{ messages[0].missing.field }}",
    "dunder": "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ namespace(__init__=1) }}",
    "include": "{% include '/etc/passwd' %}",
    "range": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "loops": "{% for i in range(9999) %}{% for j in range(9999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
    "repeat": "{{ 'x' * 10**12 }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "mutation": "{{ messages.append(1) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "division": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_template_is_a_model_error(pairs: dict[str, Pair], attack: str) -> None:
    ours, _ = pairs["smollm2"]
    ours.chat_template = HOSTILE[attack]
    with pytest.raises(ModelError, match="chat template"):
        ours.render_chat([{"role": "user", "content": "x"}])


def test_template_cannot_change_the_callers_messages(pairs: dict[str, Pair]) -> None:
    ours, _ = pairs["smollm2"]
    ours.chat_template = "{{ messages[0].content.upper() }}"
    messages = [{"role": "user", "content": "x", "extra": None}]
    assert ours.render_chat(messages) == "X"
    assert messages == [{"role": "user", "content": "x", "extra": None}]


@pytest.mark.parametrize(
    ("template", "messages"),
    [(None, [{"role": "user", "content": "x"}]), (CHATML, []), (CHATML, [{"role": "user", "content": object()}])],
)
def test_what_cannot_be_rendered_is_the_users_error(pairs: dict[str, Pair], template: str | None, messages: list[Any]) -> None:
    ours, _ = pairs["smollm2"]
    ours.chat_template = template
    with pytest.raises(InputError):
        ours.render_chat(messages)


def test_half_a_surrogate_pair_is_the_users_error(pairs: dict[str, Pair]) -> None:
    with pytest.raises(InputError, match="surrogate"):
        pairs["stories260k"][0].encode("\ud800")


def test_tokenizer_that_does_not_fit_the_vocabulary_is_refused(stories: Path) -> None:
    with pytest.raises(ModelError, match=r"does not fit the vocabulary: its largest token is 511, the model has 500"):
        Tokenizer.from_folder(stories, vocab_size=500)


def test_added_token_behind_the_vocabulary_is_let_be_unless_it_is_needed(stories: Path, tmp_path: Path) -> None:
    values = json.loads((stories / "tokenizer.json").read_text())
    values["added_tokens"].append({**values["added_tokens"][0], "id": 512, "content": "<image>"})
    folder = with_folder(stories, tmp_path / "a", tokenizer=values)
    assert Tokenizer.from_folder(folder, vocab_size=512).size == 513
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 512]}')
    with pytest.raises(ModelError, match=r"generation_config\.json is token 512, and the model's vocabulary ends at 511"):
        Tokenizer.from_folder(folder, vocab_size=512)


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", "[" * 100_000, '{"version": "1.0", "model": 5}', "\x00\xff"])
def test_damaged_tokenizer_is_one_clear_error(stories: Path, tmp_path: Path, damage: str) -> None:
    folder = with_folder(stories, tmp_path / "a", tokenizer=damage)
    with pytest.raises(ModelError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer.from_folder(folder)


def test_tokenizer_whose_damage_shows_in_use_is_one_clear_error(stories: Path, tmp_path: Path) -> None:
    values = json.loads((stories / "tokenizer.json").read_text())
    values["post_processor"]["special_tokens"] = {}
    folder = with_folder(stories, tmp_path / "a", tokenizer=values)
    with pytest.raises(ModelError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer.from_folder(folder)


def test_missing_and_too_large_files_are_clear_errors(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(tmp_path)
    folder = with_folder(stories, tmp_path / "a")
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(LARGEST_TOKENIZER + 1)
    with pytest.raises(ModelError, match="at most"):
        Tokenizer.from_folder(folder)
    shutil.copyfile(stories / "tokenizer.json", folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(" " * (LARGEST_TEMPLATE + 1))
    with pytest.raises(ModelError, match="at most"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("tokenizer_config", {"bos_token": 5}),
        ("tokenizer_config", {"eos_token": {"text": "</s>"}}),
        ("tokenizer_config", {"chat_template": 5}),
        ("tokenizer_config", {"chat_template": [{"name": "default", "template": 5}]}),
        ("tokenizer_config", "["),
        ("generation_config", {"eos_token_id": "2"}),
        ("generation_config", {"eos_token_id": [2, -1]}),
        ("special_tokens_map", {"unk_token": []}),
    ],
)
def test_unusable_values_beside_the_tokenizer_are_clear_errors(stories: Path, tmp_path: Path, file: str, value: Any) -> None:
    folder = with_folder(stories, tmp_path / "a", **{file: value})
    with pytest.raises(ModelError, match=r"needed|JSON"):
        Tokenizer.from_folder(folder)


def test_tokens_may_be_objects_and_stops_lists(stories: Path, tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": {"content": "</s>"}, "added_tokens_decoder": {}}
    folder = with_folder(
        stories,
        tmp_path / "a",
        tokenizer_config=config,
        generation_config={"eos_token_id": [7, 5]},
        special_tokens_map={"eos_token": "<unk>"},
    )
    tokenizer = Tokenizer.from_folder(folder, vocab_size=512)
    assert tokenizer.stop == [2, 5, 7]
    assert tokenizer.special == {"bos_token": "<s>", "eos_token": "</s>"}


def test_special_tokens_map_decides_for_old_folders(stories: Path, tmp_path: Path) -> None:
    folder = with_folder(stories, tmp_path / "a", special_tokens_map={"pad_token": "<unk>"})
    assert Tokenizer.from_folder(folder).special == AutoTokenizer.from_pretrained(folder).special_tokens_map


def test_named_token_of_the_plain_vocabulary_is_special(stories: Path, tmp_path: Path) -> None:
    values = json.loads((stories / "tokenizer.json").read_text())
    values["added_tokens"] = [entry for entry in values["added_tokens"] if entry["content"] != "</s>"]
    folder = with_folder(stories, tmp_path / "a", tokenizer=values)
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode("a</s>b") == theirs("a</s>b")["input_ids"]
    assert ours.decode([2, 410, 2]) == theirs.decode([2, 410, 2], skip_special_tokens=True)


def test_truncation_and_padding_of_the_file_are_not_applied(stories: Path, tmp_path: Path) -> None:
    values = json.loads((stories / "tokenizer.json").read_text())
    values["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    folder = with_folder(stories, tmp_path / "a", tokenizer=values)
    assert Tokenizer.from_folder(folder).encode("Once upon a time") == Tokenizer.from_folder(stories).encode("Once upon a time")


@pytest.mark.parametrize("form", ["text", "list", "file", "list without default"])
def test_chat_template_is_found_in_every_form(stories: Path, tmp_path: Path, form: str) -> None:
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": CHATML}]
    value = {"text": CHATML, "list": named, "file": "no", "list without default": named[:1]}[form]
    config = {**json.loads((stories / "tokenizer_config.json").read_text()), "chat_template": value}
    folder = with_folder(stories, tmp_path / "a", tokenizer_config=config)
    if form == "file":
        (folder / "chat_template.jinja").write_text(CHATML)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.chat_template == (None if form == "list without default" else CHATML)
    if tokenizer.chat_template:
        theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(CONVERSATIONS[0], tokenize=False)
        assert tokenizer.render_chat(CONVERSATIONS[0], add_generation_prompt=False) == theirs


def test_a_bundles_tokenizer_is_the_folders(stories: Path) -> None:
    folder = Tokenizer.from_folder(stories)
    bundle = Tokenizer.from_file(
        stories / "tokenizer.json", bos=folder.bos, stop=folder.stop, chat_template=CHATML, special=folder.special
    )
    assert bundle.encode("a</s> b") == folder.encode("a</s> b")
    assert (bundle.bos, bundle.stop, bundle.special, bundle.size) == (folder.bos, folder.stop, folder.special, folder.size)
