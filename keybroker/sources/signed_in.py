"""A key that a sign-in gives: the token itself, renewed ahead of its end.

A gateway's own session token, or one that a gateway checks by its signature. Five to sixty minutes
is what such a token lives: it is renewed when a third of that is left, and used until a minute
before its end should the provider not answer.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from keybroker import login
from keybroker.config import Profile
from keybroker.credential import Credential, Lease, Reference, Secret
from keybroker.errors import SourceError
from keybroker.login.provider import needed
from keybroker.login.tokens import Tokens
from keybroker.signin import read_text
from keybroker.sources.followed import Followed
from keybroker.sources.gateway import Gateway
from keybroker.sources.held import Held

LEAST = timedelta(seconds=30)  # of a token that something else is asked with


class SignedIn(Followed):
    """Hands out the token of a login."""

    type = "login"

    def __init__(self, profile: Profile, environment: Mapping[str, str], held: Held) -> None:
        super().__init__(Gateway.of(profile))
        self._sign_in = read_text(str(profile.source["login"].value))
        self._environment = environment
        self._held = held
        self._is_known = False

    def look(self, known: Lease) -> Lease | None:
        """Take note that there is a key: a failure is then told, and the key stays."""
        self._is_known = True
        return super().look(known)

    def issue(self, label: str) -> Credential:
        """Return the token, renewed if that is due; who has none gets one that could not be."""
        del label  # it is the provider's
        known, self._is_known = self._is_known, False
        store = self._held.sign_ins
        try:
            found = login.current(self._sign_in, self._environment, store, fresh=self._held.fresh)
            return self._credential(found)
        except SourceError:
            kept = None if known or self._held.fresh else login.rest(self._sign_in, store)
            if kept is None:
                raise
            credential = self._credential(kept)
            ends = credential.lease.expires_at
            if ends is not None and ends <= datetime.now(UTC):
                raise
            return credential

    def _credential(self, tokens: Tokens) -> Credential:
        standing = tokens.standing
        since, ends = standing.refreshed_at, standing.access_ends
        if ends is None:
            return Credential(tokens.access, Lease(tokens.access.fingerprint, self.type, since))
        life = ends - since
        end, now = ends - login.margin(life), datetime.now(UTC)
        if not standing.renewable and now >= end:
            raise needed(self._sign_in, "the sign-in has ended")
        lease = Lease(
            tokens.access.fingerprint,
            self.type,
            since,
            end,
            written_at=since,
            reread_at=max(ends - life / 3, now) if standing.renewable else end,
        )
        return Credential(tokens.access, lease)


def read_reference(
    reference: Reference,
    environment: Mapping[str, str],
    held: Held,
    *,
    ends: bool = False,
    fresh: bool = False,
) -> Secret:
    """
    Return the token of a login, to ask something else with.

    Args:
        ends: It is to end what was made with it.
        fresh: It was refused: have another, if there is one to be had.

    Raises:
        LoginNeeded, CacheError, SourceError, ConfigError: As `login.usable`, `login.current`.
    """
    sign_in = read_text(str(reference.value))
    if fresh:
        return login.current(sign_in, environment, held.sign_ins, fresh=True).access
    return login.usable(sign_in, environment, held.sign_ins, least=LEAST, ends=ends).access
