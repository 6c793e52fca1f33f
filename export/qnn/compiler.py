"""Compiles graphs to a context binary, with Qualcomm's compiler: `python -m lobit.export.qnn.compiler GRAPHS OUT`.

It runs in a process of its own, as the vendor's libraries end the process where something is wrong, and print what they do. It needs
neither PyTorch nor ExecuTorch's exporter, which take longer to load than a small model to compile.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from lobit.runtime.qnn_libraries import load_libraries

PR_SET_PDEATHSIG = 1
"""Option of prctl(2), from <linux/prctl.h>."""
PACKAGE = "qti.aisw"
"""Name of the package of QNN's own operators."""
GRAPHS_FILE, WEIGHTS_FILE, SCALE = "graphs.json", "weights.safetensors", ".scale"
"""Files with the graphs and their weights, and what ends the name of a weight's scales (`graph.write_graphs`)."""
CONTEXT, OPTIONS = "context.bin", "options"
"""Files in the folder that is written to: the context binary, and what ExecuTorch's delegate is opened with, which is there before."""


class _Wrapped:
    """A graph in the objects of ExecuTorch's adaptor to QNN."""

    def __init__(self, qnn: Any, described: dict[str, Any], weights: _Static) -> None:
        self.qnn, self.described, self.weights = qnn, described, weights
        self.tensors: dict[str, Any] = {}
        # Inputs are sorted by the number in their names when the program runs (ExecuTorch's QnnExecuTorchBackend).
        self.names = {port: f"input_{index}_{port}" for index, port in enumerate(described["inputs"])}
        self.names |= {value: f"output_{port}" for port, value in described["outputs"].items()}

    def operators(self) -> list[Any]:
        """The operators in the order of execution."""
        return [self._operator(told).GetOpWrapper() for told in self.described["operators"]]

    def _operator(self, told: dict[str, Any]) -> Any:
        node = self.qnn.PyQnnOpWrapper(told["name"], PACKAGE, told["kind"])
        node.AddInputTensors([self._tensor(name) for name in told["inputs"]])
        node.AddOutputTensors([self._tensor(name) for name in told["outputs"]])
        types = self.qnn.Qnn_DataType_t
        for name, value in told["parameters"].items():
            if isinstance(value, list):
                array = np.array(value, np.uint32)
                node.AddTensorParam(name, types.QNN_DATATYPE_UINT_32, array.ndim, list(array.shape), array, True)
            elif isinstance(value, float):
                node.AddScalarParam(name, types.QNN_DATATYPE_FLOAT_32, {"data": np.float32(value)})
            else:
                node.AddScalarParam(name, types.QNN_DATATYPE_UINT_32, {"data": np.uint32(value)})
        return node

    def _tensor(self, name: str) -> Any:
        if name not in self.tensors:
            kinds, values = self.qnn.Qnn_TensorType_t, self.described["values"]
            if name not in values:
                self.tensors[name] = self.weights.tensor(name)
            else:
                kind = kinds.QNN_TENSOR_TYPE_NATIVE
                if name in self.described["inputs"]:
                    kind = kinds.QNN_TENSOR_TYPE_APP_WRITE
                elif name in self.names:
                    kind = kinds.QNN_TENSOR_TYPE_APP_READ
                self.tensors[name] = wrapped(self.qnn, self.names.get(name, name), kind, values[name], *self._form(name))
        return self.tensors[name]

    def _form(self, name: str) -> tuple[Any, ...]:
        """Type, encoding and its parameters of a value."""
        encodings = self.described["encodings"]
        if encodings is None:
            return ()
        return encoded(self.qnn, encodings[name]) if name in encodings else (self.qnn.Qnn_DataType_t.QNN_DATATYPE_FLOAT_32,)


