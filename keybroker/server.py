"""Accept, check the peer, read one line, answer, close: all inline, since most is over at once.

Who is late with its line, or has to wait for its answer, is a client with a deadline. What is
answered is somebody else's business.
"""

import _socket
import selectors
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

LATE_SECONDS = 2.0  # to write the request, once connected
MOST_CLIENTS = 4096  # late and waiting ones together; the oldest late one makes room
PAUSE_SECONDS = 0.1  # without accepting, when there was no room for one more open file
BATCH = 256  # accepted in a row, before anything else gets its turn
LONGEST = 1024
MOST_UNSENT = 1 << 22  # bytes that a reader may leave lying about
_NO_WAIT = getattr(_socket, "MSG_DONTWAIT", 0) | getattr(_socket, "MSG_NOSIGNAL", 0)
# Linux: SO_PEERCRED is pid, uid, gid. macOS: LOCAL_PEERCRED of SOL_LOCAL is a struct xucred,
# version and uid first (sys/un.h, sys/ucred.h).
_PEER = (
    (_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12, 4) if sys.platform == "linux" else (0, 1, 76, 4)
)

Handle = Callable[[bytes, int], bytes | None]


def peer_uid(connection: _socket.socket) -> int:
    """Return the uid of who connected, as it was then; -1 when the kernel does not say."""
    level, option, size, at = _PEER
    try:
        found = connection.getsockopt(level, option, size)
    except OSError:
        return -1
    return int.from_bytes(found[at : at + 4], sys.byteorder) if len(found) == size else -1


class Client:
    """One connection that was not over at once."""

    __slots__ = ("_connection", "_heard", "_server", "_unsent", "closed", "ends", "uid")

    def __init__(
        self, server: "Server", connection: _socket.socket, uid: int, heard: bytes
    ) -> None:
        self._server = server
        self._connection = connection
        self.uid = uid
        self._heard = heard
        self._unsent = b""
        self.ends = False  # when all is sent
        self.closed = False

    def send(self, data: bytes, *, last: bool = False) -> None:
        """Send now, or when the reader takes it; close after the last."""
        if self.closed:
            return
        self.ends = self.ends or last
        if not self._unsent:
            try:
                data = data[self._connection.send(data, _NO_WAIT) :]
            except BlockingIOError:
                pass
            except OSError:
                self.close()
                return
        self._unsent += data
        if len(self._unsent) > MOST_UNSENT or (self.ends and not self._unsent):
            self.close()
        elif self._unsent:
            self._server.expect(self, self._connection, selectors.EVENT_WRITE)

    def ready(self, events: int) -> None:
        """Go on: the rest of a request, of an answer, or the other side's end."""
        if events & selectors.EVENT_WRITE:
            data, self._unsent = self._unsent, b""
            self._server.expect(self, self._connection, selectors.EVENT_READ)
            self.send(data)
            return
        try:
            piece = self._connection.recv(LONGEST + 1, _NO_WAIT)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self.close()
        elif self in self._server.late:
            self._heard += piece
            if self._heard.endswith(b"\n") or len(self._heard) > LONGEST:
                self._server.heard(self, self._heard)

    def close(self) -> None:
        """End it; it may have been ended before."""
        if not self.closed:
            self.closed = True
            self._server.forget(self, self._connection)
            self._connection.close()


