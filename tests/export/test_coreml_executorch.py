"""Programs for ExecuTorch's Core ML delegate: in the form that ExecuTorch itself writes, and taken out again by its own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lobit import verbs
from lobit.errors import BundleError
from lobit.runtime.bundle import Bundle, open_bundle
from lobit.runtime.coreml_executorch import taken_out
from lobit.runtime.coreml_file import read_package
from lobit.runtime.coreml_ports import REFERENCE, SPEC_FILE, WEIGHTS_FILE
from lobit.runtime.engine import open_engine
from tests.mutations import reseal

pytestmark = pytest.mark.usefixtures("one_thread")
DAMAGES = 60
"""Places of the file where a byte is changed, one at a time."""


@pytest.fixture(scope="module")
def bundle(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("coreml") / "bundle"
    verbs.export(str(models("demo")), "coreml", out, recipe=verbs.choose_recipe("8da4w-g32"), context=64, chunk=8, executorch=True)
    return open_bundle(out)


def deserialized(path: Path) -> Any:
    from executorch.exir._serialize._program import deserialize_pte_binary

    return deserialize_pte_binary(path.read_bytes())


def test_the_package_has_no_state_and_both_functions(bundle: Bundle) -> None:
    package = read_package(bundle)
    assert set(package.functions) == {"prefill", "decode"}
    assert [function.states for function in package.functions.values()] == [{}, {}]
    assert {entry.role for entry in bundle.manifest.files} == {"program", "tokenizer", "config"}


def test_executorch_takes_the_same_package_out(bundle: Bundle, tmp_path: Path) -> None:
    from executorch.backends.apple.coreml import executorchcoreml

    file = deserialized(bundle.path("program"))
    (key,) = file.named_data.pte_data
    data = file.named_data.buffers[file.named_data.pte_data[key].buffer_index]
    assert executorchcoreml.unflatten_directory_contents(bytes(data), str(tmp_path))
    files = taken_out(bundle.path("program"))
    (folder,) = tmp_path.iterdir()
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(files)
    assert all((folder / name).read_bytes() == content.tobytes() for name, content in files.items())
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    assert key == f"coreml_{metadata['identifier']}"
    for method in bundle.manifest.methods:
        told = {"inputNames": [port.name for port in method.inputs], "outputNames": [port.name for port in method.outputs]}
        assert metadata["methods"][method.name] == told


@pytest.mark.slow
def test_the_form_is_that_of_a_program_that_executorch_lowers(bundle: Bundle, tmp_path: Path) -> None:
    """Two methods of a small module, lowered by ExecuTorch's own Core ML backend: the same delegate, options, references and metadata."""
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    module, specs = torch.nn.Linear(4, 4).eval(), CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=coremltools.target.iOS18,
        compute_precision=coremltools.precision.FLOAT16,
        compute_unit=coremltools.ComputeUnit.CPU_AND_NE,
    )
    programs = {name: torch.export.export(module, (torch.zeros(1, size, 4),)) for name, size in (("prefill", 8), ("decode", 1))}
    lowered = to_edge_transform_and_lower(
        programs, partitioner=[CoreMLPartitioner(compile_specs=specs)], compile_config=EdgeCompileConfig(_check_ir_validity=False)
    ).to_executorch()
    (tmp_path / "theirs.pte").write_bytes(lowered.buffer)
    theirs, ours = (deserialized(path).program for path in (tmp_path / "theirs.pte", bundle.path("program")))
    assert [plan.name for plan in theirs.execution_plan] == sorted(plan.name for plan in ours.execution_plan)
    for their, our in zip(theirs.execution_plan, sorted(ours.execution_plan, key=lambda plan: plan.name), strict=True):
        (their_delegate,), (our_delegate,) = their.delegates, our.delegates
        assert their_delegate.id == our_delegate.id
        assert their_delegate.compile_specs == our_delegate.compile_specs
        assert our.operators == [] and len(our.chains) == 1
        references = [
            json.loads(bytes(program.backend_delegate_data[delegate.processed.index].data)[len(REFERENCE) :])
            for program, delegate in ((theirs, their_delegate), (ours, our_delegate))
        ]
        assert [{**reference, "key": ""} for reference in references] == [{"version": 1, "key": "", "functionName": their.name}] * 2
    found = taken_out(tmp_path / "theirs.pte")
    assert {SPEC_FILE, WEIGHTS_FILE, "metadata.json"} <= set(found) and set(taken_out(bundle.path("program"))) == set(found)
    metadata = [json.loads(files["metadata.json"].tobytes()) for files in (found, taken_out(bundle.path("program")))]
    assert metadata[0].keys() == metadata[1].keys() and metadata[0]["methods"]["decode"].keys() == metadata[1]["methods"]["decode"].keys()


def test_any_damage_is_one_message_or_the_same_logits(bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    program = folder / "model.pte"
    whole, generator = program.read_bytes(), np.random.default_rng(0)
    places = [*generator.integers(0, 4000, DAMAGES // 2), *(len(whole) - 1 - generator.integers(0, 4000, DAMAGES // 2))]
    told = 0
    for place in map(int, places):
        program.write_bytes(whole[:place] + bytes([whole[place] ^ int(generator.integers(1, 256))]) + whole[place + 1 :])
        told += refused(folder)
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        program.write_bytes(whole[:size])
        told += refused(folder)
    assert told >= 4


def refused(folder: Path) -> bool:
    """Whether a program is refused by its contents; its manifest agrees with it, which no accident does."""
    reseal(folder)
    try:
        assert open_engine(open_bundle(folder)).prefill([1, 2, 3]).shape == (768,)
    except BundleError:
        return True
    return False
