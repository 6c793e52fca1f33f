"""The benchmark: what is timed, how a row's figures follow from its samples, and that each row has a process of its own."""

import dataclasses
import io
import json
import os
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lobit.errors import BundleError, InputError, LobitError
from lobit.runtime import bench_row
from lobit.runtime.bench import bench, bytes_per_token, row_of, run_row, workloads
from lobit.runtime.bench_row import Answer, Request, Workload, answer, measure, tokens_to_read
from lobit.runtime.bench_table import bench_table, count, size
from lobit.runtime.engine import Logits, SteppingEngine
from lobit.runtime.host import cpu, last_level_cache_bytes, memory_bandwidth
from lobit.runtime.manifest import CacheInfo, Delegation, FileEntry, Generation, Manifest, ModelInfo, TensorGroup, Tokens

CONTEXT = 64
HELD = 200 << 20
"""Bytes that the fake engine holds: far more than Python's own memory varies."""
FAKE_ENGINE = f"""
import ctypes
import numpy as np
from lobit.errors import BundleError
from lobit.runtime.engine import SteppingEngine

class FakeEngine(SteppingEngine):
    def __init__(self, bundle, threads, device):
        super().__init__(self.read, {CONTEXT}, 16, 32)
        if bundle.manifest.name == "broken":
            raise BundleError("broken has 3 faults: export it again")
        if bundle.manifest.name == "crashes":
            ctypes.string_at(0)
        if bundle.manifest.name == "large":
            self.held = np.ones({HELD}, dtype=np.uint8)
        print("a runtime that is not quiet")
        ctypes.CDLL(None).puts(b"and its native part")

    def read(self, tokens, position):
        return np.zeros((1, 32), dtype=np.float32)

open_engine = FakeEngine

def import_runtime():
    global modules
    modules = np.ones({HELD // 4}, dtype=np.uint8)
"""


class LoggingEngine(SteppingEngine):
    """Writes down what it was asked to do."""

    def __init__(self) -> None:
        super().__init__(self.read, CONTEXT, CONTEXT, 32)
        self.log: list[tuple[str, int]] = []

    def read(self, tokens: list[int], position: int) -> Logits:
        self.log.append((f"read {len(tokens)}", position))
        return np.zeros((1, 32), dtype=np.float32)

    def reset(self) -> None:
        self.log.append(("reset", self.position))
        super().reset()


def manifest_of(folder: Path, target: str, **changes: Any) -> Manifest:
    manifest = Manifest(
        name=folder.name,
        target=target,
        model=ModelInfo("llama", 1000, 2, 8, 32, CONTEXT, 0),
        recipe={"name": "8da4w-g32"},
        checkpoint_sha256="0" * 64,
        context=CONTEXT,
        chunk=16,
        threads=0,
        options={},
        methods=[],
        states=[],
        client=None,
        cache=CacheInfo("float32", [CONTEXT, 8], 7200, 0),
        tokens=Tokens(None, [], None, {}),
        generation=Generation(),
        delegation=Delegation("none", 0, {}, {}, {}),
        weights=[
            TensorGroup("embedding", "int4 group 32", 100, 1 << 20),
            TensorGroup("tables", "float32", 100, 1 << 19),
            TensorGroup("mlp", "int4 group 32", 100, 3000),
            TensorGroup("head", "int4 group 32", 100, 500),
        ],
        files=[FileEntry.of(folder, "model.bin", "program")],
        versions={},
    )
    return dataclasses.replace(manifest, **changes)


FAKE_TARGET = """
from lobit.targets import HOST, TARGETS, TargetEntry
TARGETS["fake"] = TargetEntry("a fake", "", {HOST: "fake_engine"}, ())
"""


def make_bundle(folder: Path, target: str = "fake", **changes: Any) -> Path:
    folder.mkdir()
    (folder / "model.bin").write_bytes(b"program")
    (folder / "manifest.json").write_text(manifest_of(folder, target, **changes).to_json())
    return folder


@pytest.fixture
def fake_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target `fake` in every Python process that is started now."""
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "fake_engine.py").write_text(FAKE_ENGINE)
    (folder / "sitecustomize.py").write_text(FAKE_TARGET)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def fast_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bandwidth read from a small block."""
    monkeypatch.setattr("lobit.runtime.bench.memory_bandwidth", lambda threads: memory_bandwidth(threads, 1 << 20))


