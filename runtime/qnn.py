"""Target qnn: the engine, which runs a bundle's twin for x86-64 on the emulator of the HTP. Nothing here is timed."""

from __future__ import annotations

from lobit.runtime.bundle import Bundle
from lobit.runtime.engine import SteppingEngine
from lobit.runtime.python_service import PythonProcess
from lobit.runtime.qnn_libraries import library_folder
from lobit.runtime.service import service_engine
from lobit.targets import THIS_MACHINE, Device


def open_engine(bundle: Bundle, threads: int, device: Device = THIS_MACHINE) -> SteppingEngine:
    """The engine of a bundle on the emulator of the HTP; it has no threads to choose.

    Raises:
        MissingPartError: the emulator is not installed.
        BundleError: the program does not run.
    """
    library_folder()
    return service_engine(bundle, PythonProcess(bundle, "lobit.runtime.qnn_emulator", "the emulator").step)
