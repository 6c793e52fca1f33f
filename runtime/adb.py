"""Phones by adb, Android's debug bridge: which ones are connected, commands that run on them, files and connections to them."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lobit.errors import InputError, LobitError, MissingPartError, listed

READY = "device"
"""adb's name for the state of a phone that takes commands."""
WAYS_OUT = {
    "unauthorized": "unlock it and accept the question whether this computer may debug it",
    "offline": "unplug it and plug it in again, or run `adb reconnect`",
    "no permissions": "this user may not use the USB device: install Debian's package android-sdk-platform-tools-common, plug it in again",
}
"""What to do about a phone that takes no commands, by its state."""
INSTALLING = {
    "INSTALL_FAILED_UPDATE_INCOMPATIBLE": "an app with another key is there: `adb uninstall dev.lobit.demo` removes it and its bundles",
    "INSTALL_FAILED_NO_MATCHING_ABIS": "the APK has no libraries for its processor: build it with `lobit android build --x86-64`",
    "INSTALL_FAILED_INSUFFICIENT_STORAGE": "there is no space left: remove what you do not need from the phone",
    "INSTALL_FAILED_OLDER_SDK": "its Android is older than 8.0, which the app needs",
    "INSTALL_FAILED_VERSION_DOWNGRADE": "a newer app is there: `adb uninstall dev.lobit.demo` removes it and its bundles",
    "INSTALL_FAILED_USER_RESTRICTED": "the phone does not allow it: switch on “Install via USB” in its developer options",
}
"""What to do about Android's reasons not to install an app."""
PATIENCE = 60.0
"""Seconds after which a command that should be quick has hung."""
NOTICED = 3.0
"""Seconds in which adb notices that a phone is gone."""
LAST_LINES = 5
"""Lines of adb's output that an error repeats."""


@dataclass(frozen=True)
class Connected:
    """A phone as `adb devices` lists it."""

    serial: str
    state: str
    model: str
    """Its model; empty where adb does not know it, as of a phone that takes no commands."""

    def __str__(self) -> str:
        return f"{self.serial} ({self.model or self.state})"

    @property
    def problem(self) -> str:
        """Why it takes no commands, and the way out."""
        known = next((way for state, way in WAYS_OUT.items() if self.state.startswith(state)), "unplug it and plug it in again")
        return f"phone {self.serial} is {self.state}: {known}"


def connected() -> list[Connected]:
    """All phones that adb sees.

    Raises:
        MissingPartError: adb is not installed, or its server cannot start.
    """
    done = _adb(["devices", "-l"], PATIENCE)
    if done.returncode:
        raise MissingPartError(listed(_last_lines(done), "adb does not start; `adb kill-server` often helps. It says:"))
    found = []
    for line in done.stdout.splitlines():
        serial, _, rest = line.partition(" ")
        words = rest.split()
        if not words or line.startswith(("List of", "*")):
            continue
        model = next((word.partition(":")[2].replace("_", " ") for word in words if word.startswith("model:")), "")
        found.append(Connected(serial, "no permissions" if words[:2] == ["no", "permissions"] else words[0], model))
    return found


def _adb(words: Sequence[str], timeout: float | None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["adb", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False, timeout=timeout
        )
    except FileNotFoundError:
        raise MissingPartError("adb is not installed: `lobit doctor android` says how to install it") from None
    except subprocess.TimeoutExpired:
        what = " ".join(words[:6])
        raise LobitError(f"`adb {what}` did not end in {timeout:.0f} s: unplug the phone and plug it in, or `adb kill-server`") from None


def _last_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-LAST_LINES:]


def find_phone(serial: str | None) -> Phone:
    """The phone to use.

    Args:
        serial: its serial number; None: that of ANDROID_SERIAL, as for adb itself, or the only one that takes commands.

    Raises:
        InputError: there is no such phone, or there are several.
        LobitError: it takes no commands; the message says why.
        MissingPartError: adb is not installed.
    """
    phones, wanted = connected(), serial or os.environ.get("ANDROID_SERIAL")
    if not phones:
        raise InputError(
            "no phone is connected: switch on “USB debugging” in its developer options, plug it in, and look whether `adb devices` lists it"
        )
    names = ", ".join(map(str, phones))
    if wanted:
        phones = [phone for phone in phones if phone.serial == wanted]
        if not phones:
            raise InputError(f"phone {wanted} is not connected: choose one of {names} with --device adb:SERIAL")
    ready = [phone for phone in phones if phone.state == READY]
    if len(ready) > 1:
        raise InputError(f"{len(ready)} phones are connected: choose one of {names} with --device adb:SERIAL")
    if not ready:
        problems = [phone.problem for phone in phones]
        raise LobitError(problems[0] if len(problems) == 1 else listed(problems, "no phone takes commands:"))
    return Phone(ready[0].serial, ready[0].model or ready[0].serial)


