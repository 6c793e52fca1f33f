"""Target `onnx` at run time: runs graphs with ONNX Runtime in this process, and reads their weights back."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lobit.errors import BundleError, MissingPartError
from lobit.quiet import quiet_native
from lobit.runtime.bundle import Bundle
from lobit.runtime.engine import Logits, ReadChunk, SteppingEngine
from lobit.runtime.manifest import Method, State
from lobit.runtime.onnx_ports import FLOAT_INPUTS, PROVIDER, TOKENS, UNTILED_SLOTS
from lobit.runtime.stored import StoredLayer
from lobit.targets import THIS_MACHINE, Device

UNTILED = "ORT_GQA_DISABLE_FLASH_ATTENTION"
"""Environment variable that ONNX Runtime's attention reads when a session is made."""


VECTOR = re.compile(r"(^|\.)(norm|bias)(_\d+)?$")
"""Names of constants that are norms' weights and biases."""
_MAKING = threading.Lock()
"""Lock that is held while the environment variable `UNTILED` is set."""


def import_runtime() -> Any:
    """Imports ONNX Runtime's module and returns it.

    Raises:
        MissingPartError: onnxruntime is not installed.
    """
    try:
        with quiet_native():
            import onnxruntime
    except ImportError as error:
        raise MissingPartError(f"target onnx needs onnxruntime ({error}): pip install 'lobit[onnx]'") from None
    return onnxruntime


def open_engine(bundle: Bundle, threads: int, device: Device = THIS_MACHINE) -> SteppingEngine:
    """Loads the graph of a bundle.

    Args:
        bundle: a bundle for target onnx.
        threads: number of this engine's threads.
        device: this machine.

    Raises:
        MissingPartError: onnxruntime, or the bundle's execution provider, is not installed.
        BundleError: the runtime refuses the graph.
    """
    manifest = bundle.manifest
    step = stepper(bundle.path("program"), manifest.method("step"), manifest.states, threads, provider_of(bundle))
    slots = remembered(manifest.states)
    return SteppingEngine(step, manifest.context, manifest.chunk, manifest.model.vocab_size, slots, manifest.all_logits)


def provider_of(bundle: Bundle) -> str:
    """ONNX Runtime's name of the execution provider that runs a bundle."""
    return str(bundle.manifest.options.get("provider", PROVIDER))


def remembered(states: Sequence[State]) -> int | None:
    """Number of tokens of which every state keeps an entry; None: there is no state and no limit, 0: a state has no positions."""
    return min((0 if state.axis is None else state.shape[state.axis] for state in states), default=None)


def stepper(path: Path, method: Method, states: Sequence[State], threads: int, provider: str = PROVIDER) -> ReadChunk:
    """A function that reads a chunk of tokens with a graph.

    Args:
        path: the graph's file.
        method: the graph's ports.
        states: what the graph hands on from call to call.
        threads: number of threads of its session.
        provider: the execution provider that runs the graph, by ONNX Runtime's name.

    Raises:
        MissingPartError: the execution provider is not installed.
        BundleError: the runtime refuses the graph.
    """
    session = session_of(path, states, threads, provider)
    ports = {port.name: port for port in (*session.get_inputs(), *session.get_outputs())}
    told = [port.name for port in (*method.inputs, *method.outputs)]
    if sorted(told) != sorted(ports):
        raise _unloadable(path, ValueError("its ports are not those of the manifest"))
    return Stepper(import_runtime(), session, method, states)


def session_of(graph: Path | bytes, states: Sequence[State], threads: int, provider: str, settings: Mapping[str, str] | None = None) -> Any:
    """A session of a graph, which is given as its file or as its bytes; for the rest see `stepper`."""
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
        with _attention_for(states):
            return runtime.InferenceSession(str(graph) if isinstance(graph, Path) else graph, options, providers=[provider])
    except Exception as error:  # ONNX Runtime has an exception class for each of its error codes
        raise _unloadable(name, error) from None


def _unloadable(name: Path | str, error: Exception) -> BundleError:
    return BundleError(f"ONNX Runtime cannot load {name} ({error}): export it again")


@contextlib.contextmanager
def _attention_for(states: Sequence[State]) -> Iterator[None]:
    """Sessions made in this context have the attention that is faster for such states, unless the user has set `UNTILED`."""
    with _MAKING:
        if UNTILED in os.environ:
            yield
            return
        longest = max((state.shape[state.axis] for state in states if state.axis is not None), default=0)
        os.environ[UNTILED] = str(int(longest <= UNTILED_SLOTS))
        try:
            yield
        finally:
            del os.environ[UNTILED]


def at_first(state: State) -> NDArray[Any]:
    """A state before the first token: zeros; a state that grows has no positions yet."""
    grows = not state.in_place and state.axis is not None
    return np.zeros([0 if grows and axis == state.axis else size for axis, size in enumerate(state.shape)], state.dtype)


