"""Target `xnnpack` on the phone's own ExecuTorch library: on Linux, in a Java process, natively (x86-64) or emulated (arm64).

What it computes is what the phone computes. How long it takes says nothing about a phone.
"""

from __future__ import annotations

import os
import subprocess

from lobit.android.host import CPUS, runtime, serve_command
from lobit.errors import BundleError
from lobit.runtime.bundle import Bundle
from lobit.runtime.engine import SteppingEngine
from lobit.runtime.executorch import read_program as read_program
from lobit.runtime.service import ServedProcess, service_engine
from lobit.targets import Device

LAST_WORDS = 2000
"""Characters of the process's last messages that an error repeats."""


class Server(ServedProcess):
    """A process that runs the program of a bundle (`android_demo/host`, Server.kt).

    Args:
        bundle: a bundle for target xnnpack.
        threads: of the runtime.
        device: `emulated-x86_64` or `emulated-arm64`, with the processor to emulate.
        count: whether the emulator counts instructions, and tells them on stderr when the process ends.

    Raises:
        BundleError: the library refuses the program.
        MissingPartError: something that is needed to run it is missing.
    """

    def __init__(self, bundle: Bundle, threads: int, device: Device, count: bool = False) -> None:
        prepared = runtime(device.kind.removeprefix("emulated-"), device.detail or CPUS[0], count)
        ours, theirs = os.pipe()
        manifest = bundle.manifest
        command = serve_command(
            prepared,
            bundle.path("program"),
            manifest.method("step").name,
            context=manifest.context,
            chunk=manifest.chunk,
            threads=threads,
            answers=f"/proc/self/fd/{theirs}",
        )
        environment = {**os.environ, **prepared.environment}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=(theirs,), env=environment
        )
        os.close(theirs)
        super().__init__(process, os.fdopen(ours, "rb"))

    def refused(self, message: str) -> BundleError:
        """See `Peer.refused`."""
        return BundleError(f"the phone's library cannot run the program ({message}): export it again")

    def ended(self) -> BundleError:
        """See `Peer.ended`."""
        self.close()
        assert self.process.stderr is not None
        said = self.process.stderr.read().decode("utf-8", "replace")[-LAST_WORDS:].strip() or f"exit code {self.process.returncode}"
        return BundleError(f"the process with the phone's library ended ({said}): report it with this message")


def open_engine(bundle: Bundle, threads: int, device: Device) -> SteppingEngine:
    """Starts a process with the phone's library and loads the program of a bundle.

    Args:
        bundle: a bundle for target xnnpack.
        threads: of the runtime.
        device: where to run it.

    Raises:
        BundleError: the library refuses the program.
        MissingPartError: something that is needed to run it is missing.
    """
    return service_engine(bundle, Server(bundle, threads, device).step)
