"""What is read in Vault: keys that somebody keeps, leases, keys that Vault itself rotates.

See: https://developer.hashicorp.com/vault/docs/concepts/lease
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from keybroker.config import Profile
from keybroker.credential import Credential, Issuer, Lease
from keybroker.errors import SourceInvalid
from keybroker.fields import read_duration
from keybroker.journal import read_time
from keybroker.rotation import Kind
from keybroker.sources import Capabilities
from keybroker.sources.followed import Followed
from keybroker.sources.gateway import Gateway
from keybroker.sources.held import Held
from keybroker.sources.http import Reply
from keybroker.sources.vault.login import token_of
from keybroker.sources.vault.place import GONE, Place, day, is_versioned, lease_id
from keybroker.sources.vault.server import CLEARLY_LESS, part, said, seconds
from keybroker.values import replace
from keybroker.vault import read_text

LONGEST_LEASE = timedelta(hours=24)  # a lease whose answer was lost lives that long
ENDED_FOR = timedelta(minutes=1)  # a lease that is over, by a server whose clock is behind
LAST_SECOND = 253_402_300_800  # of the year 9999
LEASELESS = 'set engine = "kv" or "static-role"; or have the engine make leases (generate_lease)'
SOONEST_REREAD = timedelta(seconds=5)
FINAL = re.compile(r"not renewable|past the max ttl|cannot be renewed")


class Vault(Followed):
    """Reads or leases the key of a profile."""

    type = "vault"

    def __init__(self, place: Place, profile: Profile | None = None) -> None:
        self._place = place
        self._profile = profile
        leased = profile is None or profile.kind is Kind.LEASED
        self.capabilities = Capabilities(
            Kind.LEASED if leased else Kind.FOLLOWED, revoke=leased, enforces_expiry=leased
        )
        if profile is not None:
            super().__init__(Gateway.of(profile))
            self._path: str = profile.source["path"]
            self._field: str = profile.source["field"]

    @classmethod
    def of(cls, profile: Profile, environment: Mapping[str, str], held: Held) -> "Vault":
        assert profile.vault is not None
        seconds = profile.source["timeout"].total_seconds()
        return cls(Place(profile.vault, environment, held, seconds), profile)

    @classmethod
    def by(
        cls, issuer: Issuer, environment: Mapping[str, str], seconds: float, held: Held
    ) -> "Vault":
        """Return one that can revoke, from the journal's record alone."""
        return cls(Place(read_text(issuer.vault), environment, held, seconds, ends=True))

    def issue(self, label: str) -> Credential:
        """Read the key as it stands now, or have one made for us."""
        del label  # Vault names a lease by itself
        assert self._profile is not None
        self._place.server.begin()
        engine = self._profile.source["engine"]
        if engine == "dynamic":
            return self._leased()
        if engine == "static-role":
            return self._rotated()
        return self._kept()

    def renew(self, lease: Lease) -> Lease:
        """Have a lease's end moved, as far as before or as configured."""
        if self.capabilities.kind is not Kind.LEASED:
            return super().renew(lease)
        self._place.server.begin()
        wish = self._profile.source["lifetime"] if self._profile is not None else None
        if wish is None:
            assert lease.expires_at is not None, "every lease of ours has an end"
            wish = lease.expires_at - (lease.renewed_at or lease.issued_at)
        asked = max(1, round(wish.total_seconds()))
        path = "sys/leases/renew"
        reply = self._place.login.ask(
            lambda client: client.sys.renew_lease(lease.id, increment=asked),
            path,
            "update",
            leases=True,
        )
        text = said(reply)
        if reply.status != 200:
            if GONE.search(text):
                raise SourceInvalid(f"{self._place.who}: has ended the lease")
            if FINAL.search(text):
                return replace(lease, renewable=False)
            raise self._place.invalid(path, f"did not renew the lease ({reply.status})")
        got = seconds(reply.value.get("lease_duration"))
        if got is None:
            return replace(lease, renewable=False)
        ends = reply.asked_at + got
        session = self._place.login.used
        held = token_of(session) == lease.session
        until = session.expires_at if held else lease.session_ends
        enough = reply.asked_at + CLEARLY_LESS * timedelta(seconds=asked)
        bound = until is not None and until < enough and not (held and session.renewable)
        return replace(
            lease,
            expires_at=ends if until is None else min(ends, until),
            renewed_at=reply.asked_at,
            renewable=reply.value.get("renewable") is True and ends >= enough and not bound,
            session_ends=until,
            own_end=ends,
        )

    def revoke(self, lease: Lease) -> None:
        """End a lease; one that ended by itself a while ago is not asked about."""
        if self.capabilities.kind is not Kind.LEASED:
            return super().revoke(lease)
        ends = lease.own_end or lease.expires_at
        if ends is not None and ends + ENDED_FOR < datetime.now(UTC):
            return None
        self._place.server.begin()
        return self._place.revoke(lease.id)

    def close(self) -> None:
        self._place.server.close()
        if self._profile is not None:
            super().close()

    def _kept(self) -> Credential:
        """Read a secret of KV; its version, or its fingerprint, is its lease's name."""
        assert self._profile is not None
        pinned = self._profile.source["version"]
        reply = self._place.read(self._path, pinned)
        if lease := lease_id(reply):
            raise self._place.refused(self._path, lease, 'set engine = "dynamic"')
        data = self._place.table(self._path, reply, pinned)
        secret = self._place.secret(self._path, self._field, data)
        answer = part(reply, "data")
        if is_versioned(answer):
            return Credential(secret, self._versioned(reply, answer["metadata"], data))
        kept = Lease(secret.fingerprint, "vault", reply.asked_at)
        again = seconds(reply.value.get("lease_duration")) if "ttl" in data else None
        if again is not None:  # advice of whoever wrote it; nothing ends
            kept = replace(kept, reread_at=reply.asked_at + max(again, SOONEST_REREAD))
        ends = self._time(data, "expires_at")
        return Credential(secret, self._ending(kept, ends))

    def _versioned(self, reply: Reply, meta: Mapping[str, Any], data: Mapping[str, Any]) -> Lease:
        """Read when a version was written and when it ends, from whichever place says so."""
        custom = meta.get("custom_metadata")
        said_with = custom if isinstance(custom, dict) else {}
        written = self._time(meta, "created_time")
        version = meta.get("version")
        if written is None or isinstance(version, bool) or not isinstance(version, int):
            raise self._place.invalid(self._path, "answers, but not as KV 2 does")
        skew = reply.skew
        ends = [self._time(data if data.get("expires_at") else said_with, "expires_at")]
        deleted = self._time(meta, "deletion_time")
        ends.append(None if deleted is None else _by_our_clock(deleted, skew))
        ttl = self._length(data if data.get("ttl") else said_with)
        ends.append(None if ttl is None else _by_our_clock(written, skew - ttl))
        lease = Lease(f"version {version}", "vault", reply.asked_at, written_at=written)
        return self._ending(lease, min((end for end in ends if end is not None), default=None))

    def _ending(self, lease: Lease, ends: datetime | None) -> Lease:
        if ends is not None and ends <= lease.issued_at:
            raise self._place.invalid(
                self._path,
                f"the key in it has ended on {day(ends)}",
                "put a new one there",
                withdrawn=True,
            )
        return replace(lease, expires_at=ends)

    def _time(self, table: Mapping[str, Any], name: str) -> datetime | None:
        """Read a time with its zone; what is not there or empty is None."""
        if not table.get(name):
            return None
        try:
            return read_time(table[name])
        except (ValueError, TypeError, OverflowError):
            raise self._place.invalid(
                self._path, f"{name} cannot be read", "such as 2027-01-31T12:00:00Z"
            ) from None

    def _length(self, table: Mapping[str, Any]) -> timedelta | None:
        """Read `ttl`, in seconds or as a duration."""
        ttl = table.get("ttl")
        if not ttl:
            return None
        if isinstance(ttl, str) and re.fullmatch(r"[0-9]{1,9}", ttl):
            ttl = int(ttl)
        try:
            found = seconds(ttl) or read_duration(ttl)
        except ValueError:
            raise self._place.invalid(
                self._path, "ttl cannot be read", "seconds, or such as 12h"
            ) from None
        return found

    def _leased(self) -> Credential:
        """Have a key made, with a lease. What cannot be used is given back at once."""
        assert self._profile is not None
        parameters = self._profile.source["parameters"]
        reply = self._place.login.ask(
            (lambda client: client.read(self._path))
            if parameters is None
            else (lambda client: client.write_data(self._path, data=parameters)),
            self._path,
            "read" if parameters is None else "update",
            makes=True,
            leases=True,
        )
        if reply.status != 200:
            raise self._place.nothing(self._path, reply)
        lease = lease_id(reply)
        if lease is None:
            raise self._place.invalid(self._path, "is no lease: what is there is kept", LEASELESS)
        try:
            return self._granted(lease, reply)
        except SourceInvalid as error:
            self._place.give_back(lease, error)
            raise

    def _granted(self, name: str, reply: Reply) -> Credential:
        assert self._profile is not None
        data = part(reply, "data")
        secret = self._place.secret(self._path, self._field, data)
        life = seconds(reply.value.get("lease_duration"))
        if life is None:
            raise self._place.invalid(self._path, "made a lease without an end")
        if life > LONGEST_LEASE and not self._profile.source["allow_orphans"]:
            raise self._place.invalid(
                self._path,
                "makes leases of more than 24h; one whose answer is lost would live so long",
                "give the role a default_ttl of at most 24h, or set allow_orphans = true",
            )
        session = self._place.login.used
        ends = [reply.asked_at + life]
        if session.expires_at is not None:
            ends.append(session.expires_at)
        unix = data.get("expiration")
        if isinstance(unix, int) and 0 < unix < LAST_SECOND:
            ends.append(_by_our_clock(datetime.fromtimestamp(unix, UTC), reply.skew))
        lease = Lease(
            name,
            "vault",
            reply.asked_at,
            min(ends),
            renewable=reply.value.get("renewable") is True,
            revocable=True,
            session=token_of(session),
            session_ends=session.expires_at,
            own_end=reply.asked_at + life,
        )
        return Credential(secret, lease)

    def _rotated(self) -> Credential:
        """Read a static role. Its `ttl` counts down to 0, and stays there until it is its turn."""
        reply = self._place.read(self._path)
        if reply.status != 200:
            raise self._place.nothing(self._path, reply)
        data = part(reply, "data")
        secret = self._place.secret(self._path, self._field, data)
        now = reply.asked_at
        written = self._time(data, "last_vault_rotation")
        ttl, period = seconds(data.get("ttl")), seconds(data.get("rotation_period"))
        if ttl is not None:
            again = now + ttl + timedelta(seconds=1)
        elif written is not None and period is not None:
            due = _by_our_clock(written, reply.skew - period)
            again = now + max(SOONEST_REREAD, (now - due) / 2)
        else:
            again = now + SOONEST_REREAD
        lease = Lease(secret.fingerprint, "vault", now, written_at=written, reread_at=again)
        return Credential(secret, lease)


def _by_our_clock(moment: datetime, skew: timedelta) -> datetime:
    """Correct a time by a skew; one at an end of the calendar, which says "never", stays there."""
    try:
        return moment - skew
    except OverflowError:
        return moment
