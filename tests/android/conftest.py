"""Phones that are folders, connected to the real `adb` through a server of its own."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.android.fake_adb import FakeAdb
from tests.android.fake_phone import FakePhone


def _own_port() -> int:
    """A port that is free; every `adb` of this process, and of those that it starts, asks there from now on.

    Of a server that is named by its address `adb` expects that someone else starts it: a late clean-up, or a test without a phone, never
    starts one, neither there nor on the port of the machine's own.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    os.environ.pop("ANDROID_ADB_SERVER_PORT", None)
    os.environ["ADB_SERVER_SOCKET"] = f"tcp:127.0.0.1:{port}"
    return port


PORT = _own_port()
"""Of the server that the tests start."""


@pytest.fixture(scope="session")
def adb_server(android_tools: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """`adb_server(words…)`: what `adb` prints. Its server has a port, a home and keys of its own, and looks for no emulators."""
    android_tools("adb")
    environment = {**os.environ, "HOME": str(tmp_path_factory.mktemp("adb")), "ADB_LOCAL_TRANSPORT_MAX_PORT": "0"}

    def adb(*words: str) -> str:
        done = subprocess.run(["adb", *words], env=environment, capture_output=True, text=True, check=False, timeout=60)
        return done.stdout + done.stderr

    adb("-P", str(PORT), "start-server")
    yield adb
    adb("kill-server")


@pytest.fixture
def connect(
    adb_server: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[FakePhone, str]]]:
    """`connect(model, is_authorized=True, again=None)`: a phone, or one that was lost, is connected; it comes with its serial number."""
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    daemons: list[FakeAdb] = []

    def make(model: str = "Pixel 8", is_authorized: bool = True, again: FakePhone | None = None) -> tuple[FakePhone, str]:
        phone = again or FakePhone(tmp_path / f"phone{len(daemons)}", model)
        daemons.append(FakeAdb(phone, is_authorized))
        adb_server("connect", daemons[-1].serial)
        return daemons[-1].phone, daemons[-1].serial

    yield make
    for daemon in daemons:
        adb_server("disconnect", daemon.serial)
        daemon.lose()


@pytest.fixture
def phone(connect: Callable[..., tuple[FakePhone, str]]) -> FakePhone:
    """The only phone that is connected; it has the app."""
    made, _ = connect()
    made.add_app()
    return made
