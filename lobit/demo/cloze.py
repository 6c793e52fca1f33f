"""A task from the demo's stories whose answers are certain: `python -m lobit.demo.cloze > cloze.jsonl`, for `lobit eval`.

A story is cut before something is named that it has named before: whose kite it was, who was asked, what stuck to the kitten's feet.
The choices are that and others of its kind, with which the grammar cannot go on. So the grammar itself answers all questions right, and
a model has to remember the story, most where what is named again lies far back.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass

from lobit.demo.grammar import Choice, Grammar, Piece, Story, emit
from lobit.demo.story import STORIES

CHOICES = 8


@dataclass(frozen=True)
class Cloze:
    """A story up to what is asked, the choices, and the place of the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int


def cloze(rng: random.Random, grammar: Grammar = STORIES) -> Cloze:
    """A question about a new story: of all that it names again, what was last named furthest back and has enough other choices."""
    while True:
        root = grammar.root
        story = rng.choices(root.options, root.shares)[0] if isinstance(root, Choice) else root
        assert isinstance(story, Story)
        told: list[Piece] = []
        emit(story, rng, {}, told)
        for place in _named_again(told, story):
            query, answer = "".join(piece.text for piece in told[:place]), told[place].text.removeprefix(" ")
            others = _impossible(grammar, story, query, told[place], rng)
            if len(others) == CHOICES - 1:
                choices = [answer, *others]
                rng.shuffle(choices)
                return Cloze(query, tuple(choices), choices.index(answer))


def _named_again(told: list[Piece], story: Story) -> list[int]:
    """Places of pieces that name what was named before, those first that were last named furthest back."""
    last: dict[str, int] = {}
    found: list[tuple[int, int]] = []
    length = 0
    for place, piece in enumerate(told):
        if piece.slot is not None and piece.text == " " + story.by_name[piece.slot].rows[piece.row]["name"]:
            if piece.slot in last:
                found.append((length - last[piece.slot], place))
            last[piece.slot] = length
        length += len(piece.text)
    return [place for _, place in sorted(found, reverse=True)]


def _impossible(grammar: Grammar, story: Story, query: str, asked: Piece, rng: random.Random) -> list[str]:
    """Names of other rows, at random, with which the grammar cannot go on."""
    assert asked.slot is not None
    rows = story.by_name[asked.slot].rows
    names = [row["name"] for number, row in enumerate(rows) if number != asked.row]
    found: list[str] = []
    for name in rng.sample(names, len(names)):
        if len(found) < CHOICES - 1 and not grammar.can_begin(f"{query} {name}"):
            found.append(name)
    return found


def task_text(items: int, seed: int) -> str:
    """Questions as JSON lines."""
    rng = random.Random(f"cloze {seed}")
    found = (cloze(rng) for _ in range(items))
    lines = ({"query": one.query, "choices": list(one.choices), "gold": one.gold} for one in found)
    return "".join(json.dumps(line) + "\n" for line in lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lobit.demo.cloze", description=__doc__)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(task_text(arguments.items, arguments.seed), end="")


if __name__ == "__main__":
    main()
