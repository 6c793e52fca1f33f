"""What a process says of its own memory; asked in fresh processes, whose peaks nothing else has raised."""

import json
import subprocess
import sys

import pytest

from lobit.memory import peak_rss_bytes

HELD = 200 << 20
"""Bytes: far more than Python's own memory varies."""
ASK = f"""
import json
from lobit.memory import peak_rss_bytes
before = peak_rss_bytes()
held = b"x" * {HELD}
during = peak_rss_bytes()
del held
print(json.dumps([before, during, peak_rss_bytes()]))
"""


def peaks() -> list[int]:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def test_peak_memory_is_what_was_held_and_stays() -> None:
    before, during, after = peaks()
    assert 0.9 * HELD < during - before < 1.1 * HELD
    assert after - before > 0.9 * HELD


def test_peak_memory_is_not_the_parents() -> None:
    held = b"x" * (2 * HELD)
    assert peaks()[0] < len(held)


@pytest.mark.skipif(sys.platform not in ("linux", "win32"), reason="other systems do not tell of other processes")
def test_the_peak_of_another_process_is_told() -> None:
    code = "content = b'x' * (1 << 26); print(len(content), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert peak_rss_bytes(process.pid) > 1 << 26
        process.communicate(b"\n")
