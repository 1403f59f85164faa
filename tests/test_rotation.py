"""The rule, situation by situation, and what holds in any."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keybroker import rotation
from keybroker.credential import Issuer, Lease, Look, Phase, Reference, Verdict
from keybroker.rotation import (
    AGED,
    BEATEN,
    MOVED,
    Issue,
    Kind,
    Policy,
    Poll,
    Publish,
    Retire,
    Revoke,
    Settle,
    Stage,
    Step,
    Verify,
    Wait,
    backoff,
    default_hold,
    expired,
    failed,
    hurried,
    jitter,
    judged,
    live,
    next_step,
    phase,
    put_off,
    room_at,
    shortest_lifetime,
    stale_at,
    usable,
    worked,
)
from keybroker.slots import Key, Open, Slots, Trouble
from keybroker.values import replace

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)
TICK = timedelta(microseconds=1)
HOLD = 15 * MINUTE
ISSUER = Issuer("litellm", "https://llm.example.com", Reference("keyring", "admin"))
OTHER = replace(ISSUER, url="https://old.example.com")
MINTED = Policy(Kind.MINTED, ISSUER, HOLD)
FOLLOWED = Policy(Kind.FOLLOWED, ISSUER, HOLD)
ALIVE = Verdict(Look.ALIVE, "models", "200")
REFUSED = Verdict(Look.REFUSED, "models", "401")
UNDECIDED = Verdict(Look.UNDECIDED, "models", "503 error")
UNVERIFIED = Verdict(Look.UNVERIFIED, "none", "the gateway refuses no made-up key")
LIMIT = MINTED.timeout  # after which an open label's call has no answer any more


def key(
    label: str = "kb-1",
    *,
    age: timedelta = timedelta(0),
    life: timedelta | None = 12 * HOUR,
    **changes: object,
) -> Key:
    """Make a key issued so long before NOW, for so long."""
    issued = NOW - age
    lease = Lease(label, "litellm", issued, None if life is None else issued + life)
    made = Key(label, ISSUER, lease, "0a1b2c3d", life or timedelta(0), HOLD)
    return replace(made, **changes)  # type: ignore[arg-type]


def looked(label: str, verdict: Verdict, looks: int, ago: timedelta, **changes: object) -> Key:
    """Make a new key that was first looked at so long ago."""
    refused = NOW - ago if verdict is REFUSED else None
    made = key(label, verdict=verdict, looks=looks, first_look=NOW - ago, refused_at=refused)
    return replace(made, **changes)  # type: ignore[arg-type]


def opened(label: str = "kb-open", ago: timedelta = timedelta(0), **changes: object) -> Open:
    made = Open(label, ISSUER, NOW - ago, 12 * HOUR, HOLD)
    return replace(made, **changes)  # type: ignore[arg-type]


def due(made: Key, policy: Policy = MINTED) -> datetime:
    found = stale_at(made, policy)
    assert found is not None
    return found


FRESH = key(age=HOUR)
STALE = key(age=11 * HOUR)
SUSPECT = key(age=HOUR, refused_at=NOW, not_before=NOW + SECOND)
CONDEMNED = key(age=HOUR, refused_at=NOW, condemned=True)
RETIRED = key("kb-0", age=HOUR, revoke_at=NOW + 3 * MINUTE)


# hold


@pytest.mark.parametrize(
    ("helper_ttl", "hold"),
    [
        (timedelta(0), 15 * MINUTE),
        (MINUTE, 15 * MINUTE),
        (100 * SECOND, 15 * MINUTE),
        (101 * SECOND, 15 * MINUTE + 3 * SECOND),
        (5 * MINUTE, 25 * MINUTE),
        (HOUR, 190 * MINUTE),
    ],
)
def test_hold_covers_three_refreshes_and_ten_minutes(
    helper_ttl: timedelta, hold: timedelta
) -> None:
    """Hold is 3 TTL + 10 min, and never less than 15 min."""
    assert default_hold(helper_ttl) == hold


def test_the_shortest_lifetime_is_three_holds() -> None:
    """Less than three holds cannot be rotated with two of them left."""
    assert shortest_lifetime(HOLD) == 45 * MINUTE


LIVES = [
    3 * HOLD,
    3 * HOLD + TICK,
    3 * HOLD + SECOND,
    4 * HOLD,
    6 * HOLD - SECOND,
    6 * HOLD,
    6 * HOLD + SECOND,
    12 * HOUR,
    30 * 24 * HOUR,
]


@pytest.mark.parametrize("life", LIVES)
def test_a_key_is_stale_with_two_holds_left(life: timedelta) -> None:
    """For any lifetime of three holds or more, whatever the jitter, two holds are left then."""
    for number in range(200):
        made = key(f"kb-{number}", life=life)
        assert made.lease.expires_at is not None
        assert made.lease.expires_at - due(made) >= 2 * HOLD
        assert due(made) > made.lease.issued_at


@pytest.mark.parametrize("life", LIVES)
def test_a_key_is_stale_no_later_than_two_thirds_of_its_life(life: timedelta) -> None:
    """And no earlier than the tenth that jitter may take off."""
    latest = min(life * 2 / 3, life - 2 * HOLD)
    early = [due(key(f"kb-{number}", life=life)) - NOW for number in range(200)]
    assert max(early) <= latest
    assert min(early) >= latest - life / 10


def test_a_lease_just_below_three_holds_still_rotates_before_half_of_it() -> None:
    """A gateway that answers a second too little: nearly two holds are left, not a loop."""
    made = key(life=3 * HOLD - SECOND)
    assert made.lease.expires_at is not None
    assert made.lease.expires_at - due(made) >= 2 * HOLD - SECOND
    shortest = key(life=2 * HOLD)
    assert due(shortest) - NOW >= 2 * HOLD * (1 / 4 - 1 / 10)


def test_a_minted_key_without_an_end_is_replaced_by_the_lifetime_asked_for() -> None:
    """A gateway that promises no end does not make a key that lives for ever."""
    assert due(key(life=None)) == due(key(life=MINTED.lifetime))


def test_a_followed_key_without_an_end_is_never_stale() -> None:
    """Its owner rotates it."""
    assert stale_at(key(life=None), FOLLOWED) is None


def test_jitter_is_a_tenth_at_most_and_fixed_by_the_label() -> None:
    """Labels spread evenly over the tenth; the same label always falls on the same moment."""
    drawn = [jitter(f"kb-{number}", 10 * HOUR) / HOUR for number in range(1000)]
    assert drawn == [jitter(f"kb-{number}", 10 * HOUR) / HOUR for number in range(1000)]
    assert min(drawn) >= 0
    assert max(drawn) < 1
    tenths = [sum(at <= one * 10 < at + 1 for one in drawn) for at in range(10)]
    assert min(tenths) > 60
    assert max(tenths) < 140


# standing


@pytest.mark.parametrize(
    ("made", "policy", "expected"),
    [
        pytest.param(None, MINTED, False, id="none"),
        pytest.param(FRESH, MINTED, True, id="fresh"),
        pytest.param(STALE, MINTED, True, id="stale"),
        pytest.param(SUSPECT, MINTED, True, id="suspect"),
        pytest.param(CONDEMNED, MINTED, False, id="condemned"),
        pytest.param(key(age=12 * HOUR), MINTED, False, id="expired now"),
        pytest.param(key(age=12 * HOUR - TICK), MINTED, True, id="expires next"),
        pytest.param(key(life=None), MINTED, True, id="without an end"),
        pytest.param(replace(FRESH, issuer=OTHER), MINTED, False, id="of another issuer"),
        pytest.param(RETIRED, MINTED, False, id="retired"),
    ],
)
def test_usable(made: Key | None, policy: Policy, expected: bool) -> None:
    """A key is handed out until its very end, unless condemned, retired or of another issuer."""
    assert usable(made, policy, NOW) is expected


def test_expired() -> None:
    """A key is over at the moment that it was promised to end, not before; one without an end
    never is."""
    assert expired(key(age=HOUR, life=HOUR), NOW)
    assert not expired(key(age=HOUR, life=HOUR), NOW - TICK)
    assert not expired(key(life=None), NOW + 9000 * HOUR)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (None, Phase.NONE),
        (FRESH, Phase.FRESH),
        (STALE, Phase.STALE),
        (replace(STALE, refused_at=NOW), Phase.SUSPECT),
        (SUSPECT, Phase.SUSPECT),
        (CONDEMNED, Phase.CONDEMNED),
        (replace(FRESH, issuer=OTHER), Phase.CONDEMNED),
        (key(age=13 * HOUR), Phase.EXPIRED),
        (key(age=13 * HOUR, condemned=True), Phase.EXPIRED),
        (key(life=None), Phase.FRESH),
    ],
)
def test_phase(made: Key | None, expected: Phase) -> None:
    """What status calls it."""
    assert phase(Slots(current=made), MINTED, NOW) is expected


def test_a_key_is_stale_at_the_moment_and_not_before() -> None:
    """Phase and step change at the same moment."""
    slots = Slots(current=FRESH)
    assert phase(slots, MINTED, due(FRESH) - TICK) is Phase.FRESH
    assert phase(slots, MINTED, due(FRESH)) is Phase.STALE
    assert next_step(slots, MINTED, due(FRESH) - TICK) == Wait(due(FRESH))
    assert next_step(slots, MINTED, due(FRESH)) == Issue()


# each situation and its step


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        pytest.param(Slots(), Issue(), id="no key"),
        pytest.param(Slots(current=FRESH), Wait(due(FRESH)), id="fresh"),
        pytest.param(Slots(current=STALE), Issue(), id="stale"),
        pytest.param(
            Slots(current=STALE, not_before=NOW + MINUTE),
            Wait(NOW + MINUTE),
            id="stale, and the last try failed",
        ),
        pytest.param(
            Slots(current=FRESH, not_before=NOW + MINUTE),
            Wait(due(FRESH)),
            id="an old failure does not bring the next try forward",
        ),
        pytest.param(Slots(not_before=NOW + MINUTE), Wait(NOW + MINUTE), id="none, tried"),
        pytest.param(Slots(not_before=NOW), Issue(), id="none, to be tried again now"),
        pytest.param(Slots(current=key(age=13 * HOUR)), Issue(), id="expired"),
        pytest.param(Slots(current=FRESH, rotate=True), Issue(), id="rotate was asked for"),
        pytest.param(
            Slots(current=SUSPECT, not_before=NOW + MINUTE),
            Wait(NOW + SECOND),
            id="suspect, and a new key was not to be had: the second look",
        ),
        pytest.param(Slots(current=SUSPECT), Issue(), id="suspect: replaced at once"),
        pytest.param(Slots(current=CONDEMNED), Issue(), id="condemned"),
        pytest.param(
            Slots(current=CONDEMNED, not_before=NOW + MINUTE),
            Wait(NOW + MINUTE),
            id="condemned: no more looks",
        ),
        pytest.param(
            Slots(current=replace(FRESH, issuer=OTHER)), Retire("kb-1", MOVED), id="re-pointed"
        ),
        pytest.param(
            Slots(current=replace(FRESH, issuer=OTHER, not_before=NOW + MINUTE)),
            Issue(),
            id="re-pointed, and the journal was not to be written: a new key meanwhile",
        ),
    ],
)
def test_step_for_the_current_key(slots: Slots, expected: Step) -> None:
    """What is done for a current key, or without one."""
    assert next_step(slots, MINTED, NOW) == expected


def test_a_suspect_key_is_looked_at_again_after_a_second() -> None:
    """Not sooner, even when no backoff says so."""
    slots = Slots(current=replace(SUSPECT, not_before=None), not_before=NOW + HOUR)
    assert next_step(slots, MINTED, NOW) == Wait(NOW + SECOND)
    assert next_step(slots, MINTED, NOW + SECOND) == Verify("kb-1")


def new(made: Key, current: Key | None = None) -> Slots:
    return Slots(current=current, next=made)


LATER = NOW + 7 * SECOND
SHORT = key("kb-2", life=2.5 * HOLD - SECOND)
OLD = key("kb-2", age=6 * HOUR)


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        pytest.param(new(key("kb-2")), Verify("kb-2"), id="never looked at"),
        pytest.param(
            new(looked("kb-2", UNDECIDED, 1, SECOND)),
            Wait(NOW + SECOND / 2),
            id="second look after 1.5 s",
        ),
        pytest.param(
            new(looked("kb-2", REFUSED, 1, 1.5 * SECOND)), Verify("kb-2"), id="1.5 s later"
        ),
        pytest.param(
            new(looked("kb-2", REFUSED, 2, 1.5 * SECOND)),
            Wait(NOW + 2.5 * SECOND),
            id="third look after 4 s",
        ),
        pytest.param(new(looked("kb-2", REFUSED, 2, 4 * SECOND)), Verify("kb-2"), id="4 s later"),
        pytest.param(
            new(looked("kb-2", REFUSED, 3, 4 * SECOND)),
            Retire("kb-2", "the gateway refused it (401)", bad=True),
            id="refused thrice",
        ),
        pytest.param(
            new(looked("kb-2", REFUSED, 3, 4 * SECOND, not_before=LATER)),
            Wait(LATER),
            id="refused thrice, and the journal was not to be written",
        ),
        pytest.param(
            new(looked("kb-2", UNDECIDED, 3, 4 * SECOND)),
            Publish("kb-2"),
            id="undecided, and no other",
        ),
        pytest.param(
            new(looked("kb-2", UNDECIDED, 3, 4 * SECOND), FRESH),
            Verify("kb-2"),
            id="undecided, and the current is good",
        ),
        pytest.param(
            new(looked("kb-2", UNDECIDED, 3, 4 * SECOND, next_look=LATER), SUSPECT),
            Wait(NOW + SECOND),
            id="undecided, and the current is suspect: looked at as well",
        ),
        pytest.param(
            new(looked("kb-2", UNDECIDED, 3, 4 * SECOND, next_look=LATER), FRESH),
            Wait(LATER),
            id="undecided: looked at ever more rarely",
        ),
        pytest.param(
            new(looked("kb-2", UNDECIDED, 3, 4 * SECOND, next_look=LATER), CONDEMNED),
            Publish("kb-2"),
            id="undecided, and the current is condemned",
        ),
        pytest.param(
            new(looked("kb-2", UNDECIDED, 3, 4 * SECOND, not_before=LATER)),
            Wait(LATER),
            id="undecided, no other, and it could not be sealed",
        ),
        pytest.param(new(key("kb-2", not_before=LATER)), Wait(LATER), id="a look that went wrong"),
        pytest.param(
            new(looked("kb-2", UNDECIDED, 3, 4 * SECOND), key(age=12 * HOUR)),
            Publish("kb-2"),
            id="undecided, and the current is over",
        ),
        pytest.param(
            new(looked("kb-2", UNDECIDED, 3, 4 * SECOND, refused_at=NOW)),
            Verify("kb-2"),
            id="refused once, then undecided: not published",
        ),
        pytest.param(
            new(looked("kb-2", REFUSED, 5, MINUTE)),
            Retire("kb-2", "the gateway refused it (401)", bad=True),
            id="undecided for a while, refused in the end",
        ),
        pytest.param(new(looked("kb-2", ALIVE, 1, SECOND), FRESH), Publish("kb-2"), id="alive"),
        pytest.param(
            new(looked("kb-2", ALIVE, 1, SECOND, not_before=LATER), FRESH),
            Wait(LATER),
            id="alive, and it could not be sealed",
        ),
        pytest.param(
            new(looked("kb-2", UNVERIFIED, 1, SECOND), FRESH), Publish("kb-2"), id="unverified"
        ),
        pytest.param(
            new(SHORT),
            Retire("kb-2", "the gateway gave it a shorter life than three holds", bad=True),
            id="a short lease",
        ),
        pytest.param(
            new(key("kb-2", life=2.5 * HOLD)), Verify("kb-2"), id="a lease that is just enough"
        ),
        pytest.param(
            new(OLD),
            Retire("kb-2", "it aged before it was verified", bad=True),
            id="undecided for half its life",
        ),
        pytest.param(
            new(replace(OLD, verdict=ALIVE), FRESH),
            Retire("kb-2", "it aged before it was verified", bad=True),
            id="not to be sealed for half its life",
        ),
        pytest.param(new(key("kb-2", issuer=OTHER)), Retire("kb-2", MOVED), id="of another issuer"),
    ],
)
def test_step_for_a_new_key(slots: Slots, expected: Step) -> None:
    """A new key gets three looks in four seconds; only one that was never refused is published."""
    assert next_step(slots, MINTED, NOW) == expected


def test_a_new_key_is_published_untried_where_looks_are_off() -> None:
    """`verify = "none"`: that is what was asked for."""
    assert next_step(new(key("kb-2")), replace(MINTED, verify=False), NOW) == Publish("kb-2")


PUBLISHING = replace(MINTED, publishes=True)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        pytest.param(key("kb-2"), Stage("kb-2"), id="minted"),
        pytest.param(key("kb-2", base="v-1"), Stage("kb-2"), id="begun, and not known to be there"),
        pytest.param(key("kb-2", base="", staged=True), Verify("kb-2"), id="there"),
        pytest.param(
            looked("kb-2", ALIVE, 1, SECOND, base="v-1", staged=True), Publish("kb-2"), id="alive"
        ),
        pytest.param(
            looked("kb-2", ALIVE, 1, SECOND, base="v-1", staged=True, beaten=BEATEN),
            Retire("kb-2", BEATEN, bad=True),
            id="another was first",
        ),
    ],
)
def test_step_for_a_new_key_that_is_published(made: Key, expected: Step) -> None:
    """It is put beside what others read before it is tried, so that it can be found again."""
    assert next_step(new(made, replace(FRESH, base="v-0")), PUBLISHING, NOW) == expected


def test_a_key_that_was_never_published_is_replaced_at_once() -> None:
    """Others read what is there, which is none of ours yet; after that, as everywhere."""
    assert next_step(Slots(current=FRESH), PUBLISHING, NOW) == Issue()
    there = Slots(current=replace(FRESH, base=""))
    assert isinstance(next_step(there, PUBLISHING, NOW), Wait)


def test_a_new_key_that_stays_undecided_is_given_up_when_it_has_aged() -> None:
    """At half of its life, and not when it would have been looked at again."""
    made = looked("kb-2", UNDECIDED, 3, HOUR, next_look=NOW + 6 * HOUR)
    found = next_step(new(made, FRESH), MINTED, NOW)
    assert found == Wait(NOW + 6 * HOUR)
    older = replace(made, next_look=NOW + 7 * HOUR)
    aged = new(older, FRESH)
    assert next_step(aged, MINTED, NOW) == Wait(NOW + 6 * HOUR)
    later = NOW + 6 * HOUR
    assert next_step(aged, MINTED, later) == Retire("kb-2", AGED, bad=True)


def test_a_followed_key_of_any_life_is_looked_at() -> None:
    """Its life is its owner's affair."""
    assert next_step(new(SHORT), FOLLOWED, NOW) == Verify("kb-2")
    assert next_step(new(OLD), FOLLOWED, NOW) == Verify("kb-2")


