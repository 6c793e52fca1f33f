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

MAJOR, MINOR = 2, 0
"""Of the schema. A reader refuses another major version; of a newer minor one it leaves out the fields that it does not know."""
FILE_NAME = "manifest.json"
LONGEST_PATH = 80
"""Characters; no target names its files so."""
MOST_THREADS = 1024
"""Of a runtime; no processor has more."""
SEAL = "sha256"
"""The last entry of the file."""
SEALED = re.compile(rb'(.*,\n  "sha256": ")([0-9a-f]{64})"\n\}\n', re.DOTALL)
"""A file: all that is before the digest, which is of these bytes, and the digest."""
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
    role: str
    """`tokens`; `position`: of the first of them, or `positions` of all; `logits`; `state`: one of `states`."""
    shape: list[int | str]
    """Fixed sizes, or the range of one that changes from call to call, such as `1..128`."""
    dtype: str


@dataclass(frozen=True)
class Method:
    """A function of the program."""

    name: str
    """As the runtime calls it."""
    role: str
    """`step`: reads 1 to `chunk` tokens behind those already read, and gives the logits of the last, or of all."""
    inputs: list[Port]
    outputs: list[Port]


@dataclass(frozen=True)
class State:
    """What a program remembers from call to call, where the client keeps it: zeros at first, then what the call before has given."""

    input: str
    """The port that takes it."""
    output: str
    """The port that gives it back."""
    dtype: str
    shape: list[int]
    """When it is full."""
    axis: int | None
    """Of the shape: the one with an entry for every position. None: the state has none, and is of this shape from the beginning."""
    window: int | None
    """Positions that the model looks back at; None: at all."""
    in_place: bool
    """Whether input and output are one piece of memory of the full shape. Otherwise the axis is as long as tokens were read: 0 at first."""


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
class Generation:
    """How the model's authors draw tokens (generation_config.json); null where they say nothing."""

    temperature: float | None = None
    """0: always the likeliest."""
    top_k: int | None = None
    """0: from all."""
    top_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class Delegation:
    """Where the program's operators run: a description, which chooses nothing."""

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
    """The most tokens that are read in one call."""
    threads: int
    """Of the runtime, where it is not told otherwise; 0: one per core."""
    options: dict[str, str | int | bool]
    """Of the target, by names of its own: what the program was made for, and how it is to be run."""
    methods: list[Method]
    states: list[State]
    """Empty where the program keeps its own."""
    cache: CacheInfo
    tokens: Tokens
    generation: Generation
    delegation: Delegation
    weights: list[TensorGroup]
    files: list[FileEntry]
    versions: dict[str, str]
    schema_version: str = field(default=f"{MAJOR}.{MINOR}")

    def file(self, role: str) -> FileEntry:
        """The first file of a role.

        Raises:
            BundleError: there is none.
        """
        entry = next((entry for entry in self.files if entry.role == role), None)
        if entry is None:
            raise BundleError(f"bundle {self.name} has no {role}: export it again")
        return entry

    def method(self, role: str) -> Method:
        """The method of a role.

        Raises:
            BundleError: there is none.
        """
        found = next((method for method in self.methods if method.role == role), None)
        if found is None:
            raise BundleError(f"bundle {self.name} has no method for {role}: export it again")
        return found

    @property
    def all_logits(self) -> bool:
        """Whether a call gives the logits of all its tokens, not of the last alone."""
        return any(port.role == "logits" and port.shape[1] != 1 for port in self.method("step").outputs)

    @property
    def program_bytes(self) -> int:
        """Of the program and its weights."""
        return sum(entry.bytes for entry in self.files if entry.role in ("program", "weights"))

    def to_json(self) -> str:
        """The text of manifest.json."""
        return sealed(dataclasses.asdict(self))

    @staticmethod
    def from_json(data: bytes) -> Manifest:
        """The inverse of `to_json`, of the file's bytes.

        Raises:
            BundleError: not a manifest of this schema's major version, or a changed one; the message says where it differs.
        """
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{FILE_NAME} is not JSON ({reason(error)}): export the bundle again") from None
        minor = _minor(values.get("schema_version") if isinstance(values, dict) else None)
        digest = values.pop(SEAL, None)
        try:
            manifest: Manifest = build(Manifest, values, FILE_NAME, more=minor > MINOR)
        except ValueError as error:
            raise BundleError(f"{error}, export the bundle again") from None
        for entry in manifest.files:
            check_path(entry.path)
        problems = list(_problems(manifest))
        if problems:
            raise BundleError(listed(problems, f"{FILE_NAME} contradicts itself, export the bundle again:"))
        seal = SEALED.fullmatch(data)
        if seal is None or hashlib.sha256(seal[1]).hexdigest().encode() != seal[2]:
            raise BundleError(f"{FILE_NAME} has changed: its bytes do not have the {SEAL} {shown(digest)}, export the bundle again")
        return manifest


