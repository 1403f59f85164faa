"""
Stand-ins for who gives a machine a token: GitHub's jobs, and a provider that exchanges JWTs.

Both are held to what is written of them, and refuse what is not so.

See: https://docs.github.com/en/actions/reference/security/oidc; RFC 6749, section 5; RFC 7523;
RFC 8693; OpenID Connect Discovery 1.0.
"""

from __future__ import annotations

import json
import secrets
import time
from base64 import b64decode
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, unquote_plus, urlsplit

from tests.servers.signer import Signer
from tests.servers.web import Handler, LoopbackServer

GRANT = "urn:ietf:params:oauth:grant-type"
TOKEN = "urn:ietf:params:oauth:token-type"
ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
FORM = "application/x-www-form-urlencoded"
Answer = tuple[int, dict[str, Any]]


class Refusal(Exception):  # noqa: N818  # an answer
    """An error as RFC 6749, section 5.2, has it."""

    def __init__(self, error: str, description: str = "", status: int = 400) -> None:
        super().__init__(error)
        self.answer: Answer = status, {"error": error, "error_description": description}


class Exchange(LoopbackServer):
    """
    A provider that trusts the JWTs of some signers, and gives its own tokens for them.

    Attributes:
        trusted: The signers whose JWTs it takes, if they are for its own address.
        clients: The secrets of those that have one, by id.
        seconds: How long its tokens live; None: it does not say, and they are no JWTs.
        audiences: Whom tokens may be for; others are refused.
        give: Makes the token, in place of a JWT of its own.
        kind: What it says that it gave.
        fails: While set, what it answers instead; None ends the connection.
        asked: The forms that came, in order.
    """

    def __init__(self, *trusted: Signer) -> None:
        super().__init__(_Ask)
        self.trusted = list(trusted)
        self.clients: dict[str, str] = {}
        self.seconds: int | None = 600
        self.audiences = {"https://llm.example.com"}
        self.give: Callable[[], str] | None = None
        self.kind = f"{TOKEN}:access_token"
        self.fails: list[Answer | None] = []
        self.asked: list[dict[str, str]] = []
        self.signer = Signer("https://exchange.example")

    @property
    def token_url(self) -> str:
        """Where it gives tokens."""
        return f"{self.url}/token"

    def described(self) -> dict[str, Any]:
        """Say what it is, as a provider does."""
        return {
            "issuer": self.url,
            "token_endpoint": self.token_url,
            "jwks_uri": f"{self.url}/jwks",
            "token_endpoint_auth_methods_supported": ["client_secret_basic", "private_key_jwt"],
        }

    def exchange(self, form: Mapping[str, str], basic: tuple[str, str] | None) -> Answer:
        """Answer a form that was sent to the token endpoint."""
        try:
            who = self._client(form, basic)
            return 200, self._granted(form, who)
        except Refusal as refusal:
            return refusal.answer

    def _client(self, form: Mapping[str, str], basic: tuple[str, str] | None) -> str | None:
        client = form.get("client_id")
        if basic is not None:
            if client not in (None, basic[0]) or self.clients.get(basic[0]) != basic[1]:
                raise Refusal("invalid_client", status=401)
            return basic[0]
        if "client_assertion" in form:
            if form.get("client_assertion_type") != ASSERTION:
                raise Refusal("invalid_request", "unknown client_assertion_type")
            return self._checked(form["client_assertion"], "invalid_client")["sub"]  # type: ignore[no-any-return]
        if client in self.clients:
            raise Refusal("invalid_client", status=401)
        return client

    def _granted(self, form: Mapping[str, str], who: str | None) -> dict[str, Any]:
        grant = form.get("grant_type")
        wanted = form.get("audience", form.get("resource"))
        if grant == f"{GRANT}:token-exchange":
            if form.get("subject_token_type") not in (f"{TOKEN}:jwt", f"{TOKEN}:id_token"):
                raise Refusal("invalid_request", "no subject_token_type that is known here")
            if form.get("requested_token_type", self.kind) != f"{TOKEN}:access_token":
                raise Refusal("invalid_request", "no such requested_token_type")
            subject = self._checked(form.get("subject_token", ""), "invalid_request")["sub"]
            if wanted not in self.audiences:
                raise Refusal("invalid_target")
        elif grant == f"{GRANT}:jwt-bearer":
            subject = self._checked(form.get("assertion", ""), "invalid_grant")["sub"]
        elif grant == "client_credentials":
            subject = who
            if subject is None or "client_secret" in form:
                raise Refusal("invalid_client", status=401)
        else:
            raise Refusal("unsupported_grant_type")
        if form.get("scope") == "everything":
            raise Refusal("invalid_scope")
        answer: dict[str, Any] = {"token_type": "Bearer"}
        if grant == f"{GRANT}:token-exchange":
            answer["issued_token_type"] = self.kind
        if self.seconds is not None:
            answer["expires_in"] = self.seconds
        if self.give is not None:
            return {**answer, "access_token": self.give()}
        opaque = f"opaque-{secrets.token_hex(16)}"
        jwt = self.signer.token(subject, wanted or self.url, self.seconds or 60)
        return {**answer, "access_token": opaque if self.seconds is None else jwt}

    def _checked(self, jwt: str, error: str) -> dict[str, Any]:
        """Return what a JWT says that is for us; RFC 7523, section 3."""
        found = [claims for one in self.trusted if (claims := one.claims(jwt)) is not None]
        for claims in found:
            several = claims["aud"] if isinstance(claims["aud"], list) else [claims["aud"]]
            if {self.url, self.token_url} & set(several) and claims.get("sub"):
                return claims
        raise Refusal(error, "not trusted" if not found else "for somebody else")


