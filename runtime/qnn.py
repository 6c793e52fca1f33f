"""Target qnn: the engine, which runs a bundle's twin for x86-64 on the emulator of the HTP. Nothing here is timed."""

from __future__ import annotations

import subprocess
import sys
import tempfile

from lobit.errors import BundleError, LobitError
from lobit.runtime.bundle import Bundle
from lobit.runtime.engine import SteppingEngine
from lobit.runtime.qnn_libraries import library_folder
from lobit.runtime.service import ServedProcess, service_engine
from lobit.targets import THIS_MACHINE, Device

SHOWN = 3
"""Lines of what the emulator printed last that a message shows."""


class _Emulator(ServedProcess):
    """The process that runs a bundle (`qnn_emulator.py`)."""

    def __init__(self, bundle: Bundle) -> None:
        library_folder()
        self.bundle = bundle
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        command = [sys.executable, "-m", "lobit.runtime.qnn_emulator", str(bundle.folder.resolve())]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        assert process.stdout is not None
        super().__init__(process, process.stdout)

    def refused(self, message: str) -> LobitError:
        """See `Peer.refused`."""
        return BundleError(f"bundle {self.bundle.manifest.name} does not run on the emulator ({message}): export it again")

    def ended(self) -> LobitError:
        """See `Peer.ended`."""
        code = self.process.wait()
        self.log.seek(0)
        lines = [line for line in self.log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        told = "; ".join(lines[-SHOWN:]) or "it printed nothing"
        return BundleError(f"the emulator ended with code {code} while it ran bundle {self.bundle.manifest.name} ({told}): export it again")


def open_engine(bundle: Bundle, threads: int, device: Device = THIS_MACHINE) -> SteppingEngine:
    """The engine of a bundle on the emulator of the HTP; it has no threads to choose.

    Raises:
        MissingPartError: the emulator is not installed.
        BundleError: the program does not run.
    """
    return service_engine(bundle, _Emulator(bundle).step)
