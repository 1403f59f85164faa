"""The sessions of sources: kept for the workers, sealed, begun by one of those that need them."""

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta

from keybroker import aws
from keybroker.credential import Issuer, Session
from keybroker.values import replace
from keybroker.vault import session_of

RENEWALS_APART = timedelta(seconds=2)


def name_of(issuer: Issuer) -> str:
    """Return the name of the session that an issuer is asked with; empty where it wants none."""
    if issuer.vault:
        return session_of(issuer.vault)
    return aws.session_of(issuer.aws) if issuer.aws else ""


class Logins:
    """
    What one process knows of the sessions that its workers begin, renew and use.

    Only to a Vault is it a login, which is done by one of those that need it, and kept alive. What
    is kept of an account of AWS's are credentials that end.
    """

    def __init__(self, held: Iterable[Session]) -> None:
        self._held = {session.key: session for session in held}
        self._beginning: dict[int, str] = {}  # requests that may log in, and to what
        self._wanted: dict[str, Issuer] = {}
        self._renewing: dict[str, datetime] = {}
        self._behind: dict[str, set[str]] = {}  # profiles that wait for that, by what they want

    def __iter__(self) -> Iterator[Session]:
        return iter(self._held.values())

    def of(self, issuer: Issuer) -> Session | None:
        """Return what an issuer is asked with; None without one, or where none is wanted."""
        return self._held.get(name_of(issuer))

    def take(self, session: Session) -> bool:
        """Go on with a session, unless a newer one is known; say whether it was taken."""
        known = self._held.get(session.key)
        if known is not None and known.serial >= session.serial:
            return False
        self._held[session.key] = session
        return True

    def forgive(self, issuer: Issuer, *, anew: bool = False) -> Session | None:
        """
        Let a login that failed be tried at once: something may be better now.

        How often it failed is not forgotten: what would lock a user is tried once more, no more.

        Args:
            anew: Log in even where there is a token, since that has not the rights it should.

        Returns:
            The session as it is now, to be sealed; None where nothing changed.
        """
        session = self.of(issuer)
        if session is None or not (session.not_before or (anew and session.secret)):
            return None
        if session.key in self._beginning.values():  # it is being tried
            return None
        secret = None if anew else session.secret
        forgiven = replace(session, serial=session.serial + 1, secret=secret, not_before=None)
        self._held[session.key] = forgiven
        return forgiven

    def end(self, issuer: Issuer) -> Session | None:
        """Ask with a session no more; return it if there is one, to be ended where it was begun."""
        session = self.of(issuer)
        if session is None or session.secret is None:
            return None
        over = replace(session, serial=session.serial + 1, secret=None, not_before=None)
        self._held[session.key] = over
        return session

    def know(self, issuers: Iterable[Issuer]) -> None:
        """Take note of who is asked with sessions from now on: theirs are kept alive."""
        self._wanted = {session_of(one.vault): one for one in issuers if one.vault}

    def due(self, now: datetime) -> tuple[list[Issuer], datetime | None]:
        """
        Say whose sessions nobody has renewed in time, and when the next one is due.

        Who asks renews at half of what was granted; this is for those whom nobody asks.
        """
        late, times = [], []
        for name, issuer in self._wanted.items():
            session = self._held.get(name)
            if session is None or not session.renewable or session.secret is None:
                continue
            if name in self._beginning.values():  # there may be a newer one in a moment
                continue
            since = session.renewed_at or session.issued_at
            if session.expires_at is None or since is None or now >= session.expires_at:
                continue
            at = since + (session.expires_at - since) * 0.6
            if session.not_before is not None:  # it failed a while ago
                at = max(at, session.not_before)
            if name in self._renewing:  # and its answer may have been lost
                at = max(at, self._renewing[name] + RENEWALS_APART)
            if at > now:
                times.append(at)
            else:
                late.append(issuer)
        return late, min(times, default=None)

    def recall(self, number: int, name: str) -> None:
        """Note a request that reads a session that another process sealed: it may be newer."""
        self._beginning[number] = name

    @property
    def wanted(self) -> Mapping[str, Issuer]:
        """Who is asked with sessions, one of them for each session."""
        return self._wanted

    def renewing(self, issuer: Issuer, now: datetime) -> None:
        """Note a request that renews a session."""
        self._renewing[session_of(issuer.vault)] = now

    def must_wait(self, issuer: Issuer, profile: str) -> bool:
        """Say whether somebody else is logging in to the same; the profile is told of the end."""
        name = session_of(issuer.vault) if issuer.vault else ""
        if name not in self._beginning.values():
            return False
        self._behind.setdefault(name, set()).add(profile)
        return True

    def asked(self, issuer: Issuer, number: int, now: datetime) -> None:
        """Note a request that may log in."""
        if not self._is_open(issuer, now):
            self._beginning[number] = session_of(issuer.vault)

    def answered(self, number: int) -> set[str]:
        """Return the profiles that waited for a request's end."""
        return self._behind.pop(self._beginning.pop(number, ""), set())

    def _is_open(self, issuer: Issuer, now: datetime) -> bool:
        """Say whether an issuer can be asked without a login, as far as a session's end tells."""
        if not issuer.vault:
            return True
        session = self.of(issuer)
        if session is None or session.secret is None:
            return False
        return session.expires_at is None or now < session.expires_at
