"""
Keys that are published for others: what is done in which order, and what a death leaves of it.

In one process, with every effect of a worker as a place to die. Histories are in
`tests/test_histories.py`, real processes in `tests/test_publish_crashes.py`.
"""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from keybroker import outcomes, rotation, worker
from keybroker.broker import Broker
from keybroker.errors import SourceDenied
from keybroker.slots import Event
from tests.world import STATE, WRAP_KEY, Crash, DaemonWorld, Shelf, World, profile

HOUR = 3600.0
HOLD = 900.0
ALL = [
    *("wanted", "issue", "have", "staged", "stage", "verify", "promote", "seal", "swap"),
    *("revoke", "gone"),
]


@pytest.fixture(autouse=True)
def _what_is_patched_is_put_back() -> Iterator[None]:
    kept = worker.perform
    yield
    worker.perform = kept


class Publisher(DaemonWorld):
    """A daemon whose profile publishes; effects are counted, and can be died at by their name."""

    def __init__(self, beside: bool = True, lifetime: str = "2h") -> None:
        self.dies: tuple[str, str, str] | None = None
        super().__init__(profile(publish="one", lifetime=lifetime))
        self.beside = beside
        self.start()
        worker.perform = self.perform

    def perform(self, effect: str, call: Any) -> Any:
        self.effects.append(effect)
        if self.dies is None or self.dies[0] != effect:
            return call()
        _, side, who = self.dies
        self.dies = None
        if side == "after":
            call()
        raise Crash(who)

    def die(self, effect: str, side: str, who: str = "both") -> None:
        """Rotate until somebody dies at an effect; what follows that is not done yet."""
        self.dies = effect, side, who
        self.broker.hurry("work")
        for _ in range(100):
            self.turn()
            if self.dies is None:
                return
            self.time.true += 0.2
        raise AssertionError(f"{effect} was not reached")

    def turn(self) -> datetime | None:
        planned = self.dies is not None
        try:
            started = len(self.effects)
            while True:
                wake = self.broker.turn(self.most)
                if not self.broker.busy and (wake is None or wake > self.time.read().wall):
                    return wake
                assert len(self.effects) - started < 300
                self.broker.take(self.workers.receive(0))
                if planned and self.dies is None:
                    return self.time.read().wall
        except Crash:
            self.start()
            return self.time.read().wall

    def forget_all(self) -> None:
        """Go on without the cache."""
        self.disk.remove(STATE / "cache" / "work.sealed")
        self.start()

    def without_it(self) -> Broker:
        """Return a process whose configuration does not have the profile."""
        return Broker(
            [],
            self.journal.read(),
            {},
            self.workers,
            instance="0a1b2c3d",
            wrap_key=WRAP_KEY,
            keeps=True,
            mints=(),
            clock=self.time,
            roll=self.roll,
            reread=self.journal.read,
        )

    def alive(self, text: str | None) -> bool:
        key = self.gateway.keys.get(text or "")
        return key is not None and key.alive(self.time.true)


@pytest.fixture(params=[True, False], ids=["beside", "in one step"])
def host(request: pytest.FixtureRequest) -> Publisher:
    return Publisher(request.param)


def check(host: World, shelf: Shelf) -> None:
    """One key is current, here and for others; all that lives is known; nobody's hold was cut."""
    current = host.slots.current
    assert current is not None
    assert host.ask() == shelf.text
    assert host.gateway.keys[shelf.text or ""].label == current.label
    assert {key.label for key in host.gateway.alive()} <= {one.label for one in host.slots.all}
    for one in shelf.tenures:
        key = host.gateway.keys.get(one.secret)
        if key is not None and key.revoked is not None and key.revoked < key.ends:
            assert one.until is not None
            assert key.revoked >= one.until + HOLD


