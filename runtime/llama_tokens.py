"""Which pre-tokenizer of llama.cpp cuts texts as a tokenizer does: `python -m lobit.runtime.llama_tokens`, JSON in, JSON out.

It is a process of its own, since llama.cpp may end it where a file is wrong. Asked: `{"path", "pre", "texts", "tokens"}`, the file of
a vocabulary, names of pre-tokenizers (null: the file's own), texts and the tokens that each should have. Answered: `{"pre", "text",
"found"}`: the first name with which all tokens are those, or null and the first text whose tokens differ with the last name.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lobit.runtime.llama_library import LlamaError, Model


def search(asked: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request.

    Raises:
        LlamaError: llama.cpp refuses the file whatever the name.
    """
    answer: dict[str, Any] = {"pre": None, "text": None, "found": None}
    error = None
    for name in asked["pre"]:
        try:
            model = Model(Path(asked["path"]), vocabulary=True, overrides={} if name is None else {"tokenizer.ggml.pre": name})
        except LlamaError as refused:
            error = refused
            continue
        pairs = zip(asked["texts"], asked["tokens"], strict=True)
        differing = next(((text, found) for text, tokens in pairs if (found := model.tokenize(text)) != tokens), None)
        if differing is None:
            return {"pre": name or "", "text": None, "found": None}
        answer = {"pre": None, "text": differing[0], "found": differing[1]}
    if answer["text"] is None and error is not None:
        raise error
    return answer


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the library prints must not come between
    try:
        json.dump(search(json.load(sys.stdin)), answers)
    except LlamaError as error:
        json.dump({"error": str(error)}, answers)
