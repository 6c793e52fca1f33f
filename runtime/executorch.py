"""Target `xnnpack` at run time: runs programs with ExecuTorch's own runtime in this process, and reads their files back."""

from __future__ import annotations

import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lobit.errors import BundleError, MissingPartError
from lobit.quiet import quiet_native, quiet_python
from lobit.runtime.bundle import Bundle
from lobit.runtime.engine import Logits, SteppingEngine
from lobit.runtime.stored import StoredLayer
from lobit.targets import THIS_MACHINE, Device

FLOAT32 = 6
"""ExecuTorch's number for the type float32."""
EMBEDDINGS = {"quantized_decomposed::embedding_4bit": 4, "quantized_decomposed::embedding_byte": 8, "aten::embedding": 32}
"""Operators that an embedding may be, and the bits of an entry of each."""


def import_runtime() -> Any:
    """ExecuTorch's native runtime with the operators that a program may use.

    Importing its Python package would load the whole exporter: five seconds and 200 MB that no phone spends.

    Raises:
        MissingPartError: executorch is not installed.
    """
    try:
        with quiet_python(), quiet_native():
            import torch
            from executorch.extension.pybindings import _C

            folder = Path(str(resources.files("executorch") / "extension/llm/custom_ops"))
            (operators,) = folder.glob("*custom_ops_aot_lib*")
            torch.ops.load_library(str(operators))
            import executorch.kernels.quantized  # noqa: F401 (registers operators of quantized_decomposed)
    except (ImportError, ValueError) as error:
        raise MissingPartError(f"target xnnpack needs executorch ({error}): pip install 'lobit[xnnpack]'") from None
    return _C


def use_threads(native: Any, threads: int) -> None:
    """Makes the thread pool anew that all programs of the process share. ExecuTorch reports this on stderr, which is silenced."""
    with quiet_native():
        native._unsafe_reset_threadpool(threads)


def open_engine(bundle: Bundle, threads: int, device: Device = THIS_MACHINE) -> SteppingEngine:
    """Loads the program of a bundle and makes a first call: XNNPACK packs the weights in it, which would make the user's first call slow.

    Args:
        bundle: a bundle for target xnnpack.
        threads: size of the process-wide pool that all ExecuTorch engines share.
        device: this machine.

    Raises:
        MissingPartError: executorch is not installed.
        BundleError: the runtime refuses the program.
    """
    native = import_runtime()
    import torch

    manifest = bundle.manifest
    use_threads(native, threads)

    def step(tokens: list[int], position: int) -> Logits:
        inputs = (torch.tensor([tokens], dtype=torch.int64), torch.tensor([position], dtype=torch.int64))
        (logits,) = module.forward(inputs)
        return logits[0].numpy().copy()  # type: ignore[no-any-return]

    try:
        module = native._load_for_executorch(str(bundle.path("program")))
        step([0], 0)  # its cache entry is overwritten by the first token that is read
    except RuntimeError as error:
        raise BundleError(f"ExecuTorch cannot load {bundle.path('program')} ({error}): export it again") from None
    slots = min(manifest.cache.slots)
    return SteppingEngine(step, manifest.context, manifest.chunk, manifest.model.vocab_size, slots, manifest.all_logits)