def test_the_order_of_effects(host: Publisher) -> None:
    """Tried before others can read it, read by others before it is handed out here."""
    host.ask()
    host.effects.clear()
    host.broker.hurry("work")
    host.run(1200)

    assert [effect for effect in host.effects if effect != "answer"] == ALL
    events = [one.event for one in host.journal.read()]
    assert events[-5:] == [Event.WANTED, Event.HAVE, Event.STAGED, Event.SWAP, Event.GONE]
    check(host, host.shelf())


@pytest.mark.parametrize("who", ["worker", "command", "both"])
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("effect", [*ALL, "recover"])
def test_a_death_at_any_effect(host: Publisher, effect: str, side: str, who: str) -> None:
    """The rotation is resumed or another is made; in the end nothing is left of it."""
    host.ask()
    old = host.shelf().text
    if effect == "recover":
        host.die("promote", "after")
    host.dies = (effect, side, who)
    host.broker.hurry("work")
    for _ in range(8):
        host.ask()
        host.run(HOLD / 6)
        assert host.alive(host.shelf().text)
        if host.shelf().tenures[0].until is None:
            assert host.alive(old)
    host.broker.hurry("work")
    host.run(2 * HOLD)

    assert host.dies is None
    check(host, host.shelf())
    assert len(host.gateway.alive()) == 1


def test_a_key_that_others_read_by_now_is_found_again(host: Publisher) -> None:
    """Its process died before it was current here: it is read back, tried, and no other is made."""
    host.ask()
    host.die("promote", "after")
    published = host.shelf().text
    host.effects.clear()
    host.turn()

    assert host.ask() == published

    assert len(host.gateway.mints) == 2
    done = [effect for effect in host.effects if effect not in ("answer", "find")]
    assert done[:5] == ["recover", "verify", "promote", "seal", "swap"]
    check(host, host.shelf())


def test_a_lost_cache_costs_nothing_where_keys_are_published(host: Publisher) -> None:
    """The current key is read back from there, sealed again, and lives to its end."""
    first = host.ask()
    host.forget_all()

    assert host.ask() == first
    assert len(host.gateway.mints) == 1
    host.start()
    assert host.ask() == first
    assert "recover" not in host.effects[host.effects.index("recover") + 1 :]


def test_who_was_overtaken_makes_another(host: Publisher) -> None:
    """Its key may have been read beside the others: it has a hold, and is revoked then."""
    host.ask()
    host.run(2)
    host.shelf().plan = ["ok", "ok", "beaten"] if host.beside else ["ok", "beaten"]
    host.broker.hurry("work")
    host.run(10)

    beaten = [one for one in host.slots.retired if one.why == rotation.BEATEN]
    assert len(beaten) == 1
    assert len(host.gateway.mints) == 3
    check(host, host.shelf())
    key = next(one for one in host.gateway.keys.values() if one.label == beaten[0].label)
    host.run(HOLD - 60)
    assert key.revoked is None
    host.run(120)
    assert key.revoked is not None


def test_what_others_read_is_not_revoked_while_nothing_takes_its_place(host: Publisher) -> None:
    """All was lost here, and the store does not answer: it may be what others read."""
    host.ask()
    host.die("promote", "after")
    published, host.shelf().out = host.shelf().text, True
    host.forget_all()
    host.ask()
    host.run(HOUR / 2)
    assert host.alive(published)
    assert len(host.gateway.mints) > 2

    host.shelf().out = False
    host.run(HOLD)

    assert host.shelf().text != published
    check(host, host.shelf())
    host.run(HOLD)
    assert not host.alive(published)


def test_what_is_revoked_by_hand_does_not_wait_for_the_next(host: Publisher) -> None:
    """Who types `revoke` has a key that leaked; others have a new one after that."""
    host.ask()
    host.broker.hurry("work")
    host.run(3)
    host.effects.clear()
    host.broker.end("work", "revoked by request")
    host.run(2)

    done = [effect for effect in host.effects if effect != "answer"]
    first = [*("retired", "retired"), *("revoke", "gone", "revoke", "gone")]
    assert done[: done.index("wanted")] == first
    assert host.alive(host.shelf().text)
    assert host.ask() == host.shelf().text
    assert len(host.gateway.alive()) == 1


