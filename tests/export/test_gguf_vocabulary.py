"""The tokenizer in a GGUF file is the model's: llama.cpp cuts texts into the same tokens, or the export is refused."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Inner

from lobit import verbs
from lobit.demo import held_out_text
from lobit.errors import MissingPartError, TargetError
from lobit.export.gguf import vocabulary
from lobit.export.gguf.file import write
from lobit.export.gguf.vocabulary import CONTROL, NORMAL, UNUSED, fields_of
from lobit.runtime.llama_library import Model, library
from lobit.runtime.llama_tokens import search
from lobit.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "lobit" / "demo" / "model"
TEXT = "Once upon a time, in 1984,  there's a_small ñandú that SAID: \"don't!\"\n\n\tAnd so on…  "


@pytest.fixture(autouse=True)
def nothing_is_known_of_other_tests() -> None:
    """llama.cpp is asked again what it answered in another test."""
    vocabulary.reply.cache_clear()


def fields(folder: Path, size: int) -> dict[str, Any]:
    """What a file says of a folder's tokenizer."""
    tokenizer = Tokenizer.from_folder(folder, size)
    return fields_of(folder, size, tokenizer.bos, tuple(tokenizer.stop))


def told_by_llama_cpp(values: dict[str, Any], size: int, path: Path, text: str, around: bool = False) -> list[int]:
    write(path, "llama", {"llama.vocab_size": size, **values}, [], lambda *_: None)
    with closing(Model(path, vocabulary=True)) as model:
        return model.tokenize(text, around)


