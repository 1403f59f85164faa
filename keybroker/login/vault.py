"""Vault and OpenBao: their `oidc` method, in a browser or with a code; the token is what is kept.

Vault is the client of the provider: it says where a person signs in, and takes the code.

See: https://developer.hashicorp.com/vault/api-docs/auth/jwt, https://openbao.org/api-docs/auth/jwt
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from keybroker.credential import Secret
from keybroker.errors import ConfigError, SourceInvalid, SourceUnavailable
from keybroker.login.oauth import code_of
from keybroker.login.provider import (
    BROWSER,
    DEVICE,
    LONGEST_WAIT,
    SLOWER,
    Base,
    Device,
    Visit,
    seconds,
    unguessable,
)
from keybroker.login.provider import said as shown
from keybroker.login.tokens import Tokens
from keybroker.signin import SignIn
from keybroker.sources.http import Reply
from keybroker.sources.vault.refusals import refusal
from keybroker.sources.vault.server import Call, Server, part, renewed, said
from keybroker.values import replace
from keybroker.vault import PLACE, Vault

BACK = "/oidc/callback"  # of the redirect address that Vault's own program has


class VaultLogin(Base):
    """A Vault where people sign in with the company's provider."""

    def __init__(self, sign_in: SignIn, environment: Mapping[str, str]) -> None:
        super().__init__(sign_in, environment)
        place = {name: self._settings[name] for name in PLACE}
        auth = {"mount": self._settings["mount"]}
        self._vault = Vault(**place, method="oidc", auth=auth, raw={})
        self._server = Server(self._vault, self._settings["timeout"].total_seconds())
        self._path = f"auth/{auth['mount']}/oidc"
        self._nonce = unguessable()  # of ours, without which nobody else has the token
        self._begun: Mapping[str, Any] = {}

    @property
    def flows(self) -> tuple[str, ...]:
        """The one way that the role has."""
        return (DEVICE,) if "poll_interval" in self._asked() else (BROWSER,)

    @property
    def redirect(self) -> tuple[str, int, str]:
        return "localhost", self._settings["port"], BACK

    def browser(self, redirect: str) -> Visit:
        """Begin a sign-in that comes back here; see `Provider`."""
        del redirect  # it was asked for already
        url = self._asked()["auth_url"]
        state, nonce = (_parameter(url, name) for name in ("state", "nonce"))
        if not state:
            raise self._odd()

        def redeem(answer: Mapping[str, str]) -> Tokens:
            given = {
                "state": state,
                "code": code_of(answer, self._who, "the provider"),
                "nonce": nonce,
                "client_nonce": self._nonce,
            }
            reply = self._ask(
                lambda client: client.adapter.get(f"/v1/{self._path}/callback", params=given),
                makes=True,
            )
            return self._tokens(reply)

        return Visit(url, state, redeem)

    def device(self) -> Device:
        """Begin a sign-in with a code, which OpenBao knows; see `Provider`."""
        asked = self._asked()
        url, state, code = asked["auth_url"], asked.get("state"), asked.get("user_code")
        interval = seconds(asked["poll_interval"])
        if not isinstance(state, str) or interval is None:
            raise self._odd()
        if _parameter(url, "redirect_uri"):
            raise ConfigError(
                f"{self._who}: nobody signs in here by a role with callback_mode = direct",
                hint="set its callback_mode to client or device",
            )
        whole = _parameter(url, "user_code")
        given = {"state": state, "client_nonce": self._nonce}

        def poll(interval: float) -> Tokens | float:
            try:
                reply = self._ask(
                    lambda client: client.write_data(f"{self._path}/poll", data=given), makes=True
                )
            except SourceUnavailable:
                return min(60.0, 2 * interval)
            text = said(reply) if reply.status == 400 else ""
            if "authorization_pending" in text:
                return interval
            if "slow_down" in text:
                return interval + SLOWER
            return self._tokens(reply)

        return Device(
            url.partition("?")[0] if whole else url,
            whole or shown(code),
            interval.total_seconds(),
            LONGEST_WAIT.total_seconds(),
            poll,
            url if whole else "",
        )

    def refresh(self, tokens: Tokens) -> Tokens:
        """Have the token renewed; see `Provider`."""
        standing = tokens.standing
        assert standing.access_ends is not None, "one without an end is not renewed"
        asked = standing.access_ends - standing.refreshed_at
        wish = f"{max(1, round(asked.total_seconds()))}s"
        reply = self._ask(
            lambda client: client.auth.token.renew_self(increment=wish), tokens.access
        )
        if reply.status in (401, 403) and not self._looked(tokens.access):
            raise self._needed("Vault has ended the token")
        got, more = renewed(reply, asked)
        if got is not None:
            tokens = self._again(tokens, tokens.access, reply.asked_at, got, refresh=None)
        if more:
            return tokens
        return replace(tokens, standing=replace(tokens.standing, renewable=False), refresh=None)

    def revoke(self, tokens: Tokens) -> bool:
        """Have the token ended, and all that was leased with it; see `Provider`."""
        reply = self._ask(lambda client: client.auth.token.revoke_self(), tokens.access)
        if reply.status < 300 or not self._looked(tokens.access):
            return True
        raise SourceInvalid(
            f"{self._who}: {self._server.host} did not end the token ({reply.status})",
            hint="its policy has to allow auth/token/revoke-self",
        )

    def together(self) -> None:
        super().together()
        self._server.begin()

    def close(self) -> None:
        super().close()
        self._server.close()

    # asking

    def _ask(self, call: Call, token: Secret | None = None, *, makes: bool = False) -> Reply:
        if self._until is None:
            self._server.begin()
        return self._server.ask(call, token, makes=makes)

    def _asked(self) -> Mapping[str, Any]:
        """Return where a person signs in, and how; it is asked for once."""
        if not self._begun:
            host, port, path = self.redirect
            wanted = {
                "role": self._settings["role"],
                "redirect_uri": f"http://{host}:{port}{path}",
                "client_nonce": self._nonce,
            }
            reply = self._ask(
                lambda client: client.write_data(f"{self._path}/auth_url", data=wanted)
            )
            if reply.status != 200:
                raise refusal(self._vault, self._server.host, reply)
            found = part(reply, "data")
            if not isinstance(found.get("auth_url"), str):
                raise self._odd()
            if not found["auth_url"]:
                raise ConfigError(
                    f"{self._who}: the role does not take {wanted['redirect_uri']}",
                    hint="add it to its allowed_redirect_uris, or set port",
                )
            self._begun = found
        return self._begun

    def _tokens(self, reply: Reply) -> Tokens:
        """Return what a sign-in gave, and whose it is."""
        if reply.status != 200:
            raise refusal(self._vault, self._server.host, reply)
        auth = part(reply, "auth")
        if not auth.get("client_token"):
            problem = "signed in, but there is no token"
            hint = "a second factor, should Vault want one, cannot be given"
            raise SourceInvalid(f"{self._who}: {problem}", hint=hint)
        token = self._secret(auth["client_token"], "token")
        life = seconds(auth.get("lease_duration"))
        data = self._looked(token)
        # one that may not look at itself cannot be told from a dead one later
        renewable = life is not None and auth.get("renewable") is True and bool(data)
        space, mount = self._settings["namespace"], f"{self._settings['mount']}-"
        before = mount if space is None else f"{space}-auth-{mount}"
        who = shown(data.get("display_name")).removeprefix(before.replace("/", "-"))
        return self._made(
            token,
            reply.asked_at,
            life,
            who=who,
            refresh=token if renewable else None,
            lasts=seconds(data.get("explicit_max_ttl")),
        )

    def _looked(self, token: Secret) -> Mapping[str, Any]:
        """Return what a token says of itself; nothing where it is dead, or may not."""
        reply = self._ask(lambda client: client.auth.token.lookup_self(), token)
        return part(reply, "data") if reply.status == 200 else {}

    def _odd(self) -> SourceInvalid:
        return SourceInvalid(
            f"{self._who}: {self._server.host} does not say where to sign in",
            hint="see mount and role; is it a role of type oidc?",
        )


def _parameter(url: str, name: str) -> str:
    return parse_qs(urlsplit(url).query).get(name, [""])[0]
