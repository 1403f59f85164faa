"""Sign-ins that end: which are about to, or have; which of them nobody was told of yet.

Loaded where a configuration has logins. A machine that signs in by itself has no end.
"""

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from keybroker.config import Config
from keybroker.signin import FOLDER, SIGNED_OUT, SignIn, Standing, standing_of
from keybroker.values import dataclass

EVENT = "login_ending"
NEVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Ending:
    """
    A sign-in that ends soon, or has ended.

    Attributes:
        until: When; None where it ended before anybody knew when it would.
        profiles: Those whose keys depend on it.
    """

    login: str
    standing: Standing
    until: datetime | None
    over: bool
    profiles: tuple[str, ...]

    @property
    def command(self) -> str:
        """What a person types."""
        return f"keybroker login {self.login}"

    @property
    def mark(self) -> str:
        """What tells it from others of the same login."""
        return f"{'over' if self.over else 'ahead'} {self.standing.since.isoformat()}"

    @property
    def text(self) -> str:
        """Say it in a line."""
        if self.over:
            return f"login {self.login}: {self.standing.ended or 'the sign-in has ended'}"
        assert self.until is not None, "what has no end does not end soon"
        return f"login {self.login}: the sign-in ends at {_written(self.until)}"

    @property
    def facts(self) -> dict[str, Any]:
        """Return what a program is told, in values that JSON knows; no secret is in it."""
        return {
            "event": EVENT,
            "login": self.login,
            "who": self.standing.who or None,
            "ends_at": None if self.until is None else _written(self.until),
            "ended": self.over,
            "reason": self.standing.ended or None,
            "profiles": list(self.profiles),
            "command": self.command,
        }


class Endings:
    """
    Those of one configuration.

    Attributes:
        due: When it is to be looked again.
        soon: What was found, by login.
    """

    def __init__(self, state: Path, config: Config) -> None:
        self._state = state
        self._sign_ins = [one for one in config.logins.values() if not one.unattended]
        self._profiles: dict[str, list[str]] = {}
        for profile in config.profiles.values():
            for one in profile.logins:
                self._profiles.setdefault(one.name, []).append(profile.name)
        self._told: dict[str, str] = {}
        self.due = datetime.min.replace(tzinfo=UTC)
        self.soon: dict[str, Ending] = {}

    def hurry(self) -> None:
        """Look again the next time: somebody signed in or out, or was refused."""
        self.due = datetime.min.replace(tzinfo=UTC)

    def look(self, now: datetime) -> list[Ending]:
        """Read how sign-ins stand, if that is due; return the endings that nobody was told of."""
        if now < self.due:
            return []
        self.due, self.soon = NEVER, {}
        return list(self._untold(now))

    def _untold(self, now: datetime) -> Iterator[Ending]:
        for sign_in in self._sign_ins:
            ending = self._ending(sign_in, now)
            if ending is None:
                self._told.pop(sign_in.name, None)
                continue
            self.soon[sign_in.name] = ending
            known = self._told.get(sign_in.name) or self._noted(sign_in.name)
            self._told[sign_in.name] = ending.mark
            if known != ending.mark:
                yield ending

    def _ending(self, sign_in: SignIn, now: datetime) -> Ending | None:
        standing = standing_of(self._state, sign_in)
        if standing is None or standing.ended == SIGNED_OUT:
            return None
        until, over = standing.lasts_until, standing.over(now)
        if until is not None and not over:
            # one that lasts for less than it is warned of is not about to end from its beginning
            warns = until - min(sign_in.settings["warn"], (until - standing.since) / 4)
            self.due = min(self.due, until if now >= warns else warns)
            if now < warns:
                return None
        elif not over:
            return None
        profiles = tuple(self._profiles.get(sign_in.name, ()))
        return Ending(sign_in.name, standing, until, over, profiles)

    def _noted(self, name: str) -> str:
        """Return what was told of last by a process before us."""
        with suppress(OSError):
            return file_of_told(self._state, name).read_text()
        return ""


def _written(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def file_of_told(state: Path, name: str) -> Path:
    return state / FOLDER / f"{name}.told"
