"""The promises, over histories of refusals, outages, crashes, clock steps and reboots."""

from collections.abc import Iterator
from datetime import timedelta
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keybroker import worker
from keybroker.slots import Event
from tests.world import STATE, World, profile

HOUR = 3600.0
FATES = ["ok", "down", "refuse", "drop", "lost", "late", "bad", "500", "500 and committed"]


@pytest.fixture(autouse=True)
def _perform_is_put_back() -> Iterator[None]:
    kept = worker.perform
    yield
    worker.perform = kept


def world(lifetime: str = "2h", chance: Random | None = None) -> World:
    made = World(profile(lifetime=lifetime), chance.random if chance else lambda: 0.5)
    worker.perform = made.perform
    return made


def check_readers(made: World) -> None:
    """Promise 1 and 4: what was handed out was alive, and stays so for its hold."""
    hold = made.profile.hold.total_seconds()
    swaps = [record for record in made.journal.read() if record.event is Event.SWAP]
    untried = {record.label for record in swaps if record.why == "undecided"}
    for one in made.handed_out:
        key = made.gateway.keys[one.secret]
        assert key.alive(one.at), f"a dead key was handed out at {one.at}"
        if key.label not in untried:
            assert key.secret not in made.gateway.bad, "a refused key was handed out"
        if key.revoked is not None:
            assert key.revoked >= one.at + hold, "a key was revoked within its reader's hold"


def check_none_forgotten(made: World) -> None:
    """Promise 3: every key that lives at the gateway is known to the journal."""
    slots = made.slots
    known = {one.label for one in slots.all}
    forgotten = {key.label for key in made.gateway.alive()} - known
    assert forgotten == set()


def check_spacing(made: World) -> None:
    """No two calls that mint are closer than the retry interval."""
    gaps = [b - a for a, b in zip(made.gateway.mints, made.gateway.mints[1:], strict=False)]
    assert all(gap >= 1.0 - 1e-6 for gap in gaps), min(gaps)


def check_settled(made: World) -> None:
    """In the end, alive are the current key and retired ones that are not yet due."""
    made.gateway.plan.clear()
    made.gateway.out = False
    made.crash_at = None
    made.run(2 * HOUR)
    slots, now = made.slots, made.time.read().wall
    assert slots.current is not None
    due = {key.label for key in slots.retired if key.revoke_at and key.revoke_at <= now}
    assert due == set()
    expected = {slots.current.label} | {key.label for key in slots.retired}
    assert {key.label for key in made.gateway.alive()} == expected & {
        key.label for key in made.gateway.keys.values() if key.alive(made.time.true)
    }
    assert slots.current.label in {key.label for key in made.gateway.alive()}
    assert slots.open == () or all(o.looks >= 2 for o in slots.open)


def test_a_quiet_day() -> None:
    """Nothing goes wrong: one key at a time, each replaced with two holds left, then revoked."""
    made = world()
    for _ in range(24 * 60):
        assert made.ask() is not None
        made.run(60)
    check_readers(made)
    check_none_forgotten(made)
    lives = [key for key in made.gateway.keys.values() if key.revoked is not None]
    assert 15 <= len(lives) <= 24
    assert all(key.revoked < key.ends for key in lives if key.revoked)
    left = [one for one in made.handed_out if made.gateway.keys[one.secret].ends - one.at < 1800]
    assert left == []  # two holds were left whenever a key was printed
    assert made.most_alive == 2


OPERATIONS = st.one_of(
    st.tuples(st.just("fates"), st.lists(st.sampled_from(FATES), max_size=6)),
    st.tuples(st.just("run"), st.sampled_from([1.0, 5.0, 40.0, 700.0, HOUR, 3 * HOUR])),
    st.tuples(
        st.just("crash"),
        st.tuples(
            st.integers(0, 12),
            st.sampled_from(["before", "after"]),
            st.sampled_from(["worker", "command", "both"]),
        ),
    ),
    st.tuples(st.just("outage"), st.sampled_from([10.0, 400.0, HOUR, 5 * HOUR])),
    st.tuples(st.just("rotate"), st.none()),
    st.tuples(st.just("restart"), st.none()),
    st.tuples(st.just("power"), st.none()),
    st.tuples(st.just("lose cache"), st.none()),
)
CLOCKS = st.one_of(
    st.tuples(st.just("step"), st.sampled_from([-7200.0, -90.0, 30.0, 90.0, 5400.0])),
    st.tuples(st.just("reboot"), st.none()),
)


def live(made: World, what: str, value: object) -> None:
    """Let one thing happen."""
    if what == "fates":
        made.gateway.plan.extend(value)  # type: ignore[arg-type]
    elif what == "run":
        made.ask()
        made.run(value)  # type: ignore[arg-type]
    elif what == "crash":
        made.crash_at = value  # type: ignore[assignment]
    elif what == "outage":
        made.gateway.out = True
        made.run(value)  # type: ignore[arg-type]
        made.gateway.out = False
    elif what == "rotate":
        made.broker.hurry(made.profile.name)
    elif what == "restart":
        made.start()
    elif what == "power":
        made.disk.lose_power()
        made.start()
    elif what == "lose cache":
        made.disk.remove(STATE / "cache" / "work.sealed")
        made.start()
    elif what == "step":
        made.time.error += value  # type: ignore[operator]
    elif what == "reboot":
        made.time.reboot()
        made.start()
    made.ask()
    made.watch()
    check_none_forgotten(made)


