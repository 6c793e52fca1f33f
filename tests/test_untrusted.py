"""Nothing from a model's folder is executed: no pickle is read, no code of the folder is imported."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lobit", "quant_recipes", "export", "runtime")
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"torch.load", "torch.export.load", "torch.jit.load", "np.load", "numpy.load", "yaml.load", "eval", "exec", "pandas.read_pickle"}
"""What reads pickles, or executes what it reads."""


def sources() -> list[Path]:
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return sorted({path.resolve() for path in found})


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_unpickles_or_executes_a_file(path: Path) -> None:
    used = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            used |= {alias.name.split(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            used |= {(node.module or "").split(".")[0]} & MODULES
        elif isinstance(node, ast.Call):
            used |= {ast.unparse(node.func)} & CALLS
    assert not used


class Planted:
    """A pickle that says that it was read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo unpickled",)


WATCHED = """
import sys
def watch(event, arguments):
    if event == "pickle.find_class":
        print("unpickled", arguments, flush=True)
sys.addaudithook(watch)
import lobit.cli
lobit.cli.main()
"""


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", WATCHED, *map(str, arguments)]  # -P: as the installed command, which has no such path
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False, input="y\n" * 9)


def plant(folder: Path) -> None:
    """Puts pickles and code into a model's folder, the code where transformers looks for a model's own."""
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt", "optimizer.pth"):
        (folder / name).write_bytes(pickle.dumps(Planted()))
    for name in ("modeling_demo.py", "torch.py", "tokenizers.py", "json.py", "sitecustomize.py"):
        (folder / name).write_text("print('unpickled')")
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values |= {"auto_map": {"AutoModelForCausalLM": "modeling_demo.Model", "AutoConfig": "modeling_demo.Config"}}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def test_doctor_runs_no_code_of_a_folder_and_asks_for_no_leave_to(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ROOT / "lobit" / "demo" / "model", tmp_path / "model"))
    plant(folder)
    done = run(folder, "doctor", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert "unpickled" not in done.stdout + done.stderr and "y/N" not in done.stdout + done.stderr
    assert "contains custom code" in json.loads(done.stdout)["checks"][-1]["theirs"], "transformers would have run it"


@pytest.mark.parametrize("pointed", [False, True], ids=["beside", "in the index"])
def test_planted_pickles_and_code_are_not_run(pointed: bool, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ROOT / "lobit" / "demo" / "model", tmp_path / "model"))
    plant(folder)
    if pointed:
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "pytorch_model.bin"}}))
    done = run(folder, "quantize", folder, "--recipe", "8da4w-g32", "-o", tmp_path / "out")
    assert "unpickled" not in done.stdout + done.stderr
    if pointed:
        assert done.returncode == 2 and "pytorch_model.bin" in done.stderr and "cannot be read" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert not {path.name for path in (tmp_path / "out").iterdir()} & {path.name for path in folder.glob("*.bin")}
