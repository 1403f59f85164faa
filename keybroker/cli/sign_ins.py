"""How sign-ins stand, in words and as data: for login, whoami and status."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from keybroker.cli.base import in_words, on_the_clock
from keybroker.config import Profile
from keybroker.signin import SignIn, Standing


def described(sign_in: SignIn, standing: Standing | None, now: datetime) -> str:
    """Say in a few words how a sign-in stands."""
    if standing is None:
        return "nobody has to sign in" if sign_in.unattended else "nobody is signed in"
    who = standing.who or "signed in"
    if standing.ended:
        return f"{who}; {standing.ended}"
    if standing.over(now):
        return f"{who}; it has ended"
    until = standing.lasts_until
    if until is None:
        return f"{who}; renewed by itself" if standing.renewable else f"{who}; without an end"
    return f"{who}; until {on_the_clock(until)} ({in_words(until - now)})"


def row(sign_in: SignIn, standing: Standing | None) -> dict[str, Any]:
    """Return the same as plain values."""
    now = datetime.now(UTC)
    return {
        "login": sign_in.name,
        "type": sign_in.type,
        "unattended": sign_in.unattended,
        "signed_in": standing is not None and not standing.over(now),
        "who": None if standing is None else standing.who or None,
        "since": None if standing is None else standing.since,
        "until": None if standing is None else standing.lasts_until,
        "renewable": None if standing is None else standing.renewable,
        "ended": None if standing is None else standing.ended or None,
    }


def users(sign_in: SignIn, profiles: Iterable[Profile]) -> list[str]:
    """Return the profiles whose keys depend on a sign-in."""
    return [one.name for one in profiles if any(sign_in == other for other in one.logins)]
