"""A bundle's manifest.json: the only contract between export and everything that runs a bundle. Needs the standard library alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from lobit.errors import BundleError, listed, reason, shown
from lobit.from_json import build

MAJOR, MINOR = 2, 0
"""Version of the schema. A reader refuses another major version; in a newer minor version it ignores the fields that it does not know."""
FILE_NAME = "manifest.json"
LONGEST_PATH = 80
"""Characters that the path of a file may have; no target gives its files longer ones."""
MOST_THREADS = 1024
"""Threads that a manifest may name for a runtime; no processor has more."""
DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")
"""Element types that a state may have."""
SEAL = "sha256"
"""Name of the last entry of the file: the digest of all bytes before it."""
SEALED = re.compile(rb'(.*,\n  "sha256": ")([0-9a-f]{64})"\n\}\n', re.DOTALL)
"""Matches a whole file. Its groups are the bytes before the digest, which are what is digested, and the digest."""
LARGEST_MANIFEST = 8 << 20
"""Bytes that a manifest may have; a larger one is not read."""


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle."""

    path: str
    """Path relative to the bundle's folder, with forward slashes."""
    role: str
    """`program`; `weights`, where the program's weights are a file of their own; `tokenizer` (tokenizer.json); `config`: any other."""
    bytes: int
    sha256: str
    """Digest of the file: 64 lower-case hexadecimal digits."""

    @staticmethod
    def of(folder: Path, path: str, role: str) -> FileEntry:
        """The entry of an existing file, its size and digest computed."""
        return FileEntry(path, role, (folder / path).stat().st_size, sha256_of(folder / path))


@dataclass(frozen=True)
class Port:
    """An input or output of a method."""

    name: str
    role: str
    """`tokens`: the ids to read; `position`: that of the first id; `positions`: that of each id; `logits`; `state`: named in `states`."""
    shape: list[int | str]
    """The size of each axis: a number where it is fixed, a range such as `1..128` where it changes from call to call."""
    dtype: str
    """Element type by its NumPy name, such as `int64`."""


@dataclass(frozen=True)
class Method:
    """A function of the program."""

    name: str
    """The method's name in the runtime, such as `forward`."""
    role: str
    """`step`: the method reads 1 to `chunk` tokens, which follow those already read, and gives the logits of the last one or of all."""
    inputs: list[Port]
    outputs: list[Port]


WithRole = TypeVar("WithRole", FileEntry, Method)


@dataclass(frozen=True)
class State:
    """A tensor that the client keeps from call to call for the program: zeros at first, then what the previous call has put out."""

    input: str
    """Name of the input port that takes the tensor."""
    output: str
    """Name of the output port that gives it back."""
    dtype: str
    """Element type by its NumPy name, such as `float32`."""
    shape: list[int]
    """Shape of the tensor when it is full."""
    axis: int | None
    """Index, from 0, of the axis that has an entry for every position. Null: no axis has, and the tensor has its full shape at once."""
    window: int | None
    """Number of the latest positions, the current one included, that the model attends to; null: it attends to all."""
    in_place: bool
    """Whether input and output are one buffer of the full shape. Otherwise the axis is as long as the number of tokens read: 0 at first."""


@dataclass(frozen=True)
class CacheInfo:
    """Size of the program's key-value cache."""

    dtype: str
    """Element type of keys and values: `int8` or `float32`."""
    slots: list[int]
    """Number of positions that each layer's cache holds, one entry for each layer."""
    value_bytes: int
    """Bytes of the keys and values of all layers when the cache is full."""
    scale_bytes: int
    """Bytes of their scales and zero points; 0 where they have none."""

    @property
    def bytes(self) -> int:
        """Bytes of the whole cache."""
        return self.value_bytes + self.scale_bytes


@dataclass(frozen=True)
class Tokens:
    """What a client must know about the tokenizer."""

    bos: int | None
    """Id of the token that the tokenizer puts before a text; null where it puts none."""
    stop: list[int]
    """Ids of the tokens at any of which generation ends."""
    chat_template: str | None
    """Jinja source of the template, to be rendered as Hugging Face does it; null where the model has none."""
    special: dict[str, str]
    """Texts of the special tokens by the names that the template may use for them: `bos_token`, `eos_token`, …"""


@dataclass(frozen=True)
class Generation:
    """How the model's authors sample tokens (generation_config.json); a setting is null where they give none."""

    temperature: float | None = None
    """Logits are divided by it; 0: the likeliest token is always taken."""
    top_k: int | None = None
    """Number of the likeliest tokens that are drawn from; 0: all."""
    top_p: float | None = None
    """The fewest likeliest tokens whose probabilities together reach this share are drawn from."""
    repetition_penalty: float | None = None
    """Logits of tokens that occurred before are divided by it where they are positive, else multiplied; 1: no penalty."""


@dataclass(frozen=True)
class Delegation:
    """Where the program's operators run. This is only a description: it has no effect on how the program runs."""

    backend: str
    """Name of the delegate (ExecuTorch) or of the execution provider (ONNX Runtime)."""
    partitions: int
    """Number of pieces of the program that are handed to the backend."""
    delegated: dict[str, int]
    """Number of each operator that runs on the backend."""
    left: dict[str, int]
    """Number of each other operator. xnnpack: it runs outside of the delegate; onnx: several of them stand for one fused operator."""


