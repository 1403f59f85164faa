"""What to do next, and when: rules that are functions of values.

No clock, no disk, no network and no chance is in here: `now` and `roll` (a number from 0 to 1
that somebody else drew) are arguments. `hold` is the only grace period: how long a reader may
keep using what it was given.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta
from enum import StrEnum

from keybroker.credential import Issuer, Look, Phase, Verdict, sha256
from keybroker.slots import Key, Open, Slots, Trouble, change
from keybroker.values import dataclass, replace

LOOKS_AT_NEW_KEY = (timedelta(0), timedelta(seconds=1.5), timedelta(seconds=4))
SECOND_REFUSAL_AFTER = timedelta(seconds=1)
# After a call that may have committed: at once, then these, counted from its deadline. The last
# is when no gateway or proxy in between can still be holding the request.
LOOK_UPS = (timedelta(seconds=5), timedelta(seconds=60), timedelta(minutes=10), timedelta(hours=1))
MOVED = "the profile names another source now"
SIGNED_OUT = "signed out"
BEATEN = "another one was published first"
AGED = "it aged before it was verified"
ELSEWHERE = "keys are published elsewhere now"
EXPORTED = "exported"  # somebody was given it for good
ENDED_AFTER = timedelta(minutes=1)  # its end, by a gateway whose clock is a little behind
RETRY_MAX = timedelta(minutes=5)
SETTLED = LOOK_UPS[1]  # looked up after this, an open label no longer counts as a live key


class Kind(StrEnum):
    """Whose keys they are."""

    MINTED = "minted"  # ours: journalled, retired, revoked
    LEASED = "leased"  # made for us, renewed and revoked by us; its issuer says when it ends
    FOLLOWED = "followed"  # somebody else rotates it: read, verified, dropped when replaced

    @property
    def ours(self) -> bool:
        """Say whether its keys are journalled, retired and revoked."""
        return self is not Kind.FOLLOWED


@dataclass(frozen=True, slots=True)
class Policy:
    """
    The numbers of one profile.

    Attributes:
        issuer: Only its keys are handed out; keys of another are retired and revoked there.
        lifetime: Asked of the gateway (minted), or how long a lease whose answer was lost
            may live (leased).
        hold: How long a reader may keep a key.
        timeout: The longest that one call to the source takes.
        poll: How often a followed source is read.
        publishes: A new key is put where others read it.
        max_live: The most keys that may be alive at the issuer's gateway.
    """

    kind: Kind
    issuer: Issuer
    hold: timedelta
    lifetime: timedelta = timedelta(hours=12)
    timeout: timedelta = timedelta(seconds=8)
    poll: timedelta = timedelta(minutes=5)
    max_live: int = 4
    retry_min: timedelta = timedelta(seconds=1)
    retry_max: timedelta = RETRY_MAX
    verify: bool = True
    publishes: bool = False


@dataclass(frozen=True, slots=True)
class Issue:
    """Ask a minting source for a new key, under a label of its own."""


@dataclass(frozen=True, slots=True)
class Poll:
    """Read a followed source."""


@dataclass(frozen=True, slots=True)
class Renew:
    """Have the end of a lease moved."""

    label: str


@dataclass(frozen=True, slots=True)
class Verify:
    """Look at the gateway with a key."""

    label: str


@dataclass(frozen=True, slots=True)
class Stage:
    """Put a new key beside what others read, where it can be found again."""

    label: str


@dataclass(frozen=True, slots=True)
class Recover:
    """Read a key back from where it was put, since its secret was lost here."""

    label: str


@dataclass(frozen=True, slots=True)
class Publish:
    """Seal the new key and hand it out from now on."""

    label: str


@dataclass(frozen=True, slots=True)
class Export:
    """Have the file for programs that run no helper hold this key; without one, have no file."""

    label: str


@dataclass(frozen=True, slots=True)
class Retire:
    """Give a key up without a replacement. `bad`: a new one that was not good enough."""

    label: str
    why: str
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Revoke:
    """End a key where it was minted."""

    label: str


@dataclass(frozen=True, slots=True)
class Settle:
    """Look an open label up; what is found is revoked. `last`: nothing found closes it."""

    label: str
    last: bool


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before `until`; None: nothing until something happens."""

    until: datetime | None


Step = (
    Issue
    | Poll
    | Renew
    | Stage
    | Recover
    | Verify
    | Publish
    | Export
    | Retire
    | Revoke
    | Settle
    | Wait
)


def default_hold(helper_ttl: timedelta) -> timedelta:
    """Return how long a client that refreshes every `helper_ttl` may use a key it was given."""
    return max(timedelta(minutes=15), 3 * helper_ttl + timedelta(minutes=10))