def sampled(
    work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repetitions: int = 2
) -> tuple[Answer, LoggingEngine]:
    engine = LoggingEngine()
    monkeypatch.setattr(bench_row, "open_engine", lambda bundle, threads: engine)
    return measure(Request(str(make_bundle(tmp_path / "a")), work, 1, repetitions)), engine


def test_prompt_rows_read_the_prompt_at_once_behind_the_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, engine = sampled(Workload("pp", 20, 7), tmp_path, monkeypatch)
    once = [("read 7", 0), ("read 20", 7)]
    assert engine.log == [("reset", 0), *once, ("reset", 27), *once, ("reset", 27), *once]
    assert len(result.samples_ns) == len(result.first_token_ns or []) == 2
    assert all(first >= timed for first, timed in zip(result.first_token_ns or [], result.samples_ns, strict=True))


def test_generation_rows_read_one_token_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, engine = sampled(Workload("tg", 3), tmp_path, monkeypatch, repetitions=1)
    once = [("read 1", 0), ("read 1", 1), ("read 1", 2)]
    assert engine.log == [("reset", 0), *once, ("reset", 3), *once]
    assert len(result.samples_ns) == 1 and result.first_token_ns is None


def test_filling_the_cache_to_its_depth_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    engine = LoggingEngine()
    engine.step = lambda tokens, position: [next(clock) for _ in tokens] and np.zeros(32, dtype=np.float32)  # type: ignore
    monkeypatch.setattr(bench_row, "open_engine", lambda bundle, threads: engine)
    monkeypatch.setattr(bench_row, "perf_counter_ns", lambda: next(clock))
    for number, (work, reads) in enumerate({Workload("pp", 5, 30): 5, Workload("tg", 4, 30): 4}.items()):
        result = measure(Request(str(make_bundle(tmp_path / str(number))), work, 1, 2))
        assert result.samples_ns == [reads + 1] * 2


def test_tokens_are_always_the_same_and_inside_the_vocabulary() -> None:
    assert tokens_to_read(32, 50) == tokens_to_read(32, 50)
    assert set(tokens_to_read(32, 500)) == set(range(32))
    assert tokens_to_read(1 << 18, 8) == tokens_to_read(1 << 18, 16)[:8]


