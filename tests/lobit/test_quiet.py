"""Silence for native code: several threads may want it at once, and what is said before and after is heard."""

import subprocess
import sys
from pathlib import Path

import pytest

from lobit.quiet import quiet_native

REPOSITORY, DESCRIPTORS = Path(__file__).parents[2], Path("/proc/self/fd")
OVERLAPPING = """
import os, sys, threading
from lobit.quiet import quiet_native

first, second = quiet_native(), quiet_native()
os.write(2, b"before ")
first.__enter__()
os.write(2, b"one ")
entered = threading.Thread(target=second.__enter__)
entered.start(); entered.join()
os.write(2, b"both ")
first.__exit__(None, None, None)
os.write(2, b"the other ")
second.__exit__(None, None, None)
os.write(2, b"after ")
print("python", file=sys.stderr)
"""


def test_overlapping_silences_end_with_the_last_and_leave_the_stream_open() -> None:
    done = subprocess.run([sys.executable, "-c", OVERLAPPING], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stderr == "before after python\n"


@pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="the system tells no descriptors")
def test_no_descriptor_is_left_open() -> None:
    before = len(list(DESCRIPTORS.iterdir()))
    for _ in range(50):
        with quiet_native(), quiet_native():
            pass
    assert len(list(DESCRIPTORS.iterdir())) == before


ABORT = """
import os
from types import SimpleNamespace
from lobit.runtime import executorch

class Aborting:
    def forward(self, inputs):
        os.write(2, b"F executorch: the words of an abort\\n")
        os.abort()

    def __getattr__(self, name):
        return lambda *_: self

executorch.import_runtime = lambda: Aborting()
manifest = SimpleNamespace(context=8, chunk=8, model=SimpleNamespace(vocab_size=8))
bundle = SimpleNamespace(manifest=manifest, path=lambda role: role)
executorch.open_engine(bundle, 1)
"""


def test_the_words_of_an_abort_in_a_call_are_heard() -> None:
    done = subprocess.run([sys.executable, "-c", ABORT], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode < 0
    assert "the words of an abort" in done.stderr