COMMON = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@COMMON
@given(
    st.lists(OPERATIONS, max_size=14),
    st.integers(0, 2**32).map(Random),
    st.sampled_from(["2h", "46m", "45m"]),
)
def test_promises_hold_over_any_history(
    events: list[tuple[str, object]], chance: Random, lifetime: str
) -> None:
    """Promises 1, 3 and 4, the limit of live keys and the retry interval, whatever happens."""
    made = world(lifetime=lifetime, chance=chance)
    for what, value in events:
        live(made, what, value)
    check_readers(made)
    check_spacing(made)
    assert made.most_alive <= made.profile.max_live
    check_settled(made)
    check_none_forgotten(made)


@COMMON
@given(st.lists(st.one_of(OPERATIONS, CLOCKS), max_size=14), st.integers(0, 2**32).map(Random))
def test_clock_steps_and_reboots_cost_no_key(
    events: list[tuple[str, object]], chance: Random
) -> None:
    """Promise 3 and the limit hold when clocks jump; no dead key is handed out within a boot."""
    made = world(chance=chance)
    for what, value in events:
        live(made, what, value)
    assert made.most_alive <= made.profile.max_live
    check_none_forgotten(made)
    if not any(what == "reboot" for what, _ in events):
        check_readers(made)
    made.time.error = 0.0
    made.start()
    check_settled(made)


def test_an_outage_costs_nothing_until_the_key_ends() -> None:
    """A failing source: the current key is handed out until its very end, then none is."""
    made = world()
    first = made.ask()
    made.gateway.out = True
    for _ in range(119):
        made.run(60)
        assert made.ask() == first
    made.run(120)
    assert made.ask() is None
    made.gateway.out = False
    made.run(301)  # the longest retry interval
    assert made.ask() is not None
    check_readers(made)


def test_an_idle_weekend_offline_asks_the_gateway_rarely() -> None:
    """Retries spread to five minutes: an hour of outage is some twenty calls, not thousands."""
    made = world()
    made.ask()
    made.gateway.out = True
    made.run(4 * HOUR)
    before = len(made.gateway.calls)
    made.run(HOUR)
    assert len(made.gateway.calls) - before <= 30


def test_errors_that_were_answered_lock_nobody_out() -> None:
    """Four failed calls are looked up as soon as the gateway lists again, and a key is minted."""
    made = world()
    for _ in range(4):
        made.gateway.plan = ["down"] * len(made.slots.open) + ["500", "down"]
        made.start()
        assert made.ask() is None
        made.time.true += 1.5
    assert len(made.slots.open) == 4
    made.gateway.plan = []
    made.start()
    assert made.ask() is not None
    assert made.slots.open == ()


def test_a_commit_after_our_deadline_is_found_and_revoked() -> None:
    """A call that commits 30 s late leaves a key; the look-up a minute later ends it."""
    made = world()
    made.gateway.plan = ["late"]
    made.ask()
    made.run(120)
    late = next(key for key in made.gateway.keys.values() if key.born > 8.0)
    assert late.revoked is not None
    check_none_forgotten(made)


def test_a_key_that_the_gateway_refuses_replaces_nothing() -> None:
    """Promise 4: new keys are refused for an hour; the old one stays, and tries get rarer."""
    made = world()
    first = made.ask()
    made.gateway.only_bad = True
    made.broker.hurry("work")
    for _ in range(60):
        made.run(60)
        assert made.ask() == first
    bad = [made.gateway.keys[text] for text in made.gateway.bad]
    assert 5 <= len(bad) <= 30
    assert [key for key in bad[:-1] if key.revoked is None] == []
    check_spacing(made)


def test_a_lost_cache_costs_one_issue_and_no_reader() -> None:
    """The journal has the lost key retired, its readers keep it for a hold, then it is revoked."""
    made = world()
    first = made.ask()
    made.disk.remove(STATE / "cache" / "work.sealed")
    made.start()
    made.run(2)  # the retry interval counts from the first mint
    second = made.ask()
    assert second is not None
    assert second != first
    made.run(made.profile.hold.total_seconds() + 60)
    assert first is not None
    assert made.gateway.keys[first].revoked is not None
    check_readers(made)


def test_the_journal_says_every_step_in_order() -> None:
    """Label before the call, lease after it, swap after the seal, gone after the revocation."""
    made = world()
    made.ask()
    made.effects.clear()
    made.broker.hurry("work")
    made.run(timedelta(minutes=20).total_seconds())
    assert [effect for effect in made.effects if effect != "answer"] == [
        *("wanted", "issue", "have", "verify", "seal", "swap", "revoke", "gone")
    ]
    events = [record.event for record in made.journal.read()]
    assert events == [
        *(Event.WANTED, Event.HAVE, Event.SWAP),
        *(Event.WANTED, Event.HAVE, Event.SWAP, Event.GONE),
    ]


def test_a_longer_hold_is_given_to_readers_of_the_old_key() -> None:
    """Who was handed a key may have read the new configuration since."""
    made = world()
    assert made.ask() is not None
    made.profile = profile(hold="30m")
    made.start()
    made.broker.hurry("work")
    made.run(2)
    [old] = made.slots.retired
    assert old.revoke_at is not None
    assert old.revoke_at - made.time.read().wall > timedelta(minutes=29)


def test_a_longer_hold_is_given_to_readers_of_a_lost_key() -> None:
    """A key that is given up without a replacement is left to its readers as long."""
    made = world()
    assert made.ask() is not None
    made.profile = profile(hold="30m")
    made.disk.remove(STATE / "cache" / "work.sealed")
    made.start()
    made.run(2)
    [lost] = made.slots.retired
    assert lost.revoke_at is not None
    assert lost.revoke_at - made.time.read().wall > timedelta(minutes=29)
