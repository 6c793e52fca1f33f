"""Target `onnx` at run time: ONNX Runtime in this process, and the weights of its graphs read back."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lobit.errors import BundleError, MissingPartError
from lobit.quiet import quiet_native
from lobit.runtime.bundle import Bundle
from lobit.runtime.engine import Logits, Step, SteppingEngine
from lobit.runtime.onnx_ports import FLOAT_INPUTS, LOGITS, PAST, POSITIONS, PRESENT, STEP, TOKENS, UNTILED_SLOTS
from lobit.runtime.verify import StoredLayer

UNTILED = "ORT_GQA_DISABLE_FLASH_ATTENTION"
"""Variable of the process that ONNX Runtime's attention reads when a session is made."""


VECTOR = re.compile(r"(^|\.)(norm|bias)(_\d+)?$")
"""Names of constants that are norms' weights and biases."""
_MAKING = threading.Lock()
"""Held while the variable is set."""


def import_runtime() -> Any:
    """ONNX Runtime.

    Raises:
        MissingPartError: it is not installed.
    """
    try:
        with quiet_native():
            import onnxruntime
    except ImportError as error:
        raise MissingPartError(f"target onnx needs onnxruntime ({error}): pip install 'lobit[onnx]'") from None
    return onnxruntime


def open_engine(bundle: Bundle, threads: int) -> SteppingEngine:
    """Loads the graph of a bundle.

    Args:
        bundle: for target onnx.
        threads: of this engine.

    Raises:
        MissingPartError: onnxruntime, or the bundle's execution provider, is not installed.
        BundleError: the runtime refuses the graph.
    """
    manifest = bundle.manifest
    step = stepper(bundle.path("program"), manifest.cache.slots, threads, manifest.delegation.backend)
    return SteppingEngine(step, manifest.context, min(manifest.chunk, STEP), manifest.model.vocab_size, min(manifest.cache.slots))


def stepper(path: Path, slots: list[int], threads: int, provider: str = "CPUExecutionProvider") -> Step:
    """What reads a chunk of tokens with a graph.

    Args:
        path: of the graph.
        slots: positions of each layer's cache.
        threads: of this session.
        provider: what runs the graph, by ONNX Runtime's name.

    Raises:
        MissingPartError: the execution provider is not installed.
        BundleError: the runtime refuses the graph.
    """
    try:
        session = session_of(path, slots, threads, provider)
        kind = InPlace if POSITIONS in (port.name for port in session.get_inputs()) else Growing
        return kind(import_runtime(), session, slots)
    except ValueError as error:  # ports that are not those of a bundle
        raise _unloadable(path, error) from None


def session_of(graph: Path | bytes, slots: list[int], threads: int, provider: str, settings: Mapping[str, str] | None = None) -> Any:
    """A session of a graph, given its file or itself; else as `stepper`."""
    runtime = import_runtime()
    name = graph if isinstance(graph, Path) else "the graph"
    installed = runtime.get_available_providers()
    if provider not in installed:
        found = ", ".join(installed)
        raise MissingPartError(f"{name} is for {provider}, this onnxruntime has {found}: install one that has it, or export again")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    for key, value in {**FLOAT_INPUTS, **(settings or {})}.items():
        options.add_session_config_entry(key, value)
    try:
        with _attention_for(slots):
            return runtime.InferenceSession(str(graph) if isinstance(graph, Path) else graph, options, providers=[provider])
    except Exception as error:  # a class of its own for each of its codes
        raise _unloadable(name, error) from None


def _unloadable(name: Path | str, error: Exception) -> BundleError:
    return BundleError(f"ONNX Runtime cannot load {name} ({error}): export it again")


@contextlib.contextmanager
def _attention_for(slots: list[int]) -> Iterator[None]:
    """Sessions made inside have the attention that is faster for such caches, unless the user has chosen."""
    with _MAKING:
        if UNTILED in os.environ:
            yield
            return
        os.environ[UNTILED] = str(int(max(slots) <= UNTILED_SLOTS))
        try:
            yield
        finally:
            del os.environ[UNTILED]


