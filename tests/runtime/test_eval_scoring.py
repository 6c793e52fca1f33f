"""Likelihoods: by rewinding as by whole sequences, and of the tokens that lm-evaluation-harness would ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobit import verbs
from lobit.checkpoint import load_model
from lobit.errors import BundleError, InputError
from lobit.quant_recipes.catalog import find_recipe
from lobit.runtime.bundle import open_bundle
from lobit.runtime.engine import Engine, SteppingEngine, open_engine
from lobit.runtime.eval_requests import Asked, Encoder, beginning_of, queries
from lobit.runtime.eval_scoring import Reader
from lobit.runtime.eval_tasks import Item, Task, read_task
from lobit.runtime.parity import log_softmax
from lobit.runtime.reference import ReferenceEngine
from lobit.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = 1e-4
"""Nats; float models whose sums come in another order."""
CONTEXT, VOCABULARY = 64, 8
ITEM = (
    Asked((1, 5, 9, 13, 17, 21), 2),
    Asked((1, 5, 9, 13, 40), 1),
    Asked((1, 5, 9, 13, 33, 34, 35, 36), 4),
    Asked((1, 41, 42), 2),  # another context, as without the question
)


def whole(engine: ReferenceEngine, asked: Asked) -> tuple[float, bool]:
    """The oracle: one reading of the whole sequence."""
    places = range(len(asked.tokens) - 1 - asked.count, len(asked.tokens) - 1)
    rows = engine.read(list(asked.tokens))(places)
    tokens = list(asked.continuation)
    return float(log_softmax(rows)[range(asked.count), tokens].sum()), bool((rows.argmax(axis=1) == tokens).all())


def assert_scores(engine: Engine, oracle: ReferenceEngine, item: Sequence[Asked] = ITEM, beginning: Sequence[int] = ()) -> None:
    reader = Reader(engine, beginning)
    for _ in range(2):
        found = reader.score(item)
        expected = [whole(oracle, asked) for asked in item]
        np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], rtol=0, atol=CLOSE)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.fixture
def oracle(models: Any) -> ReferenceEngine:
    return ReferenceEngine(load_model(models("stories260k")), context=CONTEXT)


def test_the_reference_rewound_gives_the_likelihoods_of_whole_sequences(oracle: ReferenceEngine) -> None:
    assert_scores(ReferenceEngine(oracle.model, context=CONTEXT), oracle)
    assert_scores(ReferenceEngine(oracle.model, context=CONTEXT), oracle, beginning=(1, 5))


@pytest.mark.parametrize("all_logits", [False, True])
def test_a_bundle_gives_the_likelihoods_of_its_model(all_logits: bool, models: Any, oracle: ReferenceEngine, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    options = {"context": CONTEXT, "chunk": 16, "all_logits": all_logits}
    verbs.export(str(models("stories260k")), "onnx", out, recipe=find_recipe("fp"), **options)
    assert_scores(open_engine(open_bundle(out), 1), oracle)


def test_a_bundle_of_xnnpack_gives_the_likelihoods_of_its_model(bundles: Any, oracle: ReferenceEngine) -> None:
    assert_scores(open_engine(open_bundle(bundles("stories260k", "fp")), 1), oracle)


def test_an_engine_that_cannot_be_rewound_reads_anew(oracle: ReferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ReferenceEngine(oracle.model, context=CONTEXT)
    monkeypatch.setattr(engine, "rewind", lambda position: False)
    assert_scores(engine, oracle)
    assert_scores(engine, oracle, beginning=(1, 5))


def logits_of(prefix: Sequence[int]) -> Any:
    """Logits that depend on every token before them."""
    return np.random.default_rng([len(prefix), *prefix]).normal(size=VOCABULARY).astype(np.float32)


class PrefixEngine(SteppingEngine):
    """An engine that would show any token that it read wrongly, twice or not at all."""

    def __init__(self, slots: int, all_logits: bool) -> None:
        super().__init__(self._read, CONTEXT, 3, VOCABULARY, slots, all_logits)
        self.tokens: list[int] = []

    def _read(self, tokens: list[int], position: int) -> Any:
        assert len(self.tokens) >= position
        self.tokens = self.tokens[:position] + tokens
        first = len(tokens) if not self.all_logits else 1
        return np.stack([logits_of(self.tokens[: position + count]) for count in range(first, len(tokens) + 1)])


@st.composite
def items(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[Asked]]]:
    """Items most of whose contexts begin alike, each with several continuations, some of them of other contexts."""
    tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5).map(tuple)
    beginning = draw(st.one_of(st.just(()), tokens))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        contexts = [begin + draw(tokens) for begin in draw(st.lists(st.sampled_from([beginning, ()]), min_size=1, max_size=2))]
        found.append([Asked(context + more, len(more)) for context in contexts for more in draw(st.lists(tokens, min_size=1, max_size=3))])
    return beginning, found


@given(items(), st.integers(1, CONTEXT), st.booleans())
def test_any_items_have_the_likelihoods_of_their_whole_sequences(
    drawn: tuple[tuple[int, ...], list[list[Asked]]], slots: int, all_logits: bool
) -> None:
    """Also where the cache is too short to be taken back."""
    beginning, found = drawn
    reader = Reader(PrefixEngine(slots, all_logits), beginning)
    for item in found:
        for asked, (value, greedy) in zip(item, reader.score(item), strict=True):
            starts = range(len(asked.tokens) - asked.count, len(asked.tokens))
            rows = np.stack([logits_of(asked.tokens[:start]) for start in starts])
            assert value == pytest.approx(log_softmax(rows)[range(asked.count), list(asked.continuation)].sum())
            assert greedy == (rows.argmax(axis=1) == asked.continuation).all()


def test_a_context_is_read_once_for_all_its_choices() -> None:
    calls: list[tuple[int, int]] = []

    def step(tokens: list[int], position: int) -> Any:
        calls.append((position, len(tokens)))
        return np.zeros((1, 8), np.float32)

    reader = Reader(SteppingEngine(step, 64, 32, 8))
    reader.score([Asked((1, 2, 3, 4), 1), Asked((1, 2, 3, 5), 1), Asked((1, 2, 3, 6, 7), 2)])
    assert calls == [(0, 3), (3, 1)]


def test_what_cannot_be_rewound_is_read_in_one_call_with_what_follows() -> None:
    calls: list[tuple[int, int]] = []

    def step(tokens: list[int], position: int) -> Any:
        calls.append((position, len(tokens)))
        return np.zeros((len(tokens), 8), np.float32)

    reader = Reader(SteppingEngine(step, 64, 32, 8, slots=4, all_logits=True))
    reader.score([Asked((1, 2, 3, 4, 5, last), 2) for last in (4, 5, 6)])
    assert calls == [(0, 4), (4, 1), (0, 5), (0, 5)]
    calls.clear()
    reader.score([Asked((1, 2, 3, 4, 5, 6), 2)])
    assert calls == [(0, 5)]


def test_examples_are_read_once_for_all_items() -> None:
    calls: list[tuple[int, int]] = []

    def step(tokens: list[int], position: int) -> Any:
        calls.append((position, len(tokens)))
        return np.zeros((1, 8), np.float32)

    reader = Reader(SteppingEngine(step, 64, 32, 8), beginning=(1, 2, 3))
    for last in (4, 5):
        reader.score([Asked((1, 2, 3, last, 6), 1)])
    reader.score([Asked((2, 2), 1)])  # one whose beginning was cut
    reader.score([Asked((1, 2, 3, 4, 6), 1)])
    assert calls == [(0, 3), (3, 1), (3, 1), (0, 1), (0, 3), (3, 1)]


def test_logits_that_are_no_numbers_are_refused() -> None:
    reader = Reader(SteppingEngine(lambda tokens, position: np.full((1, 8), np.nan, np.float32), 64, 32, 8))
    with pytest.raises(BundleError, match="no numbers"):
        reader.score([Asked((1, 2), 1)])


# --- texts as tokens -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(models: Any) -> Tokenizer:
    return Tokenizer.from_folder(models("stories260k"))


def test_context_and_continuation_are_encoded_together(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer, CONTEXT)
    asked = encoder.pair("Once upon a", " time")
    assert list(asked.tokens) == tokenizer.encode("Once upon a time")
    assert list(asked.context) == tokenizer.encode("Once upon a")
    assert encoder.pair("Once upon a  ", "time") == encoder.pair("Once upon a", "  time")


def test_an_empty_context_is_bos(tokenizer: Tokenizer) -> None:
    asked = Encoder(tokenizer, CONTEXT).pair("", " time")
    assert asked.context == (tokenizer.bos,) and list(asked.continuation) == tokenizer.encode(" time", bos=False)


def test_a_text_that_begins_with_bos_gets_no_second_one(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer, CONTEXT)
    assert encoder.encode("<s>Once") == tokenizer.encode("<s>Once", bos=False)
    assert encoder.encode("Once")[0] == tokenizer.bos


def test_a_long_context_loses_its_beginning_and_is_counted(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer, 8)
    asked = encoder.pair("one two three four five six seven eight nine", " ten")
    assert len(asked.tokens) == 9 and asked.cut > 0
    assert list(asked.tokens) == tokenizer.encode("one two three four five six seven eight nine ten")[-9:]


def test_a_choice_that_is_longer_than_the_context_is_refused_with_its_line(tokenizer: Tokenizer) -> None:
    item = Item(7, "Why?", ("no", "because of " * 20), 0)
    with pytest.raises(InputError, match=r"t\.jsonl line 7, choice 1: \d+ tokens are more than the context of 8"):
        queries(Task("t", Path("t.jsonl"), "", (item,), True), Encoder(tokenizer, 8))


@given(st.integers(1, 40), st.integers(1, 12))
def test_rolling_windows_ask_each_token_once_in_windows_as_full_as_they_can_be(count: int, context: int) -> None:
    encoder = Encoder.__new__(Encoder)
    encoder.context, encoder.prefix = context, 99
    windows, tokens = list(encoder.rolling(range(count))), [99, *range(count)]
    assert [token for window in windows for token in window.continuation] == list(range(count))
    asked = 0
    for window in windows:
        asked += window.count
        assert len(window.tokens) == min(context + 1, count + 1)
        assert list(window.tokens) == tokens[asked + 1 - len(window.tokens) : asked + 1]


@pytest.mark.parametrize("shots", [1, 3])
def test_every_context_begins_with_the_tokens_of_the_examples(shots: int, shared: Any, tokenizer: Tokenizer) -> None:
    """Also with a tokenizer that splits space otherwise where a word follows."""
    task = read_task(shared("tasks/arc_easy.jsonl")).with_shots(shots).first(20)
    for one in (tokenizer, Tokenizer.from_file(shared("tokenizers/smollm2.json"), bos=None, stop=[2], chat_template=None, special={})):
        encoder = Encoder(one, 4096)
        beginning = beginning_of(task, encoder)
        assert len(beginning) > 10 * shots
        contexts = [asked.context for query in queries(task, encoder) for asked in query.asked]
        assert all(context[: len(beginning)] == beginning for context in contexts)
    assert beginning_of(replace(task, examples=""), encoder) == ()
