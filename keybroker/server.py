"""Accept, check the peer, read one line, answer, close: all inline, since most is over at once.

Who is late with its line, or with taking its answer, is a client with a deadline, and makes room
when there is none. What is answered is somebody else's business.
"""

import _socket
import errno
import selectors
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

LATE_SECONDS = 2.0  # to write the request, once connected; to take the next piece of an answer
MOST_CLIENTS = 4096  # late and waiting ones together; the oldest late one makes room
OURS = 64  # files that may be open beside the clients: journal, workers, what is listened at
# Without accepting, when there is no room; and so long who came in may take to begin to speak
# before it makes room: those at the door lose nothing meanwhile, and have spoken then.
PAUSE_SECONDS = 0.05
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


def room() -> int:
    """Return for how many clients there is room among the files that this process may open."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return MOST_CLIENTS
    return min(MOST_CLIENTS, max(limit - OURS, limit // 2))


def is_whole(line: bytes) -> bool:
    """Say whether a request can be answered, if only with what is wrong with it."""
    return b"\n" in line or len(line) > LONGEST


class Client:
    """One connection that was not over at once."""

    __slots__ = ("_connection", "_heard", "_server", "_unsent", "asked", "closed", "ends", "uid")

    def __init__(
        self, server: "Server", connection: _socket.socket, uid: int, heard: bytes
    ) -> None:
        self._server = server
        self._connection = connection
        self.uid = uid
        self._heard = heard
        self._unsent = b""
        self.asked = False  # its line is complete
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
            if self.ends:
                self._server.hurry(self)

    def ready(self, events: int = 0) -> None:
        """Go on: the rest of a request, of an answer, or the other side's end."""
        if self.closed:  # a moment ago, to make room
            return
        if self._unsent:
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
        self._heard += piece
        if not piece or self.asked:  # there is one request a connection
            self.close()
        elif is_whole(self._heard):
            self.asked = True
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
        most: Clients at a time; None: see `room`. Three quarters of them may wait for an answer.
    """

    def __init__(
        self,
        listeners: Iterable[_socket.socket],
        selector: selectors.BaseSelector,
        uids: frozenset[int],
        at_once: Handle,
        later: Callable[[bytes, Client], None],
        stranger: Callable[[int], None] = lambda uid: None,
        most: int | None = None,
    ) -> None:
        self._listeners = list(listeners)
        self._selector = selector
        self.uids = uids
        self._at_once = at_once
        self._later = later
        self._stranger = stranger
        self._most = room() if most is None else most
        self._clients: set[Client] = set()
        self.late: dict[Client, float] = {}  # its deadline; the oldest first
        self._resumes_at: float | None = None  # there was no room for one more
        self._resume()

    @property
    def listeners(self) -> list[_socket.socket]:
        """The sockets that it listens at now."""
        return list(self._listeners)

    @property
    def busy(self) -> bool:
        """Say whether somebody has begun to ask, or to take an answer."""
        return bool(self.late)

    @property
    def due(self) -> float | None:
        """When, by the monotonic clock, `tidy` has something to do."""
        first = next(iter(self.late.values()), None)
        if self._resumes_at is None or (first is not None and first < self._resumes_at):
            return first
        return self._resumes_at

    def tidy(self, now: float) -> None:
        """Part with who is too late, and listen again if that had to be stopped."""
        while self.late:
            client, deadline = next(iter(self.late.items()))
            if deadline > now:
                break
            client.close()
        if self._resumes_at is not None and now >= self._resumes_at:
            self._resumes_at = None
            self._resume()

    def replace(self, listener: _socket.socket) -> None:
        """Listen at another socket instead, whose file is not gone."""
        self.stop()
        self._listeners = [listener]
        self._resume()

    def stop(self) -> None:
        """Accept nobody any more; those who wait still get their answer."""
        if self._resumes_at is None:
            self._pause()
        self._resumes_at = None
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

    def hurry(self, client: Client) -> None:
        """Give a client so long from now on, and no longer."""
        self.late.pop(client, None)
        self.late[client] = time.monotonic() + LATE_SECONDS

    def heard(self, client: Client, line: bytes) -> None:
        """Answer a client whose line is complete."""
        self.late.pop(client, None)
        reply = self._at_once(line, client.uid)
        if reply is not None:
            client.send(reply, last=True)
        else:
            self._hand_over(line, client)

    def forget(self, client: Client, connection: _socket.socket) -> None:
        """Expect nothing more of a client."""
        self._clients.discard(client)
        self.late.pop(client, None)
        with suppress(KeyError):
            self._selector.unregister(connection)

    # accepting

    def _resume(self) -> None:
        for listener in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))

    def _pause(self) -> None:
        for listener in self._listeners:
            self._selector.unregister(listener)

    def _accept(self, listener: _socket.socket, events: int) -> bool:
        """Accept all who wait; say whether each of them was answered inline and is over."""
        accept: Callable[[], tuple[int, Any]] = listener._accept  # type: ignore[attr-defined]
        quiet = True
        for _ in range(BATCH):
            if len(self._clients) >= self._most and self._oldest() is None:
                self._rest()
                return False
            try:
                descriptor, _ = accept()
            except BlockingIOError:
                return quiet
            except OSError as error:
                # There is no room for one more open file, unless it had gone again.
                if error.errno != errno.ECONNABORTED and not self._make_room():
                    self._rest()
                    return False
                continue
            connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, descriptor)
            uid = peer_uid(connection)
            if uid not in self.uids:
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
            quiet = self._begin(connection, uid, line) and quiet
        return quiet

    def _begin(self, connection: _socket.socket, uid: int, line: bytes) -> bool:
        """Answer inline if that is possible, as it mostly is: nobody becomes a client then."""
        whole = is_whole(line)
        reply = self._at_once(line, uid) if whole else None
        if reply is not None:
            try:
                sent = connection.send(reply, _NO_WAIT)
            except OSError:  # it did not wait
                sent = len(reply)
            if sent == len(reply):
                connection.close()
                return True
            reply = reply[sent:]
        if len(self._clients) >= self._most and not self._make_room():
            connection.close()
            return False
        client = Client(self, connection, uid, line)
        self._clients.add(client)
        self._selector.register(connection, selectors.EVENT_READ, client.ready)
        if reply is not None:
            client.asked = True
            client.send(reply, last=True)
        elif whole:
            client.asked = True
            self._hand_over(line, client)
        else:
            self.hurry(client)
        return False

    def _hand_over(self, line: bytes, client: Client) -> None:
        if len(self._clients) - len(self.late) > self._most * 3 // 4:
            client.close()  # or nobody would be heard any more
        else:
            self._later(line, client)

    def _rest(self) -> None:
        """Accept nobody for a moment."""
        self._pause()
        self._resumes_at = time.monotonic() + PAUSE_SECONDS

    def _oldest(self) -> Client | None:
        """Return the client that would have to make room; None when there is none that may."""
        client, deadline = next(iter(self.late.items()), (None, 0.0))
        if client is None or client.asked:
            return client
        recent = time.monotonic() + LATE_SECONDS - PAUSE_SECONDS
        return None if deadline > recent else client

    def _make_room(self) -> bool:
        """End the oldest client that is late; who has said its line by now is answered instead."""
        while (client := self._oldest()) is not None:
            client.ready()
            if client in self.late:
                client.close()
            if client.closed:
                return True
        return False