class Growing:
    """Runs a graph that takes keys and values, and gives them back longer.

    Args:
        runtime: the module.
        session: a loaded graph.
        slots: positions of each layer's cache.

    Raises:
        BundleError: on a call: the graph does not run.
    """

    def __init__(self, runtime: Any, session: Any, slots: list[int]) -> None:
        self.runtime, self.session = runtime, session
        inputs, outputs = ({port.name: port for port in ports} for ports in (session.get_inputs(), session.get_outputs()))
        self.pasts = [port for name, port in inputs.items() if name.startswith(PAST)]
        missing = {TOKENS, LOGITS, *(port.name.replace(PAST, PRESENT) for port in self.pasts)} - {*inputs, *outputs}
        sizes = [port.shape[axis] for port in self.pasts for axis in (1, 3)]
        if missing or len(self.pasts) != 2 * len(slots) or not all(isinstance(size, int) for size in sizes):
            raise ValueError(f"its ports are not those of {len(slots)} layers")
        self.logits_port = outputs[LOGITS]
        self.caches: dict[str, Any] = {}

    def __call__(self, tokens: list[int], position: int) -> Logits:
        if position == 0:
            self.caches = {port.name: self._zeros(1, port.shape[1], 0, port.shape[3]) for port in self.pasts}
        elif any(value.shape()[2] > position for value in self.caches.values()):  # the engine was rewound
            self.caches = {name: self._value(value.numpy()[:, :, :position].copy()) for name, value in self.caches.items()}
        binding = self.session.io_binding()
        binding.bind_ortvalue_input(TOKENS, self._value(np.array([tokens], np.int64)))
        for name, value in self.caches.items():
            binding.bind_ortvalue_input(name, value)
        for name in (LOGITS, *(name.replace(PAST, PRESENT) for name in self.caches)):
            binding.bind_output(name)
        self._run(binding)
        logits, *caches = binding.get_outputs()
        self.caches = dict(zip(self.caches, caches, strict=True))
        return logits.numpy()[0, -1]  # type: ignore[no-any-return]

    def _run(self, binding: Any) -> None:
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # a class of its own for each of its codes
            raise BundleError(f"ONNX Runtime cannot run the graph ({error}): export it again") from None

    def _value(self, array: NDArray[Any]) -> Any:
        return self.runtime.OrtValue.ortvalue_from_numpy(array)

    def _zeros(self, *shape: int) -> Any:
        return self._value(np.zeros(shape, np.float32))


class InPlace(Growing):
    """Runs a graph that writes keys and values where they lie, in memory that is bound once."""

    def __init__(self, runtime: Any, session: Any, slots: list[int]) -> None:
        super().__init__(runtime, session, slots)
        self.binding = session.io_binding()
        for port, size in zip(self.pasts, np.repeat(slots, 2).tolist(), strict=True):
            value = self._zeros(1, port.shape[1], size, port.shape[3])
            self.binding.bind_ortvalue_input(port.name, value)
            self.binding.bind_ortvalue_output(port.name.replace(PAST, PRESENT), value)
        self.logits = self._zeros(1, 0, self.logits_port.shape[2])

    def __call__(self, tokens: list[int], position: int) -> Logits:
        scored = 1 if self.logits_port.shape[1] == 1 else len(tokens)
        if self.logits.shape()[1] != scored:
            self.logits = self._zeros(1, scored, self.logits_port.shape[2])
            self.binding.bind_ortvalue_output(LOGITS, self.logits)
        for name, values in ((TOKENS, tokens), (POSITIONS, range(position, position + len(tokens)))):
            self.binding.bind_ortvalue_input(name, self._value(np.array([values], np.int64)))
        self._run(self.binding)
        return self.logits.numpy()[0, -1].copy()  # type: ignore[no-any-return]


