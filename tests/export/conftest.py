"""What tests of exports share."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _parts_once(parts_once: None) -> None:
    """Every export of these tests lowers a part once."""
