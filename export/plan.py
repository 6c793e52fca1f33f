"""What an export will give and take, before anything slow."""

from __future__ import annotations

from lobit.model import Config


def expected_seconds(config: Config, context: int, chunk: int) -> dict[str, float]:
    """Seconds of each stage of an export."""
    return {"quantize": 10.0, "lower": 15.0, "write": 5.0}
