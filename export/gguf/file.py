"""A GGUF file, written as a stream: its fields, the list of its tensors, then one tensor after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFValueType, GGUFWriter
from torch import Tensor, nn

from lobit.export.gguf.architecture import Architecture
from lobit.export.gguf.weights import F16, F32, Form, float_form, form_of, packed
from lobit.export.stages import Count
from lobit.export.target import Spec
from lobit.layout import gguf_name, to_gguf
from lobit.model import Transformer, weight_of
from lobit.quant_recipes.apply import layers_of
from lobit.quant_recipes.integer import IntegerEmbedding, IntegerLinear
from lobit.quiet import quiet_python

Integers = IntegerLinear | IntegerEmbedding
FUSED = {"attn_q": "attn_qkv", "attn_k": "attn_qkv", "attn_v": "attn_qkv", "ffn_gate": "ffn_up"}
"""Names of tensors that have the rows of several products, one after the other."""
TYPES = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
ITEMS = {**TYPES, int: GGUFValueType.INT32}
"""Types of fields, and of the items of a list."""


@dataclass(frozen=True)
class Entry:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    form: Form
    make: Callable[[], Tensor]
    """Gives its values, or uint8 [rows, bytes] where they are blocks."""

    @property
    def bytes(self) -> int:
        """Its size."""
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        return rows * self.form.row_bytes(self.shape[-1])


def entries(model: Transformer, architecture: Architecture, spec: Spec) -> list[Entry]:
    """The tensors of a converted model; a block that runs several times is there as often."""
    turned = model if architecture.is_paired else None
    found = [_constant(name, tensor) for name, tensor in architecture.vectors.items()]
    named = _named(model)
    for name, group in itertools.groupby(named, key=lambda one: _fused(one[0]) if architecture.is_fused else one[0]):
        parts = list(group)
        layers = [(ours, part) for _, ours, part in parts if isinstance(part, nn.Module)]
        vectors = [_vector(name, ours, part, turned) for _, ours, part in parts if isinstance(part, Tensor)]
        found += [_matrix(name, layers, turned, spec)] if layers else vectors
    return found


def _named(model: Transformer) -> Iterator[tuple[str, str, Tensor | nn.Module]]:
    """The file's name, lobit's name and the layer, norm or bias of each tensor."""
    config, tensors, layers = model.config, model.state_dict(), dict(layers_of(model))
    yield gguf_name("embedding.weight"), "embedding", layers["embedding"]
    for executed in range(len(config.layers)):
        block, here = f"layers.{executed // config.repeats}.", f"layers.{executed}."
        members = [(ours, layer) for ours, layer in layers.items() if ours.startswith(block)]
        yield from ((gguf_name(f"{here}{ours.removeprefix(block)}.weight"), ours, layer) for ours, layer in members)
        vectors = [ours for ours in tensors if ours.startswith(block) and ours.endswith(("norm.weight", ".bias"))]
        yield from ((gguf_name(here + ours.removeprefix(block)), ours, tensors[ours]) for ours in vectors)
    yield gguf_name("norm.weight"), "norm.weight", tensors["norm.weight"]
    if not config.tied:
        yield gguf_name("head.weight"), "head", layers["head"]


def _fused(name: str) -> str:
    """The name of the tensor that has a tensor's rows where several are one."""
    return ".".join(FUSED.get(part, part) for part in name.split("."))


def _constant(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tuple(tensor.shape), F32, lambda: tensor.float())


def _vector(name: str, ours: str, tensor: Tensor, turned: Transformer | None) -> Entry:
    return _constant(name, tensor if turned is None or tensor.is_meta else to_gguf(turned.config, ours, tensor))


def _matrix(name: str, parts: Sequence[tuple[str, nn.Module]], turned: Transformer | None, spec: Spec) -> Entry:
    """The rows of one product, or of several, one after the other."""
    layers = [layer for _, layer in parts]
    first = layers[0]
    inner = (first.integers if isinstance(first, Integers) else weight_of(first)).shape[1]
    kept = form_of(first.rule.weights, inner, spec.smallest) if isinstance(first, Integers) else float_form(spec.recipe)
    rows = sum(len(layer.integers if isinstance(layer, Integers) else weight_of(layer)) for layer in layers)

    def make() -> Tensor:
        made = [_rows(name, ours, layer, turned, kept) for ours, layer in parts]
        return made[0] if len(made) == 1 else torch.cat(made)

    return Entry(name, (rows, inner), kept, make)


def _rows(name: str, ours: str, layer: nn.Module, turned: Transformer | None, kept: Form) -> Tensor:
    def ordered(tensor: Tensor) -> Tensor:
        return to_gguf(turned.config, f"{ours}.weight", tensor) if turned else tensor

    if isinstance(layer, Integers):
        return packed(ordered(layer.integers), ordered(layer.scale), kept, ours)
    return ordered(weight_of(layer).detach()).to(torch.float16 if kept.type == F16.type else torch.float32)


def write(path: Path, architecture: str, fields: Mapping[str, Any], tensors: Sequence[Entry], count: Count) -> None:
    """Writes a file; of the tensors one at a time is in memory as the file has it.

    Args:
        path: the file.
        architecture: llama.cpp's name of it.
        fields: by their whole names; a list is an array.
        tensors: in the order of the file.
        count: called with the tensors that are written, and all.
    """
    with quiet_python():
        writer = GGUFWriter(path, architecture)
        for name, value in fields.items():
            if isinstance(value, (list, bytes)):
                writer.add_key_value(name, value, GGUFValueType.ARRAY, ITEMS[type(value[0])] if isinstance(value, list) else None)
            else:
                writer.add_key_value(name, value, TYPES[type(value)])
        for entry in tensors:
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.bytes, entry.form.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, entry in enumerate(tensors, 1):
            writer.write_tensor_data(entry.make().contiguous().numpy())
            count(done, len(tensors))
        writer.close()
