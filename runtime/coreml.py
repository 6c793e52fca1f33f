"""Target coreml: the engine. On a Mac Core ML itself runs a package; elsewhere it is evaluated here, which says nothing of its speed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lobit.errors import BundleError, MissingPartError
from lobit.runtime.bundle import Bundle
from lobit.runtime.client import Ports, keep
from lobit.runtime.coreml_file import read_package
from lobit.runtime.coreml_ports import PACKAGE
from lobit.runtime.coreml_program import Evaluator
from lobit.runtime.coreml_stored import read_program as read_program
from lobit.runtime.engine import Logits, SteppingEngine
from lobit.runtime.manifest import Manifest, Method, Port
from lobit.targets import THIS_MACHINE, Device

HALF_MAX = float(np.finfo(np.float16).max)
Run = Callable[[str, Ports], dict[str, NDArray[Any]]]


class StepByRole:
    """Reads chunks with the methods `prefill` and `decode` of a program that knows tokens and positions itself.

    Args:
        manifest: the bundle's manifest.
        run: runs a method, by name, on its inputs.
    """

    def __init__(self, manifest: Manifest, run: Run) -> None:
        self.manifest, self.run = manifest, run
        self.caches: Ports = {state.input: np.zeros(state.shape, state.dtype) for state in manifest.states}

    def __call__(self, tokens: list[int], position: int) -> Logits:
        method = self.manifest.method("decode" if len(tokens) == 1 else "prefill")
        outputs = self.run(method.name, self._inputs(method, tokens, position))
        for state in self.manifest.states:
            keep(self.caches, state, outputs[state.output], position, len(tokens))
        logits = next(outputs[port.name] for port in method.outputs if port.role == "logits")
        return logits[0, : len(tokens)].astype(np.float32)

    def _inputs(self, method: Method, tokens: list[int], position: int) -> Ports:
        found: Ports = {}
        for port in method.inputs:
            match port.role:
                case "tokens":
                    room = int(port.shape[1])
                    array: NDArray[Any] = np.array([tokens + [0] * (room - len(tokens))])
                case "position":
                    array = np.array([position])
                case "last":
                    array = np.array([len(tokens) - 1])
                case "state":
                    array = self.caches[port.name]
                case role:
                    raise BundleError(f"input {port.name} of {method.name} has the role {role}, which is not known here: export it again")
            found[port.name] = array.astype(port.dtype, copy=False)
        return found


def open_engine(bundle: Bundle, threads: int, device: Device = THIS_MACHINE) -> SteppingEngine:
    """The engine of a package: Core ML on a Mac, an evaluation in float32 elsewhere and of a package inside of an ExecuTorch program.

    It has no threads to choose.

    Raises:
        MissingPartError: coremltools is not installed.
        BundleError: the package is damaged.
    """
    manifest = bundle.manifest
    native = sys.platform == "darwin" and not manifest.options.get("executorch")
    step = StepByRole(manifest, _core_ml(bundle) if native else evaluator(bundle).run)
    return SteppingEngine(step, manifest.context, manifest.chunk, manifest.model.vocab_size, min(manifest.cache.slots), manifest.all_logits)


class RoundedEngine(SteppingEngine):
    """A package with what every operation gives rounded to half precision, as a phone may do it.

    Args:
        bundle: the package's bundle.
    """

    def __init__(self, bundle: Bundle) -> None:
        manifest, self.program = bundle.manifest, evaluator(bundle, half=True)
        step, sizes = StepByRole(manifest, self.program.run), (manifest.context, manifest.chunk, manifest.model.vocab_size)
        super().__init__(step, *sizes, min(manifest.cache.slots), manifest.all_logits)

    def warnings_on(self, tokens: Sequence[int]) -> list[dict[str, str]]:
        """Reads the first tokens of a text anew; returns the `warnings`."""
        self.reset()
        self.prefill(list(tokens)[: self.chunk])
        return self.warnings()

    def warnings(self) -> list[dict[str, str]]:
        """What half precision did not hold in all that was read, in the form of `verdict.warnings`."""
        if not self.program.overflows:
            return []
        name, value = next(iter(self.program.overflows.items()))
        told = f"half precision, which holds {HALF_MAX:g}, does not hold {value:.3g} in {name}"
        count = len(self.program.overflows)
        more = f" ({count} operations have such values)" if count > 1 else ""
        return [{"what": told + more, "advice": "export with --float32"}]


def open_rounded(bundle: Bundle) -> RoundedEngine | None:
    """The engine for what a phone may do to a package's floats; None: it computes in float32."""
    return None if bundle.manifest.options.get("float32") else RoundedEngine(bundle)


def evaluator(bundle: Bundle, half: bool = False) -> Evaluator:
    """The package of a bundle, to be evaluated.

    Raises:
        MissingPartError: coremltools is not installed.
        BundleError: the package is damaged, or lacks a function that the manifest names.
    """

    def ports(told: list[Port]) -> set[str]:
        return {port.name for port in told}

    found = Evaluator(read_package(bundle), half)
    for method in bundle.manifest.methods:
        function = found.package.functions.get(method.name)
        if function is None or ports(method.inputs) != set(function.inputs) or ports(method.outputs) != set(function.outputs):
            raise BundleError(f"bundle {bundle.manifest.name} has no function {method.name} as its manifest tells: export it again")
    return found


def _core_ml(bundle: Bundle) -> Run:
    """Runs functions by Core ML, which keeps the states. This was written after Apple's documentation, and not run."""
    try:
        import coremltools
    except ImportError as error:
        raise MissingPartError(f"{error.name} is not installed: pip install 'lobit[coreml]'") from None
    path, models = str(bundle.folder / PACKAGE), dict[str, Any]()
    for method in bundle.manifest.methods:
        models[method.name] = coremltools.models.MLModel(path, function_name=method.name)
    first = next(iter(models.values()))
    state = None if bundle.manifest.states else first.make_state()

    def run(name: str, inputs: Ports) -> dict[str, NDArray[Any]]:
        outputs: dict[str, NDArray[Any]] = models[name].predict(inputs) if state is None else models[name].predict(inputs, state)
        return outputs

    return run
