"""Generation: which token is chosen, where it ends, and what a conversation reads again."""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobit.errors import BundleError, InputError
from lobit.runtime.engine import Logits, SteppingEngine
from lobit.runtime.generate import Chat, Sampler, Sampling, generate
from lobit.tokenizer import Tokenizer

VOCAB = 64
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IM_END = 2


class HistoryEngine(SteppingEngine):
    """Its logits depend on every token read, so a cache that holds the wrong ones gives other tokens."""

    def __init__(self, context: int = 40, vocab_size: int = VOCAB) -> None:
        super().__init__(self.read, context, 16, vocab_size)
        self.history: list[int] = []
        self.reads: list[int] = []
        """Tokens of each step."""

    def read(self, tokens: list[int], position: int) -> Logits:
        self.history = self.history[:position] + tokens
        self.reads.append(len(tokens))
        return self.logits()[None]

    def logits(self) -> Logits:
        return np.random.default_rng(self.history).normal(size=self.vocab_size).astype(np.float32)


class ScriptedEngine(HistoryEngine):
    """Gives the answers it was told to, each followed by a stop token."""

    def __init__(self, tokenizer: Tokenizer, answers: list[str], context: int = 400) -> None:
        super().__init__(context, tokenizer.size)
        self.prompt = tokenizer.encode("<|im_start|>assistant\n", bos=False)
        self.answers = [[*tokenizer.encode(answer, bos=False), IM_END] for answer in answers]

    def logits(self) -> Logits:
        size = len(self.prompt)
        ends = [i + size for i in range(len(self.history)) if self.history[i : i + size] == self.prompt]
        logits = np.zeros(self.vocab_size, dtype=np.float32)
        if not ends:  # a chunk of the first prompt
            return logits
        answer = self.answers[len(ends) - 1]
        logits[answer[min(len(self.history) - ends[-1], len(answer) - 1)]] = 1
        return logits


@pytest.fixture
def tokenizer(shared: Callable[[str], Path]) -> Tokenizer:
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return Tokenizer.from_file(shared("tokenizers/smollm2.json"), bos=None, stop=[IM_END], chat_template=CHATML, special=special)