def test_nothing_is_asked_for_while_a_new_key_waits() -> None:
    """One at a time, stale or condemned as the current may be."""
    for current in (None, STALE, CONDEMNED):
        slots = new(looked("kb-2", REFUSED, 1, SECOND), current)
        assert not isinstance(next_step(slots, MINTED, NOW), Issue)


# open labels


@pytest.mark.parametrize(
    ("looked_after", "next_after", "last"),
    [
        pytest.param(None, timedelta(0), False, id="at once"),
        pytest.param(timedelta(0), LIMIT + 5 * SECOND, False, id="5 s after the deadline"),
        pytest.param(LIMIT, LIMIT + 5 * SECOND, False, id="looked at on the deadline"),
        pytest.param(LIMIT + 5 * SECOND, LIMIT + MINUTE, False, id="a minute"),
        pytest.param(LIMIT + 59 * SECOND, LIMIT + MINUTE, False, id="just before the minute"),
        pytest.param(LIMIT + MINUTE, LIMIT + 10 * MINUTE, False, id="ten minutes"),
        pytest.param(LIMIT + 10 * MINUTE, LIMIT + HOUR, True, id="an hour: the last"),
        pytest.param(LIMIT + 2 * HOUR, LIMIT + 2 * HOUR, True, id="at once, after a long sleep"),
    ],
)
def test_an_open_label_is_looked_up(
    looked_after: timedelta | None, next_after: timedelta, last: bool
) -> None:
    """At once, then 5 s, 60 s, 10 min and 1 h after its call's deadline; only the last closes."""
    looked_at = None if looked_after is None else NOW + looked_after
    slots = Slots(current=FRESH, open=(opened(looked_at=looked_at),))
    at = NOW + next_after
    assert next_step(slots, MINTED, at) == Settle("kb-open", last)
    if next_after > (looked_after or timedelta(0)):
        assert next_step(slots, MINTED, at - TICK) == Wait(at)