@dataclass(frozen=True)
class TensorGroup:
    """The weights of one kind and format in the program."""

    kind: str
    """`embedding`, `attention`, `mlp`, `head`, `norms`, `biases`, `tables`; `embedding scales`, `head scales` where these lie apart."""
    format: str
    """How the weights are stored: `int4 group 32`, `float32`, …"""
    parameters: int
    """Number of the model's weights among them; 0 for scales and tables alone."""
    bytes: int


@dataclass(frozen=True)
class ModelInfo:
    """The model that was exported."""

    family: str
    """Name of the architecture, such as `llama`."""
    parameters: int
    """Number of weights of the float model; a tied embedding counts once."""
    layers: int
    """Number of layers in the order of execution; one that runs several times counts as many times."""
    hidden_size: int
    vocab_size: int
    max_context: int
    """The longest context of the model itself; that of the program is `context`."""
    largest_window: int
    """Positions in the longest attention window of a layer; 0 where every layer sees the whole context."""


@dataclass(frozen=True)
class Manifest:
    """All that a client needs to know in order to run a bundle."""

    name: str
    target: str
    """The runtime that the program is for: `xnnpack` (ExecuTorch) or `onnx` (ONNX Runtime)."""
    model: ModelInfo
    recipe: dict[str, Any]
    """The quantization recipe, as `Recipe.to_json` gives it."""
    checkpoint_sha256: str
    """Digest of all integers, scales and floats that the program holds, taken before lowering (`quantized.fingerprint`)."""
    context: int
    """Number of positions that the program can hold, prompt and generated tokens together."""
    chunk: int
    """The most tokens that one call can read."""
    threads: int
    """Threads that the runtime uses unless the user asks for another number; 0: one per core."""
    options: dict[str, str | int | bool]
    """Options of the target, which has names of its own for them: what the program was made for, and how it is to be run."""
    methods: list[Method]
    """The program's functions, at most one of each role."""
    states: list[State]
    """Tensors that the client keeps from call to call; empty where the program keeps them itself."""
    cache: CacheInfo
    tokens: Tokens
    generation: Generation
    delegation: Delegation
    weights: list[TensorGroup]
    """The program's weights by kind and format. This is only a description, as `delegation` is."""
    files: list[FileEntry]
    """The files that a bundle needs in order to run, with the sizes and digests that a reader checks."""
    versions: dict[str, str]
    """Versions of lobit and of the packages that the bundle's bytes depend on."""
    schema_version: str = field(default=f"{MAJOR}.{MINOR}")
    """`MAJOR.MINOR`. A reader refuses another major version; in a newer minor version it ignores the fields that it does not know."""

    def file(self, role: str) -> FileEntry:
        """The first file of a role.

        Raises:
            BundleError: there is none.
        """
        return self._of_role(self.files, role, role)

    def method(self, role: str) -> Method:
        """The method of a role.

        Raises:
            BundleError: there is none.
        """
        return self._of_role(self.methods, role, f"method for {role}")

    def _of_role(self, entries: Iterable[WithRole], role: str, told: str) -> WithRole:
        found = next((entry for entry in entries if entry.role == role), None)
        if found is None:
            raise BundleError(f"bundle {self.name} has no {told}: export it again")
        return found

    @property
    def all_logits(self) -> bool:
        """Whether a call gives the logits of all its tokens, not of the last alone."""
        return any(port.role == "logits" and port.shape[1:2] != [1] for port in self.method("step").outputs)

    @property
    def program_bytes(self) -> int:
        """Bytes of the program's file and of its weights' file, where there is one."""
        return sum(entry.bytes for entry in self.files if entry.role in ("program", "weights"))

    def to_json(self) -> str:
        """The text of manifest.json."""
        return sealed(dataclasses.asdict(self))

    @staticmethod
    def from_json(data: bytes) -> Manifest:
        """Reads the bytes of manifest.json, the inverse of `to_json`.

        Raises:
            BundleError: this is no manifest of the schema's major version, contradicts itself or was changed; the message says where.
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
    """The minor version of a schema that this lobit reads.

    Raises:
        BundleError: `version` has another major version, or is no version.
    """
    told = re.fullmatch(r"(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    if told is None or int(told[1]) != MAJOR:
        raise BundleError(f"{FILE_NAME} has schema version {shown(version)}, this lobit reads {MAJOR}.x: export the bundle again")
    return int(told[2])


def sealed(values: Mapping[str, Any]) -> str:
    """The text of manifest.json in ASCII; it ends with the sha256 of all bytes before that digest."""
    text = json.dumps({name: value for name, value in values.items() if name != SEAL}, indent=2)
    text = f'{text.removesuffix("}").rstrip()},\n  "{SEAL}": "'
    return f'{text}{hashlib.sha256(text.encode("ascii")).hexdigest()}"\n}}\n'


def _problems(manifest: Manifest) -> Iterator[str]:
    """Messages about what cannot be true of any bundle."""
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
    """Messages about states and methods that contradict each other."""
    roles = Counter(method.role for method in manifest.methods)
    yield from (f"{count} methods are for {shown(role)}" for role, count in roles.items() if count > 1)
    told = {side: {port.name for method in manifest.methods for port in getattr(method, side)} for side in ("inputs", "outputs")}
    for state in manifest.states:
        yield from (f"state {shown(name)} is no port" for name, side in _ends(state) if name not in told[side])
        if state.dtype not in DTYPES:
            yield f"state {shown(state.input)} has the type {shown(state.dtype)}, none of {', '.join(DTYPES)}"
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
        BundleError: the path is empty, absolute or too long, or has `..`, a backslash, a drive or characters that cannot be printed.
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
