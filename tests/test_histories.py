"""The promises, over histories of refusals, outages, crashes, clock steps and reboots."""

from collections.abc import Iterator
from datetime import timedelta
from random import Random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from keybroker import broker, worker
from keybroker.label import new_label
from keybroker.slots import Event
from tests.world import STATE, DaemonWorld, World, profile

HOUR = 3600.0
ROUNDED = timedelta(seconds=2)  # what falls due is done at the next whole second, call by call
FATES = ["ok", "down", "refuse", "drop", "lost", "late", "bad", "500", "500 and committed"]


@pytest.fixture(autouse=True)
def _what_is_patched_is_put_back() -> Iterator[None]:
    kept, labels = worker.perform, broker.new_label
    yield
    worker.perform, broker.new_label = kept, labels


def patch(made: World, chance: Random | None) -> None:
    """Have it see each effect; and no chance but its own: a history can be lived again."""
    worker.perform = made.perform
    if chance is not None:
        broker.new_label = lambda *given: new_label(*given, chance.randbytes)


def world(lifetime: str = "2h", chance: Random | None = None) -> World:
    made = World(profile(lifetime=lifetime), chance.random if chance else lambda: 0.5)
    patch(made, chance)
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
    late = now - ROUNDED
    due = {key.label for key in slots.retired if key.revoke_at and key.revoke_at <= late}
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
@example(  # a clock that is set forward has ended nothing at the gateway
    [
        *(("run", HOUR), ("rotate", None), ("step", 5400.0)),
        *(("rotate", None), ("run", 5.0), ("lose cache", None)),
    ],
    Random(0),
)
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


# The same with a profile whose keys are published where other hosts read them.

ON_A_SHELF = st.one_of(
    st.tuples(
        st.just("shelf"), st.lists(st.sampled_from(["ok", "down", "drop", "beaten"]), max_size=6)
    ),
    st.tuples(st.just("overtaken"), st.none()),
    st.tuples(st.just("shelf is out"), st.sampled_from([10.0, 400.0, HOUR, 3 * HOUR])),
    st.tuples(st.just("nothing to go on with"), st.sampled_from([1.0, 700.0, HOUR])),
)
PUBLISHING = st.lists(st.one_of(OPERATIONS, ON_A_SHELF), max_size=14)


def publishing(
    made: World, chance: Random | None = None, *, beside: bool = True, lifetime: str = "2h"
) -> None:
    """Go on with a profile that publishes."""
    made.beside = beside
    made.profile = profile(publish="one", lifetime=lifetime)
    made.start()
    patch(made, chance)


def live_and_publish(made: World, what: str, value: object) -> None:
    """Let one thing happen to a host or to where its keys are published."""
    shelf = made.shelf() if made.profile.publish is not None else None
    if shelf is None:
        pass
    elif what == "shelf":
        shelf.plan.extend(value)  # type: ignore[arg-type]
    elif what == "overtaken":
        shelf.overtake()
    elif what == "shelf is out":
        shelf.out = True
        made.ask()
        made.run(value)  # type: ignore[arg-type]
        shelf.out = False
    elif what == "nothing to go on with":  # the cache is lost, and what is published out of reach
        shelf.out = True
        live(made, "lose cache", None)
        made.run(value)  # type: ignore[arg-type]
        shelf.out = False
    live(made, what, value)


def check_others(made: World) -> None:
    """No key is revoked within a hold of the last time that others may have read it."""
    hold = made.profile.hold.total_seconds()
    for shelf in made.shelves.values():
        for one in shelf.tenures:
            key = made.gateway.keys.get(one.secret)
            if key is None or key.revoked is None or key.revoked >= key.ends or one.abandoned:
                continue
            assert one.until is not None, "the key that others read was revoked"
            assert key.revoked >= one.until + hold, "a key was revoked within others' hold"


def check_published(made: World) -> None:
    """In the end others read the key that is handed out here."""
    shelf = made.shelf()
    shelf.plan.clear()
    check_settled(made)
    before = made.slots.current
    made.broker.hurry("work")
    made.run(60)
    current = made.slots.current
    assert current is not None
    assert before is not None
    assert current.label != before.label
    assert made.ask() == shelf.text
    [key] = [one for one in made.gateway.alive() if one.secret == shelf.text]
    assert key.label == current.label


@COMMON
@given(
    PUBLISHING,
    st.integers(0, 2**32).map(Random),
    st.booleans(),
    st.sampled_from(["2h", "46m", "45m"]),
)
def test_promises_hold_for_those_who_read_what_is_published(
    events: list[tuple[str, object]], chance: Random, beside: bool, lifetime: str
) -> None:
    """Promises 1, 3 and 4 for readers here and elsewhere, whatever happens."""
    made = world(chance=chance)
    publishing(made, chance, beside=beside, lifetime=lifetime)
    for what, value in events:
        live_and_publish(made, what, value)
    assert made.most_alive <= made.profile.max_live
    made.gateway.plan.clear()
    made.crash_at = None
    check_published(made)
    check_readers(made)
    check_others(made)
    check_spacing(made)
    check_none_forgotten(made)


