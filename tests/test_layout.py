"""What the tree promises: who imports whom, the links, the packages, files that read in one sitting."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from lobit.targets import HOST, TARGETS, TargetEntry

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lobit", "quant_recipes", "export", "runtime")
LINKED = FOLDERS[1:]
DATA = ("android_demo",)
"""Folders without Python that are installed with the package."""
LONGEST_FILE = 400
"""Lines: a file reads in one sitting."""

PARTS = {
    "lobit": "core",  # errors, quiet, memory, tokenizer, the demo's grammar: whatever is not named below
    "lobit.model": "model",
    "lobit.rope": "model",
    "lobit.families": "model",
    "lobit.config_fields": "model",
    "lobit.layout": "model",
    "lobit.checkpoint": "model",
    "lobit.gguf_folder": "model",
    "lobit.prequantized": "model",
    "lobit.android": "android",
    "lobit.cli": "cli",
    "lobit.cli_eval": "cli",
    "lobit.harness_model": "cli",
    "lobit.cli_learn": "cli",
    "lobit.cli_make": "cli",
    "lobit.cli_options": "cli",
    "lobit.verbs": "cli",
    "lobit.tables": "cli",
    "lobit.tables_eval": "cli",
    "lobit.quant_recipes": "quant_recipes",
    "lobit.export": "export",
    "lobit.runtime": "runtime",
    "lobit.runtime.manifest": "manifest",
    "lobit.runtime.manifest_problems": "manifest",
    "lobit.runtime.gguf_ports": "manifest",
    "lobit.runtime.onnx_ports": "manifest",
    "lobit.runtime.qnn_ports": "manifest",
    "lobit.runtime.coreml_ports": "manifest",
    "lobit.runtime.coreml_proto": "manifest",
    "lobit.runtime.qnn_libraries": "manifest",
    "lobit.runtime.client": "manifest",
}
"""A module's part is that of its longest prefix here."""

EVERYTHING = set(PARTS.values())
ALLOWED = (
    ("lobit/__main__.py", {"cli"}),
    ("lobit/cli*", EVERYTHING),
    ("lobit/harness*.py", EVERYTHING),
    ("lobit/verbs*", EVERYTHING),
    ("lobit/tables*.py", EVERYTHING),
    ("lobit/android/*", {"core", "manifest", "android"}),
    ("lobit/*", {"core", "model"}),
    ("quant_recipes/*", {"core", "model", "quant_recipes"}),
    ("export/*/proof.py", {"core", "model", "quant_recipes", "export", "runtime", "manifest"}),
    ("export/*", {"core", "model", "quant_recipes", "export", "manifest"}),
    ("runtime/manifest.py", {"core", "manifest"}),
    ("runtime/gguf_ports.py", set()),
    ("runtime/onnx_ports.py", set()),
    ("runtime/reference.py", {"core", "model", "quant_recipes", "runtime", "manifest"}),
    ("runtime/parts.py", {"core", "model", "quant_recipes", "runtime", "manifest"}),
    ("runtime/parity.py", {"core", "model", "quant_recipes", "runtime", "manifest"}),
    ("runtime/verify.py", {"core", "model", "quant_recipes", "runtime", "manifest"}),
    ("runtime/executorch_android.py", {"core", "runtime", "manifest", "android"}),
    ("runtime/*", {"core", "runtime", "manifest"}),
)
"""Which parts a file may import; the first pattern that fits counts."""


def python_files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("**/*.py") if not is_linked(path))


def is_linked(path: Path) -> bool:
    return path.relative_to(ROOT).parts[0] == "lobit" and path.relative_to(ROOT).parts[1] in LINKED


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in the file it does."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules |= {name if module_exists(name) else node.module for name in inner}
    return {module for module in modules if module.split(".")[0] == "lobit"}


def part(module: str) -> str:
    return PARTS[max((prefix for prefix in PARTS if f"{module}.".startswith(f"{prefix}.")), key=len)]


@pytest.mark.parametrize("path", python_files(), ids=relative)
def test_imports_go_one_way(path):
    allowed = next(parts for pattern, parts in ALLOWED if fnmatchcase(relative(path), pattern))
    assert sorted(module for module in imported(path) if part(module) not in allowed) == []


