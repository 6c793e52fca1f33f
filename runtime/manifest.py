"""A bundle's manifest.json: the only contract between export and everything that runs. Standard library only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lobit.errors import BundleError

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
LARGEST_MANIFEST = 8 << 20
"""Bytes that are read at most."""


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle."""

    path: str
    """Relative to the bundle, with forward slashes."""
    role: str
    """`program`, `tokenizer` or `config`."""
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

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """The inverse of `to_json`.

        Raises:
            BundleError: not a manifest of this schema version; the message says where it differs.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{FILE_NAME} is not JSON ({error}): export the bundle again") from None
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise BundleError(f"{FILE_NAME} has schema version {version!r}, this lobit reads {SCHEMA_VERSION}: export the bundle again")
        manifest: Manifest = _build(Manifest, values, FILE_NAME)
        for entry in manifest.files:
            check_path(entry.path)
        return manifest


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` as an instance of the annotation `kind`."""
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, Mapping) or set(value) != set(hints):
            keys = sorted(value) if isinstance(value, Mapping) else value
            raise BundleError(f"{where} should have {sorted(hints)} and has {keys!r}: export the bundle again")
        return kind(**{name: _build(hint, value[name], f"{where}: {name}") for name, hint in hints.items()})  # type: ignore[operator]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is list and isinstance(value, list):
        return [_build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _build(arguments[1], item, f"{where}: {key}") for key, item in value.items()}
    if kind is Any:
        return value
    plain = arguments if origin in (Union, UnionType) else (kind,)
    if type(value) in plain:
        if isinstance(value, int) and not isinstance(value, bool) and value < 0:
            raise BundleError(f"{where} is {value}: it cannot be negative, export the bundle again")
        return value
    raise BundleError(f"{where} is {value!r}: {kind} is needed, export the bundle again")


def check_path(path: str) -> None:
    """Refuses a path that leaves the bundle.

    Raises:
        BundleError: absolute, with `..`, a backslash or a drive.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path or "\0" in path:
        raise BundleError(f"{FILE_NAME} names {path!r}, which leaves the bundle: do not use this bundle")


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
