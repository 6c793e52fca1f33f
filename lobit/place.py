"""Folders that appear when they are finished, or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from lobit.errors import BundleError


def check_place(out: Path) -> None:
    """Refuses to write where something is.

    Raises:
        BundleError: `out` exists, or its parent is no folder.
    """
    if out.exists() or out.is_symlink():
        raise BundleError(f"{out} is already there and is left as it is: remove it, or choose another place with -o")
    if not out.parent.is_dir():
        raise BundleError(f"{out.parent} is no folder: make it first, or choose another place with -o")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """`out`.partial to write into; it becomes `out` at the end, and is removed where something fails.

    It is made at once, so that a place that cannot be written to is found before any slow work.

    Raises:
        BundleError: as `check_place`, or the place cannot be written to.
    """
    check_place(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
    except OSError as error:
        raise BundleError(f"{partial} cannot be made ({error.strerror}): choose a place that can be written to with -o") from None
    try:
        yield partial
        check_place(out)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
