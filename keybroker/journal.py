"""What was issued and not yet revoked. The cache may be lost, the journal may not."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from keybroker.chain import Chain
from keybroker.credential import Issuer, Lease, Reference
from keybroker.errors import JournalError
from keybroker.label import is_made
from keybroker.paths import JOURNAL, Disk
from keybroker.slots import Event, Key, Record, replay
from keybroker.values import replace

COMPACT_ABOVE = 400  # records
_TIMES_OF_LEASE = (
    *("expires_at", "renewed_at", "session_ends", "own_end", "written_at", "reread_at"),
)


class Journal:
    """The journal of one state directory. Only the holder of the owner lock writes it."""

    def __init__(self, state: Path, disk: Disk | None = None) -> None:
        self._chain = Chain(state / JOURNAL, "journal", disk)

    def read(self) -> list[Record]:
        """
        Return all records.

        Raises:
            JournalError: It cannot be read, or a line is damaged.
        """
        return [self._decoded(number, found) for number, found in enumerate(self._chain.read(), 2)]

    def write(self, record: Record) -> None:
        """
        Add a record and return when it is on the disk.

        Raises:
            JournalError: It could not be written: what it announces must not be done.
        """
        self._chain.append(encode(record), sync=True)

    def compact(self, above: int = COMPACT_ABOVE) -> None:
        """
        Drop what is over: records of labels that are gone, but for the newest label of each
        profile (the retry interval counts from it) and the newest record (so does the clock).
        A profile that was made for one program leaves nothing.

        A key may have been retired by the record of another that is gone by now: each gets a
        record of its own.
        """
        records = self.read()
        if len(records) <= above:
            return
        known = replay(records)
        keep = {one.label for slots in known.values() for one in slots.all}
        newest = {
            r.profile: r.label
            for r in records
            if r.event is Event.WANTED and not is_made(r.profile)  # which nobody asks for again
        }
        keep.update(newest.values())
        last = records[-1]
        kept = [record for record in records if record.label in keep or record is last]
        retired = [
            _retirement(name, key, last.at)
            for name, slots in known.items()
            for key in slots.retired
        ]
        kept[-1:-1] = retired  # the newest record stays the last
        self._chain.rewrite(encode(record) for record in kept)

    def _decoded(self, line: int, found: Mapping[str, Any]) -> Record:
        try:
            return decode(found)
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
            raise JournalError(
                f"journal: {self._chain.path}: line {line} is damaged",
                hint="nothing is minted until this is mended; see docs/recovery.md",
            ) from None


def _retirement(profile: str, key: Key, now: datetime) -> Record:
    """Return the record that retires a key as it was retired, its clocks included."""
    record = Record(now, Event.RETIRED, profile, key.label, revoke_at=key.revoke_at, why=key.why)
    if key.retired is None:
        return record
    clocks = key.retired
    return replace(record, at=clocks.wall, boot=clocks.boot, boot_id=clocks.boot_id)


def encode(record: Record) -> dict[str, Any]:
    """Return a record as its line has it; what is empty is left out."""
    values: dict[str, Any] = {
        "at": write_time(record.at),
        "event": record.event.value,
        "profile": record.profile,
        "label": record.label,
    }
    if record.issuer is not None:
        values["issuer"] = encode_issuer(record.issuer)
    if record.lease is not None:
        values["lease"] = encode_lease(record.lease)
    if record.fingerprint:
        values["fingerprint"] = record.fingerprint
    if record.lifetime is not None:
        values["lifetime_s"] = record.lifetime.total_seconds()
    if record.hold is not None:
        values["hold_s"] = record.hold.total_seconds()
    if record.revoke_at is not None:
        values["revoke_at"] = write_time(record.revoke_at)
    if record.why:
        values["why"] = record.why
    if record.boot is not None:
        values.update(boot=record.boot, boot_id=record.boot_id)
    return values


def decode(found: Mapping[str, Any]) -> Record:
    """Read a record back; ValueError, KeyError or TypeError when it is not one."""
    return Record(
        at=read_time(found["at"]),
        event=Event(found["event"]),
        profile=_text(found["profile"]),
        label=_text(found["label"]),
        issuer=decode_issuer(found["issuer"]) if "issuer" in found else None,
        lease=decode_lease(found["lease"]) if "lease" in found else None,
        fingerprint=_text(found.get("fingerprint", "")),
        lifetime=timedelta(seconds=found["lifetime_s"]) if "lifetime_s" in found else None,
        hold=timedelta(seconds=found["hold_s"]) if "hold_s" in found else None,
        revoke_at=read_time(found["revoke_at"]) if "revoke_at" in found else None,
        why=_text(found.get("why", "")),
        boot=float(found["boot"]) if "boot" in found else None,
        boot_id=_text(found.get("boot_id", "")),
    )


def encode_issuer(issuer: Issuer) -> dict[str, Any]:
    """Return an issuer as its record has it: the reference to the admin key, never the key."""
    values: dict[str, Any] = {"type": issuer.type, "url": issuer.url}
    if issuer.admin is not None:
        value = issuer.admin.value
        values["admin"] = {issuer.admin.kind: value if isinstance(value, str) else list(value)}
    if issuer.ca is not None:
        values["ca"] = issuer.ca
    if issuer.vault:
        values["vault"] = issuer.vault
    if issuer.aws:
        values["aws"] = issuer.aws
    return values


def decode_issuer(found: Mapping[str, Any]) -> Issuer:
    """Read an issuer back; ValueError, KeyError or TypeError when it is not one."""
    admin = None
    if "admin" in found:
        [(kind, value)] = found["admin"].items()
        admin = Reference(kind, value if isinstance(value, str) else tuple(map(_text, value)))
    ca = _text(found["ca"]) if "ca" in found else None
    vault, account = _text(found.get("vault", "")), _text(found.get("aws", ""))
    return Issuer(_text(found["type"]), _text(found["url"]), admin, ca, vault, account)


def encode_lease(lease: Lease) -> dict[str, Any]:
    """Return a lease as its record has it."""
    values: dict[str, Any] = {
        "id": lease.id,
        "source": lease.source,
        "issued_at": write_time(lease.issued_at),
        "revocable": lease.revocable,
    }
    if lease.renewable:
        values["renewable"] = True
    if lease.session:
        values["session"] = lease.session
    for name in _TIMES_OF_LEASE:
        if (moment := getattr(lease, name)) is not None:
            values[name] = write_time(moment)
    return values


def decode_lease(found: Mapping[str, Any]) -> Lease:
    """Read a lease back; ValueError, KeyError or TypeError when it is not one."""
    return Lease(
        id=_text(found["id"]),
        source=_text(found["source"]),
        issued_at=read_time(found["issued_at"]),
        revocable=bool(found.get("revocable", False)),
        renewable=bool(found.get("renewable", False)),
        session=_text(found.get("session", "")),
        **{name: read_time(found[name]) for name in _TIMES_OF_LEASE if name in found},
    )


def write_time(moment: datetime) -> str:
    """Write an aware time as UTC with microseconds: 2026-11-21T15:45:51.123456Z."""
    # not strftime: it writes the year 1, which is how Go says "never", with one digit
    return f"{moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


def read_time(text: Any) -> datetime:
    moment = datetime.fromisoformat(_text(text))
    if moment.tzinfo is None:
        raise ValueError("a time without its zone")
    return moment.astimezone(UTC)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("expected text")
    return value
