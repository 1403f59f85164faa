"""A provider that says what a test wants: for lies that no real one can be brought to tell."""

from __future__ import annotations

import json
import ssl
import time
import warnings
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from joserfc import jwt
from joserfc.errors import SecurityWarning
from joserfc.jwk import Key, KeySet, RSAKey

from tests.servers.authority import Certificate
from tests.servers.web import Handler, LoopbackServer


class Liar(LoopbackServer):
    """
    An OpenID provider of a test's own.

    Attributes:
        described: Its discovery document.
        strange: What it publishes before its keys.
        keys: Those that it publishes; tokens are signed with the first one, unless told otherwise.
        answer: Status and body of its next token answers.
        asked: The path of each request, and its form.
        failing: Paths that are answered 503.
        posted_only: A client's secret is taken in the form, and nowhere else.
    """

    def __init__(self, certificate: Certificate | None = None, path: str = "") -> None:
        super().__init__(_Liar)
        self._tls: ssl.SSLContext | None = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate.file, certificate.key)
        self.path = path
        self.issuer = f"http{'s' if certificate else ''}://127.0.0.1:{self.port}{path}"
        self.described: dict[str, Any] = {
            "issuer": self.issuer,
            **{
                f"{name}_endpoint": f"{self.issuer}/{name}"
                for name in ("authorization", "token", "device_authorization", "revocation")
            },
            "jwks_uri": f"{self.issuer}/keys",
            "authorization_response_iss_parameter_supported": True,
        }
        self.strange: list[Any] = []
        self.keys: list[Key] = [RSAKey.generate_key(2048, {"kid": "one", "alg": "RS256"})]
        self.answer: tuple[int, Any] = (200, {})
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.headers: list[Mapping[str, str]] = []
        self.failing: set[str] = set()
        self.posted_only = False

    def get_request(self) -> Any:
        connection, address = super().get_request()
        if self._tls is not None:
            connection = self._tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address

    def id_token(
        self,
        *,
        key: Key | None = None,
        head: Mapping[str, Any] | None = None,
        without: str = "",
        **claims: Any,
    ) -> str:
        """
        Sign an ID token that is right but for what is said here.

        Args:
            key: What it is signed with.
            head: Of its header.
            without: A claim that it has not.
        """
        now = int(time.time())
        right = {"iss": self.issuer, "sub": "ada", "aud": "keybroker", "iat": now, "exp": now + 60}
        whole = {k: v for k, v in {**right, **claims}.items() if k != without}
        header = {"alg": "RS256", "kid": "one", **(head or {})}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SecurityWarning)  # it does not like EdDSA's name
            return jwt.encode(header, whole, key or self.keys[0], algorithms=[str(header["alg"])])

    def count(self, path: str) -> int:
        """How often a path was asked for."""
        return sum(1 for asked, _ in self.asked if asked == path)


class _Liar(Handler):
    server: Liar

    def do_GET(self) -> None:  # noqa: N802, the standard library's name
        liar, path = self.server, self.path
        liar.asked.append((path, {}))
        if path in liar.failing:
            self._say(503, {})
        elif path == f"{liar.path}/.well-known/openid-configuration":
            self._say(200, liar.described)
        elif path.endswith("/keys"):
            known = KeySet(liar.keys).as_dict()
            self._say(200, {"keys": [*liar.strange, *known["keys"]]})
        else:
            self._say(404, {})

    def do_POST(self) -> None:  # noqa: N802
        liar = self.server
        liar.asked.append((self.path, dict(parse_qsl(self.body().decode()))))
        liar.headers.append({name.lower(): value for name, value in self.headers.items()})
        if self.path in liar.failing:
            self._say(503, {})
        elif liar.posted_only and "client_secret" not in liar.asked[-1][1]:
            self._say(401, {"error": "invalid_client"})
        else:
            self._say(*liar.answer)

    def _say(self, status: int, value: Any) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
