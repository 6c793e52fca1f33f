"""Brings bundles into lobit's app on a phone: only what is not there yet, checked by its sha256, and in place when all of it is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath

from lobit.errors import LobitError, listed
from lobit.progress_callback import Progress
from lobit.runtime.adb import Phone
from lobit.runtime.bundle import Bundle
from lobit.runtime.manifest import FILE_NAME, sha256_of

APP = "dev.lobit.demo"
"""The app's id."""
BUNDLES = "files/bundles"
"""Where the app looks for bundles, in its own folder."""
PUSHED = "/data/local/tmp/lobit"
"""Where files are pushed to, since adb cannot write into the app's folder itself."""
UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
"""Characters of a bundle's name that the name of its folder on the phone does not have."""


def folder_name(name: str) -> str:
    """The name of a bundle's folder on the phone, given the bundle's: one that no shell and no file system takes for something else."""
    plain = UNSAFE.sub("-", name).lstrip(".-") or "bundle"
    return re.sub(r"\.partial$", "-partial", plain)


def send_bundle(phone: Phone, bundle: Bundle, progress: Progress | None = None) -> str:
    """Brings a bundle into the app, in place of another of the same name; returns the name of its folder there.

    Files go one by one to `PUSHED`, and from there into a folder `.partial`, which is renamed at the end: the app never sees a bundle of
    which a part is missing. What an earlier call has brought whole is not sent again.

    Args:
        phone: the phone; the app must be installed.
        bundle: what to bring; its files must be those of its manifest (`open_bundle`).
        progress: called with the bytes that are there and those of all files.

    Raises:
        LobitError: the phone is gone, has no space, or what arrives there is not what was sent.
    """
    files = {entry.path: entry.sha256 for entry in bundle.manifest.files if entry.role != "emulated"}
    files[FILE_NAME] = sha256_of(bundle.folder / FILE_NAME)
    name = folder_name(bundle.manifest.name)
    if _hashes(phone, f"{BUNDLES}/{name}") == files:
        return name
    _Transfer(phone, bundle, files, f"{BUNDLES}/{name}", progress or (lambda *_: None)).run()
    return name


def _hashes(phone: Phone, folder: str) -> dict[str, str]:
    """The sha256 of each file in a folder of the app, by its path in that folder; empty where there is no such folder."""
    _, said = phone.shell("run-as", APP, "find", folder, "-type", "f", "-exec", "sha256sum", "{}", "+", timeout=None)
    found = {}
    for line in said.splitlines():
        digest, _, path = line.partition("  ")
        if re.fullmatch("[0-9a-f]{64}", digest) and path.startswith(f"{folder}/"):
            found[path.removeprefix(f"{folder}/")] = digest
    return found


class _Transfer:
    """One bundle on its way into the app."""

    def __init__(self, phone: Phone, bundle: Bundle, files: Mapping[str, str], place: str, progress: Progress) -> None:
        self.phone, self.bundle, self.files, self.place, self.progress = phone, bundle, files, place, progress
        self.partial, self.pushed = f"{place}.partial", f"{PUSHED}/{files[FILE_NAME]}"
        self.sizes = {path: (bundle.folder / path).stat().st_size for path in files}
        self.total = sum(self.sizes.values())
        self.done = 0

    def run(self) -> None:
        there, before = _hashes(self.phone, self.partial), _hashes(self.phone, self.place)
        wrong = [path for path, digest in there.items() if self.files.get(path) != digest]
        if wrong:
            self._app("rm", "-f", *(f"{self.partial}/{path}" for path in wrong))
        missing = [path for path, digest in self.files.items() if there.get(path) != digest]
        self.done = self.total - sum(self.sizes[path] for path in missing)
        self._check_space(missing)
        self._shell("mkdir", "-p", self.pushed)
        self._shell("chmod", "755", PUSHED, self.pushed)  # the app's user must be able to read there
        for path in missing:
            self._bring(path, kept=before.get(path) == self.files[path])
        arrived = _hashes(self.phone, self.partial)
        if arrived != self.files:
            wrong = sorted(path for path in self.files if arrived.get(path) != self.files[path])
            raise LobitError(listed(wrong, f"these files did not arrive on {self.phone.name} as they were sent; repeat the command:"))
        self._app("rm", "-rf", self.place)
        self._app("mv", self.partial, self.place)
        self._shell("rm", "-rf", self.pushed)

    def _check_space(self, missing: list[str]) -> None:
        """Refuses a bundle that does not fit: while a file goes into the app it is on the phone twice."""
        sizes = [self.sizes[path] for path in missing]
        needed = sum(sizes) + max(sizes, default=0)
        _, said = self.phone.shell("df", "-k", "/data/local/tmp")
        fields = said.split("\n")[-2 if said.endswith("\n") else -1].split()
        if len(fields) < 6 or not fields[-3].isdigit():
            raise LobitError(f"{self.phone.name} does not tell its free space (`df` says: {said.strip()[-200:]}): restart it and try again")
        free = int(fields[-3]) * 1024
        if free < needed:
            name, numbers = self.bundle.manifest.name, f"{needed / 1e6:,.0f} MB while it is copied, and {free / 1e6:,.0f} MB are free"
            raise LobitError(f"bundle {name} needs {numbers} on {self.phone.name}: remove what you do not need from the phone")

    def _bring(self, path: str, kept: bool) -> None:
        """Puts a file into the partial folder: from the phone itself where it is there, otherwise from this computer.

        Args:
            path: the file's path in the bundle.
            kept: whether the bundle that is in place has the same file.
        """
        self._app("mkdir", "-p", str(PurePosixPath(self.partial, path).parent))
        if kept:
            self._app("cp", f"{self.place}/{path}", f"{self.partial}/{path}")
        else:
            pushed = f"{self.pushed}/{self.files[path]}"
            if self._digest(pushed) != self.files[path]:
                self._report(path, 0)
                self.phone.push(self.bundle.folder / path, pushed, lambda count: self._report(path, count))
            self._app("cp", pushed, f"{self.partial}/{path}")
            self._shell("rm", "-f", pushed)
        self.done += self.sizes[path]
        self._report(path, 0)

    def _digest(self, place: str) -> str:
        return self.phone.shell("sha256sum", place, timeout=None)[1][:64]

    def _report(self, path: str, count: int) -> None:
        self.progress(f"{self.bundle.manifest.name}: {path}", min(self.done + count, self.total), self.total)

    def _shell(self, *words: str) -> None:
        code, said = self.phone.shell(*words, timeout=None)
        if code:
            raise LobitError(f"{self.phone.name} cannot run `{shlex.join(words)}`: {said.strip()[-300:] or f'exit code {code}'}")

    def _app(self, *words: str) -> None:
        self._shell("run-as", APP, *words)
