"""The broker where histories do not lead: locked keyrings, doubtful clocks, other people's keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

from keybroker import outcomes, worker
from keybroker.broker import Broker, _rounded
from keybroker.config import Profile, read_profile
from keybroker.credential import Credential, Issuer, Lease, Look, Phase, Secret, Verdict
from keybroker.document import Where
from keybroker.errors import (
    CLASSES,
    ConfigError,
    KeybrokerError,
    NobodyAnswers,
    NotReady,
    SourceDenied,
    SourceError,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.handout import Sealed
from keybroker.journal import Journal, read_time
from keybroker.rotation import Kind, phase
from keybroker.signin import LOCK_SECONDS, read_login
from keybroker.slots import Event, Slots, Trouble, replay
from keybroker.sources import Capabilities
from keybroker.values import replace
from tests.world import START, STATE, WRAP_KEY, Gateway, GatewaySource, InProcess, MemoryDisk, Time
from tests.world import profile as minting

MINUTE, HOUR = 60.0, 3600.0
HOLD = 15 * MINUTE
ONE, TWO = "http://one.example.com", "http://two.example.com"


def at(url: str, name: str = "work") -> Profile:
    """A minting profile of the gateway with that address."""
    return minting(name, url=url)


def following(**more: Any) -> Profile:
    """A profile whose key somebody else keeps."""
    raw = {
        "base_url": ONE,
        "source": {"type": "static", "key": {"env": "KEY"}},
        **more,
    }
    return read_profile("work", raw, Where({}, "test"))


@dataclass
class Owner:
    """Somebody else, who keeps a key and changes it at will."""

    value: str = "sk-first"
    written: float | None = None  # seconds after START
    reread: float | None = None  # seconds from now until it is worth reading again
    ends: float | None = None  # seconds after START
    problem: KeybrokerError | None = None
    looks: dict[str, Look] = field(default_factory=dict)  # by value; alive where nothing is said
    reads: int = 0
    verified: list[str] = field(default_factory=list)


class OwnerSource:
    """The adapter for it."""

    capabilities = Capabilities(Kind.FOLLOWED)

    def __init__(self, owner: Owner, time: Time) -> None:
        self._owner, self._time = owner, time

    def issue(self, label: str) -> Credential:
        self._owner.reads += 1
        if self._owner.problem is not None:
            raise self._owner.problem
        secret, now = Secret(self._owner.value), self._time.read().wall
        written, reread = self._owner.written, self._owner.reread
        lease = Lease(
            secret.fingerprint,
            "static",
            now,
            None if self._owner.ends is None else START + timedelta(seconds=self._owner.ends),
            written_at=None if written is None else START + timedelta(seconds=written),
            reread_at=None if reread is None else now + timedelta(seconds=reread),
        )
        return Credential(secret, lease)

    def look(self, known: Lease) -> Lease | None:
        return None

    def verify(self, secret: Secret) -> Verdict:
        self._owner.verified.append(secret.reveal())
        look = self._owner.looks.get(secret.reveal(), Look.ALIVE)
        return Verdict(look, "models", "401" if look is Look.REFUSED else "")

    def close(self) -> None:
        pass


class LookingSource(GatewaySource):
    """A gateway whose looks can be told what to see."""

    def __init__(self, gateway: Gateway, host: Host) -> None:
        super().__init__(gateway)
        self._host = host

    def verify(self, secret: Secret) -> Verdict:
        return self._host.verdict or super().verify(secret)


class Host:
    """One host: its clocks and disk, the gateways it knows, and a process at a time."""

    def __init__(self) -> None:
        self.time = Time()
        self.disk = MemoryDisk()
        self.gateways: dict[str, Gateway] = {}
        self.owner = Owner()
        self.verdict: Verdict | None = None
        self.broker: Broker

    def gateway(self, url: str = ONE) -> Gateway:
        return self.gateways.setdefault(url, Gateway(self.time, url, lifetime=2 * HOUR))

    def start(
        self,
        *profiles: Profile,
        wrap_key: Secret | None = WRAP_KEY,
        mints: Container[str] | None = None,
        keeps: bool = False,
        locked: Container[str] = (),
    ) -> Broker:
        """Start a process that knows these profiles; journal and cache are all that it has."""
        operations = worker.Operations(
            STATE,
            {},
            clock=self.time,
            disk=self.disk,
            build=self._build,  # type: ignore[arg-type]
            revoker=lambda issuer, *_: LookingSource(self.gateway(issuer.url), self),  # type: ignore[arg-type,return-value]
        )
        self.workers = InProcess(operations)
        key = None if wrap_key is None else wrap_key.reveal()
        sealed = {}
        for one in profiles:
            message = {"id": 0, "op": "load", "profile": one.name, "wrap_key": key}
            reply = json.loads(json.dumps(worker.answer(operations, message)))
            if "ok" in reply and (found := Sealed.read(reply["ok"]["cached"])) is not None:
                sealed[one.name] = found
        journal = Journal(STATE, self.disk)
        self.broker = Broker(
            profiles,
            journal.read(),
            sealed,
            self.workers,
            instance="0a1b2c3d",
            wrap_key=wrap_key,
            keeps=keeps,
            locked=locked,
            mints={one.name for one in profiles} if mints is None else mints,
            clock=self.time,
            roll=lambda: 0.5,
            reread=journal.read,
        )
        return self.broker

    def unlock(self, *profiles: Profile) -> None:
        """Have the running process read the cache: its keyring is open now."""
        sealed = {}
        for one in profiles:
            message = {"id": 0, "op": "load", "profile": one.name, "wrap_key": WRAP_KEY.reveal()}
            reply = worker.answer(self.workers.operations, message)
            if (found := Sealed.read(reply["ok"]["cached"])) is not None:
                sealed[one.name] = found
        self.broker.unlock(WRAP_KEY, "OS keyring", sealed)

    def _build(self, profile: Profile, *_: object) -> object:
        if profile.kind is Kind.FOLLOWED:
            return OwnerSource(self.owner, self.time)
        return LookingSource(self.gateway(profile.issuer.url), self)

    def settle(self) -> None:
        """Do what is due now."""
        for _ in range(100):
            self.broker.turn()
            if not self.broker.busy:
                return
            self.broker.take(self.workers.receive(0))
        pytest.fail("it never rests")

    def run(self, seconds: float) -> None:
        """Let time pass, doing what is due."""
        until = self.time.true + seconds
        while self.time.true < until:
            self.settle()
            wake = self.broker.turn()
            left = until - self.time.true
            if wake is not None:
                left = min(left, (wake - self.time.read().wall).total_seconds())
            self.time.true += max(left, 0.01)
        self.settle()

    def ask(self, name: str = "work") -> str | None:
        """Return what a reader is given now."""
        self.settle()
        found = self.broker.credential(name)
        return None if found is None else found.secret.reveal()

    @property
    def journal(self) -> Slots:
        return replay(Journal(STATE, self.disk).read()).get("work", Slots())


@pytest.fixture
def host() -> Host:
    return Host()


def minted(host: Host) -> str:
    """Have a first key, of the gateway ONE."""
    host.start(at(ONE))
    first = host.ask()
    assert first is not None
    return first


# a keyring that cannot be read


def test_a_locked_keyring_costs_no_key(host: Host) -> None:
    """Promise 4: what cannot be opened is not lost; unlocked, the same key is handed out."""
    first = minted(host)
    host.start(at(ONE), wrap_key=None)
    assert host.ask() is None
    host.run(HOUR)
    assert host.journal.current is not None
    assert host.gateway().keys[first].revoked is None
    assert len(host.gateway().mints) == 1
    host.start(at(ONE))
    assert host.broker.credential("work") == Credential(Secret(first), host.journal.current.lease)


def test_a_locked_keyring_is_said(host: Host) -> None:
    """Exit status 69, and what to type."""
    minted(host)
    host.start(at(ONE), wrap_key=None)
    host.settle()
    error = host.broker.why_not("work")
    assert isinstance(error, NobodyAnswers)
    assert error.message == "work: a minted key could not be kept: there is no keyring"
    assert error.hint is not None
    assert 'key = "file" in a table [cache]' in error.hint


def test_what_is_retired_is_revoked_behind_a_locked_keyring(host: Host) -> None:
    """That takes no secret but the admin's."""
    first = minted(host)
    host.run(2)
    host.broker.hurry("work")
    second = host.ask()
    assert second != first
    host.start(at(ONE), wrap_key=None)
    host.run(HOLD + 1)
    assert host.gateway().keys[first].revoked is not None
    assert second is not None
    assert host.gateway().keys[second].revoked is None


