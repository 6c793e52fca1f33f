"""lobit's model in lm-evaluation-harness has the likelihoods of the harness's own Hugging Face backend. Skipped where it is absent."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lobit import verbs
from lobit.checkpoint import load_model
from lobit.errors import LobitError
from lobit.runtime.eval_requests import Encoder, queries
from lobit.runtime.eval_scoring import Reader
from lobit.runtime.eval_tasks import Task, read_task
from lobit.runtime.reference import ReferenceEngine
from lobit.tokenizer import Tokenizer
from tests.commands import ENVIRONMENT, PATIENCE, assert_one_message

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'lobit[harness]'")
pytest.importorskip("accelerate", reason="the harness's Hugging Face backend needs accelerate: pip install 'lobit[harness]'")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
CLOSE, SHARE = 1e-4, 1e-6
"""Nats, or a share of the likelihood where that is more: float32 models whose sums come in another order, summed over all tokens."""
TASKS = ("arc_easy", "piqa", "openbook_qa", "lambada_openai")
ITEMS = 200
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def theirs(stories: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(stories), device="cpu", dtype="float32", softmax_dtype="float64", batch_size=8)


@pytest.fixture(scope="module")
def ours(stories: Path) -> Any:
    return importlib.import_module("lobit.harness_model").LobitLM(bundle=str(stories))


def asked(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, place) for place, one in enumerate(arguments)]


def pairs(task: Task) -> list[tuple[str, str]]:
    return [(item.prompt, task.delimiter + choice) for item in task.items for choice in item.choices]


@pytest.mark.parametrize("name", TASKS)
def test_every_item_has_the_likelihood_of_the_harness(name: str, theirs: Any, ours: Any, shared: Any, stories: Path) -> None:
    """By lobit's model in the harness, and by `lobit eval`."""
    task = read_task(shared(f"tasks/{name}.jsonl")).first(ITEMS)
    requests = asked("loglikelihood", pairs(task))
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    encoder, reader = Encoder(Tokenizer.from_folder(stories), theirs.max_length), Reader(ReferenceEngine(load_model(stories)))
    verb = [score for query in queries(task, encoder) for score in reader.score(query.asked)]
    for found in (ours.loglikelihood(requests, disable_tqdm=True), verb):
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=SHARE, abs=CLOSE)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_odd_requests_have_the_harness_likelihoods(theirs: Any, ours: Any) -> None:
    texts = [("", " Once"), ("", "<s>Once"), ("<s>Once upon", " a"), ("Once  ", "upon"), ("Once " * 600, "upon a time")]
    requests = asked("loglikelihood", texts)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=CLOSE)


def test_texts_have_the_harness_likelihoods(theirs: Any, ours: Any, shared: Any) -> None:
    text = shared("text/tinystories_sample.txt").read_text(encoding="utf-8")
    requests = asked("loglikelihood_rolling", [(text[:6000],), (text[:700],), ("Once",)])
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, rel=SHARE)


def test_a_shorter_context_cuts_where_the_harness_does(stories: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    requests = asked("loglikelihood", [("Once upon a time there was a little girl named Lily", " who loved to play")])
    theirs = HFLM(pretrained=str(stories), device="cpu", dtype="float32", max_length=16)
    ours = importlib.import_module("lobit.harness_model").LobitLM(bundle=str(stories), max_length=16)
    assert ours.max_length == 16
    (found,), (expected,) = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, theirs))
    assert found[0] == pytest.approx(expected[0], abs=CLOSE)


def test_the_same_text_is_written(theirs: Any, ours: Any) -> None:
    options = {"until": ["."], "max_gen_toks": 60, "do_sample": False}
    requests = asked("generate_until", [("Once upon a time", options), ("Lily had a dog", {**options, "until": ["\n", "park"]})])
    assert ours.generate_until(requests, disable_tqdm=True) == theirs.generate_until(requests, disable_tqdm=True)


def test_a_ternary_folder_is_no_mistake_where_accelerate_changes_what_transformers_computes(small_models: Any, lobit: Any) -> None:
    answer = lobit("doctor", small_models("bitnet")[0], "--json")
    assert answer.code == 0, answer.out
    assert any(check["same"] is None and "INT8" in check["theirs"] and 0 < check["apart"] < 1 for check in answer.json["checks"])


