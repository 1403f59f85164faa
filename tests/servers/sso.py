"""
A stand-in for the two parts of IAM Identity Center that keep a signed-in user going.

    POST /token                        a new access token for a refresh token
    GET  /federation/credentials       credentials of a role for an access token

Signing in itself is a browser's; `write` leaves behind what it would.

See: https://docs.aws.amazon.com/singlesignon/latest/OIDCAPIReference/API_CreateToken.html
See: https://docs.aws.amazon.com/singlesignon/latest/PortalAPIReference/API_GetRoleCredentials.html
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha1
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.servers.aws import REGION, Keys
from tests.servers.web import Handler, LoopbackServer

_START_URL = "https://corp.example/start"


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
        self._access = {secrets.token_hex(16)}
        self._refresh = {secrets.token_hex(16)}

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
            f"sso_start_url = {_START_URL}\n"
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
            "startUrl": _START_URL,
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

    def token(self, asked: dict[str, Any]) -> tuple[int, str, dict[str, Any]]:
        """Answer a refresh; returns the status, the error's code and the body."""
        self.refreshes += 1
        if asked.get("grantType") != "refresh_token":
            return 400, "UnsupportedGrantTypeException", {"error": "unsupported_grant_type"}
        if self.refresh_has_expired or asked.get("refreshToken") not in self._refresh:
            text = "Invalid refresh token provided"
            refusal = {"error": "invalid_grant", "error_description": text}
            return 400, "InvalidGrantException", refusal
        access, refresh = secrets.token_hex(16), secrets.token_hex(16)
        self._access.add(access)
        self._refresh.add(refresh)
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
        body = self.body()
        if self.path == "/token":
            self._send(lambda: self.server.token(json.loads(body)))
        else:
            self._send(lambda: (404, "UnknownOperationException", {}))

    def do_GET(self) -> None:  # noqa: N802
        where = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(where.query).items()}
        token = self.headers.get("x-amz-sso_bearer_token", "")
        if where.path == "/federation/credentials":
            self._send(
                lambda: self.server.credentials(
                    token, asked.get("account_id", ""), asked.get("role_name", "")
                )
            )
        else:
            self._send(lambda: (404, "UnknownOperationException", {}))

    def _send(self, answer: Callable[[], tuple[int, str, dict[str, Any]]]) -> None:
        if self.server.is_down:
            self.close_connection = True
            return
        status, code, said = answer()
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        if code:
            self.send_header("x-amzn-errortype", code)
        self.end_headers()
        self.wfile.write(body)