def test_nothing_is_minted_that_cannot_be_kept(host: Host) -> None:
    """Unless the process stays and keeps it in memory."""
    host.start(at(ONE), wrap_key=None)
    assert host.ask() is None
    assert host.gateway().mints == []
    host.start(at(ONE), wrap_key=None, keeps=True)
    assert host.ask() is not None


def test_a_daemon_behind_a_locked_keyring_keeps_the_sealed_key(host: Host) -> None:
    """Nobody asks, so nothing is minted or given up; once it is open, the same key is there."""
    first = minted(host)
    host.start(at(ONE), wrap_key=None, keeps=True, locked=["work"])
    host.run(2 * HOLD)
    assert host.journal.retired == ()
    assert len(host.gateway().mints) == 1

    host.unlock(at(ONE))

    assert host.ask() == first
    assert host.gateway().keys[first].revoked is None


def test_who_asks_behind_a_locked_keyring_gets_a_key_of_the_moment(host: Host) -> None:
    """It is kept in memory; the sealed one has its hold. Once it is open, the new one is sealed."""
    first = minted(host)
    host.start(at(ONE), wrap_key=None, keeps=True, locked=["work"])
    host.run(MINUTE)
    assert host.ask() is None
    host.broker.ask("work")
    second = host.ask()
    asked_at = host.time.true
    assert second not in (None, first)

    host.unlock(at(ONE))
    host.run(HOLD + MINUTE)

    assert host.ask() == second
    revoked = host.gateway().keys[first].revoked
    assert revoked is not None
    assert revoked >= asked_at + HOLD - 1
    host.start(at(ONE))
    assert host.ask() == second


def test_a_key_of_the_moment_that_was_lost_is_given_up_once_that_is_known(host: Host) -> None:
    """It was in the memory of a process that died; while the keyring is locked it may be sealed."""
    minted(host)
    host.start(at(ONE), wrap_key=None, keeps=True, locked=["work"])
    host.run(MINUTE)
    host.broker.ask("work")
    second = host.ask()
    assert second is not None
    host.start(at(ONE), wrap_key=None, keeps=True, locked=["work"])
    host.run(2 * HOLD)
    assert host.gateway().keys[second].revoked is None

    host.unlock(at(ONE))
    third = host.ask()
    host.run(HOLD + MINUTE)

    assert third not in (None, second)
    assert host.gateway().keys[second].revoked is not None