class Stepper:
    """Runs a graph that takes its states and gives them back.

    Args:
        runtime: the module of ONNX Runtime.
        session: the session of the graph.
        method: the graph's ports.
        states: what the graph hands on from call to call.

    Raises:
        BundleError: the graph does not run; raised by a call.
    """

    def __init__(self, runtime: Any, session: Any, method: Method, states: Sequence[State]) -> None:
        self.runtime, self.session = runtime, session
        self.names = {port.role: port.name for port in (*method.inputs, *method.outputs)}
        self.outputs = [port.name for port in session.get_outputs()]
        self.logits_port = next(port for port in session.get_outputs() if port.name == self.names["logits"])
        self.logits: Any = None
        self.binding = session.io_binding()
        self.values: dict[str, Any] = {}
        """The states' values, by the names of their inputs."""
        self.handed = [state for state in states if not state.in_place]
        self.fixed = [state for state in states if state.in_place and state.axis is None]
        """States without positions, whose old contents a new text must not see."""
        for state in states:
            if state.in_place:  # its memory is bound once
                self.values[state.input] = self._value(at_first(state))
                self.binding.bind_ortvalue_input(state.input, self.values[state.input])
                self.binding.bind_ortvalue_output(state.output, self.values[state.input])

    def __call__(self, tokens: list[int], position: int) -> Logits:
        for state in self.fixed if position == 0 else ():
            self.values[state.input].update_inplace(at_first(state))
        for state in self.handed:
            if position == 0:
                self.values[state.input] = self._value(at_first(state))
            elif state.axis is not None and self.values[state.input].shape()[state.axis] > position:  # the engine was rewound
                kept = self.values[state.input].numpy().take(range(position), state.axis)
                self.values[state.input] = self._value(kept)
            self.binding.bind_ortvalue_input(state.input, self.values[state.input])
            self.binding.bind_output(state.output)
        given = {"tokens": tokens, "positions": range(position, position + len(tokens))}
        for role in given.keys() & self.names.keys():
            self.binding.bind_ortvalue_input(self.names[role], self._value(np.array([given[role]], np.int64)))
        self._bind_logits(len(tokens))
        try:
            self.session.run_with_iobinding(self.binding)
        except Exception as error:  # ONNX Runtime has an exception class for each of its error codes
            raise BundleError(f"ONNX Runtime cannot run the graph ({error}): export it again") from None
        if self.handed:
            outputs = dict(zip(self.outputs, self.binding.get_outputs(), strict=True))
            self.values |= {state.input: outputs[state.output] for state in self.handed}
        return self.logits.numpy()[0].copy()  # type: ignore[no-any-return]

    def _bind_logits(self, tokens: int) -> None:
        """Binds memory for the logits; it is made anew where their number changes."""
        scored = 1 if self.logits_port.shape[1] == 1 else tokens
        if self.logits is None or self.logits.shape()[1] != scored:
            self.logits = self._value(np.zeros((1, scored, self.logits_port.shape[2]), np.float32))
            self.binding.bind_ortvalue_output(self.names["logits"], self.logits)

    def _value(self, array: NDArray[Any]) -> Any:
        return self.runtime.OrtValue.ortvalue_from_numpy(array)


class GraphFile:
    """An ONNX file and its data, taken apart without running anything.

    Args:
        path: the graph's file.
        data: the file of its weights, in the same folder.

    Raises:
        MissingPartError: onnx is not installed.
        BundleError: a file is damaged, or the data are missing or too short.
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
        """A constant's values; 4-bit integers are returned as int8, half floats as float32."""
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
        """Yields the layers found; refuses those that cannot be read or whose values do not have `axes` axes.

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
        """The scales of an embedding's integers: the other constant whose rows tokens choose."""
        tables = [node.input[0] for node in self.graph.node if node.op_type == "Gather" and node.input[1] == TOKENS]
        (scale,) = (name for name in tables if name != table)
        return self.constant(scale)

    def _product(self, node: Any, source: str) -> StoredLayer:
        """The weight of a product of standard operators, which the graph has as [in, out]."""
        weight, maker = self.constant(source).T, self.makers.get(node.input[1])
        if maker is None or maker.op_type != "DequantizeLinear":
            return StoredLayer(node.name, weight, None)
        self._check_symmetric(maker, 2)
        scale = self.constant(maker.input[1])
        return StoredLayer(node.name, weight, scale.T if scale.ndim == 2 else scale[:, None])

    def _check_symmetric(self, node: Any, place: int) -> None:
        """Refuses zero points, which a node would have as an input from index `place` on: no grid of lobit has them."""
        if any(node.input[place : place + 2]):
            raise self._damaged(f"{node.name} has zero points")

    def _blocks(self, node: Any, weight: str, scale: str) -> StoredLayer:
        """Unpacks integers in the blocks of MatMulNBits: their codes count from 0 and are packed from the lowest bits on."""
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
