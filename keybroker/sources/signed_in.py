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

    def issue(self, label: str) -> Credential:
        """Return the token, renewed if that is due."""
        del label  # it is the provider's
        tokens = login.current(
            self._sign_in, self._environment, self._held.sign_ins, fresh=self._held.fresh
        )
        standing = tokens.standing
        since, ends = standing.refreshed_at, standing.access_ends
        if ends is None:
            return Credential(tokens.access, Lease(tokens.access.fingerprint, self.type, since))
        life = ends - since
        lease = Lease(
            tokens.access.fingerprint,
            self.type,
            since,
            ends - login.margin(life),
            written_at=since,
            reread_at=max(ends - life / 3, datetime.now(UTC)) if standing.renewable else None,
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