class _Static:
    """Constants, read from their file; they live as long as this does, as QNN does not copy them."""

    def __init__(self, qnn: Any, path: Path, bits: dict[str, int], encodings: dict[str, list[Any]]) -> None:
        self.qnn, self.bits, self.encodings = qnn, bits, encodings
        self.file = cast(Any, safe_open)(path, framework="numpy")
        self.kept: dict[str, tuple[NDArray[Any], NDArray[Any] | None]] = {}

    def tensor(self, name: str) -> Any:
        """A constant's wrapper, a new one for each graph."""
        qnn, bits = self.qnn, self.bits.get(name)
        if name not in self.kept:
            self.kept[name] = self._read(name, bits)
        values, pairs = self.kept[name]
        kind = qnn.Qnn_TensorType_t.QNN_TENSOR_TYPE_STATIC
        if name in self.encodings:
            return wrapped(qnn, name, kind, values.shape, *encoded(qnn, self.encodings[name]), values)
        if bits is None:
            return wrapped(qnn, name, kind, values.shape, values=values)
        encodings = qnn.Qnn_QuantizationEncoding_t
        told: dict[str, Any] = {"axis": 0, "scale_offset": pairs}
        encoding = encodings.QNN_QUANTIZATION_ENCODING_AXIS_SCALE_OFFSET
        if bits < 8:
            encoding, told["bitwidth"] = encodings.QNN_QUANTIZATION_ENCODING_BW_AXIS_SCALE_OFFSET, bits
        dtype = getattr(qnn.Qnn_DataType_t, f"QNN_DATATYPE_SFIXED_POINT_{max(bits, 8)}")
        return wrapped(qnn, name, kind, values.shape, dtype, encoding, told, values)

    def _read(self, name: str, bits: int | None) -> tuple[NDArray[Any], NDArray[Any] | None]:
        values = self.file.get_tensor(name)
        if bits is None:
            return values, None
        scale = self.file.get_tensor(name + SCALE)
        pairs = np.zeros(len(scale), dtype=[("scale", np.float32), ("offset", np.int32)])
        pairs["scale"] = scale
        return values & np.int8((1 << bits) - 1) if bits < 8 else values, pairs


def encoded(qnn: Any, told: list[Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Type, encoding and its parameters of integers without a sign, of which bits, scale and offset are told."""
    bits, scale, offset = told
    encoding = qnn.Qnn_QuantizationEncoding_t.QNN_QUANTIZATION_ENCODING_SCALE_OFFSET
    dtype = getattr(qnn.Qnn_DataType_t, f"QNN_DATATYPE_UFIXED_POINT_{bits}")
    return dtype, encoding, {"scale": scale, "offset": offset}


def wrapped(
    qnn: Any,
    name: str,
    kind: Any,
    shape: Any,
    dtype: Any = None,
    encoding: Any = None,
    told: dict[str, Any] | None = None,
    values: NDArray[Any] | None = None,
) -> Any:
    """A tensor in the adaptor's form: half floats unless a type is given."""
    return qnn.TensorWrapper(
        name,
        kind,
        qnn.Qnn_DataType_t.QNN_DATATYPE_FLOAT_16 if dtype is None else dtype,
        qnn.Qnn_QuantizationEncoding_t.QNN_QUANTIZATION_ENCODING_UNDEFINED if encoding is None else encoding,
        told or {},
        len(shape),
        list(shape),
        [],  # no axis changes from call to call
        np.array([]) if values is None else values,
        False,
    )


def compile_graphs(folder: Path, out: Path) -> None:
    """Compiles the graphs in a folder as `OPTIONS` in the folder `out` says, and writes `CONTEXT` there."""
    qnn = load_libraries()
    told = json.loads((folder / GRAPHS_FILE).read_text(encoding="utf-8"))
    graphs = told["graphs"]
    weights = _Static(qnn, folder / WEIGHTS_FILE, told["bits"], told["encodings"])
    operators = [_Wrapped(qnn, described, weights).operators() for described in graphs.values()]
    manager = qnn.QnnManager((out / OPTIONS).read_bytes())
    for step in (manager.InitBackend, lambda: manager.InitContext(list(graphs))):
        if step().value != 0:
            raise SystemExit("QNN did not begin")
    binary = manager.Compile(list(graphs), operators)
    if not len(binary):
        raise SystemExit("QNN gave no program")
    (out / CONTEXT).write_bytes(memoryview(binary))
    manager.DestroyContext()
    manager.Destroy()


def end_with_parent() -> None:
    """Lets the system end this process where the one that started it ends, so that nobody writes where a later run works."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    end_with_parent()
    compile_graphs(Path(sys.argv[1]), Path(sys.argv[2]))
