"""Target gguf: the engine, llama.cpp in a process of its own, and the integers read back out of the file."""

from __future__ import annotations

from lobit.runtime.bundle import Bundle
from lobit.runtime.engine import Logits, SteppingEngine
from lobit.runtime.gguf_parts import read_program as read_program
from lobit.runtime.gguf_ports import QUIET_END
from lobit.runtime.llama_library import library_path
from lobit.runtime.python_service import PythonProcess
from lobit.runtime.service import logits_of
from lobit.targets import THIS_MACHINE, Device


class LlamaEngine(SteppingEngine):
    """A GGUF file under llama.cpp, which can give the logits of every token of a call, however the bundle was exported.

    Args:
        bundle: a bundle for target gguf.
        threads: number of its threads.

    Raises:
        BundleError: llama.cpp refuses the file.
        MissingPartError: it is not installed.
    """

    def __init__(self, bundle: Bundle, threads: int) -> None:
        manifest = bundle.manifest
        library_path()
        told = str(threads)
        self.process = PythonProcess(bundle, "lobit.runtime.llama_process", "llama.cpp", told, environment=QUIET_END)
        super().__init__(self._step, manifest.context, manifest.chunk, manifest.model.vocab_size, step_of_all=self._step_of_all)
        self.served_by = self.process.process.pid

    def _step(self, tokens: list[int], position: int) -> Logits:
        return logits_of(self.process.step(tokens, position), self.vocab_size)

    def _step_of_all(self, tokens: list[int], position: int) -> Logits:
        return logits_of(self.process.service.score(tokens, position), self.vocab_size)


def open_engine(bundle: Bundle, threads: int, device: Device = THIS_MACHINE) -> LlamaEngine:
    """The engine of a bundle.

    Raises:
        MissingPartError: llama.cpp is not installed.
        BundleError: it refuses the file.
    """
    return LlamaEngine(bundle, threads)
