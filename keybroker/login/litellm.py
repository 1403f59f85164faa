"""LiteLLM's own sign-in: in a browser with PKCE, renewed by itself; or with a code, for a day.

Either gives a token of the proxy's that makes keys of the person's own at its key API.

See: `/.well-known/litellm-cli-auth` of a proxy, which says where all is; RFC 7591 (a client that
registers itself). The code is older, and LiteLLM's alone: `POST /sso/cli/start`, then polls.
"""

from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any
from urllib.parse import quote, urlencode

from keybroker.credential import Secret
from keybroker.errors import SourceError, SourceInvalid, SourceUnavailable
from keybroker.login.oauth import Client, Granted, Refused, as_error, code_of
from keybroker.login.provider import (
    BROWSER,
    DEVICE,
    Base,
    Device,
    Visit,
    plain,
    said,
    seconds,
    unguessable,
)
from keybroker.login.tokens import Tokens
from keybroker.signin import SignIn
from keybroker.sources.http import Http, Reply

DESCRIBED = "/.well-known/litellm-cli-auth"
VERSION = 1  # of that description
START, PAGE, POLL = "/sso/cli/start", "/sso/key/generate", "/sso/cli/poll"
CODE_LASTS = timedelta(hours=24)  # unless LITELLM_CLI_JWT_EXPIRATION_HOURS says otherwise
INTERVAL = 2.0  # seconds between two polls; the proxy says nothing of them
ENDED = frozenset({"invalid_grant", "invalid_client", "unauthorized_client"})


