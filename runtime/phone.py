"""Bundles on a phone, in lobit's app: connects to it by adb, and runs programs there as an engine (`android_demo`, ServiceActivity)."""

from __future__ import annotations

import contextlib
import re
import socket
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import lobit
from lobit.errors import BundleError, LobitError, MissingPartError
from lobit.progress_callback import Progress
from lobit.runtime.adb import PATIENCE, Phone, find_phone
from lobit.runtime.bundle import Bundle
from lobit.runtime.engine import SteppingEngine, default_threads
from lobit.runtime.phone_bundle import APP, send_bundle
from lobit.runtime.service import Service, service_engine
from lobit.targets import Device

ACTIVITY = f"{APP}/.service.ServiceActivity"
SOCKET = f"{APP}.service"
"""The abstract socket that the app listens on."""
WAY_OUT = "`lobit android build` makes it, `lobit android install` brings it there"


def check_app(phone: Phone) -> None:
    """Refuses a phone without the app.

    Raises:
        MissingPartError: the app is not installed.
    """
    code, said = phone.shell("pm", "path", APP)
    if code or "package:" not in said:
        raise MissingPartError(f"lobit's app is not on {phone.name}: {WAY_OUT}")


def install(phone: Phone, apk: Path | None, bundles: Sequence[Bundle], progress: Progress | None = None) -> list[str]:
    """Installs the app and bundles; returns the names of the bundles' folders in the app.

    Args:
        phone: where to.
        apk: the app; None: it is there already.
        bundles: what the app is to have.
        progress: called while bundles are sent.

    Raises:
        LobitError: the phone is gone, refuses the app or has no space.
        MissingPartError: the app is not there, and none is given.
    """
    if apk is not None:
        phone.install(apk)
    check_app(phone)
    return [send_bundle(phone, bundle, progress) for bundle in bundles]


class PhoneService:
    """The app on a phone, as it runs one bundle.

    Args:
        phone: the phone.
        bundle: what to run; it is brought there first.
        threads: of the runtime; 0: as many as the bundle says, or the phone's own choice.
        progress: called while the bundle is sent.

    Raises:
        BundleError: the app refuses the bundle.
        LobitError: the phone is gone, or has no space.
        MissingPartError: the app is not installed or is too old.
    """

    def __init__(self, phone: Phone, bundle: Bundle, threads: int = 0, progress: Progress | None = None) -> None:
        check_app(phone)
        self.phone, self.bundle = phone, bundle
        name = send_bundle(phone, bundle, progress)
        _start(phone, name, threads)
        port = phone.forward(SOCKET)
        self.close = weakref.finalize(self, _stop, phone, port)
        requests, answers = self._connect(port)
        self.service = Service(requests, answers, self)
        self._check_version()

    def step(self, tokens: list[int], position: int) -> bytes:
        """See `Service.step`."""
        return self.service.step(tokens, position)

    def _connect(self, port: int) -> tuple[BinaryIO, BinaryIO]:
        """Connects to the app; where it does not listen yet, adb takes the connection and ends it at once."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with socket.create_connection(("127.0.0.1", port)) as connection, contextlib.suppress(OSError):
                if connection.recv(1, socket.MSG_PEEK):
                    return connection.makefile("wb"), connection.makefile("rb")
            if not self._is_running():
                raise self.ended()
            time.sleep(0.2)
        raise LobitError(f"the app on {self.phone.name} does not answer for {PATIENCE:.0f} s: unlock the phone, and repeat the command")

    def _is_running(self) -> bool:
        return self.phone.shell("pidof", APP)[0] == 0

    def _check_version(self) -> None:
        """Refuses an app of an earlier release than this lobit's: it may not know what it is asked."""
        theirs = str(self.service.about.get("app"))
        if _release(theirs) < _release(lobit.__version__):
            versions = f"its version is {theirs[:20]}, that of lobit {lobit.__version__}"
            raise MissingPartError(f"the app on {self.phone.name} is too old, {versions}: {WAY_OUT}")

    def refused(self, message: str) -> BundleError:
        """See `Peer.refused`."""
        return BundleError(f"the app on {self.phone.name} does not run bundle {self.bundle.manifest.name}: {message}")

    def ended(self) -> LobitError:
        """See `Peer.ended`."""
        try:
            self.phone.check()
            if self._is_running():
                return LobitError(f"the app on {self.phone.name} has ended the connection: repeat the command, and leave the phone alone")
        except LobitError as error:
            return error
        name = self.bundle.manifest.name
        return LobitError(
            f"the app on {self.phone.name} ended while it ran bundle {name}, mostly because memory ran out: close other apps, or take a "
            f"smaller model or context; `adb logcat -b crash` says more"
        )


def _release(version: str) -> tuple[int, ...]:
    """Major and minor version; nothing where there is none."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _start(phone: Phone, name: str, threads: int) -> None:
    """Lets the app open a bundle, in a new process, and wait for a connection."""
    told = ["--ei", "threads", str(threads)] if threads else []
    _, said = phone.shell("am", "start", "-W", "-S", "-n", ACTIVITY, "--es", "bundle", name, *told)
    if "does not exist" in said:
        raise MissingPartError(f"the app on {phone.name} is too old, it has no {ACTIVITY}: {WAY_OUT}")
    if "Error" in said:
        why = " ".join(said.split())[-300:]
        raise LobitError(f"the app on {phone.name} does not start ({why}): unlock the phone and repeat the command")


def _stop(phone: Phone, port: int) -> None:
    """Ends the connection and the app, which then holds no memory; of a phone that is gone, nothing is left to end."""
    with contextlib.suppress(LobitError):
        phone.end_forward(port)
        phone.shell("am", "force-stop", APP)


def open_engine(bundle: Bundle, threads: int, device: Device) -> SteppingEngine:
    """Brings a bundle to a phone and runs its program there.

    Args:
        bundle: a bundle whose target the app on the phone runs: xnnpack, or qnn where its library has that backend.
        threads: of the runtime. What is the default here, one per core of this computer, is left to the phone.
        device: kind `adb`, with the phone's serial number.

    Raises:
        BundleError: the app refuses the bundle.
        LobitError: there is no phone, it has no space, or it is gone.
        MissingPartError: adb or the app is not installed.
    """
    asked = 0 if threads == default_threads(bundle) else threads
    return service_engine(bundle, PhoneService(find_phone(device.detail), bundle, asked).step)