def test_a_gateway_that_does_not_revoke_keeps_nobody_from_the_next_key(host: Publisher) -> None:
    """Each is asked for once; it is tried again while the new one is made."""
    host.ask()
    host.broker.hurry("work")
    host.run(3)
    old = host.shelf().text
    host.gateway.plan = ["down", "down"]
    host.broker.end("work", "revoked by request")
    host.run(5)

    assert host.shelf().text != old
    assert host.alive(host.shelf().text)
    host.run(HOLD)
    assert len(host.gateway.alive()) == 1


def test_a_profile_that_begins_to_publish_has_its_next_key_at_once(host: Publisher) -> None:
    """So do others; the one that was current has its hold."""
    host.profile = profile()
    host.start()
    first = host.ask()
    host.profile = profile(publish="one")
    host.broker.configure([host.profile])
    host.run(5)

    assert host.ask() == host.shelf().text
    assert host.shelf().text != first
    assert host.alive(first)


@pytest.mark.parametrize("lost", [False, True])
def test_a_key_that_was_on_its_way_elsewhere(host: Publisher, lost: bool) -> None:
    """The publish table changes meanwhile: another is made for the new place, at once."""
    host.ask()
    host.die("verify", "before", "both" if lost else "worker")
    host.profile = profile(publish="two")
    if lost:
        host.start()
        host.broker.hurry("work")
    else:
        host.broker.configure([host.profile])
    host.run(20)

    check(host, host.shelf())
    host.run(2 * HOLD)
    assert len(host.gateway.alive()) == 1


def test_a_profile_that_publishes_elsewhere_has_its_next_key_at_once(host: Publisher) -> None:
    """Nothing was on its way: who reads the new place does not wait for the next rotation."""
    host.ask()
    host.run(60)
    host.profile = profile(publish="two")
    host.broker.configure([host.profile])
    host.run(5)

    check(host, host.shelf())


@pytest.mark.parametrize("lost", [False, True])
def test_a_profile_that_publishes_no_more(host: Publisher, lost: bool) -> None:
    """The key that was on its way is handed out here, or given up where its secret was lost."""
    host.ask()
    host.die("verify", "before", "both" if lost else "worker")
    host.profile = profile()
    if lost:
        host.start()
    else:
        host.broker.configure([host.profile])
    host.run(20)

    assert host.ask() is not None
    host.run(2 * HOLD)
    assert {key.label for key in host.gateway.alive()} == {one.label for one in host.slots.keys}


@pytest.mark.parametrize("effect", ["staged", "stage", "verify", "promote"])
def test_a_profile_that_publishes_no_more_amid_a_step(host: Publisher, effect: str) -> None:
    """What others read there is not revoked for a key that was never put in its place."""
    host.ask()
    shelf, planned = host.shelf(), [effect]

    def perform(one: str, call: Any) -> Any:
        if one in planned:
            planned.clear()
            host.profile = profile()
            host.broker.configure([host.profile])
        return host.perform(one, call)

    worker.perform = perform
    host.broker.hurry("work")
    host.run(20)
    host.run(2 * HOLD)

    assert not planned
    assert host.ask() is not None
    assert host.alive(shelf.text)


@pytest.mark.parametrize("again", [False, True])
def test_a_profile_that_is_gone_leaves_others_their_key(host: Publisher, again: bool) -> None:
    """Nobody will put another one there: they have it to its end, unless it is revoked by hand."""
    host.ask()
    published = host.shelf().text
    if again:
        host.broker = host.without_it()
    else:
        host.broker.configure([])
    host.run(HOUR)
    assert host.alive(published)
    assert [one.label for one in host.slots.retired] == [one.label for one in host.gateway.alive()]

    host.broker.end("work", "revoked by request")
    host.run(1)

    assert not host.alive(published)


def test_while_the_keyring_is_locked_nothing_is_read_back(host: Publisher) -> None:
    """The sealed key is there again when it opens; until somebody asks, no other is made."""
    first = host.ask()
    host.keyring = False
    host.start()
    host.run(60)
    assert "recover" not in host.effects
    host.unlock()
    host.turn()

    assert host.ask() == first
    assert len(host.gateway.mints) == 1