def shortest_lifetime(hold: timedelta) -> timedelta:
    """Return the least lifetime with which a fresh key always has two holds left to rotate in."""
    return 3 * hold


def stale_at(key: Key, policy: Policy) -> datetime | None:
    """Return when a key is to be replaced: with two holds left, earlier by the label's jitter."""
    if key.lease.expires_at is None:
        if policy.kind is Kind.FOLLOWED:
            return None
        ends = key.lease.issued_at + policy.lifetime  # the gateway ends nothing: we do
    else:
        ends = key.lease.expires_at
    if key.lease.renewable and policy.kind is Kind.LEASED:
        return None  # it is renewed, until a renewal gives less than was asked
    start = _start(key)
    life, hold = ends - start, policy.hold
    if policy.kind is Kind.LEASED:
        hold = hold_of(key, policy)
    early = min(life * 2 / 3, max(life - 2 * hold, life / 4))
    return start + early - jitter(key.label, life)


def renew_at(key: Key, policy: Policy) -> datetime | None:
    """Return when a lease is to be renewed: at half of what was granted last."""
    ends = key.lease.expires_at
    if ends is None or not key.lease.renewable or policy.kind is not Kind.LEASED:
        return None
    life = ends - _start(key)
    return _start(key) + life / 2 - jitter(key.label, life)


def hold_of(key: Key, policy: Policy) -> timedelta:
    """
    Return how long readers may keep a key after it was replaced.

    A lease is as long as its issuer likes: its readers get at most a third of what was granted,
    so that each of them has it whole.
    """
    ends = key.lease.expires_at
    if policy.kind is Kind.LEASED and fits(key, policy) and ends is not None:
        return min(policy.hold, (ends - _start(key)) / 3)
    return max(key.hold, policy.hold)


def _start(key: Key) -> datetime:
    return key.lease.renewed_at or key.lease.issued_at


