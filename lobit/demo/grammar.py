"""A probabilistic grammar of texts whose entropy is computed, not estimated.

A grammar is a tree of five kinds of node. Its leaves are pieces of text; a `Choice` draws one of its options; a `Story`
draws its *slots* (a name, an object, a colour …) once, and every `Field` below it says something of what was drawn, so
that the same name or object comes back all through a text.

One tree serves three readers: `emit` walks it at random, `parse` finds every way in which it gives a text, or a text's beginning, and
`mean` computes the expectation of anything that adds up along a derivation. The surprise of the draws is such a thing,
so the entropy is exact; so is the number of tokens, for a tokenizer that never merges across the pieces.

If every text has exactly one derivation, then P(text) = P(derivation), and the entropy of the derivations is the
entropy of the texts. Write grammars so; `derivations` shows where one is not.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import product

Bound = Mapping[str, int]
"""Slot name → the number of the row that was drawn."""

Row = Mapping[str, str]
"""One value that a slot may take: field name → what is said of it."""


@dataclass(frozen=True, eq=False)
class Slot:
    """Something drawn once in a text and spoken of several times.

    Attributes:
        name: how templates call it.
        rows: the values it may take, all equally likely but for `fits`.
        parent: the name of a slot drawn earlier, on which this one depends; empty where there is none.
        fits: whether a row may go with a row of the parent; the rows that may are equally likely.
    """

    name: str
    rows: tuple[Row, ...]
    parent: str = ""
    fits: Callable[[Row, Row], bool] = lambda row, parent: True


@dataclass(frozen=True, eq=False)
class Text:
    """A piece of text, always the same."""

    text: str


@dataclass(frozen=True, eq=False)
class Sequence:
    """Its parts, one after the other."""

    parts: tuple["Node", ...]


@dataclass(frozen=True, eq=False)
class Choice:
    """One of its options, drawn anew each time; the weights need not add up to one."""

    weights: tuple[float, ...]
    options: tuple["Node", ...]

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """The probability of each option."""
        return tuple(weight / sum(self.weights) for weight in self.weights)


@dataclass(frozen=True, eq=False)
class Field:
    """Says something of the row that a slot has drawn: it has one node for each row."""

    slot: str
    nodes: tuple["Node", ...]


@dataclass(frozen=True, eq=False)
class Story:
    """Draws its slots, in order, then tells its body, which must name each of them whatever else it draws."""

    slots: tuple[Slot, ...]
    body: "Node"

    @cached_property
    def by_name(self) -> dict[str, Slot]:
        """The slots by their names."""
        return {slot.name: slot for slot in self.slots}

    def share(self, slot: Slot, bound: Bound) -> float:
        """The probability of a slot's row, given its parent's."""
        return self.row_shares(slot, bound.get(slot.parent, 0))[bound[slot.name]]

    @cache  # noqa: B019  grammars live as long as the program
    def row_shares(self, slot: Slot, parent_row: int) -> tuple[float, ...]:
        """The probability of each row of a slot, given the row of its parent."""
        parent = self.by_name[slot.parent].rows[parent_row] if slot.parent else {}
        fits = [slot.fits(row, parent) for row in slot.rows]
        if not any(fits):
            raise ValueError(f"no row of slot {slot.name!r} fits {dict(parent)}")
        return tuple(fit / sum(fits) for fit in fits)

    def lineage(self, name: str) -> list[Slot]:
        """The slot and those it depends on, the eldest first."""
        slot = self.by_name[name]
        return [*(self.lineage(slot.parent) if slot.parent else []), slot]

    @cache  # noqa: B019  grammars live as long as the program
    def posterior(self, name: str, given: tuple[tuple[str, int], ...]) -> tuple[float, ...]:
        """The probability of each row of a slot when some slots are known, by summing over what is unknown."""
        own = {slot.name for slot in self.lineage(name)}
        related = {key: row for key, row in given if own & {slot.name for slot in self.lineage(key)}}
        slots = {slot.name: slot for key in (name, *related) for slot in self.lineage(key)}
        shares = [0.0] * len(self.by_name[name].rows)
        for rows in product(*([related[key]] if key in related else range(len(slots[key].rows)) for key in slots)):
            bound = dict(zip(slots, rows, strict=True))
            shares[bound[name]] += math.prod(self.share(slot, bound) for slot in slots.values())
        return tuple(share / sum(shares) for share in shares)


Node = Text | Sequence | Choice | Field | Story


@dataclass(frozen=True)
class Piece:
    """A piece of a text that was drawn.

    Attributes:
        text: with the space before its first word.
        slot: the slot that it says something of; None: it always says the same.
        row: the number of that slot's row.
    """

    text: str
    slot: str | None = None
    row: int = 0


@dataclass(frozen=True)
class Sample:
    """A text drawn from a grammar: its pieces, and the log-probability of the draws in nats."""

    pieces: tuple[str, ...]
    log_prob: float

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)


def sample(node: Node, rng: random.Random) -> Sample:
    """Draws a text."""
    pieces: list[Piece] = []
    log_prob = emit(node, rng, {}, pieces)
    return Sample(tuple(piece.text for piece in pieces), log_prob)


def emit(node: Node, rng: random.Random, bound: Bound, pieces: list[Piece]) -> float:
    """Appends the pieces of the node's text to `pieces`; returns the log-probability of what it drew."""
    match node:
        case Text():
            pieces.append(Piece(node.text))
            return 0.0
        case Sequence():
            return sum(emit(part, rng, bound, pieces) for part in node.parts)
        case Choice():
            (index,) = rng.choices(range(len(node.options)), node.shares)
            return math.log(node.shares[index]) + emit(node.options[index], rng, bound, pieces)
        case Field():
            row = bound[node.slot]
            said = node.nodes[row]
            if isinstance(said, Text):
                pieces.append(Piece(said.text, node.slot, row))
                return 0.0
            return emit(said, rng, bound, pieces)
        case Story():
            drawn = _draw(node, rng)
            log_prob = sum(math.log(node.share(slot, drawn)) for slot in node.slots)
            return log_prob + emit(node.body, rng, drawn, pieces)


