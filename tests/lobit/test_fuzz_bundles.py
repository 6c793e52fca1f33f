"""Damaged bundles and tokenizers are refused in one message, or do what the whole ones do: never a crash, never a path outside."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Inner

from lobit.errors import BundleError, InputError, ModelError
from lobit.runtime.bundle import Bundle, open_bundle
from lobit.runtime.manifest import (
    FILE_NAME,
    CacheInfo,
    ClientInputs,
    Delegation,
    FileEntry,
    Generation,
    Lookup,
    Manifest,
    Mask,
    Method,
    ModelInfo,
    Port,
    Rotary,
    State,
    TensorGroup,
    Tokens,
    sealed,
)
from lobit.tokenizer import Tokenizer
from tests.mutations import Damage, Refusal, dumped, every_single, outcome

MANIFESTS = 2000
TOKENIZERS = 300
"""Of each kind of model, and as many with damaged bytes."""
THIN = 3
"""Of the damage to single values, where a case costs a millisecond, every third."""
TEMPLATES = 1500
VOCABULARY = 96
TEXTS = ["", "a", "hello world", " Hello,\n\tWORLD 123 ", "價値 👩‍👩‍👧 é", "<s>x</s><pad>", "a" * 500]


def manifest_of(folder: Path) -> Manifest:
    grid = {"bits": 4, "group_size": 32, "scale_rule": "range"}
    rule = {"match": ["layers.*"], "weights": grid, "activation_bits": 8}
    return Manifest(
        name=folder.name,
        target="xnnpack",
        model=ModelInfo("llama", 1000, 2, 8, VOCABULARY, 128, 16),
        recipe={"name": "r", "summary": "é", "rules": [rule], "exclude": [], "kv_bits": 8, "untied": False, "source": ""},
        checkpoint_sha256="0" * 64,
        context=64,
        chunk=16,
        threads=0,
        options={"chip": "SM8650", "portable": False},
        methods=[
            Method(
                "forward",
                "step",
                [Port("tokens", "tokens", [1, "1..16"], "int64"), Port("past", "state", [1, 2, 16, 4], "float32")],
                [Port("logits", "logits", [1, VOCABULARY], "float32"), Port("now", "state", [1, 2, 16, 4], "float32")],
            )
        ],
        states=[State("past", "now", "float32", [1, 2, 16, 4], 2, 16, True, False)],
        client=ClientInputs(
            Lookup("tokens", "parts/tokenizer.json", 8, 1.0),
            [Rotary("past", "tokens", [1.0, 0.5], 1.0)],
            [Mask("past", 16, -1e4)],
            "tokens",
        ),
        cache=CacheInfo("int8", [64, 16], 7200, 100),
        tokens=Tokens(1, [2], "{{ messages[0].content }}", {"eos_token": "</s>"}),
        generation=Generation(0.5, 40, 0.9, None),
        delegation=Delegation("XNNPACK", 1, {"linear": 14}, {"add": 2}, {"forward": 100}),
        weights=[TensorGroup("mlp", "int4 group 32", 100, 3000)],
        files=[FileEntry.of(folder, "model.pte", "program"), FileEntry.of(folder, "parts/tokenizer.json", "tokenizer")],
        versions={"torch": "2.13.0"},
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of two files, with another beside it that no manifest may reach."""
    folder = tmp_path / "bundle"
    (folder / "parts").mkdir(parents=True)
    (folder / "model.pte").write_bytes(bytes(range(256)) * 2)
    (folder / "parts" / "tokenizer.json").write_text("{}")
    (tmp_path / "outside.pte").write_bytes(b"outside")
    (folder / FILE_NAME).write_text(manifest_of(folder).to_json(), encoding="utf-8")
    return folder


def assert_sound(found: Bundle) -> None:
    """What a bundle that may be run has, whatever was done to it."""
    manifest, top = found.manifest, found.folder.resolve()
    for entry in manifest.files:
        path = found.folder / entry.path
        assert path.resolve().is_relative_to(top) and path.stat().st_size == entry.bytes
    assert 1 <= manifest.chunk <= manifest.context <= manifest.model.max_context
    assert 0 <= manifest.threads <= 1024
    assert len(manifest.cache.slots) == manifest.model.layers >= 1
    assert all(1 <= size <= manifest.context for size in manifest.cache.slots)
    ports = {port.name for method in manifest.methods for port in (*method.inputs, *method.outputs)}
    for state in manifest.states:
        assert {state.input, state.output} <= ports and all(size >= 1 for size in state.shape)
        assert state.axis is None or state.shape[state.axis] <= manifest.context
    tokens = [*manifest.tokens.stop, *([] if manifest.tokens.bos is None else [manifest.tokens.bos])]
    assert all(0 <= token < manifest.model.vocab_size for token in tokens)


