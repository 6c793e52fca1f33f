"""Text as sequences: what is packed, in which order it comes, what is held out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lobit.errors import InputError
from lobit.quant_recipes.corpus import MOST_HELD_OUT, Corpus, pack

sizes = st.integers(1, 20)
seeds = st.integers(0, 2**64)


def corpus(count: int, seed: int = 0) -> Corpus:
    """Sequences that tell their number."""
    return Corpus(torch.arange(count, dtype=torch.int32)[:, None].repeat(1, 3), seed)


def numbers(found: Corpus | torch.Tensor) -> list[int]:
    return (found.sequences if isinstance(found, Corpus) else found)[:, 0].tolist()


@given(st.lists(st.lists(st.integers(0, 99), max_size=12), min_size=1, max_size=8), sizes)
def test_packed_sequences_are_the_documents_in_a_row(documents: list[list[int]], length: int) -> None:
    tokens = [token for document in documents for token in document]
    if len(tokens) < length + 1:
        with pytest.raises(InputError, match=f"the text has {len(tokens)} tokens, a sequence needs {length + 1}"):
            pack(documents, length)
        return
    packed = pack(documents, length)
    assert packed.length == length
    assert len(packed) == (len(tokens) - 1) // length
    for i, sequence in enumerate(packed.sequences.tolist()):
        assert sequence == tokens[i * length : (i + 1) * length + 1]


def test_every_token_but_the_first_is_predicted_once() -> None:
    packed = pack([list(range(11))], 5)
    assert packed.sequences.tolist() == [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]]
    assert packed.sequences[:, 1:].flatten().tolist() == list(range(1, 11))


@given(count=sizes, size=sizes, seed=seeds)
def test_every_time_through_each_sequence_comes_once(count: int, size: int, seed: int) -> None:
    whole = corpus(count, seed)
    seen = [number for step in range(3 * count) for number in numbers(whole.batch(step, size))]
    for epoch in range(len(seen) // count):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(count=sizes, sizes=st.tuples(sizes, sizes), seed=seeds)
def test_the_order_is_the_same_in_batches_of_any_size(count: int, sizes: tuple[int, int], seed: int) -> None:
    one, two = ([number for step in range(40) for number in numbers(corpus(count, seed).batch(step, size))] for size in sizes)
    shorter = min(len(one), len(two))
    assert one[:shorter] == two[:shorter]


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    torch.manual_seed(1)
    late = numbers(corpus(50, seed=3).batch(7, 4))
    torch.manual_seed(2)
    whole = corpus(50, seed=3)
    assert [numbers(whole.batch(step, 4)) for step in range(8)][7] == late
    assert numbers(whole.batch(7, 4)) == late
    assert numbers(corpus(50, seed=4).batch(7, 4)) != late


def test_each_time_through_and_each_seed_has_another_order() -> None:
    orders = {tuple(numbers(corpus(20, seed).batch(step, 20))) for seed in range(5) for step in range(5)}
    assert len(orders) == 25
    assert tuple(range(20)) not in orders


def test_a_batch_is_int64_and_may_be_larger_than_the_corpus() -> None:
    batch = corpus(3).batch(0, 7)
    assert batch.dtype == torch.int64
    assert sorted(numbers(batch[:3])) == sorted(numbers(batch[3:6])) == [0, 1, 2]


@given(count=st.integers(2, 400), share=st.floats(0, 1))
def test_a_split_gives_all_sequences_to_one_side(count: int, share: float) -> None:
    whole = corpus(count, seed=5)
    trained, held_out = whole.split(min(share, 1 - 1 / count))
    assert numbers(trained) + numbers(held_out) == list(range(count))
    assert 1 <= len(held_out) <= MOST_HELD_OUT / whole.length
    assert len(trained) >= 1
    assert trained.seed == held_out.seed == 5


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (20, 1), (100, 5), (100_000, MOST_HELD_OUT // 2)])
def test_the_last_share_is_held_out(count: int, held_out: int) -> None:
    assert numbers(corpus(count).split(0.05)[1]) == list(range(count - held_out, count))


def test_what_is_measured_is_bounded_and_spread_over_all() -> None:
    assert numbers(corpus(9).to_measure()) == list(range(9))
    measured = numbers(corpus(MOST_HELD_OUT).to_measure())
    assert measured == list(range(0, MOST_HELD_OUT, 2))
    assert len(Corpus(torch.zeros(3, 2 * MOST_HELD_OUT)).to_measure()) == 1


def test_one_sequence_is_not_enough_to_hold_some_out() -> None:
    with pytest.raises(InputError, match="the text gives 1 sequence of 2 tokens, and some must be held out") as error:
        corpus(1).split(0.05)
    assert "--held-out" in str(error.value) and "--length" in str(error.value)


def test_the_first_sequences_are_those_that_training_meets_first() -> None:
    whole = corpus(30, seed=9)
    assert numbers(whole.first(8)) == numbers(whole.batch(0, 8))
    assert sorted(numbers(whole.first(99))) == list(range(30))
    assert whole.first(8).seed == 9


def test_every_sequence_begins_as_a_text_does() -> None:
    short, other, long = [0, 5, 6, 7, 1], [0, 8, 9, 1], [0, *range(2, 17)]
    sequences = pack([short, other, long], 5, bos=0).sequences
    assert (sequences[:, 0] == 0).all()
    assert sequences.tolist() == [
        [0, 5, 6, 7, 1, 0],
        [0, 8, 9, 1, 0, 2],  # the next document begins in it, and is read from its beginning in the next sequence
        [0, 2, 3, 4, 5, 6],
        [0, 6, 7, 8, 9, 10],  # in the midst of a long document
        [0, 10, 11, 12, 13, 14],
    ]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), length=st.integers(2, 12))
def test_every_token_but_the_last_few_is_learned(lengths: list[int], length: int) -> None:
    documents, count = [], 1
    for size in lengths:
        documents.append([0, *range(count, count + size)])
        count += size
    if sum(map(len, documents)) <= length:
        return
    seen = set(pack(documents, length, bos=0).sequences[:, 1:].flatten().tolist())
    last = max(seen)
    assert set(range(1, last + 1)) <= seen and count - 1 - last <= length + len(documents)


def test_documents_without_bos_before_one_that_has_it_are_not_left_out() -> None:
    sequences = pack([list(range(2, 22)), [0, 22, 23]], 5, bos=0).sequences
    assert set(range(2, 20)) <= set(sequences.flatten().tolist())


@pytest.mark.parametrize(("length", "bos"), [(0, None), (1, 0), (-3, None)])
def test_sequences_without_room_for_text_are_refused(length: int, bos: int | None) -> None:
    with pytest.raises(InputError, match="no room for text"):
        pack([[0, 1, 2, 3, 4]], length, bos=bos)
