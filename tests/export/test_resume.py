"""Exports that are killed: the same command goes on and gives the bytes of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lobit import verbs

KILLS = 20
DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
from lobit import verbs
import lobit.export.xnnpack.target
import executorch.extension.llm.custom_ops.custom_ops

model, out, seconds, kills = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])

def export():
    verbs.export(model, "xnnpack", out, recipe=verbs.choose_recipe("8da4w-g32"), context=128, chunk=32, command=["a", "command"])

def child(delay):
    process = os.fork()
    if process == 0:
        export()
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1]

random.seed(0)
seen = []
for _ in range(kills):
    if out.exists():
        break
    child(random.uniform(0, seconds))
    kept = out.with_name(out.name + ".partial")
    seen.append(sorted(str(path.relative_to(kept)) for path in kept.rglob("*")) if kept.exists() else [])
status = 0 if out.exists() else child(None)
print(json.dumps({"status": status, "seen": seen}))
"""


@pytest.mark.slow
def test_twenty_kills_change_no_byte(bundles: Any, models: Any, tmp_path: Path, another_process: Any) -> None:
    first = bundles("mobilellm_p1", "8da4w-g32")
    stages = json.loads((first / "build.json").read_text(encoding="utf-8"))["stages"]
    seconds = sum(stage["seconds"] for stage in stages)
    kills, rounds = 0, 0
    while kills < KILLS:
        out = tmp_path / str(rounds) / first.name
        out.parent.mkdir()
        done = another_process(DRIVER, models("mobilellm_p1"), out, seconds / 4, KILLS - kills)
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["status"] == 0, done.stderr
        assert any(any(name.endswith(".part") for name in names) for names in result["seen"]), "some kills came late enough"
        for name in ("model.pte", "manifest.json"):
            assert (out / name).read_bytes() == (first / name).read_bytes(), name
        assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in first.iterdir())
        assert [path.name for path in out.parent.iterdir()] == [first.name], "nothing else is left"
        kills, rounds = kills + len(result["seen"]), rounds + 1


def test_leftovers_of_another_release_are_not_used(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lobit.errors import BundleError
    from lobit.export import bundle
    from lobit.verbs import make

    def export(release: str) -> None:
        monkeypatch.setattr(bundle.metadata, "version", lambda name: release)
        verbs.export(models("llama"), "xnnpack", tmp_path / "bundle", recipe=verbs.choose_recipe("fp"), context=64, chunk=8)

    def stop(source: Path, recipe: Any, calibration: Any, kept: Any, count: Any) -> None:
        with kept.making("part") as path:
            path.write_text("finished", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(make, "_kept_checkpoint", stop)
    for release in ("1.0", "1.0"):
        with pytest.raises(KeyboardInterrupt):
            export(release)
    with pytest.raises(BundleError, match=r"versions\.executorch: '1\.0' there, '1\.1' now"):
        export("1.1")


@pytest.mark.parametrize("cut", [0, 3], ids=["empty", "short"])
def test_what_a_crash_cut_short_is_made_again(cut: int, tmp_path: Path) -> None:
    from lobit.stage_cache import StageCache

    kept = StageCache(tmp_path / "stages")
    for name in ("part", "checkpoint"):
        with kept.making(name) as path:
            if name == "checkpoint":
                path.mkdir()
            file = path if name == "part" else path / "file"
            file.write_text("finished", encoding="utf-8")
        assert StageCache(tmp_path / "stages").has(name)
        final = kept.folder / file.relative_to(kept.folder).as_posix().replace(".new", "")
        final.write_text("finished"[:cut], encoding="utf-8")
        assert not kept.has(name)
        with kept.making(name) as path:
            path.write_text("again", encoding="utf-8")
        assert kept.has(name)


def test_what_is_half_written_is_not_kept(tmp_path: Path) -> None:
    from lobit.stage_cache import StageCache

    kept = StageCache(tmp_path / "stages")
    with pytest.raises(RuntimeError), kept.making("part") as path:
        path.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert not StageCache(tmp_path / "stages").has("part")


def test_a_changed_model_has_other_files(tmp_path: Path) -> None:
    from lobit.stage_cache import files_of

    model = tmp_path / "model.safetensors"
    model.write_bytes(b"weights")
    first = files_of(tmp_path)
    assert files_of(tmp_path) == first
    os.utime(model, ns=(1, 1))
    assert files_of(tmp_path) != first


@pytest.mark.slow
def test_an_interrupted_export_says_how_to_go_on(models: Any, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    command = [sys.executable, "-m", "lobit.cli", "export", str(models("qwen3")), "--recipe", "8da4w-g32", "--target", "xnnpack"]
    process = subprocess.Popen(
        [*command, "--context", "64", "--chunk", "16", "-o", str(out)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background has it ignored
    )
    partial = out.with_name("bundle.partial")
    until = time.monotonic() + 120
    while not list(partial.glob("stages/*.part")) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in told
    assert not out.exists()
    manifest = verbs.export(str(models("qwen3")), "xnnpack", out, recipe=verbs.choose_recipe("8da4w-g32"), context=64, chunk=16)
    assert manifest.files