class GraphFile:
    """An ONNX file and its data, taken apart; nothing is run.

    Args:
        path: of the graph.
        data: of its weights, in the same folder.

    Raises:
        MissingPartError: onnx is not installed.
        BundleError: a file is damaged, or the data are missing or short.
    """

    def __init__(self, path: Path, data: Path) -> None:
        try:
            import onnx
        except ImportError as error:
            raise MissingPartError(f"reading a graph needs onnx ({error}): pip install 'lobit[onnx]'") from None
        self.path, self.data = path, data
        try:
            self.model = onnx.load(path, load_external_data=False)
            self.graph = self.model.graph
        except Exception as error:  # protobuf raises several kinds, all of them mean a damaged file
            raise self._damaged(f"{type(error).__name__}: {error}") from None
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.makers = {name: node for node in self.graph.node for name in node.output}

    def _damaged(self, why: str) -> BundleError:
        return BundleError(f"{self.path} cannot be taken apart ({why}): export it again")

    def constant(self, name: str) -> NDArray[Any]:
        """A constant's values; integers of 4 bits as int8, half floats as float32."""
        import onnx

        tensor = self.initializers[name]
        described = {entry.key: entry.value for entry in tensor.external_data}
        if described or tensor.data_location == onnx.TensorProto.EXTERNAL:
            start, length = int(described["offset"]), int(described["length"])
            if described["location"] != self.data.name or start < 0 or not 0 <= length <= self.data.stat().st_size - start:
                raise self._damaged(f"the data of {name} are not in {self.data.name}")
            with self.data.open("rb") as file:
                file.seek(start)
                tensor = onnx.TensorProto(name=name, data_type=tensor.data_type, dims=tensor.dims, raw_data=file.read(length))
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float16:
            return values.astype(np.float32)
        return values.astype(np.int8) if tensor.data_type == onnx.TensorProto.INT4 else values

    def layers(self) -> Iterator[StoredLayer]:
        """The embedding and the products in the order of execution."""
        return self._checked(self._layers(), 2)

    def vectors(self) -> Iterator[StoredLayer]:
        """Norms and biases in the order of execution."""
        names = (name for node in self.graph.node for name in node.input if name in self.initializers and VECTOR.search(name))
        return self._checked((StoredLayer(name, self.constant(name), None) for name in names), 1)

    def _checked(self, found: Iterator[StoredLayer], axes: int) -> Iterator[StoredLayer]:
        """What was found, if it can be read and is of so many axes.

        Raises:
            BundleError: the files are damaged.
        """
        try:
            for layer in found:
                values, scale = layer.values, layer.scale
                if values.ndim != axes or (scale is not None and (scale.ndim != 2 or len(scale) != len(values))):
                    raise ValueError(f"{layer.name} has weights or scales that are no matrix of its rows")
                yield layer
        except (LookupError, ValueError, TypeError, OSError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from None

    def _layers(self) -> Iterator[StoredLayer]:
        for node in self.graph.node:
            match node.op_type:
                case "GatherBlockQuantized":
                    yield self._blocks(node, node.input[0], node.input[2])
                case "Gather" if node.input[1] == TOKENS and node.input[0].endswith("weight"):
                    table = self.constant(node.input[0])
                    yield StoredLayer(node.name, table, self._row_scales(node.input[0]) if table.dtype == np.int8 else None)
                case "MatMulNBits":
                    yield self._blocks(node, node.input[1], node.input[2])
                case "FusedMatMul":
                    yield StoredLayer(node.name, self.constant(self._source(node.input[1])), None)
                case "MatMul" if (source := self._source(node.input[1])) in self.initializers:
                    yield self._product(node, source)

    def _source(self, name: str) -> str:
        """The constant that a weight was cast or dequantized from, or the weight's own name."""
        maker = self.makers.get(name)
        return str(maker.input[0]) if maker is not None and maker.op_type in ("Cast", "DequantizeLinear") else name

    def _row_scales(self, table: str) -> NDArray[np.float32]:
        """Of an embedding's integers: the other constant that tokens choose rows of."""
        tables = [node.input[0] for node in self.graph.node if node.op_type == "Gather" and node.input[1] == TOKENS]
        (scale,) = (name for name in tables if name != table)
        return self.constant(scale)

    def _product(self, node: Any, source: str) -> StoredLayer:
        """A product of standard operators: its weight is [in, out]."""
        weight, maker = self.constant(source).T, self.makers.get(node.input[1])
        if maker is None or maker.op_type != "DequantizeLinear":
            return StoredLayer(node.name, weight, None)
        self._check_symmetric(maker, 2)
        scale = self.constant(maker.input[1])
        return StoredLayer(node.name, weight, scale.T if scale.ndim == 2 else scale[:, None])

    def _check_symmetric(self, node: Any, place: int) -> None:
        """Refuses zero points, which would be an input at `place`: no grid has them."""
        if any(node.input[place : place + 2]):
            raise self._damaged(f"{node.name} has zero points")

    def _blocks(self, node: Any, weight: str, scale: str) -> StoredLayer:
        """Integers in the blocks of MatMulNBits: codes from 0 on, the first in the lowest bits."""
        self._check_symmetric(node, 3)
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        bits, packed = sizes["bits"], self.constant(weight)
        packed = packed.reshape(len(packed), -1)
        columns = sizes.get("K", packed.shape[1] * 8 // max(bits, 1))
        rows = sizes.get("N", len(packed))
        if bits not in (2, 4, 8) or not 0 < columns <= packed.shape[1] * 8 // bits or rows != len(packed):
            raise self._damaged(f"{node.name} has {rows} x {columns} weights of {bits} bits")
        codes = np.stack([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], axis=2).reshape(len(packed), -1)
        integers = (codes.astype(np.int16) - (1 << bits - 1)).astype(np.int8)
        return StoredLayer(node.name, integers[:, :columns], self.constant(scale))


def read_program(bundle: Bundle) -> GraphFile:
    """The bundle's graph taken apart (`verify.ProgramReader`)."""
    return GraphFile(bundle.path("program"), bundle.path("weights"))