@COMMON
@given(
    st.lists(st.one_of(OPERATIONS, ON_A_SHELF, CLOCKS), max_size=12),
    st.integers(0, 2**32).map(Random),
    st.booleans(),
)
def test_clocks_cost_no_key_that_is_published(
    events: list[tuple[str, object]], chance: Random, beside: bool
) -> None:
    """However they are set: no key is forgotten, and others' holds count by the earlier clock."""
    made = world(chance=chance)
    publishing(made, chance, beside=beside)
    for what, value in events:
        live_and_publish(made, what, value)
    assert made.most_alive <= made.profile.max_live
    check_none_forgotten(made)
    if not any(what == "reboot" for what, _ in events):
        check_readers(made)
        check_others(made)
    made.gateway.plan.clear()
    made.crash_at = None
    made.time.error = 0.0
    made.start()
    check_published(made)


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


# The same with a daemon: it looks only at what changed or fell due, and is asked, told and checked.

TOLD = st.one_of(
    st.tuples(st.just("clock"), st.sampled_from([-7200.0, -90.0, 30.0, 90.0, 5400.0])),
    st.tuples(st.just("check"), st.none()),
    st.tuples(st.just("reread"), st.none()),
    st.tuples(st.just("retry"), st.none()),
    st.tuples(st.just("configure"), st.sampled_from(["15m", "20m"])),
    st.tuples(st.just("lock"), st.none()),
    st.tuples(st.just("unlock"), st.none()),
)
DAEMON = st.one_of(OPERATIONS, TOLD)
HISTORY = st.lists(DAEMON, max_size=12)
CHANCE = st.integers(0, 2**32).map(Random)


def daemon(chance: Random | None = None) -> DaemonWorld:
    made = DaemonWorld(profile(), chance.random if chance else lambda: 0.5)
    patch(made, chance)
    return made


def tell(made: DaemonWorld, what: str, value: object) -> None:
    """Let one thing happen to a daemon; then it goes to sleep."""
    if what == "clock":
        made.set_clock(value)  # type: ignore[arg-type]
    elif what == "check":
        made.broker.check(made.profile.name)
    elif what == "reread":
        made.broker.reread()
    elif what == "retry":
        made.broker.retry()
    elif what == "configure":
        made.profile = profile(hold=str(value))
        made.broker.configure([made.profile])
    elif what == "lock":
        made.keyring = False
        made.start()
    elif what == "unlock" and not made.keyring:
        made.unlock()
    live(made, what, value)
    if made.crash_at is None:
        made.rest()


def told(made: DaemonWorld, events: list[tuple[str, object]]) -> None:
    for what, value in events:
        tell(made, what, value)
    made.gateway.plan.clear()
    made.crash_at = None
    if not made.keyring:
        made.unlock()
    made.turn()


@COMMON
@given(HISTORY, CHANCE)
@example([("fates", ["ok", "ok", "down"]), ("clock", 5400.0)], Random(0))  # set before a swap
def test_promises_hold_over_any_history_of_a_daemon(
    events: list[tuple[str, object]], chance: Random
) -> None:
    """No key is forgotten, no dead one handed out, and the daemon never sleeps too long."""
    made = daemon(chance)
    told(made, events)
    assert made.overslept == []
    assert made.most_alive <= made.profile.max_live
    longest = max((str(value) for what, value in events if what == "configure"), default="15m")
    if longest == "15m":  # else a reader of the time before has the shorter hold
        check_readers(made)
    made.set_clock(-made.time.error)
    made.ask()
    check_settled(made)
    check_none_forgotten(made)


@COMMON
@given(HISTORY, CHANCE)
def test_the_end_of_a_profile_revokes_all_and_mints_nothing(
    events: list[tuple[str, object]], chance: Random
) -> None:
    """Whatever was before: no key lives on, and none is minted until somebody asks."""
    made = daemon(chance)
    told(made, events)
    made.set_clock(-made.time.error)
    made.run(60)  # what was under way is over
    made.broker.end("work", "revoked by request")
    made.run(1)
    minted = len(made.gateway.mints)
    made.run(2 * HOUR)
    assert made.gateway.alive() == []
    assert len(made.gateway.mints) == minted
    assert made.ask() is not None


@COMMON
@given(HISTORY, CHANCE)
@example(  # a clock that is set back puts off no look-up
    [("clock", 5400.0), ("fates", ["ok", "late"]), ("clock", 5400.0)], Random(0)
)
def test_a_configuration_without_the_profile_forgets_no_key(
    events: list[tuple[str, object]], chance: Random
) -> None:
    """They have their hold, and are revoked where they were minted; with it again, one is there."""
    made = daemon(chance)
    told(made, events)
    made.set_clock(-made.time.error)
    made.broker.configure([])
    check_none_forgotten(made)
    made.run(2 * HOUR)
    assert made.gateway.alive() == []
    made.broker.configure([made.profile])
    made.run(1)  # two calls are never closer than this, by whatever clock
    assert made.ask() is not None


