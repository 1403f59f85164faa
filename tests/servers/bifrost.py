"""
What Bifrost serves to Claude Code below `/claude-code`: a sign-in, and messages for its tokens.

A stand-in, since Bifrost's program is in no package registry; it answers as its source says. The
page where a code is typed is a program for a browser there, and a form here.

See: transports/bifrost-http/handlers/claudecodegateway.go of maximhq/bifrost.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from threading import Lock
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.servers.web import Handler, LoopbackServer

PREFIX = "/claude-code"
DEVICE = "urn:ietf:params:oauth:grant-type:device_code"
LIMIT = 30  # codes a minute
ALPHABET = "BCDFGHJKLMNPQRSTVWXZ"
PAGE = """<form method="post"><input name="user_code" value="">
<button name="decision" value="approve">Allow</button>
<button name="decision" value="deny">Refuse</button></form>"""


@dataclass(slots=True)
class Waiting:
    """A code that somebody is to type."""

    user_code: str
    ends: float
    status: str = "pending"
    asked: float = 0.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that arrived, and how it was answered."""

    path: str
    form: dict[str, str]
    status: int


@dataclass(slots=True)
class Books:
    """What it knows, which is in its database: a restart keeps it."""

    codes: dict[str, Waiting] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)  # and when they end
    refresh: set[str] = field(default_factory=set)
    starts: list[float] = field(default_factory=list)


class Bifrost(LoopbackServer):
    """
    The server.

    Args:
        seconds: How long a token lives.
        interval: Seconds between two asks for a code.

    Attributes:
        enabled: The gateway is switched on.
        renews: It gives refresh tokens, as Bifrost always does.
        elsewhere: Where it says that its endpoints are, if not here.
        asked: All that arrived.
    """

    def __init__(self, seconds: int = 3600, interval: int = 5, code_seconds: int = 600) -> None:
        super().__init__(_Answers)
        self.seconds, self.interval, self.code_seconds = seconds, interval, code_seconds
        self.enabled = True
        self.renews = True
        self.elsewhere = ""
        self.books = Books()
        self.asked: list[Asked] = []
        self.guard = Lock()

    @property
    def base(self) -> str:
        """Where Claude Code is pointed at."""
        return f"{self.url}{PREFIX}"


