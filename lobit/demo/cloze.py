"""A task from the demo's stories whose answers are certain: `python -m lobit.demo.cloze > cloze.jsonl`, for `lobit eval`.

A story is cut before something is named that it has named before: whose kite it was, who was asked, what stuck to the kitten's feet.
The choices are that and others of its kind, with which the grammar cannot go on. So the grammar itself answers all questions right, and
a model has to remember the story, most where what is named again lies far back.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from lobit.demo.grammar import Bound, Choice, Field, Grammar, Node, Sequence, Story, Text, _draw
from lobit.demo.story import STORIES

CHOICES = 8


@dataclass(frozen=True)
class Piece:
    """A piece of a story.

    Attributes:
        text: with the space before its first word.
        named: the slot whose row it names; None: it names none.
        row: that row's number.
    """

    text: str
    named: str | None = None
    row: int = 0


@dataclass(frozen=True)
class Cloze:
    """A story up to what is asked, the choices, and the place of the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int


def pieces(node: Node, rng: random.Random, bound: Bound, story: Story | None = None) -> Iterator[Piece]:
    """Draws a text, piece by piece, with what each names."""
    match node:
        case Text():
            yield Piece(node.text)
        case Sequence():
            for part in node.parts:
                yield from pieces(part, rng, bound, story)
        case Choice():
            (index,) = rng.choices(range(len(node.options)), node.shares)
            yield from pieces(node.options[index], rng, bound, story)
        case Field():
            row = bound[node.slot]
            told = node.nodes[row]
            if isinstance(told, Text) and story is not None and told.text == " " + story.by_name[node.slot].rows[row]["name"]:
                yield Piece(told.text, node.slot, row)
            else:
                yield from pieces(told, rng, bound, story)
        case Story():
            yield from pieces(node.body, rng, _draw(node, rng), node)


def can_begin(grammar: Grammar, text: str) -> bool:
    """Whether the grammar may give a text that begins so; never false where it may."""
    return any(end == len(text) for end, _ in _begun(grammar.root, text, 0, {}))


def _begun(node: Node, text: str, start: int, bound: Bound) -> Iterator[tuple[int, Bound]]:
    """Yields each end that the node can reach from `start`, and the slots known by then; a node that goes on after the text ends there."""
    if start == len(text):
        yield start, bound
        return
    match node:
        case Text():
            if text.startswith(node.text, start):
                yield start + len(node.text), bound
            elif node.text.startswith(text[start:]):
                yield len(text), bound
        case Sequence():
            yield from _begun_parts(node.parts, text, start, bound)
        case Choice():
            for option in node.options:
                yield from _begun(option, text, start, bound)
        case Field():
            for row in (bound[node.slot],) if node.slot in bound else range(len(node.nodes)):
                yield from _begun(node.nodes[row], text, start, {**bound, node.slot: row})
        case Story():
            for end, known in _begun(node.body, text, start, {}):
                if all(node.share(slot, known) > 0 for slot in node.slots if {slot.name, slot.parent or slot.name} <= known.keys()):
                    yield end, {}


def _begun_parts(parts: tuple[Node, ...], text: str, start: int, bound: Bound) -> Iterator[tuple[int, Bound]]:
    """Yields the same for nodes that follow one another."""
    if not parts:
        yield start, bound
        return
    for middle, known in _begun(parts[0], text, start, bound):
        yield from _begun_parts(parts[1:], text, middle, known)


def cloze(rng: random.Random, grammar: Grammar = STORIES) -> Cloze:
    """A question about a new story: of all that it names again, what was last named furthest back and has enough other choices."""
    while True:
        root = grammar.root
        story = rng.choices(root.options, root.shares)[0] if isinstance(root, Choice) else root
        assert isinstance(story, Story)
        told = list(pieces(story, rng, {}))
        for place in _named_again(told):
            query, answer = "".join(piece.text for piece in told[:place]), told[place].text.removeprefix(" ")
            others = _impossible(grammar, story, query, told[place], rng)
            if len(others) == CHOICES - 1:
                choices = [answer, *others]
                rng.shuffle(choices)
                return Cloze(query, tuple(choices), choices.index(answer))


def _named_again(told: list[Piece]) -> list[int]:
    """Places of pieces that name what was named before, those first that were last named furthest back."""
    last: dict[str, int] = {}
    found: list[tuple[int, int]] = []
    length = 0
    for place, piece in enumerate(told):
        if piece.named is not None:
            if piece.named in last:
                found.append((length - last[piece.named], place))
            last[piece.named] = length
        length += len(piece.text)
    return [place for _, place in sorted(found, reverse=True)]


def _impossible(grammar: Grammar, story: Story, query: str, asked: Piece, rng: random.Random) -> list[str]:
    """Names of other rows, at random, with which the grammar cannot go on."""
    assert asked.named is not None
    rows = story.by_name[asked.named].rows
    names = [row["name"] for number, row in enumerate(rows) if number != asked.row]
    found: list[str] = []
    for name in rng.sample(names, len(names)):
        if len(found) < CHOICES - 1 and not can_begin(grammar, f"{query} {name}"):
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
