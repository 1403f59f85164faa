"""What is known of a profile's keys: the facts of the journal, folded into one value.

`fold` is the only reader of a record's meaning: the journal replays with it, and a running broker
applies the same records as its workers report them. A fact is never known in two ways.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from enum import StrEnum

from keybroker.clock import Instant
from keybroker.credential import Issuer, Lease, Verdict
from keybroker.values import dataclass, replace

REPLACED = "replaced"  # why a key was retired


class Event(StrEnum):
    """What a line of the journal says happened to a label."""

    WANTED = "wanted"  # about to ask for a key under this label
    HAVE = "have"  # the source answered with a lease
    RENEWED = "renewed"  # the source moved the lease's end
    STAGED = "staged"  # about to be put where others read it, in place of what stands there
    SWAP = "swap"  # verified, cached, handed out from now on; the one before is retired
    RETIRED = "retired"  # no longer handed out; to be revoked at revoke_at
    ANSWERED = "answered"  # an open call ended with an error: it cannot commit any more
    LOOKED = "looked"  # an open label was looked up, and nothing was there
    GONE = "gone"  # revoked, or never came to be; nothing is left to do


@dataclass(frozen=True, slots=True)
class Record:
    """
    One line of the journal. Only `wanted` carries an issuer, `have` and `renewed` a lease.

        {"n":7,"at":"2026-11-21T15:45:51.123456Z","event":"wanted","profile":"work",
         "label":"kb-3f9a1c02-work-01k…","issuer":{"type":"litellm","url":"https://llm.example.com",
         "admin":{"keyring":"litellm-admin"}},"hold_s":900,"lifetime_s":43200,"prev":"9f1c…"}

    `why` of `staged` is the version that stands where the key is published, and of which it is to
    take the place; it is left out where nothing was ever written there.

        {"n":9,"at":"2026-11-21T15:45:51.623456Z","event":"staged","profile":"work",
         "label":"kb-3f9a1c02-work-01k…","why":"6d0f3c1e-…","prev":"77ab…"}
    """

    at: datetime
    event: Event
    profile: str
    label: str
    issuer: Issuer | None = None
    lease: Lease | None = None
    fingerprint: str = ""
    lifetime: timedelta | None = None
    hold: timedelta | None = None
    revoke_at: datetime | None = None
    why: str = ""
    boot: float | None = None  # the boot clock, where a hold or a look-up counts from it
    boot_id: str = ""


@dataclass(frozen=True, slots=True)
class Open:
    """A label without an outcome: the call may have committed, or may yet."""

    label: str
    issuer: Issuer
    since: datetime
    lifetime: timedelta
    hold: timedelta
    clocks: Instant | None = None  # when it was written
    over: bool = False  # it was answered, with an error
    looks: int = 0
    looked_at: datetime | None = None
    looked_clocks: Instant | None = None
    failures: int = 0  # of look-ups that got no answer, since the last that did
    not_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """One key that was issued and is not yet gone. The secret is elsewhere."""

    label: str
    issuer: Issuer
    lease: Lease
    fingerprint: str
    lifetime: timedelta
    hold: timedelta
    wanted: Instant | None = None  # the clocks when it was asked for, where they were written down
    behind: timedelta = timedelta()  # by how much the earlier of its clocks is, as reckoned now
    revoke_at: datetime | None = None  # None: not retired
    retired: Instant | None = None  # the clocks when it was, where they were written down
    why: str = ""  # it was retired
    base: str | None = None  # the version that it is published in place of; None: not begun
    staged: bool = False  # it is where it can be found again
    beaten: str = ""  # why it cannot be published any more
    verified: str = ""  # the method that said so, or "unverified"
    verdict: Verdict | None = None
    looks: int = 0  # taken before it was published
    first_look: datetime | None = None
    next_look: datetime | None = None  # of one that stays undecided
    refused_at: datetime | None = None  # suspect since
    condemned: bool = False
    failures: int = 0  # of attempts to verify or revoke
    not_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class Trouble:
    """A failure in the words that were said: the error's code, its message and its hint."""

    code: str
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Slots:
    """
    All keys and open labels of one profile.

    Attributes:
        current: Handed out now.
        next: Minted, not yet published; its secret is known to this process only.
        retired: No longer handed out, to be revoked.
        open: Labels whose outcome is not known.
        withdrawn: Whoever keeps the key says that there is none any more.
        wanted_at: When the newest label was written; two calls are never closer than the retry
            interval, across restarts.
    """

    current: Key | None = None
    next: Key | None = None
    retired: tuple[Key, ...] = ()
    open: tuple[Open, ...] = ()
    wanted_at: datetime | None = None
    failures: int = 0  # of issues or polls, since the last that worked
    not_before: datetime | None = None
    polled_at: datetime | None = None  # a followed source was last read
    withdrawn: bool = False
    accepted_at: datetime | None = None  # the gateway last accepted a key or minted one
    rotate: bool = False  # somebody asked for a new key now
    trouble: Trouble | None = None  # the last failure, until something works

    @property
    def keys(self) -> tuple[Key, ...]:
        """Every key that is not gone, newest standing first."""
        return tuple(key for key in (self.current, self.next, *self.retired) if key is not None)

    @property
    def all(self) -> tuple[Key | Open, ...]:
        """Every key and every open label."""
        return (*self.keys, *self.open)

    def key(self, label: str) -> Key | None:
        return next((key for key in self.keys if key.label == label), None)