class _Answers(Handler):
    server: Bifrost

    def do_GET(self) -> None:  # noqa: N802, the standard library's name
        path = urlsplit(self.path).path
        if path == "/oauth/device":
            self._send(200, PAGE, "text/html")
        elif path == f"{PREFIX}/.well-known/oauth-authorization-server":
            self._described()
        elif path == f"{PREFIX}/v1/models":
            self._served({"data": [{"id": "claude-sonnet-4-5", "display_name": "Sonnet"}]})
        else:
            self._send(404, "{}")

    def do_POST(self) -> None:  # noqa: N802
        path, text = urlsplit(self.path).path, self.body().decode()
        form = dict(parse_qsl(text, keep_blank_values=True)) if "=" in text else {}
        with self.server.guard:
            if path == "/oauth/device":
                self._typed(form)
            elif path.startswith(f"{PREFIX}/v1/messages"):
                self._served({"input_tokens": 7, "content": [{"type": "text", "text": "pong"}]})
            elif not self.server.enabled:
                self._refuse(404, "not_found")
            elif path == f"{PREFIX}/oauth/device_authorization":
                self._begin()
            elif path == f"{PREFIX}/oauth/token":
                self._token(form)
            elif path == f"{PREFIX}/oauth/revoke":
                self.server.books.refresh.discard(form.get("token", ""))
                self._send(200, "")
            else:
                self._send(404, "{}")

    def _described(self) -> None:
        if not self.server.enabled:
            self._refuse(404, "not_found")
            return
        base = self.server.elsewhere or self.server.base
        described = {
            "issuer": base,
            "device_authorization_endpoint": f"{base}/oauth/device_authorization",
            "token_endpoint": f"{base}/oauth/token",
            "revocation_endpoint": f"{base}/oauth/revoke",
            "grant_types_supported": [DEVICE, "refresh_token"],
        }
        self._json(200, described)

    def _begin(self) -> None:
        books, now = self.server.books, time.monotonic()
        books.starts = [one for one in books.starts if now - one < 60]
        if len(books.starts) >= LIMIT:
            self._refuse(429, "slow_down", {"retry-after": "60"})
            return
        books.starts.append(now)
        letters = "".join(secrets.choice(ALPHABET) for _ in range(8))
        waiting = Waiting(f"{letters[:4]}-{letters[4:]}", now + self.server.code_seconds)
        code = secrets.token_urlsafe(32)
        books.codes[code] = waiting
        page = f"{self.server.url}/oauth/device"
        answer = {
            "device_code": code,
            "user_code": waiting.user_code,
            "verification_uri": page,
            "verification_uri_complete": f"{page}?user_code={waiting.user_code}",
            "expires_in": self.server.code_seconds,
            "interval": self.server.interval,
        }
        self._json(200, answer)

    def _typed(self, form: dict[str, str]) -> None:
        for waiting in self.server.books.codes.values():
            if waiting.status == "pending" and waiting.user_code == form.get("user_code"):
                waiting.status = "denied" if form.get("decision") == "deny" else "approved"
                self._send(200, "<p>Go back to where you came from.</p>", "text/html")
                return
        self._send(404, "<p>Not a code.</p>", "text/html")

    def _token(self, form: dict[str, str]) -> None:
        books, now = self.server.books, time.monotonic()
        if form.get("grant_type") == "refresh_token":
            if form.get("refresh_token") not in books.refresh:
                self._refuse(400, "invalid_grant", form=form)
                return
            books.refresh.remove(form["refresh_token"])
            self._give(form)
            return
        waiting = books.codes.get(form.get("device_code", ""))
        if waiting is None or now > waiting.ends or waiting.status == "used":
            self._refuse(400, "expired_token", form=form)
        elif waiting.status == "denied":
            self._refuse(400, "access_denied", form=form)
        elif waiting.status == "approved":
            waiting.status = "used"
            self._give(form)
        elif now - waiting.asked < self.server.interval:
            self._refuse(400, "slow_down", form=form)
        else:
            waiting.asked = now
            self._refuse(400, "authorization_pending", form=form)

    def _give(self, form: dict[str, str]) -> None:
        access, refresh = f"eyJ{secrets.token_urlsafe(48)}", secrets.token_urlsafe(32)
        self.server.books.tokens[access] = time.monotonic() + self.server.seconds
        answer: dict[str, Any] = {
            "access_token": access,
            "token_type": "Bearer",
            "expires_in": self.server.seconds,
            "scope": "claude-code",
        }
        if self.server.renews:
            self.server.books.refresh.add(refresh)
            answer["refresh_token"] = refresh
        self._json(200, answer, form)

    def _served(self, answer: dict[str, Any]) -> None:
        """Answer a client that has a token, in the one header that is read."""
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        if self.server.books.tokens.get(token, 0.0) > time.monotonic():
            self._json(200, answer)
            return
        error = {"type": "authentication_error", "message": "the gateway session is invalid"}
        text = json.dumps({"type": "error", "error": error})
        self._send(401, text, headers={"x-should-retry": "false"})

    def _refuse(
        self,
        status: int,
        error: str,
        headers: dict[str, str] | None = None,
        form: dict[str, str] | None = None,
    ) -> None:
        text = json.dumps({"error": error, "error_description": f"about {error}"})
        self._send(status, text, headers=headers, form=form)

    def _json(self, status: int, value: Any, form: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value), form=form)

    def _send(
        self,
        status: int,
        text: str,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
        form: dict[str, str] | None = None,
    ) -> None:
        self.server.asked.append(Asked(urlsplit(self.path).path, form or {}, status))
        self.send_response(status)
        for name, value in {"content-type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())
