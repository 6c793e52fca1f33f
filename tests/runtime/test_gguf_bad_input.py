"""GGUF files that are not as export wrote them: one message that says what to do, and the process that asked goes on."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobit import verbs
from lobit.errors import BundleError, MissingPartError
from lobit.runtime import llama_library
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import open_engine
from lobit.runtime.stored import read_program
from tests import mutations
from tests.gguf_files import ENDLESS
from tests.mutations import reseal

FILE = "model.gguf"


@pytest.fixture(scope="module")
def made(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "bundle"
    verbs.export(str(models("qwen3")), "gguf", out, recipe=verbs.choose_recipe("8da4w-g32"), context=48, chunk=16)
    return out


def refused(work: Callable[[], Any]) -> str:
    message = mutations.refused(work)
    assert len(message.splitlines()) <= 2
    return message


def runs(bundle: Path) -> Any:
    return open_engine(open_bundle(bundle), 1).prefill([1, 2, 3])


def reads(bundle: Path) -> Any:
    program = read_program(open_bundle(bundle))
    return [*program.layers(), *program.vectors()]


def edit(bundle: Path, old: bytes, new: bytes) -> None:
    content = (bundle / FILE).read_bytes()
    assert old in content
    (bundle / FILE).write_bytes(content.replace(old, new, 1))
    reseal(bundle)


def test_a_changed_byte_is_found_by_its_hash(bundle: Path) -> None:
    content = bytearray((bundle / FILE).read_bytes())
    content[-5] ^= 1
    (bundle / FILE).write_bytes(content)
    assert "sha256" in refused(lambda: runs(bundle))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.999])
def test_a_file_that_was_cut_and_sealed_anew_ends_with_one_message(share: float, bundle: Path) -> None:
    os.truncate(bundle / FILE, int(share * (bundle / FILE).stat().st_size))
    reseal(bundle)
    assert "export it again" in refused(lambda: runs(bundle))
    assert "export it again" in refused(lambda: reads(bundle))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", ENDLESS)
def test_verify_refuses_a_file_that_announces_more_than_it_has_at_once(what: str, models: Any, bundle: Path) -> None:
    (bundle / FILE).write_bytes(ENDLESS[what])
    reseal(bundle)
    assert "cannot be taken apart" in refused(lambda: verbs.verify(bundle, str(models("qwen3"))))


def test_an_older_layout_is_refused_by_its_number(bundle: Path) -> None:
    edit(bundle, b"GGUF" + struct.pack("<I", 3), b"GGUF" + struct.pack("<I", 1))
    assert "version" in refused(lambda: reads(bundle))
    assert "export it again" in refused(lambda: runs(bundle))


@pytest.mark.parametrize("old", [b"qwen3.block_count", b"blk.1.ffn_up.weight", b"qwen3", b"tokenizer.ggml.model"])
def test_an_edited_file_ends_with_llama_cpp_s_reason(old: bytes, bundle: Path) -> None:
    edit(bundle, old, b"x" + old[1:])
    assert "llama.cpp does not run bundle" in refused(lambda: runs(bundle))


def test_damage_anywhere_in_the_header_never_ends_this_process(bundle: Path) -> None:
    """llama.cpp may abort on any of them: only the process in which it runs."""
    content, random = (bundle / FILE).read_bytes(), np.random.default_rng(0)
    for place in random.integers(0, 3000, 12):
        (bundle / FILE).write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        reseal(bundle)
        try:
            assert np.isfinite(runs(bundle)).all()
        except BundleError as error:
            assert "export" in str(error)


def test_another_version_of_the_library_is_refused_by_both_numbers(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_library, "VERSION", "2020.1.1")
    with pytest.raises(MissingPartError, match=r"xllamacpp [\d.]+ is installed, and the structures of 2020.1.1 alone"):
        runs(bundle)


def test_logits_are_the_same_however_a_text_is_cut_and_after_a_rewind(bundle: Path) -> None:
    engine = open_engine(open_bundle(bundle), 1)
    tokens = list(range(1, 31))
    rows = engine.score(tokens)
    engine.reset()
    assert np.array_equal(engine.score(tokens, 3), rows[-3:])
    engine.reset()
    one_by_one = [engine.decode(token) for token in tokens]
    assert np.abs(rows - np.stack(one_by_one)).max() < 0.05 * rows.std()  # products of one token add up in another order
    assert engine.rewind(10)
    assert np.array_equal(engine.decode(tokens[10]), one_by_one[10])