class LiteLLM(Base):
    """A proxy where people sign in with their company's sign-in."""

    def __init__(self, sign_in: SignIn, environment: Mapping[str, str]) -> None:
        super().__init__(sign_in, environment)
        self._url: str = self._settings["url"]
        self._proxy = self._http(self._url, "url")
        self._known: Mapping[str, Any] | None = None

    @property
    def flows(self) -> tuple[str, ...]:
        return (BROWSER, DEVICE) if self._description() else (DEVICE,)

    def browser(self, redirect: str) -> Visit:
        """Begin a sign-in by code and PKCE, as a client registered for it; see `Provider`."""
        registered, resource = self._register(redirect), self._named("resource")
        client, state, verifier = Client(self._who, registered), unguessable(), unguessable()
        page = self._named("authorization_endpoint")
        url = client.address(page, redirect, state=state, verifier=verifier, resource=resource)

        def redeem(answer: Mapping[str, str]) -> Tokens:
            http = self._at("token")
            code = code_of(answer, self._who, http.host)
            try:
                granted = client.redeem(http, "", code, redirect, verifier, resource=resource)
            except Refused as refused:
                raise as_error(refused, self._who, http.host, "sign in", person=True) from None
            return self._tokens(granted, registered)

        return Visit(url, state, redeem)

    def device(self) -> Device:
        """Begin a sign-in with a code, in the proxy's own way; see `Provider`."""
        reply = self._proxy.call("POST", START)
        found = plain(reply.value)
        if reply.status == 429:
            raise SourceUnavailable(
                f"{self._who}: {self._proxy.host} asks to wait (429)",
                hint="try again in a minute",
                retry_after=reply.retry_after,
            )
        if reply.status >= 500:
            raise self._trouble(reply, self._proxy.host, "give a code")
        names = ("login_id", "poll_secret", "user_code")
        login, secret, code = (found.get(name) for name in names)
        lasts = seconds(found.get("expires_in"))
        if reply.status != 200 or not (login and secret and code) or lasts is None:
            raise SourceInvalid(
                f"{self._who}: {self._proxy.host} has no sign-in with a code ({reply.status})",
                hint="is this address a LiteLLM proxy with SSO? see url",
            )
        page = f"{self._url}{PAGE}?{urlencode({'source': 'litellm-cli', 'key': str(login)})}"
        whole = found.get("verification_uri_complete")
        return Device(
            page,
            said(code),
            INTERVAL,
            lasts.total_seconds(),
            lambda pace: self._poll(f"{POLL}/{quote(str(login), safe='')}", str(secret), pace),
            whole if isinstance(whole, str) else "",
        )

    def refresh(self, tokens: Tokens) -> Tokens:
        """Have a new token; see `Provider`."""
        assert tokens.refresh is not None, "who has none does not ask"
        client, http = Client(self._who, tokens.extra["client_id"]), self._at("token")
        resource = self._named("resource")
        try:
            granted = client.refresh(http, "", tokens.refresh, resource=resource)
        except Refused as refused:
            if refused.error in ENDED:
                raise self._needed(f"{http.host} has ended the sign-in") from None
            raise as_error(refused, self._who, http.host, "renew the token") from None
        return self._again(
            tokens, granted.access, granted.asked_at, granted.life, refresh=granted.refresh
        )

    def revoke(self, tokens: Tokens) -> bool:
        """End a sign-in; one with a code only ends by itself."""
        if tokens.refresh is None:
            return False
        client = Client(self._who, tokens.extra["client_id"])
        client.revoke(self._at("revocation"), "", tokens.refresh, "refresh_token")
        return True

    # with a browser

    def _description(self) -> Mapping[str, Any]:
        """Return what the proxy says of its sign-in; an empty one where it is too old for it."""
        if self._known is None:
            reply = self._proxy.call("GET", DESCRIBED)
            if reply.status not in (200, 404):
                raise self._trouble(reply, self._proxy.host, "describe its sign-in")
            found = plain(reply.value)
            self._known = found if found.get("contract_version") == VERSION else {}
        return self._known

    def _named(self, name: str) -> str:
        """Return an address of the description, which is only taken from the proxy it is about."""
        known, host = self._description(), self._proxy.host
        if known.get("issuer") and str(known["issuer"]).rstrip("/") != self._url:
            raise SourceInvalid(
                f"{self._who}: {host} calls itself something else than url",
                hint="write url as PROXY_BASE_URL of the proxy has it; with a code it works as it "
                f"is: keybroker login --device {self._sign_in.name}",
            )
        url = known.get(name)
        if not isinstance(url, str) or not f"{url}/".startswith(f"{self._url}/"):
            raise SourceInvalid(f"{self._who}: {host} names no {name} of its own")
        return url

    def _at(self, name: str) -> Http:
        return self._http(self._named(f"{name}_endpoint"), "url")

    def _register(self, redirect: str) -> str:
        """Have the proxy know a client that may be sent back to an address; return its id."""
        http = self._at("registration")
        wish = {
            "client_name": "keybroker",
            "redirect_uris": [redirect],
            "grant_types": ["authorization_code", "refresh_token"],
            "response_types": ["code"],
            "token_endpoint_auth_method": "none",
        }
        reply = http.call("POST", "", body=wish)
        registered = plain(reply.value).get("client_id")
        if reply.status not in (200, 201) or not isinstance(registered, str):
            raise self._trouble(reply, http.host, "register a client")
        return registered

    # with a code

    def _poll(self, path: str, secret: str, interval: float) -> Tokens | float:
        """Ask whether the code was typed; then choose the team, where there is a choice."""
        headers = {"x-litellm-cli-poll-secret": secret}
        try:
            reply = self._proxy.call("GET", path, headers=headers)
            found = self._polled(reply)
            if found.get("requires_team_selection") is True:
                team = {"team_id": self._team(found)}
                reply = self._proxy.call("GET", path, query=team, headers=headers)
                found = self._polled(reply)
        except SourceUnavailable:
            return min(60.0, 2 * interval)
        if found.get("status") == "pending":
            return interval
        access = self._secret(found.get("key"), "token")
        life: timedelta = self._settings["lasts"] or CODE_LASTS
        return self._made(access, reply.asked_at, life, who=self._person(access, found))

    def _polled(self, reply: Reply) -> dict[str, Any]:
        found = plain(reply.value)
        if reply.status == 429 or reply.status >= 500:
            raise self._trouble(reply, self._proxy.host, "say whether the code was typed")
        if reply.status == 200 and found.get("status") in ("pending", "ready"):
            return found
        raise SourceInvalid(
            f"{self._who}: {self._proxy.host} does not know the code any more ({reply.status})",
            hint=f"run: keybroker login {self._sign_in.name}; a proxy of several replicas needs "
            "Redis for this",
        )

    def _team(self, found: Mapping[str, Any]) -> str:
        """Return the team that is meant, of those that somebody is in."""
        rows = [plain(row) for row in found.get("team_details") or []]
        teams = {said(row.get("team_id")): said(row.get("team_alias")) for row in rows}
        wanted = self._settings["team"]
        for team, name in teams.items():
            if wanted in (team, name):
                return team
        known = ", ".join(f"{team} ({name})" if name else team for team, name in teams.items())
        problem = "several teams" if wanted is None else "no team of this name"
        raise SourceInvalid(
            f"{self._who}: you are in {problem} there",
            hint=f"set team in [logins.{self._sign_in.name}] to one of {known}",
        )

    # reading

    def _tokens(self, granted: Granted, registered: str) -> Tokens:
        return self._made(
            granted.access,
            granted.asked_at,
            granted.life,
            who=self._person(granted.access, granted.values),
            refresh=granted.refresh,
            extra={"client_id": registered},
        )

    def _person(self, access: Secret, granted: Mapping[str, Any]) -> str:
        """Return the person's address where the proxy has one, else what it calls them."""
        headers = {"authorization": f"Bearer {access.reveal()}"}
        found: Any = None
        with suppress(SourceError):
            found = plain(self._proxy.call("GET", "/user/info", headers=headers).value)
        email = plain(plain(found).get("user_info")).get("user_email")
        return said(email) or said(granted.get("user_id"))