def test_who_asks_while_the_keyring_is_locked_has_the_key_that_others_have(host: Publisher) -> None:
    """It is read back from where it is published; no other is made, and it is sealed again."""
    first = host.ask()
    host.keyring = False
    host.start()
    host.disk.remove(STATE / "cache" / "work.sealed")

    assert host.ask() == first
    host.unlock()
    host.run(5)

    assert len(host.gateway.mints) == 1
    assert STATE / "cache" / "work.sealed" in host.disk.files
    check(host, host.shelf())


def test_a_locked_key_that_cannot_be_read_back_keeps_nobody_waiting(host: Publisher) -> None:
    """Who asks has another one, and the daemon sleeps after that."""
    first = host.ask()
    host.keyring = False
    host.start()
    host.run(2)
    host.shelf().plan = ["down"]

    assert host.ask() is not None
    assert host.ask() != first
    before = len(host.shelf().calls)
    host.run(HOLD / 3)

    assert len(host.shelf().calls) == before
    assert host.overslept == []
    check(host, host.shelf())


def test_labels_that_were_not_found_are_not_kept(host: Publisher) -> None:
    """What is known to be nowhere is forgotten with the key."""
    host.ask()
    host.die("staged", "after")
    host.broker.hurry("work")
    host.run(20)

    assert "recover" in host.effects
    assert host.broker._profiles["work"].absent == set()
    check(host, host.shelf())


def test_a_step_of_publishing_has_the_time_that_its_calls_take(
    host: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is not ended amid calls that are each within their own time."""
    limits: dict[str, float] = {}
    send = host.workers.send

    def sent(kind: str, op: str, seconds: float, /, **values: Any) -> int:
        limits[op] = seconds
        return send(kind, op, seconds, **values)

    monkeypatch.setattr(host.workers, "send", sent)
    host.ask()

    longest = host.profile.policy.timeout.total_seconds()
    assert limits["stage"] >= 3 * longest
    assert limits["publish"] >= 4 * longest


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("failing", ["stage", "promote"])
def test_who_types_rotate_does_not_wait_for_the_next_try(
    host: Publisher, failing: str, by_hand: bool
) -> None:
    """What kept the key from being published is mended: nor does who reloads, or signs in."""
    host.ask()
    before, planned = host.shelf().text, [failing] * 40

    def perform(one: str, call: Any) -> Any:
        if one in planned:
            planned.remove(one)
            raise SourceDenied("aws: somebody may not do that")
        return host.perform(one, call)

    worker.perform = perform
    host.broker.hurry("work")
    host.run(300)
    planned.clear()
    new = host.broker.slots("work").next
    assert new is not None
    assert new.failures > 0

    if by_hand:
        host.broker.hurry("work")
        assert not outcomes.rotated_or_failed(host.broker, "work")
    else:
        host.broker.retry()
    host.run(2)

    assert host.shelf().text != before
    assert host.ask() == host.shelf().text


@pytest.mark.parametrize("failing", ["stage", "promote"])
def test_a_key_that_cannot_be_published_is_revoked_by_hand(host: Publisher, failing: str) -> None:
    """It is given up and ended at once, however long the next try was put off."""
    planned = [failing] * 40

    def perform(one: str, call: Any) -> Any:
        if one in planned:
            planned.remove(one)
            raise SourceDenied("aws: somebody may not do that")
        return host.perform(one, call)

    worker.perform = perform
    host.ask()
    host.run(300)
    [stuck] = host.gateway.alive()
    before = outcomes.ours(host.broker, "work")
    assert before == {stuck.label}

    host.broker.end("work", "revoked by request")
    host.run(2)

    assert stuck.revoked is not None
    assert outcomes.revoked_or_denied(host.broker, "work", before)
    assert outcomes.revoked(host.broker, "work", before)["left"] == 0
