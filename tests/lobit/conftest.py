"""Fixtures of the command line's tests."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lobit import cli
from tests.commands import write_zeros

MISTAKE = 2
NATIVE = re.compile(r"^\[\w+\.(cpp|h):\d+\] .*\n", re.MULTILINE)
"""What ExecuTorch's runtime says through Python's own stream: only here, where pytest has put that elsewhere than descriptor 2."""


@dataclass
class Answer:
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def assert_one_message(self, *parts: str) -> None:
        """A mistake is one message on stderr, which has all the parts; stdout is empty."""
        assert self.code == MISTAKE, self.err
        assert self.out == ""
        assert "Traceback" not in self.err
        begins = [line for line in self.err.splitlines() if line.startswith("lobit: ")]
        assert len(begins) == 1
        message = self.err[self.err.index(begins[0]) :]
        for part in parts:
            assert part in message


Lobit = Callable[..., Answer]


@pytest.fixture
def lobit(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Lobit:
    """`lobit(*arguments)`: the command in this process."""

    def call(*arguments: Any) -> Answer:
        monkeypatch.setattr(sys, "argv", ["lobit", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capfd.readouterr()
        return Answer(int(end.value.code or 0), out, NATIVE.sub("", err))

    return call


@pytest.fixture(scope="session")
def sample(shared: Callable[[str], Path]) -> Path:
    """Stories that stories260k has not seen."""
    return shared("text/tinystories_sample.txt")


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes a command some seconds."""
    return write_zeros(tmp_path_factory.mktemp("zeros"))
