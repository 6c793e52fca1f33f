"""`lobit eval`: what it says of models, checkpoints and bundles, each option, and runs that are killed."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lobit import verbs
from lobit.quant_recipes.catalog import find_recipe
from tests.commands import ENVIRONMENT, PATIENCE, lobit_command

pytestmark = pytest.mark.usefixtures("one_thread", "parts_once")
DONE = 0
EXCLUDED = ("layers.*.mlp.down",)
TASKS = ("arc_easy", "piqa", "openbook_qa", "lambada_openai")
LIMIT = 6


@pytest.fixture(scope="module")
def checkpoint(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = find_recipe("8da4w-g32").with_changes(EXCLUDED)
    return verbs.quantize(str(models("stories260k")), recipe, tmp_path_factory.mktemp("eval") / "checkpoint")


@pytest.fixture(scope="module")
def onnx(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "onnx"
    verbs.export(str(checkpoint), "onnx", out, context=512, chunk=64, all_logits=True)
    return out


def tasks(shared: Callable[[str], Path], *names: str) -> list[Any]:
    return [part for name in names or TASKS for part in ("--tasks", shared(f"tasks/{name}.jsonl"))]


def test_all_tasks_run_on_a_bundle_in_all_its_stages(
    onnx: Path, models: Any, shared: Any, sample: Path, tmp_path: Path, lobit: Any
) -> None:
    options = ["--reference", models("stories260k"), "--limit", LIMIT, "--cache", tmp_path / "cache", "-t", 1]
    answer = lobit("eval", onnx, *tasks(shared), "--text", sample, *options, "--json")
    assert answer.code == DONE, answer.err
    result = answer.json
    assert [(column["stage"], column["target"]) for column in result["columns"]] == [
        ("float", "reference"), ("fake_quant", "reference"), ("artifact", "onnx"),
    ]  # fmt: skip
    assert [(task["name"], task["type"], task["items"]) for task in result["tasks"]] == [
        *((name, "multiple_choice", LIMIT) for name in TASKS[:3]),
        ("lambada_openai", "last_words", LIMIT),
        ("tinystories_sample", "text", LIMIT),
    ]
    assert result["tasks"][0]["chance"] == 0.25 and result["limit"] == LIMIT and result["context"] == 512
    words = [row["metrics"]["word_perplexity"]["value"] for row in result["rows"] if row["task"] == "tinystories_sample"]
    assert 20 < words[0] < 40 and words[0] < words[1] < 1.5 * words[0] and words[2] == pytest.approx(words[1], rel=0.05)
    table = lobit("eval", onnx, *tasks(shared), "--text", sample, *options)
    assert table.code == DONE
    for told in ("benchmark", "arc_easy", "per byte", "lambada_openai", "perplexity of words", "average", "by chance: arc_easy 25"):
        assert told in table.out
    assert "answers that changed" in table.out


def test_stages_come_from_models_checkpoints_and_bundles(
    onnx: Path, checkpoint: Path, models: Any, shared: Any, tmp_path: Path, lobit: Any
) -> None:
    few = [*tasks(shared, "openbook_qa"), "--limit", 2, "--cache", tmp_path / "cache", "--json"]
    apart = lobit("eval", onnx, checkpoint, models("stories260k"), *few).json
    together = lobit("eval", onnx, "--reference", models("stories260k"), *few).json
    assert [column["stage"] for column in apart["columns"]] == ["float", "fake_quant", "artifact"]
    assert [row["metrics"] for row in apart["rows"]] == [row["metrics"] for row in together["rows"]]
    assert apart["pairs"] == together["pairs"]
    assert together["speed"] == []  # all of it was kept
    only = lobit("eval", onnx, "--reference", models("stories260k"), "--stages", "float,artifact", *few).json
    assert [column["stage"] for column in only["columns"]] == ["float", "artifact"]


def test_shots_are_given_and_not_asked(models: Any, shared: Any, tmp_path: Path, lobit: Any) -> None:
    common = [*tasks(shared, "openbook_qa"), "--limit", 3, "--cache", tmp_path / "cache"]
    with_shots = lobit("eval", models("stories260k"), "--shots", 2, *common, "--json").json
    assert with_shots["shots"] == 2 and with_shots["tasks"][0]["items"] == 3
    assert lobit("eval", models("stories260k"), *common, "--json").json["speed"][0]["items"] == 3  # other tokens: nothing was kept
    assert "2 solved examples before each question" in lobit("eval", models("stories260k"), "--shots", 2, *common).out


def test_the_cache_lies_in_the_users_folder(models: Any, shared: Any, tmp_path: Path, lobit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert lobit("eval", models("stories260k"), *tasks(shared, "openbook_qa"), "--limit", 1).code == DONE
    assert len(list((tmp_path / "lobit/eval").glob("*.jsonl"))) == 1


def test_its_result_is_reported(onnx: Path, shared: Any, tmp_path: Path, lobit: Any) -> None:
    answer = lobit("eval", onnx, *tasks(shared, "piqa"), "--limit", 2, "--cache", tmp_path / "cache", "--json")
    (tmp_path / "eval.json").write_text(answer.out, encoding="utf-8")
    assert lobit("report", tmp_path / "eval.json", "-o", tmp_path / "report.html").code == DONE
    assert "Accuracy on each task" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_mistakes_are_one_message(onnx: Path, models: Any, shared: Any, tmp_path: Path, lobit: Any) -> None:
    (tmp_path / "bad.jsonl").write_text('{"query": "Why?", "choices": ["a", "b"], "gold": 2}\n', encoding="utf-8")
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"query": "Why?", "choices": ["a", "because " * 900], "gold": 0}) + "\n", encoding="utf-8"
    )
    (tmp_path / "empty.txt").write_text("")
    cache = ["--cache", tmp_path / "cache"]
    question = tasks(shared, "openbook_qa")
    lobit("eval", onnx, *cache).assert_one_message("nothing to measure", "--tasks FILE", "--text FILE")
    lobit("eval", onnx, "--tasks", tmp_path / "bad.jsonl", *cache).assert_one_message("bad.jsonl", "line 1: gold is 2")
    lobit("eval", onnx, "--tasks", tmp_path / "long.jsonl", *cache).assert_one_message("long.jsonl line 1, choice 1:", "context of 512")
    lobit("eval", onnx, "--tasks", tmp_path / "no.jsonl", *cache).assert_one_message("no.jsonl cannot be read")
    lobit("eval", onnx, "--text", tmp_path / "empty.txt", *cache).assert_one_message("empty has no token")
    lobit("eval", onnx, *question, *question, *cache).assert_one_message("several files are called openbook_qa")
    lobit("eval", onnx, *question, "--stages", "float", *cache).assert_one_message("nothing here has stage float", "--reference MODEL")
    lobit("eval", onnx, *question, "--stages", "fast", *cache).assert_one_message("there is no stage fast")
    lobit("eval", tmp_path, *question, *cache).assert_one_message("config.json")
    lobit("eval", onnx, *question, "--shots", 500, *cache).assert_one_message("has 500 items, and 500 of them would be examples")
    lobit("eval", onnx, *question, "--reference", models("qwen3"), "--stages", "fake_quant", "--limit", 1, *cache).assert_one_message(
        "does not hold the weights"
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(models: Any, shared: Any, tmp_path: Path) -> None:
    command = lobit_command("eval", models("stories260k"), *tasks(shared, "arc_easy", "lambada_openai"), "--limit", 40, "--json")

    def result(cache: Path) -> dict[str, Any]:
        done = subprocess.run([*command, "--cache", str(cache)], capture_output=True, check=True, env=ENVIRONMENT, timeout=PATIENCE)
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    def stopped(cache: Path, size: int, number: signal.Signals) -> tuple[int, str]:
        """Sends a signal once so many bytes are kept; returns the exit code and what was said."""
        began = time.monotonic()
        options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background has it ignored
        with subprocess.Popen([*command, "--cache", str(cache)], **options) as process:
            while sum(path.stat().st_size for path in cache.glob("*.jsonl")) < size and time.monotonic() < began + PATIENCE:
                time.sleep(0.01)
            process.send_signal(number)
            return process.wait(PATIENCE), str(process.stderr.read() if process.stderr else "")

    whole = result(tmp_path / "whole")
    code, said = stopped(tmp_path / "killed", 500, signal.SIGINT)
    assert code == 128 + signal.SIGINT and f"finished items are kept in {tmp_path / 'killed'}" in said
    stopped(tmp_path / "killed", 3000, signal.SIGKILL)
    kept = sum(len(path.read_text().splitlines()) for path in (tmp_path / "killed").iterdir())
    assert kept > 5
    resumed = result(tmp_path / "killed")
    computed = sum(row["items"] for row in resumed["speed"])
    assert 80 - kept <= computed <= 81 - kept
    assert json.dumps(resumed | {"speed": []}) == json.dumps(whole | {"speed": []})
