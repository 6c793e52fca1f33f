"""Accuracy of the ablation's models on a task whose answers the demo's grammar is certain of."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

from lobit.demo import FOLDER
from lobit.demo.cloze import cloze
from lobit.model import Transformer
from lobit.quant_recipes.recipe import Recipe
from lobit.runtime.eval_metrics import answers
from lobit.runtime.eval_requests import Encoder, Query, queries
from lobit.runtime.eval_scoring import Reader
from lobit.runtime.eval_tasks import Item, Task
from lobit.runtime.reference import ReferenceEngine
from lobit.tokenizer import Tokenizer

ITEMS = 300
"""Questions: a share of 95 % then has a standard error of 1.3 points."""
CONTEXT = 512
"""Tokens, more than any story has."""


def cloze_accuracy(model: Transformer, recipe: Recipe) -> float:
    """The share of questions about stories that a converted model answers right."""
    task, found = _questions()
    reader = Reader(ReferenceEngine(model, recipe, CONTEXT))
    return float(answers(task, [reader.score(query.asked) for query in found])["accuracy"].mean())


@cache
def _questions() -> tuple[Task, list[Query]]:
    rng = random.Random("ablation cloze")
    drawn = [cloze(rng) for _ in range(ITEMS)]
    items = tuple(Item(line, one.query, one.choices, one.gold) for line, one in enumerate(drawn, 1))
    task = Task("cloze", Path("cloze.jsonl"), "", items, is_choice=True)
    return task, queries(task, Encoder(Tokenizer.from_folder(FOLDER), CONTEXT))