def fold(slots: Slots, record: Record) -> Slots:
    """
    Apply one record. Records that contradict what is known change nothing.

    A swap retires the key before it; a key that was never published when its process ended is
    left as `next`, and `rotation` retires it, since its secret went with the process. One that
    others may read by now is kept until its end, or for a hold after another was published.
    """
    if record.event is Event.WANTED and record.issuer is not None:
        if any(one.label == record.label for one in slots.all):
            return slots
        lifetime, hold = record.lifetime or timedelta(), record.hold or timedelta()
        opened = Open(record.label, record.issuer, record.at, lifetime, hold, _clocks(record))
        return replace(slots, open=(*slots.open, opened), wanted_at=record.at)
    if record.event is Event.HAVE and record.lease is not None:
        known = next((o for o in slots.open if o.label == record.label), None)
        if known is None:
            return slots
        key = Key(
            record.label,
            known.issuer,
            record.lease,
            record.fingerprint,
            known.lifetime,
            known.hold,
            known.clocks,
        )
        slots = _without_open(slots, record.label)
        retired = slots.retired
        if slots.next is not None:  # its process ended before it was published
            until = record.at if slots.next.base is None else end_of(slots.next)
            retired = (*retired, _retire(slots.next, until, "never handed out", record))
        return replace(slots, next=key, retired=retired, accepted_at=record.at)
    if record.event is Event.RENEWED and record.lease is not None:
        known_key = slots.key(record.label)
        if known_key is None:
            return slots
        renewed = replace(known_key, lease=record.lease, failures=0, not_before=None)
        return change(slots, renewed)
    if record.event is Event.STAGED:
        staged = slots.key(record.label)
        return slots if staged is None else change(slots, replace(staged, base=record.why))
    if record.event is Event.SWAP:
        return _swap(slots, record)
    if record.event is Event.RETIRED:
        return _retired(slots, record)
    if record.event is Event.ANSWERED:
        answered = tuple(
            replace(one, over=True) if one.label == record.label else one for one in slots.open
        )
        return replace(slots, open=answered)
    if record.event is Event.LOOKED:
        looked = tuple(
            replace(
                one,
                looks=one.looks + 1,
                looked_at=record.at,
                looked_clocks=_clocks(record),
                failures=0,
                not_before=None,
            )
            if one.label == record.label
            else one
            for one in slots.open
        )
        return replace(slots, open=looked)
    if record.event is Event.GONE:
        return without(_without_open(slots, record.label), record.label)
    return slots


def replay(records: Iterable[Record]) -> dict[str, Slots]:
    """Return what the journal knows, by profile."""
    known: dict[str, Slots] = {}
    for record in records:
        known[record.profile] = fold(known.get(record.profile, Slots()), record)
    return known


def change(slots: Slots, key: Key) -> Slots:
    """Put a key back in the place where its label stands."""
    if slots.current is not None and slots.current.label == key.label:
        return replace(slots, current=key)
    if slots.next is not None and slots.next.label == key.label:
        return replace(slots, next=key)
    retired = tuple(key if old.label == key.label else old for old in slots.retired)
    return replace(slots, retired=retired)


def _swap(slots: Slots, record: Record) -> Slots:
    new = slots.key(record.label)
    if new is None or new.revoke_at is not None:
        return slots
    slots = without(slots, record.label)
    retired = slots.retired
    if slots.current is not None:
        revoke_at = record.revoke_at or record.at + slots.current.hold
        if slots.current.base is not None and new.base is None:  # others go on to read it
            revoke_at = max(revoke_at, end_of(slots.current))
        retired = (*retired, _retire(slots.current, revoke_at, REPLACED, record))
    if new.base is not None:  # who reads what is published goes on to this one
        retired = tuple(_read_no_more(key, record) for key in retired)
    current = replace(new, verified=record.why, failures=0, not_before=None)
    return replace(slots, current=current, retired=retired, rotate=False)


def _retired(slots: Slots, record: Record) -> Slots:
    key = slots.key(record.label)
    if key is None:
        return slots
    revoke_at = record.revoke_at or record.at + key.hold
    retired = _retire(key, revoke_at, record.why, record)
    slots = without(slots, record.label)
    return replace(slots, retired=(*slots.retired, retired))


def _read_no_more(key: Key, record: Record) -> Key:
    revoke_at = record.revoke_at or record.at + key.hold
    if key.base is None or key.revoke_at is None or key.revoke_at <= revoke_at:
        return key
    return _retire(key, revoke_at, key.why, record)


def end_of(key: Key) -> datetime:
    """Return when a key ends by itself, or would if its gateway ended any."""
    return key.lease.expires_at or key.lease.issued_at + key.lifetime


def _retire(key: Key, revoke_at: datetime, why: str, record: Record) -> Key:
    key = replace(key, revoke_at=revoke_at, retired=_clocks(record), why=why)
    return replace(key, failures=0, not_before=None)


def _clocks(record: Record) -> Instant | None:
    return None if record.boot is None else Instant(record.at, record.boot, record.boot_id)


def _without_open(slots: Slots, label: str) -> Slots:
    return replace(slots, open=tuple(o for o in slots.open if o.label != label))


def without(slots: Slots, label: str) -> Slots:
    """Take a key out of every place."""
    return replace(
        slots,
        current=None if slots.current and slots.current.label == label else slots.current,
        next=None if slots.next and slots.next.label == label else slots.next,
        retired=tuple(key for key in slots.retired if key.label != label),
    )
