"""A bundle's manifest.json: the only contract between export and everything that runs. Standard library only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lobit.errors import BundleError, listed, reason, shown
from lobit.from_json import build

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
LONGEST_PATH = 80
"""Characters; no target names its files so."""
MOST_THREADS = 1024
"""Of a runtime; no processor has more."""
SEAL = "sha256"
"""The last entry of the file: the digest of all others."""
LARGEST_MANIFEST = 8 << 20
"""Bytes that are read at most."""


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle."""

    path: str
    """Relative to the bundle, with forward slashes."""
    role: str
    """`program`, its `weights` where they are a file of their own, `tokenizer` or `config`."""
    bytes: int
    sha256: str

    @staticmethod
    def of(folder: Path, path: str, role: str) -> FileEntry:
        """The entry of a file that is there."""
        return FileEntry(path, role, (folder / path).stat().st_size, sha256_of(folder / path))


@dataclass(frozen=True)
class Port:
    """An input or output of the program."""

    name: str
    shape: list[int | str]
    """Fixed sizes, or a name and its range such as `1..128`."""
    dtype: str


@dataclass(frozen=True)
class CacheInfo:
    """The key-value cache."""

    dtype: str
    slots: list[int]
    """Positions that each layer keeps."""
    value_bytes: int
    """Keys and values."""
    scale_bytes: int
    """Their scales and zero points; 0 where there are none."""

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.value_bytes + self.scale_bytes


@dataclass(frozen=True)
class Tokens:
    """What a client must know of the tokenizer."""

    bos: int | None
    """Put before a text, where the tokenizer does it."""
    stop: list[int]
    """Generation ends at any of these."""
    chat_template: str | None
    """Jinja, as Hugging Face renders it."""
    special: dict[str, str]
    """`bos_token`, `eos_token`, …: what the template may name."""


@dataclass(frozen=True)
class Delegation:
    """Where the program's operators run."""

    backend: str
    partitions: int
    delegated: dict[str, int]
    """Operators on the delegate and how many of each."""
    left: dict[str, int]
    """Operators that stayed behind and how many of each."""


@dataclass(frozen=True)
class TensorGroup:
    """The bytes of one kind of weights in the program."""

    kind: str
    """`embedding`, `attention`, `mlp`, `head`, `norms`, `tables`."""
    format: str
    """`int4 group 32`, `float32`, …"""
    parameters: int
    bytes: int


@dataclass(frozen=True)
class ModelInfo:
    """The model that was exported."""

    family: str
    parameters: int
    """A tied embedding counts once."""
    layers: int
    hidden_size: int
    vocab_size: int
    max_context: int
    largest_window: int
    """0 where every layer sees the whole context."""


