"""Builds libraries by whose help Linux loads Android's ExecuTorch libraries, which are not changed.

Android's libraries ask for symbols of bionic, its C library, by versions such as LIBC and LIBC_N. `android_demo/shim/libc.c` has the
functions that differ from glibc's; for all others, this module writes jumps of the asked name and version to glibc's function.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lobit.android.artifacts import SOURCES, cache_folder, fetched, run, unpacked
from lobit.android.elf import Import, read_library
from lobit.atomic_folder import publish
from lobit.errors import MissingPartError, listed

ABIS = {"x86_64": "x86_64", "arm64": "arm64-v8a"}
"""Android's names of the processors that the libraries are for."""
COMPILERS = {"x86_64": ["gcc", "-fcf-protection=none"], "arm64": ["aarch64-linux-gnu-gcc"]}
FLAGS = ["-O2", "-fPIC", "-shared", "-fno-stack-protector", "-U_FORTIFY_SOURCE", "-Wl,-z,now"]
JUMPS = {
    "x86_64": "jmp *{name}@GOTPCREL(%rip)",
    "arm64": "adrp x16, :got:{name}\n\tldr x16, [x16, :got_lo12:{name}]\n\tbr x16",
}
"""A jump to a function of another library that changes no register of a call."""
WRAPPED = re.compile(r"^BIONIC(?:_VERSION)?\((\w+)", re.MULTILINE)
LIBRARIES = ("libexecutorch.so", "libfbjni.so", "libc++_shared.so")
"""The phone's libraries, as they are loaded there."""
PACKAGE = "package/third-party/android/libs/executorch"
"""Where the npm package has ExecuTorch's library for each processor."""


def phone_libraries(processor: str, folder: Path) -> list[Path]:
    """Puts the phone's own libraries into a folder and returns them.

    Args:
        processor: one of `ABIS`.
        folder: made if it is not there.
    """
    package, fbjni = (path for path in fetched("native") if path.suffix in (".tgz", ".aar"))
    abi = ABIS[processor]
    unpacked(package, [f"{PACKAGE}/{abi}/{LIBRARIES[0]}"], folder)
    unpacked(fbjni, [f"jni/{abi}/{name}" for name in LIBRARIES[1:]], folder)
    return [folder / name for name in LIBRARIES]


def shim(processor: str) -> Path:
    """The folder with the phone's libraries and those that stand for Android's system, built when it is first asked for.

    Args:
        processor: one of `ABIS`.

    Raises:
        MissingPartError: a compiler or an artifact is missing, or the libraries ask for something that is not known here.
    """
    sources = sorted((SOURCES / "shim").glob("*.c"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (*sources, Path(__file__), SOURCES / "artifacts.toml"))).hexdigest()
    folder = cache_folder() / f"{processor}-{digest[:16]}"
    if not folder.is_dir():
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as name:
            new = Path(name) / "new"
            _build(processor, phone_libraries(processor, new), new)
            if not folder.is_dir():
                publish(new, folder)
    return folder


def _build(processor: str, libraries: Sequence[Path], folder: Path) -> None:
    compiler, jdk, source = COMPILERS[processor], java_home(), SOURCES / "shim"
    jumps, script = stubs(processor, libraries, (source / "libc.c").read_text(encoding="utf-8"))
    work = folder / "work"
    work.mkdir()
    (work / "jumps.S").write_text(jumps, encoding="ascii")
    (work / "libc.map").write_text(script, encoding="ascii")
    (work / "empty.map").write_text("LIBC { global: shim_empty_marker; local: *; };\n", encoding="ascii")

    def link(name: str, *arguments: str | Path) -> None:
        run([*compiler, *FLAGS, f"-Wl,-soname,{name}", *arguments, "-o", folder / name])

    map_of = "-Wl,--version-script="
    link("libc.so", source / "libc.c", work / "jumps.S", f"{map_of}{work / 'libc.map'}", "-Wl,--no-undefined", "-lm", "-ldl", "-lpthread")
    for name in ("libm.so", "libdl.so", "libandroid.so"):
        link(name, source / "empty.c", f"{map_of}{work / 'empty.map'}")
    link("liblog.so", source / "liblog.c")
    link("libopen.so", source / "open.c", f"-I{jdk / 'include'}", f"-I{jdk / 'include/linux'}")
    if processor == "arm64":
        link("libstack_guard.so", source / "stack_guard.c")
        run(["gcc", *FLAGS, source / "count_instructions.c", "-o", folder / "libcount_instructions.so"])  # of the emulator's processor
    shutil.rmtree(work)


def java_home() -> Path:
    """The folder of the JDK whose `javac` is found first.

    Raises:
        MissingPartError: there is none.
    """
    found = shutil.which("javac")
    if found is None:
        raise MissingPartError("javac is not installed: `lobit doctor android` says how to install a JDK")
    return Path(found).resolve().parents[1]


def stubs(processor: str, libraries: Sequence[Path], wrappers: str) -> tuple[str, str]:
    """The assembler source of the jumps, and the linker's version script for libc.so.

    Args:
        processor: one of `ABIS`.
        libraries: the phone's libraries.
        wrappers: the source of what needs more than a jump.

    Raises:
        MissingPartError: the libraries ask for variables that are not known here.
    """
    wrapped = set(WRAPPED.findall(wrappers))
    asked = sorted({symbol for path in libraries for symbol in read_library(path).imports if symbol.version})
    variables = [symbol.name for symbol in asked if symbol.kind == "STT_OBJECT" and symbol.name not in wrapped]
    if variables:
        raise MissingPartError(listed(variables, "Android's libraries ask for variables that android_demo/shim/libc.c does not have:"))
    versions = sorted({symbol.version for symbol in asked}, key=lambda version: (version != "LIBC", version))
    chain = ["SHIM_BASE { global: shim_base_marker; local: bionic_*; };"]
    for before, version in zip(["SHIM_BASE", *versions], versions, strict=False):
        chain.append(f"{version} {{ }} {before};")
    jumps = "\n".join(_jumps(processor, [symbol for symbol in asked if symbol.name not in wrapped]))
    return f'\t.text\n{jumps}\n\t.section .note.GNU-stack,"",%progbits\n', "\n".join(chain) + "\n"


def _jumps(processor: str, symbols: Sequence[Import]) -> Iterator[str]:
    for symbol in symbols:
        own = f"bionic_{symbol.name}"
        yield f"\t.globl {own}\n\t.type {own},%function\n{own}:\n\t{JUMPS[processor].format(name=symbol.name)}"
        yield f"\t.size {own}, .-{own}\n\t.symver {own}, {symbol.name}@{symbol.version}"
