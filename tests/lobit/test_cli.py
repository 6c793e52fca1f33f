"""The command line: results on stdout, one message for a mistake, exit codes, options that do what they say."""

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lobit.quant_recipes.catalog import CATALOG, find_recipe
from lobit.runtime import parity as parity_module
from lobit.runtime.executorch import import_runtime

Bundles = Any
"""The fixture of tests/conftest.py: `bundles(model, recipe, kv_cache)`."""
VERBS = [
    *("demo", "fetch", "recipes", "plan", "sensitivity", "train", "quantize", "merge", "export", "verify"),
    *("run", "parity", "bench", "eval", "report", "doctor"),
]
HEAVY = ["torch", "numpy", "executorch", "transformers", "matplotlib", "tokenizers", "huggingface_hub"]
"""Packages that `--help` has no use for; each takes a good part of a second, or several."""
REPOSITORY = Path(__file__).parents[2]
TO_XNNPACK = ["--target", "xnnpack"]
DONE, GATE_FAILED, MISTAKE = 0, 1, 2


Answer = Any
"""What a command gave: `code`, `out`, `err`, and `json`, parsed (tests/lobit/conftest.py)."""
Lobit = Callable[..., Answer]
pytestmark = pytest.mark.usefixtures("one_thread")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, anywhere else than in the repository."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd="/", check=False)


# --- help and start ---------------------------------------------------------------------------------------------------------------


def test_help_lists_every_verb() -> None:
    done = python("-m", "lobit.cli", "--help")
    assert done.returncode == DONE
    listed = re.findall(r"^  ([a-z]+) ", done.stdout.partition("Commands:")[2], re.MULTILINE)
    assert sorted(listed) == sorted([*VERBS, "android"])
    assert done.stderr == ""


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb: str, lobit: Lobit) -> None:
    answer = lobit(verb, "--help")
    assert answer.code == DONE
    assert re.search(rf"Examples?: .*lobit {verb}", answer.out, re.DOTALL)


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys, lobit.cli; sys.argv = ['lobit', '--help']\ntry: lobit.cli.main()\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert python("-c", program).stdout.splitlines()[-1] == "[]"


def test_the_word_alone_shows_the_help(lobit: Lobit) -> None:
    answer = lobit()
    assert re.search(r"^Usage: .*lobit", answer.out + answer.err)
    assert "Commands:" in answer.out + answer.err


# --- recipes and doctor -------------------------------------------------------------------------------------------------------------


def test_recipes_gives_the_catalogue(lobit: Lobit) -> None:
    answer = lobit("recipes", "--json")
    assert answer.code == DONE
    assert answer.json == {"recipes": [recipe.to_json() for recipe in CATALOG.values()]}
    table = lobit("recipes").out
    assert all(name in table for name in CATALOG)


def test_recipes_shows_one_recipe_with_its_changes(lobit: Lobit) -> None:
    changes = ["--group-size", "64", "--kv-cache", "half", "--activations", "half", "--except", "head"]
    answer = lobit("recipes", "8da4w-g32", *changes, "--json")
    changed = find_recipe("8da4w-g32").with_changes(("head",), 64, "half", activations="half")
    assert answer.json == changed.to_json() != find_recipe("8da4w-g32").to_json()


