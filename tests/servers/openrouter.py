"""
A stand-in for the part of OpenRouter where a person lets a program have a key of theirs.

    GET  /auth                     a page with a button; it leads back to `callback_url` with a code
    POST /api/v1/auth/keys         a key for a code and its verifier, once, within ten minutes
    GET  /api/v1/key               what a key says of itself

Whether the address that is led back to keeps a query of its own is not documented: `naive` is the
worst that could be done to one.

See: https://openrouter.ai/docs/guides/overview/auth/oauth
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from tests.servers.web import Handler, LoopbackServer

_PAGE = '<form method="post" action="/allow?{query}"><button name="ok">Authorize</button></form>'
SECONDS = 600  # that a code is good


@dataclass(slots=True)
class _Code:
    challenge: str
    method: str
    made: float
    label: str


class OpenRouter(LoopbackServer):
    """
    The site, as a context.

    Attributes:
        keys: Those that it made, with what they are called; what is taken out was deleted.
        naive: It writes ?code=… behind an address, whatever is in it.
        seconds: How long a code is good.
        breaks: It answers with this status and body when it is asked for a key.
        asked: What it was sent for a code.
    """

    def __init__(self) -> None:
        super().__init__(_Answer)
        self.keys: dict[str, str] = {}
        self.naive = False
        self.seconds = SECONDS
        self.breaks: tuple[int, bytes] | None = None
        self.asked: list[dict[str, Any]] = []
        self.user = f"user_{secrets.token_hex(8)}"
        self._codes: dict[str, _Code] = {}

    def allow(self, asked: dict[str, str]) -> str:
        """Return where the browser is led to when a person says yes."""
        code = secrets.token_urlsafe(24)
        method = asked.get("code_challenge_method", "plain")
        self._codes[code] = _Code(
            asked["code_challenge"], method, time.monotonic(), asked.get("key_label", "")
        )
        back = asked["callback_url"]
        joint = "&" if "?" in back and not self.naive else "?"
        return f"{back}{joint}{urlencode({'code': code})}"

    def redeem(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return the status and the answer to who has a code."""
        self.asked.append(asked)
        known = self._codes.pop(str(asked.get("code")), None)
        if known is None or time.monotonic() - known.made > self.seconds:
            return 403, _error(403, "Invalid code or code_verifier")
        if asked.get("code_challenge_method", "plain") != known.method:
            return 400, _error(400, "Invalid code_challenge_method")
        digest = hashlib.sha256(str(asked.get("code_verifier")).encode()).digest()
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != known.challenge:
            return 403, _error(403, "Invalid code or code_verifier")
        key = f"sk-or-v1-{secrets.token_hex(32)}"
        self.keys[key] = known.label
        return 200, {"key": key, "user_id": self.user}


def _error(code: int, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


class _Answer(Handler):
    server: OpenRouter

    def do_GET(self) -> None:  # noqa: N802, the standard library's names
        target = urlsplit(self.path)
        if target.path == "/auth":
            page = _PAGE.format(query=target.query.replace("&", "&amp;")).encode()
            self._send(200, page, {"content-type": "text/html"})
        elif target.path == "/api/v1/key":
            key = self.headers.get("authorization", "").removeprefix("Bearer ")
            if key in self.server.keys:
                self._json(200, {"data": {"label": self.server.keys[key]}})
            else:
                self._json(401, _error(401, "User not found."))
        else:
            self._json(405, _error(405, "Method Not Allowed"))

    def do_POST(self) -> None:  # noqa: N802
        target, body = urlsplit(self.path), self.body()
        if target.path == "/allow":
            asked = {name: values[0] for name, values in parse_qs(target.query).items()}
            self._send(302, b"", {"location": self.server.allow(asked)})
        elif target.path != "/api/v1/auth/keys":
            self._json(404, _error(404, "Not Found"))
        elif self.server.breaks is not None:
            status, data = self.server.breaks
            self._send(status, data, {"content-type": "application/json"})
        else:
            self._json(*self.server.redeem(self.read_json(body)))

    def _json(self, status: int, said: dict[str, Any]) -> None:
        self._send(status, json.dumps(said).encode(), {"content-type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
