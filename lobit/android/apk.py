"""Packs an APK: the same entries always give the same bytes, and native libraries can be mapped from it as they lie."""

from __future__ import annotations

import shutil
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

PAGE = 16384
"""Bytes of the largest memory page of a phone; a library that is loaded from the APK begins at a multiple of it."""
WORD = 4
"""Bytes of the unit at which other stored entries begin."""
STORED = (".so", ".arsc", ".pte")
"""Suffixes of entries that are not compressed: libraries and the table of resources are mapped, and programs hardly shrink."""
TIME = (1981, 1, 1, 1, 1, 2)
"""The time of every entry; an APK's own times differ from build to build."""
PADDING = 0xD935
"""Identifier of the extra field that zipalign too uses to move an entry's data."""
HEADER = 30
"""Bytes of a local file header before the entry's name."""


def pack(entries: Mapping[str, Path | bytes], out: Path) -> None:
    """Writes an unsigned APK.

    Args:
        entries: the content, or the file that has it, of each entry by its name.
        out: the file to write.
    """
    with zipfile.ZipFile(out, "w") as packed:
        for name in sorted(entries):
            _add(packed, name, entries[name])


def _add(packed: zipfile.ZipFile, name: str, content: Path | bytes) -> None:
    entry = zipfile.ZipInfo(name, TIME)
    entry.external_attr = 0o644 << 16
    entry.create_system = 3  # Unix, also where this runs on another system
    entry.compress_type = zipfile.ZIP_STORED if name.endswith(STORED) else zipfile.ZIP_DEFLATED
    if entry.compress_type == zipfile.ZIP_STORED:
        assert packed.fp is not None
        begin = packed.fp.tell() + HEADER + len(name.encode())
        entry.extra = _padding(-begin % (PAGE if name.endswith(".so") else WORD))
    entry.file_size = len(content) if isinstance(content, bytes) else content.stat().st_size
    with packed.open(entry, "w") as target:
        if isinstance(content, bytes):
            target.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)


def _padding(missing: int) -> bytes:
    """An extra field of so many bytes, or of a page more where so few bytes hold none."""
    if missing == 0:
        return b""
    size = missing if missing >= 4 else missing + (PAGE if missing % WORD else WORD)
    return struct.pack("<HH", PADDING, size - 4) + bytes(size - 4)


def misaligned(apk: Path) -> list[str]:
    """Describes each native library in an APK that a phone with 16 KB pages cannot map from it."""
    problems = []
    with apk.open("rb") as file, zipfile.ZipFile(file) as packed:
        for entry in packed.infolist():
            if not entry.filename.endswith(".so"):
                continue
            file.seek(entry.header_offset + HEADER - 4)
            name, extra = struct.unpack("<HH", file.read(4))
            begin = entry.header_offset + HEADER + name + extra
            if entry.compress_type != zipfile.ZIP_STORED:
                problems.append(f"{entry.filename} is compressed")
            elif begin % PAGE:
                problems.append(f"{entry.filename} begins at byte {begin}, which is no multiple of {PAGE}")
    return problems