def test_recipes_shows_what_it_does_to_every_layer(lobit: Lobit) -> None:
    layers = lobit("recipes", "8da4w-g32", "--model", "demo", "--json").json["layers"]
    names = [layer["name"] for layer in layers]
    depth = json.loads((REPOSITORY / "lobit/demo/model/config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    assert len(names) == len(set(names)) == 2 + 7 * depth
    assert {layer["why"] for layer in layers} == {"int4 group 32"}
    assert layers[-1]["shared_with"] == "embedding"
    table = lobit("recipes", "8da4w-g32", "--model", "demo", "--except", "layers.*.mlp.down").out
    assert re.search(rf"layers\.\*\.mlp\.down \(x{depth}\).*float \(excluded by layers\.\*\.mlp\.down\)", table)
    assert "shared with embedding" in table


def test_doctor_tells_versions_and_ways_out(lobit: Lobit) -> None:
    answer = lobit("doctor", "--json")
    assert answer.code == DONE
    rows = {row["part"]: row for row in reversed(answer.json["parts"])}
    assert rows["torch"]["found"].startswith("2.13")
    assert rows["executorch"]["for"] == "xnnpack"
    assert rows["executorch"]["way_out"] == "pip install 'lobit[xnnpack]'"
    assert "executorch" in lobit("doctor", "xnnpack").out


def test_doctors_ways_out_are_what_the_package_offers(lobit: Lobit) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    commands = {row["way_out"] for row in lobit("doctor", "--json").json["parts"] if row["way_out"]}
    extras = {extra for command in commands for extra in re.findall(r"\[(.+)\]", command)}
    assert extras <= set(project["optional-dependencies"])


def test_doctor_names_a_version_that_does_not_work(lobit: Lobit, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.7.0" if name == "onnxruntime-qnn" else version(name))
    answer = lobit("doctor", "qnn", "--json")
    row = next(row for row in answer.json["parts"] if row["part"] == "onnxruntime-qnn")
    assert answer.code == MISTAKE
    assert row["found"] is None and "pip install onnxruntime-qnn==2.5.0" in row["way_out"] and "2.7.0" in row["way_out"]


def test_doctor_names_what_is_missing_and_fails(lobit: Lobit, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = importlib.import_module("lobit.verbs.doctor").PARTS
    monkeypatch.setitem(parts, "xnnpack", ("no-such-package",))
    answer = lobit("doctor", "xnnpack")
    assert answer.code == MISTAKE
    assert re.search(r"no-such-package +missing +pip install 'lobit\[xnnpack\]'", answer.out)


# --- the way from a model to its proof ----------------------------------------------------------------------------------------------


def test_the_way_out_for_layers_that_do_not_divide_works(bundles: Bundles, models: Any, lobit: Lobit) -> None:
    """The bundle was exported with `--except 'layers.*.mlp.down'`."""
    answer = lobit("verify", bundles("stories260k", "8da4w-g32"), models("stories260k"), "--json")
    assert answer.code == DONE
    layers = {row["name"]: row for row in answer.json["layers"]}
    assert layers["layers.4.mlp.down"]["floats"] == 64 * 172
    assert layers["layers.4.mlp.up"]["integers"] == 64 * 172
    assert answer.json["passed"]


def test_a_merge_tells_losses_where_a_text_was_given(sample: Path, tmp_path: Path, lobit: Lobit) -> None:
    weights = ["merge", "demo", "demo", "--weights", "1,3"]
    plain = lobit(*weights, "-o", tmp_path / "plain")
    assert plain.code == DONE
    assert re.findall(r"demo +(0\.\d+)", plain.out) == ["0.2500", "0.7500"]
    assert "loss" not in plain.out
    measured = lobit(*weights, "--text", sample, "--tokens", 64, "-o", tmp_path / "measured")
    assert re.search(r"merged, as written +\d+\.\d{4}", measured.out)


def test_run_tells_the_story(bundles: Bundles, shared: Callable[[str], Path], lobit: Lobit) -> None:
    told = re.search(r'Greedy from "([^"]+)": "([^"]+)"', shared("README.md").read_text(encoding="utf-8"))
    assert told is not None
    prompt, story = told.groups()
    answer = lobit("run", bundles("stories260k", "fp"), "--prompt", prompt)
    assert answer.code == DONE
    assert answer.out.startswith(prompt + story)
    speed = r"prefill 5 tokens at .* t/s, first token after .* ms, decode \d+ tokens at .* t/s"
    assert re.fullmatch(rf"loaded in .* s, {speed}, cut short\n", answer.err)


def test_a_checkpoint_exports_to_the_same_program_as_its_float_model(bundles: Bundles, models: Any, tmp_path: Path, lobit: Lobit) -> None:
    direct, out = bundles("qwen3", "8da4w-g32"), tmp_path / "qwen3-8da4w-g32"
    assert lobit("quantize", models("qwen3"), "--recipe", "8da4w-g32", "-o", tmp_path / "ckpt").code == DONE
    answer = lobit("export", tmp_path / "ckpt", *TO_XNNPACK, "--context", "64", "--chunk", "16", "-o", out, "--json")
    assert answer.code == DONE
    assert answer.json == json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert (out / "model.pte").read_bytes() == (direct / "model.pte").read_bytes()
    assert (out / "manifest.json").read_bytes() == (direct / "manifest.json").read_bytes()
    build = json.loads((out / "build.json").read_text(encoding="utf-8"))
    assert build["command"].startswith(f"lobit export {tmp_path / 'ckpt'} --target xnnpack")
    assert lobit("verify", out, tmp_path / "ckpt").code == DONE


def test_export_does_what_every_option_says(models: Any, tmp_path: Path, lobit: Lobit) -> None:
    options = ["--group-size", "64", "--kv-cache", "float", "--context", "32", "--chunk", "8", "--except", "head"]
    out = tmp_path / "bundle"
    answer = lobit("export", models("llama"), "--recipe", "8da4w-g32", *TO_XNNPACK, *options, "-o", out)
    assert answer.code == DONE
    assert "context" in answer.out and "chunks of up to 8" in answer.out
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["context"] == 32
    assert manifest["chunk"] == 8
    assert manifest["methods"][0]["inputs"][0]["shape"] == [1, "1..8"]
    assert manifest["cache"]["dtype"] == "float32"
    formats = {group["kind"]: group["format"] for group in manifest["weights"]}
    assert formats["mlp"] == "int4 group 64"
    assert formats["head"] == "float32"
    assert manifest["recipe"] == find_recipe("8da4w-g32").with_changes(("head",), 64, "float").to_json()
    assert not list(tmp_path.glob("*.partial"))


def test_run_does_what_every_option_says(bundles: Bundles, lobit: Lobit) -> None:
    bundle = bundles("stories260k", "fp")

    def text(*options: Any) -> str:
        answer = lobit("run", bundle, "--prompt", "Once upon a time", "--max-new-tokens", 20, "--json", *options)
        assert answer.code == DONE
        assert answer.json["stats"]["new_tokens"] == len(answer.json["tokens"]) == 20
        return str(answer.json["text"])

    greedy, warm = text(), text("--temperature", 1)
    assert greedy == text("--seed", 1)
    assert warm == text("--temperature", 1, "--seed", 0)
    assert len({greedy, warm, text("--temperature", 1, "--seed", 1)}) == 3
    assert text("--temperature", 1, "--top-k", 1) == text("--temperature", 1, "--top-p", 1e-6) == greedy
    assert text("--repetition-penalty", 5) != greedy
    threads = import_runtime()._threadpool_get_thread_count
    for count in (1, 2):
        assert text("--threads", count) == greedy
        assert threads() == count


def test_parity_does_what_every_option_says(
    bundles: Bundles, models: Any, sample: Path, tmp_path: Path, lobit: Lobit, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["parity", bundles("stories260k", "fp"), "--reference", models("stories260k"), "--text", sample, "--threads", 1]
    short = lobit(*command, "--tokens", 100, "--stages", "artifact", "--json")
    assert short.code == DONE
    assert [stage["name"] for stage in short.json["stages"]] == ["artifact"]
    assert short.json["tokens"] == 101  # and the one that begins a text
    assert short.json["text"] == sample.name
    table = lobit(*command, "--tokens", 64, "--stages", "fake_quant,artifact")
    assert f"parity {bundles('stories260k', 'fp').name}: passed" in table.out
    assert "fake_quant" in table.out
    assert "graph" not in table.out
    assert lobit(*command, "--checkpoint", models("llama")).code == MISTAKE
    nothing = {"limit": -1.0, "reason": "nothing is that good"}
    monkeypatch.setattr(parity_module, "judged", lambda chaos, how: (nothing, {}))
    failed = lobit(*command, "--tokens", 64, "--stages", "artifact")
    assert failed.code == GATE_FAILED
    assert f"parity {bundles('stories260k', 'fp').name}: FAILED" in failed.out


def test_verify_fails_the_gate_for_other_weights(bundles: Bundles, models: Any, tmp_path: Path, lobit: Lobit) -> None:
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(models("qwen3"), tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 2
    save_file(tensors, other / "model.safetensors")
    answer = lobit("verify", bundles("qwen3", "8da4w-g32"), other)
    assert answer.code == GATE_FAILED
    assert f"verify {bundles('qwen3', '8da4w-g32').name}: FAILED" in answer.out
    assert "layers.1.mlp.down" in answer.out
    assert "layers.0.mlp.down" not in answer.out


def test_bench_does_what_every_option_says(bundles: Bundles, lobit: Lobit) -> None:
    bundle = bundles("stories260k", "fp")
    answer = lobit("bench", bundle, "-p", "8", "-n", "2", "-d", "4,500", "-r", "2", "-t", "1", "--json")
    assert answer.code == DONE
    rows, skipped = answer.json["rows"], answer.json["skipped"]
    assert [row["test"] for row in rows] == ["pp8@d4", "tg2@d4"]
    assert [row["test"] for row in skipped] == ["pp8@d500", "tg2@d500"]
    assert {row["threads"] for row in rows} == {1}
    assert {len(row["samples_ns"]) for row in rows} == {2}


def test_report_makes_one_page_of_results(bundles: Bundles, models: Any, tmp_path: Path, lobit: Lobit) -> None:
    bundle = bundles("qwen3", "8da4w-g32")
    (tmp_path / "verify.json").write_text(lobit("verify", bundle, models("qwen3"), "--json").out, encoding="utf-8")
    page = tmp_path / "report.html"
    answer = lobit("report", bundle / "manifest.json", tmp_path / "verify.json", "-o", page)
    assert answer.code == DONE
    assert answer.out == f"report: {page}\n"
    assert bundle.name in page.read_text(encoding="utf-8")


def test_json_is_the_only_thing_on_stdout(bundles: Bundles, models: Any, tmp_path: Path, lobit: Lobit) -> None:
    answer = lobit("quantize", models("llama"), "--recipe", "8da8w", "-o", tmp_path / "ckpt", "--json")
    assert answer.json == {"checkpoint": str(tmp_path / "ckpt"), "recipe": find_recipe("8da8w").to_json()}
    assert "layer by layer" in answer.err


@pytest.mark.slow
def test_demo_takes_the_shipped_model_through_everything(tmp_path: Path, lobit: Lobit) -> None:
    answer = lobit("demo", "--out", tmp_path / "demo")
    assert answer.code == DONE, answer.err
    made = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"checkpoint", "demo-8da4w-g32", "demo-bitnet", "verify.json", "parity.json", "bench.json", "report.html"} <= made
    assert {"demo-8da4w-g32-onnx", "demo-bitnet-onnx"} <= made
    for name in ("verify.json", "ternary-verify.json", "onnx-verify.json", "onnx-ternary-verify.json"):
        assert json.loads((tmp_path / "demo" / name).read_text())["differing_integers"] == 0
    assert json.loads((tmp_path / "demo" / "parity.json").read_text())["phases"]["wrapped"]["kl_mean"] < 0.05
    again = lobit("demo", "--out", tmp_path / "demo")
    assert again.code == MISTAKE and "already there" in again.err


def test_the_plan_is_printed_and_fails_where_something_speaks_against_it(lobit: Lobit, models: Any) -> None:
    arguments = ("plan", models("llama"), *TO_XNNPACK, "--context", "64")
    fine = lobit(*arguments, "--recipe", "8da4w-g32", "--json")
    assert fine.code == DONE, fine.err
    said = json.loads(fine.out)
    wanted = {"parameters", "file_bytes", "bits_per_weight", "kv_cache_bytes", "host_peak_bytes", "device_peak_bytes", "problems"}
    assert wanted <= set(said)
    refused = lobit(*arguments, "--recipe", "w4-channel")
    assert refused.code == 1
    assert "INT8" in refused.out
