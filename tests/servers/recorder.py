"""
A host that Claude Code can be led to, and what it was sent there.

It answers `pong` in every format of the client: Anthropic's, Bedrock's, Vertex AI's. It is a
proxy as well, whichever host is meant, and looks into TLS if it has a certificate.

See: https://docs.aws.amazon.com/transcribe/latest/dg/event-stream.html
"""

from __future__ import annotations

import base64
import json
import ssl
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from tests.servers.authority import Certificate
from tests.servers.upstream import MODEL, events
from tests.servers.web import Handler, LoopbackServer


@dataclass(frozen=True, slots=True)
class Sent:
    """
    One request.

    Attributes:
        path: Without its query; with its host where it came as to a proxy.
        headers: By their names in small letters.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)

    @property
    def keys(self) -> tuple[str | None, str | None]:
        """The bearer token and the x-api-key."""
        bearer = self.headers.get("authorization")
        return bearer and bearer.removeprefix("Bearer "), self.headers.get("x-api-key")


class Recorder(LoopbackServer):
    """
    The server.

    Args:
        certificate: What it speaks TLS with: from the start, or as a proxy.
        proxy: Others are led here as to a proxy, so that the start is in the clear.

    Attributes:
        refuses: A key that is answered `refusal`.
        refusal: An HTTP status.
    """

    def __init__(self, certificate: Certificate | None = None, *, proxy: bool = False) -> None:
        super().__init__(_Recorder)
        self.refuses: str | None = None
        self.refusal = 401
        self.tls: ssl.SSLContext | None = None
        self._from_the_start = certificate is not None and not proxy
        self._sent: list[Sent] = []
        self._sent_guard = Lock()
        if certificate:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.tls.load_cert_chain(certificate.file, certificate.key)

    @property
    def url(self) -> str:
        """Its address."""
        return f"{'https' if self._from_the_start else 'http'}://127.0.0.1:{self.port}"

    def get_request(self) -> Any:
        connection, address = super().get_request()
        if self._from_the_start and self.tls:
            # the handshake is for the connection's own thread
            connection = self.tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address

    def sent(self) -> list[Sent]:
        """Every POST so far, which is what has a key."""
        with self._sent_guard:
            return [one for one in self._sent if one.method == "POST"]

    def keys(self) -> list[tuple[str | None, str | None]]:
        """What the POSTs came with; see `Sent.keys`."""
        return [one.keys for one in self.sent()]

    def remember(self, request: Sent) -> None:
        """Add to what `sent` tells."""
        with self._sent_guard:
            self._sent.append(request)


class _Recorder(Handler):
    server: Recorder

    def do_CONNECT(self) -> None:  # noqa: N802, the standard library's name
        assert self.server.tls
        self.send_response(200)
        self.end_headers()
        self.request = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.setup()

    def do_HEAD(self) -> None:  # noqa: N802
        self._send(200, b"", "application/json")

    def do_GET(self) -> None:  # noqa: N802
        self._send(200, b"{}", "application/json")

    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.body())
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Sent("POST", self.path.split("?")[0], headers)
        self.server.remember(request)
        if self.server.refuses and self.server.refuses in request.keys:
            error = {"type": "authentication_error", "message": "invalid x-api-key"}
            answer = json.dumps({"type": "error", "error": error}).encode()
            self._send(self.server.refusal, answer, "application/json")
        elif request.path.endswith("/invoke-with-response-stream"):
            self._send(200, _amazon(events(MODEL)), "application/vnd.amazon.eventstream")
        else:
            self._send(200, events(body.get("model", MODEL)), "text/event-stream")

    def finish(self) -> None:
        super().finish()
        if isinstance(self.connection, ssl.SSLSocket):
            self.connection.close()

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _amazon(stream: bytes) -> bytes:
    """Put each event of a stream into a message of Amazon's."""
    messages = []
    for line in stream.splitlines():
        if line.startswith(b"data: "):
            inner = base64.b64encode(line.removeprefix(b"data: ")).decode()
            messages.append(_framed(json.dumps({"bytes": inner}).encode()))
    return b"".join(messages)


def _framed(payload: bytes) -> bytes:
    kinds = {":event-type": "chunk", ":content-type": "application/json", ":message-type": "event"}
    headers = b"".join(
        bytes([len(name)]) + name.encode() + b"\x07" + len(value).to_bytes(2) + value.encode()
        for name, value in kinds.items()
    )
    sizes = (len(headers) + len(payload) + 16).to_bytes(4) + len(headers).to_bytes(4)
    framed = sizes + zlib.crc32(sizes).to_bytes(4) + headers + payload
    return framed + zlib.crc32(framed).to_bytes(4)