def test_a_look_up_that_got_no_answer_is_put_off() -> None:
    """Its own interval holds, not the schedule's."""
    slots = Slots(current=FRESH, open=(opened(not_before=NOW + MINUTE),))
    assert next_step(slots, MINTED, NOW) == Wait(NOW + MINUTE)


def test_a_first_look_up_after_an_hour_is_the_last() -> None:
    """Nothing can commit any more: what is not there never will be."""
    slots = Slots(open=(opened(ago=LIMIT + HOUR),))
    assert next_step(slots, MINTED, NOW) == Settle("kb-open", True)


def waiting(after: timedelta) -> Slots:
    """Three labels that were looked up so long after their deadline, beside a stale key."""
    ago = LIMIT + 2 * MINUTE
    made = [opened(f"kb-{n}", ago, looked_at=NOW - 2 * MINUTE + after) for n in "abc"]
    return Slots(current=STALE, open=tuple(made))


def test_an_open_label_counts_as_a_key_until_a_minute_after_its_deadline() -> None:
    """Four may live; three open labels and the current key are four until they were looked up."""
    assert live(waiting(MINUTE - TICK), MINTED, NOW) == 4
    assert next_step(waiting(MINUTE - TICK), MINTED, NOW) == Settle("kb-a", False)
    assert live(waiting(MINUTE), MINTED, NOW) == 1
    assert next_step(waiting(MINUTE), MINTED, NOW) == Issue()


