"""Which pre-tokenizer of llama.cpp cuts texts as a tokenizer does: `python -m lobit.runtime.llama_tokens`, JSON in, JSON out.

It is a process of its own, since llama.cpp may end it where a file is wrong. Asked: `{"path", "pre", "texts", "tokens", "stop"}`, the
file of a vocabulary, names of pre-tokenizers (null: the file's own), texts and the tokens that each should have, tokens that end a
text. Answered: `{"pre", "runs_on"}`, the first name with which all tokens are those, and the tokens of `stop` that end no text for
llama.cpp; or `{"text", "found"}`, the first text whose tokens differ with the last name; `{"error"}`, why llama.cpp refuses the file
whatever the name; `{"missing"}`, why there is no llama.cpp.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from lobit.errors import MissingPartError
from lobit.runtime.llama_library import LlamaError, Model


def search(asked: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    answer: dict[str, Any] = {}
    for name in asked["pre"]:
        overrides = {} if name is None else {"tokenizer.ggml.pre": name}
        try:
            with closing(Model(Path(asked["path"]), vocabulary=True, overrides=overrides)) as model:
                pairs = ((text, tokens, model.tokenize(text)) for text, tokens in zip(asked["texts"], asked["tokens"], strict=True))
                differing = next(({"text": text, "found": found} for text, tokens, found in pairs if found != tokens), None)
                if differing is None:
                    return {"pre": name or "", "runs_on": [token for token in asked["stop"] if not model.ends(token)]}
            answer = differing
        except LlamaError as error:
            answer = answer or {"error": str(error)}
    return answer


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the library prints must not come between
    try:
        json.dump(search(json.load(sys.stdin)), answers)
    except MissingPartError as error:
        json.dump({"missing": str(error)}, answers)