@pytest.mark.parametrize("part", ["layers.1.mlp.down", "norm"])
def test_a_ternary_folder_that_is_read_wrongly_is_a_mistake_there_too(
    part: str, small_models: Any, lobit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def misread(folder: Path, config: Any = None) -> Any:
        model = load_model(folder, config)
        next(parameter for name, parameter in model.named_parameters() if name.startswith(part)).data *= 2
        return model

    monkeypatch.setattr("lobit.checkpoint.load_model", misread)
    answer = lobit("doctor", small_models("bitnet")[0], "--json")
    assert answer.code == 2
    assert any(check["same"] is False and check["apart"] > 0 for check in answer.json["checks"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", ["bundle is missing: give bundle=PATH"]),
        ("threads=1", ["bundle is missing"]),
        ("bundle", ["bundle is '': give the path"]),
        ("bundle=true", ["bundle is True: give the path"]),
        ("bundle=demo,dtype=float32", ["there is no 'dtype': the arguments are bundle, threads, max_length"]),
        ("pretrained=demo,threads=two", ["there is no 'pretrained'", "bundle is missing", "threads is 'two': give a whole number"]),
        ("bundle=demo,max_length=0,threads=1.5", ["max_length is 0: give a whole number", "threads is 1.5"]),
        ("bundle=demo,threads=true", ["threads is True"]),
        ("bundle=no/such/folder", ["there is no folder no/such/folder: give a Hugging Face folder"]),
    ],
)
def test_arguments_that_cannot_be_used_are_named_with_the_way_out(given: str, said: list[str]) -> None:
    model = importlib.import_module("lobit.harness_model").LobitLM
    with pytest.raises(LobitError) as told:
        model.create_from_arg_string(given, {"batch_size": 1, "device": None})
    assert [one for one in said if one not in str(told.value)] == []


def test_what_the_harness_adds_gives_way_to_arguments(stories: Path) -> None:
    model = importlib.import_module("lobit.harness_model").LobitLM
    more = {"batch_size": 4, "max_batch_size": None, "device": "cuda:0"}
    assert model.create_from_arg_obj({"bundle": str(stories), "batch_size": 2, "max_length": 16}, more).max_length == 16


ANSWER = "{{query.rstrip()}}\nAnswer:"
PROMPTS = {"arc_easy": ANSWER, "piqa": ANSWER, "openbook_qa": "{{query}}", "lambada_openai": "{{context}}"}


def harness_task(name: str, file: Path, folder: Path) -> str:
    """Writes a task of the harness's over a file of questions or last words; returns its name."""
    is_choice = name != "lambada_openai"
    metrics = ("acc", "acc_norm", "acc_bytes") if is_choice else ("acc", "perplexity")
    target = {"doc_to_choice": "{{choices}}", "doc_to_target": "gold"} if is_choice else {"doc_to_target": " {{continuation}}"}
    values = {
        "task": f"mine_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test",
        "output_type": "multiple_choice" if is_choice else "loglikelihood", "doc_to_text": PROMPTS[name],
        "metric_list": [{"metric": metric} for metric in metrics], **target,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(values), encoding="utf-8")
    return str(values["task"])


def test_figures_of_whole_tasks_are_the_harness_s(stories: Path, shared: Any, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    files = [shared(f"tasks/{name}.jsonl") for name in TASKS]
    tasks = [harness_task(name, file, tmp_path) for name, file in zip(TASKS, files, strict=True)]
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    options = {"model": "lobit", "model_args": f"bundle={stories}", "limit": ITEMS, "bootstrap_iters": 0}
    theirs = simple_evaluate(tasks=tasks, task_manager=manager, **options)["results"]
    rows = verbs.eval([str(stories)], files, limit=ITEMS, cache=tmp_path / "cache")["rows"]
    assert [row["task"] for row in rows] == list(TASKS)
    for task, row in zip(tasks, rows, strict=True):
        figures = {name: figure["value"] for name, figure in row["metrics"].items()}
        expected = {name.removesuffix(",none"): value for name, value in theirs[task].items()}
        assert figures["accuracy"] == pytest.approx(expected["acc"])
        if "perplexity" in expected:
            assert figures["perplexity"] == pytest.approx(expected["perplexity"])
        else:
            assert figures["accuracy_bytes"] == pytest.approx(expected["acc_bytes"])
            assert figures["accuracy_bytes"] == pytest.approx(expected["acc_norm"], abs=2 / ITEMS)  # which is by characters


def test_the_harness_command_line_runs_a_bundle_and_refuses_in_one_message(bundles: Any, shared: Any, tmp_path: Path) -> None:
    task = harness_task("arc_easy", shared("tasks/arc_easy.jsonl"), tmp_path)
    options = ["--tasks", task, "--include_path", tmp_path, "--limit", 12, "--use_cache", tmp_path / "kept"]
    options += ["--output_path", tmp_path / "out"]
    environment = {**ENVIRONMENT, **OFFLINE, "HF_HOME": str(tmp_path / "hf")}

    def harness(given: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lobit.harness", "--model", "lobit", "--model_args", given, *map(str, options)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE, check=False)

    done = harness(f"bundle={bundles('stories260k', 'fp')}")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").rglob("*.json")
    assert json.loads(path.read_text(encoding="utf-8"))["results"][task]["acc_bytes,none"] >= 0
    assert_one_message(harness("bundles=demo"), "there is no 'bundles'", "bundle is missing")
