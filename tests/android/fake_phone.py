"""A phone that is a folder: a file system, a shell that knows the commands that lobit uses, and lobit's app.

Commands on files are this machine's own, run inside of the folder; the rest is answered here. What is not known ends as on a phone, with
exit code 127.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import lobit
from lobit.runtime.phone import SOCKET
from lobit.runtime.phone_bundle import APP, PUSHED
from lobit.runtime.service import BENCH, DONE, FAILED, HEADER, PROGRESS

FILE_COMMANDS = {"find", "sha256sum", "mkdir", "chmod", "rm", "cp", "mv", "stat"}
DEVICE = {"manufacturer": "Google", "model": "Pixel 8", "android": "15", "sdk": 35, "soc": "Tensor G3", "cores": 9, "abi": "arm64-v8a"}
Streams = tuple[BinaryIO, BinaryIO]


class FakePhone:
    """The phone.

    Args:
        root: an empty folder, its file system.
        model: its name.
    """

    def __init__(self, root: Path, model: str = "Pixel 8") -> None:
        self.root, self.model = root, model
        self.home = root / f"data/data/{APP}"
        self.tmp = root / PUSHED.removeprefix("/")
        self.free = 1 << 34
        """Bytes that are free."""
        self.has_app = False
        self.app_version: str | None = lobit.__version__
        self.lost_after: int | None = None
        """Bytes of a file after which the cable is pulled; None: it is not."""
        self.pause = 0.0
        """Seconds that a piece of a file takes."""
        self.lose: Callable[[], None] = lambda: None
        self.pushed: list[str] = []
        """Paths of the files that were sent, in the order in which they were."""
        self.commands: list[str] = []
        self.opened: Path | None = None
        """The bundle that the app has open."""
        self.engine: Callable[[Path], Callable[[list[int], int], bytes]] | None = None
        """Makes what runs the program of a bundle: tokens and a position to logits."""
        self.install_answer = "Success\n"
        self.bench_answer: dict[str, Any] = {"rows": [], "skipped": [], "sustained": None, "device": DEVICE}
        self.requests: list[dict[str, Any]] = []
        self.lost_in_bench = self.garbles = self.crashes = False
        """Whether the cable is pulled after a benchmark's first row, files arrive changed, or the app ends on its first request."""
        self.late = 0
        """Number of connections before the app listens."""
        self.start_answer = "Status: ok\n"
        (root / "data/local/tmp").mkdir(parents=True)

    @property
    def banner(self) -> str:
        model = self.model.replace(" ", "_")
        return f"device::ro.product.name={model};ro.product.model={model};ro.product.device={model};features=shell_v2,cmd"

    def bundle(self, name: str) -> Path:
        return self.home / "files/bundles" / name

    def install(self, apk: bytes) -> str:
        if self.install_answer == "Success\n":
            assert apk
            self.add_app()
        return self.install_answer

    def add_app(self) -> None:
        self.has_app = True
        self.home.mkdir(parents=True, exist_ok=True)

    def stat(self, place: str) -> tuple[int, int, int]:
        """Mode, size and time of a file; zeros where there is none."""
        try:
            found = (self.root / place.removeprefix("/")).stat()
        except OSError:
            return 0, 0, 0
        return found.st_mode, found.st_size, int(found.st_mtime)

    def store(self, place: str, pieces: Iterator[bytes]) -> str:
        """Writes a file that is sent; returns why it is refused."""
        path = self.root / place.removeprefix("/")
        self.pushed.append(place)
        refused = ""
        with path.open("wb", buffering=0) as file:
            for piece in pieces:
                if refused:
                    continue  # the rest is read and dropped
                if file.tell() + len(piece) > self.free:
                    refused = "No space left on device"
                    continue
                file.write(piece[::-1] if self.garbles else piece)
                time.sleep(self.pause)
                if self.lost_after is not None and file.tell() > self.lost_after:
                    refused = "lost"
                    self.lose()
        return refused

    def shell(self, line: str) -> tuple[int, bytes]:
        """Runs a line of the shell; returns the exit code and what it prints."""
        self.commands.append(line)
        words = shlex.split(line.removesuffix(" 2>&1"))
        folder = self.root
        if words[:2] == ["run-as", APP]:
            if not self.has_app:
                return 1, f"run-as: unknown package: {APP}\n".encode()
            words, folder = words[2:], self.home
        if words[0] in FILE_COMMANDS:
            placed = [f"{self.root}{word}" if word.startswith("/data/") else word for word in words]
            done = subprocess.run(placed, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
            return done.returncode, done.stdout.replace(str(self.root).encode(), b"")
        answers = {"df": self._df, "pm": self._pm, "am": self._am, "pidof": self._pidof}
        exit_code, text = answers[words[0]](words) if words[0] in answers else (127, f"{words[0]}: not found\n")
        return exit_code, text.encode()

    def _df(self, words: list[str]) -> tuple[int, str]:
        head = "Filesystem      1K-blocks     Used Available Use% Mounted on"
        return 0, f"{head}\n/dev/block/dm-5 114141124 14141124 {self.free // 1024}  13% /data\n"

    def _pm(self, words: list[str]) -> tuple[int, str]:
        return (0, "package:/data/app/base.apk\n") if self.has_app and words[2] == APP else (1, "")

    def _pidof(self, words: list[str]) -> tuple[int, str]:
        return (0, "4711\n") if self.opened else (1, "")

    def _am(self, words: list[str]) -> tuple[int, str]:
        self.opened = None
        if words[1] == "start":
            self.opened = self.bundle(words[words.index("bundle") + 1])
        return 0, self.start_answer

    def connect(self, name: str) -> Streams | None:
        """Connects to an abstract socket; None where nobody listens there."""
        if name != SOCKET or self.opened is None:
            return None
        if self.late:
            self.late -= 1
            return None
        return serve(self, self.opened)

    @property
    def about(self) -> dict[str, Any]:
        """What the app says first."""
        return {"device": {**DEVICE, "model": self.model}, "app": self.app_version, "backends": ["XnnpackBackend"]}


def pipe() -> Streams:
    """What is written to the first can be read from the second."""
    reading, writing = os.pipe()
    return os.fdopen(writing, "wb"), os.fdopen(reading, "rb")


def send(stream: BinaryIO, kind: int, content: bytes | dict[str, Any]) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    stream.write(HEADER.pack(kind, len(data)) + data)
    stream.flush()


def serve(phone: FakePhone, bundle: Path) -> Streams:
    """What the app does for a connection; returns where to write requests to, and where to read answers from."""
    (requests, asked), (answering, answers) = pipe(), pipe()
    threading.Thread(target=answer, args=[phone, bundle, asked, answering], daemon=True).start()
    return requests, answers


def answer(phone: FakePhone, bundle: Path, asked: BinaryIO, answering: BinaryIO) -> None:
    with asked, answering, contextlib.suppress(OSError):
        if not (bundle / "manifest.json").is_file():
            return send(answering, FAILED, f"there is no bundle {bundle.name}".encode())
        step = phone.engine(bundle) if phone.engine else None
        send(answering, DONE, phone.about)
        while len(head := asked.read(HEADER.size)) == HEADER.size:
            kind, size = HEADER.unpack(head)
            content = asked.read(size)
            if phone.crashes:
                phone.opened = None
                return None
            if kind == BENCH:
                bench(phone, json.loads(content), answering)
            elif step is None:
                return send(answering, FAILED, b"it has no engine")
            else:
                position, *tokens = struct.unpack(f">{size // 8}q", content)
                send(answering, DONE, step(tokens, position))
    return None


def bench(phone: FakePhone, request: dict[str, Any], answering: BinaryIO) -> None:
    phone.requests.append(request)
    rows = phone.bench_answer["rows"]
    for number, row in enumerate(rows):
        send(answering, PROGRESS, {"row": f"{row['phase']}{row['tokens']}", "done": number, "total": len(rows)})
        if phone.lost_in_bench:
            return phone.lose()
    return send(answering, DONE, phone.bench_answer)
