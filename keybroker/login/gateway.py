"""A gateway's own sign-in: what /login of Claude Code does with one, and its session as the key.

One client for Anthropic's gateway, LiteLLM and Bifrost, which differ: a code that is asked for too
soon is a 429 or a 400, a refresh token that has ended a 401 or a 400, and none wants a `client_id`.

See: `GET /protocol` of `claude gateway`; RFC 8414 (where everything is), RFC 8628 (the code).
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from keybroker.errors import SourceInvalid
from keybroker.login.oauth import Client, Granted, Refused, as_error
from keybroker.login.provider import DEVICE, Base, Device, plain, said
from keybroker.login.tokens import Tokens
from keybroker.signin import SignIn
from keybroker.sources.http import Http

DESCRIBED = "/.well-known/oauth-authorization-server"
# Where an endpoint is that a gateway does not name, or not at its own address.
USUAL = {
    "device_authorization_endpoint": "/oauth/device_authorization",
    "token_endpoint": "/oauth/token",
}
ENDED = frozenset({"invalid_grant", "access_denied", "expired_token"})


class Gateway(Base):
    """What is below the address that Claude Code is pointed at."""

    def __init__(self, sign_in: SignIn, environment: Mapping[str, str]) -> None:
        super().__init__(sign_in, environment)
        self._url: str = self._settings["url"]
        self._client = Client(self._who, self._settings["client_id"])
        self._known: dict[str, Any] | None = None

    @property
    def flows(self) -> tuple[str, ...]:
        return (DEVICE,)

    def device(self) -> Device:
        """Begin a sign-in by device code; see `Provider`."""
        start, token = (self._at(name) for name in USUAL)
        return self._client.device(start, token, self._tokens, surface="keybroker")

    def refresh(self, tokens: Tokens) -> Tokens:
        """Have a new token; see `Provider`."""
        assert tokens.refresh is not None, "who has none does not ask"
        http, path = self._at("token_endpoint")
        try:
            granted = self._client.refresh(http, path, tokens.refresh)
        except Refused as refused:
            if refused.error in ENDED or refused.status == 401:
                raise self._needed(f"{http.host} has ended the sign-in") from None
            raise as_error(refused, self._who, http.host, "renew the token") from None
        return self._again(
            tokens, granted.access, granted.asked_at, granted.life, refresh=granted.refresh
        )

    def revoke(self, tokens: Tokens) -> bool:
        """End a sign-in where the gateway knows how; the refresh token first, it lives longer."""
        url = self._named("revocation_endpoint")
        if url is None:
            return False
        http = self._http(url, "url")
        if tokens.refresh is not None:
            self._client.revoke(http, "", tokens.refresh, "refresh_token")
        self._client.revoke(http, "", tokens.access, "access_token")
        return True

    def _tokens(self, granted: Granted) -> Tokens:
        from keybroker.login.jwt import read_claims  # of no use to a renewal

        values = granted.values
        claims = read_claims(str(values["access_token"])) or {}
        who = (values.get("email"), values.get("user_id"), claims.get("email"))
        return self._made(
            granted.access,
            granted.asked_at,
            granted.life,
            who=next(filter(None, map(said, who)), ""),
            refresh=granted.refresh,
        )

    def _at(self, name: str) -> tuple[Http, str]:
        return self._http(self._named(name) or f"{self._url}{USUAL[name]}", "url"), ""

    def _named(self, name: str) -> str | None:
        """Return an endpoint that is at the gateway's own address; None: there is none."""
        url = self._described().get(name)
        return url if isinstance(url, str) and _origin(url) == _origin(self._url) else None

    def _described(self) -> Mapping[str, Any]:
        if self._known is None:
            http = self._http(self._url, "url")
            reply = http.call("GET", DESCRIBED)
            found = plain(reply.value)
            if reply.status == 404 or (reply.status == 200 and "token_endpoint" not in found):
                raise SourceInvalid(
                    f"{self._who}: {http.host} has no sign-in for Claude Code at this address "
                    f"({reply.status})",
                    hint="see url: /claude_code_gateway at LiteLLM, with "
                    "enable_claude_code_gateway; /claude-code at Bifrost; nothing after the host "
                    "at claude gateway",
                )
            if reply.status != 200:
                raise self._trouble(reply, http.host, "describe itself")
            self._known = found
        return self._known


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    try:
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        port = None
    return parts.scheme, parts.hostname, port
