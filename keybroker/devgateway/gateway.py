"""The development gateway: who asks, what for, and what was asked so far."""

from __future__ import annotations

import hmac
import json
import re
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from types import TracebackType
from typing import Any, Self

from keybroker.devgateway import refusals, replies
from keybroker.devgateway.keys import KeyStore, Options
from keybroker.devgateway.refusals import Json, RefusalError, invalid
from keybroker.devgateway.row import Row
from keybroker.devgateway.server import Reply, Request, Server

MODELS = ("claude-opus-4-6", "claude-sonnet-4-6", "claude-sonnet-4-5", "claude-haiku-4-5")
MAX_BODY = 32 * 1024 * 1024  # what the Anthropic API accepts
READ_TIMEOUT_SECONDS = 60.0

_OPEN: dict[str, tuple[str, object]] = {
    "/": ("GET", {"name": "keybroker devgateway"}),
    "/health/liveliness": ("GET", "I'm alive!"),
    "/health/liveness": ("GET", "I'm alive!"),
    "/health/readiness": ("GET", {"status": "healthy", "db": "connected"}),
}
_ROUTES = {
    "/v1/messages": "POST",
    "/v1/messages/count_tokens": "POST",
    "/v1/models": "GET",
    "/key/generate": "POST",
    "/key/info": "GET",
    "/key/list": "GET",
    "/key/aliases": "GET",
    "/key/delete": "POST",
    "/key/update": "POST",
    "/key/block": "POST",
    "/key/unblock": "POST",
    "/key/regenerate": "POST",
}


@dataclass(frozen=True, slots=True)
class Seen:
    """One request that was answered. The fingerprint is of the key presented, empty for none."""

    at: datetime
    method: str
    path: str
    status: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class LiveKey:
    """One key that would be accepted now. `token` is its SHA-256."""

    alias: str | None
    token: str
    expires: datetime | None


def _utc_now() -> datetime:
    return datetime.now(UTC)