class Server:
    """
    The listening sockets and all clients.

    Args:
        listeners: Listening, not blocking.
        uids: Who may ask.
        at_once: Answers a request line, or returns None for one that takes time.
        later: Takes over a client with such a request.
        stranger: Told of a uid that was turned away.
    """

    def __init__(
        self,
        listeners: Iterable[_socket.socket],
        selector: selectors.BaseSelector,
        uids: frozenset[int],
        at_once: Handle,
        later: Callable[[bytes, Client], None],
        stranger: Callable[[int], None] = lambda uid: None,
    ) -> None:
        self._listeners = list(listeners)
        self._selector = selector
        self._uids = uids
        self._at_once = at_once
        self._later = later
        self._stranger = stranger
        self._clients: set[Client] = set()
        self.late: dict[Client, float] = {}  # its deadline; the oldest first
        self._paused = False  # there was no room for one more
        self._resume()

    @property
    def due(self) -> float | None:
        """When, by the monotonic clock, `tidy` has something to do."""
        if self._paused:
            return time.monotonic() + PAUSE_SECONDS
        return next(iter(self.late.values()), None)

    def tidy(self, now: float) -> None:
        """Part with who is too late, and listen again if that had to be stopped."""
        for client, deadline in list(self.late.items()):
            if deadline > now:
                break
            client.close()
        if self._paused:
            self._resume()

    def replace(self, listener: _socket.socket) -> None:
        """Listen at another socket instead, whose file is not gone."""
        self.stop()
        self._listeners = [listener]
        self._resume()

    def stop(self) -> None:
        """Accept nobody any more; those who wait still get their answer."""
        self._pause()
        for listener in self._listeners:
            listener.close()
        self._listeners = []

    def close(self) -> None:
        """End everything."""
        self.stop()
        for client in list(self._clients):
            client.close()

    # for clients

    def expect(self, client: Client, connection: _socket.socket, events: int) -> None:
        """Have a client's `ready` called at its next event."""
        self._selector.modify(connection, events, client.ready)

    def heard(self, client: Client, line: bytes) -> None:
        """Answer a client whose line is complete."""
        self.late.pop(client, None)
        reply = self._at_once(line, client.uid)
        if reply is not None:
            client.send(reply, last=True)
        else:
            self._later(line, client)

    def forget(self, client: Client, connection: _socket.socket) -> None:
        """Expect nothing more of a client."""
        self._clients.discard(client)
        self.late.pop(client, None)
        with suppress(KeyError):
            self._selector.unregister(connection)

    # accepting

    def _resume(self) -> None:
        self._paused = False
        for listener in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))

    def _pause(self) -> None:
        """Accept nobody for a while."""
        if not self._paused:
            self._paused = True
            for listener in self._listeners:
                self._selector.unregister(listener)

    def _accept(self, listener: _socket.socket, events: int) -> None:
        accept: Callable[[], tuple[int, Any]] = listener._accept  # type: ignore[attr-defined]
        for _ in range(BATCH):
            try:
                descriptor, _ = accept()
            except BlockingIOError:
                return
            except OSError:  # no room for more open files
                self._make_room(BATCH)
                self._pause()
                return
            connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, descriptor)
            uid = peer_uid(connection)
            if uid not in self._uids:
                connection.close()
                self._stranger(uid)
                continue
            try:
                line = connection.recv(LONGEST + 1, _NO_WAIT)
            except BlockingIOError:
                line = b""
            except OSError:
                connection.close()
                continue
            else:
                if not line:  # it came and went
                    connection.close()
                    continue
            self._begin(connection, uid, line)

    def _begin(self, connection: _socket.socket, uid: int, line: bytes) -> None:
        """Answer inline if that is possible; most requests never become a client."""
        whole = line.endswith(b"\n") or len(line) > LONGEST
        if whole:
            reply = self._at_once(line, uid)
            if reply is not None:
                try:
                    sent = connection.send(reply, _NO_WAIT)
                except OSError:  # it did not wait
                    sent = len(reply)
                if sent == len(reply):
                    connection.close()
                    return
                reply = reply[sent:]
        self._make_room(len(self._clients) - MOST_CLIENTS + 1)
        if len(self._clients) >= MOST_CLIENTS:
            connection.close()
            return
        client = Client(self, connection, uid, line)
        self._clients.add(client)
        self._selector.register(connection, selectors.EVENT_READ, client.ready)
        if not whole:
            self.late[client] = time.monotonic() + LATE_SECONDS
        elif reply is None:
            self._later(line, client)
        else:
            client.send(reply, last=True)

    def _make_room(self, count: int) -> None:
        """End the oldest of those that have not said a whole line."""
        for client in list(self.late)[: max(0, count)]:
            client.close()