def test_every_changed_bit_of_a_bundle_is_found(bundle: Path) -> None:
    whole, damage = open_bundle(bundle).manifest, Damage(1)
    for path in [FILE_NAME, "model.pte", "parts/tokenizer.json"]:
        data = bytearray((bundle / path).read_bytes())
        for position in range(len(data)):
            data[position] ^= (bit := 1 << damage.random.randrange(8))
            (bundle / path).write_bytes(data)
            data[position] ^= bit
            found = outcome(lambda: open_bundle(bundle))
            assert isinstance(found, Refusal) or found.manifest == whole, position
        (bundle / path).write_bytes(data)
    assert open_bundle(bundle).manifest == whole


def test_a_damaged_manifest_is_refused_or_is_the_same(bundle: Path) -> None:
    values, whole, damage = json.loads((bundle / FILE_NAME).read_text(encoding="utf-8")), open_bundle(bundle).manifest, Damage(2)
    for damaged in [*every_single(values), *(damage.json(values, 1 + i % 3) for i in range(MANIFESTS))]:
        found = outcome(lambda damaged=damaged: Manifest.from_json(dumped(damaged).encode()))
        assert isinstance(found, Refusal) or found == whole


def test_a_manifest_that_was_written_wrong_is_refused_or_sound(bundle: Path) -> None:
    """Its hash agrees with what it says."""
    values, damage, read = json.loads((bundle / FILE_NAME).read_text(encoding="utf-8")), Damage(3), 0
    for damaged in [*list(every_single(values))[::THIN], *(damage.json(values, 1 + i % 3) for i in range(MANIFESTS))]:
        (bundle / FILE_NAME).write_text(sealed(damaged), encoding="utf-8")
        found = outcome(lambda: open_bundle(bundle))
        if isinstance(found, Bundle):
            assert_sound(found)
            read += 1
    assert read > 100


OUTSIDE = ["../outside.pte", "parts/../../outside.pte", "/etc/passwd", "..", ".", "", "C:\\x", "..\\outside.pte", "parts\\..\\x"]
UNUSABLE = ["model.pte\0", "\ud800.pte", "x" * 300, "model.pte\n", "\x1b[2Jmodel.pte", "//etc/passwd", "parts", "model.pte/", "é" * 200]


@pytest.mark.parametrize("path", [*OUTSIDE, *UNUSABLE], ids=ascii)
def test_a_name_that_leaves_the_bundle_or_is_none_is_refused(path: str, bundle: Path) -> None:
    values = json.loads((bundle / FILE_NAME).read_text(encoding="utf-8"))
    values["files"][0] |= {"path": path, "bytes": 7}
    (bundle / FILE_NAME).write_text(sealed(values), encoding="utf-8")
    assert isinstance(outcome(lambda: open_bundle(bundle)), Refusal)


def _circle(path: Path) -> None:
    path.symlink_to(path.name)