def whole_again(prompt: list[int], count: int) -> list[int]:
    """Greedy continuation that reads everything from the start for each token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(HistoryEngine().prefill(tokens).argmax()))
    return tokens[len(prompt) :]


def test_greedy_is_the_argmax_of_everything_read_so_far() -> None:
    assert list(generate(HistoryEngine(), [1, 2, 3], max_new_tokens=12)) == whole_again([1, 2, 3], 12)


def test_generation_goes_on_from_what_was_read() -> None:
    engine = HistoryEngine()
    engine.prefill([1, 2])
    assert list(generate(engine, [3], max_new_tokens=5)) == whole_again([1, 2, 3], 5)


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    assert Sampler().choose(np.array([0, 3, 1, 3], dtype=np.float32)) == 1


def test_generation_ends_at_a_stop_token_and_does_not_give_it_out() -> None:
    expected = whole_again([1, 2, 3], 6)
    engine = HistoryEngine()
    generation = generate(engine, [1, 2, 3], max_new_tokens=20, stop=[expected[4], 999])
    assert list(generation) == expected[:4]
    assert generation.stats.stopped and list(generation) == []
    assert engine.position == 3 + 4


def test_generation_ends_where_the_context_is_full() -> None:
    engine = HistoryEngine(context=8)
    generation = generate(engine, [1, 2, 3], max_new_tokens=100)
    assert len(list(generation)) == 8 - 3 + 1, "the logits after the last position still give a token"
    assert engine.position == 8 and not generation.stats.stopped


def test_last_token_is_not_read_back() -> None:
    engine = HistoryEngine()
    list(generate(engine, [1, 2, 3], max_new_tokens=4))
    assert engine.position == 3 + 3


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 0},
        {"prompt_tokens": []},
        {"prompt_tokens": [VOCAB]},
        {"prompt_tokens": [1] * 41},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_before_anything_is_read(arguments: dict[str, Any]) -> None:
    engine = HistoryEngine()
    with pytest.raises(InputError):
        generate(engine, **{"prompt_tokens": [1], "max_new_tokens": 1, **arguments})
    assert engine.reads == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
    ],
    ids=str,
)
def test_sampling_out_of_range_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        Sampling(**arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(BundleError, match="not finite"):
        Sampler().choose(np.array([0, bad, 1], dtype=np.float32))


def test_the_same_seed_gives_the_same_tokens_and_another_does_not() -> None:
    def run(seed: int) -> list[int]:
        return list(generate(HistoryEngine(), [1], max_new_tokens=20, sampling=Sampling(temperature=1.0, seed=seed)))

    assert run(0) == run(0)
    assert len({tuple(run(seed)) for seed in range(4)}) == 4


def test_sampling_draws_by_the_softmax_at_its_temperature() -> None:
    logits = np.array([0.0, 1.0, -1.0, 0.5], dtype=np.float32)
    sampler, draws = Sampler(Sampling(temperature=0.5, seed=1)), 20_000
    counts = Counter(sampler.choose(logits) for _ in range(draws))
    expected = np.exp(logits / 0.5) / np.exp(logits / 0.5).sum()
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert all(abs(counts[i] / draws - expected[i]) < 4 * deviation[i] for i in range(4))


@pytest.mark.parametrize("top_p", [1e-9, 0.2, 0.5, 0.9, 0.999])
def test_top_p_draws_from_the_fewest_likeliest_tokens_that_reach_it(top_p: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        logits = rng.normal(size=VOCAB).astype(np.float32) * 2
        share = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
        order = np.argsort(-share, kind="stable")
        nucleus = set(order[: int((np.cumsum(share[order]) < top_p).sum()) + 1].tolist())
        sampler = Sampler(Sampling(temperature=1.0, top_p=top_p, seed=3))
        drawn = {sampler.choose(logits) for _ in range(300)}
        assert drawn <= nucleus
        assert len(nucleus) > 3 or drawn == nucleus


@pytest.mark.parametrize(
    "sampling", [{"top_k": 1}, {"top_k": 5}, {"top_k": 7, "top_p": 0.6}, {"repetition_penalty": 1.7}, {"top_k": VOCAB + 9}], ids=str
)
def test_distributions_are_those_of_transformers(sampling: dict[str, Any]) -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rng, seen = np.random.default_rng(5), [3, 1, 4]
    logits = rng.normal(size=VOCAB).astype(np.float32) * 2
    kinds = {"repetition_penalty": RepetitionPenaltyLogitsProcessor, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    scores = torch.tensor(logits)[None]
    for warp in (TemperatureLogitsWarper(0.8), *(kinds[name](value) for name, value in sampling.items())):
        scores = warp(torch.tensor([seen]), scores)
    expected = scores.softmax(-1)[0].numpy()
    sampler, draws = Sampler(Sampling(temperature=0.8, seed=3, **sampling)), 4000
    counts = np.bincount([sampler.choose(logits, seen) for _ in range(draws)], minlength=VOCAB)
    assert not counts[expected == 0].any()
    assert (np.abs(counts / draws - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-9).all()


def test_a_penalty_keeps_a_greedy_text_from_turning_in_a_circle() -> None:
    class Circle(HistoryEngine):
        def logits(self) -> Logits:
            return np.array([1.0, 3.0, 2.9] + [-1.0] * (VOCAB - 3), dtype=np.float32)

    plain, penalized = (
        list(generate(Circle(), [1], max_new_tokens=3, sampling=Sampling(repetition_penalty=penalty))) for penalty in (1.0, 2.0)
    )
    assert plain == [1, 1, 1]
    assert penalized == [2, 1, 1], "once both were seen, the likelier one is"


def test_a_very_low_temperature_is_greedy() -> None:
    logits = np.array([0.0, 5.0, 4.999], dtype=np.float32)
    assert Sampler(Sampling(temperature=1e-320)).choose(logits) == 1


def test_statistics_count_what_was_read_and_given_out() -> None:
    generation = generate(HistoryEngine(), [1, 2, 3], max_new_tokens=5)
    list(generation)
    stats = generation.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.decode_steps) == (3, 5, 4)
    assert 0 < stats.prefill_seconds <= stats.first_token_seconds
    assert stats.prefill_tokens_per_second == 3 / stats.prefill_seconds
    assert stats.decode_tokens_per_second == 4 / stats.decode_seconds


def test_chat_reads_only_the_new_part_of_a_conversation(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["Hello! 你好 🦙", "Fine, thank you.", "Bye."])
    chat = Chat(engine, tokenizer, system="Be brief.")
    for turn, text in enumerate(["Hi", "How are you?", "Bye"]):
        answer = "".join(chat.say(text, max_new_tokens=50))
        assert answer == ["Hello! 你好 🦙", "Fine, thank you.", "Bye."][turn]
        rendered = tokenizer.encode(tokenizer.render_chat(chat.messages, add_generation_prompt=False), bos=False)
        assert engine.history == rendered[: len(engine.history)], "the cache holds the conversation as a fresh reader would"
        if turn:
            new = tokenizer.encode(f"<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", bos=False)
            assert chat.stats.prompt_tokens == len(new)
    assert [message["role"] for message in chat.messages] == ["system"] + ["user", "assistant"] * 3


def test_chat_reads_again_from_where_the_template_rewrites_old_turns(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = CHATML.replace("message.content", "(message.content if loop.last else message.content | upper)")
    engine = ScriptedEngine(tokenizer, ["one", "two"])
    chat = Chat(engine, tokenizer)
    assert "".join(chat.say("a", max_new_tokens=9)) == "one"
    assert "".join(chat.say("b", max_new_tokens=9)) == "two"
    begin, rewritten = (tokenizer.encode(f"<|im_start|>user{text}", bos=False) for text in ("\n", "\nA"))
    rendered = tokenizer.encode(tokenizer.render_chat(chat.messages[:3]), bos=False)
    assert rendered[: len(rewritten)] == rewritten
    assert chat.stats.prompt_tokens == len(rendered) - len(begin)
    assert engine.history[: len(rendered)] == rendered


def test_chat_reads_all_again_where_someone_else_used_the_engine(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["one", "two"])
    chat = Chat(engine, tokenizer)
    list(chat.say("a", max_new_tokens=9))
    engine.reset()
    assert "".join(chat.say("b", max_new_tokens=9)) == "two"
    rendered = tokenizer.encode(tokenizer.render_chat(chat.messages, add_generation_prompt=False), bos=False)
    assert engine.history == rendered[: len(engine.history)]


def test_an_answer_cut_short_stays_in_the_conversation_as_far_as_it_came(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["one two three four", "yes"])
    chat = Chat(engine, tokenizer)
    answer = chat.say("count", max_new_tokens=50)
    assert list(islice(answer, 2)) == ["one", " two"]
    answer.close()  # type: ignore[attr-defined]
    assert chat.messages[-1] == {"role": "assistant", "content": "one two"}
    assert "".join(chat.say("go on?", max_new_tokens=50)) == "yes"


def test_an_answer_at_its_limit_is_read_on_in_the_next_turn(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["one two three four", "yes"])
    chat = Chat(engine, tokenizer)
    assert "".join(chat.say("count", max_new_tokens=2)) == "one two"
    read = engine.position
    assert "".join(chat.say("go on?", max_new_tokens=50)) == "yes"
    rendered = tokenizer.encode(tokenizer.render_chat(chat.messages[:3]), bos=False)
    assert chat.stats.prompt_tokens == len(rendered) - read


def failing(chat: Chat, failure: type[BaseException], after: int) -> None:
    """The engine fails in a step, that many steps from now."""
    engine: Any = chat.engine
    working, steps = engine.step, iter(range(after))

    def fail(tokens: list[int], position: int) -> Logits:
        if next(steps, None) is None:
            engine.step = working
            raise failure
        return working(tokens, position)

    engine.step = fail


@pytest.mark.parametrize(("failure", "after"), [(RuntimeError, 0), (RuntimeError, 2), (KeyboardInterrupt, 0)])
def test_a_turn_that_fails_leaves_the_conversation_as_it_was(tokenizer: Tokenizer, failure: type[BaseException], after: int) -> None:
    chat = Chat(ScriptedEngine(tokenizer, ["one", "two three four", "two"]), tokenizer)
    list(chat.say("a", max_new_tokens=9))
    before = list(chat.messages)
    failing(chat, failure, after)
    with pytest.raises(failure):
        list(chat.say("b", max_new_tokens=9))
    assert chat.messages == before
    assert "".join(chat.say("b", max_new_tokens=9)) in ("two", "two three four")


def test_an_answer_that_is_interrupted_stays_as_far_as_it_came_and_all_is_read_again(tokenizer: Tokenizer) -> None:
    chat, pieces = Chat(ScriptedEngine(tokenizer, ["one two three four", "yes"]), tokenizer), list[str]()
    failing(chat, KeyboardInterrupt, after=3)
    with pytest.raises(KeyboardInterrupt):
        pieces += chat.say("count", max_new_tokens=50)
    assert chat.messages == [{"role": "user", "content": "count"}, {"role": "assistant", "content": "one two three"}]
    assert chat.engine.position == 0
    assert "".join(chat.say("go on?", max_new_tokens=50)) == "yes"
    assert chat.stats.prompt_tokens == len(tokenizer.encode(tokenizer.render_chat(chat.messages[:3]), bos=False))


def test_a_reset_keeps_the_system_message_alone(tokenizer: Tokenizer) -> None:
    chat = Chat(ScriptedEngine(tokenizer, ["one", "two"]), tokenizer, system="Be brief.")
    list(chat.say("a", max_new_tokens=9))
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert "".join(chat.say("b", max_new_tokens=9)) == "one", "the engine's first answer: it knows of no other"


def test_a_conversation_longer_than_the_context_is_refused_and_unchanged(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["one"], context=30)
    chat = Chat(engine, tokenizer)
    with pytest.raises(InputError, match="more than the context of 30"):
        chat.say("word " * 40, max_new_tokens=9)
    assert chat.messages == []
    assert "".join(chat.say("a", max_new_tokens=9)) == "one"