# clocks


def step(seconds: float) -> Callable[[Host], None]:
    def change(host: Host) -> None:
        host.time.error += seconds

    return change


def reboot(seconds: float) -> Callable[[Host], None]:
    def change(host: Host) -> None:
        host.time.reboot()
        host.time.error += seconds

    return change


DOUBTFUL = [
    pytest.param(step(-HOUR), id="set back an hour"),
    pytest.param(step(-61), id="set back a minute"),
    pytest.param(step(61), id="set forward a minute"),
    pytest.param(step(30 * MINUTE), id="set forward half an hour"),
    pytest.param(reboot(-HOUR), id="a reboot into the past"),
    pytest.param(reboot(-10 * MINUTE), id="a reboot to before the last record"),
]


def at_twenty_minutes(host: Host) -> str:
    """A current key of minute 2, and a record of minute 17: that a key was revoked."""
    minted(host)
    host.run(2 * MINUTE)
    host.broker.hurry("work")
    current = host.ask()
    host.run(18 * MINUTE)
    records = Journal(STATE, host.disk).read()
    assert (records[-1].event, host.journal.retired) == (Event.GONE, ())
    assert current is not None
    return current


@pytest.mark.parametrize("change", DOUBTFUL)
def test_a_key_is_tried_before_it_is_printed_by_a_doubtful_clock(
    host: Host, change: Callable[[Host], None]
) -> None:
    """It is alive: it is handed out, and replaced by one whose times are by the new clock."""
    current = at_twenty_minutes(host)
    change(host)
    host.start(at(ONE))
    assert host.broker.credential("work") is None
    host.gateway().calls.clear()
    host.broker.turn()
    host.broker.take(host.workers.receive(0))
    assert [what for _, what in host.gateway().calls] == ["verify"]
    found = host.broker.credential("work")
    assert found is not None
    assert found.secret.reveal() == current
    host.run(5)
    assert host.ask() not in (None, current)
    assert host.gateway().keys[current].revoked is None


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(step(0), id="nothing"),
        pytest.param(step(-30), id="set back 30 s"),
        pytest.param(step(30), id="set forward 30 s"),
        pytest.param(reboot(0), id="a reboot"),
    ],
)
def test_a_clock_that_is_right_costs_no_look(host: Host, change: Callable[[Host], None]) -> None:
    """A restart answers from the cache, at once."""
    current = at_twenty_minutes(host)
    change(host)
    host.start(at(ONE))
    host.gateway().calls.clear()
    assert host.ask() == current
    assert host.gateway().calls == []


def test_a_doubtful_key_is_not_printed_while_nobody_confirms_it(host: Host) -> None:
    """The gateway is down: exit status 75 and the reason, until it answers; nothing is lost."""
    current = minted(host)
    host.time.error -= HOUR
    host.start(at(ONE))
    host.gateway().out = True
    for _ in range(10):
        assert host.ask() is None
        host.run(MINUTE)
    error = host.broker.why_not("work")
    assert isinstance(error, NotReady)
    assert error.exit_status == 75
    assert "clock" in error.message
    assert len(host.gateway().mints) == 1
    looks = [what for _, what in host.gateway().calls].count("verify")
    assert 3 <= looks <= 40
    host.gateway().out = False
    host.run(301)
    assert host.ask() is not None
    assert host.gateway().keys[current].revoked is None


def test_who_asks_for_a_doubtful_key_has_it_looked_at_soon(host: Host) -> None:
    """After hours without a gateway the next look is minutes away: an ask brings it forward."""
    minted(host)
    host.time.error -= HOUR
    host.start(at(ONE))
    host.gateway().out = True
    host.run(HOUR)
    host.gateway().out = False
    waits = host.broker.slots("work").current.not_before - host.time.read().wall
    assert waits > timedelta(seconds=10)
    host.broker.ask("work")
    host.run(6)
    assert host.ask() is not None


def test_a_doubtful_key_that_nobody_can_try_is_replaced(host: Host) -> None:
    """Where no method tells keys apart, a new one is asked for, and the old never printed."""
    current = minted(host)
    host.time.error -= HOUR
    host.verdict = Verdict(Look.UNVERIFIED, "none")
    host.start(at(ONE))
    host.run(5)
    found = host.ask()
    assert found is not None
    assert found != current
    assert host.journal.current is not None
    assert host.journal.current.verified == "unverified"


def test_a_doubtful_key_that_is_refused_is_replaced(host: Host) -> None:
    """It expired while the clock was wrong."""
    current = minted(host)
    host.time.error -= HOUR
    host.gateway().bad.add(current)
    host.start(at(ONE))
    assert host.ask() is None
    host.run(2)  # the retry interval counts from the first mint
    found = host.ask()
    assert found is not None
    assert found != current


def test_a_key_is_over_when_either_clock_says_so(host: Host) -> None:
    """A clock that was set back a little while the process ran does not prolong a key's life."""
    minted(host)
    host.gateway().out = True
    host.run(119.5 * MINUTE)
    host.time.error -= 50
    assert host.ask() is not None
    host.run(35)
    assert host.time.read().wall < host.broker.slots("work").current.lease.expires_at
    assert host.ask() is None
    assert phase(host.broker.slots("work"), at(ONE).policy, host.broker.now("work")) is (
        Phase.EXPIRED
    )