class ProgramFile:
    """A `.pte` file taken apart into its instructions, its constants and its delegates' graphs.

    Args:
        path: the file, which only ExecuTorch's own schema readers parse.

    Raises:
        BundleError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        with quiet_python():
            from executorch.exir._serialize._program import deserialize_pte_binary

        try:
            file = deserialize_pte_binary(path.read_bytes())
            self.program = file.program
            self.plan = self.program.execution_plan[0]
            self.named = file.named_data
            self._shared = b""
            self.graphs = _decode_graphs([bytes(blob.data) for blob in self.program.backend_delegate_data])
        except Exception as error:  # the schema readers raise exceptions of many kinds, all of which mean a damaged file
            raise BundleError(f"{path} cannot be taken apart ({type(error).__name__}: {error}): export it again") from None

    def operators(self) -> list[str]:
        """Every operator outside the delegates, as `namespace::name.overload`."""
        return sorted(f"{op.name}.{op.overload}" if op.overload else op.name for op in self.plan.operators)

    def data(self, key: str) -> bytes:
        """A named constant of the delegates."""
        return bytes(self.named.buffers[self.named.pte_data[key].buffer_index])

    def constant(self, value: int) -> NDArray[Any]:
        """A constant tensor of the program, as an array of its own shape and type."""
        tensor = self.plan.values[value].val
        dtype = {0: np.uint8, 1: np.int8, 5: np.float16, 6: np.float32}[int(tensor.scalar_type)]
        buffer = bytes(self.program.constant_buffer[tensor.data_buffer_idx].storage)
        count = int(np.prod(tensor.sizes))
        return np.frombuffer(buffer, dtype=dtype, count=count).reshape(tensor.sizes)

    def layers(self) -> Iterator[StoredLayer]:
        """Embeddings and fully connected nodes in the order of execution."""
        for instruction in self.plan.chains[0].instructions:
            call = instruction.instr_args
            if hasattr(call, "delegate_index"):
                blob = self.plan.delegates[call.delegate_index].processed.index
                yield from self._products(self.graphs[blob], f"delegate {call.delegate_index}")
            elif hasattr(call, "op_index") and self.plan.operators[call.op_index].name in EMBEDDINGS:
                yield self._embedding(EMBEDDINGS[self.plan.operators[call.op_index].name], call.args)

    def vectors(self) -> Iterator[StoredLayer]:
        """Norms and biases in the order of execution."""
        for instruction in self.plan.chains[0].instructions:
            call = instruction.instr_args
            if hasattr(call, "delegate_index"):
                graph = self.graphs[self.plan.delegates[call.delegate_index].processed.index]
                yield from self._vectors(graph, call.args, f"delegate {call.delegate_index}")

    def _vectors(self, graph: dict[str, Any], arguments: list[int], where: str) -> Iterator[StoredLayer]:
        """Norms and biases of a delegate: biases are constants of its own, norms' weights are constants of the program, given as inputs."""
        values = {_tensor(value)["id_out"]: _tensor(value) for value in graph["xvalues"]}
        given = {name: self._given(argument) for name, argument in zip(graph["input_ids"], arguments, strict=False)}
        for number, node in enumerate(graph["xnodes"]):
            operands, name = node["xnode_union"], f"{where}, node {number}"
            match node["xnode_union_type"]:
                case "XNNFullyConnected" if operands["bias_id"] in values:
                    bias = values[operands["bias_id"]]
                    if math.prod(bias["dims"]) > 1:  # one number is a norm's eps
                        data = self.data(graph["constant_data"][bias["constant_buffer_idx"]]["named_key"])
                        yield StoredLayer(name, np.frombuffer(data, np.float32), None)
                case "XNNMultiply":
                    weights = (given.get(operands[side]) for side in ("input1_id", "input2_id"))
                    yield from (StoredLayer(name, weight, None) for weight in weights if weight is not None)

    def _given(self, index: int) -> NDArray[np.float32] | None:
        """A value of the program where it is a constant vector of floats, else None."""
        value = self.plan.values[index].val
        is_vector = hasattr(value, "data_buffer_idx") and value.data_buffer_idx and len(value.sizes) == 1 and value.sizes[0] > 1
        return self.constant(index) if is_vector and int(value.scalar_type) == FLOAT32 else None

    def _embedding(self, bits: int, arguments: list[int]) -> StoredLayer:
        table = self.constant(arguments[0])
        if bits == 32:
            return StoredLayer("embedding", table, None)
        scale = self.constant(arguments[1])
        if bits == 4:
            self._shared, table = table.tobytes(), _halves(table >> 4, table & 15)
        return StoredLayer("embedding", table, scale.reshape(scale.shape[0], -1).astype(np.float32))

    def _products(self, graph: dict[str, Any], where: str) -> Iterator[StoredLayer]:
        values = {_tensor(value)["id_out"]: value for value in graph["xvalues"]}
        for number, node in enumerate(graph["xnodes"]):
            if node["xnode_union_type"] != "XNNFullyConnected":
                continue
            value = values[node["xnode_union"]["filter_id"]]
            if _tensor(value)["dims"][0] == 1:  # the mean in a norm is written as a product; no layer has just one output
                continue
            yield self._product(graph["constant_data"], value, f"{where}, node {number}")

    def _product(self, constants: list[dict[str, Any]], value: dict[str, Any], name: str) -> StoredLayer:
        tensor = _tensor(value)
        rows, columns = tensor["dims"]
        data = self.data(constants[tensor["constant_buffer_idx"]]["named_key"])
        if tensor["datatype"] == "xnn_datatype_fp32":
            return StoredLayer(name, np.frombuffer(data, np.float32).reshape(rows, columns), None)
        parameters = value["xvalue_union"]["quant_params"]
        stored = self.data(constants[parameters["scale_buffer_idx"]]["named_key"])
        if value["xvalue_union"]["quant_params_type"] == "PerChannelGroupQuant":
            scale = (np.frombuffer(stored, np.uint16).astype(np.uint32) << 16).view(np.float32)  # bfloat16
        else:
            scale = np.frombuffer(stored, np.float32)
        if tensor["datatype"] in ("xnn_datatype_qbint4", "xnn_datatype_qcint4"):
            packed = np.frombuffer(data, np.uint8).reshape(rows, -1)
            low, high = packed & 15, packed >> 4
            # These bytes are the embedding's too: its operator has the halves the other way round, and the program exchanges the inputs.
            integers = (_halves(high, low) if data == self._shared else _halves(low, high))[:, :columns]
        else:
            integers = np.frombuffer(data, np.int8).reshape(rows, columns)
        return StoredLayer(name, integers, scale.reshape(rows, -1))