def test_workloads_are_named_as_llama_bench_names_them() -> None:
    names = [work.name for work in workloads([128, 512], [64], [0, 2048])]
    assert names == ["pp128", "pp512", "pp128@d2048", "pp512@d2048", "tg64", "tg64@d2048"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompts": [0]},
        {"generates": [-1]},
        {"depths": [-1]},
        {"prompts": [], "generates": []},
        {"depths": []},
        {"threads": 0},
        {"repetitions": 0},
        {"bundles": []},
        {"bundles": "twice"},
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused_before_anything_is_measured(tmp_path: Path, arguments: dict[str, Any]) -> None:
    folder = make_bundle(tmp_path / "a")
    if arguments.get("bundles") == "twice":
        arguments = {"bundles": [folder, folder]}
    with pytest.raises(InputError):
        bench(**{"bundles": [folder], **arguments})


def test_speed_and_deviation_are_those_of_the_samples(tmp_path: Path) -> None:
    manifest = manifest_of(make_bundle(tmp_path / "a"), "fake")
    row = row_of(manifest, Workload("pp", 10, 4), Answer([1_000_000, 2_000_000], [1_500_000, 2_500_000], 0.5, 1, 2), 2, 10.0)
    assert row["tokens_per_second"] == pytest.approx(7500)
    assert row["stddev"] == pytest.approx(statistics.stdev([10_000, 5_000]))
    assert row["first_token_ms"] == pytest.approx(2.0)
    assert (row["test"], row["samples_ns"]) == ("pp10@d4", [1_000_000, 2_000_000])
    assert (row["gigabytes_per_second"], row["bandwidth_share"]) == (None, None)
    assert row_of(manifest, Workload("tg", 1), Answer([5], None, 0.5, 1, 2), 2, 10.0)["stddev"] == 0


def test_bytes_of_a_token_are_its_weights_and_the_filled_part_of_the_cache(tmp_path: Path) -> None:
    manifest = manifest_of(make_bundle(tmp_path / "a"), "fake")
    slot = 7200 // (CONTEXT + 8)
    assert bytes_per_token(manifest, Workload("tg", 1)) == 3500 + slot * 2
    assert bytes_per_token(manifest, Workload("tg", 3, 6)) == pytest.approx(3500 + slot * (7 + 7 + 8 + 8 + 9 + 8) / 3)
    row = row_of(manifest, Workload("tg", 1), Answer([1000], None, 0.5, 1, 2), 2, 10.0)
    assert row["gigabytes_per_second"] == pytest.approx(3500 / 1000 + slot * 2 / 1000)
    assert row["bandwidth_share"] == pytest.approx(row["gigabytes_per_second"] / 10)


def test_an_embedding_that_is_the_head_is_read_whole(tmp_path: Path) -> None:
    manifest = manifest_of(make_bundle(tmp_path / "a"), "fake", cache=CacheInfo("float32", [], 0, 0))
    tied = dataclasses.replace(manifest, weights=[group for group in manifest.weights if group.kind != "head"])
    assert bytes_per_token(manifest, Workload("tg", 1)) == 3500
    assert bytes_per_token(tied, Workload("tg", 1)) == 3000 + (1 << 20)


@pytest.mark.usefixtures("fake_runtime", "fast_memory")
def test_bench_measures_every_row_in_its_own_process_and_skips_what_does_not_fit(tmp_path: Path) -> None:
    small, large = make_bundle(tmp_path / "small"), make_bundle(tmp_path / "large")
    seen: list[tuple[str, int, int]] = []
    result = bench(
        [small, large], [8, 60], [4], [0, 10], threads=1, repetitions=3, progress=lambda *entry: seen.append(entry)
    )
    tests = ["pp8", "pp60", "pp8@d10", "tg4", "tg4@d10"]
    rows = [(row["model"], row["test"]) for row in result["rows"]]
    assert rows == [(name, test) for name in ("small", "large") for test in tests]
    assert [what.split()[0] for what, _, _ in seen[:-1]] == ["small", "large"] * len(tests), "bundles take turns"
    assert [entry[1:] for entry in seen] == [(i, 10) for i in range(11)]
    assert [(entry["model"], entry["test"]) for entry in result["skipped"]] == [("small", "pp60@d10"), ("large", "pp60@d10")]
    assert all(len(row["samples_ns"]) == 3 and row["load_seconds"] > 0 for row in result["rows"])
    peaks = {row["model"]: [] for row in result["rows"]}  # type: dict[str, list[int]]
    for row in result["rows"]:
        peaks[row["model"]].append(row["peak_rss_bytes"])
        assert row["base_rss_bytes"] <= row["peak_rss_bytes"]
    assert min(peaks["large"]) - max(peaks["small"]) > 0.9 * HELD
    assert json.loads(json.dumps(result)) == result
    assert result["device"].startswith("host: ") and result["versions"]["python"] and "Not timed" in result["what"]
    console = Console(file=io.StringIO(), width=200)
    console.print(bench_table(result))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("8da4w-g32") == 10 and "left out: small pp60@d10: 70 tokens are more than the context of 64" in text


@pytest.mark.usefixtures("fake_runtime")
def test_the_peak_is_the_rows_and_not_its_parents(tmp_path: Path) -> None:
    request = Request(str(make_bundle(tmp_path / "small")), Workload("tg", 1), 1, 1)
    before = run_row(request).peak_rss_bytes
    held = np.ones(HELD, dtype=np.uint8)
    assert run_row(request).peak_rss_bytes < before + held.nbytes // 2


@pytest.mark.usefixtures("fake_runtime")
def test_the_runtimes_modules_are_in_the_base_and_the_model_is_not(tmp_path: Path) -> None:
    found = run_row(Request(str(make_bundle(tmp_path / "large")), Workload("tg", 1), 1, 1))
    assert found.base_rss_bytes > HELD // 4
    assert found.peak_rss_bytes - found.base_rss_bytes > 0.9 * HELD


@pytest.mark.usefixtures("fake_runtime")
def test_an_error_of_the_row_is_the_benchs_error(tmp_path: Path) -> None:
    broken = make_bundle(tmp_path / "broken")
    with pytest.raises(LobitError, match=r"^broken has 3 faults: export it again$"):
        run_row(Request(str(broken), Workload("tg", 1), 1, 1))


@pytest.mark.usefixtures("fake_runtime")
def test_a_row_that_crashes_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(LobitError, match=r"tg1 of .*crashes ended without an answer, exit code -11"):
        run_row(Request(str(make_bundle(tmp_path / "crashes")), Workload("tg", 1), 1, 1))


def test_a_bundle_for_an_unknown_target_is_an_answer_with_an_error(tmp_path: Path) -> None:
    request = Request(str(make_bundle(tmp_path / "a", target="abacus")), Workload("tg", 1), 1, 1)
    assert "abacus" in answer(json.dumps(dataclasses.asdict(request)))["error"]


def test_a_changed_bundle_is_refused(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "a")
    (folder / "model.bin").write_bytes(b"another")
    with pytest.raises(BundleError, match="has changed"):
        bench([folder])


def test_cpu_names_the_processor_and_what_it_can_do() -> None:
    found = cpu()
    assert found["name"] and found["cores"] >= 1 and found["threads"] >= 1
    if sys.platform == "linux":
        flags = Path("/proc/cpuinfo").read_text().split()
        assert all(name in flags for name in found["instruction_sets"])
        assert ("avx2" in flags) == ("avx2" in found["instruction_sets"])


def test_arm_processors_are_told_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"Features": "fp asimd i8mm sve", "CPU implementer": "0x41", "CPU part": "0xd4f"}
    monkeypatch.setattr("lobit.runtime.host._cpuinfo", lambda: fields)
    found = cpu()
    assert found["instruction_sets"] == ["asimd", "i8mm", "sve"]
    assert found["name"].endswith("CPU implementer 0x41 CPU part 0xd4f") or sys.platform == "darwin"