def test_a_clock_that_is_set_while_we_run_has_the_key_tried(host: Host) -> None:
    """By more than a minute: the gateway looks at it before it is printed again."""
    first = minted(host)
    host.run(10)
    calls = len(host.gateway().calls)
    host.time.error -= 30 * MINUTE
    assert host.broker.handout("work") is None
    host.gateway().out = True
    host.run(1)
    assert [what for _, what in host.gateway().calls[calls:]] == ["verify"]
    assert host.ask() is None
    host.gateway().out = False
    host.run(10)
    assert host.ask() not in (None, first)


# profiles that go, or go elsewhere


def test_a_profile_that_was_removed_is_cleared_away(host: Host) -> None:
    """Its key is retired, kept for its readers' hold, and revoked where it was minted."""
    first = minted(host)
    removed = host.time.true
    host.start()
    assert host.broker.names() == ["work"]
    host.run(HOLD - 1)
    key = host.gateway().keys[first]
    assert host.broker.credential("work") is None
    assert key.revoked is None
    [old] = host.journal.retired
    assert old.why == "the profile is not configured any more"
    host.run(5)
    assert key.revoked is not None
    assert key.revoked >= removed + HOLD
    assert host.journal.all == ()
    assert len(host.gateway().mints) == 1
    error = host.broker.why_not("work")
    assert (type(error), error.message) == (NotReady, "work: is not configured any more")


def test_an_open_label_of_a_removed_profile_is_looked_up(host: Host) -> None:
    """At the issuer that its record names, until nothing can commit any more."""
    host.start(at(ONE))
    host.gateway().plan = ["late"]
    host.settle()
    assert len(host.journal.open) == 1
    host.start()
    host.run(2 * MINUTE)
    [late] = host.gateway().keys.values()
    assert late.revoked is not None
    assert host.journal.all == ()


def test_a_profile_that_names_another_gateway_has_a_key_of_that(host: Host) -> None:
    """At once; the old key is not handed out any more, and ends after its hold, at its own."""
    first = minted(host)
    moved = host.time.true
    host.start(at(TWO))
    assert host.broker.credential("work") is None
    host.run(2)  # the retry interval counts from the first mint
    second = host.ask()
    assert second in host.gateway(TWO).keys
    [old] = host.journal.retired
    assert (old.why, old.issuer.url) == ("the profile names another source now", ONE)
    host.run(HOLD)
    ended = host.gateway(ONE).keys[first].revoked
    assert ended is not None
    assert ended >= moved + HOLD
    assert "revoke" not in [what for _, what in host.gateway(TWO).calls]
    assert host.ask() == second


def test_a_profile_that_comes_back_while_its_key_is_retired_has_a_new_one(host: Host) -> None:
    """What is retired is not handed out again: its end has a date."""
    first = minted(host)
    host.start()
    host.run(MINUTE)
    host.start(at(ONE))
    second = host.ask()
    assert second not in (None, first)


def test_keys_are_asked_for_only_where_somebody_asked(host: Host) -> None:
    """A command for one profile clears up after all, and mints for that one."""
    host.start(at(ONE, "a"), at(ONE, "b"), mints={"a"})
    host.run(5)
    assert host.broker.credential("a") is not None
    assert host.broker.credential("b") is None
    assert len(host.gateway().mints) == 1
    host.broker.hurry("b")
    host.run(5)
    assert len(host.gateway().mints) == 1
    host.start(at(ONE, "a"), mints=())
    host.run(3 * HOUR)
    assert len(host.gateway().mints) == 1


# reasons


@pytest.mark.parametrize("kind", sorted(CLASSES.values(), key=lambda kind: kind.code))
def test_a_failure_is_told_in_its_own_words(host: Host, kind: type[KeybrokerError]) -> None:
    """Class, and so the exit status; message; hint, or the command that shows more."""
    broker = host.start(at(ONE))
    for hint, told in (("type this", "type this"), ("", "keybroker source test work")):
        trouble = Trouble(kind.code, "litellm: what happened", hint)
        broker._profiles["work"].slots = Slots(trouble=trouble)
        error = broker.why_not("work")
        expected = (kind, "work: litellm: what happened", told)
        assert (type(error), error.message, error.hint) == expected


def test_what_the_source_said_is_told(host: Host) -> None:
    """From the worker's answer to the user's line."""
    host.start(at(ONE))
    host.gateway().out = True
    assert host.ask() is None
    error = host.broker.why_not("work")
    assert (type(error), error.message) == (SourceUnavailable, "work: gateway: is down")
    host.gateway().out = False
    host.run(10)
    assert host.ask() is not None
    assert host.broker.slots("work").trouble is None


def test_too_many_keys_are_told(host: Host) -> None:
    """A gateway that revokes nothing gets no more than max_live, and the user what to type."""
    minted(host)
    current = host.journal.current
    assert current is not None
    host.disk.remove(STATE / "cache" / "work.sealed")
    broker = host.start(at(ONE))
    later = host.time.read().wall + timedelta(hours=1)
    retired = tuple(replace(current, label=f"kb-{n}", revoke_at=later) for n in range(4))
    broker._profiles["work"].slots = Slots(retired=retired)
    assert host.ask() is None
    error = broker.why_not("work")
    assert (type(error), error.message, error.hint) == (
        NotReady,
        f"work: 4 keys are unrevoked at {ONE}, the most allowed for 60 min more",
        "wait, or end them all: keybroker revoke work",
    )


