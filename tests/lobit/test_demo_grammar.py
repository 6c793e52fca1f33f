"""The stories' grammar: what it computes is exact, and what it tells holds together."""

import math
import random
import re
import statistics
from collections.abc import Iterator
from functools import partial
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lobit.demo import held_out_stories, held_out_text
from lobit.demo.grammar import Choice, Field, Grammar, Node, Sample, Sequence, Slot, Story, Text, derivations
from lobit.demo.story import COMMON, SHAPES, SLOTS, STORIES
from lobit.demo.template import lead, story
from lobit.demo.train import Plan
from lobit.demo.vocabulary import count, make_tokenizer

SAMPLES = 3000
ERRORS = 4
"""Standard errors by which a sampled mean may miss the exact one: by chance, once in sixteen thousand times."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer(768, seed=0, stories=1500)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    rng = random.Random(3)
    return [STORIES.sample(rng) for _ in range(SAMPLES)]


def outcomes(node: Node, bound: dict[str, int] | None = None) -> Iterator[tuple[str, float]]:
    """Every text of a small grammar with its probability, by brute force."""
    bound = bound or {}
    match node:
        case Text():
            yield node.text, 1.0
        case Sequence():
            for parts in product(*(list(outcomes(part, bound)) for part in node.parts)):
                yield "".join(text for text, _ in parts), math.prod(share for _, share in parts)
        case Choice():
            for share, option in zip(node.shares, node.options, strict=True):
                yield from ((text, share * inner) for text, inner in outcomes(option, bound))
        case Field():
            yield from outcomes(node.nodes[bound[node.slot]], bound)
        case Story():
            for rows in product(*(range(len(slot.rows)) for slot in node.slots)):
                drawn = dict(zip((slot.name for slot in node.slots), rows, strict=True))
                share = math.prod(node.share(slot, drawn) for slot in node.slots)
                yield from ((text, share * inner) for text, inner in outcomes(node.body, drawn) if share)


def tiny(weight: int) -> Story:
    """A grammar of a few dozen texts with everything in it: a dependent slot, a field with a choice and another slot."""
    who = Slot("who", ({"name": "Ann", "does": "ran"}, {"name": "Bo", "does": "[sat by {pal}|hid]"}))
    pal = Slot("pal", ({"name": "Ann"}, {"name": "Bo"}, {"name": "Cy"}), "who", lambda row, of: row["name"] != of["name"])
    rules = {"end": ("2:for {who}", "alone", f"{weight}:with {{pal}} and [Di|3:Ed|Flo Grey]")}
    return story([who, pal], rules, "{pal} saw {who} who {who.does} {end}.")


@given(weight=st.integers(1, 50))
@settings(max_examples=20, deadline=None)
def test_entropy_of_a_tiny_grammar_equals_enumeration(weight: int) -> None:
    root = tiny(weight)
    shares = [share for _, share in outcomes(root)]
    assert sum(shares) == pytest.approx(1)
    assert Grammar(root).entropy() == pytest.approx(-sum(share * math.log(share) for share in shares), rel=1e-12)


@given(weight=st.integers(1, 50))
@settings(max_examples=20, deadline=None)
def test_expected_length_of_a_tiny_grammar_equals_enumeration(weight: int) -> None:
    root = tiny(weight)
    assert Grammar(root).expected_tokens(len) == pytest.approx(sum(share * len(text) for text, share in outcomes(root)))


def test_log_prob_of_a_tiny_grammar_equals_enumeration() -> None:
    root = tiny(3)
    texts = dict(outcomes(root))
    for text, share in texts.items():
        assert Grammar(root).log_prob(text) == pytest.approx(math.log(share))


def test_ambiguity_is_seen() -> None:
    root = Choice((1.0, 3.0), (Text("a b"), Sequence((Text("a"), Text(" b")))))
    assert len(derivations(root, "a b")) == 2
    assert Grammar(root).log_prob("a b") == pytest.approx(0)


def test_a_slot_that_is_never_named_is_seen_as_ambiguity() -> None:
    root = story([Slot("hidden", ({"name": "x"}, {"name": "y"}))], {}, "nothing of it")
    assert len(derivations(root, "nothing of it")) == 2


def test_entropy_equals_the_mean_surprise_of_samples(samples: list[Sample]) -> None:
    surprises = [-sample.log_prob for sample in samples]
    error = statistics.stdev(surprises) / math.sqrt(len(surprises))
    assert abs(statistics.mean(surprises) - STORIES.entropy()) < ERRORS * error


def test_every_story_has_one_derivation_with_the_sampled_probability(
    samples: list[Sample],
) -> None:
    for sample in samples[:1000]:
        (only,) = derivations(STORIES.root, sample.text)
        assert only == pytest.approx(sample.log_prob, abs=1e-9)


def test_expected_tokens_equal_the_mean_of_samples(samples: list[Sample], tokenizer: Tokenizer) -> None:
    lengths = [count(tokenizer, sample.text) for sample in samples]
    error = statistics.stdev(lengths) / math.sqrt(len(lengths))
    assert abs(statistics.mean(lengths) - STORIES.expected_tokens(partial(count, tokenizer))) < ERRORS * error


def test_no_token_reaches_over_the_edge_of_a_piece(samples: list[Sample], tokenizer: Tokenizer) -> None:
    for sample in samples:
        assert sum(count(tokenizer, piece) for piece in sample.pieces) == count(tokenizer, sample.text)


def test_no_token_holds_two_words(tokenizer: Tokenizer) -> None:
    for token in tokenizer.get_vocab():
        assert re.fullmatch(r"<\|\w+\|>|Ġ?[^Ġ]*", token)


@given(text=st.text(max_size=60))
@settings(deadline=None)
def test_every_text_comes_back_from_its_tokens(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_stories_are_of_a_reasonable_length(samples: list[Sample], tokenizer: Tokenizer) -> None:
    lengths = [count(tokenizer, sample.text) for sample in samples]
    assert min(lengths) > 80 and max(lengths) + 2 <= Plan.row_tokens


def test_stories_do_not_repeat(samples: list[Sample]) -> None:
    assert len({sample.text for sample in samples}) == len(samples)


@pytest.mark.parametrize("shape", SHAPES)
def test_pronouns_agree_with_the_hero(shape: str) -> None:
    rng, grammar = random.Random(5), Grammar(SHAPES[shape])
    heroes = {row["name"]: row for row in SLOTS["hero"].rows}
    for _ in range(100):
        text = grammar.sample(rng).text
        opening, scene = re.findall(r"[^.]*\.", text)[:2]
        (hero,) = [heroes[word] for word in re.findall(r"\w+", opening) if word in heroes]
        said = set(re.findall(r"\b(he|she|his|her)\b", scene))
        assert hero["child"] in text
        assert said <= {hero["he"], hero["his"]}


def test_the_articles_agree(samples: list[Sample]) -> None:
    for text in (sample.text for sample in samples):
        assert not re.search(r"\b[Aa] (?:[aeiou]|honest)|\b[Aa]n (?![aeiou]|honest)", text)


def test_text_is_plain_and_well_spaced(samples: list[Sample]) -> None:
    for text in (sample.text for sample in samples):
        assert text.isascii() and text.count('"') % 2 == 0
        assert not re.search(r"  |\s[.,!?]|[{}\[\]|]|[.!?] ?[a-z]", re.sub(r'[!?]" [a-z]', '" x', text))


def test_a_rule_with_the_name_of_a_slot_is_refused() -> None:
    with pytest.raises(KeyError, match="both a slot and a rule"):
        story([SLOTS["fear"]], {"fear": ("x",)}, "{fear}")


@pytest.mark.parametrize("template", ["[a|b", "a]", "{nobody}", "{hero.shoe}"])
def test_a_broken_template_is_refused(template: str) -> None:
    with pytest.raises((KeyError, ValueError)):
        story([SLOTS["hero"]], COMMON, template)


def test_a_space_goes_to_the_first_word() -> None:
    hero = SLOTS["hero"]
    body = story([hero], {}, "[a|b] c {hero}").body
    texts = {text for text, _ in outcomes(Story((hero,), lead(body)))}
    assert all(text.startswith((" a c ", " b c ")) for text in texts)


def test_held_out_stories_are_the_same_for_a_seed() -> None:
    assert held_out_stories(3, seed=1) == held_out_stories(3, seed=1) != held_out_stories(3, seed=2)
    assert held_out_text(3, seed=1).count("<|end|><|begin|>") == 2