@pytest.mark.parametrize("threads", [1, 3])
def test_bandwidth_is_the_median_of_passes_over_the_whole_block(threads: int) -> None:
    found = memory_bandwidth(threads, 10 << 20)
    assert found.block_bytes == 10 << 20 and found.threads == threads
    assert found.gb_s == statistics.median(found.samples) > 0.1


def test_bandwidths_block_is_larger_than_the_caches_and_fits_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[int] = []

    def note(count: int, dtype: Any) -> Any:
        wanted.append(count * 8)
        return np.zeros(count % 64 + 64, dtype=dtype)

    monkeypatch.setattr("lobit.runtime.host.np.empty", note)
    for cache, free in ((0, 100 << 30), (480 << 20, 100 << 30), (480 << 20, 2 << 30)):
        monkeypatch.setattr("lobit.runtime.host.last_level_cache_bytes", lambda cache=cache: cache)
        memory = SimpleNamespace(available=free)
        monkeypatch.setattr("lobit.runtime.host.psutil.virtual_memory", lambda memory=memory: memory)
        memory_bandwidth(1)
    assert wanted == [1 << 30, 2 << 30, 1 << 29]


def test_last_level_caches_are_counted_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for processor in range(4):
        for level, size_text in ((2, "2048K"), (3, "32M")):
            folder = tmp_path / f"cpu{processor}/cache/index{level}"
            folder.mkdir(parents=True)
            (folder / "size").write_text(size_text + "\n")
            (folder / "shared_cpu_list").write_text("0-1\n" if processor < 2 else "2-3\n")
    monkeypatch.setattr("lobit.runtime.host.SYSTEM", tmp_path)
    assert last_level_cache_bytes() == 2 * (32 << 20)


@pytest.mark.parametrize(("value", "text"), [(512, "512 B"), (1500, "1.5 kB"), (78_231_552, "78.2 MB"), (3 * 10**9, "3.00 GB")])
def test_sizes_are_written_in_decimal_units(value: int, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(("value", "text"), [(264_128, "264 K"), (124_600_000, "124.6 M"), (1_084_400_000, "1.08 B")])
def test_parameters_are_counted_in_thousands(value: int, text: str) -> None:
    assert count(value) == text