def test_too_many_keys_that_cannot_be_revoked_are_told_until_they_end(host: Host) -> None:
    """Their revocation is overdue: their own end is what makes room."""
    minted(host)
    current = host.journal.current
    assert current is not None
    broker = host.start(at(ONE))
    now = host.time.read().wall
    retired = tuple(replace(current, label=f"kb-{n}", revoke_at=now) for n in range(4))
    broker._profiles["work"].slots = Slots(retired=retired)
    assert broker.why_not("work").message.endswith("the most allowed for 3 h more")


def test_a_gateway_that_is_gone_does_not_block_the_next_one(host: Host) -> None:
    """However many keys are left there; they stay in the journal."""
    for _ in range(4):
        minted(host)
        host.broker.hurry("work")
        host.run(5)
    host.gateway().out = True
    host.start(at(TWO))

    assert host.ask() is not None
    slots = host.broker.slots("work")
    assert [key.issuer.url for key in slots.retired] == [ONE] * 4
    assert slots.current is not None
    assert slots.current.issuer.url == TWO


def test_no_key_yet_is_told(host: Host) -> None:
    """Before anything was tried."""
    error = host.start(at(ONE)).why_not("work")
    assert (type(error), error.message) == (NotReady, "work: no key yet")


# keys that somebody else keeps


def test_a_followed_key_is_tried_and_handed_out(host: Host) -> None:
    """Nothing of it is journalled; a restart answers from the cache, without reading it."""
    host.start(following())
    assert host.ask() == "sk-first"
    assert host.owner.verified == ["sk-first"]
    assert Journal(STATE, host.disk).read() == []
    host.start(following())
    assert host.broker.credential("work") is not None
    assert host.ask() == "sk-first"
    assert host.owner.reads == 1


def test_an_unchanged_key_is_read_every_five_minutes_and_not_tried_again(host: Host) -> None:
    """Reading it costs its owner nothing; looks cost the gateway."""
    host.start(following())
    host.ask()
    host.run(HOUR - 1)
    assert 12 <= host.owner.reads <= 14  # up to a tenth earlier, together with others
    assert host.owner.verified == ["sk-first"]


def test_a_new_value_replaces_the_old_when_it_verifies(host: Host) -> None:
    """Within a poll interval; the old one is dropped at once, not kept for a hold."""
    host.start(following())
    host.ask()
    host.owner.value = "sk-second"
    host.run(5 * MINUTE + 1)
    assert host.ask() == "sk-second"
    slots = host.broker.slots("work")
    assert (slots.retired, slots.next) == ((), None)
    assert slots.current is not None
    assert slots.current.verified == "models"
    assert [
        one.reveal() for one in map(_secret, host.broker._profiles["work"].secrets.values())
    ] == ["sk-second"]
    host.start(following())
    assert host.ask() == "sk-second"


def _secret(credential: Credential) -> Secret:
    return credential.secret


@pytest.mark.parametrize("look", [Look.REFUSED, Look.UNDECIDED])
def test_a_new_value_that_does_not_verify_replaces_nothing(host: Host, look: Look) -> None:
    """The owner rotated too early, or wrote rubbish: the old one works, and stays."""
    host.start(following())
    host.ask()
    host.owner.value, host.owner.looks = "sk-second", {"sk-second": look}
    for _ in range(30):
        host.run(MINUTE)
        assert host.ask() == "sk-first"
    tries = host.owner.verified.count("sk-second")
    assert 3 <= tries <= 30
    host.owner.looks = {}
    host.run(10 * MINUTE)
    assert host.ask() == "sk-second"


def test_a_daemon_comes_back_to_a_source_whose_new_value_was_refused(host: Host) -> None:
    """It looks only at what changed or fell due: what was given up has to fall due again."""
    host.start(following())
    host.ask()
    host.owner.value, host.owner.looks = "sk-second", {"sk-second": Look.REFUSED}
    read = host.owner.reads
    for _ in range(400):
        due = host.broker.turn(8)
        while host.broker.busy:
            host.broker.take(host.workers.receive(0))
            due = host.broker.turn(8)
        assert due is not None, "it would sleep for ever"
        host.time.true += max((due - host.time.read().wall).total_seconds(), 0.01)
        if host.owner.reads >= read + 3:
            return
    raise AssertionError("it was not read again")


@pytest.mark.parametrize(
    ("said", "is_withdrawn"),
    [
        (SourceInvalid("static: is deleted", withdrawn=True), True),
        (SourceInvalid("static: redirects"), False),
        (SourceUnavailable("static: cannot be read"), False),
    ],
)
def test_a_refused_key_is_condemned_where_its_keeper_has_none(
    host: Host, said: SourceError, is_withdrawn: bool
) -> None:
    """With nothing else that the gateway accepts, a refusal alone may be the gateway's trouble."""
    host.start(following())
    host.ask()
    host.owner.problem = said
    host.run(6 * MINUTE)
    assert host.ask() == "sk-first"
    host.owner.looks = {"sk-first": Look.REFUSED}
    host.broker.check("work")
    host.run(MINUTE)
    assert (host.ask() is None) is is_withdrawn
    host.owner.problem, host.owner.value, host.owner.looks = None, "sk-second", {}
    host.run(6 * MINUTE)
    assert host.ask() == "sk-second"


