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

from lobit.checkpoint import load_model
from lobit.runtime.eval_requests import Encoder, queries
from lobit.runtime.eval_scoring import Reader
from lobit.runtime.eval_tasks import Task, read_task
from lobit.runtime.reference import ReferenceEngine
from lobit.tokenizer import Tokenizer
from tests.commands import ENVIRONMENT, PATIENCE

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
    assert any(check["same"] is None and "INT8" in check["theirs"] for check in answer.json["checks"])


def test_the_harness_command_line_runs_a_bundle(bundles: Any, shared: Any, tmp_path: Path) -> None:
    values = {
        "task": "things", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(shared("tasks/arc_easy.jsonl"))}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{query}}\nAnswer:", "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_bytes"}],
    }  # fmt: skip
    (tmp_path / "things.yaml").write_text(json.dumps(values), encoding="utf-8")
    options = ["--limit", 12, "--use_cache", tmp_path / "kept", "--output_path", tmp_path / "out"]
    model = ["--model", "lobit", "--model_args", f"bundle={bundles('stories260k', 'fp')}"]
    command = [sys.executable, "-m", "lobit.harness", *model, "--tasks", "things", "--include_path", tmp_path, *options]
    environment = {**ENVIRONMENT, **OFFLINE, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").rglob("*.json")
    assert json.loads(path.read_text(encoding="utf-8"))["results"]["things"]["acc_bytes,none"] >= 0
