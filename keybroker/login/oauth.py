"""OAuth's requests and answers, made and read by oauthlib; the call itself is ours.

See: RFC 6749 (tokens), RFC 7009 (revocation), RFC 8628 (devices).
"""

import os
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, urlencode

from oauthlib.oauth2 import DeviceClient, WebApplicationClient  # type: ignore[import-untyped]
from oauthlib.oauth2.rfc6749.errors import (  # type: ignore[import-untyped]
    MissingTokenError,
    OAuth2Error,
)
from oauthlib.oauth2.rfc6749.parameters import (  # type: ignore[import-untyped]
    prepare_token_request,
)

from keybroker.credential import Secret
from keybroker.errors import KeybrokerError, SourceDenied, SourceInvalid, SourceUnavailable
from keybroker.login.provider import SLOWER, Device, plain, reason, said, seconds, word
from keybroker.login.tokens import Tokens
from keybroker.sources.http import Http, Reply
from keybroker.values import dataclass, field, replace

# It refuses http:// even for the loopback address that a browser comes back to. Which addresses
# may be without TLS is for `config` and `oidc` to say.
# A provider may also grant less than was asked for.
os.environ.update(dict.fromkeys(("OAUTHLIB_INSECURE_TRANSPORT", "OAUTHLIB_RELAX_TOKEN_SCOPE"), "1"))

METHODS = (BASIC, POST) = ("client_secret_basic", "client_secret_post")
OURS = frozenset({"invalid_client", "unauthorized_client", "unsupported_grant_type"})
LATER = frozenset({"temporarily_unavailable", "server_error", "slow_down"})


class Refused(Exception):  # noqa: N818  # an answer, as often as an error
    """
    An error as OAuth has it: a word, and what the provider adds to it.

    The latter is for the eyes of a person who is just signing in, and for no log.
    """

    def __init__(
        self, error: str, description: str, status: int, retry_after: timedelta | None = None
    ) -> None:
        super().__init__(error)
        self.error, self.description, self.status = error, description, status
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Granted:
    """A token answer. `values` is all of it."""

    access: Secret
    refresh: Secret | None
    life: timedelta | None
    asked_at: datetime
    values: Mapping[str, Any] = field(repr=False)


@dataclass(slots=True)
class _Waiting:
    """
    A code that somebody is to type.

    Attributes:
        since: When it was last seen that they had not. Some gateways make the token as soon as
            they have, not when it is asked for: it may be as old as this.
    """

    device_code: str
    since: datetime


