"""What the tests of damaged bundles share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A bundle that a test may change: a copy of the module's own, `made`."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))