class _Endpoint(Handler):
    """What answers with JSON, and knows who asks."""

    def answer(self, status: int, value: Mapping[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def basic(self) -> tuple[str, str] | None:
        """Return the name and the secret of who asks, RFC 6749, section 2.3.1; None: nobody's."""
        kind, _, text = self.headers.get("authorization", "").partition(" ")
        if kind != "Basic":
            return None
        name, _, secret = b64decode(text).decode().partition(":")
        return unquote_plus(name), unquote_plus(secret)


class _Ask(_Endpoint):
    server: Exchange

    def do_GET(self) -> None:  # noqa: N802, the standard library's name
        if self.path == "/.well-known/openid-configuration":
            self.answer(200, self.server.described())
        else:
            self.answer(404, {})

    def do_POST(self) -> None:  # noqa: N802, the standard library's name
        body = self.body().decode()
        sent = parse_qs(body, keep_blank_values=True, strict_parsing=True)
        form = {name: values[0] for name, values in sent.items()}
        self.server.asked.append(form)
        if self.server.fails:
            failed = self.server.fails[0]
            if failed is None:
                self.close_connection = True
                return
            self.answer(*failed)
            return
        twice = any(len(values) > 1 for values in sent.values())
        if self.path != "/token" or self.headers["content-type"] != FORM or twice:
            self.answer(400, {"error": "invalid_request"})
            return
        self.answer(*self.server.exchange(form, self.basic()))


class Actions(LoopbackServer):
    """
    GitHub's server for its jobs: it says in a JWT which job asks.

    Attributes:
        secret: What a job has to show.
        subject: Who it says that the job is.
        seconds: How long its JWTs live.
        fails: While set, what it answers instead.
        asked: How often it was.
    """

    def __init__(self, subject: str = "repo:acme/app:ref:refs/heads/main") -> None:
        super().__init__(_Job)
        self.signer = Signer("https://token.actions.githubusercontent.com", "RS256")
        self.secret = secrets.token_urlsafe(48)
        self.subject = subject
        self.seconds = 300
        self.fails: list[Answer] = []
        self.asked = 0

    @property
    def variables(self) -> dict[str, str]:
        """What a job that may ask has in its environment."""
        return {
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.url}/idtoken/1?api-version=2.0",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": self.secret,
        }


class _Job(_Endpoint):
    server: Actions

    def do_GET(self) -> None:  # noqa: N802, the standard library's name
        server, url = self.server, urlsplit(self.path)
        query = parse_qs(url.query, strict_parsing=True)
        server.asked += 1
        if server.fails:
            self.answer(*server.fails[0])
        elif url.path != "/idtoken/1" or query.get("api-version") != ["2.0"]:
            self.answer(404, {"message": "Not Found"})
        elif self.headers["authorization"] != f"Bearer {server.secret}":
            self.answer(401, {"message": "Unauthorized"})
        else:
            [audience] = query.get("audience", ["https://github.com/acme"])
            more = {"repository": "acme/app", "jti": secrets.token_hex(16), "at": time.time()}
            jwt = server.signer.token(server.subject, audience, server.seconds, **more)
            self.answer(200, {"count": len(jwt), "value": jwt})
