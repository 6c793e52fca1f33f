"""A phone's side of adb: a daemon that speaks the real protocol over TCP to the real `adb`, for a phone that is a folder (fake_phone.py).

A message has a head of six numbers (uint32, little-endian: command, two arguments, length, checksum, inverted command) and data. Streams
are opened for a service by its name, and each write waits for the other side's OKAY.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator

from tests.android.fake_phone import FakePhone

HEAD = struct.Struct("<6I")
VERSION = 0x01000001
"""Of the protocol: the first without checksums."""
LARGEST = 1 << 18
"""Bytes of data in a message."""
TOKEN, SIGNATURE, PUBLIC_KEY = 1, 2, 3
OUTPUT, EXIT_CODE = 1, 3
"""Packets of the shell's protocol, v2."""


def code(name: str) -> int:
    return int.from_bytes(name.encode(), "little")


class Stream:
    """One stream over a connection."""

    def __init__(self, send: Callable[[str, int, int, bytes], None], own: int, theirs: int) -> None:
        self._send, self.own, self.theirs = send, own, theirs
        self.incoming: queue.Queue[bytes] = queue.Queue()
        self.ready = threading.Event()
        self._left, self._is_open = b"", False

    def read(self, size: int) -> bytes:
        """So many bytes, or fewer where the other side has closed."""
        while len(self._left) < size and (data := self.incoming.get()):
            self._left += data
        found, self._left = self._left[:size], self._left[size:]
        return found

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), LARGEST):
            self.ready.wait()
            self.ready.clear()
            self._send("WRTE", self.own, self.theirs, data[start : start + LARGEST])

    def accept(self) -> None:
        self.ready.set()
        self._is_open = True
        self._send("OKAY", self.own, self.theirs, b"")

    def close(self) -> None:
        """Ends the stream; one that was never accepted is refused by the number 0."""
        self._send("CLSE", self.own if self._is_open else 0, self.theirs, b"")


class FakeAdb:
    """The daemon of one phone, on a port of 127.0.0.1.

    Args:
        phone: the phone.
        is_authorized: whether its owner has accepted this computer.
    """

    def __init__(self, phone: FakePhone, is_authorized: bool = True) -> None:
        self.phone, self.is_authorized = phone, is_authorized
        phone.lose = self.lose
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.serial = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        self._sending = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def lose(self) -> None:
        """What happens when the cable is pulled."""
        for one in (self._listening, *self._connections):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        streams: dict[int, Stream] = {}
        numbers = itertools.count(1)

        def send(name: str, first: int, second: int, data: bytes) -> None:
            with self._sending, contextlib.suppress(OSError):
                connection.sendall(HEAD.pack(code(name), first, second, len(data), 0, code(name) ^ 0xFFFFFFFF) + data)

        for name, first, second, data in _messages(connection):
            if name in ("CNXN", "AUTH") and self.is_authorized:
                send("CNXN", VERSION, LARGEST, self.phone.banner.encode())
            elif name == "CNXN" or (name == "AUTH" and first == SIGNATURE):
                send("AUTH", TOKEN, 0, bytes(20))  # after a public key, which is not answered, the phone asks its owner
            elif name == "OPEN":
                stream = Stream(send, next(numbers), first)
                streams[stream.own] = stream
                threading.Thread(target=self._open, args=[stream, data.rstrip(b"\0").decode()], daemon=True).start()
            elif name == "OKAY" and second in streams:
                streams[second].ready.set()
            elif name == "WRTE" and second in streams:
                streams[second].incoming.put(data)
                send("OKAY", second, first, b"")
            elif name == "CLSE" and second in streams:
                streams[second].incoming.put(b"")
        for stream in streams.values():
            stream.incoming.put(b"")

    def _open(self, stream: Stream, service: str) -> None:
        kind, _, rest = service.partition(":")
        serve = {"shell": self._shell, "sync": self._sync, "exec": self._install, "localabstract": self._connect}[kind.split(",")[0]]
        serve(stream, rest)
        stream.close()

    def _shell(self, stream: Stream, line: str) -> None:
        stream.accept()
        exit_code, output = self.phone.shell(line)
        for kind, data in ((OUTPUT, output), (EXIT_CODE, bytes([exit_code]))):
            stream.write(struct.pack("<BI", kind, len(data)) + data)

    def _sync(self, stream: Stream, _: str) -> None:
        stream.accept()
        while (head := stream.read(8)) and head[:4] != b"QUIT":
            name = stream.read(int.from_bytes(head[4:], "little")).decode()
            if head[:4] == b"STAT":
                stream.write(b"STAT" + struct.pack("<3I", *self.phone.stat(name)))
            elif head[:4] == b"SEND":
                refused = self.phone.store(name.rpartition(",")[0], _pieces(stream))
                stream.write((b"FAIL" if refused else b"OKAY") + struct.pack("<I", len(refused)) + refused.encode())

    def _install(self, stream: Stream, line: str) -> None:
        stream.accept()
        size = re.search(r"-S (\d+)", line)
        assert size is not None
        stream.write(self.phone.install(stream.read(int(size[1]))).encode())

    def _connect(self, stream: Stream, name: str) -> None:
        connected = self.phone.connect(name)
        if connected is None:
            return
        stream.accept()
        requests, answers = connected

        def answer() -> None:
            while data := answers.read1(LARGEST):  # type: ignore[attr-defined]
                stream.write(data)
            stream.close()

        threading.Thread(target=answer, daemon=True).start()
        while data := stream.incoming.get():
            requests.write(data)
            requests.flush()
        requests.close()


def _messages(connection: socket.socket) -> Iterator[tuple[str, int, int, bytes]]:
    """The messages of the other side, until the connection ends."""
    with contextlib.suppress(OSError), connection.makefile("rb") as file:
        while len(head := file.read(HEAD.size)) == HEAD.size:
            command, first, second, size, _, _ = HEAD.unpack(head)
            yield command.to_bytes(4, "little").decode(), first, second, file.read(size)


def _pieces(stream: Stream) -> Iterator[bytes]:
    """The data of a file that is sent."""
    while True:
        head = stream.read(8)
        if head[:4] != b"DATA":
            return
        yield stream.read(int.from_bytes(head[4:], "little"))
