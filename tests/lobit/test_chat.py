"""A conversation on the real runtime: turns stay in the cache; the template is the bundle's."""

import io
import json
import shutil
import sys
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


def test_a_model_without_a_template_says_how_to_use_it(bundles: Any) -> None:
    with pytest.raises(InputError, match="--prompt"):
        verbs.chat(bundles("stories260k", "fp"), ["hello"], print)
