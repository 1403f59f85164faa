"""
A stand-in for IAM Identity Center: who signs in there, and goes on.

    POST /client/register              a client
    POST /device_authorization         a code that a person types
    GET, POST /device                  the page where they do
    POST /token                        an access token for that, or for a refresh token
    GET  /federation/credentials       credentials of a role for an access token
    POST /logout                       the end of an access token, and of what renews it

`write` leaves behind what AWS's own program does when somebody has signed in.

See: https://docs.aws.amazon.com/singlesignon/latest/OIDCAPIReference/API_CreateToken.html
See: https://docs.aws.amazon.com/singlesignon/latest/PortalAPIReference/API_GetRoleCredentials.html
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha1
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.servers.aws import REGION, Keys
from tests.servers.web import Handler, LoopbackServer

START_URL = "https://corp.example/start"
_DEVICE = "urn:ietf:params:oauth:grant-type:device_code"
_PAGE = (
    '<form method="post" action="/device"><input name="user_code" value="{code}">'
    '<button name="answer" value="allow">Allow</button>'
    '<button name="answer" value="deny">Deny</button></form>'
)


@dataclass(slots=True)
class _Device:
    """A code that was given to a client, and what came of it."""

    client: str
    typed: str
    until: float
    answer: str = ""
    asked_at: float = 0.0


class Sso(LoopbackServer):
    """
    Gives role credentials to whoever has an access token, as a context.

    Args:
        issue: Makes credentials of the role, which an `Aws` takes.
        account: Of the role.
        role: Its name.

    Attributes:
        session: What the configuration calls the sign-in.
        profile: What it calls the role.
        seconds: How long a new access token lives.
        is_down: While true, it ends connections without an answer.
        refuses: While true, no access token is good: 401.
        refresh_has_expired: While true, no refresh token is good.
        refreshes: How many new access tokens were asked for.
        handed_out: How many role credentials were given.
        interval: Seconds that have to be between two asks for a code.
        code_seconds: How long a code is good.
        clients: Those that were registered: secrets by names of theirs.
        scopes: What the last client was registered for.
        signed_out: How many access tokens were ended by who had them.
    """

    def __init__(self, issue: Callable[[], Keys], account: str, role: str) -> None:
        super().__init__(_Answer)
        self._issue = issue
        self.account = account
        self.role = role
        self.session = self.profile = "corp"
        self.seconds = 3600
        self.is_down = False
        self.refuses = False
        self.refresh_has_expired = False
        self.refreshes = 0
        self.handed_out = 0
        self.interval = 1
        self.code_seconds = 600
        self.clients = {"client": "its-secret"}
        self.scopes: list[str] = []
        self.signed_out = 0
        self._devices: dict[str, _Device] = {}
        self._access = {secrets.token_hex(16)}
        self._refresh = {secrets.token_hex(16)}
        self._renews = {next(iter(self._access)): next(iter(self._refresh))}

    def environment(self, home: Path) -> dict[str, str]:
        """What a client needs besides a HOME that `write` has written to."""
        return {
            "AWS_PROFILE": self.profile,
            "AWS_CONFIG_FILE": str(home / ".aws" / "config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(home / ".aws" / "credentials"),
            "AWS_ENDPOINT_URL_SSO": self.url,
            "AWS_ENDPOINT_URL_SSO_OIDC": self.url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def write(
        self,
        home: Path,
        lifetime: timedelta = timedelta(hours=1),
        registration: timedelta = timedelta(days=90),
        *,
        refresh: bool = True,
    ) -> Path:
        """
        Write the configuration, and what a sign-in leaves behind; returns the file of the latter.

        Args:
            home: A HOME.
            lifetime: Of the access token that is there; a negative one has ended.
            registration: Of the client that may refresh it.
            refresh: Whether there is a refresh token.
        """
        folder = home / ".aws"
        cache = folder / "sso" / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        (folder / "config").write_text(
            f"[sso-session {self.session}]\n"
            f"sso_start_url = {START_URL}\n"
            f"sso_region = {REGION}\n"
            f"sso_registration_scopes = sso:account:access\n"
            f"[profile {self.profile}]\n"
            f"sso_session = {self.session}\n"
            f"sso_account_id = {self.account}\n"
            f"sso_role_name = {self.role}\n"
            f"region = {REGION}\n"
        )
        now = datetime.now(UTC)
        token = {
            "startUrl": START_URL,
            "region": REGION,
            "accessToken": next(iter(self._access)),
            "expiresAt": f"{now + lifetime:%Y-%m-%dT%H:%M:%SZ}",
            "clientId": "client",
            "clientSecret": "its-secret",
            "registrationExpiresAt": f"{now + registration:%Y-%m-%dT%H:%M:%SZ}",
        }
        if refresh:
            token["refreshToken"] = next(iter(self._refresh))
        file = cache / f"{sha1(self.session.encode(), usedforsecurity=False).hexdigest()}.json"
        file.write_text(json.dumps(token))
        file.chmod(0o600)
        return file

    def register(self, asked: dict[str, Any]) -> tuple[int, str, dict[str, Any]]:
        """Answer who wants to be a client; returns the status, the error's code and the body."""
        if asked.get("clientType") != "public" or not asked.get("clientName"):
            return 400, "InvalidClientMetadataException", {"error": "invalid_client_metadata"}
        name, secret = secrets.token_urlsafe(16), f"client-{secrets.token_hex(40)}"
        self.clients[name] = secret
        self.scopes = asked.get("scopes", [])
        now = datetime.now(UTC)
        said = {
            "clientId": name,
            "clientSecret": secret,
            "clientIdIssuedAt": int(now.timestamp()),
            "clientSecretExpiresAt": int((now + timedelta(days=90)).timestamp()),
        }
        return 200, "", said

    def authorize(self, asked: dict[str, Any]) -> tuple[int, str, dict[str, Any]]:
        """Answer who wants a code that a person types."""
        if not self._knows(asked):
            return 401, "InvalidClientException", {"error": "invalid_client"}
        if asked.get("startUrl") != START_URL:
            return 400, "InvalidRequestException", {"error": "invalid_request"}
        code, typed = secrets.token_urlsafe(32), f"{secrets.token_hex(2)}-{secrets.token_hex(2)}"
        until = time.monotonic() + self.code_seconds
        self._devices[code] = _Device(str(asked["clientId"]), typed.upper(), until)
        said = {
            "deviceCode": code,
            "userCode": typed.upper(),
            "verificationUri": f"{self.url}/device",
            "verificationUriComplete": f"{self.url}/device?user_code={typed.upper()}",
            "expiresIn": self.code_seconds,
            "interval": self.interval,
        }
        return 200, "", said

    def type(self, code: str, answer: str) -> bool:
        """Have a person say what they think of a code; say whether there is one."""
        for device in self._devices.values():
            if device.typed == code:
                device.answer = answer
                return True
        return False

    def sign_out(self, token: str) -> tuple[int, str, dict[str, Any]]:
        """Answer who ends a session."""
        if token not in self._access:
            text = "Session token not found or invalid"
            return 401, "UnauthorizedException", {"message": text}
        self._access.discard(token)
        self._refresh.discard(self._renews.get(token, ""))
        self.signed_out += 1
        return 200, "", {}

    def token(self, asked: dict[str, Any]) -> tuple[int, str, dict[str, Any]]:
        """Answer who wants an access token; returns the status, the error's code and the body."""
        if not self._knows(asked):
            return 401, "InvalidClientException", {"error": "invalid_client"}
        if asked.get("grantType") == _DEVICE:
            return self._typed(asked)
        self.refreshes += 1
        if asked.get("grantType") != "refresh_token":
            return 400, "UnsupportedGrantTypeException", {"error": "unsupported_grant_type"}
        if self.refresh_has_expired or asked.get("refreshToken") not in self._refresh:
            text = "Invalid refresh token provided"
            refusal = {"error": "invalid_grant", "error_description": text}
            return 400, "InvalidGrantException", refusal
        return self._granted()

    def _knows(self, asked: dict[str, Any]) -> bool:
        return self.clients.get(str(asked.get("clientId"))) == asked.get("clientSecret")

    def _typed(self, asked: dict[str, Any]) -> tuple[int, str, dict[str, Any]]:
        """Answer who waits for a person to type a code."""
        device = self._devices.get(str(asked.get("deviceCode")))
        if device is None or device.client != asked["clientId"]:
            return 400, "InvalidGrantException", {"error": "invalid_grant"}
        now, before = time.monotonic(), device.asked_at
        device.asked_at = now
        if now > device.until:
            return 400, "ExpiredTokenException", {"error": "expired_token"}
        if device.answer == "deny":
            return 400, "AccessDeniedException", {"error": "access_denied"}
        if now - before < 0.9 * self.interval:
            return 400, "SlowDownException", {"error": "slow_down"}
        if not device.answer:
            return 400, "AuthorizationPendingException", {"error": "authorization_pending"}
        del self._devices[str(asked["deviceCode"])]
        return self._granted()

    def _granted(self) -> tuple[int, str, dict[str, Any]]:
        access, refresh = secrets.token_hex(16), secrets.token_hex(16)
        self._access.add(access)
        self._refresh.add(refresh)
        self._renews[access] = refresh
        said = {
            "accessToken": access,
            "expiresIn": self.seconds,
            "refreshToken": refresh,
            "tokenType": "Bearer",
        }
        return 200, "", said

    def credentials(self, token: str, account: str, role: str) -> tuple[int, str, dict[str, Any]]:
        """Answer who asks for a role; returns the status, the error's code and the body."""
        if self.refuses or token not in self._access:
            text = "Session token not found or invalid"
            return 401, "UnauthorizedException", {"message": text}
        if (account, role) != (self.account, self.role):
            return 403, "ForbiddenException", {"message": "No access"}
        self.handed_out += 1
        keys = self._issue()
        assert keys.expiration
        said = {
            "accessKeyId": keys.access_key,
            "secretAccessKey": keys.secret_key,
            "sessionToken": keys.session_token,
            "expiration": int(keys.expiration.timestamp() * 1000),
        }
        return 200, "", {"roleCredentials": said}


