"""
HTTP for the development gateway: loopback, one thread a connection, nothing on stderr.

Knows requests and replies, and nothing of keys but where they are presented.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qsl

MAX_CONNECTIONS = 512

# The bare key is in any of these; the two looked at before them may carry a scheme.
_BARE_KEY_HEADERS = ("api-key", "x-api-key", "x-goog-api-key", "ocp-apim-subscription-key")


@dataclass(frozen=True, slots=True)
class Request:
    """One request, read completely. The key is None if there is none, "" if it is malformed."""

    method: str
    path: str
    query: Mapping[str, str] = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)  # names in lower case
    body: bytes = field(repr=False)
    key: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: a JSON body, or the events of a stream instead."""

    status: int
    body: object
    headers: Mapping[str, str] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] | None = None


def presented_key(headers: Mapping[str, str]) -> str | None:
    """Find the key in LiteLLM's order: its own header, `Authorization`, then the bare ones."""
    own = headers.get("x-litellm-api-key")
    if own is not None:
        return _without_scheme(own) or own
    if authorization := headers.get("authorization"):
        return _without_scheme(authorization)
    found = (headers.get(name) for name in _BARE_KEY_HEADERS)
    return next((key for key in found if key), None)


def _without_scheme(text: str) -> str:
    scheme, _, key = text.partition(" ")
    return key.strip() if scheme in ("Bearer", "bearer") else ""


class Server(ThreadingHTTPServer):
    """
    A listening socket with the threads that serve it.

    Args:
        port: On 127.0.0.1; 0 lets the kernel choose.
        respond: Answers a request; called from many threads.
        now: What the `Date` header says.
        fail: Is told of exceptions that are not a client's doing.
        read_timeout: Seconds a silent client may hold a connection.
        max_body: Largest request body in bytes.
    """

    daemon_threads = True
    request_queue_size = 128
    timeout = 0  # of `handle_request`, which is called when there is one
    allow_reuse_port = False  # two gateways on one port would share its connections at random

    def __init__(
        self,
        port: int,
        respond: Callable[[Request], Reply],
        now: Callable[[], datetime],
        fail: Callable[[BaseException], None],
        *,
        read_timeout: float,
        max_body: int,
    ) -> None:
        self.respond, self.now, self._fail = respond, now, fail
        self.read_timeout, self.max_body = read_timeout, max_body
        self._open: dict[socket.socket, threading.Thread] = {}
        self._guard = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="devgateway", daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])

    def start(self) -> None:
        """Serve in the background."""
        self._thread.start()

    def stop(self) -> None:
        """Stop listening, then cut every connection and wait for its thread."""
        self._stop.close()
        self._thread.join()
        self._stopped.close()
        self.server_close()
        with self._guard:
            still_open = dict(self._open)
            for connection in still_open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in still_open.values():
            thread.join(timeout=5)

    def _serve(self) -> None:
        """Accept until told to stop; unlike `serve_forever`, idle means no wake-ups."""
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            selector.register(self._stopped, selectors.EVENT_READ)
            while all(key.fileobj is self for key, _ in selector.select()):
                self.handle_request()

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # without the name look-up, which may take seconds
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own, and remember it so that it can be cut."""
        target = self.process_request_thread
        thread = threading.Thread(target=target, args=(request, client_address), daemon=True)
        with self._guard:
            room = len(self._open) < MAX_CONNECTIONS
            if room:
                self._open[request] = thread
        if room:
            thread.start()
        else:
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        with self._guard:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note an exception of ours; a client that goes away is nothing to report."""
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):
            self._fail(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes
    server: Server

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.read_timeout)

    def answer(self) -> None:
        """Read a request to its end, answer it, and keep the connection where that is safe."""
        body = self._read_body()
        if body is None:
            return
        path, _, query_text = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = dict(parse_qsl(query_text, keep_blank_values=True))
        key = presented_key(headers)
        request = Request(self.command, path, query, headers, body, key)
        self._send(self.server.respond(request))

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815  (inherited)

    def _read_body(self) -> bytes | None:
        """Read the body, None if there is none to be had; then the connection is of no more use."""
        length = self.headers.get("content-length", "0")
        if "transfer-encoding" in self.headers or not (length.isascii() and length.isdigit()):
            self._turn_away(411, "a Content-Length is needed")
            return None
        if len(length) > 12 or int(length) > self.server.max_body:
            self._turn_away(413, f"at most {self.server.max_body} bytes are read")
            return None
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            return None
        return body

    def _turn_away(self, status: int, said: str) -> None:
        self.close_connection = True
        error = {"type": "request_too_large" if status == 413 else "invalid_request_error"}
        self._send(Reply(status, {"type": "error", "error": error | {"message": said}}))

    def _send(self, reply: Reply) -> None:
        streams = reply.events is not None
        content = b"" if streams else json.dumps(reply.body, separators=(",", ":")).encode()
        chunked = streams and self.request_version != "HTTP/1.0"
        self.close_connection = self.close_connection or (streams and not chunked)
        self.send_response(reply.status)
        kind = "text/event-stream; charset=utf-8" if streams else "application/json"
        self.send_header("content-type", kind)
        if chunked:
            self.send_header("transfer-encoding", "chunked")
        elif not streams:
            self.send_header("content-length", str(len(content)))
        if self.close_connection:
            self.send_header("connection", "close")
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for event in reply.events or ():
            data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
        self.wfile.write(b"0\r\n\r\n" if chunked else content)

    def version_string(self) -> str:
        """Write the `Server` header."""
        return "devgateway"

    def date_time_string(self, timestamp: float | None = None) -> str:
        """Write the `Date` header by the gateway's clock, which may be wrong on purpose."""
        return format_datetime(self.server.now().astimezone(UTC), usegmt=True)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (inherited)
        """Write nothing: a request line can hold a key."""