def _draw(story: Story, rng: random.Random) -> dict[str, int]:
    """Draws a row for each slot of a story."""
    drawn: dict[str, int] = {}
    for slot in story.slots:
        shares = story.row_shares(slot, drawn.get(slot.parent, 0))
        (drawn[slot.name],) = rng.choices(range(len(slot.rows)), shares)
    return drawn


def derivations(node: Node, text: str) -> list[float]:
    """The log-probability of each way in which the grammar gives this text; one entry if it is unambiguous."""
    return [log_prob for end, _, log_prob in parse(node, text, 0, {}) if end == len(text)]


def parse(node: Node, text: str, start: int, bound: Bound, partial: bool = False) -> Iterator[tuple[int, Bound, float]]:
    """Yields each end that the node can reach from `start`, the slots known by then, and the log-probability; unknown slots are guessed.

    Args:
        node: what is to give the text.
        text: the text.
        start: where in the text the node begins.
        bound: the slots that are known.
        partial: whether the text may end before the node does. A node that goes on after the text then ends there, slots that are not
            named by then stay open, and the log-probability is that of the draws up to there.
    """
    if partial and start == len(text):
        yield start, bound, 0.0
        return
    match node:
        case Text():
            if text.startswith(node.text, start):
                yield start + len(node.text), bound, 0.0
            elif partial and node.text.startswith(text[start:]):
                yield len(text), bound, 0.0
        case Sequence():
            yield from _parse_parts(node.parts, text, start, bound, partial)
        case Choice():
            for option, share in zip(node.options, node.shares, strict=True):
                for end, known, log_prob in parse(option, text, start, bound, partial):
                    yield end, known, log_prob + math.log(share)
        case Field():
            rows = (bound[node.slot],) if node.slot in bound else range(len(node.nodes))
            for row in rows:
                yield from parse(node.nodes[row], text, start, {**bound, node.slot: row}, partial)
        case Story():
            for end, known, log_prob in parse(node.body, text, start, {}, partial):
                for completed in [known] if partial else _completions(node, known):
                    named = [slot for slot in node.slots if {slot.name, slot.parent or slot.name} <= completed.keys()]
                    share = math.prod(node.share(slot, completed) for slot in named)
                    if share > 0:
                        yield end, {}, log_prob + math.log(share)


def _parse_parts(parts: tuple[Node, ...], text: str, start: int, bound: Bound, partial: bool) -> Iterator[tuple[int, Bound, float]]:
    """Yields the same for nodes that follow one another."""
    if not parts:
        yield start, bound, 0.0
        return
    for middle, known, head in parse(parts[0], text, start, bound, partial):
        for end, final, tail in _parse_parts(parts[1:], text, middle, known, partial):
            yield end, final, head + tail