class Client:
    """
    A client at one provider.

    Args:
        who: What begins every message.
        secret: None: a public one.
        methods: By which of METHODS it may be sent. One that is refused gives way to the next:
            only the provider knows what was agreed upon.
    """

    def __init__(
        self,
        who: str,
        client_id: str | None,
        secret: Secret | None = None,
        methods: Sequence[str] = (),
    ) -> None:
        self._who = who
        self._id = client_id
        self._secret = secret
        self._methods = [one for one in METHODS if one in methods] or [*METHODS]

    @property
    def method(self) -> str:
        """How the secret is sent, as far as that is known."""
        return self._methods[0]

    def address(
        self,
        endpoint: str,
        redirect: str,
        *,
        state: str,
        verifier: str,
        scopes: tuple[str, ...] = (),
        **more: str,
    ) -> str:
        """Return the page where a person signs in: code with PKCE, S256."""
        return str(
            WebApplicationClient(self._id).prepare_request_uri(
                endpoint,
                redirect_uri=redirect,
                scope=list(scopes) or None,
                state=state,
                code_challenge=challenge(verifier),
                code_challenge_method="S256",
                **more,
            )
        )

    def redeem(
        self, http: Http, path: str, code: str, redirect: str, verifier: str, **more: str
    ) -> Granted:
        """Exchange a code; raises as `ask`."""
        body = WebApplicationClient(self._id).prepare_request_body(
            code=code, redirect_uri=redirect, code_verifier=verifier, **more
        )
        return self.ask(http, path, body)

    def refresh(self, http: Http, path: str, token: Secret, **more: str) -> Granted:
        """Exchange a refresh token; raises as `ask`."""
        named = {} if self._id is None else {"client_id": self._id}
        body = WebApplicationClient(self._id).prepare_refresh_body(
            refresh_token=token.reveal(), **named, **more
        )
        return self.ask(http, path, body)

    def device(
        self,
        start: tuple[Http, str],
        token: tuple[Http, str],
        made: Callable[[Granted], Tokens],
        scopes: tuple[str, ...] = (),
        **more: str,
    ) -> Device:
        """
        Ask for a code that a person types elsewhere; RFC 8628, section 3.2.

        Args:
            start: The endpoint that gives one: where it is, and its path there.
            token: The endpoint that gives a token for it.
            made: Reads what that one gave.

        Raises:
            SourceError: There is no code to be had.
        """
        http, path = start
        form = {**({} if self._id is None else {"client_id": self._id}), **more}
        if scopes:
            form["scope"] = " ".join(scopes)
        reply = self._post(http, path, urlencode(form))
        found = plain(reply.value)
        if reply.status != 200:
            refused = self._refusal(http, reply)
            if reply.status == 429:
                raise SourceUnavailable(
                    f"{self._who}: {http.host} asks to wait",
                    hint="try again in a minute",
                    retry_after=reply.retry_after,
                )
            if isinstance(refused, Refused):
                raise as_error(refused, self._who, http.host, "give a code", person=True)
            raise refused
        code, typed = found.get("device_code"), found.get("user_code")
        url = found.get("verification_uri") or found.get("verification_url")
        lasts = seconds(found.get("expires_in"))
        if not all(isinstance(one, str) and one for one in (code, typed, url)) or lasts is None:
            raise SourceInvalid(f"{self._who}: {http.host} gave no device code")
        whole = found.get("verification_uri_complete")
        interval = seconds(found.get("interval"))
        waiting = _Waiting(str(code), reply.asked_at)
        return Device(
            str(url),
            said(typed),
            5.0 if interval is None else interval.total_seconds(),
            lasts.total_seconds(),
            lambda pace: self._poll(token, waiting, pace, made),
            whole if isinstance(whole, str) else "",
        )

    def _poll(
        self,
        token: tuple[Http, str],
        waiting: _Waiting,
        interval: float,
        made: Callable[[Granted], Tokens],
    ) -> Tokens | float:
        """Ask whether a person has typed the code; return the seconds to wait if not."""
        http, path = token
        body = DeviceClient(self._id).prepare_request_body(
            waiting.device_code, include_client_id=self._id is not None
        )
        asked_at = datetime.now(UTC)
        try:
            granted = self.ask(http, path, body)
        except Refused as refused:
            if refused.error == "authorization_pending":
                waiting.since = asked_at
                return interval
            if refused.error == "slow_down":
                return interval + SLOWER
            raise as_error(refused, self._who, http.host, "sign in", person=True) from None
        except SourceUnavailable:  # RFC 8628, section 3.5: a time-out is no answer, ask later
            return min(60.0, 2 * interval)
        return made(replace(granted, asked_at=waiting.since))

    def grant(
        self, http: Http, path: str, grant: str, scopes: tuple[str, ...] = (), **more: str
    ) -> Granted:
        """Ask for a token by a grant that needs no person; raises as `ask`."""
        body = prepare_token_request(grant, client_id=self._id, scope=list(scopes), **more)
        return self.ask(http, path, body)

    def revoke(self, http: Http, path: str, token: Secret, kind: str, **more: str) -> bool:
        """
        Have a token ended; one that is not known is a success.

        Returns:
            False where tokens of this kind are not ended, but end by themselves.

        Raises:
            SourceError: It was not confirmed.
        """
        client = WebApplicationClient(self._id)
        named = {} if self._id is None else {"client_id": self._id}
        _, _, body = client.prepare_token_revocation_request(
            "https://unused.invalid", token.reveal(), token_type_hint=kind, **named, **more
        )
        reply = self._post(http, path, body)
        if reply.status not in (200, 204):
            if plain(reply.value).get("error") == "unsupported_token_type":  # RFC 7009, 2.2.1
                return False
            raise SourceUnavailable(
                f"{self._who}: {http.host} did not end the sign-in ({reply.status})"
            )
        return True

    def ask(self, http: Http, path: str, body: str) -> Granted:
        """
        Ask a token endpoint.

        Raises:
            Refused: The provider said no, in OAuth's words.
            SourceUnavailable: No whole answer, 5xx, throttled.
            SourceInvalid: An answer that is no token.
        """
        reply = self._post(http, path, body)
        if reply.status != 200:
            raise self._refusal(http, reply)
        try:
            WebApplicationClient(self._id).parse_request_body_response(reply.data.decode())
        except MissingTokenError:
            raise SourceInvalid(f"{self._who}: {http.host} gave no token") from None
        except OAuth2Error as error:
            raise Refused(word(error.error), reason(error.description), reply.status) from None
        except (ValueError, TypeError, AttributeError):
            raise SourceInvalid(f"{self._who}: {http.host} gave no token") from None
        found = plain(reply.value)
        try:
            access = Secret(found["access_token"])
            refresh = Secret(found["refresh_token"]) if found.get("refresh_token") else None
        except (KeyError, TypeError, ValueError):
            problem = f"{self._who}: {http.host} gave a token that cannot be used"
            raise SourceInvalid(problem) from None
        return Granted(access, refresh, seconds(found.get("expires_in")), reply.asked_at, found)

    def _refusal(self, http: Http, reply: Reply) -> Exception:
        """Read an error answer."""
        found = plain(reply.value)
        error = found.get("error")
        if isinstance(error, str) and error not in LATER - {"slow_down"} and reply.status < 500:
            about = reason(found.get("error_description"))
            return Refused(word(error), about, reply.status, reply.retry_after)
        problem = f"{self._who}: {http.host} gave no token ({reply.status})"
        if reply.status == 429 or reply.status >= 500 or error in LATER:
            return SourceUnavailable(problem, retry_after=reply.retry_after)
        return SourceInvalid(problem)

    def _post(self, http: Http, path: str, body: str) -> Reply:
        reply = self._send(http, path, body)
        while (
            self._secret is not None
            and reply.status in (400, 401)
            and plain(reply.value).get("error") == "invalid_client"
            and len(self._methods) > 1
        ):
            del self._methods[0]
            reply = self._send(http, path, body)
        return reply

    def _send(self, http: Http, path: str, body: str) -> Reply:
        headers = {"accept": "application/json"}
        if self._secret is not None and self._id is not None:
            if self._methods[0] == POST:
                body += f"&client_secret={quote(self._secret.reveal(), safe='')}"
            else:  # RFC 6749, section 2.3.1: both are encoded before
                pair = f"{quote(self._id, safe='')}:{quote(self._secret.reveal(), safe='')}"
                headers["authorization"] = f"Basic {b64encode(pair.encode()).decode()}"
        return http.call("POST", path, headers=headers, form=body)


