"""Finds in a built app what would fail on a phone: classes, native methods and symbols that are not there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from lobit.android.apk import PAGE
from lobit.android.artifacts import SOURCES, run
from lobit.android.elf import Library, read_library
from lobit.android.r8 import r8_command
from lobit.errors import LobitError, listed

MACHINES = {"arm64": "EM_AARCH64", "x86_64": "EM_X86_64"}
SYSTEM = ("libandroid.so", "libc.so", "libdl.so", "liblog.so", "libm.so")
"""Libraries of Android that an app may load."""
LISTED = re.compile(
    r" *(?:Class descriptor +: '(?P<owner>\S+)'|name +: '(?P<name>.*)'|type +: '(?P<type>.*)'|access +: \S+ \((?P<access>.*)\))"
)
"""Matches the lines of dexdump's listing that describe a method, one property a line."""


class AppError(LobitError):
    """The app that was built would fail on a phone."""


def check(what: str, problems: Sequence[str]) -> None:
    """Refuses an app with problems.

    Raises:
        AppError: there are problems; the message lists them.
    """
    if problems:
        raise AppError(listed(list(problems), f"{what}: {len(problems)} problems, which would fail on a phone; nothing is written:"))


def unresolved(dex: Sequence[Path], android: Path | None = None) -> list[str]:
    """The classes, methods and fields that the app uses and neither it nor Android has.

    Args:
        dex: the app's classes.
        android: a jar with the classes of another Android than the one that the app is compiled against.
    """
    sources = [word for path in dex for word in ("--source", path)]
    command = r8_command("tracereferences.TraceReferences", "--check", *sources, android=android)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return []
    told = [line.removeprefix("Error: ") for line in (done.stdout + done.stderr).splitlines()]
    missing = dict.fromkeys(line for line in told if line.startswith("Missing "))  # they are told again with the trace of the failure
    return list(missing) or [f"TraceReferences ended with exit code {done.returncode}", *told]


def natives() -> set[str]:
    """The native methods that ExecuTorch's library registers: class, name, signature, and S for static ones or I for others."""
    return set(_lines("natives.txt"))


def missing_natives(dex: Sequence[Path]) -> list[str]:
    """The native methods that the library registers and the app lacks: one is enough for the library not to load."""
    there = {method for path in dex for method in native_methods(run(["dexdump", path]))}
    return [f"there is no native method {method}, which the library registers" for method in sorted(natives() - there)]


def unknown_natives(library: Path) -> list[str]:
    """The native methods of natives.txt whose name or signature is no text in a library, which then registers other ones."""
    content = library.read_bytes()
    words = {word for method in natives() for word in method.split()[1:3]}
    return [f"natives.txt has {word}, which {library.name} has not" for word in sorted(words) if f"\0{word}\0".encode() not in content]


def native_methods(listing: str) -> Iterator[str]:
    """The native methods of dexdump's listing, written as in natives.txt."""
    owner = name = kind = ""
    for line in listing.splitlines():
        found = LISTED.fullmatch(line)
        if found is None:
            continue
        owner, name, kind = found["owner"] or owner, found["name"] or name, found["type"] or kind
        access = (found["access"] or "").split()
        if "NATIVE" in access:
            yield f"{owner} {name} {kind} {'S' if 'STATIC' in access else 'I'}"


@lru_cache
def bionic() -> Mapping[str, int]:
    """The symbols of Android's system libraries that are known here, with the API level since which 64-bit phones have them."""
    return {name: int(level) for name, level in map(str.split, _lines("bionic.txt"))}


def _lines(name: str) -> list[str]:
    """The lines of a list beside the sources, without its comments."""
    return [line for line in (SOURCES / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def library_problems(processor: str, files: Sequence[Path], min_sdk: int) -> list[str]:
    """What prevents libraries that are shipped together from being loaded by a phone.

    Args:
        processor: of `shim.ABIS`.
        files: all of the libraries.
        min_sdk: the API level of the oldest phone.
    """
    libraries = {path.name: read_library(path) for path in files}
    exported = set().union(*(library.exports for library in libraries.values()))
    problems = []
    for name, library in libraries.items():
        if library.machine != MACHINES[processor]:
            problems.append(f"{name} is for {library.machine}, not {MACHINES[processor]}")
        if library.alignment < PAGE:
            problems.append(f"{name} has segments aligned to {library.alignment} bytes, phones have pages of {PAGE}")
        problems += [f"{name} needs {needed}, which is not there" for needed in library.needed if needed not in {*libraries, *SYSTEM}]
        problems += [f"{name} {problem}" for problem in _missing_symbols(library, exported, min_sdk)]
    return problems


def _missing_symbols(library: Library, exported: set[str], min_sdk: int) -> Iterator[str]:
    for symbol in library.imports:
        if symbol.weak or symbol.name in exported:
            continue
        level = bionic().get(symbol.name)
        if level is None:
            yield f"imports {symbol.name}, which bionic.txt does not have"
        elif level > min_sdk:
            yield f"imports {symbol.name}, which Android has since API level {level}, above {min_sdk}"
