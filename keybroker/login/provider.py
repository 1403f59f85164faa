"""What every kind of login has in common: how a person is asked, how a token is had anew."""

import re
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from keybroker.credential import Secret
from keybroker.errors import (
    ConfigError,
    KeybrokerError,
    LoginNeeded,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.login.tokens import Tokens
from keybroker.signin import SignIn, Standing
from keybroker.sources.http import Http, Reply
from keybroker.values import dataclass, field, replace

BROWSER, DEVICE = "browser", "device"
LONGEST_WAIT = timedelta(minutes=10)  # for a person
SLOWER = 5.0  # seconds that `slow_down` adds; RFC 8628, section 3.5
LONGEST_REASON = 80
WORD = re.compile(r"[A-Za-z0-9_.-]{1,40}")  # as OAuth's errors are
UNSAID = re.compile(r"[A-Za-z0-9_.~+/=%-]{20,}")  # in what a provider says: it may be a token


@dataclass(frozen=True, slots=True)
class Visit:
    """
    A page that a person is to open, and what the browser comes back with.

    Attributes:
        url: It is for the person's eyes and browser alone: no log has it.
        state: What the answer has to repeat.
        redeem: Takes the answer's parameters; raises a KeybrokerError with the reason.
    """

    url: str = field(repr=False)
    state: str = field(repr=False)
    redeem: Callable[[Mapping[str, str]], Tokens] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Device:
    """
    A page that a person opens anywhere, and a code that they type there.

    Attributes:
        whole: The page with the code in it; empty where there is none.
        interval: Seconds between two asks.
        lasts: For how many seconds the code is good.
        poll: Asks once; returns what was given, or the seconds to wait from now on.
    """

    url: str
    code: str
    interval: float
    lasts: float
    poll: Callable[[float], "Tokens | float"] = field(repr=False)
    whole: str = field(default="", repr=False)


class HalfRenewedError(Exception):
    """
    A renewal failed after the provider had replaced the refresh token.

    Args:
        tokens: What has to be kept nevertheless.
        error: What went wrong.
    """

    def __init__(self, tokens: Tokens, error: KeybrokerError) -> None:
        super().__init__(error.message)
        self.tokens, self.error = tokens, error


class Provider(Protocol):
    """One kind of login. Blocking; runs in a worker process."""

    @property
    def flows(self) -> tuple[str, ...]:
        """The ways to sign in that there are, the best one first."""

    @property
    def redirect(self) -> tuple[str, int, str]:
        """Where the browser comes back to: host, port (0: any free one) and path."""

    def browser(self, redirect: str) -> Visit:
        """
        Begin a sign-in that comes back to an address of ours.

        Raises:
            SourceError, ConfigError: The provider does not answer, or not so that it makes sense.
        """

    def device(self) -> Device:
        """Begin a sign-in with a code; raises as `browser`."""

    def refresh(self, tokens: Tokens) -> Tokens:
        """
        Have a new token.

        Raises:
            LoginNeeded: The provider says that the sign-in is over.
            HalfRenewedError: It did its part, and what it gave is of no use.
            SourceError, ConfigError: It did not say so.
        """

    def revoke(self, tokens: Tokens) -> bool:
        """
        End a sign-in at the provider; return False where it knows no way.

        Raises:
            SourceError: It was not confirmed.
        """

    def together(self) -> None:
        """Let all calls from now on take no longer than one."""

    def close(self) -> None:
        """Give up what is held open."""


class Base:
    """What most of them share. `self._who` begins every message."""

    def __init__(self, sign_in: SignIn, environment: Mapping[str, str]) -> None:
        self._sign_in = sign_in
        self._settings = sign_in.settings
        self._environment = environment
        self._who = f"login {sign_in.name}"
        self._opened: list[Http] = []
        self._until: float | None = None

    @property
    def redirect(self) -> tuple[str, int, str]:
        return "127.0.0.1", self._settings.get("port") or 0, "/callback"

    def device(self) -> Device:
        raise self._has_no("a device code")

    def browser(self, redirect: str) -> Visit:
        raise self._has_no("a browser")

    def together(self) -> None:
        """Let all calls from now on take no longer than one: who renews holds a lock."""
        self._until = time.monotonic() + self._settings["timeout"].total_seconds()

    def close(self) -> None:
        for http in self._opened:
            http.close()
        self._opened.clear()

    def _has_no(self, way: str) -> ConfigError:
        return ConfigError(f"{self._who}: {self._sign_in.type} cannot sign in with {way}")

    def _http(self, url: str, setting: str = "issuer") -> Http:
        seconds = self._settings["timeout"].total_seconds()
        ca = self._settings.get("ca")
        http = Http(self._who, url, ca=ca, seconds=seconds, setting=setting)
        http.until = self._until
        self._opened.append(http)
        return http

    def _made(
        self,
        access: Secret,
        asked_at: datetime,
        life: timedelta | None,
        *,
        who: str = "",
        refresh: Secret | None = None,
        lasts: timedelta | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> Tokens:
        """Return what a sign-in gave that was just done."""
        whole = lasts or self._settings.get("lasts")
        standing = Standing(
            self._sign_in.name,
            self._sign_in.type,
            self._sign_in.mark,
            who,
            since=asked_at,
            refreshed_at=asked_at,
            access_ends=None if life is None else asked_at + life,
            ends_at=None if whole is None else asked_at + whole,
            renewable=refresh is not None,
        )
        return Tokens(standing, access, refresh, extra or {})

    @staticmethod
    def _again(
        before: Tokens,
        access: Secret,
        asked_at: datetime,
        life: timedelta | None,
        *,
        refresh: Secret | None,
        lasts: timedelta | None = None,
    ) -> Tokens:
        """Return what a refresh gave; a provider that sends no new refresh token keeps the old."""
        standing = replace(
            before.standing,
            refreshed_at=asked_at,
            access_ends=None if life is None else asked_at + life,
            ends_at=before.standing.ends_at if lasts is None else asked_at + lasts,
        )
        return replace(before, standing=standing, access=access, refresh=refresh or before.refresh)

    def _secret(self, value: object, what: str) -> Secret:
        try:
            return Secret(value if isinstance(value, str) else "")
        except ValueError as error:
            raise SourceInvalid(f"{self._who}: the {what} is {error}") from None

    def _needed(self, why: str) -> LoginNeeded:
        return needed(self._sign_in, why)

    def _trouble(self, reply: Reply, host: str, doing: str) -> SourceUnavailable | SourceInvalid:
        """Return what an error answer means that says nothing of the sign-in."""
        problem = f"{self._who}: {host} failed to {doing} ({reply.status})"
        if reply.status == 429 or reply.status >= 500:
            return SourceUnavailable(problem, retry_after=reply.retry_after)
        return SourceInvalid(problem)


def needed(sign_in: SignIn, why: str) -> LoginNeeded:
    """Return the error that only a person can mend."""
    return LoginNeeded(f"login {sign_in.name}: {why}", hint=f"run: keybroker login {sign_in.name}")


def unguessable() -> str:
    """Return what nobody can guess: a state, a nonce, a verifier (RFC 7636, 43 characters)."""
    return secrets.token_urlsafe(32)


def seconds(value: object) -> timedelta | None:
    """Read a number of seconds as answers have it, as a number or as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return timedelta(seconds=found) if 0 < found < 3650 * 86400 else None


def said(value: object) -> str:
    """Return a word of the provider's so that it can be shown: printable, and short."""
    text = value if isinstance(value, str) else ""
    text = "".join(one for one in text if one.isprintable())
    return text[:LONGEST_REASON]


def word(value: object) -> str:
    """Return the name of an error of the provider's."""
    return value if isinstance(value, str) and WORD.fullmatch(value) else "an error without a name"


def reason(value: object) -> str:
    """Return what a provider says to a person, without what may be a secret."""
    return said(UNSAID.sub("…", value) if isinstance(value, str) else "")


def now() -> datetime:
    return datetime.now(UTC)


def plain(value: Any) -> dict[str, Any]:
    """Return an answer's JSON object; an empty one where it is none."""
    return value if isinstance(value, dict) else {}