def test_no_more_than_max_live_keys() -> None:
    """Keys that are still to be revoked count: a gateway that revokes nothing gets no more."""
    retired = tuple(replace(RETIRED, label=f"kb-{n}") for n in "abc")
    slots = Slots(current=STALE, retired=retired)
    assert live(slots, MINTED, NOW) == 4
    assert next_step(slots, MINTED, NOW) == Wait(NOW + 3 * MINUTE)
    assert next_step(slots, replace(MINTED, max_live=5), NOW) == Issue()
    assert next_step(replace(slots, retired=retired[1:]), MINTED, NOW) == Issue()


@pytest.mark.parametrize(
    ("issuer", "count"),
    [
        (ISSUER, 4),
        (replace(ISSUER, admin=None), 4),  # another admin key of the same gateway
        (OTHER, 1),
        (replace(ISSUER, type="vault"), 1),
    ],
)
def test_what_is_at_another_gateway_leaves_room_at_this_one(issuer: Issuer, count: int) -> None:
    """One that is gone for good must not keep its successor from minting."""
    retired = tuple(replace(RETIRED, label=f"kb-{n}", issuer=issuer) for n in "ab")
    slots = Slots(current=STALE, retired=retired, open=(opened(issuer=issuer, looked_at=NOW),))
    assert live(slots, MINTED, NOW) == count
    assert isinstance(next_step(slots, MINTED, NOW), Wait if count == 4 else Issue)


