"""
A proxy on loopback that breaks chosen requests on their way to any gateway, real or ours.

    with Faults(gateway.url, admin=master_key) as faults:
        faults.next(CommitThenDrop(), method="POST", path="/key/generate")
        ...                                   # the client talks to faults.url

What is not armed passes through untouched, streams included. Every fault says whether the gateway
has seen the request: that is the difference between a key that exists and one that does not.
Threads end at `close()`; nothing here sleeps for longer than it is told to.
"""

from __future__ import annotations

import contextlib
import re
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from fnmatch import fnmatchcase
from hashlib import sha256
from http import HTTPStatus
from typing import Self
from urllib.parse import urlsplit

MAX_HEAD = 64 * 1024
MAX_BODY = 64 * 1024 * 1024
PATIENCE_SECONDS = 10.0  # of the waits that a test asks for, and of a connection to the gateway

_CREDENTIALS = {
    "authorization",
    "proxy-authorization",
    "cookie",
    "api-key",
    "x-api-key",
    "x-litellm-api-key",
    "x-goog-api-key",
    "x-bf-vk",
    "x-vault-token",
    "x-amz-security-token",
    "x-amz-sso_bearer_token",
    "ocp-apim-subscription-key",
}
_PAGE = b"<!doctype html><html><head><title>%s</title></head><body><h1>%s</h1></body></html>"


def refused_url() -> str:
    """Return a loopback URL on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def fingerprint(secret: str) -> str:
    """Shorten a credential to what may be logged: 8 hex digits of its SHA-256."""
    return sha256(secret.encode()).hexdigest()[:8]


@dataclass(slots=True)
class Entry:
    """
    One request that arrived. `forwarded` turns true when the gateway has answered it, if ever.

    In `headers`, names are in lower case and credentials replaced by fingerprints. `admin_seen`
    says whether the admin credential was anywhere in the request, its body included.
    """

    at: datetime
    method: str
    path: str
    fault: str | None
    headers: Mapping[str, str]
    admin_seen: bool
    forwarded: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came."""

    method: str
    target: str
    version: str
    headers: Sequence[tuple[str, str]]
    body: bytes = field(repr=False)  # as on the wire, chunks included

    @property
    def path(self) -> str:
        """The path without its query."""
        return self.target.partition("?")[0]

    @property
    def keeps_alive(self) -> bool:
        """Whether the client will use the connection again."""
        headers = {name.lower(): value.lower() for name, value in self.headers}
        said = headers.get("connection", "")
        return "keep-alive" in said if self.version == "HTTP/1.0" else "close" not in said

    def head(self, host: str) -> bytes:
        """Write the head for the gateway: in origin form, for its host, and not expecting a 100."""
        lines = [f"{self.method} {self.target} HTTP/1.1", f"Host: {host}"]
        lines += [f"{n}: {v}" for n, v in self.headers if n.lower() not in ("host", "expect")]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


@dataclass(frozen=True, slots=True)
class Response:
    """One whole response of the gateway."""

    head: bytes
    body: bytes = field(repr=False)  # as on the wire
    payload: bytes = field(repr=False)  # without chunks
    keeps_alive: bool

    @property
    def raw(self) -> bytes:
        """The response as the gateway sent it."""
        return self.head + self.body


