"""Commands that run Kotlin code with the phone's ExecuTorch library on Linux: natively on x86-64, or for arm64 in an emulator."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lobit.android.artifacts import arm64_packages, cache_folder, fetched, run
from lobit.android.kotlin import compiled, sources
from lobit.android.shim import shim
from lobit.atomic_folder import publish
from lobit.errors import InputError, MissingPartError

SERVER = "dev.lobit.host.ServerKt"
CPUS = ("max", "cortex-a76", "a64fx")
"""Processors that qemu emulates and that the library runs on: it needs ARMv8.1, which older ones than Cortex-A76 do not have."""
APT = (
    *("-o", "APT::Architecture=arm64", "-o", "APT::Architectures=arm64", "-o", "Debug::NoLocking=1"),
    *("-o", "Dir::State={0}/state", "-o", "Dir::State::status={0}/status", "-o", "Dir::Cache={0}/cache"),
)
"""Options by which apt-get keeps lists of arm64 packages in a folder of their own, and changes nothing that is installed."""


@dataclass(frozen=True)
class Runtime:
    """How to run a class with the phone's library."""

    libraries: Path
    """The folder of the library and of what it needs."""
    command: list[str]
    """The command up to the class."""
    environment: dict[str, str]
    """Variables to set besides those of this process."""


def runtime(processor: str, cpu: str = CPUS[0], count: bool = False) -> Runtime:
    """Prepares what is needed, which takes some minutes the first time, and says how to run a class.

    Args:
        processor: `x86_64` or `arm64`.
        cpu: the processor to emulate, one of `CPUS`.
        count: whether the emulator counts instructions.

    Raises:
        InputError: there is no such processor.
        MissingPartError: a program, compiler or artifact is missing.
    """
    if processor == "x86_64" and platform.machine() != "x86_64":
        raise InputError(f"device emulated-x86_64 needs an x86-64 machine, this one is {platform.machine()}: take emulated-arm64")
    if cpu not in CPUS:
        raise InputError(f"there is no emulated processor {cpu!r}: choose one of {', '.join(CPUS)}")
    cache_folder().mkdir(parents=True, exist_ok=True)
    used = [*fetched("jvm"), *(path for path in fetched("kotlin") if path.name.startswith("kotlin-stdlib"))]
    classes = os.pathsep.join(map(str, [compiled("host", sources("binding", "core", "host"), used), *used]))
    libraries = shim(processor)
    if processor == "x86_64":
        return Runtime(libraries, ["java", "-cp", classes], {"LD_LIBRARY_PATH": str(libraries)})
    root = arm64_root()
    java = root / "usr/lib/jvm/java-17-openjdk-arm64/bin/java"
    paths = [root / "usr/lib/aarch64-linux-gnu", root / "lib/aarch64-linux-gnu", libraries]
    variables = {"LD_PRELOAD": libraries / "libstack_guard.so", "LD_LIBRARY_PATH": os.pathsep.join(map(str, paths))}
    emulator = ["qemu-aarch64", "-cpu", cpu, "-L", str(root), *(["-plugin", str(libraries / "libcount_instructions.so")] if count else [])]
    told = [word for name, value in variables.items() for word in ("-E", f"{name}={value}")]
    # Interpreted: what takes time is native code, which the emulator translates in either case.
    return Runtime(libraries, [*emulator, *told, str(java), "-Xint", "-cp", classes], {})


def arm64_root() -> Path:
    """A folder with Debian's arm64 C library and JDK, fetched when it is first asked for; nothing in it is installed.

    Raises:
        MissingPartError: apt-get or dpkg is missing or fails.
    """
    root = cache_folder() / "arm64-root"
    if not root.is_dir():
        if shutil.which("qemu-aarch64") is None:
            raise MissingPartError("qemu-aarch64 is not installed: `lobit doctor android` says how to install it")
        with tempfile.TemporaryDirectory(dir=cache_folder()) as name:
            work, new = Path(name), Path(name) / "root"
            for folder in ("state/lists/partial", "cache/archives/partial", "packages", "root"):
                (work / folder).mkdir(parents=True)
            (work / "status").touch()
            options = [option.format(work) for option in APT]
            run(["apt-get", *options, "-qq", "update"])
            run(["apt-get", *options, "-qq", "download", *arm64_packages()], cwd=work / "packages")
            for package in sorted((work / "packages").glob("*.deb")):
                run(["dpkg", "-x", package, new])
            publish(new, root)
    return root


def serve_command(prepared: Runtime, program: Path, method: str, *, context: int, chunk: int, threads: int, answers: str) -> list[str]:
    """The command that runs a program for this process (`android_demo/host`, Server.kt)."""
    numbers = [str(number) for number in (context, chunk, threads)]
    return [*prepared.command, SERVER, str(prepared.libraries), str(program), method, *numbers, answers]