class DevGateway:
    """
    An LLM gateway on 127.0.0.1 that mints, checks and revokes keys as LiteLLM does.

    A context manager. Its keys survive `close()` and a later `start()`, and so does its port, so
    that a test can take the gateway away and bring it back.

    Args:
        master_key: Guards the key API; a random one if not given.
        port: 0 lets the kernel choose.
        clock: Says what time it is; a test passes its own.
        models: What `/v1/models` lists; any other name is answered too.
        read_timeout: Seconds a silent client may hold a connection.
        max_body: Largest request body in bytes.
        options: Fields of `Options`, which may also be changed while it runs.
    """

    def __init__(
        self,
        master_key: str | None = None,
        port: int = 0,
        *,
        clock: Callable[[], datetime] = _utc_now,
        models: Sequence[str] = MODELS,
        read_timeout: float = READ_TIMEOUT_SECONDS,
        max_body: int = MAX_BODY,
        **options: Any,
    ) -> None:
        self.master_key = master_key or f"sk-{secrets.token_urlsafe(24)}"
        self.options = Options(**options)
        self.read_timeout = read_timeout
        self.max_body = max_body
        self._models = tuple(models)
        self._clock = clock
        self._port = port
        self._lock = threading.Lock()
        self._keys = KeyStore(self.options)
        self._seen: deque[Seen] = deque(maxlen=10_000)
        self._requests = 0
        self._refused = 0
        self._failures: deque[str] = deque(maxlen=100)
        self._server: Server | None = None

    def __repr__(self) -> str:
        """Show where it listens, never its master key."""
        return f"<DevGateway {self.url}>" if self._port else "<DevGateway not started>"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The base URL, which stays the same across `close()` and `start()`."""
        if not self._port:
            raise RuntimeError("the gateway was not started")
        return f"http://127.0.0.1:{self._port}"

    @property
    def requests(self) -> int:
        """How many data-plane requests were answered."""
        return self._requests

    @property
    def refused(self) -> int:
        """How many of them with a status of 400 or more."""
        return self._refused

    @property
    def failures(self) -> tuple[str, ...]:
        """The types of exceptions that were ours and not a client's: none, or there is a bug."""
        return tuple(self._failures)

    def seen(self) -> tuple[Seen, ...]:
        """Return the last 10,000 requests, oldest first."""
        with self._lock:
            return tuple(self._seen)

    def live_keys(self) -> tuple[LiveKey, ...]:
        """Return the keys that would be accepted now, oldest first."""
        with self._lock:
            rows = self._keys.live(self.now())
        return tuple(LiveKey(row.key_alias, row.token, row.expires) for row in rows)

    def now(self) -> datetime:
        """Say what this gateway takes for the time: its clock, and how far that is off."""
        return self._clock() + self.options.date_skew

    def start(self) -> Self:
        """Listen and serve in the background."""
        if self._server is None:
            self._server = Server(
                self._port,
                self.respond,
                self.now,
                self._fail,
                read_timeout=self.read_timeout,
                max_body=self.max_body,
            )
            self._port = self._server.port
            self._server.start()
        return self

    def close(self) -> None:
        """Stop listening and cut every connection, kept-alive ones included."""
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    def _fail(self, error: BaseException) -> None:
        self._failures.append(type(error).__name__)

    def respond(self, request: Request) -> Reply:
        """Answer one request, and note it before the client has a byte of the answer."""
        with self._lock:
            now = self.now()
            try:
                reply = self._route(request, now)
            except RefusalError as no:
                reply = Reply(no.status, no.body, no.headers)
            if request.path.startswith("/v1/"):
                self._requests += 1
                self._refused += reply.status >= 400
            fingerprint = sha256(request.key.encode()).hexdigest()[:8] if request.key else ""
            path = re.sub(r"sk-[^/]+", "sk-...", request.path)
            self._seen.append(Seen(now, request.method, path, reply.status, fingerprint))
        return reply

    def _route(self, request: Request, now: datetime) -> Reply:
        path = request.path
        if re.fullmatch(r"/key/[^/]+/regenerate", path):
            path = "/key/regenerate"
        if path in _OPEN:
            method, body = _OPEN[path]
            if request.method == method or (path == "/" and request.method == "HEAD"):
                return Reply(200, body)
        elif path in _ROUTES:
            method = _ROUTES[path]
        else:
            return Reply(404, {"detail": "Not Found"})
        if request.method != method:
            return Reply(405, {"detail": "Method Not Allowed"}, {"allow": method})
        if path.startswith("/v1/"):
            return self._data_plane(request, path, now)
        return Reply(200, self._key_api(request, path, now))

    def _caller(self, request: Request, path: str, model: str | None, now: datetime) -> Row | None:
        """Find out who asks: a key's row, or None for the holder of the master key."""
        key = request.key
        if key is None:
            raise refusals.unauthorized("Authentication Error, No api key passed in.")
        if key == "":
            said = "Malformed API Key passed in. Ensure Key has `Bearer ` prefix."
            raise refusals.unauthorized(f"Authentication Error, {said}")
        if hmac.compare_digest(key.encode(), self.master_key.encode()):
            return None
        row = self._keys.authenticate(key, path, now)
        self._keys.admit(row, path, model, now)
        return row

    def _data_plane(self, request: Request, path: str, now: datetime) -> Reply:
        body: Json | None = {}
        if request.method == "POST":
            body = _object(request.body)
        model = body.get("model") if body else None
        row = None
        if not self.options.accept_every_key:
            row = self._caller(request, path, model if isinstance(model, str) else None, now)
        if path == "/v1/models":
            names = [name for name in self._models if row is None or row.may_call(name)]
            return Reply(200, replies.models(names, "anthropic-version" in request.headers))
        if body is None:
            said = "Invalid JSON payload"
            raise refusals.refusal(400, "invalid_request_error", said, "request_body")
        replies.check(body)
        tokens = max(1, len(request.body) // 4)
        if path == "/v1/messages/count_tokens":
            return Reply(200, {"input_tokens": tokens})
        if row is not None:
            self._keys.charge(row, now)
        headers = {"request-id": f"req_{secrets.token_hex(12)}"}
        message = replies.message(body, tokens)
        events = tuple(replies.events(message)) if body.get("stream") is True else None
        return Reply(200, message, headers, events)

    def _key_api(self, request: Request, path: str, now: datetime) -> Json:
        row = self._caller(request, path, None, now)
        if path == "/key/info":
            reference = request.query.get("key") or (row.token if row else "")
            return self._keys.info(reference, row, now)
        if row is not None and path == "/key/list":
            said = "You are not authorized to access this endpoint."
            message = f"{said} No 'user_id' is associated with your API key."
            raise refusals.refusal(403, "bad_request_error", message, "user_id")
        if row is not None:
            raise refusals.not_admin(request.path)
        if path == "/key/list":
            return self._keys.list_keys(request.query, now)
        if path == "/key/aliases":
            return self._keys.list_aliases(request.query, now)
        if path == "/key/regenerate":
            said = f"Regenerating Virtual Keys is an Enterprise feature, {refusals.LICENCE}"
            raise refusals.refusal(500, "internal_server_error", said)
        body = _parsed(request.body)
        if path == "/key/generate":
            return self._keys.generate(body, now)
        if path == "/key/delete":
            return self._keys.delete(body, now)
        if path == "/key/update":
            return self._keys.update(body, now)
        return self._keys.block(body, path == "/key/block", now)


def _object(raw: bytes) -> Json | None:
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _parsed(raw: bytes) -> Json:
    if not raw:
        raise invalid(("missing", ["body"], "Field required"))
    try:
        parsed = json.loads(raw)
    except json.JSONDecodeError as error:
        said = "JSON decode error"
        raise invalid(("json_invalid", ["body", error.pos], said)) from error
    except (ValueError, RecursionError) as error:
        raise invalid(("json_invalid", ["body", 0], "JSON decode error")) from error
    if not isinstance(parsed, dict):
        error_body = {"message": "Internal server error", "type": "internal_server_error"}
        raise RefusalError(500, {"error": error_body})
    return parsed
