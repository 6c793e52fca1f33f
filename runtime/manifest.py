"""A bundle's manifest.json: the only contract between export and everything that runs a bundle. Needs the standard library alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lobit.errors import BundleError, listed, reason, shown
from lobit.from_json import build
from lobit.runtime.manifest_problems import check_path, problems

MAJOR, MINOR = 2, 1
"""Version of the schema. A reader refuses another major version; in a newer minor version it ignores the fields that it does not know, and
in an older one it takes what `LATER` says for those that are not there."""
FILE_NAME = "manifest.json"
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
    """`program`; `weights`, where the program's weights are a file of their own; `embedding`, a table that the client looks up in;
    `emulated`: a program for an emulator, which no phone needs; `encodings`: what a program's integers stand for, for its proof alone;
    `tokenizer` (tokenizer.json); `config`: any other."""
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
    """`tokens`: the ids to read; `position`: that of the first id; `positions`: that of each id; `last`: the index, in the call, of the
    last id, after which a method of fixed shapes has room left; `logits`; `state`: named in `states`; `client`: an input named in
    `client`, which the client computes."""
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
    """`step`: the method reads 1 to `chunk` tokens, which follow those already read, and gives the logits of the last one or of all.
    `prefill` and `decode`: the same in two methods of fixed shapes, which have room for `chunk` tokens and for one. The last of
    `prefill`'s may be none: they give logits that mean nothing, and rows of states that are not kept."""
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
    """Element type by its NumPy name, such as `float32`. What integers stand for only the program knows."""
    shape: list[int]
    """Shape of the tensor when it is full."""
    axis: int | None
    """Index, from 0, of the axis that has an entry for every position. Null: no axis has, and the tensor has its full shape at once."""
    window: int | None
    """Number of the latest positions, the current one included, that the model attends to; null: it attends to all."""
    in_place: bool
    """Whether input and output are one buffer of the full shape. Otherwise, and without `rows`, the axis is as long as the number of tokens
    read: 0 at first."""
    rows: bool
    """Whether the input has the full shape and the output the call's own entries alone, which the client then writes into the tensor: that
    of position p to index p modulo the length of the axis."""


@dataclass(frozen=True)
class CacheInfo:
    """Size of the program's key-value cache."""

    dtype: str
    """Element type of keys and values: `int8`, `int16`, `uint8`, `float16` or `float32`."""
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
class Lookup:
    """A table of embeddings, of which the client gives the rows of the tokens."""

    port: str
    """Name of the input that takes them, [1, tokens, hidden_size]; those of tokens that are none are zeros."""
    file: str
    """Path of a safetensors file with `weight` [vocab_size, …] and, where that is integers, `scale` float32 [vocab_size, groups]."""
    bits: int
    """4: `weight` is uint8 and has two integers in a byte, the first in the low half, each 8 more than it is; 8: int8; 16 or 32: floats.
    An entry is its integer times the scale of its group; groups are equal parts of a row."""
    factor: float
    """What entries are multiplied with, before they are rounded to the port's type."""


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding whose cosines and sines the client gives, each [1, tokens, 1, frequencies]."""

    cos: str
    """Name of the input that takes factor · cos(position · frequency)."""
    sin: str
    """Name of the input that takes factor · sin(position · frequency)."""
    frequencies: list[float]
    """Radians that a pair of entries turns from one position to the next."""
    factor: float


@dataclass(frozen=True)
class Mask:
    """A mask [1, 1, tokens, slots + tokens]: 0 where a token sees an entry, `hidden` where it does not.

    The first entries are the slots of a state before the call, the others the call's own tokens. A token at position p sees an entry at
    position e where 0 <= p - e, and p - e < window where there is one; it sees no slot that holds nothing yet.
    """

    port: str
    window: int | None
    hidden: float


@dataclass(frozen=True)
class ClientInputs:
    """What the client computes for every call of a program that has no other way to know tokens and positions."""

    embedding: Lookup
    rotary: list[Rotary]
    masks: list[Mask]
    last: str | None
    """Name of the input [1, 1, tokens] that chooses the token with logits: 1 for that one, else 0. Null: all have logits."""


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
    read_bytes: dict[str, int]
    """Bytes that a call of each method reads from memory, as the backend's compiler expects; empty where it says nothing."""


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
    """The runtime that the program is for: `xnnpack` (ExecuTorch), `onnx` (ONNX Runtime), `gguf` (llama.cpp), `qnn` (ExecuTorch on
    Qualcomm's HTP) or `coreml` (Core ML)."""
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
    client: ClientInputs | None
    """What the client computes for every call; null: the program needs tokens and positions alone."""
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
        reading = next((method for method in self.methods if method.role in ("step", "prefill")), None)
        return reading is not None and any(port.role == "logits" and port.shape[1:2] != [1] for port in reading.outputs)

    @property
    def program_bytes(self) -> int:
        """Bytes of the program's file, and of the files of its weights and of its embedding, where there are any."""
        return sum(entry.bytes for entry in self.files if entry.role in ("program", "weights", "embedding"))

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
        if minor < MINOR:
            _complete(values)
        try:
            manifest: Manifest = build(Manifest, values, FILE_NAME, more=minor > MINOR)
        except ValueError as error:
            raise BundleError(f"{error}, export the bundle again") from None
        for entry in manifest.files:
            check_path(entry.path)
        found = list(problems(manifest))
        if found:
            raise BundleError(listed(found, f"{FILE_NAME} contradicts itself, export the bundle again:"))
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


LATER: dict[type, dict[str, Any]] = {Manifest: {"client": None}, State: {"rows": False}, Delegation: {"read_bytes": {}}}
"""Fields of version 2.1, and what a manifest of version 2.0 means without them."""


def _complete(values: dict[str, Any]) -> None:
    """Adds the fields that an older minor version does not have."""
    states = values.get("states")
    known = [(Manifest, values), (Delegation, values.get("delegation"))]
    for kind, found in [*known, *((State, state) for state in (states if isinstance(states, list) else []))]:
        if isinstance(found, dict):
            found.update({name: value for name, value in LATER[kind].items() if name not in found})


def sealed(values: Mapping[str, Any]) -> str:
    """The text of manifest.json in ASCII; it ends with the sha256 of all bytes before that digest."""
    text = json.dumps({name: value for name, value in values.items() if name != SEAL}, indent=2)
    text = f'{text.removesuffix("}").rstrip()},\n  "{SEAL}": "'
    return f'{text}{hashlib.sha256(text.encode("ascii")).hexdigest()}"\n}}\n'


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