@pytest.mark.parametrize("path", python_files(), ids=relative)
def test_imports_name_the_whole_path(path):
    """A relative import means one thing in export/ and another through lobit/export."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    assert [node.lineno for node in nodes if isinstance(node, ast.ImportFrom) and node.level] == []


@pytest.mark.parametrize("folder", [*LINKED, *DATA])
def test_link_is_relative_and_points_to_its_folder(folder):
    link = ROOT / "lobit" / folder
    assert link.readlink() == Path("..") / folder


def test_lists_every_package():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in python_files() if path.name == "__init__.py"}
    named = {folder if folder.split(".")[0] == "lobit" else f"lobit.{folder}" for folder in found}
    assert set(setuptools["packages"]) == named | {f"lobit.{folder}" for folder in DATA}
    assert setuptools["package-dir"] == {"lobit": "lobit"} | {f"lobit.{folder}": folder for folder in (*LINKED, *DATA)}


def test_every_folder_with_code_is_a_package():
    assert sorted({relative(path.parent) for path in python_files() if not (path.parent / "__init__.py").is_file()}) == []


def source_files() -> list[Path]:
    """Everything that a person writes: no links, no build outputs."""
    tests = [*(ROOT / "tests").glob("**/*.py"), *(ROOT / "android_demo").glob("**/src/**/*.kt")]
    return [*python_files(), *sorted(tests)]


def test_files_read_in_one_sitting():
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_kotlin_lines_are_no_longer_than_python_ones():
    long = [path for path in source_files() if path.suffix == ".kt" and max(map(len, path.read_text(encoding="utf-8").splitlines())) > 140]
    assert long == []


def test_no_file_is_called_utils():
    assert [relative(path) for path in source_files() if path.stem.lower() in {"util", "utils", "helpers", "misc"}] == []


def test_no_path_of_one_machine():
    absolute = re.compile(r"""(?<![\w.}])/(home|root|work|Users)/\w""")
    names = ("*.md", "*.toml", "*.txt", "Makefile", ".ci/*", ".gitignore")
    texts = [*source_files(), *(path for name in names for path in ROOT.glob(name))]
    assert [relative(path) for path in texts if absolute.search(path.read_text(encoding="utf-8"))] == []


TARGET_FILES = {"__init__.py", "target.py", "weights.py"}
"""That every target's folder has: its way to a bundle, and how integers lie in its files."""


def targets_of(path: Path) -> set[str]:
    """The targets whose folders a file imports from."""
    return {module.split(".")[2] for module in imported(path) if module.startswith("lobit.export.") and module.split(".")[2] in TARGETS}


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_a_target_is_a_folder_with_the_same_names(target):
    folder = ROOT / "export" / target
    assert {path.name for path in folder.iterdir()} >= TARGET_FILES
    assert TARGETS[target].export == f"lobit.export.{target}.target"


def test_no_target_imports_another_and_what_they_share_imports_none():
    """What all targets share lies directly in export/, and finds a target through the registry."""
    for path in python_files():
        folder, name = relative(path).split("/")[:2]
        own = {name} if folder == "export" and name in TARGETS else set()
        assert targets_of(path) <= own, relative(path)


def test_a_target_is_a_folder_and_one_line(monkeypatch, tmp_path):
    """An empty target is found by its name, and refused with what to install where its folder or packages are missing."""
    import lobit.export
    from lobit.errors import MissingPartError
    from lobit.export.target import find_target

    monkeypatch.setitem(TARGETS, "foo", TargetEntry("nothing", "lobit.export.foo.target", {HOST: "lobit.runtime.foo"}, ("foo",)))
    with pytest.raises(MissingPartError, match=r"target foo needs .*pip install 'lobit\[foo\]'"):
        find_target("foo")
    (tmp_path / "foo").mkdir()
    for name in sorted(TARGET_FILES):
        (tmp_path / "foo" / name).write_text("", encoding="utf-8")
    monkeypatch.setattr(lobit.export, "__path__", [*lobit.export.__path__, str(tmp_path)])
    try:
        assert find_target("foo") is sys.modules["lobit.export.foo.target"]
    finally:
        for module in ("lobit.export.foo", "lobit.export.foo.target"):
            sys.modules.pop(module, None)


def test_every_target_has_its_modules_packages_and_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(TARGETS) <= set(extras)
    for target in TARGETS.values():
        for module in (target.export, *target.engines.values()):
            assert module_exists(module), module
