"""Qualcomm's libraries for x86-64 Linux, out of the package `onnxruntime-qnn`: the compiler for the HTP and an emulator of it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from lobit.errors import MissingPartError
from lobit.targets import TARGETS

PACKAGE = "onnxruntime-qnn"
VERSION = TARGETS["qnn"].exact[PACKAGE]
NEEDED = ("libunwind-*", "libc++abi-*", "libc++-*", "libQnnSystem.so", "libQnnHtp.so")
"""The libraries in the order in which they need each other."""


def library_folder() -> Path:
    """The package's folder.

    Raises:
        MissingPartError: it is not installed, in another version, or not for this machine.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise MissingPartError(f"target qnn is compiled and emulated on x86-64 Linux, not on {platform.system()}: use such a machine")
    found = importlib.util.find_spec("onnxruntime_qnn")
    if found is None or not found.submodule_search_locations:
        raise MissingPartError(f"target qnn needs {PACKAGE} {VERSION}, which is not installed: pip install 'lobit[qnn]'")
    version = metadata.version(PACKAGE)
    if version != VERSION:
        raise MissingPartError(f"target qnn needs {PACKAGE} {VERSION}, {version} is installed: pip install {PACKAGE}=={VERSION}")
    return Path(found.submodule_search_locations[0])


def load_libraries() -> Any:
    """Loads the libraries, so that ExecuTorch finds them by their names, and returns its adaptor to them.

    Raises:
        MissingPartError: a package is missing, or in another version.
    """
    folder = library_folder()
    places = [*folder.with_name(f"{folder.name}.libs").iterdir(), *folder.iterdir()]
    for pattern in NEEDED:
        for path in places:
            if path.match(pattern):
                ctypes.CDLL(str(path))
    # ExecuTorch would fetch the vendor's SDK where this is not set; empty says that the libraries come from elsewhere.
    os.environ.setdefault("QNN_SDK_ROOT", "")
    from executorch.backends.qualcomm.python import PyQnnManagerAdaptor

    return PyQnnManagerAdaptor
