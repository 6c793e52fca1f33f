"""The app's engine for programs of fixed shapes on the phone's own library: it takes and gives tensors in the order of the ports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lobit.runtime.client import CachedProgram, Ports
from lobit.runtime.manifest import Manifest
from tests.android.kotlin_tool import run_on_library
from tests.android.test_cached_engine import VOCABULARY, bundle, called, of_integers, table

CALLS = [[5, 6, 7, 8, 9], [10], [11], [], list(range(20, 90)), [3]]


class Mixing(nn.Module):
    """Uses every input of a method in a way of its own, and gives what the ports of `with_client` say."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.linspace(-1, 1, 64 * VOCABULARY).reshape(64, VOCABULARY).half(), requires_grad=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, narrow: Tensor, wide: Tensor, last: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        seen = [(narrow == 0).half(), (wide == 0).half()]
        turned = x.reshape(1, -1, 8, 8) * cos + sin
        rows = turned.reshape(1, -1, 4, 16)[:, :, :2].transpose(1, 2).contiguous()
        past = [torch.matmul(seen[cache.shape[2] != 32][..., : cache.shape[2]], cache) / 64 for cache in caches]
        kept = [rows + before * (index + 1) / 8 for index, before in enumerate(past)]
        mixed = (kept[1] + kept[2]).transpose(1, 2).reshape(1, -1, 32)
        return *kept, torch.matmul(torch.matmul(last, torch.cat([mixed, mixed], 2)), self.head)


class Alone(Mixing):
    """The same for one token, which has logits without being chosen."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, narrow: Tensor, wide: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x, cos, sin, narrow, wide, torch.ones(1, 1, 1, dtype=torch.half), *caches)


class MixingIntegers(Mixing):
    """The same with floats of 32 bits, and caches of integers that stand for 32ths."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, narrow: Tensor, wide: Tensor, last: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        floats = (each.half() for each in (x, cos, sin, narrow, wide, last))
        *kept, logits = super().forward(*floats, *(cache.half() / 32 for cache in caches))
        return *((rows * 32).to(torch.int16) for rows in kept), logits.float()


class AloneIntegers(MixingIntegers):
    """The same for one token."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, narrow: Tensor, wide: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x, cos, sin, narrow, wide, torch.ones(1, 1, 1), *caches)


def write_program(methods: dict[str, nn.Module], manifest: Manifest, path: Path) -> None:
    """A program of ExecuTorch's own kernels."""
    from executorch.exir import to_edge

    exported = {}
    for method in manifest.methods:
        inputs = tuple(torch.zeros([int(size) for size in entry.shape], dtype=getattr(torch, entry.dtype)) for entry in method.inputs)
        exported[method.name] = torch.export.export(methods[method.name], inputs)
    path.write_bytes(to_edge(exported).to_executorch().buffer)


def read(folder: Path, work: Path, calls: list[list[int]]) -> tuple[NDArray[np.float32], str]:
    """The logits of calls of a bundle's program, and what the app says where it refuses it."""
    logits, answer = work / "logits", work / "answer"
    texts = [",".join(map(str, tokens)) for tokens in calls]
    run_on_library("Read", folder, work / "scratch", logits, answer, *texts)
    found = np.frombuffer(logits.read_bytes(), ">f4") if logits.is_file() else np.zeros(0, np.float32)
    return found.astype(np.float32), answer.read_text(encoding="utf-8") if answer.is_file() else ""


HALVES: dict[str, nn.Module] = {"prefill": Mixing(), "decode": Alone()}
INTEGERS: dict[str, nn.Module] = {"prefill": MixingIntegers(), "decode": AloneIntegers()}


@pytest.mark.parametrize(("methods", "edit"), [(HALVES, lambda values: None), (INTEGERS, of_integers("int16"))], ids=["halves", "integers"])
def test_the_library_computes_what_pytorch_computes_from_the_same_inputs(
    methods: dict[str, nn.Module], edit: Callable[[dict[str, Any]], Any], android_tools: Callable[[str], None], tmp_path: Path
) -> None:
    android_tools("native")
    manifest = bundle(tmp_path / "story", edit, table(4))
    write_program(methods, manifest, tmp_path / "story/model.pte")

    def run(name: str, inputs: Ports) -> Any:
        method = next(method for method in manifest.methods if method.name == name)
        results = methods[name](*(torch.from_numpy(inputs[entry.name]) for entry in method.inputs))
        return {entry.name: result.numpy() for entry, result in zip(method.outputs, results, strict=True)}

    expected = called(CachedProgram.of(manifest, tmp_path / "story", run), manifest, CALLS)
    found, said = read(tmp_path / "story", tmp_path, CALLS)
    assert said == "this app measures and checks bundle story, and does not chat with it: ExecuTorch's runner cannot keep its caches"
    assert np.allclose(found, np.concatenate(expected), rtol=0, atol=4e-3 * np.abs(expected).max())
    assert len({row.tobytes() for row in expected}) == len(expected), "every call's logits differ"


def test_a_program_that_the_library_refuses_is_told_with_a_sentence(android_tools: Callable[[str], None], tmp_path: Path) -> None:
    android_tools("native")
    bundle(tmp_path / "story", lambda values: None, table(4))
    (tmp_path / "story/model.pte").write_bytes(b"no program" * 100)
    _, said = read(tmp_path / "story", tmp_path, [[1]])
    assert said.startswith("story cannot be loaded (ExecuTorch error 0x") and said.endswith("export it with this app's lobit")