def _completions(story: Story, known: Bound) -> Iterator[Bound]:
    """Every way to fill the slots that a text has left open; only one if it names them all."""
    open_slots = [slot for slot in story.slots if slot.name not in known]
    for rows in product(*(range(len(slot.rows)) for slot in open_slots)):
        yield {**known, **{slot.name: row for slot, row in zip(open_slots, rows, strict=True)}}


@dataclass(frozen=True)
class Measure:
    """A quantity that adds up along a derivation: a term for each piece of text, and one for the probability of each draw."""

    of_text: Callable[[str], float]
    of_draw: Callable[[float], float]


SURPRISE = Measure(of_text=lambda text: 0.0, of_draw=lambda share: -math.log(share))
"""The surprise of a text's draws in nats; its mean is the entropy."""


def mean(node: Node, measure: Measure, story: Story | None = None, given: Bound | None = None) -> float:
    """The exact expectation of a measure over the node's derivations.

    By linearity each node is visited once in each *context*: the slots whose rows were fixed by the fields on the way
    to it. The other slots are summed out there (`Story.posterior`), so nothing enumerates whole texts.
    """
    given = given or {}
    match node:
        case Text():
            return measure.of_text(node.text)
        case Sequence():
            return sum(mean(part, measure, story, given) for part in node.parts)
        case Choice():
            pairs = zip(node.shares, node.options, strict=True)
            return sum(share * (measure.of_draw(share) + mean(option, measure, story, given)) for share, option in pairs)
        case Field():
            if story is None:
                raise ValueError(f"slot {node.slot!r} is spoken of outside the story that draws it")
            if node.slot in given:
                return mean(node.nodes[given[node.slot]], measure, story, given)
            shares = story.posterior(node.slot, tuple(sorted(given.items())))
            likely = [(row, share) for row, share in enumerate(shares) if share > 0]
            return sum(share * mean(node.nodes[row], measure, story, {**given, node.slot: row}) for row, share in likely)
        case Story():
            return sum(_mean_draw(node, slot, measure) for slot in node.slots) + mean(node.body, measure, node, {})


def _mean_draw(story: Story, slot: Slot, measure: Measure) -> float:
    """The expectation of a measure over the draw of one slot."""
    parent_shares = story.posterior(slot.parent, ()) if slot.parent else (1.0,)
    rows = [(row, share) for row, share in enumerate(parent_shares) if share > 0]
    own = [(outer, share) for row, outer in rows for share in story.row_shares(slot, row) if share > 0]
    return sum(outer * share * measure.of_draw(share) for outer, share in own)


@dataclass(frozen=True, eq=False)
class Grammar:
    """A grammar, given by its root, with what other modules compute of it."""

    root: Node

    def sample(self, rng: random.Random) -> Sample:
        """Draws a text and its log-probability (nats)."""
        return sample(self.root, rng)

    def log_prob(self, text: str) -> float:
        """The log-probability of a text in nats, summed over its derivations.

        Raises:
            ValueError: the grammar does not give this text.
        """
        ways = derivations(self.root, text)
        if not ways:
            raise ValueError(f"the grammar does not give this text: {text[:80]!r}")
        return max(ways) + math.log(sum(math.exp(way - max(ways)) for way in ways))

    def can_begin(self, text: str) -> bool:
        """Whether the grammar may give a text that begins so; never false where it may."""
        return any(end == len(text) for end, _, _ in parse(self.root, text, 0, {}, partial=True))

    def entropy(self) -> float:
        """The exact entropy of a text in nats, if no text has two derivations."""
        return mean(self.root, SURPRISE)

    def expected_tokens(self, count: Callable[[str], int]) -> float:
        """The exact mean length of a text in tokens.

        Args:
            count: the number of tokens of a piece of text, which must not depend on the pieces around it.
        """
        return mean(self.root, Measure(of_text=lru_cache(maxsize=None)(count), of_draw=lambda share: 0.0))

    def entropy_per_token(self, count: Callable[[str], int]) -> float:
        """Nats per predicted token, over the tokens of a text and the one that ends it: no model does better."""
        return self.entropy() / (self.expected_tokens(count) + 1)
