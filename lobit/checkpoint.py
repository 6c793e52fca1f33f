"""Reading and writing Hugging Face model folders: safetensors only, nothing from the folder is executed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lobit.errors import MissingPartError, ModelError, listed
from lobit.families import from_checkpoint, read_config, tensor_names, to_checkpoint
from lobit.model import Config, Transformer

LARGEST_JSON = 64 << 20
"""Bytes; tokenizer.json files of a quarter million tokens have about 30 MB."""
SAFE_FILES = ["*.safetensors", "config.json", "generation_config.json", "model.safetensors.index.json"]
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"]
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
"""Constants that old Llama checkpoints carry; they follow from the config."""


def resolve(model: str) -> Path:
    """The folder of MODEL: `demo`, a folder, or a hub name (downloaded into the Hugging Face cache).

    Raises:
        ModelError: there is no such folder and it does not look like a hub name.
        MissingPartError: the hub cannot be reached.
    """
    if model == "demo":
        from lobit.demo import FOLDER

        return FOLDER
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{model} is a file: give the folder that holds config.json and *.safetensors")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise ModelError(f"there is no folder {model}: give a Hugging Face folder, a hub name such as org/name, or 'demo'")
    from huggingface_hub import snapshot_download

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
        ModelError: missing, too large, not JSON or not an object.
    """
    if not path.is_file():
        raise ModelError(f"{path} is missing: a Hugging Face folder has config.json and *.safetensors")
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ModelError(f"{path} has {size} bytes: at most {LARGEST_JSON} are read")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({error}): fetch it again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds {type(values).__name__}: an object is needed")
    return values


def load_config(folder: Path) -> Config:
    """The model's `Config`, from config.json."""
    return read_config(read_json(folder / "config.json"))


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, sharded or not."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"{index} has no weight_map: fetch it again")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ModelError(f"{index} points outside the folder: {', '.join(outside)}")
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = f"; {', '.join(pickled)} would have to be unpickled: convert to safetensors" if pickled else ""
        raise ModelError(f"{folder} lacks {', '.join(missing)}{hint}")
    return [folder / name for name in names]


def _headers(files: list[Path]) -> dict[str, tuple[Path, list[int], str]]:
    """File, shape and dtype of every tensor."""
    found: dict[str, tuple[Path, list[int], str]] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    part = tensors.get_slice(name)
                    found[name] = (path, part.get_shape(), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read ({error}): it is damaged or incomplete, fetch it again") from None
    return found


def load_model(folder: Path, config: Config | None = None) -> Transformer:
    """The trained model of a Hugging Face folder in float32, for inference.

    Raises:
        ModelError: tensors are missing, misshapen, of another kind or unused; all are named.
    """
    config = config or load_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    names = tensor_names(config)
    headers = _headers(_files(folder))
    problems = _problems(wanted, names, headers, config)
    if problems:
        raise ModelError(listed(problems, f"{folder} does not fit a {config.family} model, {len(problems)} tensors:"))
    state = {}
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(headers[names[name]][0], []).append(name)
    for path, ours in by_file.items():
        with safe_open(path, "pt") as tensors:
            for name in ours:
                state[name] = from_checkpoint(config, name, tensors.get_tensor(names[name]).float())
    broken = [names[name] for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(listed(broken, f"{folder} has values that are not finite in {len(broken)} tensors:"))
    if config.tied:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state, assign=True)
    if config.tied:
        model.head.weight = model.embedding.weight
    return model.eval().requires_grad_(False)


def _problems(
    wanted: Mapping[str, list[int]],
    names: Mapping[str, str],
    headers: Mapping[str, tuple[Path, list[int], str]],
    config: Config,
) -> list[str]:
    """Every tensor that is missing, misshapen, not a float or left over."""
    problems = []
    for ours, theirs in names.items():
        if theirs not in headers:
            problems.append(f"{theirs} is missing")
            continue
        _, shape, kind = headers[theirs]
        if shape != wanted[ours]:
            problems.append(f"{theirs} has shape {shape}: {wanted[ours]} is needed")
        if kind not in FLOATS:
            problems.append(f"{theirs} is {kind}: {', '.join(FLOATS)} are read")
    tied = {"lm_head.weight"} if config.tied else set()
    unused = sorted(set(headers) - set(names.values()) - tied)
    return problems + [f"{name} is not used by the family" for name in unused if not IGNORED.search(name)]


def save_model(model: Transformer, values: Mapping[str, Any], folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a Hugging Face folder: config.json with `values`, and the weights under the family's names.

    Args:
        values: config.json's contents; `read_config(values)` must be the model's config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names, state = tensor_names(model.config), model.state_dict()
    tensors: dict[str, Tensor] = {
        theirs: to_checkpoint(model.config, ours, state[ours].detach()).to(dtype).contiguous() for ours, theirs in names.items()
    }
    (folder / "config.json").write_text(json.dumps(dict(values), indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors leaves it to its owner alone