def test_a_refused_new_value_is_told(host: Host) -> None:
    """Without a current key, the user hears why."""
    host.owner.looks = {"sk-first": Look.REFUSED}
    host.start(following())
    host.run(10)
    error = host.broker.why_not("work")
    assert isinstance(error, SourceInvalid)
    assert error.message == "work: static: a key was given up: the gateway refused it (401)"


def condemn(host: Host) -> None:
    at_work = host.broker._profiles["work"]
    assert at_work.slots.current is not None
    at_work.slots = replace(at_work.slots, current=replace(at_work.slots.current, condemned=True))


def test_an_undecided_value_is_better_than_a_condemned_one(host: Host) -> None:
    """The old one is known to be dead."""
    host.start(following())
    host.ask()
    condemn(host)
    host.owner.value, host.owner.looks = "sk-second", {"sk-second": Look.UNDECIDED}
    host.run(20)
    assert host.ask() == "sk-second"


@pytest.mark.parametrize("look", [Look.REFUSED, Look.UNDECIDED, Look.ALIVE])
def test_a_condemned_value_that_stays_is_read_and_tried_at_intervals(
    host: Host, look: Look
) -> None:
    """Its owner has not rotated it: no look after look without a pause; alive, it is back."""
    host.start(following())
    host.ask()
    condemn(host)
    host.owner.looks = {"sk-first": look}
    host.owner.verified.clear()
    host.run(MINUTE)
    assert len(host.owner.verified) <= 30
    assert (host.ask() is not None) is (look is Look.ALIVE)


@pytest.mark.parametrize(
    "problem", [SourceUnavailable("static: is down"), SourceDenied("static: is locked")]
)
def test_a_source_that_fails_costs_nothing(host: Host, problem: KeybrokerError) -> None:
    """The key lives as long as its owner said; who is told to wait asks no more often."""
    host.start(following())
    host.ask()
    host.owner.problem = problem
    host.run(HOUR)
    assert host.ask() == "sk-first"
    assert host.owner.reads <= 40
    assert host.broker.slots("work").failures > 5
    host.owner.problem = None
    host.run(6 * MINUTE)
    assert host.broker.slots("work").failures == 0


def test_rotate_reads_a_followed_key_at_once(host: Host) -> None:
    """Unchanged, that is all: it is not read again and again in the hope of another."""
    host.start(following())
    host.ask()
    host.broker.hurry("work")
    host.run(MINUTE)
    assert host.owner.reads == 2
    assert host.broker.slots("work").rotate is False
    host.owner.value = "sk-second"
    host.broker.hurry("work")
    assert host.ask() == "sk-second"


@pytest.mark.parametrize("seen", ["sk-first", "an empty file"])
def test_what_is_written_while_it_is_read_is_read_again(host: Host, seen: str) -> None:
    """The answer under way may be of a file that was only being written."""
    host.start(following())
    host.ask()
    if seen == "an empty file":
        host.owner.problem = ConfigError("reference file:key: what it names is empty")
    host.broker.hurry("work")
    host.broker.turn()
    assert host.broker.busy

    host.owner.value, host.owner.problem = "sk-second", None
    host.broker.retry()

    assert host.ask() == "sk-second"
    assert host.broker.slots("work").trouble is None


def test_an_older_version_changes_nothing(host: Host) -> None:
    """A standby that is behind answers with the key of before: it is not gone back to."""
    host.owner.value, host.owner.written = "sk-second", 20.0
    host.start(following())
    assert host.ask() == "sk-second"
    host.owner.value, host.owner.written = "sk-first", 10.0
    host.run(HOUR)
    assert host.ask() == "sk-second"
    assert host.owner.verified == ["sk-second"]
    assert host.broker.slots("work").trouble is None  # nothing is wrong, for now
    host.start(following())
    host.run(HOUR)
    assert host.ask() == "sk-second"


def test_an_older_version_is_no_answer_to_somebody_who_wants_a_new_one(host: Host) -> None:
    """It is said who is behind, and asked again, but not in a hurry."""
    host.owner.value, host.owner.written = "sk-second", 20.0
    host.start(following())
    host.ask()
    host.owner.value, host.owner.written = "sk-first", 10.0
    host.broker.hurry("work")
    host.run(5 * MINUTE)
    assert host.owner.reads <= 20
    assert host.broker.slots("work").trouble is not None
    assert "an older version" in host.broker.slots("work").trouble.message
    host.owner.value, host.owner.written = "sk-third", 30.0
    host.run(6 * MINUTE)
    assert host.ask() == "sk-third"
    assert host.broker.slots("work").trouble is None


def test_a_secret_that_was_made_anew_is_taken_though_its_count_begins_again(host: Host) -> None:
    """What counts is when it was written."""
    host.owner.value, host.owner.written = "sk-second", 20.0
    host.start(following())
    host.ask()
    host.owner.value, host.owner.written = "sk-first", 30.0
    host.run(6 * MINUTE)
    assert host.ask() == "sk-first"


def test_a_key_that_is_there_again_is_no_more_withdrawn(host: Host) -> None:
    """Refusals alone do not condemn it then."""
    host.start(following())
    host.ask()
    host.owner.problem = SourceInvalid("vault: version 1 was deleted", withdrawn=True)
    host.run(6 * MINUTE)
    assert host.broker.slots("work").withdrawn
    host.owner.problem = None
    host.run(6 * MINUTE)
    assert not host.broker.slots("work").withdrawn