def test_room_is_made_by_a_revocation_or_else_by_an_end() -> None:
    """Of keys at this gateway; a revocation that is overdue makes none yet."""
    elsewhere = replace(RETIRED, issuer=OTHER, revoke_at=NOW + SECOND)
    overdue = key("kb-a", age=11 * HOUR, revoke_at=NOW - MINUTE)
    assert room_at(Slots(current=FRESH, retired=(RETIRED, elsewhere)), MINTED, NOW) == (
        NOW + 3 * MINUTE
    )
    assert room_at(Slots(retired=(overdue,)), MINTED, NOW) == NOW + HOUR + MINUTE
    assert room_at(Slots(retired=(key(life=None),)), MINTED, NOW) is None
    assert room_at(Slots(retired=(elsewhere,)), MINTED, NOW) is None


def test_calls_that_mint_are_a_retry_interval_apart() -> None:
    """Counted from the label in the journal, so across restarts as well."""
    slots = Slots(wanted_at=NOW)
    assert next_step(slots, MINTED, NOW) == Wait(NOW + SECOND)
    assert next_step(slots, MINTED, NOW + SECOND) == Issue()
    hasty = Slots(current=FRESH, rotate=True, wanted_at=NOW)
    assert next_step(hasty, MINTED, NOW) == Wait(NOW + SECOND)


def test_a_label_from_the_future_holds_nothing_up() -> None:
    """A clock that was set back a year does not stop minting for a year."""
    assert next_step(Slots(wanted_at=NOW + 365 * 24 * HOUR), MINTED, NOW) == Issue()


# retired keys, and what comes first


def test_a_retired_key_is_revoked_when_its_hold_is_over() -> None:
    """Not sooner; and after a failure not before its next try."""
    slots = Slots(current=FRESH, retired=(RETIRED,))
    over = NOW + 3 * MINUTE
    assert next_step(slots, MINTED, over - TICK) == Wait(over)
    assert next_step(slots, MINTED, over) == Revoke("kb-0")
    tried = replace(slots, retired=(replace(RETIRED, not_before=over + MINUTE),))
    assert next_step(tried, MINTED, over) == Wait(over + MINUTE)
    assert next_step(tried, MINTED, over + MINUTE) == Revoke("kb-0")


def test_what_comes_first() -> None:
    """A new key comes before look-ups, those before asking for another, revoking is last."""
    moved = replace(FRESH, issuer=OTHER)
    retired = (replace(RETIRED, revoke_at=NOW), replace(RETIRED, label="kb-00", revoke_at=NOW))
    suspect = replace(SUSPECT, refused_at=NOW - SECOND, not_before=NOW)
    everything = Slots(current=moved, next=key("kb-2"), open=(opened(),), retired=retired)
    assert next_step(everything, MINTED, NOW) == Retire("kb-1", MOVED)
    everything = replace(everything, current=suspect)
    assert next_step(everything, MINTED, NOW) == Verify("kb-2")
    everything = replace(everything, next=None)
    assert next_step(everything, MINTED, NOW) == Settle("kb-open", False)
    everything = replace(everything, open=())
    assert next_step(everything, MINTED, NOW) == Issue()
    everything = replace(everything, not_before=NOW + HOUR)
    assert next_step(everything, MINTED, NOW) == Verify("kb-1")
    everything = replace(everything, current=FRESH)
    assert next_step(everything, MINTED, NOW) == Revoke("kb-0")
    everything = replace(everything, retired=retired[1:])
    assert next_step(everything, MINTED, NOW) == Revoke("kb-00")
    everything = replace(everything, retired=())
    assert next_step(everything, MINTED, NOW) == Wait(due(FRESH))


def test_the_wait_is_for_the_earliest() -> None:
    """Of a look-up, a revocation and the key's own time."""
    slots = Slots(
        current=FRESH,
        open=(opened(looked_at=NOW + LIMIT),),
        retired=(RETIRED, replace(RETIRED, label="kb-00", revoke_at=NOW + 2 * SECOND)),
    )
    assert next_step(slots, MINTED, NOW) == Wait(NOW + 2 * SECOND)
    slots = replace(slots, retired=(RETIRED,))
    assert next_step(slots, MINTED, NOW) == Wait(NOW + LIMIT + 5 * SECOND)


# followed sources

ENDLESS = key(life=None, age=HOUR)


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        pytest.param(Slots(), Poll(), id="never read"),
        pytest.param(Slots(not_before=LATER), Wait(LATER), id="it failed"),
        pytest.param(Slots(current=ENDLESS), Poll(), id="from the cache, never read here"),
        pytest.param(
            Slots(current=ENDLESS, polled_at=NOW), Wait(NOW + 4.5 * MINUTE), id="read just now"
        ),
        pytest.param(
            Slots(current=ENDLESS, polled_at=NOW - 5 * MINUTE), Poll(), id="read 5 min ago"
        ),
        pytest.param(
            Slots(current=ENDLESS, polled_at=NOW - 5 * MINUTE, not_before=LATER),
            Wait(LATER),
            id="due, and the last try failed",
        ),
        pytest.param(
            Slots(current=ENDLESS, polled_at=NOW, rotate=True), Poll(), id="rotate: at once"
        ),
        pytest.param(
            Slots(current=replace(ENDLESS, refused_at=NOW, not_before=LATER), polled_at=NOW),
            Wait(NOW + 5 * SECOND),
            id="suspect: read again, but not at once",
        ),
        pytest.param(
            Slots(current=replace(ENDLESS, condemned=True), polled_at=NOW - 5 * SECOND),
            Poll(),
            id="condemned: every 5 s",
        ),
        pytest.param(
            Slots(current=key(age=12 * HOUR), polled_at=NOW - SECOND),
            Wait(NOW + 4 * SECOND),
            id="over, and its owner has not rotated it",
        ),
        pytest.param(Slots(current=STALE, polled_at=NOW - MINUTE), Poll(), id="its end is near"),
        pytest.param(
            Slots(current=FRESH, polled_at=NOW),
            Wait(NOW + 4.5 * MINUTE),
            id="its end is far",
        ),
        pytest.param(
            Slots(current=ENDLESS, next=key("kb-2", life=None), polled_at=NOW),
            Verify("kb-2"),
            id="a new value is tried",
        ),
        pytest.param(
            Slots(
                current=ENDLESS,
                next=looked("kb-2", UNDECIDED, 3, 4 * SECOND),
                polled_at=NOW - HOUR,
            ),
            Verify("kb-2"),
            id="a new value that is undecided replaces nothing",
        ),
        pytest.param(
            Slots(current=CONDEMNED, next=looked("kb-2", UNDECIDED, 3, 4 * SECOND)),
            Publish("kb-2"),
            id="a new value that is undecided is better than a condemned one",
        ),
    ],
)
def test_step_for_a_followed_source(slots: Slots, expected: Step) -> None:
    """A followed source is read every 5 min, at once when asked, every 5 s while in trouble."""
    assert next_step(slots, FOLLOWED, NOW) == expected


