"""The licences of what is in the app: `android_demo/licences`, a table with a text for each licence that it names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lobit.android.artifacts import SOURCES, artifacts

FOLDER = SOURCES / "licences"
TABLE = "NOTICES.md"
USES = {"app", "native"}
"""Uses of artifacts that go into the app."""


@dataclass(frozen=True)
class Notice:
    """A row of the table."""

    software: str
    artifacts: list[str]
    """Names of the artifacts that have it."""
    licences: list[str]
    """Names of the licences, and of exceptions from them."""
    copyright: str


def notices() -> list[Notice]:
    """All rows of the table."""
    rows = [line for line in (FOLDER / TABLE).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [_notice(*(cell.strip() for cell in row.strip("|").split("|"))) for row in rows[1:]]


def _notice(software: str, names: str, licences: str, holders: str) -> Notice:
    return Notice(software, names.split(", "), re.split(" (?:AND|WITH) ", licences), holders)


def text_of(licence: str) -> Path:
    """The file with the text of a licence."""
    return FOLDER / f"{licence}.txt"


def problems() -> Iterator[str]:
    """What the table lacks."""
    told = notices()
    named = {name for notice in told for name in notice.artifacts}
    for artifact in artifacts():
        if USES & set(artifact.uses) and artifact.name not in named:
            yield f"{artifact.name} goes into the app, and {TABLE} does not name it"
    for licence in sorted({licence for notice in told for licence in notice.licences}):
        if not text_of(licence).is_file():
            yield f"{TABLE} names {licence}, and there is no {text_of(licence).name}"
    yield from (f"{TABLE} names no copyright holder of {notice.software}" for notice in told if not notice.copyright)


def files() -> list[Path]:
    """The table and the texts that it names."""
    return [FOLDER / TABLE, *(text_of(licence) for licence in sorted({name for notice in notices() for name in notice.licences}))]