@COMMON
@given(
    st.floats(0.0, HOUR),
    st.lists(st.sampled_from(["ok", "down", "refuse", "drop", "lost"]), max_size=4),
)
def test_a_look_at_a_good_key_changes_nothing(after: float, fates: list[str]) -> None:
    """However the gateway answers, short of refusing it: the key stays, and none is minted."""
    made = daemon()
    first = made.ask()
    made.run(after)
    made.gateway.plan = list(fates)
    for _ in range(3):
        made.broker.check("work")
        made.run(20)
        assert made.broker.checked("work")
        assert made.ask() == first
    assert len(made.gateway.mints) == 1


@COMMON
@given(st.floats(0.0, HOUR), st.booleans())
def test_a_keyring_that_opens_late_costs_at_most_one_key(after: float, asked: bool) -> None:
    """The sealed key is there again; had somebody asked, it has its hold and the new one stays."""
    made = daemon()
    first = made.ask()
    made.keyring = False
    made.start()
    made.run(2)
    second = made.ask() if asked else first
    assert second is not None
    assert (second == first) is not asked
    made.run(after)
    made.unlock()
    made.turn()
    assert made.ask() == second
    assert len(made.gateway.mints) == (2 if asked else 1)
    made.start()
    assert made.ask() == second
    check_readers(made)


@pytest.mark.parametrize("seconds", [-5400.0, 5400.0])
def test_a_clock_that_is_set_right_puts_nothing_off(seconds: float) -> None:
    """Calls that failed by another clock are made again: who asks has a key at once."""
    made = daemon()
    made.set_clock(seconds)
    made.gateway.out = True
    for _ in range(5):
        assert made.ask() is None
        made.run(20)
    made.gateway.out = False
    made.set_clock(-seconds)
    made.run(2)
    assert made.ask() is not None
    check_none_forgotten(made)


ELSEWHERE = st.tuples(st.just("publish"), st.sampled_from(["one", "two", None]))


@COMMON
@given(st.lists(st.one_of(DAEMON, ON_A_SHELF, ELSEWHERE), max_size=12), CHANCE, st.booleans())
@example(
    [("clock", -7200.0), ("shelf is out", 3 * HOUR)], Random(10034), True
)  # condemned in doubt
def test_promises_hold_for_a_daemon_that_publishes(
    events: list[tuple[str, object]], chance: Random, beside: bool
) -> None:
    """Its publish table may change or go while a key is on its way there."""
    made = daemon(chance)
    publishing(made, chance, beside=beside)
    for what, value in events:
        if what == "publish":
            if made.profile.publish is not None:
                made.shelf().abandon()
            made.profile = profile(publish=value)  # type: ignore[arg-type]
            made.broker.configure([made.profile])
        elif what == "configure":
            name = made.profile.publish
            there = None if name is None else str(name.settings["secret"])
            made.profile = profile(hold=str(value), publish=there)
            made.broker.configure([made.profile])
        elif what in ("shelf", "overtaken", "shelf is out", "nothing to go on with"):
            live_and_publish(made, what, value)
        else:
            tell(made, what, value)
    made.gateway.plan.clear()
    made.crash_at = None
    if not made.keyring:
        made.unlock()
    if made.profile.publish is not None and made.shelf() is not made.shelves.get("one"):
        made.shelf().abandon()
    made.profile = profile(publish="one")
    made.broker.configure([made.profile])
    made.turn()
    assert made.overslept == []
    assert made.most_alive <= made.profile.max_live
    made.set_clock(-made.time.error)
    made.ask()
    check_published(made)
    check_none_forgotten(made)
    if not any(what == "reboot" or value == "20m" for what, value in events):
        check_readers(made)
        check_others(made)


@COMMON
@given(HISTORY, CHANCE, st.booleans())
def test_the_end_of_what_is_published_is_the_beginning_of_the_next(
    events: list[tuple[str, object]], chance: Random, beside: bool
) -> None:
    """All that was is revoked at once, and others have a new key though nobody asks here."""
    made = daemon(chance)
    publishing(made, chance, beside=beside)
    told(made, [(what, value) for what, value in events if what != "configure"])
    made.shelf().plan.clear()
    made.set_clock(-made.time.error)
    made.ask()
    made.run(120)  # what came late is found
    old = {key.label for key in made.gateway.alive()}
    made.broker.end("work", "revoked by request")
    made.run(5)
    [new] = made.gateway.alive()
    assert new.label not in old
    assert made.shelf().text == new.secret
    assert made.ask() == new.secret