def slack(policy: Policy) -> timedelta:
    """Return how much earlier than its interval a source may be read, together with others."""
    if policy.poll < timedelta(seconds=4):
        return timedelta()
    return timedelta(seconds=max(1, min(60, policy.poll // timedelta(seconds=10))))


def jitter(label: str, life: timedelta) -> timedelta:
    """Return 0 to a tenth of the life, fixed by the label: hosts do not rotate in step."""
    return life * (int(sha256(label.encode())[:8], 16) / 0x1_0000_0000 / 10)


def expired(key: Key, now: datetime) -> bool:
    return key.lease.expires_at is not None and now >= key.lease.expires_at


def fits(key: Key, policy: Policy) -> bool:
    """
    Say whether a key is for this profile's gateway.

    A minted key is, whichever admin key it was minted with. What somebody else keeps is read from
    where the profile says now, whoever logs in to read it.
    """
    if policy.kind is Kind.FOLLOWED and key.issuer.admin != policy.issuer.admin:
        return False
    return _is_here(key, policy)


def _is_here(one: Key | Open, policy: Policy) -> bool:
    """Say whether it is at this profile's gateway, or was asked for there."""
    return (one.issuer.type, one.issuer.url) == (policy.issuer.type, policy.issuer.url)


def usable(key: Key | None, policy: Policy, now: datetime) -> bool:
    """Say whether a key may be handed out: alive, not condemned, of this profile's issuer."""
    return (
        key is not None
        and key.revoke_at is None
        and not key.condemned
        and not expired(key, now)
        and fits(key, policy)
    )


def phase(slots: Slots, policy: Policy, now: datetime) -> Phase:
    """Say how the current key stands."""
    key = slots.current
    if key is None:
        return Phase.NONE
    if expired(key, now):
        return Phase.EXPIRED
    if key.condemned or not fits(key, policy):
        return Phase.CONDEMNED
    if key.refused_at is not None:
        return Phase.SUSPECT
    due = stale_at(key, policy)
    return Phase.STALE if due is not None and now >= due else Phase.FRESH


def live(slots: Slots, policy: Policy, now: datetime) -> int:
    """
    Count what may be alive at this profile's gateway: keys, and open labels not yet settled.

    What has ended by itself is not alive, though nobody could confirm it; ends count by the
    earlier clock: one that was set forward has ended nothing. What is at another gateway does not
    count: one that is gone for good must not keep its successor from minting.
    """
    keys = sum(_is_here(key, policy) and not _ended(key, now) for key in slots.keys)
    opened = sum(
        _is_here(one, policy)
        and not _settled(one, policy, now)
        and now < one.since + policy.timeout + one.lifetime + LOOK_UPS[-1]
        for one in slots.open
    )
    return keys + opened


def room_at(slots: Slots, policy: Policy, now: datetime) -> datetime | None:
    """Return when there is one key less at this profile's gateway, should all go well."""
    times = []
    for key in slots.keys:
        ends = _ends_at(key)
        if not _is_here(key, policy) or (ends is not None and ends <= now):
            continue
        if key.revoke_at is not None and key.revoke_at > now:
            times.append(key.revoke_at)
        elif ends is not None:  # it could not be revoked so far
            times.append(ends)
    return min(times, default=None)


def _ended(key: Key, now: datetime) -> bool:
    ends = _ends_at(key)
    return ends is not None and now >= ends


def _ends_at(key: Key) -> datetime | None:
    """Return when a key has ended by itself, by whichever clock says so last."""
    ends = key.lease.own_end or key.lease.expires_at
    if ends is None:
        return None
    return ends + key.behind + min(ENDED_AFTER, (ends - key.lease.issued_at) / 4)


def next_step(slots: Slots, policy: Policy, now: datetime) -> Step:
    """
    Return the one thing to do now for a profile, or how long to wait.

    The order is the promise: a new key is verified and published before anything is revoked, an
    open label is looked up before another key is asked for.
    """
    waits: list[datetime] = []
    for when, step in _candidates(slots, policy, now):
        if when <= now:
            return step
        waits.append(when)
    return Wait(min(waits, default=None))


def _candidates(slots: Slots, policy: Policy, now: datetime) -> Iterator[tuple[datetime, Step]]:
    current = slots.current
    if current is not None and not fits(current, policy):
        yield current.not_before or now, Retire(current.label, MOVED)
    if slots.next is not None:
        due, step = _step_for_new(slots, slots.next, policy, now)
        yield due, step
        aged = _aged_at(slots.next, policy)
        if aged is not None and not isinstance(step, Retire):
            yield max(aged, slots.next.not_before or aged), Retire(slots.next.label, AGED, bad=True)
    for open_ in slots.open:
        yield _look_up(open_, policy, now)
    if current is not None and current.refused_at is None and usable(current, policy, now):
        renewal = renew_at(current, policy)
        if renewal is not None and not slots.rotate:
            yield max(renewal, current.not_before or renewal), Renew(current.label)
    if slots.next is None or policy.kind is Kind.FOLLOWED:  # its owner may have a better one
        yield from _replacement(slots, policy, now)
    if current is not None and current.refused_at is not None and not current.condemned:
        due = current.refused_at + SECOND_REFUSAL_AFTER
        yield max(due, current.not_before or due), Verify(current.label)
    for key in slots.retired:
        if key.revoke_at is not None:
            yield max(key.revoke_at, key.not_before or key.revoke_at), Revoke(key.label)


def _step_for_new(slots: Slots, new: Key, policy: Policy, now: datetime) -> tuple[datetime, Step]:
    """A new key gets up to three looks in five seconds before it counts as bad."""
    if not fits(new, policy):
        return new.not_before or now, Retire(new.label, MOVED)
    if new.beaten:
        return new.not_before or now, Retire(new.label, new.beaten, bad=True)
    if new.base is not None and not policy.publishes:  # others go on to read the one before it
        return new.not_before or now, Retire(new.label, ELSEWHERE, bad=True)
    expires = new.lease.expires_at
    # 2.5 and not 3: the answer came a moment after it was asked for.
    least = 2.5 * policy.hold
    if policy.kind is Kind.MINTED and expires is not None and expires - new.lease.issued_at < least:
        why = "the gateway gave it a shorter life than three holds"
        return new.not_before or now, Retire(new.label, why, bad=True)
    aged = _aged_at(new, policy)
    if aged is not None and now >= aged:
        return new.not_before or now, Retire(new.label, AGED, bad=True)
    if policy.publishes and not new.staged:
        return new.not_before or now, Stage(new.label)
    if not policy.verify or (
        new.verdict is not None and new.verdict.look in (Look.ALIVE, Look.UNVERIFIED)
    ):
        return new.not_before or now, Publish(new.label)
    if new.looks < len(LOOKS_AT_NEW_KEY):
        due = (new.first_look or now) + LOOKS_AT_NEW_KEY[new.looks]
        return max(due, new.not_before or due), Verify(new.label)
    if new.verdict is not None and new.verdict.look is Look.REFUSED:
        why = f"the gateway refused it ({new.verdict.reason})"
        return new.not_before or now, Retire(new.label, why, bad=True)
    if new.refused_at is None and not usable(slots.current, policy, now):
        # undecided, and nothing better is to be had
        return new.not_before or now, Publish(new.label)
    due = new.next_look or now
    return max(due, new.not_before or due), Verify(new.label)


def _aged_at(new: Key, policy: Policy) -> datetime | None:
    """Return when a new key has too little of its life left to be handed out."""
    expires = new.lease.expires_at
    if not policy.kind.ours or expires is None:
        return None
    return new.lease.issued_at + (expires - new.lease.issued_at) / 2


def _look_up(open_: Open, policy: Policy, now: datetime) -> tuple[datetime, Step]:
    deadline = open_.since + policy.timeout
    if policy.kind is Kind.LEASED:  # it cannot be found by its label; it ends by itself
        due = deadline + open_.lifetime
        return max(due, open_.not_before or due), Settle(open_.label, last=True)
    last = open_.over or now >= deadline + LOOK_UPS[-1]
    due = open_.since
    if open_.looked_at is not None:
        seen = open_.looked_at
        due = next((deadline + at for at in LOOK_UPS if deadline + at > seen), seen)
    return max(due, open_.not_before or due), Settle(open_.label, last)


def _settled(open_: Open, policy: Policy, now: datetime) -> bool:
    """Say whether an open label no longer keeps another key from being asked for."""
    if policy.kind is Kind.LEASED:
        return now >= _settles_at(open_, policy)
    return open_.looked_at is not None and open_.looked_at >= _settles_at(open_, policy)


def _settles_at(open_: Open, policy: Policy) -> datetime:
    return open_.since + policy.timeout + SETTLED


def _replacement(slots: Slots, policy: Policy, now: datetime) -> Iterator[tuple[datetime, Step]]:
    """Yield when to issue or poll next, if a reason for it is known."""
    current = slots.current
    wanted: datetime | None = now
    if not (slots.rotate or not usable(current, policy, now)):
        assert current is not None
        unpublished = policy.publishes and current.base is None  # others have none yet
        if current.refused_at is None and not unpublished:
            # whoever keeps it may have said when another one is to be had
            wanted = stale_at(current, policy) if current.lease.reread_at is None else None
    if policy.kind is Kind.FOLLOWED:
        if slots.polled_at is not None:
            regular = slots.polled_at + policy.poll - slack(policy)
            if current is not None and current.lease.reread_at is not None:
                regular = min(regular, current.lease.reread_at)
            wanted = regular if wanted is None else min(wanted, regular)
            # A source that has not rotated yet, or whose new key is tried, is asked no more often.
            if not slots.rotate or slots.next is not None:
                least = min(policy.poll - slack(policy), timedelta(seconds=5))
                wanted = max(wanted, slots.polled_at + least)
        yield max(wanted or now, slots.not_before or now), Poll()
        return
    if wanted is None:
        return
    if live(slots, policy, now) >= policy.max_live:
        room = [_settles_at(one, policy) for one in slots.open if not _settled(one, policy, now)]
        if policy.kind is Kind.LEASED and room:  # no look-up will say so
            yield max(wanted, min(room), slots.not_before or wanted), Issue()
        return
    spaced = now
    if slots.wanted_at is not None and slots.wanted_at <= now:  # else the clock was set back
        spaced = slots.wanted_at + policy.retry_min
    yield max(wanted, slots.not_before or wanted, spaced), Issue()


# What a worker's answer changes, beside the journal's records.


def backoff(
    failures: int,
    roll: float,
    policy: Policy,
    *,
    left: timedelta | None = None,
    retry_after: timedelta | None = None,
    final: bool = False,
) -> timedelta:
    """
    Return how long to wait after a failure: full jitter, tighter while a key runs out.

    Args:
        failures: How many in a row, this one included.
        roll: 0 to 1, drawn by the caller.
        left: What the current key has left to live.
        retry_after: The server's wish; never undercut.
        final: A denial; trying often is no use.
    """
    ceiling = min(policy.retry_max, policy.retry_min * (1 << min(failures, 16)))
    if final:
        ceiling = policy.retry_max
        roll = 1.0
    elif left is not None and left > timedelta(0):
        ceiling = max(policy.retry_min, min(ceiling, left / 4))
    delay = policy.retry_min + (ceiling - policy.retry_min) * roll
    return max(delay, retry_after or delay)


def not_renewable(slots: Slots, label: str) -> Slots:
    """A renewal was refused for good: the lease lives to its end, and is replaced before it."""
    key = slots.key(label)
    if key is None:
        return slots
    return change(slots, replace(key, lease=replace(key.lease, renewable=False)))


def failed(
    slots: Slots,
    policy: Policy,
    now: datetime,
    roll: float,
    trouble: Trouble,
    *,
    retry_after: timedelta | None = None,
    final: bool = False,
) -> Slots:
    """An issue or a poll did not work; the current key stays."""
    failures = slots.failures + 1
    left = None
    if slots.current is not None and slots.current.lease.expires_at is not None:
        left = slots.current.lease.expires_at - now
    delay = backoff(failures, roll, policy, left=left, retry_after=retry_after, final=final)
    return replace(slots, failures=failures, not_before=now + delay, trouble=trouble)


def worked(slots: Slots) -> Slots:
    """An issue or a poll worked."""
    return replace(slots, failures=0, not_before=None, trouble=None)


def hurried(slots: Slots) -> Slots:
    """A person asks for a new key now: no interval but the shortest holds."""
    return replace(at_once(slots), rotate=True)


def at_once(slots: Slots) -> Slots:
    """What failed is tried again now: an issue or a poll, and what is to be done with a new key."""
    new = slots.next
    if new is not None and new.failures:
        new = replace(new, failures=0, not_before=None)
    return replace(slots, next=new, not_before=None, failures=0)


def at_set_clock(slots: Slots, now: datetime) -> Slots:
    """What was put off by a clock that was set since is tried again; nothing was seen after now."""
    return replace(
        slots,
        current=_at_set_clock(slots.current, now),
        next=_at_set_clock(slots.next, now),
        retired=tuple(replace(key, not_before=None) for key in slots.retired),
        open=tuple(replace(one, not_before=None) for one in slots.open),
        not_before=None,
        polled_at=_past(slots.polled_at, now),
        accepted_at=_past(slots.accepted_at, now),
    )


def _at_set_clock(key: Key | None, now: datetime) -> Key | None:
    if key is None:
        return None
    first, refused = _past(key.first_look, now), _past(key.refused_at, now)
    return replace(key, not_before=None, next_look=None, first_look=first, refused_at=refused)


def _past(moment: datetime | None, now: datetime) -> datetime | None:
    return None if moment is None else min(moment, now)


def put_off(slots: Slots, label: str, policy: Policy, now: datetime, roll: float) -> Slots:
    """A renewal, revocation, verification or look-up got no answer: try again later."""
    key = slots.key(label)
    if key is not None:
        failures = key.failures + 1
        ends = key.lease.expires_at if policy.kind is Kind.LEASED else None
        left = None if ends is None else ends - now
        later = now + backoff(failures, roll, policy, left=left)
        return change(slots, replace(key, failures=failures, not_before=later))
    opened = tuple(
        replace(o, failures=o.failures + 1, not_before=now + backoff(o.failures + 1, roll, policy))
        if o.label == label
        else o
        for o in slots.open
    )
    return replace(slots, open=opened)


def judged(
    slots: Slots, label: str, verdict: Verdict, policy: Policy, now: datetime, roll: float
) -> Slots:
    """
    Take in one look at a key.

    One refusal makes the current key suspect. A second one, at least a second later, while the
    gateway is otherwise healthy (it accepted or minted something in between), condemns it; so it
    does where its keeper has withdrawn the key.
    """
    key = slots.key(label)
    if key is None:
        return slots
    if verdict.look is Look.ALIVE:
        slots = replace(slots, accepted_at=now)
    key = replace(key, verdict=verdict, looks=key.looks + 1, first_look=key.first_look or now)
    if slots.current is None or slots.current.label != label:
        if verdict.look is not Look.UNDECIDED:
            key = replace(key, refused_at=now if verdict.look is Look.REFUSED else None)
        if verdict.look is Look.UNDECIDED and key.looks >= len(LOOKS_AT_NEW_KEY):
            later = now + backoff(key.failures + 1, roll, policy)
            key = replace(key, failures=key.failures + 1, next_look=later)
            return change(slots, replace(key, not_before=None))
        return change(slots, replace(key, failures=0, not_before=None, next_look=None))
    if verdict.look is Look.ALIVE:
        key = replace(key, refused_at=None, not_before=None, failures=0)
    elif verdict.look is Look.REFUSED:
        if key.refused_at is None:
            key = replace(key, refused_at=now)
        elif now >= key.refused_at + SECOND_REFUSAL_AFTER and (
            slots.withdrawn or _healthy_since(slots, key.refused_at)
        ):
            key = replace(key, condemned=True)
    if key.refused_at is not None and not key.condemned:
        later = now + max(SECOND_REFUSAL_AFTER, backoff(key.failures + 1, roll, policy))
        key = replace(key, failures=key.failures + 1, not_before=later)
    return change(slots, key)


def _healthy_since(slots: Slots, moment: datetime) -> bool:
    return slots.accepted_at is not None and slots.accepted_at >= moment