def test_a_short_poll_interval_is_kept_in_trouble() -> None:
    """A source read every second is not read more rarely because its key is condemned."""
    slots = Slots(current=CONDEMNED, polled_at=NOW)
    assert next_step(slots, replace(FOLLOWED, poll=SECOND), NOW) == Wait(NOW + SECOND)


# what holds in any situation


def moments(least: int, most: int) -> st.SearchStrategy[datetime]:
    """Moments around NOW, in seconds; round ones, so that several fall together."""
    return st.integers(least, most).map(lambda seconds: NOW + seconds * SECOND)


def maybe(strategy: st.SearchStrategy[datetime]) -> st.SearchStrategy[datetime | None]:
    return st.none() | strategy


NEAR = moments(-20, 20) | moments(-5000, 5000) | moments(-100_000, 100_000)
ISSUERS = st.sampled_from([ISSUER, ISSUER, ISSUER, OTHER])
VERDICTS = st.sampled_from([None, ALIVE, REFUSED, UNDECIDED, UNVERIFIED])


@st.composite
def keys(draw: st.DrawFn, label: str, retired: bool = False) -> Key:
    issued = draw(NEAR)
    life = draw(st.none() | st.sampled_from([60, 1800, 2700, 2701, 43_200]))
    ends = None if life is None else issued + life * SECOND
    looks = draw(st.integers(0, 4))
    return Key(
        label,
        draw(ISSUERS),
        Lease(label, "litellm", issued, ends),
        "0a1b2c3d",
        12 * HOUR,
        HOLD,
        revoke_at=draw(NEAR) if retired else None,
        verdict=draw(VERDICTS),
        looks=looks,
        first_look=draw(NEAR) if looks else None,
        next_look=draw(maybe(NEAR)),
        refused_at=draw(maybe(NEAR)),
        condemned=draw(st.booleans()),
        failures=draw(st.integers(0, 40)),
        not_before=draw(maybe(NEAR)),
    )


@st.composite
def opens(draw: st.DrawFn, label: str) -> Open:
    made = opened(label, timedelta(0), since=draw(NEAR), looked_at=draw(maybe(NEAR)))
    return replace(made, not_before=draw(maybe(NEAR)), failures=draw(st.integers(0, 20)))


@st.composite
def situations(draw: st.DrawFn) -> Slots:
    return Slots(
        current=draw(st.none() | keys("kb-current")),
        next=draw(st.none() | keys("kb-next")),
        retired=tuple(draw(keys(f"kb-r{n}", True)) for n in range(draw(st.integers(0, 2)))),
        open=tuple(draw(opens(f"kb-o{n}")) for n in range(draw(st.integers(0, 2)))),
        wanted_at=draw(maybe(NEAR)),
        failures=draw(st.integers(0, 40)),
        not_before=draw(maybe(NEAR)),
        polled_at=draw(maybe(NEAR)),
        accepted_at=draw(maybe(NEAR)),
        rotate=draw(st.booleans()),
    )


POLICIES = st.sampled_from(
    [MINTED, FOLLOWED, replace(MINTED, verify=False), replace(MINTED, max_live=2)]
)
ANY = settings(max_examples=400)


@ANY
@given(situations(), POLICIES, NEAR)
def test_waits_lead_to_steps(slots: Slots, policy: Policy, now: datetime) -> None:
    """A wait ends later than now, and what it ends with is a step, after a few waits at most."""
    for _ in range(12):
        step = next_step(slots, policy, now)
        if not isinstance(step, Wait) or step.until is None:
            return
        assert step.until > now
        now = step.until
    pytest.fail("it only waits")


@ANY
@given(situations(), POLICIES, NEAR)
def test_a_step_names_what_is_there(slots: Slots, policy: Policy, now: datetime) -> None:
    """A label in a step is one of the profile's, in the place that the step is about."""
    step = next_step(slots, policy, now)
    retired = {one.label for one in slots.retired}
    fresh = {one.label for one in (slots.current, slots.next) if one is not None}
    if isinstance(step, Revoke):
        assert step.label in retired
    elif isinstance(step, Verify | Retire):
        assert step.label in fresh
    elif isinstance(step, Publish):
        assert slots.next is not None
        assert step.label == slots.next.label
    elif isinstance(step, Settle):
        assert step.label in {one.label for one in slots.open}
    elif isinstance(step, Issue | Poll):
        assert isinstance(step, Issue) is (policy.kind is Kind.MINTED)
        assert slots.next is None or isinstance(step, Poll)


@ANY
@given(situations(), POLICIES, NEAR, st.floats(0, 1))
def test_a_step_that_failed_is_not_tried_again_at_once(
    slots: Slots, policy: Policy, now: datetime, roll: float
) -> None:
    """Whatever fails, and in whatever situation, the next try is a retry interval later."""
    step = next_step(slots, policy, now)
    if isinstance(step, Wait):
        return
    if isinstance(step, Issue | Poll):
        slots = failed(slots, policy, now, roll, Trouble("unavailable", "it is down"))
    else:
        slots = put_off(slots, step.label, policy, now, roll)
    again = next_step(slots, policy, now)
    assert replace(step, last=True) != again if isinstance(step, Settle) else step != again