def _minor(version: Any) -> int:
    """The minor version of a schema that can be read.

    Raises:
        BundleError: it is another major version, or none.
    """
    told = re.fullmatch(r"(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    if told is None or int(told[1]) != MAJOR:
        raise BundleError(f"{FILE_NAME} has schema version {shown(version)}, this lobit reads {MAJOR}.x: export the bundle again")
    return int(told[2])


def sealed(values: Mapping[str, Any]) -> str:
    """The text of manifest.json, ASCII: at its end the sha256 of all bytes before that."""
    text = json.dumps({name: value for name, value in values.items() if name != SEAL}, indent=2)
    text = f'{text.removesuffix("}").rstrip()},\n  "{SEAL}": "'
    return f'{text}{hashlib.sha256(text.encode("ascii")).hexdigest()}"\n}}\n'


def _problems(manifest: Manifest) -> Iterator[str]:
    """What cannot be true of any bundle."""
    model, context, slots = manifest.model, manifest.context, manifest.cache.slots
    sizes = {"layers": model.layers, "hidden_size": model.hidden_size, "vocab_size": model.vocab_size, "chunk": manifest.chunk}
    yield from (f"{name} is {size}" for name, size in sizes.items() if size < 1)
    if manifest.chunk > context or context > model.max_context:
        yield f"chunk {manifest.chunk}, context {context} and the model's own context {model.max_context} are not in this order"
    if len(slots) != model.layers or not all(1 <= size <= context for size in slots):
        yield f"{len(slots)} layers have a cache of {shown(slots)} positions: {model.layers} layers and a context of {context} are told"
    yield from _state_problems(manifest)
    if manifest.threads > MOST_THREADS:
        yield f"threads is {manifest.threads}, over {MOST_THREADS}"
    tokens = [*manifest.tokens.stop, *([] if manifest.tokens.bos is None else [manifest.tokens.bos])]
    yield from (f"token {token} is outside the vocabulary of {model.vocab_size}" for token in tokens if token >= model.vocab_size)
    times = Counter(entry.path for entry in manifest.files)
    yield from (f"{name} is listed {count} times" for name, count in times.items() if count > 1)
    yield from (f"{name} has the sha256 {shown(text)}" for name, text in _hashes(manifest) if not re.fullmatch("[0-9a-f]{64}", text))


def _state_problems(manifest: Manifest) -> Iterator[str]:
    """What states and methods do not agree in."""
    roles = Counter(method.role for method in manifest.methods)
    yield from (f"{count} methods are for {shown(role)}" for role, count in roles.items() if count > 1)
    told = {side: {port.name for method in manifest.methods for port in getattr(method, side)} for side in ("inputs", "outputs")}
    for state in manifest.states:
        yield from (f"state {shown(name)} is no port" for name, side in _ends(state) if name not in told[side])
        if not state.shape or not all(size >= 1 for size in state.shape):
            yield f"state {shown(state.input)} has the shape {shown(state.shape)}"
        if state.axis is not None and not (state.axis < len(state.shape) and state.shape[state.axis] <= manifest.context):
            yield f"state {shown(state.input)} has its positions on axis {state.axis} of {shown(state.shape)}, context {manifest.context}"


def _ends(state: State) -> list[tuple[str, str]]:
    return [(state.input, "inputs"), (state.output, "outputs")]


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
