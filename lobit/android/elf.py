"""What an ELF library imports, exports and needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection, GNUVerSymSection
from elftools.elf.sections import SymbolTableSection


@dataclass(frozen=True, order=True)
class Import:
    """A symbol that a library takes from others."""

    name: str
    version: str
    """The version that it asks for; empty: any."""
    kind: str = field(compare=False)
    """`STT_FUNC`, `STT_OBJECT`, …"""
    weak: bool = field(compare=False)
    """Whether the library loads without it."""


@dataclass(frozen=True)
class Library:
    """The dynamic side of an ELF file."""

    machine: str
    """`EM_X86_64`, `EM_AARCH64`, …"""
    needed: list[str]
    """Libraries that are loaded with it."""
    imports: list[Import]
    exports: set[str]
    alignment: int
    """The smallest alignment of a loaded segment, bytes."""


def read_library(path: Path) -> Library:
    """Reads a shared library's dynamic symbols.

    Raises:
        elftools.common.exceptions.ELFError: the file is no ELF file.
    """
    with path.open("rb") as file:
        elf = ELFFile(file)
        needed: list[str] = []
        versions: dict[int, str] = {}
        table, numbers = None, None
        for section in elf.iter_sections():
            if isinstance(section, DynamicSection):
                needed += [str(tag.needed) for tag in section.iter_tags("DT_NEEDED")]  # type: ignore[attr-defined]
            elif isinstance(section, GNUVerNeedSection):
                versions |= {one["vna_other"]: one.name for _, entries in section.iter_versions() for one in entries}
            elif isinstance(section, GNUVerSymSection):
                numbers = section
            elif isinstance(section, SymbolTableSection) and section.name == ".dynsym":
                table = section
        imports, exports = [], set()
        for index, symbol in enumerate(table.iter_symbols() if table else ()):
            if not symbol.name:
                continue
            if symbol["st_shndx"] != "SHN_UNDEF":
                exports.add(symbol.name)
                continue
            number = numbers.get_symbol(index)["ndx"] if numbers else 0
            version = versions.get(number, "") if isinstance(number, int) else ""
            info = symbol["st_info"]
            imports.append(Import(symbol.name, version, info["type"], info["bind"] == "STB_WEAK"))
        alignments = [segment["p_align"] for segment in elf.iter_segments() if segment["p_type"] == "PT_LOAD"]
        return Library(elf["e_machine"], needed, imports, exports, min(alignments))