@ANY
@given(situations(), NEAR)
def test_nothing_is_asked_for_beyond_the_limits(slots: Slots, now: datetime) -> None:
    """An Issue means: fewer than max_live, no backoff pending, and the interval has passed."""
    if next_step(slots, MINTED, now) != Issue():
        return
    assert live(slots, MINTED, now) < MINTED.max_live
    assert slots.not_before is None or slots.not_before <= now
    if slots.wanted_at is not None:
        assert not now - MINTED.retry_min < slots.wanted_at <= now


@ANY
@given(situations(), POLICIES, NEAR)
def test_a_refused_key_is_never_published(slots: Slots, policy: Policy, now: datetime) -> None:
    """Unless looks are off, Publish follows on alive or unverified, or on nothing being known."""
    if not isinstance(next_step(slots, policy, now), Publish) or not policy.verify:
        return
    assert slots.next is not None
    assert slots.next.verdict is None or slots.next.verdict.look is not Look.REFUSED
    if slots.next.verdict in (None, UNDECIDED):
        assert slots.next.refused_at is None
        assert not usable(slots.current, policy, now)


# retries

ROLLS = st.floats(0, 1)
FAILURES = st.integers(1, 100)
SPANS = st.floats(0.001, 1e6).map(lambda seconds: timedelta(seconds=seconds))


@given(FAILURES, ROLLS, st.none() | SPANS)
def test_a_retry_is_between_the_shortest_and_the_longest_interval(
    failures: int, roll: float, left: timedelta | None
) -> None:
    """From 1 s to 5 min, however many failures; tighter while the current key runs out."""
    delay = backoff(failures, roll, MINTED, left=left)
    assert SECOND <= delay <= 5 * MINUTE
    if left is not None:
        assert delay <= max(SECOND, left / 4)


@given(FAILURES, ROLLS, SPANS, st.none() | SPANS, st.booleans())
def test_what_the_server_asks_for_is_never_undercut(
    failures: int, roll: float, wish: timedelta, left: timedelta | None, final: bool
) -> None:
    """Not even when the current key ends before."""
    delay = backoff(failures, roll, MINTED, left=left, retry_after=wish, final=final)
    assert delay >= wish


@given(FAILURES, ROLLS, st.none() | SPANS)
def test_a_denial_is_retried_at_the_longest_interval(
    failures: int, roll: float, left: timedelta | None
) -> None:
    """Trying often is no use; never trying again would be worse."""
    assert backoff(failures, roll, MINTED, left=left, final=True) == 5 * MINUTE


def test_retries_spread_and_grow() -> None:
    """The last moment doubles from 2 s; the first stays 1 s."""
    longest = [backoff(n, 1.0, MINTED) / SECOND for n in range(1, 11)]
    assert longest == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert {backoff(n, 0.0, MINTED) for n in range(1, 11)} == {SECOND}
    assert backoff(3, 0.5, MINTED) == 4.5 * SECOND


def test_a_failure_is_remembered_until_something_works() -> None:
    """The current key stays; count, next try and words are kept, then all are gone."""
    trouble = Trouble("unavailable", "litellm: is down", "wait")
    once = failed(Slots(current=FRESH), MINTED, NOW, 0.5, trouble)
    assert once == Slots(current=FRESH, failures=1, not_before=NOW + 1.5 * SECOND, trouble=trouble)
    twice = failed(once, MINTED, NOW, 0.5, trouble)
    assert (twice.failures, twice.not_before) == (2, NOW + 2.5 * SECOND)
    assert worked(twice) == Slots(current=FRESH)


def test_retries_get_tighter_as_the_current_key_ends() -> None:
    """With twenty seconds left, the fortieth try is within five."""
    slots = Slots(current=key(age=12 * HOUR - 20 * SECOND), failures=40)
    trouble = Trouble("unavailable", "litellm: is down")
    assert failed(slots, MINTED, NOW, 1.0, trouble).not_before == NOW + 5 * SECOND
    denied = failed(slots, MINTED, NOW, 0.0, trouble, final=True)
    assert denied.not_before == NOW + 5 * MINUTE
    asked = failed(slots, MINTED, NOW, 0.0, trouble, retry_after=MINUTE)
    assert asked.not_before == NOW + MINUTE


def test_who_asks_for_a_new_key_waits_for_no_backoff() -> None:
    """The shortest interval still holds."""
    slots = hurried(Slots(current=FRESH, not_before=NOW + HOUR, failures=9, wanted_at=NOW))
    assert (slots.rotate, slots.not_before, slots.failures) == (True, None, 0)
    assert next_step(slots, MINTED, NOW) == Wait(NOW + SECOND)


def test_only_what_failed_is_put_off() -> None:
    """A key or an open label, by its label; one that is not there changes nothing."""
    slots = Slots(current=FRESH, retired=(RETIRED,), open=(opened(), opened("kb-other")))
    after = put_off(slots, "kb-0", MINTED, NOW, 0.5)
    tried = replace(RETIRED, failures=1, not_before=NOW + 1.5 * SECOND)
    assert after == replace(slots, retired=(tried,))
    after = put_off(slots, "kb-open", MINTED, NOW, 0.5)
    tried_open = opened(failures=1, not_before=NOW + 1.5 * SECOND)
    assert after == replace(slots, open=(tried_open, opened("kb-other")))
    assert put_off(slots, "kb-unknown", MINTED, NOW, 0.5) == slots


# looks


def looks(slots: Slots, *seen: tuple[float, str, Verdict]) -> Slots:
    """Take in looks: seconds after NOW, the key, what was seen."""
    for seconds, label, verdict in seen:
        slots = judged(slots, label, verdict, MINTED, NOW + seconds * SECOND, 0.0)
    return slots