def test_who_rotates_hears_that_the_gateway_refuses_what_the_source_has(host: Host) -> None:
    """It may be the gateway's fault: the key is handed out on, and its owner can do something."""
    host.start(following())
    assert host.ask() == "sk-first"
    current = host.broker.slots("work").current
    assert not outcomes.rotated(host.broker, "work", current)["refused"]
    host.run(5)
    host.owner.looks["sk-first"] = Look.REFUSED
    host.broker.check("work")
    host.run(5)
    host.broker.hurry("work")
    host.run(MINUTE)
    told = outcomes.rotated(host.broker, "work", current)
    assert (told["rotated"], told["refused"]) == (False, True)
    assert host.ask() == "sk-first"


def trying(host: Host) -> None:
    """Have a second version tried that the gateway cannot decide on."""
    host.owner.written = 10.0
    host.start(following())
    assert host.ask() == "sk-first"
    host.owner.value, host.owner.written = "sk-second", 20.0
    host.owner.looks["sk-second"] = Look.UNDECIDED
    host.run(6 * MINUTE)
    assert host.broker.slots("work").next is not None


def test_a_version_that_is_tried_keeps_nobody_from_reading_the_next(host: Host) -> None:
    """Its keeper may have noticed, too, that the gateway does not know what to make of it."""
    trying(host)
    host.owner.value, host.owner.written = "sk-third", 30.0
    host.run(6 * MINUTE)
    assert host.ask() == "sk-third"


def test_somebody_in_a_hurry_has_no_version_read_in_a_hot_loop(host: Host) -> None:
    """While it is tried."""
    trying(host)
    host.broker.hurry("work")
    before = host.owner.reads
    host.run(MINUTE)
    assert host.owner.reads - before <= MINUTE / 5 + 1


def test_a_version_that_is_taken_back_while_it_is_tried_is_never_out(host: Host) -> None:
    """Its keeper wrote the one before again: that is the newest."""
    trying(host)
    host.owner.value, host.owner.written = "sk-first", 30.0
    host.run(6 * MINUTE)
    host.owner.looks.clear()
    host.broker.news.clear()
    host.run(HOUR)
    assert host.ask() == "sk-first"
    assert host.broker.news == []


def test_a_version_that_is_deleted_while_it_is_tried_is_never_out(host: Host) -> None:
    """The key that is known goes on."""
    trying(host)
    host.owner.problem = SourceInvalid("vault: version 2 was deleted", withdrawn=True)
    host.run(6 * MINUTE)
    host.owner.looks.clear()
    host.run(HOUR)
    assert host.ask() == "sk-first"


def test_an_older_version_does_not_replace_one_that_is_tried(host: Host) -> None:
    """A standby that is behind, between two that wait for the gateway."""
    trying(host)
    host.owner.value, host.owner.written = "sk-third", 30.0
    host.owner.looks["sk-third"] = Look.UNDECIDED
    host.run(6 * MINUTE)
    host.owner.value, host.owner.written = "sk-second", 20.0
    host.run(6 * MINUTE)
    host.owner.looks.clear()
    host.run(HOUR)
    assert host.ask() == "sk-third"


def test_a_keeper_s_advice_is_followed_but_never_in_a_rush(host: Host) -> None:
    """It says when the next version will be there: read then, not five minutes later."""
    host.owner.reread = 60.0
    host.start(following())
    host.ask()
    host.run(HOUR)
    assert 50 <= host.owner.reads <= 61
    host.owner.reread = 0.0  # a count that has come to its end, and stays there
    before = host.owner.reads
    host.run(HOUR)
    assert host.owner.reads - before <= HOUR / 5 + 1


def test_who_says_when_to_read_again_is_not_asked_before(host: Host) -> None:
    """A key that ends, and is old, is read at its interval until then."""
    host.owner.ends, host.owner.reread = HOUR, 600.0
    host.start(following())
    host.ask()
    host.run(55 * MINUTE)
    assert 10 <= host.owner.reads <= 13


def test_nobody_waits_for_others_when_a_key_has_ended(host: Host) -> None:
    """The next read comes to its second; that of one that lives is put together with others'."""
    host.owner.ends = HOUR
    host.start(following())
    host.ask()
    at_work = host.broker._profiles["work"]
    ends = START + timedelta(seconds=HOUR)
    names = [f"{number:08x}" for number in range(64)]
    assert {_rounded(ends, at_work, one) for one in names} == {ends}
    before = ends - timedelta(seconds=1)
    assert len({_rounded(before, at_work, one) for one in names}) > 16


def test_hosts_do_not_read_in_the_same_second(host: Host) -> None:
    """Each installation has seconds of its own."""
    host.start(following())
    host.ask()
    at_work = host.broker._profiles["work"]
    due = START + timedelta(minutes=7)
    moments = {_rounded(due, at_work, f"{number:08x}") for number in range(64)}
    assert len(moments) > 16
    assert all(timedelta() <= moment - due < timedelta(seconds=30) for moment in moments)