def saved(inner: Inner, folder: Path, **config: Any) -> Path:
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("name", "kind", "size"), [("stories", "llama", 512), ("demo", "gpt2", 768), ("smollm2", "gpt2", 49152)])
def test_real_tokenizers_are_taken_over(name: str, kind: str, size: int, shared: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if name == "smollm2":
        folder.mkdir()
        shutil.copy(shared("tokenizers/smollm2.json"), folder / "tokenizer.json")
    else:
        shutil.copytree(DEMO if name == "demo" else shared("models/stories260k"), folder)
    values = fields(folder, size)
    assert values["tokenizer.ggml.model"] == kind
    for text in (TEXT, held_out_text(4)):
        assert told_by_llama_cpp(values, size, tmp_path / "v.gguf", text) == Tokenizer.from_folder(folder).encode(text, bos=False)


def test_digits_are_cut_by_the_pre_tokenizer_that_does_so(shared: Any, tmp_path: Path) -> None:
    shutil.copy(shared("tokenizers/smollm2.json"), tmp_path / "tokenizer.json")
    assert fields(tmp_path, 49152)["tokenizer.ggml.pre"] == "smollm"


def test_a_text_begins_and_ends_as_the_tokenizer_says(tmp_path: Path) -> None:
    values = fields(DEMO, 768)
    tokenizer = Tokenizer.from_folder(DEMO)
    assert told_by_llama_cpp(values, 768, tmp_path / "v.gguf", "Hello", around=True) == tokenizer.encode("Hello")
    assert (values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"]) == (tokenizer.bos, tokenizer.stop[0])
    assert values["tokenizer.ggml.token_type"][:3] == [CONTROL, CONTROL, NORMAL]


def test_tokens_that_the_tokenizer_lacks_are_unused_ones() -> None:
    values = fields(DEMO, 800)
    assert (len(values["tokenizer.ggml.tokens"]), values["tokenizer.ggml.token_type"][-1]) == (800, UNUSED)


def test_unigram_is_taken_over(tmp_path: Path) -> None:
    inner = Inner(models.Unigram())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.train_from_iterator([held_out_text(30)], trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>"))
    size = inner.get_vocab_size()
    folder = saved(inner, tmp_path / "model")
    found = fields(folder, size)
    assert found["tokenizer.ggml.model"] == "t5"
    text = held_out_text(3) + " Ünknown!"
    assert told_by_llama_cpp(found, size, tmp_path / "v.gguf", text) == Tokenizer.from_folder(folder).encode(text, bos=False)


def cut_at_every_vowel() -> Inner:
    inner = Inner.from_file(str(DEMO / "tokenizer.json"))
    every_vowel = pre_tokenizers.Split(Regex("[aeiou]"), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([every_vowel, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return inner


def test_a_vocabulary_that_no_pre_tokenizer_cuts_alike_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"llama.cpp has no tokenizer like this model's.*take target onnx or xnnpack"):
        fields(saved(cut_at_every_vowel(), tmp_path / "model"), 768)


def test_a_tokenizer_that_llama_cpp_lacks_is_refused_before_the_work_and_in_the_plan(tmp_path: Path) -> None:
    model, done = shutil.copytree(DEMO, tmp_path / "model"), list[Any]()
    cut_at_every_vowel().save(str(model / "tokenizer.json"))
    recipe = verbs.choose_recipe("8da4w-g32")
    (problem,) = verbs.plan(str(model), recipe, "gguf", context=32).problems
    assert "llama.cpp has no tokenizer like this model's" in problem
    with pytest.raises(TargetError, match=r"llama.cpp has no tokenizer like this model's"):
        verbs.export(str(model), "gguf", tmp_path / "out", recipe=recipe, context=32, progress=lambda *told: done.append(told))
    assert (done, list(tmp_path.iterdir())) == ([], [model])
    assert verbs.plan(str(model), recipe, "onnx", context=32).problems == [], "other targets leave the tokenizer to the app"


def test_a_tokenizer_of_words_is_refused(tmp_path: Path) -> None:
    inner = Inner(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    inner.normalizer = normalizers.NFC()
    with pytest.raises(TargetError, match=r"'WordLevel'.*take target onnx or xnnpack"):
        fields(saved(inner, tmp_path / "model"), 3)


def test_spaces_behind_a_special_token_go_where_the_tokenizer_takes_them_away(tmp_path: Path) -> None:
    """llama.cpp does so for models of one name alone, which also need to have certain tokens."""
    inner = Inner.from_file(str(DEMO / "tokenizer.json"))
    names = ["</s>", "<unk>", "<s>", "<|endoftext|>"]
    inner.add_special_tokens([AddedToken(name, normalized=False, rstrip=name == "</s>") for name in names])
    values = fields(saved(inner, tmp_path / "model"), 772)
    assert values["general.name"] == "Phi-3"
    tokens = told_by_llama_cpp(values, 772, tmp_path / "v.gguf", "one</s>  \n two")
    assert tokens == Tokenizer.from_folder(tmp_path / "model").encode("one</s>  \n two", bos=False)


def test_an_export_asks_llama_cpp_once_about_a_vocabulary(tmp_path: Path) -> None:
    verbs.export(str(DEMO), "gguf", tmp_path / "bundle", recipe=verbs.choose_recipe("8da4w-g32"), context=32)
    assert vocabulary.reply.cache_info().hits > 0
    assert vocabulary.reply.cache_info().misses == 1


def test_a_model_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert fields_of(tmp_path, 9, None, ()) == {"tokenizer.ggml.model": "none"}


@pytest.mark.parametrize("more", [2, 3])
def test_a_fourth_token_that_ends_a_text_is_refused_by_name(more: int, tmp_path: Path) -> None:
    model, own = shutil.copytree(DEMO, tmp_path / "model"), Tokenizer.from_folder(DEMO).stop
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [*own, *range(300, 300 + more)]}), encoding="utf-8")
    problems = verbs.plan(str(model), verbs.choose_recipe("fp"), "gguf", context=32).problems
    assert len(own) == 1
    assert ["go on behind 302 (" in problem and "leave three in the eos_token_id" in problem for problem in problems] == [True] * (more - 2)


def test_a_fourth_token_that_llama_cpp_knows_by_its_name_is_none_too_many(tmp_path: Path) -> None:
    inner = Inner.from_file(str(DEMO / "tokenizer.json"))
    inner.add_special_tokens([AddedToken("<|im_end|>", normalized=False)])
    folder = saved(inner, tmp_path / "model")
    stop = (1, 300, 301, 768)
    values = fields_of(folder, 769, None, stop)
    write(tmp_path / "v.gguf", "llama", {"llama.vocab_size": 769, **values}, [], lambda *_: None)
    with closing(Model(tmp_path / "v.gguf", vocabulary=True)) as model:
        assert [model.ends(token) for token in (*stop, 302)] == [True] * 4 + [False]


def test_a_llama_cpp_that_comes_to_no_end_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "LONGEST_WAIT", 0.01)
    with pytest.raises(TargetError, match=r"llama.cpp has not read this vocabulary in 0.01 seconds: take target onnx or xnnpack"):
        fields(DEMO, 768)


def test_a_llama_cpp_of_another_version_is_told_in_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "xllamacpp-1.0.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: xllamacpp\nVersion: 1.0\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(MissingPartError, match=r"xllamacpp 1.0 is installed.*pip install 'lobit\[gguf\]'"):
        fields(DEMO, 768)


def test_every_vocabulary_that_was_tried_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freed, free = list[int](), library().llama_model_free
    monkeypatch.setattr(library(), "llama_model_free", lambda model: [freed.append(model), free(model)])
    write(tmp_path / "v.gguf", "llama", {"llama.vocab_size": 768, **fields(DEMO, 768)}, [], lambda *_: None)
    asked = {"path": str(tmp_path / "v.gguf"), "pre": ["gpt-2", "qwen2"], "texts": ["a"], "tokens": [[0]], "stop": []}
    assert "found" in search(asked)
    assert len(freed) == 2 and all(freed)
