"""Reading and writing Hugging Face model folders: safetensors only, nothing from the folder is executed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lobit.errors import MissingPartError, ModelError, listed, reason, shown, shown_name
from lobit.families import read_config
from lobit.layout import LLAMA, Stored, layout, read, read_integers, write
from lobit.model import Config, Transformer
from lobit.prequantized import FAKE_QUANTIZER, Header, Shapes, torchao_weights

LONGEST_NAME = 80
"""Bytes that the name of a shard may have, in UTF-8; file systems take 255."""
LARGEST_JSON = 64 << 20
"""Bytes that a JSON file may have; a tokenizer.json of a quarter million tokens has about 30 MB."""
SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
SAFE_FILES = ["*.safetensors", "config.json", "generation_config.json", INDEX]
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"]
COMPANIONS = ["generation_config.json", *TOKENIZER_FILES]
"""Files that are copied along with the weights."""
ROWS = 4096
"""Rows of a tensor that are checked at a time, so that temporary memory stays small."""
OWN_HEAD = f"{LLAMA['head']}.{FAKE_QUANTIZER}scale"
"""The tensor with the scales of a head that shares its floats with the embedding, but not its integers."""
HEAD, EMBEDDING = f"{LLAMA['head']}.weight", f"{LLAMA['embedding']}.weight"
WRAPPED = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."))
"""Prefixes of a text model's tensors inside a model of images and text, and the prefixes that it uses by itself."""
BARE = ("layers.", "embed_tokens.", "norm.")
"""How tensor names begin where the model was saved without its head (transformers' `AutoModel`)."""
OTHER_SENSES = ("vision_tower.", "vision_model.", "visual.", "audio_tower.", "multi_modal_projector.", "embed_vision.", "embed_audio.")
"""Prefixes, with or without `model.` before them, of the parts of a model of images and text that its text model does not use."""
IGNORED = re.compile(r"\.(rotary_emb\.inv_freq|activation_fake_quantizer\.(scale|zero_point))$")
"""Tensors that are not read: constants in old Llama checkpoints, which follow from the config, and ranges of inputs, which lobit
quantizes per token if at all."""


