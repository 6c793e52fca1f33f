"""Core ML packages as coremltools itself reads, computes and writes them: a second opinion on the files and on our evaluation of them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lobit import verbs
from lobit.runtime.bundle import Bundle, open_bundle
from lobit.runtime.coreml import StepByRole, evaluator
from lobit.runtime.coreml_ports import PACKAGE
from lobit.runtime.coreml_program import Evaluator

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
CONTEXT, CHUNK = 64, 16
NEAR = 1e-2
"""Of the largest logit: coremltools computes in half floats, one operation after the other, and our evaluation rounds to them after each;
in another order of sums an entry may fall to the next half float, and eight layers made 3e-3 of that. A wrong operator is off by 1."""
CASES = {"demo": "8da4w-g32", "stories260k": "bonsai", "gemma3": "8da8w", "qwen3": "w4-channel"}
"""Models with windows, norms of queries and keys, GELU, and every kind of compressed weight."""


@pytest.fixture(scope="module")
def coremltools() -> Any:
    logging.disable(logging.WARNING)
    import coremltools

    logging.disable(logging.NOTSET)
    return coremltools


@pytest.fixture(scope="module", params=CASES)
def bundle(request: pytest.FixtureRequest, models: Any, small_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = models(request.param) if request.param in ("demo", "stories260k") else small_models(request.param)[0]
    out = tmp_path_factory.mktemp("coreml") / request.param
    verbs.export(str(model), "coreml", out, recipe=verbs.choose_recipe(CASES[request.param]), context=CONTEXT, chunk=CHUNK)
    return open_bundle(out)


MISSING: dict[str, Callable[..., torch.Tensor]] = {
    "silu": lambda x: torch.nn.functional.silu(x),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes.tolist(), keepdim=bool(keep_dims)),
    "reduce_max": lambda x, axes, keep_dims: x.amax(axes.tolist(), keepdim=bool(keep_dims)),
    "linear": lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias),
}
"""Operators that coremltools has no values for."""


def loaded(bundle: Bundle) -> Any:
    """The package as coremltools' own reader takes it: it infers the type of every value, and refuses those that are told otherwise."""
    from coremltools.converters.mil.frontend.milproto import load
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString(bundle.path("program").read_bytes())
    program = load.load(spec, spec.specificationVersion, str(bundle.path("weights").parent))
    program.validate()
    return program


