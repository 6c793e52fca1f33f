"""Evaluating models on tasks: the same figures after a kill, none of another model's, and each item asked once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobit.errors import InputError
from lobit.runtime.engine import Engine, SteppingEngine
from lobit.runtime.eval_cache import Kept, key_of
from lobit.runtime.eval_requests import Asked, Query
from lobit.runtime.eval_run import Column, Text, evaluate
from lobit.runtime.eval_tasks import Item, Task
from lobit.tokenizer import Tokenizer

VOCABULARY = 512
THINGS, LOOKS = ("ball", "cat", "dog"), ("big", "very small", "red")
ITEMS = tuple(Item(i + 1, f"Lily saw a {thing}. It was", LOOKS, i % 3) for i, thing in enumerate(THINGS))
TASK = Task("things", Path("things.jsonl"), "", ITEMS, True)
WORDS = Task("words", Path("words.jsonl"), "", (Item(1, "Once upon a", ("time",), 0),), False)


def engine(seed: int, calls: list[int]) -> Engine:
    """Logits that depend on the last token alone."""
    table = np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)

    def step(tokens: list[int], position: int) -> Any:
        calls.append(len(tokens))
        return table[tokens[-1:]]

    return SteppingEngine(step, 256, 32, VOCABULARY)


@pytest.fixture
def column(models: Any) -> Callable[..., Column]:
    tokenizer = Tokenizer.from_folder(models("stories260k"))

    def make(stage: str, seed: int, calls: list[int] | None = None, opened: Any = None, context: int = 128) -> Column:
        target, origin = ("onnx", "weights") if stage == "artifact" else ("", "weights" if stage == "fake_quant" else "")
        give = opened or (lambda _: engine(seed, [] if calls is None else calls))
        return Column(f"m{seed}", stage, target, "fp", tokenizer, context, origin, {"stage": stage, "seed": seed}, give)

    return make


def without_speed(result: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in result.items() if key != "speed"})


def run(columns: list[Column], folder: Path, **options: Any) -> dict[str, Any]:
    return evaluate(columns, [TASK, WORDS], [Text("text", "One day, Lily went out. " * 40)], **{"limit": None, "folder": folder, **options})


def test_a_run_that_was_killed_goes_on_to_the_same_result(column: Any, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def fragile(limit: int) -> Callable[[int], Engine]:
        def opened(_: int) -> Engine:
            calls: list[int] = []
            inner = engine(1, calls)
            score = inner.score

            def scored(*asked: Any) -> Any:
                if len(calls) > limit:
                    raise KilledError
                return score(*asked)

            inner.score = scored  # type: ignore[method-assign]
            return inner

        return opened

    whole = run([column("float", 0), column("artifact", 1)], tmp_path / "whole")
    for limit in (4, 12, 40):
        with pytest.raises(KilledError):
            run([column("float", 0), column("artifact", 1, opened=fragile(limit))], tmp_path / "killed")
        kept = next(path for path in (tmp_path / "killed").iterdir() if path.stat().st_size)
        kept.write_bytes(kept.read_bytes()[:-5])  # the line that the kill cut short
    resumed = run([column("float", 0), column("artifact", 1)], tmp_path / "killed")
    assert without_speed(resumed) == without_speed(whole)


def test_what_is_finished_is_not_computed_again_and_a_changed_model_is(column: Any, tmp_path: Path) -> None:
    calls: list[int] = []
    first = run([column("float", 0, calls)], tmp_path)
    count = len(calls)
    again = run([column("float", 0, calls)], tmp_path)
    assert len(calls) == count > 0
    assert without_speed(first) == without_speed(again)
    assert again["speed"] == [] and [row["items"] for row in first["speed"]] == [row["items"] for row in first["rows"]]
    changed = run([replace(column("float", 2, calls), name="m0")], tmp_path)
    assert len(calls) == 2 * count
    assert without_speed(changed) != without_speed(first)


def test_more_items_of_a_task_with_examples_are_asked_beside_those_that_are_kept(column: Any, tmp_path: Path) -> None:
    task = TASK.with_shots(1)
    for count, asked in ((1, 1), (2, 1)):
        result = evaluate([column("float", 0)], [task.first(count)], [], limit=None, folder=tmp_path)
        assert [row["items"] for row in result["speed"]] == [asked]


def test_damaged_lines_of_the_cache_are_computed_again(column: Any, tmp_path: Path) -> None:
    first = run([column("float", 0)], tmp_path)
    (path,) = tmp_path.iterdir()
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0].replace("false", "true", 1), "\0" * 40, "[]", *lines[3:]]), encoding="utf-8")
    again = run([column("float", 0)], tmp_path)
    assert without_speed(again) == without_speed(first)
    assert sum(row["items"] for row in again["speed"]) == 3


def test_the_key_of_an_item_is_all_of_its_tokens() -> None:
    keys = {
        key_of(Query((Asked(tokens, count),)), beginning)
        for tokens, count, beginning in (((1, 2, 3), 1, ()), ((1, 2, 3), 2, ()), ((1, 2, 4), 1, ()), ((1, 2, 3), 1, (1,)))
    }
    assert len(keys) == 4


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written to .*--cache"):
        Kept(tmp_path / "file" / "cache", {})


def test_all_columns_read_what_fits_into_the_smallest(column: Any, tmp_path: Path) -> None:
    long = Task("long", Path("long.jsonl"), "", (Item(1, "One day, " * 30 + "she was", ("sad", "glad"), 0),), True)
    result = evaluate([column("float", 0), column("artifact", 1, context=24)], [long], [], limit=None, folder=tmp_path)
    assert result["context"] == 24
    assert [row["cut"] for row in result["rows"]] == [1, 1]


def test_pairs_are_against_the_first_and_a_bundle_against_its_own_weights(column: Any, tmp_path: Path) -> None:
    result = run([column("float", 0), column("fake_quant", 1), column("artifact", 2)], tmp_path)
    assert {(pair["base"], pair["other"]) for pair in result["pairs"]} == {(0, 1), (0, 2), (1, 2)}
    metrics = {(row["task"], row["column"]): row["metrics"] for row in result["rows"]}
    for pair in result["pairs"]:
        before, after = (metrics[pair["task"], pair[side]][pair["metric"]]["value"] for side in ("base", "other"))
        assert pair["difference"] == pytest.approx(after - before)
    assert [len(result["averages"]), len(result["columns"])] == [3, 3]


def test_progress_ends_at_all_tokens_and_a_limit_cuts_texts(column: Any, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    result = run([column("float", 0)], tmp_path, progress=lambda what, done, total: told.append((done, total)), limit=1)
    assert told[-1][0] == told[-1][1] and [done for done, _ in told] == sorted(done for done, _ in told)
    text = result["tasks"][-1]
    assert text["items"] == 1 and 0 < text["bytes"] < len("One day, Lily went out. " * 40)


def test_a_text_without_tokens_is_refused(column: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty has no token"):
        evaluate([column("float", 0)], [], [Text("empty", "")], limit=None, folder=tmp_path)