def resolve(model: str) -> Path:
    """The folder of MODEL: `demo`, a folder, or a hub name (downloaded into the Hugging Face cache, with a note on stderr).

    Raises:
        ModelError: there is no such folder and it does not look like a hub name, or `demo` could mean either of two models.
        MissingPartError: the hub cannot be reached.
    """
    if model == "demo":
        from lobit.demo import FOLDER

        if (Path(model) / "config.json").is_file():
            raise ModelError("demo is the model that lobit ships, and a model's folder here: give ./demo for the folder, or run elsewhere")
        return FOLDER
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{model} is a file: give the folder that holds config.json and *.safetensors")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) or folder.parent.is_dir():
        raise ModelError(f"there is no folder {model}: give a Hugging Face folder, a hub name such as org/name, or 'demo'")
    from huggingface_hub import snapshot_download

    print(f"{model} is no folder here: fetching it from the Hugging Face hub", file=sys.stderr, flush=True)
    try:
        return Path(snapshot_download(model, allow_patterns=SAFE_FILES + TOKENIZER_FILES))
    except Exception as error:  # the hub client raises many kinds, all of them mean the same to a user
        raise MissingPartError(
            f"{model} is no folder here and could not be fetched from the hub ({type(error).__name__}): "
            "check the name and the network, or download it and give its folder"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        ModelError: the file is missing, too large, not JSON or not an object.
    """
    if not path.is_file():
        raise ModelError(f"{path} is missing: a Hugging Face folder has config.json and *.safetensors")
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ModelError(f"{path} has {size} bytes: at most {LARGEST_JSON} are read")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({reason(error)}): fetch it again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds {type(values).__name__}: an object is needed")
    return values


def load_config(folder: Path) -> Config:
    """The model's `Config`, from config.json.

    Raises:
        ModelError: it is missing or cannot be read, or the folder holds an adapter, whose weights are not the model's.
    """
    if (folder / ADAPTER).is_file():
        raise ModelError(
            f"{folder} holds an adapter ({ADAPTER}): merge the adapter first (peft: merge_and_unload, then save_pretrained), or give a "
            "folder of the base model without it"
        )
    return read_config(read_json(folder / "config.json"))


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: `SINGLE` if it exists, even if there are shards, as in transformers; else those in `INDEX`."""
    index = folder / INDEX
    if index.is_file() and not (folder / SINGLE).is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"{index} has no weight_map: fetch it again")
        names = sorted(set(weight_map.values()))
        outside = [shown_name(name) for name in names if Path(name).name != name or len(name.encode("utf-8", "replace")) > LONGEST_NAME]
        if outside:
            raise ModelError(f"{index} names what is no file in the folder, or outside of it: {', '.join(outside[:9])}: fetch it again")
    else:
        names = [SINGLE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = f"; {', '.join(pickled)} would have to be unpickled: convert to safetensors" if pickled else ""
        named = ", ".join(shown_name(name) for name in missing[:9])
        raise ModelError(f"{folder} lacks {len(missing)} of {len(names)} files, {named}{hint or ': fetch it again'}")
    return [folder / name for name in names]


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Opens a safetensors file; the library checks its header and its length.

    Raises:
        ModelError: the file is damaged or incomplete.
        OSError: this process is not allowed to read it.
    """
    path.open("rb").close()  # without permission to read it, the library would call it missing
    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} of {path.stat().st_size} bytes cannot be read ({reason(error)}): it is damaged or incomplete, make or fetch it again"
        ) from None


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: the place is full or cannot be written to.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # the library gives the system's error number only in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def _family_name(name: str) -> str:
    """The family's name of a tensor, from its name in the file."""
    for wrapped, plain in WRAPPED:
        if name.startswith(wrapped):
            return plain + name.removeprefix(wrapped)
    return f"model.{name}" if name.startswith(BARE) else name


def _headers(files: list[Path]) -> tuple[dict[str, Header], dict[str, str]]:
    """The header of every tensor by its name in the files, and the metadata of the files."""
    found: dict[str, Header] = {}
    metadata: dict[str, str] = {}
    for path in files:
        with open_tensors(path) as tensors:
            metadata |= tensors.metadata() or {}
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if name in found:
                    raise ModelError(f"{shown_name(name)} is in {found[name][0].name} and in {path.name}: fetch both again")
                part = tensors.get_slice(name)
                found[name] = (path, part.get_shape(), part.get_dtype())
    return found, metadata


class Weights:
    """The tensors of a Hugging Face folder under lobit's names, read one by one.

    Args:
        folder: the folder, with floats or with weights that `prequantized` can read.
        config: as `load_config` returns it.

    Attributes:
        untied: whether the head has integers of its own, although by the config it shares its floats with the embedding.

    Raises:
        ModelError: tensors are missing, misshapen, of an unknown kind or unused; the message lists them.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        headers, metadata = _headers(_files(folder))
        self.own_names = self._names(headers, folder)
        self.headers = {name: headers[own] for name, own in self.own_names.items()}
        self.untied = config.tied and OWN_HEAD in self.headers
        config = replace(config, tied=config.tied and not self.untied)
        self.folder, self.config = folder, config
        with torch.device("meta"):
            self.model = Transformer(config)
        self.places = layout(self.model, self.headers, torchao_weights(self.headers, metadata))
        head = self.places.get("head.weight")
        if self.untied and head and head.quantized and head.name not in self.headers:
            shared = self.places["embedding.weight"].name
            self.places["head.weight"] = replace(head, name=shared, quantized=replace(head.quantized, values=shared))
        if config.tied and EMBEDDING not in self.headers and HEAD in self.headers:
            self.places["embedding.weight"] = replace(self.places["embedding.weight"], name=HEAD)
        problems = _problems(self.places, self.headers, config) + self._tie_problems()
        if problems:
            raise ModelError(listed(problems, f"{folder} does not fit a {config.family} model, {len(problems)} tensors:"))

    def _names(self, headers: Mapping[str, Header], folder: Path) -> dict[str, str]:
        """The name in the file of every tensor, by the family's name of it.

        Raises:
            ModelError: two tensors have the same family name.
        """
        names: dict[str, str] = {}
        has_text_model = isinstance(read_json(folder / "config.json").get("text_config"), dict)
        for own in headers:
            if has_text_model and own.removeprefix("model.").startswith(OTHER_SENSES):
                continue
            name = _family_name(own)
            if name in names:
                raise ModelError(f"{shown_name(names[name])} and {shown_name(own)} of {folder} are both {shown_name(name)}: remove one")
            names[name] = own
        return names

    def _tie_problems(self) -> list[str]:
        """Contradictions between the files and `tie_word_embeddings` about the head."""
        headers = self.headers
        if not self.config.tied:
            place = self.places["head.weight"]
            hint = "tie_word_embeddings is false in config.json: write true there if the head shares the embedding"
            return [hint] if place.quantized is None and place.name not in headers and EMBEDDING in headers else []
        if HEAD not in headers or EMBEDDING not in headers or headers[HEAD][1] != headers[EMBEDDING][1]:
            return []
        parts = zip(self._get(HEAD).split(ROWS), self._get(EMBEDDING).split(ROWS), strict=True)
        if all(torch.equal(head, embedding) for head, embedding in parts):
            return []
        return [
            f"{HEAD} is another matrix than {EMBEDDING}, and tie_word_embeddings is true: if it is the head, write "
            "tie_word_embeddings: false into config.json, or else remove it from the file"
        ]

    def read(self, name: str, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """A tensor of the model; a head that shares the embedding can be read under both names.

        Args:
            name: lobit's name of it.
            dtype: as in `layout.read`.

        Raises:
            ModelError: it has values that are not finite.
        """
        name = name if name in self.places else name.replace("head.", "embedding.")
        tensor = read(self.config, name, self.places[name], self._get, dtype)
        # 0 times a finite number is 0, and 0 times infinity or NaN is NaN: this takes a third of the time of isfinite on bfloat16.
        if any((rows.float() * 0).sum() != 0 for rows in tensor.split(ROWS)):
            raise ModelError(f"{self.places[name].name} of {self.folder} has values that are not finite: train or fetch it again")
        return tensor

    def integers(self, name: str) -> tuple[Tensor, Tensor]:
        """The integers [out, in], int8, and scales [out, groups], float32, of a weight that the folder keeps quantized.

        Args:
            name: lobit's name of the weight, which must have `Stored.quantized`.

        Raises:
            ModelError: values are no integers, or lie outside of the weight's range.
        """
        place = self.places[name]
        values, scale = read_integers(self.config, name, place, self._get)
        low, high = place.quantized.range if place.quantized else (0, 0)
        wrong = sum(int(((rows != rows.round()) | (rows < low) | (rows > high)).sum()) for rows in values.split(ROWS))
        if wrong:
            raise ModelError(f"{wrong} of {values.numel()} values of {place.name} are no integers in [{low}, {high}]: fetch the file again")
        return values.to(torch.int8), scale.contiguous()

    def _get(self, name: str) -> Tensor:
        with open_tensors(self.headers[name][0]) as tensors:
            return cast(Tensor, tensors.get_tensor(self.own_names[name]))


def load_model(folder: Path, config: Config | None = None) -> Transformer:
    """The trained model of a Hugging Face folder in float32, for inference.

    Raises:
        ModelError: tensors are missing, misshapen, of an unknown kind, unused or not finite.
    """
    weights = Weights(folder, config or load_config(folder))
    state = {name: weights.read(name) for name in weights.places}
    model = weights.model
    if model.config.tied:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state, assign=True)
    if model.config.tied:
        model.head.weight = model.embedding.weight
    return model.eval().requires_grad_(False)


def _problems(places: Mapping[str, Stored], headers: Mapping[str, Header], config: Config) -> list[str]:
    """Every tensor that is missing, misshapen, of an unknown kind or left over."""
    problems, used = [], {HEAD} if config.tied else set()
    for stored in places.values():
        for name, shapes in stored.tensors().items():
            if name not in used:
                problems += _tensor_problems(name, shapes, headers.get(name))
            used.add(name)
    unused = sorted(set(headers) - used)
    return problems + [f"{shown_name(name)} is not used by the family" for name in unused if not IGNORED.search(name)]


def _tensor_problems(name: str, shapes: Shapes, header: Header | None) -> list[str]:
    """Why a tensor of the checkpoint cannot be read."""
    if header is None:
        return [f"{name} is missing"]
    _, found, kind = header
    needed = shapes.get(kind, next(iter(shapes.values())))
    problems = [] if tuple(found) == needed else [f"{name} has shape {shown(found)}: {list(needed)} is needed"]
    return problems + ([] if kind in shapes else [f"{name} is {kind}: {', '.join(shapes)} are read"])


def copy_companions(source: Path, folder: Path, names: Iterable[str] = COMPANIONS) -> list[str]:
    """Copies the files of a model's folder that go with its weights; returns the names of those that exist."""
    from lobit.tokenizer_files import FILE_NAME, copy_tokenizer

    found = [name for name in names if (source / name).is_file()]
    for name in found:
        if name == FILE_NAME:
            copy_tokenizer(source, folder)
        else:
            shutil.copyfile(source / name, folder / name)
    return found


def save_model(model: Transformer, values: Mapping[str, Any], folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a Hugging Face folder: config.json with `values`, and the weights as floats under the family's names.

    Args:
        values: config.json's contents; `read_config(values)` must be the model's config. A `quantization_config` is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in write(model).items()}
    floats = {name: value for name, value in values.items() if name != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(floats, indent=2) + "\n", encoding="utf-8")
    write_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets only the owner read it