@dataclass(frozen=True)
class Manifest:
    """A bundle described."""

    name: str
    target: str
    model: ModelInfo
    recipe: dict[str, Any]
    """Verbatim, as `Recipe.to_json` gives it."""
    checkpoint_sha256: str
    """Of all integers, scales and floats that the program holds, before lowering (`quantized.fingerprint`)."""
    context: int
    chunk: int
    """The most tokens in one prefill call."""
    threads: int
    """Of the runtime, where it is not told otherwise; 0: one per core."""
    inputs: list[Port]
    outputs: list[Port]
    cache: CacheInfo
    tokens: Tokens
    delegation: Delegation
    weights: list[TensorGroup]
    files: list[FileEntry]
    versions: dict[str, str]
    schema_version: int = field(default=SCHEMA_VERSION)

    def file(self, role: str) -> FileEntry:
        """The first file of a role.

        Raises:
            BundleError: there is none.
        """
        entry = next((entry for entry in self.files if entry.role == role), None)
        if entry is None:
            raise BundleError(f"bundle {self.name} has no {role}: export it again")
        return entry

    @property
    def program_bytes(self) -> int:
        """Of the program and its weights."""
        return sum(entry.bytes for entry in self.files if entry.role in ("program", "weights"))

    def to_json(self) -> str:
        """The text of manifest.json."""
        return sealed(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Manifest:
        """The inverse of `to_json`.

        Raises:
            BundleError: not a manifest of this schema version, or a changed one; the message says where it differs.
        """
        try:
            values = json.loads(text)
            digest = _digest(values) if isinstance(values, dict) else ""
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{FILE_NAME} is not JSON ({reason(error)}): export the bundle again") from None
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION or isinstance(version, bool):
            told = f"{FILE_NAME} has schema version {shown(version)}, this lobit reads {SCHEMA_VERSION}"
            raise BundleError(f"{told}: export the bundle again")
        sha256 = values.pop(SEAL, None)
        try:
            manifest: Manifest = build(Manifest, values, FILE_NAME)
        except ValueError as error:
            raise BundleError(f"{error}, export the bundle again") from None
        for entry in manifest.files:
            check_path(entry.path)
        problems = list(_problems(manifest))
        if problems:
            raise BundleError(listed(problems, f"{FILE_NAME} contradicts itself, export the bundle again:"))
        if sha256 != digest:
            raise BundleError(f"{FILE_NAME} has changed: its values do not have the {SEAL} {shown(sha256)}, export the bundle again")
        return manifest


def sealed(values: Mapping[str, Any]) -> str:
    """The text of manifest.json, with the sha256 of its own values at the end."""
    return json.dumps({**values, SEAL: _digest(values)}, indent=2, ensure_ascii=False) + "\n"


def _digest(values: Mapping[str, Any]) -> str:
    """sha256 of values, in whatever order and layout a file has them."""
    text = json.dumps({name: value for name, value in values.items() if name != SEAL}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _problems(manifest: Manifest) -> Iterator[str]:
    """What cannot be true of any bundle."""
    model, context, slots = manifest.model, manifest.context, manifest.cache.slots
    sizes = {"layers": model.layers, "hidden_size": model.hidden_size, "vocab_size": model.vocab_size, "chunk": manifest.chunk}
    yield from (f"{name} is {size}" for name, size in sizes.items() if size < 1)
    if manifest.chunk > context or context > model.max_context:
        yield f"chunk {manifest.chunk}, context {context} and the model's own context {model.max_context} are not in this order"
    if len(slots) != model.layers or not all(1 <= size <= context for size in slots):
        yield f"{len(slots)} layers have a cache of {shown(slots)} positions: {model.layers} layers and a context of {context} are told"
    if manifest.threads > MOST_THREADS:
        yield f"threads is {manifest.threads}, over {MOST_THREADS}"
    tokens = [*manifest.tokens.stop, *([] if manifest.tokens.bos is None else [manifest.tokens.bos])]
    yield from (f"token {token} is outside the vocabulary of {model.vocab_size}" for token in tokens if token >= model.vocab_size)
    times = Counter(entry.path for entry in manifest.files)
    yield from (f"{name} is listed {count} times" for name, count in times.items() if count > 1)
    yield from (f"{name} has the sha256 {shown(text)}" for name, text in _hashes(manifest) if not re.fullmatch("[0-9a-f]{64}", text))


def _hashes(manifest: Manifest) -> list[tuple[str, str]]:
    return [("the checkpoint", manifest.checkpoint_sha256), *((entry.path, entry.sha256) for entry in manifest.files)]


def check_path(path: str) -> None:
    """Refuses a path that leaves the bundle.

    Raises:
        BundleError: absolute, with `..`, a backslash or a drive, or with characters that no file's name should have.
    """
    parts = PurePosixPath(path).parts
    if not path.isprintable() or len(path) > LONGEST_PATH:
        raise BundleError(f"{FILE_NAME} names {shown(path)}, which is no usable name of a file: do not use this bundle")
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path:
        raise BundleError(f"{FILE_NAME} names {shown(path)}, which leaves the bundle: do not use this bundle")


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
