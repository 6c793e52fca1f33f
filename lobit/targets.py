"""The targets by name: where the code of each is, what runs its bundles, and which packages it needs.

A new target needs its modules and an entry here; its extra in pyproject.toml has its name. This module needs the standard library alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from lobit.errors import InputError

HOST = "host"
"""Name of this machine, as a device that runs bundles."""
PHONE = "adb"
"""Name of a phone that adb reaches."""
EMULATED = "emulated-arm64"
"""Name of an emulated phone's processor, which runs the phone's own library and counts its instructions."""


@dataclass(frozen=True)
class Device:
    """Where a bundle runs."""

    kind: str
    """One of the devices of `TargetEntry.engines`, such as `host`."""
    detail: str | None = None
    """Which one of its kind: the processor to emulate, the serial number of a phone; None: the first or only one."""

    @property
    def is_emulated(self) -> bool:
        """Whether the time that it takes says nothing."""
        return self.kind.startswith("emulated-")

    def __str__(self) -> str:
        return self.kind if self.detail is None else f"{self.kind}:{self.detail}"


THIS_MACHINE = Device(HOST)


def parse_device(text: str, cpu: str | None = None) -> Device:
    """The device that a user names, such as `host`, `emulated-arm64` or `adb:SERIAL`.

    Args:
        text: the kind, and after a colon which one of its kind.
        cpu: the processor to emulate, which may also stand after the colon.

    Raises:
        InputError: there is no such device, or a processor is named for one that is not emulated.
    """
    kind, _, detail = text.partition(":")
    device = Device(kind, detail or None)
    known = list(dict.fromkeys(name for target in TARGETS.values() for name in target.engines))
    if kind not in known:
        raise InputError(f"there is no device {text!r}: choose one of {', '.join(known)}")
    if cpu is None:
        return device
    if not device.is_emulated or device.detail is not None:
        raise InputError(f"--cpu {cpu} is for an emulated device without a processor of its own, not for {device}: leave it out")
    return Device(kind, cpu)


@dataclass(frozen=True)
class TargetEntry:
    """What the command line, `doctor`, `bench` and the tests know of a target without loading it."""

    what: str
    """What the target is, in a few words for the help texts."""
    export: str
    """The module that implements `export.target.Target`."""
    engines: Mapping[str, str]
    """Modules with `open_engine(bundle, threads, device)`, by the kind of device that they run a bundle on."""
    packages: tuple[str, ...]
    """The packages that exporting to it and running its bundles need."""
    exact: Mapping[str, str] = field(default_factory=dict)
    """Versions of packages that it needs exactly, where pip's own requirement is not enough to be sure of them."""
    proof: str | None = None
    """The module that reads back what its compiled programs hold, where these cannot be taken apart; None: `read_program` does."""
    emulated: str | None = None
    """What runs its bundles on this machine in the place of the device, so that the time says nothing; None: the runtime itself."""
    parity_tokens: int = 2048
    """Tokens of a text that parity reads by default on this machine."""


def says_nothing_of_time(target: str, device: Device) -> bool:
    """Whether a bundle for a target runs in an emulator there."""
    return device.is_emulated or (device == THIS_MACHINE and target in TARGETS and TARGETS[target].emulated is not None)


def proof_of(target: str) -> str | None:
    """The module that reads back what compiled programs for a target hold; None: they can be taken apart, or the target is unknown."""
    return TARGETS[target].proof if target in TARGETS else None


TARGETS: dict[str, TargetEntry] = {
    "xnnpack": TargetEntry(
        "ExecuTorch on the CPU",
        "lobit.export.xnnpack.target",
        {
            HOST: "lobit.runtime.executorch",
            EMULATED: "lobit.runtime.executorch_android",
            "emulated-x86_64": "lobit.runtime.executorch_android",
            PHONE: "lobit.runtime.phone",
        },
        ("executorch", "torchao"),
    ),
    "onnx": TargetEntry("ONNX Runtime", "lobit.export.onnx.target", {HOST: "lobit.runtime.onnxruntime"}, ("onnx", "onnxruntime")),
    "gguf": TargetEntry(
        "llama.cpp and the apps that are built on it",
        "lobit.export.gguf.target",
        {HOST: "lobit.runtime.llama_cpp"},
        ("gguf", "xllamacpp"),
        {"xllamacpp": "2026.10.11549"},  # its structures in memory are called without its headers
    ),
    "qnn": TargetEntry(
        "Qualcomm's neural processor, through ExecuTorch",
        "lobit.export.qnn.target",
        {HOST: "lobit.runtime.qnn", PHONE: "lobit.runtime.phone"},
        ("executorch", "onnxruntime-qnn"),
        {"onnxruntime-qnn": "2.5.0"},  # 2.3 and 2.4 find no device, 2.6 and 2.7 do not know the chips
        proof="lobit.export.qnn.proof",
        emulated="the emulator of the HTP",
        parity_tokens=256,  # the emulator takes seconds for some of them
    ),
    "coreml": TargetEntry(
        "Core ML on Apple's devices",
        "lobit.export.coreml.target",
        {HOST: "lobit.runtime.coreml"},
        ("coremltools",),
        emulated=None if sys.platform == "darwin" else "an evaluation in NumPy",
    ),
}
