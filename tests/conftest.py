"""Data that tests share: it lies beside the repository and is not part of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("LOBIT_SHARED") or Path(__file__).resolve().parents[2] / "shared")


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared(path)`: a file or folder of ../shared, or of LOBIT_SHARED.

    A test that asks for what is not there is skipped, or fails where LOBIT_REQUIRE_SHARED is set.
    """

    def find(path: str) -> Path:
        found = SHARED / path
        if not found.exists():
            give_up = pytest.fail if os.environ.get("LOBIT_REQUIRE_SHARED") else pytest.skip
            give_up(f"{path} is not in {SHARED}: set LOBIT_SHARED to the folder that has it")
        return found

    return find


@pytest.fixture(scope="session")
def stories(shared: Callable[[str], Path]) -> Path:
    """A real trained Llama of 264 128 parameters, as a Hugging Face folder."""
    return shared("models/stories260k")