def test_one_refusal_makes_a_key_suspect() -> None:
    """It is handed out meanwhile, and looked at again."""
    slots = looks(Slots(current=FRESH), (0, "kb-1", REFUSED))
    assert slots.current is not None
    assert (slots.current.refused_at, slots.current.condemned) == (NOW, False)
    assert slots.current.not_before == NOW + SECOND
    assert usable(slots.current, MINTED, NOW)


MINTED_SINCE = Slots(current=FRESH, accepted_at=NOW)


@pytest.mark.parametrize(
    ("slots", "seen", "condemned"),
    [
        pytest.param(
            Slots(current=FRESH), [(0, "kb-1", REFUSED), (1, "kb-1", REFUSED)], False, id="twice"
        ),
        pytest.param(
            Slots(current=FRESH),
            [(n, "kb-1", REFUSED) for n in range(9)],
            False,
            id="again and again, by a gateway that accepts nothing",
        ),
        pytest.param(
            MINTED_SINCE,
            [(0, "kb-1", REFUSED), (1, "kb-1", REFUSED)],
            True,
            id="twice, and the gateway minted meanwhile",
        ),
        pytest.param(
            replace(MINTED_SINCE, accepted_at=NOW - SECOND),
            [(0, "kb-1", REFUSED), (1, "kb-1", REFUSED)],
            False,
            id="twice, and it minted before the first",
        ),
        pytest.param(
            MINTED_SINCE,
            [(0, "kb-1", REFUSED), (0.999, "kb-1", REFUSED)],
            False,
            id="twice within a second",
        ),
        pytest.param(
            MINTED_SINCE,
            [(0, "kb-1", REFUSED), (0.5, "kb-1", REFUSED), (1, "kb-1", REFUSED)],
            True,
            id="the first refusal is the one that counts",
        ),
        pytest.param(
            Slots(current=FRESH, next=key("kb-2")),
            [(0, "kb-1", REFUSED), (1, "kb-2", ALIVE), (2, "kb-1", REFUSED)],
            True,
            id="twice, and another key was accepted in between",
        ),
        pytest.param(
            Slots(current=FRESH, next=key("kb-2")),
            [(0, "kb-1", REFUSED), (1, "kb-2", UNDECIDED), (2, "kb-1", REFUSED)],
            False,
            id="twice, and another key was undecided in between",
        ),
        pytest.param(
            MINTED_SINCE,
            [(0, "kb-1", REFUSED), (1, "kb-1", UNDECIDED)],
            False,
            id="refused, then undecided",
        ),
        pytest.param(
            MINTED_SINCE,
            [(0, "kb-1", REFUSED), (1, "kb-1", ALIVE), (2, "kb-1", REFUSED)],
            False,
            id="refused, accepted, refused",
        ),
        pytest.param(
            MINTED_SINCE,
            [(n, "kb-1", UNDECIDED) for n in range(9)],
            False,
            id="undecided for long",
        ),
    ],
)
def test_condemnation(
    slots: Slots, seen: list[tuple[float, str, Verdict]], condemned: bool
) -> None:
    """Two refusals a second apart, by a gateway that accepted or minted something in between."""
    current = looks(slots, *seen).current
    assert current is not None
    assert current.condemned is condemned


def test_an_accepted_key_is_no_longer_suspect() -> None:
    """Nothing is left of the refusal."""
    slots = looks(Slots(current=FRESH), (0, "kb-1", REFUSED), (1, "kb-1", ALIVE))
    current = slots.current
    assert current is not None
    assert (current.refused_at, current.not_before, current.failures) == (None, None, 0)
    assert slots.accepted_at == NOW + SECOND


def test_looks_at_a_suspect_key_get_rarer() -> None:
    """A gateway that refuses everything is not asked every second for ever."""
    slots = Slots(current=FRESH)
    pauses = []
    for _ in range(10):
        slots = judged(slots, "kb-1", REFUSED, MINTED, NOW, 1.0)
        assert slots.current is not None
        assert slots.current.not_before is not None
        pauses.append((slots.current.not_before - NOW) / SECOND)
    assert pauses == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


def test_a_new_key_remembers_its_looks() -> None:
    """Their number, when the first was, and whether one of them was a refusal."""
    slots = Slots(next=key("kb-2"))
    once = looks(slots, (0, "kb-2", REFUSED)).next
    assert once is not None
    assert (once.looks, once.first_look, once.refused_at) == (1, NOW, NOW)
    seen = looks(slots, (0, "kb-2", REFUSED), (1.5, "kb-2", UNDECIDED)).next
    assert seen is not None
    assert (seen.looks, seen.first_look, seen.refused_at) == (2, NOW, NOW)
    alive = looks(slots, (0, "kb-2", REFUSED), (1.5, "kb-2", ALIVE)).next
    assert alive is not None
    assert alive.refused_at is None


def test_a_new_key_that_stays_undecided_is_looked_at_ever_more_rarely() -> None:
    """From the third look on there is a pause, which grows."""
    slots = Slots(current=FRESH, next=key("kb-2"))
    pauses: list[float | None] = []
    for _ in range(6):
        slots = judged(slots, "kb-2", UNDECIDED, MINTED, NOW, 1.0)
        assert slots.next is not None
        later = slots.next.next_look
        pauses.append(None if later is None else (later - NOW) / SECOND)
    assert pauses == [None, None, 2, 4, 8, 16]


def test_a_look_at_a_key_that_is_gone_changes_nothing() -> None:
    """The answer came after the key was revoked."""
    slots = Slots(current=FRESH)
    assert judged(slots, "kb-9", REFUSED, MINTED, NOW, 0.5) == slots


def test_the_rule_knows_no_clock() -> None:
    """`rotation` imports nothing that could tell the time, read a file or throw dice."""

    def names() -> Iterator[str]:
        for value in vars(rotation).values():
            yield getattr(value, "__module__", "") or getattr(value, "__name__", "")

    assert {name.split(".")[0] for name in names()} & {"time", "random", "os", "socket"} == set()