class Phone:
    """A phone that takes commands.

    Args:
        serial: its serial number.
        name: what messages call it.
    """

    def __init__(self, serial: str, name: str) -> None:
        self.serial, self.name = serial, name

    @property
    def is_connected(self) -> bool:
        """Whether it takes commands now."""
        return any(phone.serial == self.serial and phone.state == READY for phone in connected())

    def check(self) -> None:
        """Refuses a phone that is gone; adb needs some seconds to notice.

        Raises:
            LobitError: it takes no commands.
        """
        end = time.monotonic() + NOTICED
        while time.monotonic() < end:
            if not self.is_connected:
                raise self._lost()
            time.sleep(NOTICED / 10)

    def _ask(self, *words: str, timeout: float | None = PATIENCE) -> subprocess.CompletedProcess[str]:
        done = _adb(["-s", self.serial, *words], timeout)
        if done.returncode and not self.is_connected:
            raise self._lost()
        return done

    def _lost(self) -> LobitError:
        return LobitError(f"{self.name} ({self.serial}) was lost in the middle: plug it in again and repeat the command")

    def shell(self, *words: str, timeout: float | None = PATIENCE) -> tuple[int, str]:
        """Runs a command on the phone; returns its exit code and its output, messages included.

        Args:
            words: the command and its arguments, which the phone's shell takes as they are.
            timeout: seconds; None: as long as it takes.

        Raises:
            LobitError: the phone is gone, or the command has hung.
        """
        done = self._ask("shell", "-T", f"{shlex.join(words)} 2>&1", timeout=timeout)
        return done.returncode, done.stdout + done.stderr

    def push(self, path: Path, place: str, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        """Copies a file to the phone.

        Args:
            path: the file.
            place: its path on the phone.
            on_bytes: called now and then with the number of bytes that are there.

        Raises:
            LobitError: the phone is gone or does not take the file.
        """
        command = ["adb", "-s", self.serial, "push", str(path), place]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            while True:
                try:
                    said, _ = process.communicate(timeout=1)
                    break
                except subprocess.TimeoutExpired:
                    code, size = self.shell("stat", "-c", "%s", place)
                    on_bytes(int(size) if code == 0 and size.strip().isdigit() else 0)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode:
            self.check()
            last = [line for line in said.splitlines() if line.strip()][-LAST_LINES:]
            raise LobitError(listed(last, f"{self.name} does not take {path.name} ({path.stat().st_size:,} bytes); adb says:"))

    def forward(self, name: str) -> int:
        """Lets connections to a port of this computer, which is returned, reach an abstract socket on the phone."""
        done = self._ask("forward", "tcp:0", f"localabstract:{name}")
        if done.returncode:
            self.check()
            raise LobitError(listed(_last_lines(done), f"adb cannot connect to {name} on {self.name}; it says:"))
        return int(done.stdout)

    def end_forward(self, port: int) -> None:
        """Ends what `forward` began; a phone that is gone has ended it."""
        _adb(["-s", self.serial, "forward", "--remove", f"tcp:{port}"], PATIENCE)

    def install(self, apk: Path) -> None:
        """Installs an app, over an older version of it.

        Raises:
            LobitError: the phone is gone or refuses the app; the message says why.
        """
        done = self._ask("install", "-r", str(apk), timeout=None)
        said = done.stdout + done.stderr
        if done.returncode or "Failure" in said:
            self.check()
            known = next((f"{reason}: {way}" for reason, way in INSTALLING.items() if reason in said), None)
            raise LobitError(
                f"{self.name} does not install {apk.name} ({known})"
                if known
                else listed(_last_lines(done), f"{self.name} does not install {apk.name}; adb says:")
            )
