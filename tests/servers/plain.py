"""
A gateway that is wrong in one way at a time: a key that it reads in one header, a page, no answer.

It is a stand-in; LiteLLM and nginx are there as they are, beside it.
"""

from __future__ import annotations

import ssl
import time
from threading import Event
from typing import Any

from tests.servers.authority import Certificate
from tests.servers.upstream import Upstream, UpstreamHandler
from tests.servers.web import Handler

PAGE = b"<!DOCTYPE html><html><head><title>Log in</title></head><body>%s</body></html>"


class Plain(Upstream):
    """
    The gateway, as a context.

    Args:
        certificate: What it answers with, for TLS.

    Attributes:
        key: The one that it takes.
        reads: The headers in which it looks for it; none: it asks for no key.
        says: What each refusal of a key says besides; a page says it, too.
        refusal: The status of each.
        ahead: Seconds by which its clock is.
        page: It answers every message with this status and a page.
        openai_only: It has no /v1/messages.
        model: The only one that it has; None: any.
        strips: Headers that do not get past it.
        silent: It answers a message only once this is set.
        counts: It has count_tokens, which is optional.
    """

    def __init__(self, key: str, certificate: Certificate | None = None, **ways: Any) -> None:
        super().__init__(_Plain)
        self.key = key
        self.reads: tuple[str, ...] = ("authorization", "x-api-key")
        self.says = ""
        self.refusal = 401
        self.ahead = 0
        self.page: int | None = None
        self.openai_only = False
        self.counts = True
        self.model: str | None = None
        self.strips: tuple[str, ...] = ()
        self.silent: Event | None = None
        self.sent: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self._tls = certificate is not None
        for name, value in ways.items():
            assert hasattr(self, name), name
            setattr(self, name, value)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.file, certificate.key)
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )

    @property
    def url(self) -> str:
        """Its address."""
        return super().url.replace("http:", "https:") if self._tls else super().url

    def __exit__(self, *rest: object) -> None:
        if self.silent is not None:
            self.silent.set()
        super().__exit__(*rest)


class _Plain(UpstreamHandler):
    server: Plain

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string((timestamp or time.time()) + self.server.ahead)

    def do_POST(self) -> None:  # noqa: N802
        gateway = self.server
        data = self.body()
        request = Handler.read_json(data)
        headers = {name.lower(): value for name, value in self.headers.items()}
        gateway.sent.append((self.path, headers, request))
        path = self.path.split("?")[0]
        if gateway.silent is not None:
            gateway.silent.wait(60)
        if gateway.page is not None:
            self.send(PAGE % gateway.says.encode(), "text/html", gateway.page)
            return
        if not self._is_let_in(headers):
            error = {"type": "authentication_error", "message": f"invalid key{gateway.says}"}
            self.send_json({"type": "error", "error": error}, gateway.refusal)
        elif path == "/v1/chat/completions":
            self.send_json({"id": "chatcmpl-1", "object": "chat.completion", "choices": []})
        elif gateway.openai_only or (path.endswith("/count_tokens") and not gateway.counts):
            self.send_json({"detail": "Not Found"}, 404)
        elif gateway.model not in (None, request.get("model")):
            error = {"type": "not_found_error", "message": f"model: {request.get('model')}"}
            self.send_json({"type": "error", "error": error}, 404)
        else:
            for name in gateway.strips:
                del self.headers[name]
            self.answer(request)

    def _is_let_in(self, headers: dict[str, str]) -> bool:
        if not self.server.reads:
            return True
        found = (headers.get(name, "").removeprefix("Bearer ") for name in self.server.reads)
        return self.server.key in found
