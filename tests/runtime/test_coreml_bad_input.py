"""Core ML packages that are not as export wrote them: one message that says what to do, nothing large is allocated, nothing is lost."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobit import verbs
from lobit.errors import BundleError, LobitError, MissingPartError
from lobit.runtime import coreml_proto
from lobit.runtime.bundle import open_bundle
from lobit.runtime.coreml_ports import SPEC_FILE, WEIGHTS_FILE
from lobit.runtime.engine import open_engine
from tests.mutations import refused, reseal

pytestmark = pytest.mark.usefixtures("one_thread")
RANDOM_EDITS = 120
"""Bytes of the program that are changed, one at a time."""


@pytest.fixture(scope="module")
def made(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("coreml") / "bundle"
    verbs.export(str(models("mobilellm_p1")), "coreml", out, recipe=verbs.choose_recipe("bitnet"), context=48, chunk=8)
    return out


def edited(bundle: Path, edit: Callable[[Any], Any]) -> None:
    """Changes the program, and the manifest with it."""
    _, model, _ = coreml_proto.messages()
    spec = model.Model()
    spec.ParseFromString((bundle / SPEC_FILE).read_bytes())
    edit(spec)
    (bundle / SPEC_FILE).write_bytes(spec.SerializeToString())
    reseal(bundle)


def operations(spec: Any, name: str = "decode") -> Any:
    function = spec.mlProgram.functions[name]
    return function.block_specializations[function.opset].operations


def of_kind(spec: Any, kind: str, name: str = "decode") -> Any:
    return next(operation for operation in operations(spec, name) if operation.type == kind)


def runs(bundle: Path) -> Any:
    engine = open_engine(open_bundle(bundle))
    engine.prefill([1, 2, 3])
    return engine.decode(4)


@pytest.mark.parametrize("name", [SPEC_FILE, WEIGHTS_FILE])
def test_a_file_that_is_missing_short_or_changed_is_named(name: str, bundle: Path) -> None:
    whole = (bundle / name).read_bytes()
    (bundle / name).write_bytes(whole[:-1])
    assert name in refused(lambda: runs(bundle))
    (bundle / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert f"{name} has changed" in refused(lambda: runs(bundle))
    (bundle / name).unlink()
    assert f"{name} is missing" in refused(lambda: runs(bundle))


def test_weights_that_are_cut_are_told_by_where_they_end(bundle: Path) -> None:
    weights = bundle / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    reseal(bundle)
    assert "weight.bin" in refused(lambda: runs(bundle))
    weights.write_bytes(b"")
    reseal(bundle)
    assert "weight.bin, which has 0" in refused(lambda: runs(bundle))


def changed_name(spec: Any) -> None:
    of_kind(spec, "softmax").type = "while_loop"


def read_later(spec: Any) -> None:
    last = operations(spec)[-1].outputs[0].name
    of_kind(spec, "gather").inputs["indices"].arguments[0].name = last


def made_twice(spec: Any) -> None:
    of_kind(spec, "softmax").outputs[0].name = of_kind(spec, "gather").outputs[0].name


def no_block(spec: Any) -> None:
    spec.mlProgram.functions["decode"].opset = "CoreML9"


def outside(spec: Any) -> None:
    of_kind(spec, "constexpr_lut_to_dense").inputs["indices"].arguments[0].value.blobFileValue.offset = 1 << 60


def between(spec: Any) -> None:
    of_kind(spec, "constexpr_lut_to_dense").inputs["indices"].arguments[0].value.blobFileValue.offset += 1


def huge(spec: Any) -> None:
    for operation in operations(spec):
        if operation.type == "softmax":
            operation.outputs[0].type.tensorType.dimensions[0].constant.size = 1 << 50


def other_state(spec: Any) -> None:
    state = next(value for value in spec.mlProgram.functions["decode"].inputs if value.type.WhichOneof("type") == "stateType")
    state.type.stateType.wrappedType.tensorType.dimensions[1].constant.size += 32


def no_function(spec: Any) -> None:
    del spec.mlProgram.functions["prefill"]


def other_shape(spec: Any) -> None:
    of_kind(spec, "linear").outputs[0].type.tensorType.dimensions[2].constant.size += 1


def no_constant(spec: Any) -> None:
    del of_kind(spec, "const").attributes["val"]


def no_part(spec: Any) -> None:
    del of_kind(spec, "linear").inputs["bias"]


def more_parts(spec: Any) -> None:
    of_kind(spec, "softmax").inputs["beta"].arguments.add().name = "tokens"


def other_file(spec: Any) -> None:
    for name in ("prefill", "decode"):
        for operation in operations(spec, name):
            for message in (*operation.attributes.values(), *(each.value for part in operation.inputs.values() for each in part.arguments)):
                if message.WhichOneof("value") == "blobFileValue":
                    message.blobFileValue.fileName = "@model_path/weights/other.bin"


def nothing_bound(spec: Any) -> None:
    del of_kind(spec, "softmax").inputs["x"].arguments[:]


def no_outputs(spec: Any) -> None:
    del of_kind(spec, "softmax").outputs[:]


def state_as_value(spec: Any) -> None:
    of_kind(spec, "softmax").inputs["x"].arguments[0].name = "k_0"


def state_as_output(spec: Any) -> None:
    function = spec.mlProgram.functions["decode"]
    function.block_specializations[function.opset].outputs[0] = "k_0"


def more_results(spec: Any) -> None:
    added = of_kind(spec, "softmax").outputs.add()
    added.CopyFrom(of_kind(spec, "softmax").outputs[0])
    added.name = "another"


def no_data(spec: Any) -> None:
    del of_kind(spec, "write_state").inputs["data"]


def other_output(spec: Any) -> None:
    operations(spec)[-1].outputs[0].name = "scores"
    function = spec.mlProgram.functions["decode"]
    function.block_specializations[function.opset].outputs[0] = "scores"


def text_as_number(spec: Any) -> None:
    constants = (operation for operation in operations(spec) if operation.type == "const")
    value = next(each for each in constants if each.attributes["val"].immediateValue.tensor.HasField("strings"))
    value.attributes["val"].type.tensorType.dataType = coreml_proto.messages()[0].FLOAT16


def many_axes(spec: Any) -> None:
    kind = of_kind(spec, "softmax").outputs[0].type.tensorType
    kind.rank = 65
    for _ in range(65 - len(kind.dimensions)):
        kind.dimensions.add().constant.size = 1


def large_join(spec: Any) -> None:
    join = of_kind(spec, "concat")
    for _ in range(50_000):
        join.inputs["values"].arguments.add().CopyFrom(join.inputs["values"].arguments[0])


def large_state(spec: Any) -> None:
    state = next(value for value in spec.mlProgram.functions["decode"].inputs if value.type.WhichOneof("type") == "stateType")
    state.type.stateType.wrappedType.tensorType.dimensions[1].constant.size = 1 << 24


def no_table(spec: Any) -> None:
    del of_kind(spec, "constexpr_lut_to_dense").inputs["lut"]


EDITS = {
    other_file: "points at the file",
    nothing_bound: "has an input that is nothing",
    no_outputs: "makes nothing",
    state_as_value: "cannot be computed",
    state_as_output: "which no operation in it makes",
    more_results: "cannot be computed",
    no_data: "cannot be computed",
    other_output: "no function decode as its manifest tells",
    text_as_number: "a constant of type FLOAT16",
    many_axes: "has 65 axes",
    large_join: "cannot be computed",
    large_state: "entries",
    no_table: "cannot be computed",
    changed_name: "operations that are not known here (while_loop)",
    read_later: "before anything makes it",
    made_twice: "makes",
    no_block: "no block for",
    outside: "points at byte",
    between: "no record of an array",
    huge: "a value has the shape",
    other_state: "has the shape",
    no_function: "no function prefill",
    other_shape: "cannot be computed",
    no_constant: "has no value",
    no_part: "cannot be computed",
    more_parts: "cannot be computed",
}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_a_program_edited_by_hand_is_refused_with_what_is_wrong(edit: Callable[[Any], None], bundle: Path) -> None:
    edited(bundle, edit)
    assert EDITS[edit] in refused(lambda: runs(bundle))


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_verify_of_a_program_edited_by_hand_is_one_message_or_a_result(edit: Callable[[Any], None], models: Any, bundle: Path) -> None:
    """What changes no weight may pass: whether it computes is for parity to say."""
    edited(bundle, edit)
    try:
        verbs.verify(bundle, str(models("mobilellm_p1")))
    except LobitError as error:
        assert len(str(error).splitlines()) == 1


def test_what_is_no_program_is_refused(bundle: Path) -> None:
    for content in (b"", b"\xff" * 1000, b"{}"):
        (bundle / SPEC_FILE).write_bytes(content)
        reseal(bundle)
        assert "Core ML" in refused(lambda: runs(bundle))


def test_any_changed_byte_of_a_program_is_refused_or_computed(made: Path, tmp_path: Path) -> None:
    """Whatever a byte does, it is one message or logits: never an error of another kind."""
    data, generator = (made / SPEC_FILE).read_bytes(), np.random.default_rng(0)
    folder = Path(shutil.copytree(made, tmp_path / "bundle"))
    told = 0
    for place in generator.integers(0, len(data), RANDOM_EDITS):
        (folder / SPEC_FILE).write_bytes(data[:place] + bytes([data[place] ^ int(generator.integers(1, 256))]) + data[place + 1 :])
        reseal(folder)
        try:
            assert runs(folder).shape == (96,)
        except BundleError:
            told += 1
    assert told > 0


# --- verify -------------------------------------------------------------------------------------------------------------------------


def flipped(bundle: Path, operation: str, part: str) -> None:
    """Changes one bit of an array that an operation of both functions reads."""
    _, model, _ = coreml_proto.messages()
    spec = model.Model()
    spec.ParseFromString((bundle / SPEC_FILE).read_bytes())
    # The first one is the embedding, which is the head too.
    chosen = [each for each in operations(spec) if each.type == operation][1]
    offset = chosen.inputs[part].arguments[0].value.blobFileValue.offset
    data = bytearray((bundle / WEIGHTS_FILE).read_bytes())
    data[offset + 64] ^= 1
    (bundle / WEIGHTS_FILE).write_bytes(data)
    reseal(bundle)


def test_one_ternary_integer_that_was_flipped_is_found(models: Any, bundle: Path) -> None:
    flipped(bundle, "constexpr_lut_to_dense", "indices")
    result = verbs.verify(bundle, str(models("mobilellm_p1")))
    assert (result["differing_integers"], result["differing_scales"], result["passed"]) == (1, 0, False)


@pytest.mark.parametrize(("part", "differing"), [("data", "differing_integers"), ("scale", "differing_scales")])
def test_one_integer_or_scale_that_was_flipped_is_found(part: str, differing: str, models: Any, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    verbs.export(str(models("mobilellm_p1")), "coreml", bundle, recipe=verbs.choose_recipe("8da4w-g32"), context=48, chunk=8)
    flipped(bundle, "constexpr_blockwise_shift_scale", part)
    result = verbs.verify(bundle, str(models("mobilellm_p1")))
    assert result[differing] == 1 and not result["passed"]


def test_a_table_of_other_values_is_found(models: Any, bundle: Path) -> None:
    def edit(spec: Any) -> None:
        for name in ("prefill", "decode"):
            table = of_kind(spec, "constexpr_lut_to_dense", name).inputs["lut"].arguments[0].value.immediateValue.tensor
            values = np.frombuffer(table.bytes.values, np.float16).copy()
            values[0] *= 2
            table.bytes.values = values.tobytes()

    edited(bundle, edit)
    result = verbs.verify(bundle, str(models("mobilellm_p1")))
    assert result["differing_scales"] > 0 and not result["passed"]


@pytest.mark.parametrize("name", ["prefill", "decode"])
@pytest.mark.parametrize("parts", [("indices", "lut"), ("lut",)])
def test_functions_that_read_different_weights_are_refused(parts: tuple[str, ...], name: str, models: Any, bundle: Path) -> None:
    def edit(spec: Any) -> None:
        first, second = [operation for operation in operations(spec, name) if operation.type == "constexpr_lut_to_dense"][:2]
        for part in parts:
            first.inputs[part].CopyFrom(second.inputs[part])

    edited(bundle, edit)
    assert "read different weights" in refused(lambda: verbs.verify(bundle, str(models("mobilellm_p1"))))


# --- what is missing ----------------------------------------------------------------------------------------------------------------


def test_without_coremltools_the_message_says_how_to_install_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        return None

    monkeypatch.setattr(coreml_proto.importlib.util, "find_spec", missing)
    with pytest.raises(MissingPartError, match=r"pip install 'lobit\[coreml\]'"):
        open_engine(open_bundle(bundle))


def test_without_executorch_a_program_for_it_says_how_to_install_it(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, recipe = tmp_path / "bundle", verbs.choose_recipe("bitnet")
    verbs.export(str(models("mobilellm_p1")), "coreml", out, recipe=recipe, context=48, chunk=8, executorch=True)
    monkeypatch.setitem(sys.modules, "executorch.exir._serialize", None)
    with pytest.raises(MissingPartError, match=r"pip install 'lobit\[xnnpack\]'"):
        open_engine(open_bundle(out))


@pytest.mark.parametrize("executorch", [False, True])
def test_a_full_disk_is_one_message_and_keeps_what_is_finished(
    executorch: bool, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lobit.export.coreml import mil

    class Full:
        def __init__(self, path: Path) -> None:
            path.touch()

        def __getattr__(self, name: str) -> Callable[..., int]:
            def fail(_: Any) -> int:
                raise OSError(28, "No space left on device")

            return fail

    model, recipe, out = str(models("mobilellm_p1")), verbs.choose_recipe("bitnet"), tmp_path / "bundle"
    options: dict[str, Any] = {"recipe": recipe, "context": 48, "chunk": 8, "executorch": executorch}

    def full_program(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        if executorch:  # the package is whole, the program around it is not
            full.setattr("lobit.export.coreml.executorch.write_program", full_program)
        else:
            full.setattr(mil, "blob_writer", Full)
        told = refused(lambda: verbs.export(model, "coreml", out, **options))
    assert "No space left on device" in told and "make space" in told and not out.exists()
    verbs.export(model, "coreml", out, **options)
    assert verbs.verify(out, model)["passed"]