class _Answer(Handler):
    server: Sso

    def do_POST(self) -> None:  # noqa: N802, the standard library's names
        body, server = self.body(), self.server
        if self.path == "/device":
            typed = {name: values[0] for name, values in parse_qs(body.decode()).items()}
            known = server.type(typed.get("user_code", ""), typed.get("answer", ""))
            self._page("Thank you" if known else "There is no such code", 200 if known else 400)
            return
        answers = {
            "/client/register": server.register,
            "/device_authorization": server.authorize,
            "/token": server.token,
        }
        if self.path in answers:
            self._send(lambda: answers[self.path](json.loads(body)))
        elif self.path == "/logout":
            self._send(lambda: server.sign_out(self.headers.get("x-amz-sso_bearer_token", "")))
        else:
            self._send(lambda: (404, "UnknownOperationException", {}))

    def do_GET(self) -> None:  # noqa: N802
        where = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(where.query).items()}
        token = self.headers.get("x-amz-sso_bearer_token", "")
        if where.path == "/device":
            self._page(_PAGE.format(code=asked.get("user_code", "")), 200)
        elif where.path == "/federation/credentials":
            self._send(
                lambda: self.server.credentials(
                    token, asked.get("account_id", ""), asked.get("role_name", "")
                )
            )
        else:
            self._send(lambda: (404, "UnknownOperationException", {}))

    def _page(self, text: str, status: int) -> None:
        self._write(status, text.encode(), {"content-type": "text/html"})

    def _send(self, answer: Callable[[], tuple[int, str, dict[str, Any]]]) -> None:
        if self.server.is_down:
            self.close_connection = True
            return
        status, code, said = answer()
        kind = {"x-amzn-errortype": code} if code else {}
        self._write(status, json.dumps(said).encode(), {"content-type": "application/json", **kind})

    def _write(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
