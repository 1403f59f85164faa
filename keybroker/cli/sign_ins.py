"""How sign-ins stand, in words and as data: for login, whoami and status."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from keybroker.cli.base import in_words, on_the_clock
from keybroker.config import Config
from keybroker.endings import Endings
from keybroker.signin import SignIn, Standing, standing_of


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


def endings_of(config: Config, state: Path) -> Endings:
    """Return which sign-ins end, as they stand now."""
    found = Endings(state, config)
    found.look(datetime.now(UTC))
    return found


def rows(config: Config, state: Path, profile: str | None) -> list[dict[str, Any]]:
    """
    Return the sign-ins that a profile needs, or all: how each stands, and what to type.

    `command` is None where there is nothing to type.
    """
    soon, now = endings_of(config, state).soon, datetime.now(UTC)
    found = []
    for one in config.logins.values():
        users = [p.name for p in config.profiles.values() if one.name in _names(p.logins)]
        if profile is not None and profile not in users:
            continue
        standing = standing_of(state, one)
        over = not one.unattended and (standing is None or standing.over(now))
        needed = one.name in soon or (over and bool(users))
        found.append(
            {
                **row(one, standing),
                "said": described(one, standing, now),
                "profiles": users,
                "ending": needed and not over,
                "command": f"keybroker login {one.name}" if needed else None,
            }
        )
    return found


def _names(sign_ins: tuple[SignIn, ...]) -> set[str]:
    return {one.name for one in sign_ins}