def challenge(verifier: str) -> str:
    """Return what is shown of a verifier before it is: S256 (RFC 7636)."""
    return str(WebApplicationClient(None).create_code_challenge(verifier, "S256"))


def code_of(answer: Mapping[str, str], who: str, host: str) -> str:
    """
    Return the code that a browser came back with.

    Raises:
        KeybrokerError: The answer says no, or nothing.
    """
    if "error" in answer:
        refused = Refused(word(answer["error"]), reason(answer.get("error_description")), 0)
        raise as_error(refused, who, host, "sign in", person=True)
    if not answer.get("code"):
        raise SourceInvalid(f"{who}: the answer has no code in it")
    return answer["code"]


def as_error(
    refused: Refused, who: str, host: str, doing: str, *, person: bool = False
) -> KeybrokerError:
    """
    Return what a refusal means where nothing more is known of it.

    Args:
        person: Somebody is just signing in: they are told what the provider adds.
    """
    about = f": {refused.description}" if person and refused.description else ""
    if person and refused.error in ("access_denied", "expired_token"):
        over = "was refused" if refused.error == "access_denied" else "took longer than its code"
        return SourceDenied(f"{who}: the sign-in {over}{about}", hint=f"run: keybroker {who}")
    if refused.error == "slow_down":
        return SourceUnavailable(f"{who}: {host} asks to wait", retry_after=refused.retry_after)
    problem = f"{who}: {host} will not {doing} ({refused.error}{about})"
    if refused.error in OURS:
        return SourceDenied(problem, hint="see client_id and client_secret of the login")
    return SourceInvalid(problem)
