"""Small bundles for phones that are folders."""

import dataclasses
from pathlib import Path

from lobit.runtime.bundle import Bundle, open_bundle
from lobit.runtime.manifest import FileEntry, Method, Port
from tests.runtime.test_bench import make_bundle, manifest_of

VOCABULARY = 32


def write_bundle(folder: Path, files: dict[str, bytes] | None = None) -> Bundle:
    """A bundle of a program and a tokenizer, or of the given files; a second call replaces its files."""
    if not folder.exists():
        make_bundle(folder, "xnnpack")
    contents = {"model.bin": b"program" * 100, "tokenizer.json": b"{}", **(files or {})}
    for name, data in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    entries = [FileEntry.of(folder, name, "program" if name == "model.bin" else "config") for name in contents]
    step = Method("forward", "step", [], [Port("logits", "logits", [1, 1, VOCABULARY], "float32")])
    manifest = dataclasses.replace(manifest_of(folder, "xnnpack"), files=entries, methods=[step])
    (folder / "manifest.json").write_text(manifest.to_json())
    return open_bundle(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