PLANTED: dict[str, Callable[[Path], None]] = {
    "a link outside": lambda path: path.symlink_to("../outside.pte"),
    "a link to itself": _circle,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("name", ["model.pte", FILE_NAME])
def test_what_is_planted_for_a_file_is_refused(kind: str, name: str, bundle: Path) -> None:
    (bundle / name).unlink()
    PLANTED[kind](bundle / name)
    assert isinstance(outcome(lambda: open_bundle(bundle)), Refusal)


def test_a_folder_that_is_a_link_outside_is_refused(bundle: Path) -> None:
    (bundle / "parts").rename(bundle.parent / "parts")
    (bundle / "parts").symlink_to(bundle.parent / "parts")
    with pytest.raises(BundleError, match=r"parts/tokenizer\.json is a link that leaves the bundle"):
        open_bundle(bundle)


# --- tokenizers ---------------------------------------------------------------------------------------------------------------------


def letters() -> dict[str, int]:
    special = ["<unk>", "<s>", "</s>"]
    return {token: i for i, token in enumerate([*special, *map(chr, range(97, 123)), *"ABC ▁Ġ.,", "he", "ll", "hell", "##o", "wor"])}


def byte_level() -> Inner:
    inner = Inner(models.BPE(letters(), [("h", "e"), ("l", "l"), ("he", "ll")], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    return inner


def metaspace() -> Inner:
    inner = Inner(models.Unigram([(token, -float(i)) for token, i in letters().items()], 0, False))
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")])
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return inner


def pieces() -> Inner:
    inner = Inner(models.WordPiece(letters(), unk_token="<unk>"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    return inner


def words() -> Inner:
    inner = Inner(models.WordLevel(letters(), unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return inner


KINDS: dict[str, Callable[[], Inner]] = {"byte level": byte_level, "metaspace": metaspace, "pieces": pieces, "words": words}


def written(inner: Inner) -> dict[str, Any]:
    inner.add_special_tokens(["<unk>", AddedToken("<s>", special=True), "</s>", "<pad>"])
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    values: dict[str, Any] = json.loads(inner.to_str())
    return values


def used(folder: Path) -> Tokenizer:
    """Every method of the folder's tokenizer, on texts of all sorts."""
    tokenizer = Tokenizer.from_folder(folder, VOCABULARY)
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        stream = tokenizer.stream()
        assert isinstance(tokenizer.decode(tokens), str)
        assert all(isinstance(piece, str) for piece in [*(stream.push(token) for token in tokens), stream.finish()])
    tokenizer.decode([0, VOCABULARY - 1, VOCABULARY, 1 << 31], special=True)
    assert all(token < VOCABULARY for token in tokenizer.stop) and (tokenizer.bos is None or tokenizer.bos < VOCABULARY)
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": {"content": "<s>"}}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_tokenizer_is_refused_or_works(kind: str, folder: Path) -> None:
    values, damage, read = written(KINDS[kind]()), Damage(4), 0
    path = folder / "tokenizer.json"
    path.write_text(dumped(values), encoding="utf-8")
    assert used(folder).stop == [2]
    small = copy.deepcopy(values)
    small["model"]["vocab"] = small["model"]["merges"] = None
    shapes = [{**one, "model": {**values["model"], **{k: v for k, v in one["model"].items() if v is not None}}}
              for one in every_single(small) if isinstance(one.get("model"), dict)]  # fmt: skip
    for damaged in [*shapes[::THIN], *(damage.json(values, 1 + i % 4) for i in range(TOKENIZERS))]:
        path.write_text(dumped(damaged), encoding="utf-8")
        read += isinstance(outcome(lambda: used(folder)), Tokenizer)
    for _ in range(TOKENIZERS):
        path.write_bytes(damage.bytes(dumped(values).encode()))
        outcome(lambda: used(folder))
    assert read > 50


def test_damage_beside_the_tokenizer_is_refused_or_harmless(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(dumped(written(byte_level())), encoding="utf-8")
    damage = Damage(5)
    for name in ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "config.json"):
        path = folder / name
        text = path.read_text() if path.is_file() else '{"eos_token": "</s>", "eos_token_id": 2}'
        values = json.loads(text) | {"chat_template": "{{ messages[0].content }}"}
        for damaged in [*list(every_single(values))[::THIN], *(damage.json(values, 1 + i % 3) for i in range(200))]:
            path.write_text(dumped(damaged), encoding="utf-8")
            outcome(lambda: used(folder))
        for _ in range(100):
            path.write_bytes(damage.bytes(text.encode()))
            outcome(lambda: used(folder))
        path.write_text(text)


def test_token_ids_beyond_the_vocabulary_are_refused_with_the_numbers(folder: Path) -> None:
    values = written(words())
    path = folder / "tokenizer.json"
    for name, told in (("hell", VOCABULARY), ("hell", (1 << 32) - 1), ("A", VOCABULARY + 3)):
        values["model"]["vocab"][name] = told
        path.write_text(dumped(values), encoding="utf-8")
        with pytest.raises(ModelError, match=f"largest token is {told}, the model has {VOCABULARY}"):
            Tokenizer.from_folder(folder, VOCABULARY)
        with pytest.raises(ModelError, match=f"largest token is {told}, the model has {VOCABULARY}"):
            Tokenizer.from_file(path, bos=1, stop=[2], chat_template=None, special={}, vocab_size=VOCABULARY)
        values = written(words())


def test_two_tokens_of_one_id_and_renumbered_tokens_are_refused(folder: Path) -> None:
    values = written(words())
    path = folder / "tokenizer.json"
    path.write_text(dumped({**values, "model": {**values["model"], "vocab": {**values["model"]["vocab"], "A": 5}}}), encoding="utf-8")
    with pytest.raises(ModelError, match="contradicts itself"):
        Tokenizer.from_folder(folder)
    values["added_tokens"][-1]["id"] += 1
    path.write_text(dumped(values), encoding="utf-8")
    with pytest.raises(ModelError, match="'<pad>' is token"):
        Tokenizer.from_folder(folder)


TEMPLATE = """{%- set ns = namespace(turns=0) -%}{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% set ns.turns = ns.turns + 1 %}
{{- '<|' + message['role'] + '|>' + message['content'] | trim ~ eos_token * 2 }}{{ ns.turns ** 2 }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{{ messages | tojson(indent=2) }}{% endif %}"""


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
def test_a_damaged_chat_template_is_one_message_or_writes_text(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(dumped(written(byte_level())), encoding="utf-8")
    tokenizer, damage, whole = Tokenizer.from_folder(folder), Damage(6), 0
    for i in range(TEMPLATES):
        text = TEMPLATE
        for _ in range(1 + i % 3):
            text = damage.text(text)
        tokenizer.chat_template = text
        rendered = outcome(lambda: tokenizer.render_chat([{"role": "user", "content": " hi "}, {"role": "assistant", "content": "ho"}]))
        whole += not isinstance(rendered, Refusal)
    assert whole > 100


def test_a_template_that_refuses_is_the_users_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(dumped(written(byte_level())), encoding="utf-8")
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(InputError, match="refuses these 1 messages"):
        tokenizer.render_chat([{"role": "system", "content": "x"}])
