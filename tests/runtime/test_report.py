"""The report page: what it shows, what it refuses, and that it needs nothing but itself."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lobit.errors import InputError
from lobit.runtime import report_plots
from lobit.runtime.manifest import sealed
from lobit.runtime.report import report
from lobit.runtime.report_canvas import clipped, number, percent, seconds, size
from lobit.runtime.report_results import group, read

HOSTILE = "x id=\"</text><script>alert(1)</script> style=' $x^2$ & é \ud800 https://example.org/x.js"
SECTIONS = {
    "parity": {"parity"},
    "verify": {"weights"},
    "eval": {"tasks"},
    "compiled": {"calls"},
    "bench": {"speed", "memory", "versions"},
    "manifest": {"sizes", "memory", "delegation", "recipe", "versions"},
    "build": {"build"},
}
VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    @property
    def sections(self) -> set[str]:
        return {str(attributes["id"]) for tag, attributes in self.tags if tag == "section"}


def metrics(kl: float) -> dict[str, float]:
    return {"kl_mean": kl, "kl_p99": 7 * kl, "top1_agreement": 1 - kl, "perplexity": 4 + kl}


def speed_row(name: str, test: str, tokens: int, depth: int, recipe: str = "8da4w-g32") -> dict[str, Any]:
    return {
        "model": name, "model_bytes": 212_000, "params": 264_128, "target": "xnnpack", "recipe": recipe, "threads": 2, "test": test,
        "samples_ns": [tokens * 1_000_000, tokens * 1_100_000], "tokens_per_second": 950.0, "stddev": 45.0, "first_token_ms": 3.5,
        "peak_rss_bytes": 61_000_000, "base_rss_bytes": 50_000_000,
        "kv_cache_bytes": 330_000, "gigabytes_per_second": 0.2, "depth": depth, "tokens": tokens,
    }  # fmt: skip


def results(name: str = "stories", kl: float = 0.02, recipe: str = "8da4w-g32") -> dict[str, Any]:
    """One result of each kind."""
    bundle = {"name": name, "target": "xnnpack", "recipe": recipe}
    counts = {"integers": 262_144, "differing_integers": 0, "scales": 8192, "differing_scales": 0}
    stages = (("fake_quant", 0.9 * kl, 0.9 * kl), ("graph", 0.9 * kl, 1e-8), ("artifact", kl, 0.1 * kl))
    return {
        "parity": {
            "kind": "parity", "bundle": bundle, "model": "org/stories", "text": "sample.txt", "tokens": 512, "reference_perplexity": 4.0,
            "stages": [{"name": stage, **metrics(total), "kl_step": step} for stage, total, step in stages],
            "phases": {"prefill": metrics(kl), "decode": metrics(kl), "wrapped": None},
            "limits": {"kl_mean": {"limit": 0.05, "reason": "what four bits cost"}}, "passed": kl <= 0.05, "entropy": None,
        },
        "bench": {
            "kind": "bench", "rows": [speed_row(name, test, tokens, depth, recipe) for test, tokens, depth in
                                      (("pp128", 128, 0), ("pp128@d256", 128, 256), ("tg32", 32, 0), ("tg32@d256", 32, 256))],
            "device": "host", "versions": {"executorch": "1.5.1"}, "memory_bandwidth_gb_s": 20.0, "what": "calls of the engine",
            "cpu": {"name": "a processor", "instruction_sets": ["avx2"], "cores": 2, "threads": 2}, "skipped": ["tg32@d512: too deep"],
        },
        "compiled": {
            "kind": "compiled", "device": "an emulator", "what": "nothing is timed",
            "rows": [{"model": name, "target": "xnnpack", "recipe": recipe, "soc": "SM8650", "method": method, "tokens": tokens,
                      "read_bytes": 200_000, "operators": 900, "delegates": 2, "program_bytes": 212_000, "cache_bytes": 330_000}
                     for method, tokens in (("prefill", 32), ("decode", 1))],
        },
        "verify": {
            "kind": "verify", "bundle": bundle, "tensors": 1, **counts, "layers": [{"name": "layers.0.mlp.up", **counts}], "passed": True,
        },
        "manifest": {
            "name": name, "target": "xnnpack", "recipe": {"name": recipe, "summary": "INT4 in groups", "rules": []},
            "model": {"family": "llama", "parameters": 264_128, "layers": 5, "hidden_size": 64, "vocab_size": 512, "max_context": 512,
                      "largest_window": 0},
            "checkpoint_sha256": "ab" * 32, "context": 512, "chunk": 128, "threads": 0,
            "options": {}, "states": [],
            "methods": [{"name": "forward", "role": "step",
                         "inputs": [{"name": "tokens", "role": "tokens", "shape": [1, "1..128"], "dtype": "int64"}],
                         "outputs": [{"name": "logits", "role": "logits", "shape": [1, 512], "dtype": "float32"}]}],
            "generation": {"temperature": None, "top_k": None, "top_p": None, "repetition_penalty": None},
            "cache": {"dtype": "int8", "slots": [512] * 5, "value_bytes": 327_680, "scale_bytes": 0},
            "tokens": {"bos": 1, "stop": [2], "chat_template": None, "special": {}},
            "delegation": {"backend": "XNNPACK", "partitions": 11, "delegated": {"linear": 36}, "left": {"llama.custom_sdpa": 5}},
            "weights": [{"kind": "mlp", "format": "int4 group 4", "parameters": 165_120, "bytes": 165_000}],
            "files": [{"path": "model.pte", "role": "program", "bytes": 212_000, "sha256": "cd" * 32}],
            "versions": {"torch": "2.13.0"}, "schema_version": "2.0",
        },
        "eval": {
            "kind": "eval", "context": 512, "shots": 0, "averages": [{"value": 0.7, "se": 0.02}] * 2,
            "columns": [{"name": "org/stories", "stage": "float", "target": "reference", "recipe": "none"},
                        {"name": name, "stage": "artifact", "target": "xnnpack", "recipe": recipe}],
            "tasks": [{"name": "arc", "type": "multiple_choice", "items": 200, "chance": 0.25}],
            "rows": [{"task": "arc", "column": column, "items": 200, "cut": 1, "metrics": {"accuracy": {"value": 0.7, "se": 0.03}}}
                     for column in (0, 1)],
            "pairs": [{"task": "arc", "metric": "accuracy", "base": 0, "other": 1, "lost": 9, "gained": 1, "difference": -0.04, "se": 0.016,
                       "p": 0.02}],
        },
        "build": {"kind": "build", "bundle": name, "command": "lobit export stories",
                  "stages": [{"name": "lower", "seconds": 75.0, "peak_rss_bytes": 900_000_000}]},
    }  # fmt: skip


def written(folder: Path, values: dict[str, Any], prefix: str = "") -> list[Path]:
    """The results as files."""
    paths = []
    for kind, value in values.items():
        paths.append(folder / f"{prefix}{kind}.json")
        paths[-1].write_text(sealed(value) if kind == "manifest" else json.dumps(value), encoding="utf-8")
    return paths


def made(folder: Path, values: dict[str, Any]) -> Page:
    return Page(report(written(folder, values), folder / "report.html").read_text(encoding="utf-8"))


def hostile(value: Any) -> Any:
    """Every string and key that can be anything, replaced."""
    kept = ("kind", "test", "target", "path", "role", "dtype", "sha256", "checkpoint_sha256", "schema_version")
    if isinstance(value, dict):
        free = {"linear", "llama.custom_sdpa", "torch", "executorch"}
        return {HOSTILE if key in free else key: item if key in kept else hostile(item) for key, item in value.items()}
    return [hostile(item) for item in value] if isinstance(value, list) else HOSTILE if isinstance(value, str) else value


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_section_is_there_when_its_result_is(tmp_path: Path, kind: str) -> None:
    only = made(tmp_path, {kind: results()[kind]})
    assert only.sections == SECTIONS[kind]
    links = {attributes["href"] for tag, attributes in only.tags if tag == "a"}
    assert links == {f"#{section}" for section in SECTIONS[kind]}


def test_the_page_says_how_to_fill_what_is_missing(tmp_path: Path) -> None:
    assert "lobit verify BUNDLE CKPT" in made(tmp_path, {"parity": results()["parity"]}).words
    assert "Not in this report" not in made(tmp_path, results()).words


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    text = report(written(tmp_path, results()), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    for tag, attributes in Page(text).tags:
        assert tag not in {"script", "iframe", "object", "embed", "img"}
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    paths = written(tmp_path, results())
    first = report(paths, tmp_path / "a.html", "lobit report").read_bytes()
    assert report(paths, tmp_path / "b.html", "lobit report").read_bytes() == first


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    paths = [*written(tmp_path, hostile(results())), *written(tmp_path, results(), "tame-")]
    found = Page(report(paths, tmp_path / "report.html", HOSTILE).read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in found.tags}
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    names = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(names) == len(set(names))
    assert HOSTILE.replace("\ud800", "?") in found.words


def test_a_passing_bundle_is_shown_as_passing(tmp_path: Path) -> None:
    words = made(tmp_path, results()).words
    assert "What runs is what was trained" in words and "✓ pass" in words and "✕" not in words


def test_a_failing_parity_is_shown_as_failing(tmp_path: Path) -> None:
    words = made(tmp_path, results(kl=0.3)).words
    assert "This is not what was trained" in words and "✕ fail" in words and "Mean KL 0.300, limit 0.05" in words


def test_parts_at_fault_and_costly_quantization_are_told(tmp_path: Path) -> None:
    values = results(kl=0.3)["parity"]
    names = ["layers.0.qkv", "layers.3.attention"]
    rows = [{"name": name} for name in names]
    values["parts"] = {"tokens": 43, "passed": False, "nearest": 7.0, "faults": names[1:], "worst": names[::-1], "all": rows}
    values["warnings"] = [{"what": "quantization costs much", "advice": "choose scales on a text"}]
    words = made(tmp_path, {"parity": values}).words
    assert "do not give what they should: layers.3.attention" in words
    assert "quantization costs much. What helps, in this order: choose scales on a text" in words


def test_weights_that_differ_fail_whatever_parity_says(tmp_path: Path) -> None:
    values = results()
    values["verify"] |= {"differing_integers": 3, "passed": False}
    words = made(tmp_path, values).words
    assert "This is not what was trained" in words and "3 integers and 0 scales differ" in words


def test_a_bundle_without_parity_is_not_called_good(tmp_path: Path) -> None:
    assert "Not yet compared with what was trained" in made(tmp_path, {"verify": results()["verify"]}).words


def test_figures_that_are_not_numbers_are_said_to_be(tmp_path: Path) -> None:
    values = results(kl=float("nan"))
    assert values["parity"]["passed"] is False
    assert "not a number" in made(tmp_path, values).words


def test_accuracy_is_drawn_with_error_bars_and_flips_are_told(tmp_path: Path) -> None:
    text = report(written(tmp_path, {"eval": results()["eval"]}), tmp_path / "report.html").read_text(encoding="utf-8")
    words = Page(text).words
    assert 'aria-label="Accuracy on each task"' in text and "70.0 ± 3.0 %" in words
    assert "70.00 ± 3.00" in words and "-4.00 ± 1.60" in words and "0.02 *" in words and "by chance: arc 25" in words


def test_an_evaluation_of_figures_that_are_no_numbers_is_drawn(tmp_path: Path) -> None:
    values = results()["eval"]
    values["rows"][1]["metrics"]["accuracy"] = {"value": float("nan"), "se": float("inf")}
    assert "0.0 ± 0.0 %" in made(tmp_path, {"eval": values}).words


def test_bundles_stand_side_by_side_in_colours_of_their_own(tmp_path: Path) -> None:
    paths = [*written(tmp_path, results("one"), "1-"), *written(tmp_path, results("two", 0.3, "w4-channel"), "2-")]
    text = report(paths, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "two is not what was trained" in Page(text).words
    assert [one.colour for one in group(read(paths))] == ["bundle-0", "bundle-1"]
    assert "var(--bundle-1)" in text


def test_why_programs_are_not_timed_is_told_once(tmp_path: Path) -> None:
    one, two = results("one")["compiled"], results("two")["compiled"]
    two["what"] += ". A call reads so many bytes"
    paths = [*written(tmp_path, {"compiled": one}, "1-"), *written(tmp_path, {"compiled": two}, "2-")]
    words = Page(report(paths, tmp_path / "report.html").read_text(encoding="utf-8")).words
    assert words.count("nothing is timed") == 1 and "A call reads so many bytes" in words


def test_what_is_timed_is_told_once_for_several_runs(tmp_path: Path) -> None:
    one, two = results("one")["bench"], results("two")["bench"]
    two["memory_bandwidth_gb_s"] = 21.0
    paths = [*written(tmp_path, {"bench": one}, "1-"), *written(tmp_path, {"bench": two}, "2-")]
    words = Page(report(paths, tmp_path / "report.html").read_text(encoding="utf-8")).words
    assert words.count("calls of the engine") == 1 and words.count("GB/s measured") == 2


def test_rows_of_a_benchmark_find_their_bundle(tmp_path: Path) -> None:
    values = results("one")
    values["bench"]["rows"][0]["model"] = "org/stories"
    bundles = group(read(written(tmp_path, values)))
    assert [(one.name, len(one.speeds)) for one in bundles] == [("one", 4)]


def test_one_model_with_two_recipes_makes_two_bundles(tmp_path: Path) -> None:
    bench = results()["bench"]
    bench["rows"] += results(recipe="8da8w")["bench"]["rows"]
    bundles = group(read(written(tmp_path, {"bench": bench})))
    assert [one.name for one in bundles] == ["stories 8da4w-g32 xnnpack", "stories 8da8w xnnpack"]


def test_one_depth_is_drawn_as_bars(tmp_path: Path) -> None:
    bench = results()["bench"]
    bench["rows"] = [row for row in bench["rows"] if row["depth"] == 0]
    text = report(written(tmp_path, {"bench": bench}), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Tokens a second in decode" in text and "tokens already in the cache" not in text


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"kind": "plan"}', '{"kind": []}', '{"schema_version": 1}', "[" * 100_000])
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"(?s)what can is .*manifest\.json.*odd\.json"):
        report([*written(tmp_path, results()), tmp_path / "odd.json"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_all_bad_files_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"(?s)a\.json.*missing\.json cannot be read"):
        report([tmp_path / "a.json", tmp_path / "missing.json"], tmp_path / "report.html")


@pytest.mark.parametrize(
    ("kind", "path", "value", "said"),
    [
        ("parity", ("stages", 0, "kl_mean"), "much", r"parity\.stages\[0\]\.kl_mean should be float"),
        ("parity", ("passed",), 1, r"parity\.passed should be bool"),
        ("bench", ("rows", 1, "samples_ns"), 5, r"bench\.rows\[1\]\.samples_ns should be a list"),
        ("verify", ("layers", 0, "integers"), -1, r"verify\.layers\[0\]\.integers is -1"),
        ("build", ("stages",), {}, r"build\.stages should be a list"),
        ("eval", ("rows", 1, "metrics", "accuracy", "se"), None, r"eval\.rows\[1\]\.metrics\.accuracy\.se should be float"),
        ("eval", ("pairs", 0, "other"), 2, r"eval speaks of column 2 of 2"),
    ],
)
def test_a_damaged_result_is_refused_with_the_place(tmp_path: Path, kind: str, path: tuple[Any, ...], value: Any, said: str) -> None:
    values = copy.deepcopy(results()[kind])
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(InputError, match=said):
        made(tmp_path, {kind: values})


def test_two_different_results_of_one_kind_for_one_bundle_are_refused(tmp_path: Path) -> None:
    paths = [*written(tmp_path, {"parity": results()["parity"]}, "a-"), *written(tmp_path, {"parity": results(kl=0.3)["parity"]}, "b-")]
    with pytest.raises(InputError, match=r"a-parity\.json and b-parity\.json"):
        report(paths, tmp_path / "report.html")


def test_results_that_disagree_on_the_recipe_are_refused(tmp_path: Path) -> None:
    values = {"parity": results()["parity"], "verify": results(recipe="8da8w")["verify"]}
    with pytest.raises(InputError, match="bundle stories has recipe '8da4w-g32' in one file and '8da8w' in another"):
        made(tmp_path, values)


def test_a_report_stays_as_it_was_when_the_next_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.html"
    out.write_text("the one before", encoding="utf-8")
    monkeypatch.setattr(report_plots, "plots", lambda bundles: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report(written(tmp_path, results()), out)
    assert out.read_text(encoding="utf-8") == "the one before"
    assert not list(tmp_path.glob(".report*"))


def test_a_result_is_never_overwritten(tmp_path: Path) -> None:
    paths = written(tmp_path, results())
    with pytest.raises(InputError, match="one of the results"):
        report(paths, paths[0])
    with pytest.raises(InputError, match="a folder"):
        report(paths, tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        report(paths, tmp_path / "nowhere" / "report.html")


def test_figures_are_written_for_people() -> None:
    assert [number(value) for value in (0, 0.02134, 41.72, 12345, 4.2e-7, -3)] == ["0", "0.0213", "41.7", "12,300", "4.2×10⁻⁷", "−3.00"]
    assert [size(value) for value in (512, 71_234_567, 999_700, 4.3e9)] == ["512 bytes", "71.2 MB", "1.00 MB", "4.30 GB"]
    assert [percent(value) for value in (1, 0.963, 0.99996, 0.9912)] == ["100 %", "96.3 %", "> 99.99 %", "99.12 %"]
    assert [seconds(value) for value in (0.412, 12.3, 252, 3780)] == ["412 ms", "12.3 s", "4 min 12 s", "1 h 03 min"]
    assert clipped("a\nvery long name", 9) == "a ve…name"
