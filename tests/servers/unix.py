"""A daemon that says what a test has it say, on a real socket."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import sys
import termios
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Self

NOBODY = 65534  # the user whom every system has
END_SECONDS = 30.0

Step = bytes | Callable[["ScriptedServer", socket.socket], None]


def read(server: ScriptedServer, client: socket.socket) -> None:
    """Read a request to its newline, and let the test have it."""
    line = b""
    while not line.endswith(b"\n") and (piece := client.recv(4096)):
        line += piece
    server.requests.put(line)


def hang(server: ScriptedServer, _client: socket.socket) -> None:
    """Say nothing more, and do not go away either."""
    server.hanging.put(None)
    server.over.wait(END_SECONDS)


def drip(server: ScriptedServer, client: socket.socket) -> None:
    """Say one more character each 300 ms, for as long as somebody listens."""
    while not server.over.wait(0.3):
        client.sendall(b"x")


class ScriptedServer:
    """
    Does the same steps with each connection, then closes it.

    A step is what is said, or one of the functions above. What is said is read by the other side
    before the next step is done, so that pieces stay pieces.

    Args:
        steps: Empty: nobody is let in, and the queue is one long.
        uid: Whose server it is, if not ours; only root can have this.

    Attributes:
        requests: What was asked, in order.
        hanging: An item for each connection that is left hanging.
    """

    def __init__(self, path: Path, *steps: Step, uid: int | None = None) -> None:
        self.path = path
        self.requests: SimpleQueue[bytes] = SimpleQueue()
        self.hanging: SimpleQueue[None] = SimpleQueue()
        self.over = threading.Event()
        self._steps: Sequence[Step] = steps
        self._uid = uid
        self._listener = socket.socket(socket.AF_UNIX)
        self._threads: list[threading.Thread] = []
        self._end, self._ended = os.pipe()

    def __enter__(self) -> Self:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._listener.bind(os.fsencode(self.path))
        if self._uid is not None:
            os.seteuid(self._uid)  # the kernel notes who it is that listens
        try:
            self._listener.listen(64 if self._steps else 0)
        finally:
            if self._uid is not None:
                os.seteuid(os.getuid())
        if self._steps:
            self._start(self._serve)
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        os.close(self._ended)
        for thread in self._threads:
            thread.join(END_SECONDS)
        os.close(self._end)
        self._listener.close()
        with suppress(FileNotFoundError):
            self.path.unlink()

    def request(self) -> bytes:
        """Return the next request, when it comes."""
        return self.requests.get(timeout=END_SECONDS)

    def fill(self, stack: ExitStack) -> None:
        """Stand in its queue, until nobody can."""
        for _ in range(100):
            one = stack.enter_context(socket.socket(socket.AF_UNIX))
            one.setblocking(False)
            try:
                one.connect(os.fsencode(self.path))
            except BlockingIOError:
                return
        raise AssertionError("the queue has no end")

    def serve(self, *steps: Step) -> None:
        """Let in who is in the queue, and whoever comes, after all; do these steps with each."""
        self._steps = steps
        self._start(self._serve)

    def accept(self) -> None:
        """Let in the first of those who are in the queue, and send it away."""
        self._listener.accept()[0].close()

    def _start(self, act: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=act))
        self._threads[-1].start()

    def _serve(self) -> None:
        while self._end not in select.select([self._listener, self._end], [], [])[0]:
            client = self._listener.accept()[0]
            self._start(lambda client=client: self._act(client))  # type: ignore[misc]

    def _act(self, client: socket.socket) -> None:
        with client, suppress(BrokenPipeError, ConnectionResetError):
            for step in self._steps:
                if isinstance(step, bytes):
                    client.sendall(step)
                    self._until_read(client)
                else:
                    step(self, client)

    def _until_read(self, client: socket.socket) -> None:
        if sys.platform != "linux":
            return
        for _ in range(5000):
            left = struct.unpack("i", fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)))[0]
            with suppress(BlockingIOError):
                if not client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    return
            if left == 0 or self.over.wait(0.001):
                return