def test_an_answer_that_cannot_be_taken_in_is_asked_for_again(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake of ours is said, and costs no profile its next reads."""
    host.start(following())
    with monkeypatch.context() as patched:
        patched.setattr("keybroker.broker._credential", lambda found: read_time(str(found)))
        with pytest.raises(ValueError, match="Invalid isoformat"):
            host.ask()
    assert host.broker.slots("work").trouble is not None
    host.run(6 * MINUTE)
    assert host.ask() == "sk-first"


def test_a_followed_key_is_read_only_where_somebody_asked(host: Host) -> None:
    """A command for another profile runs nobody's program."""
    host.start(following(), mints=())
    host.run(HOUR)
    assert host.owner.reads == 0


def test_a_followed_key_needs_no_keyring(host: Host) -> None:
    """It can be read again: what cannot be sealed is handed out all the same."""
    host.start(following(), wrap_key=None)
    assert host.ask() == "sk-first"


def test_a_followed_profile_that_names_another_source_drops_the_old_key(host: Host) -> None:
    """A sealed key of the old one is not handed out for the new address."""
    host.start(following())
    host.ask()
    host.owner.value = "sk-second"
    host.start(following(base_url=TWO))
    assert host.broker.credential("work") is None
    host.run(301)
    assert host.ask() == "sk-second"


def test_a_followed_profile_that_names_another_source_has_it_read_at_once(host: Host) -> None:
    """Somebody mended the path: nobody waits for an interval, and nothing has failed."""
    host.start(following())
    host.ask()
    host.owner.value = "sk-second"
    host.broker.configure([following(base_url=TWO)])
    host.run(1)
    assert host.ask() == "sk-second"
    assert host.broker.slots("work").trouble is None
    assert host.owner.reads == 2


@pytest.mark.parametrize("kind", ["minting", "following"])
def test_what_another_source_said_is_not_told_of_this_one(host: Host, kind: str) -> None:
    """From the moment that the profile names another; what is mended otherwise stays to be seen."""
    profile = at(ONE) if kind == "minting" else following()
    host.start(profile)
    trouble = Trouble("denied", "vault: the token may not read it")
    failed = replace(Slots(), trouble=trouble, failures=3, withdrawn=True)
    host.broker._profiles["work"].slots = failed
    host.broker.configure([replace(profile, helper_ttl=2 * profile.helper_ttl)])
    assert host.broker.slots("work").trouble == trouble
    host.broker.configure([at(TWO) if kind == "minting" else following(base_url=TWO)])

    slots = host.broker.slots("work")
    assert (slots.trouble, slots.failures, slots.withdrawn) == (None, 0, False)
    assert host.broker.why_not("work").message == "work: no key yet"


def test_a_key_that_is_to_end_is_handed_out_no_more(host: Host) -> None:
    """From the moment that somebody asked for it, before anything was written down."""
    minted(host)
    host.broker.end("work", "it was asked for")
    assert host.broker.credential("work") is None
    assert host.broker.handout("work") is None


def test_the_drift_that_was_looked_at_ends_with_its_key(host: Host) -> None:
    """The next key's times are by the clocks as they are: another disagreement is one."""
    minted(host)
    host.run(10)
    host.time.error -= 30 * MINUTE
    assert host.ask() is not None  # tried, and replaced
    host.run(10)
    assert host.broker.handout("work") is not None
    host.time.error += 30 * MINUTE
    assert host.broker.handout("work") is None


def test_what_is_sealed_is_ours_only_if_the_journal_agrees(host: Host) -> None:
    """A sealed key that the journal has as gone, or never had, is not handed out."""
    first = minted(host)
    kept = host.disk.files[STATE / "cache" / "work.sealed"]
    host.broker.end("work", "it was asked for")
    host.run(1)
    assert host.gateway().keys[first].revoked is not None
    host.disk.files[STATE / "cache" / "work.sealed"] = kept
    host.start(at(ONE), mints=())
    assert host.ask() is None
    host.disk.remove(STATE / "journal.jsonl")
    host.start(at(ONE), mints=())
    assert host.ask() is None


def test_a_sealed_key_of_another_issuer_is_not_adopted(host: Host) -> None:
    """Same label, another gateway: one of the two files is not what it says."""
    minted(host)
    sealed = host.broker._profiles["work"]
    current = sealed.slots.current
    assert current is not None
    other = Issuer("litellm", TWO, current.issuer.admin)
    found = Sealed(sealed.secrets[current.label], current.label, other, "models", sealed.anchor)
    journal = Journal(STATE, host.disk)
    broker = Broker(
        [at(ONE)],
        journal.read(),
        {"work": found},
        host.workers,
        instance="0a1b2c3d",
        wrap_key=WRAP_KEY,
        mints=(),
        clock=host.time,
        reread=journal.read,
    )
    assert broker.credential("work") is None


@pytest.mark.parametrize("timeout", ["8s", "60s"])
def test_who_has_a_sign_in_renewed_is_given_the_time_for_it(
    host: Host, timeout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is ended while the provider answers has lost the next refresh token."""
    raw = {"type": "oidc", "issuer": "https://login.example.com", "timeout": timeout}
    corp = read_login("corp", raw, Where({}, "test"))
    source = {"type": "login", "login": corp.text, "timeout": "1s"}
    profile = read_profile("work", {"base_url": ONE, "source": source}, Where({}, "test"))
    host.start(profile)
    given: dict[str, float] = {}
    send = host.workers.send

    def noted(kind: str, op: str, seconds: float, /, **values: Any) -> int:
        given[op] = seconds
        return send(kind, op, seconds, **values)

    monkeypatch.setattr(host.workers, "send", noted)
    host.settle()
    assert given["poll"] >= 1 + LOCK_SECONDS + corp.settings["timeout"].total_seconds()