class SecondOpinion:
    """Runs a package with the operators of coremltools, and with PyTorch's where coremltools computes none.

    Args:
        program: what coremltools has read.
    """

    def __init__(self, program: Any) -> None:
        self.program = program
        self.states: dict[str, Any] = {}
        self.own: set[str] = set()
        """Operators that coremltools has computed itself."""

    def run(self, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
        function = self.program.functions[name]
        for port, value in function.inputs.items():
            if port in inputs:
                self._set(value, inputs[port])
        for operation in function.operations:
            self._step(operation)
        return {value.name: value.val for value in function.outputs}

    def _step(self, operation: Any) -> None:
        kind = operation.op_type
        if kind == "const":
            return
        if kind.startswith("constexpr_"):
            self._set(operation.outputs[0], operation.materialized_val_inference())
        elif kind == "read_state":
            shape = operation.outputs[0].shape
            self._set(operation.outputs[0], self.states.setdefault(operation.input.name, np.zeros(shape, np.float16)).copy())
        elif kind == "coreml_update_state":
            self.states[operation.state.name] = operation.value.val.copy()
            self._set(operation.outputs[0], operation.value.val)
        else:
            results = self._computed(operation)
            for value, result in zip(operation.outputs, results, strict=True):
                self._set(value, result)

    def _computed(self, operation: Any) -> list[Any]:
        kind = operation.op_type
        if kind in MISSING:
            given = {name: value.val for name, value in operation.inputs.items() if value is not None}
            tensors = {
                name: torch.from_numpy(np.asarray(value)).float() if np.asarray(value).dtype.kind == "f" else value
                for name, value in given.items()
            }
            return [MISSING[kind](**tensors).numpy().astype(np.float16)]
        self.own.add(kind)
        result = operation.value_inference()
        assert result is not None, f"coremltools computes no {kind}"
        return list(result) if isinstance(result, (list, tuple)) else [result]

    @staticmethod
    def _set(variable: Any, value: Any) -> None:
        from coremltools.converters.mil.mil import types

        array = np.asarray(value)
        if types.is_tensor(variable.sym_type):
            array = array.astype(types.nptype_from_builtin(variable.dtype))
            assert array.shape == tuple(variable.shape), f"{variable.name}: {array.shape} instead of {variable.shape}"

        class Known:
            val = array

        variable._sym_val = Known()


def test_coremltools_reads_every_function_and_infers_the_same_types(bundle: Bundle, coremltools: Any) -> None:
    program = loaded(bundle)
    assert set(program.functions) == {method.name for method in bundle.manifest.methods}
    assert all(len(function.operations) > 100 for function in program.functions.values())


def test_coremltools_computes_the_same_logits(bundle: Bundle, coremltools: Any) -> None:
    """One prefill with a padded tail, one past the window's end, and two decoded tokens."""
    other = SecondOpinion(loaded(bundle))
    told, ours = StepByRole(bundle.manifest, other.run), StepByRole(bundle.manifest, evaluator(bundle, half=True).run)
    tokens, position = [int(token) for token in np.random.default_rng(0).integers(3, 90, 40)], 0
    for count in (5, 16, 16, 1, 1):
        call = tokens[position : position + count]
        expected = ours(call, position)
        np.testing.assert_allclose(told(call, position), expected, rtol=0, atol=NEAR * np.abs(expected).max())
        position += count
    assert {"gather", "softmax", "matmul", "slice_update", "mod" if bundle.manifest.model.largest_window else "add"} <= other.own


def test_coremltools_writes_the_operations_that_were_written_here(bundle: Bundle, coremltools: Any, tmp_path: Path) -> None:
    """What its reader took and its writer gives, without any pass: the same operations with the same inputs, types and constants."""
    from coremltools.converters.mil.backend.mil.load import MILProtoExporter
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString(bundle.path("program").read_bytes())
    (tmp_path / "weights").mkdir()
    written = MILProtoExporter(loaded(bundle), str(tmp_path / "weights"), spec.specificationVersion).export()
    for name, function in spec.mlProgram.functions.items():
        found, expected = (one.functions[name].block_specializations[function.opset] for one in (written, spec.mlProgram))
        assert [operation.type for operation in _computing(found)] == [operation.type for operation in _computing(expected)]
        for theirs, ours in zip(_computing(found), _computing(expected), strict=True):
            assert {part: len(value.arguments) for part, value in theirs.inputs.items()} == {
                part: len(value.arguments) for part, value in ours.inputs.items()
            }, ours.type
            assert [value.type for value in theirs.outputs] == [value.type for value in ours.outputs], ours.type


def _computing(block: Any) -> list[Any]:
    return [operation for operation in block.operations if operation.type != "const"]


def test_coremltools_opens_the_package_and_saves_it_again(bundle: Bundle, coremltools: Any, tmp_path: Path) -> None:
    package = shutil.copytree(bundle.folder / PACKAGE, tmp_path / PACKAGE)
    model = coremltools.models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    assert [function.name for function in spec.description.functions] == [method.name for method in bundle.manifest.methods]
    states = {state.name: tuple(state.type.stateType.arrayType.shape) for state in spec.description.functions[0].state}
    program = Evaluator(evaluator(bundle).package)
    assert states == {name: kind.shape for name, kind in program.package.functions["decode"].states.items()}
    model.save(str(tmp_path / "again.mlpackage"))
    saved = tmp_path / "again.mlpackage" / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    assert saved.read_bytes() == bundle.path("weights").read_bytes()