@dataclass(slots=True)
class Exchange:
    """A request that a fault was armed for, and what a fault can do with it."""

    request: Request
    entry: Entry
    client: socket.socket
    faults: Faults

    def commit(self) -> Response:
        """Let the gateway have the request, and take its whole answer."""
        return self.faults.forward(self.request, self.entry)

    def maybe_commit(self, commit: bool) -> None:
        """Commit, or leave the gateway without the request."""
        if commit:
            self.commit()

    def answer(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        """Send an answer of our own and close."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.client.sendall(_head(status, {"content-type": kind, **named}, len(body)) + body)

    def pause(self, seconds: float) -> bool:
        """Wait; true if the proxy was closed meanwhile."""
        return self.faults.closing.wait(seconds)

    def until_gone(self) -> None:
        """Wait until the client hangs up or the proxy is closed."""
        while self.client.recv(65536):
            pass


class Fault:
    """Something that happens to a request. Returns true to keep the client's connection."""

    def __call__(self, exchange: Exchange) -> bool | None:
        raise TypeError("each fault says what happens")


@dataclass(frozen=True, slots=True)
class PassThrough(Fault):
    """Break nothing; for the hooks of `Faults.next`."""

    def __call__(self, exchange: Exchange) -> bool:
        response = exchange.commit()
        exchange.client.sendall(response.raw)
        return response.keeps_alive


@dataclass(frozen=True, slots=True)
class CommitThenDrop(Fault):
    """The gateway has done it, and the client's connection closes without a byte."""

    def __call__(self, exchange: Exchange) -> None:
        exchange.commit()


@dataclass(frozen=True, slots=True)
class DropBeforeCommit(Fault):
    """The connection closes without a byte, and the gateway never heard of it."""

    def __call__(self, exchange: Exchange) -> None:
        return None


@dataclass(frozen=True, slots=True)
class CommitLate(Fault):
    """
    Nothing is answered, and the gateway does it later, even if the client has gone by then.

    Args:
        seconds: How much later; None waits for `commit_late()`. Closing the proxy abandons it.
    """

    seconds: float | None = None

    def __call__(self, exchange: Exchange) -> None:
        with exchange.faults.late(exchange.entry) as due:
            due.wait(self.seconds)
            if not exchange.faults.closing.is_set():
                exchange.commit()
        exchange.until_gone()


@dataclass(frozen=True, slots=True)
class Reset(Fault):
    """The connection is reset, as by a crash or a firewall."""

    commit: bool = False

    def __call__(self, exchange: Exchange) -> None:
        exchange.maybe_commit(self.commit)
        exchange.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@dataclass(frozen=True, slots=True)
class Hang(Fault):
    """Nothing is answered until the client gives up."""

    commit: bool = False

    def __call__(self, exchange: Exchange) -> None:
        exchange.maybe_commit(self.commit)
        exchange.until_gone()


@dataclass(frozen=True, slots=True)
class Trickle(Fault):
    """The head of the gateway's answer arrives byte by byte: every read of the client succeeds."""

    interval: float = 0.001

    def __call__(self, exchange: Exchange) -> bool:
        response = exchange.commit()
        _trickle(exchange, response.head, self.interval)
        exchange.client.sendall(response.body)
        return response.keeps_alive


@dataclass(frozen=True, slots=True)
class TrickleBody(Fault):
    """The head arrives at once and the body byte by byte."""

    interval: float = 0.001

    def __call__(self, exchange: Exchange) -> bool:
        response = exchange.commit()
        exchange.client.sendall(response.head)
        _trickle(exchange, response.body, self.interval)
        return response.keeps_alive


@dataclass(frozen=True, slots=True)
class Truncated(Fault):
    """The gateway's answer ends in the middle of its body, with a length that says otherwise."""

    def __call__(self, exchange: Exchange) -> None:
        payload = exchange.commit().payload
        head = _head(200, {"content-type": "application/json"}, max(len(payload), 2))
        exchange.client.sendall(head + payload[: len(payload) // 2])


@dataclass(frozen=True, slots=True)
class Html(Fault):
    """A page for people, as a portal or a wrong address serves it."""

    status: int = 200
    commit: bool = False

    def __call__(self, exchange: Exchange) -> None:
        exchange.maybe_commit(self.commit)
        title = b"Sign in" if self.status == 200 else b"%d" % self.status
        exchange.answer(self.status, "text/html; charset=utf-8", _PAGE % (title, title))


@dataclass(frozen=True, slots=True)
class GarbageJson(Fault):
    """A 200 that calls itself JSON and is not."""

    commit: bool = False

    def __call__(self, exchange: Exchange) -> None:
        exchange.maybe_commit(self.commit)
        exchange.answer(200, "application/json", b'{"key": "sk-half-a-ke')


@dataclass(frozen=True, slots=True)
class Status(Fault):
    """Any status with any headers and body."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    commit: bool = False

    def __call__(self, exchange: Exchange) -> None:
        exchange.maybe_commit(self.commit)
        exchange.client.sendall(_head(self.status, self.headers, len(self.body)) + self.body)


@dataclass(frozen=True, slots=True)
class Redirect(Fault):
    """The client is sent elsewhere, where its credential must not follow."""

    to_url: str
    status: int = 302

    def __call__(self, exchange: Exchange) -> None:
        exchange.answer(self.status, "text/plain", b"moved", location=self.to_url)


@dataclass(frozen=True, slots=True)
class Huge(Fault):
    """A body without an end, or rather one that ends long after anybody should have stopped."""

    at_most: int = 1024 * 1024 * 1024
    commit: bool = False

    def __call__(self, exchange: Exchange) -> None:
        exchange.maybe_commit(self.commit)
        exchange.client.sendall(_head(200, {"content-type": "application/json"}, None))
        exchange.client.sendall(b'{"key": "sk-')
        block = b"a" * 65536
        for _ in range(self.at_most // len(block)):
            exchange.client.sendall(block)


@dataclass(frozen=True, slots=True)
class PauseResponse(Fault):
    """
    The gateway has answered, and the answer waits on the wire.

    Args:
        release: Set by the test to let the answer go.
        at_most: Seconds after which it goes anyway.
        reached: Set when the answer is here: the moment to kill the client.
    """

    release: threading.Event = field(default_factory=threading.Event)
    at_most: float = PATIENCE_SECONDS
    reached: threading.Event = field(default_factory=threading.Event)

    def __call__(self, exchange: Exchange) -> bool:
        response = exchange.commit()
        self.reached.set()
        with exchange.faults.interruptible(self.release):
            self.release.wait(self.at_most)
        exchange.client.sendall(response.raw)
        return response.keeps_alive


def _trickle(exchange: Exchange, data: bytes, interval: float) -> None:
    for at in range(len(data)):
        if exchange.pause(interval):
            raise ConnectionAbortedError("the proxy is closed")
        exchange.client.sendall(data[at : at + 1])


def too_many(retry_after: int | datetime | None = None) -> Status:
    """Make a 429 that says when to come back in seconds, as a date, or not at all."""
    headers = {"content-type": "application/json"}
    if retry_after is not None:
        if isinstance(retry_after, datetime):
            headers["retry-after"] = format_datetime(retry_after.astimezone(UTC), usegmt=True)
        else:
            headers["retry-after"] = str(retry_after)
    body = b'{"error":{"message":"slow down","type":"rate_limit_error","param":null,"code":"429"}}'
    return Status(429, headers, body)


@dataclass(slots=True)
class Armed:
    """A fault that waits for its requests."""

    fault: Fault
    method: str | None
    path: str | None
    where: Callable[[Request], bool] | None
    left: int | None
    before: Callable[[Entry], object] | None
    after: Callable[[Entry], object] | None
    entries: list[Entry] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def matches(self, request: Request) -> bool:
        """Tell whether this is a request to break."""
        return (
            self.left != 0
            and self.method in (None, request.method)
            and (self.path is None or fnmatchcase(request.path, self.path))
            and (self.where is None or self.where(request))
        )

    def wait(self, timeout: float = PATIENCE_SECONDS) -> Entry:
        """Wait until the fault has happened, and return its first request."""
        if not self.done.wait(timeout):
            raise TimeoutError(f"no {type(self.fault).__name__} in {timeout} s")
        return self.entries[0]


class Faults:
    """
    A proxy in front of one gateway. A context manager.

    Also understands the absolute form that clients send to a forward proxy; whatever host they
    name, it is this gateway that is asked.

    Args:
        upstream_url: The gateway, with any path, which `url` repeats.
        admin: The admin credential, to see where it shows up.
        keep_host: Tell the gateway the host that the client named, for what is signed.
    """

    def __init__(
        self, upstream_url: str, admin: str | None = None, *, keep_host: bool = False
    ) -> None:
        upstream = urlsplit(upstream_url)
        if upstream.hostname is None:
            raise ValueError(f"not a URL: {upstream_url}")
        self._upstream = (upstream.hostname, upstream.port or 80)
        self._base = upstream.path.rstrip("/")
        self._admin = admin.encode() if admin else None
        self._keep_host = keep_host
        self._port = 0
        self._armed: list[Armed] = []
        self._log: list[Entry] = []
        self._late: dict[int, tuple[Entry, threading.Event]] = {}
        self._interruptible: list[threading.Event] = []
        self._changed = threading.Condition()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.closing = threading.Event()
        self.errors: list[BaseException] = []

    def __repr__(self) -> str:
        return f"<Faults {self.url} in front of {self._upstream[0]}:{self._upstream[1]}>"

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._port = self._listener.getsockname()[1]
        self._stop, self._stopped = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept, name="faults", daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def behind(self) -> str:
        """The gateway itself."""
        return f"http://{self._upstream[0]}:{self._upstream[1]}{self._base}"

    @property
    def url(self) -> str:
        """What the client is given for the gateway."""
        return f"http://127.0.0.1:{self._port}{self._base}"

    @property
    def log(self) -> tuple[Entry, ...]:
        """Every request that arrived, in order."""
        with self._changed:
            return tuple(self._log)

    @property
    def pending_late(self) -> tuple[Entry, ...]:
        """The late commits that have not happened yet."""
        with self._changed:
            return tuple(entry for entry, _ in self._late.values())

    def next(
        self,
        fault: Fault,
        *,
        method: str | None = None,
        path: str | None = None,
        where: Callable[[Request], bool] | None = None,
        times: int | None = 1,
        before: Callable[[Entry], object] | None = None,
        after: Callable[[Entry], object] | None = None,
    ) -> Armed:
        """
        Arm a fault for the next matching requests. Of several that match, the oldest goes first.

        Args:
            fault: What happens.
            method: Only to this method.
            path: Only to this path without query; a pattern such as `/key/*`.
            where: Only to these; asked while the log is locked.
            times: How often; None is always, until `clear()`.
            before: Called in the connection's thread when a request has matched.
            after: Called there when the fault is over.
        """
        armed = Armed(fault, method, path, where, times, before, after)
        with self._changed:
            self._armed.append(armed)
        return armed

    def clear(self) -> None:
        """Disarm everything; what is already happening goes on."""
        with self._changed:
            self._armed.clear()

    def commit_late(self, timeout: float = PATIENCE_SECONDS) -> None:
        """Let every late commit happen now, those included whose request is still on its way."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._coming(), timeout):
                raise TimeoutError(f"no request for a late commit in {timeout} s")
            for _, due in self._late.values():
                due.set()
        self.wait_late(timeout)

    def wait_late(self, timeout: float = PATIENCE_SECONDS) -> None:
        """Wait until every late commit that was armed has happened."""
        with self._changed:
            if not self._changed.wait_for(lambda: not (self._coming() or self._late), timeout):
                raise TimeoutError(f"late commits still pending after {timeout} s")

    def _coming(self) -> bool:
        return any(armed.left and isinstance(armed.fault, CommitLate) for armed in self._armed)

    def wait_for(
        self, seen: Callable[[tuple[Entry, ...]], bool], timeout: float = PATIENCE_SECONDS
    ) -> None:
        """Wait until the log looks as described."""
        with self._changed:
            if not self._changed.wait_for(lambda: seen(tuple(self._log)), timeout):
                raise TimeoutError(f"{len(self._log)} requests after {timeout} s, none as awaited")

    def close(self) -> None:
        """Cut every connection, abandon what is pending, and end every thread."""
        if self.closing.is_set() or not self._port:
            return
        self.closing.set()
        self._stop.close()
        self._acceptor.join()
        self._stopped.close()
        self._listener.close()
        with self._changed:
            for event in self._interruptible:
                event.set()
            for connection in self._sockets:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
        if alive := [thread.name for thread in self._threads if thread.is_alive()]:
            raise RuntimeError(f"threads did not end: {alive}")

    # For faults.

    def forward(self, request: Request, entry: Entry) -> Response:
        """Send a request to the gateway and read the whole answer."""
        parts: list[bytes] = []
        keeps_alive = self._relay(request, entry, parts.append)
        head, body = parts[0], b"".join(parts[1:])
        return Response(head, body, _payload(head, body), keeps_alive)

    @contextlib.contextmanager
    def late(self, entry: Entry) -> Iterator[threading.Event]:
        """Yield the event that makes a late commit due, and take it off the list at the end."""
        with self._changed:
            due = self._late[id(entry)][1]
        try:
            with self.interruptible(due):
                yield due
        finally:
            with self._changed:
                del self._late[id(entry)]
                self._changed.notify_all()

    @contextlib.contextmanager
    def interruptible(self, event: threading.Event) -> Iterator[None]:
        """Have an event set when the proxy is closed, so that nobody waits for it in vain."""
        with self._changed:
            self._interruptible.append(event)
        if self.closing.is_set():
            event.set()
        try:
            yield
        finally:
            with self._changed:
                self._interruptible.remove(event)

    # Connections.

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._stopped, selectors.EVENT_READ)
            while all(key.fileobj is self._listener for key, _ in selector.select()):
                try:
                    client, _ = self._listener.accept()
                except OSError:
                    continue  # gone before it was accepted
                thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
                self._threads = [t for t in self._threads if t.is_alive()]
                self._threads.append(thread)
                thread.start()

    @contextlib.contextmanager
    def _owned(self, connection: socket.socket) -> Iterator[socket.socket]:
        """Close a connection at the end, and cut it when the proxy is closed before."""
        with connection:
            with self._changed:
                if self.closing.is_set():
                    raise ConnectionAbortedError("the proxy is closed")
                self._sockets.add(connection)
            try:
                yield connection
            finally:
                with self._changed:
                    self._sockets.discard(connection)

    def _serve(self, client: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError, _BadMessageError), self._owned(client):
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                reader = _Reader(client)
                while (request := _read_request(reader, client)) and self._exchange(
                    request, client
                ):
                    pass
        except Exception as error:
            self.errors.append(error)

    def _exchange(self, request: Request, client: socket.socket) -> bool:
        with self._changed:
            armed = next((armed for armed in self._armed if armed.matches(request)), None)
            entry = self._entry(request, armed)
            self._log.append(entry)
            if armed is not None:
                armed.left = None if armed.left is None else armed.left - 1
                armed.entries.append(entry)
                if isinstance(armed.fault, CommitLate):
                    self._late[id(entry)] = (entry, threading.Event())
            self._changed.notify_all()
        if armed is None:
            return self._relay(request, entry, client.sendall) and request.keeps_alive
        try:
            if armed.before is not None:
                armed.before(entry)
            keep = armed.fault(Exchange(request, entry, client, self))
            return bool(keep) and request.keeps_alive
        finally:
            if armed.after is not None:
                armed.after(entry)
            armed.done.set()

    def _host(self, request: Request) -> str:
        named = next((value for name, value in request.headers if name.lower() == "host"), None)
        if self._keep_host and named:
            return named
        return f"{self._upstream[0]}:{self._upstream[1]}"

    def _entry(self, request: Request, armed: Armed | None) -> Entry:
        text = request.head("") + request.body
        return Entry(
            at=datetime.now(UTC),
            method=request.method,
            path=re.sub(r"sk-[^/]+", "sk-...", request.path),
            fault=type(armed.fault).__name__ if armed else None,
            headers={name.lower(): _shown(name.lower(), value) for name, value in request.headers},
            admin_seen=self._admin is not None and self._admin in text,
        )

    def _relay(self, request: Request, entry: Entry, send: Callable[[bytes], object]) -> bool:
        """
        Pass a request to the gateway and its answer on, piece by piece.

        Returns:
            Whether the client can tell where the answer ends, and so use the connection again.
        """
        upstream = socket.create_connection(self._upstream, timeout=PATIENCE_SECONDS)
        with self._owned(upstream):
            upstream.settimeout(None)  # a stream may be silent for as long as it likes
            upstream.sendall(request.head(self._host(request)))
            upstream.sendall(request.body)
            reader = _Reader(upstream)
            head = reader.head()
            while head.startswith(b"HTTP/1.1 1"):
                head = reader.head()
            if not head:
                raise ConnectionAbortedError("the gateway hung up")
            with self._changed:
                entry.forwarded = True
                self._changed.notify_all()
            send(head)
            status, headers = int(head.split(b" ", 2)[1]), _headers(head)
            if request.method != "HEAD" and status not in (204, 304):
                for piece in reader.body(headers, until_close=True):
                    send(piece)
            framed = "content-length" in headers or "transfer-encoding" in headers
            return framed and "close" not in headers.get("connection", "").lower()


class _BadMessageError(Exception):
    """What came is no HTTP; the connection is closed."""


class _Reader:
    """Bytes of one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""

    def head(self) -> bytes:
        """Read a head with its empty line; nothing if the peer is gone before it said anything."""
        return self._until(b"\r\n\r\n")

    def body(self, headers: Mapping[str, str], until_close: bool) -> Iterator[bytes]:
        """Read a body as it arrives, chunks included."""
        if "chunked" in headers.get("transfer-encoding", "").lower():
            size = -1
            while size != 0:
                line = self._until(b"\r\n")
                try:
                    size = int(line.partition(b";")[0], 16)
                except ValueError as error:
                    raise _BadMessageError("no chunk size") from error
                yield line + b"".join(self._exactly(size + 2))
        elif "content-length" in headers:
            yield from self._exactly(int(headers["content-length"]))
        elif until_close:
            while piece := self._some(65536):
                yield piece

    def _until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            piece = self._connection.recv(65536)
            if not piece and not self._buffer:
                return b""
            if not piece or len(self._buffer) > MAX_HEAD:
                raise _BadMessageError("no end in sight")
            self._buffer += piece
        found, _, self._buffer = self._buffer.partition(end)
        return found + end

    def _exactly(self, count: int) -> Iterator[bytes]:
        if count > MAX_BODY:
            raise _BadMessageError("too large")
        while count > 0:
            piece = self._some(count)
            if not piece:
                raise _BadMessageError("cut off")
            count -= len(piece)
            yield piece

    def _some(self, at_most: int) -> bytes:
        if not self._buffer:
            self._buffer = self._connection.recv(65536)
        piece, self._buffer = self._buffer[:at_most], self._buffer[at_most:]
        return piece


def _read_request(reader: _Reader, client: socket.socket) -> Request | None:
    head = reader.head()
    if not head:
        return None
    lines = head.decode("latin-1").split("\r\n")
    try:
        method, target, version = lines[0].split(" ")
    except ValueError as error:
        raise _BadMessageError("no request line") from error
    if not target.startswith("/"):  # the form for a forward proxy
        url = urlsplit(target)
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    pairs = [line.partition(":") for line in lines[1:] if line]
    named = tuple((name, value.strip()) for name, _, value in pairs)
    headers = _headers(head)
    if "100-continue" in headers.get("expect", "").lower():
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = b"".join(reader.body(headers, until_close=False))
    return Request(method, target, version, named, body)


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name.lower(): value.strip() for name, _, value in pairs}


def _payload(head: bytes, body: bytes) -> bytes:
    if "chunked" not in _headers(head).get("transfer-encoding", "").lower():
        return body
    payload, rest = b"", body
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        count = int(size.partition(b";")[0], 16)
        payload, rest = payload + rest[:count], rest[count + 2 :]
    return payload


def _head(status: int, headers: Mapping[str, str], length: int | None) -> bytes:
    phrase = HTTPStatus(status).phrase if status in list(HTTPStatus) else "Unknown"
    lines = [
        f"HTTP/1.1 {status} {phrase}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    if length is not None:
        lines.append(f"content-length: {length}")
    return "\r\n".join([*lines, "connection: close", "", ""]).encode("latin-1")


def _shown(name: str, value: str) -> str:
    if name not in _CREDENTIALS:
        return re.sub(r"sk-[\w-]+", lambda found: fingerprint(found[0]), value)
    scheme, space, secret = value.rpartition(" ")
    return f"{scheme}{space}{fingerprint(secret)}" if secret else value