def _halves(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """INT4 values [rows, columns] from the codes of their even and their odd columns, each [rows, columns / 2]."""
    return np.stack([first, second], axis=2).reshape(first.shape[0], -1).astype(np.int8) - np.int8(8)


def _tensor(value: dict[str, Any]) -> dict[str, Any]:
    inner: dict[str, Any] = value["xvalue_union"]
    tensor: dict[str, Any] = inner.get("tensor_value", inner)
    return tensor


def _decode_graphs(blobs: list[bytes]) -> list[dict[str, Any]]:
    """XNNPACK's flatbuffers as JSON, decoded with the schema and the compiler that executorch ships."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, blob in enumerate(blobs):
            header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
            end = header.flatbuffer_offset + header.flatbuffer_size
            (folder / f"{i}.bin").write_bytes(blob[header.flatbuffer_offset : end])
        schema = resources.files("executorch.backends.xnnpack.serialization") / "schema.fbs"
        flatc = resources.files("executorch.data.bin") / "flatc"
        options = ["--json", "--strict-json", "--defaults-json", "--raw-binary", "-o", name, str(schema), "--"]
        files = [str(folder / f"{i}.bin") for i in range(len(blobs))]
        if files:
            subprocess.run([str(flatc), *options, *files], check=True, capture_output=True)
        # flatc writes the bound of a ReLU as a bare inf.
        texts = ((folder / f"{i}.json").read_text() for i in range(len(blobs)))
        return [json.loads(re.sub(r": (-?)inf\b", r": \1Infinity", text)) for text in texts]


def read_program(bundle: Bundle) -> ProgramFile:
    """The bundle's program taken apart (`verify.ProgramReader`)."""
    return ProgramFile(bundle.path("program"))
