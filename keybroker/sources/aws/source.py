"""A key in AWS Secrets Manager that somebody else rotates."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from keybroker.aws import Account as Place
from keybroker.aws import account_of
from keybroker.config import Profile
from keybroker.credential import Credential, Lease, Reference, Secret
from keybroker.fields import read_duration
from keybroker.journal import read_time
from keybroker.sources.aws.account import Account, Answer
from keybroker.sources.aws.secret import PENDING, PREVIOUS, Kept, Standing, written_at
from keybroker.sources.followed import Followed
from keybroker.sources.gateway import Gateway
from keybroker.sources.held import Held
from keybroker.values import replace

LONGEST_TTL = 3650 * 86_400.0


class Aws(Followed):
    """Reads the key of a profile; the id of its version is its lease's name."""

    type = "aws"

    def __init__(self, kept: Kept, gateway: Gateway) -> None:
        super().__init__(gateway)
        self._kept = kept

    @classmethod
    def of(cls, profile: Profile, held: Held) -> "Aws":
        assert profile.account is not None
        account = Account.of(profile.account, held)
        kept = Kept(account, profile.source["secret"], profile.source["field"])
        return cls(kept, Gateway.of(profile))

    def look(self, known: Lease) -> Lease | None:
        """
        Say whether the key that is known still counts, without reading one.

        Labels move at once, answers do not: one in which the known version is not yet current is
        from before, and changes nothing. One in which it is AWSPREVIOUS is news, also where the
        version that counts is an older one: its owner went back.
        """
        if known.expires_at is not None and known.expires_at <= datetime.now(UTC):
            return None  # as reading it will say
        foreseen = self._kept.account.foreseen(self._kept.secret)
        if foreseen is not None and foreseen.value.get("VersionId") == known.id:
            due = known.reread_at is not None and known.reread_at <= foreseen.asked_at
            if not due:
                return known
        standing = self._kept.describe()
        if standing.current == known.id:
            return replace(
                known, reread_at=standing.reread_at, written_at=_later(standing, known.written_at)
            )
        labels = standing.versions.get(known.id, ())
        behind = _before(standing.changed_at, known.written_at)
        return known if behind or (PENDING in labels and PREVIOUS not in labels) else None

    def issue(self, label: str) -> Credential:
        """Read the version that counts now."""
        del label  # a version has its writer's name
        answer = self._kept.account.foreseen(self._kept.secret)
        standing = self._kept.describe()
        if answer is None or answer.value.get("VersionId") != standing.current:
            answer = self._kept.read()
        secret, table = self._kept.take(answer)
        lease = Lease(
            str(answer.value.get("VersionId")),
            "aws",
            answer.asked_at,
            written_at=standing.changed_at,
            reread_at=standing.reread_at,
        )
        ends = self._ends(answer, table, written_at(answer))
        if ends is not None and ends <= answer.asked_at:
            raise self._kept.error(
                f"the key in it has ended on {ends:%Y-%m-%d %H:%M}Z",
                "put a new one there",
                withdrawn=True,
            )
        return Credential(secret, replace(lease, expires_at=ends))

    def _ends(
        self, answer: Answer, table: Mapping[str, Any], written: datetime | None
    ) -> datetime | None:
        """Read `expires_at` and `ttl`, since the version was made, beside the key: the earlier."""
        expires_at, ttl = table.get("expires_at"), table.get("ttl")
        ends = []
        if expires_at:
            try:
                ends.append(read_time(expires_at))
            except (ValueError, TypeError, OverflowError, AttributeError):
                hint = "such as 2027-01-31T12:00:00Z"
                raise self._kept.error("expires_at cannot be read", hint) from None
        if ttl and written is not None:
            try:
                ends.append(written - answer.skew + _length(ttl))
            except (ValueError, OverflowError):
                raise self._kept.error("ttl cannot be read", "seconds, or such as 12h") from None
        return min(ends, default=None)


def read_reference(reference: Reference, place: Place, held: Held) -> Secret:
    """
    Read the secret that `name#/field` names.

    Raises:
        SourceError, ConfigError: It could not be read, or there is none.
    """
    name, _, field = str(reference.value).partition("#")
    account = Account.of(account_of(name, place), held)
    kept = Kept(account, name, field or None, named="the part after #")
    return kept.take(kept.read())[0]


def _length(ttl: Any) -> timedelta:
    if isinstance(ttl, str) and re.fullmatch(r"[0-9]{1,9}", ttl):
        ttl = int(ttl)
    if isinstance(ttl, int | float) and not isinstance(ttl, bool) and ttl > 0:
        return timedelta(seconds=min(ttl, LONGEST_TTL))
    return read_duration(ttl)


def _later(standing: Standing, known: datetime | None) -> datetime | None:
    """Return when a secret was changed last: an answer that is behind takes nothing back."""
    changed = standing.changed_at
    return known if changed is None or _before(changed, known) else changed


def _before(moment: datetime | None, other: datetime | None) -> bool:
    return moment is not None and other is not None and moment < other
