"""The notation in which the stories are written, and its reader.

    {hero.him}     what slot `hero` has in its field `him`; `{hero}` is its field `name`
    {thanks}       one of the templates of the rule `thanks`, where no slot has that name
    [red|2:blue]   one of these, blue twice as likely; they nest, and may hold anything that a template holds

A space before braces or brackets belongs to the word that follows it, so that no word is ever cut between two pieces.
"""

import re
from collections.abc import Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass

from lobit.demo.grammar import Choice, Field, Node, Sequence, Slot, Story, Text

Rules = Mapping[str, Listing[str]]

_MARK = re.compile(r"[{}\[\]|]")
_WEIGHT = re.compile(r"(\d+):")


def story(slots: Listing[Slot], rules: Rules, body: str) -> Story:
    """Reads a story: its slots in the order in which they are drawn, the rules that it may use, its body."""
    return Story(tuple(slots), _Reader({slot.name: slot for slot in slots}, rules).template(body))


def choice(weighted: Listing[tuple[float, Node]]) -> Node:
    """A choice between nodes, or the node itself where there is only one."""
    if len(weighted) == 1:
        return weighted[0][1]
    return Choice(tuple(weight for weight, _ in weighted), tuple(node for _, node in weighted))


def lead(node: Node) -> Node:
    """The same node with a space before its first word."""
    match node:
        case Text():
            return Text(" " + node.text)
        case Sequence():
            return Sequence((lead(node.parts[0]), *node.parts[1:]))
        case Choice():
            return Choice(node.weights, tuple(lead(option) for option in node.options))
        case Field():
            return Field(node.slot, tuple(lead(row) for row in node.nodes))
        case Story():
            return Story(node.slots, lead(node.body))


@dataclass(frozen=True)
class _Reader:
    """Turns templates into nodes."""

    slots: Mapping[str, Slot]
    rules: Rules

    def template(self, text: str) -> Node:
        """Reads a whole template."""
        node, end = self._sequence(text, 0)
        if end != len(text):
            raise ValueError(f"{text[end]!r} closes nothing in {text!r}")
        return node

    def _sequence(self, text: str, start: int) -> tuple[Node, int]:
        """Reads up to a mark that closes an option, or to the end; returns where it stopped."""
        parts: list[Node] = []
        while mark := _MARK.search(text, start):
            if mark[0] in "]|}":
                break
            literal = text[start : mark.start()]
            node, end = self._braces(text, mark.end()) if mark[0] == "{" else self._brackets(text, mark.end())
            parts += [Text(literal.removesuffix(" "))] if literal.removesuffix(" ") else []
            parts.append(lead(node) if literal.endswith(" ") else node)
            start = end
        stop = mark.start() if mark else len(text)
        if start < stop or not parts:
            parts.append(Text(text[start:stop]))
        return (parts[0] if len(parts) == 1 else Sequence(tuple(parts))), stop

    def _brackets(self, text: str, start: int) -> tuple[Node, int]:
        """Reads options after a `[`; returns the place after the `]`."""
        weighted: list[tuple[float, Node]] = []
        while True:
            weight = _WEIGHT.match(text, start)
            node, end = self._sequence(text, weight.end() if weight else start)
            weighted.append((float(weight[1]) if weight else 1.0, node))
            if text[end : end + 1] == "]":
                return choice(weighted), end + 1
            if text[end : end + 1] != "|":
                raise ValueError(f"a bracket is not closed in {text!r}")
            start = end + 1

    def _braces(self, text: str, start: int) -> tuple[Node, int]:
        """Reads a name after a `{`; returns the place after the `}`."""
        end = text.index("}", start)
        name, _, field = text[start:end].partition(".")
        if name in self.slots and name in self.rules:
            raise KeyError(f"{name!r} is both a slot and a rule")
        if name in self.slots:
            rows = self.slots[name].rows
            return Field(name, tuple(self.template(row[field or "name"]) for row in rows)), end + 1
        if field or name not in self.rules:
            raise KeyError(f"{text[start:end]!r} is neither a slot nor a rule, in {text!r}")
        return self._brackets("|".join(self.rules[name]) + "]", 0)[0], end + 1
