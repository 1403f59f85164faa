"""Leases: made for us, renewed while that works, replaced before their end, revoked by us."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keybroker import rotation, worker
from keybroker.broker import Broker
from keybroker.cache import Cache
from keybroker.config import Profile, parse
from keybroker.credential import Credential, Lease, Secret, Session, Verdict
from keybroker.document import Where
from keybroker.errors import SourceDenied, SourceError, SourceInvalid, SourceUnavailable
from keybroker.journal import decode_lease, encode_lease
from keybroker.logins import RENEWALS_APART, Logins
from keybroker.pool import Answer
from keybroker.rotation import Kind
from keybroker.slots import Event, Key, Record, Slots, fold
from keybroker.sources import Capabilities
from keybroker.vault import session_of
from tests.world import (
    START,
    STATE,
    WRAP_KEY,
    Crash,
    DaemonWorld,
    Gateway,
    GatewayKey,
    GatewaySource,
    Time,
)

HOUR = 3600.0
COMMON = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow], derandomize=False
)


def leased(hold: str = "15m", **source: Any) -> Profile:
    """Read a profile of a dynamic engine."""
    document = {
        "vault": {
            "address": "http://127.0.0.1:1",
            "auth": {"method": "approle", "role_id": "r", "secret_id": {"env": "SECRET_ID"}},
        },
        "profiles": {
            "work": {
                "base_url": "http://127.0.0.1:2",
                "hold": hold,
                "source": {
                    "type": "vault",
                    "engine": "dynamic",
                    "path": "llm/creds/team",
                    **source,
                },
            }
        },
    }
    return parse(document, Where({}, "test"), (), {}).profiles["work"]


class Engine(Gateway):
    """A dynamic engine: a lease lives for `lifetime`, and with its renewals for `longest`."""

    longest: float = 2 * HOUR
    renewable: bool = True
    renewals: list[float]
    refuses: SourceError | None = None  # a renewal

    def __init__(self, time: Time) -> None:
        super().__init__(time)
        self.lifetime = HOUR
        self.renewals = []


class EngineSource(GatewaySource):
    """The adapter for it: nothing can be found by its label."""

    capabilities = Capabilities(Kind.LEASED, revoke=True, enforces_expiry=True)

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._engine = engine

    def issue(self, label: str) -> Credential:
        credential = super().issue(label)
        lease = credential.lease
        key = self._engine.keys[credential.secret.reveal()]
        key.ends = min(key.ends, key.born + self._engine.longest)
        ends = lease.issued_at + timedelta(seconds=key.ends - key.born)
        renewable = self._engine.renewable
        return Credential(
            credential.secret,
            Lease(lease.id, "vault", lease.issued_at, ends, renewable, revocable=True),
        )

    def renew(self, lease: Lease) -> Lease:
        engine, now = self._engine, self._engine.time.read().wall
        engine.renewals.append(engine.time.true)
        if engine.refuses is not None:
            raise engine.refuses
        if engine.begin("renew") != "ok":
            raise SourceUnavailable("engine: is down")
        key = engine.keys[lease.id]
        if not key.alive(engine.time.true):
            raise SourceInvalid("engine: has ended the lease")
        left = min(engine.lifetime, key.born + engine.longest - engine.time.true)
        key.ends = engine.time.true + left
        return Lease(
            lease.id,
            "vault",
            lease.issued_at,
            now + timedelta(seconds=left),
            renewable=left > 0.9 * engine.lifetime,
            revocable=True,
            renewed_at=now,
        )

    def find(self, label: str) -> list[Lease]:
        raise AssertionError("nothing can be found")


class LeaseWorld(DaemonWorld):
    """One host with such a profile, and what its readers were given."""

    def __init__(
        self,
        profile: Profile,
        roll: Callable[[], float] = lambda: 0.5,
        **engine: Any,
    ) -> None:
        super().__init__(profile, roll)
        self.gateway: Engine = Engine(self.time)
        for name, value in engine.items():
            setattr(self.gateway, name, value)

    def source(self) -> Any:
        return EngineSource(self.gateway)

    def read(self, seconds: float, every: float) -> list[float]:
        """Ask again and again; return how long each key that was given had left to live."""
        left = []
        until = self.time.true + seconds
        while self.time.true < until:
            text = self.ask()
            assert text is not None, "a reader got no key"
            left.append(self.gateway.keys[text].ends - self.time.true)
            assert self.gateway.keys[text].alive(self.time.true)
            self.run(every)
        return left


def world(hold: str = "15m", *, lifetime: float = HOUR, **engine: Any) -> LeaseWorld:
    return LeaseWorld(leased(hold), **{"lifetime": lifetime, **engine})


def unaccounted(made: LeaseWorld) -> list[GatewayKey]:
    """Return the keys that live on and that neither the journal nor an open label stands for."""
    known = {key.lease.id for key in made.slots.keys}
    opened = {one.label for one in made.slots.open}
    alive = made.gateway.alive()
    return [key for key in alive if key.secret not in known and key.label not in opened]


def test_a_lease_is_renewed_until_its_longest_and_then_replaced() -> None:
    """Readers always have their hold left; what was replaced is revoked, and not left to end."""
    made = world()

    left = made.read(12 * HOUR, every=60)

    assert min(left) >= 15 * 60
    mints = len(made.gateway.mints)
    assert 6 <= mints <= 10  # of two hours each; twelve or more would be without renewals
    assert len(made.gateway.renewals) >= mints
    ended = [key for key in made.gateway.keys.values() if not key.alive(made.time.true)]
    assert ended
    assert all(key.revoked is not None and key.revoked < key.ends for key in ended)


def test_a_lease_that_cannot_be_renewed_is_replaced_before_its_end() -> None:
    made = world(renewable=False)

    left = made.read(6 * HOUR, every=60)

    assert min(left) >= 15 * 60
    assert made.gateway.renewals == []
    assert len(made.gateway.mints) >= 8


def test_a_lease_shorter_than_three_holds_gives_its_readers_a_third() -> None:
    """Vault says how long it is, not the configuration: it is used as far as it goes."""
    made = world(hold="15m", lifetime=10.0, longest=20.0)

    left = made.read(120, every=0.5)

    assert min(left) >= 10 / 3 / 2  # what is left of a last renewal, a third of it
    assert len(made.gateway.mints) <= 14
    assert made.most_alive <= 3


def test_each_renewal_is_written_down() -> None:
    """A new process knows the end as it is now, though the sealed key has the first one."""
    made = world()
    made.ask()
    first = made.slots.current
    made.run(0.6 * HOUR)

    renewed = made.slots.current
    assert first is not None
    assert renewed is not None
    assert renewed.label == first.label
    assert renewed.lease.expires_at > first.lease.expires_at
    made.start()  # the sealed key is of before
    made.time.true += 0.5 * HOUR  # past the first end, before the second
    assert made.ask() is not None
    assert len(made.gateway.mints) == 1


def test_a_renewal_that_fails_is_tried_again_before_the_end() -> None:
    made = world()
    made.ask()
    made.run(0.3 * HOUR)
    made.gateway.plan = ["down"] * 4

    made.run(0.4 * HOUR)

    assert len(made.gateway.renewals) >= 5
    assert len(made.gateway.mints) == 1
    assert made.slots.current is not None
    assert made.slots.current.lease.renewed_at is not None


@pytest.mark.parametrize(
    "why", [SourceDenied("vault: may not renew"), SourceInvalid("vault: over")]
)
def test_a_renewal_that_is_refused_is_not_asked_for_again(why: SourceError) -> None:
    """The lease is used up; one that is no more is replaced at once."""
    made = world()
    made.ask()
    made.gateway.refuses = why

    left = made.read(0.95 * HOUR, every=30)

    assert min(left) > 0
    assert 2 <= len(made.gateway.mints) <= 3
    assert len(made.gateway.renewals) <= len(made.gateway.mints)  # of each lease once


def test_a_lease_whose_answer_was_lost_is_listed_until_it_is_over() -> None:
    """Nobody can look it up: it ends by itself, and others are made meanwhile."""
    made = world()
    made.gateway.plan = ["drop"]
    made.ask()
    made.run(120)

    assert made.ask() is not None
    assert len(made.slots.open) == 1
    assert unaccounted(made) == []
    made.run(24 * HOUR)
    assert made.slots.open == ()
    assert unaccounted(made) == []


def test_answers_that_are_lost_do_not_keep_others_from_being_asked_for_all_day() -> None:
    made = world()
    made.gateway.plan = ["lost"] * 6

    made.run(60)
    assert len(made.gateway.mints) <= made.profile.max_live
    made.run(600)

    assert made.ask() is not None


def test_a_profile_that_is_gone_has_its_lease_revoked() -> None:
    made = world()
    made.ask()
    made.broker.configure([])
    made.run(HOUR / 2)

    assert made.gateway.alive() == []
    assert made.slots.keys == ()


@COMMON
@given(
    st.integers(0, 40),
    st.sampled_from(["before", "after"]),
    st.sampled_from(["worker", "both"]),
    st.floats(5.0, 3 * HOUR),
    st.integers(0, 1 << 16),
)
def test_no_lease_is_forgotten_by_a_crash(
    at: int, side: str, who: str, lifetime: float, seed: int
) -> None:
    """Promise 3: whatever is killed, what lives is known, and in the end nothing is left."""
    patch = pytest.MonkeyPatch()
    made = LeaseWorld(leased(), Random(seed).random, lifetime=lifetime, longest=2.5 * lifetime)
    patch.setattr(worker, "perform", made.perform)
    try:
        made.crash_at = (at, side, who)
        for _ in range(40):
            made.ask()
            made.run(lifetime / 7)
            assert unaccounted(made) == []
        assert made.ask() is not None
        made.broker.configure([])
        made.run(25 * HOUR)
        assert made.gateway.alive() == []
    finally:
        patch.undo()


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("who", ["worker", "both"])
@pytest.mark.parametrize("effect", ["renew", "renewed", "keep"])
def test_no_lease_is_forgotten_by_a_crash_at_its_own_effects(
    monkeypatch: pytest.MonkeyPatch, effect: str, who: str, side: str
) -> None:
    """What a renewal or a login was about to write is found out again."""
    made = LoginWorld()
    crashes = [effect]

    def perform(name: str, call: Callable[[], Any]) -> Any:
        if crashes != [name]:
            return made.perform(name, call)
        crashes.clear()
        if side == "after":
            call()
        raise Crash(who)

    monkeypatch.setattr(worker, "perform", perform)
    for _ in range(12):
        made.ask()
        made.run(HOUR / 3)
        assert unaccounted(made) == []
    assert crashes == []
    assert made.ask() is not None
    assert made.most_alive <= 3
    assert len(made.logins) <= 3
    made.broker.configure([])
    made.run(25 * HOUR)
    assert made.gateway.alive() == []


@COMMON
@given(
    st.lists(
        st.tuples(st.sampled_from(["run", "out", "rotate", "clock", "kill"]), st.floats(0.01, 1.0)),
        max_size=30,
    ),
    st.floats(5.0, 12 * HOUR),
    st.floats(1.0, 6.0),
    st.integers(0, 1 << 16),
)
def test_no_reader_gets_a_dead_lease(
    events: list[tuple[str, float]], lifetime: float, times: float, seed: int
) -> None:
    """Promise 1, in any history: while Vault answers a reader's key has a third of a grant left."""
    made = LeaseWorld(
        leased("100ms"), Random(seed).random, lifetime=lifetime, longest=times * lifetime
    )
    for what, share in events:
        if what == "run":
            made.run(share * lifetime)
        elif what == "out":
            made.gateway.out = True
            made.run(share * lifetime)
            made.gateway.out = False
            made.run(1)
        elif what == "rotate":
            made.broker.hurry("work")
        elif what == "clock":
            made.set_clock((share - 0.5) * lifetime / 4)
        else:
            made.start()
        text = made.ask()
        if text is not None:
            assert made.gateway.keys[text].alive(made.time.true)
    assert unaccounted(made) == []
    assert made.overslept == []


# The rule itself.


def key(**changes: Any) -> Key:
    lease = Lease("l", "vault", START, START + timedelta(hours=1), renewable=True, revocable=True)
    made = Key("kb-0a1b2c3d-work-1", leased().issuer, lease, "00", timedelta(), timedelta())
    return rotation.replace(made, **changes)


def test_a_renewable_lease_is_due_at_half_of_what_was_granted() -> None:
    policy = leased().policy
    due = rotation.renew_at(key(), policy)

    assert due is not None
    assert timedelta(minutes=24) <= due - START <= timedelta(minutes=30)
    assert rotation.stale_at(key(), policy) is None
    later = rotation.replace(
        key().lease,
        renewed_at=START + timedelta(minutes=30),
        expires_at=START + timedelta(minutes=90),
    )
    again = rotation.renew_at(key(lease=later), policy)
    assert again == due + timedelta(minutes=30)


def test_a_lease_keeps_all_that_is_known_of_it_in_the_journal() -> None:
    lease = rotation.replace(
        key().lease,
        renewed_at=START + timedelta(minutes=30),
        session="0a1b2c3d",
        session_ends=START + timedelta(hours=2),
        written_at=START,
        reread_at=START + timedelta(minutes=1),
    )

    assert decode_lease(encode_lease(lease)) == lease


def test_a_renewal_of_a_key_that_is_not_there_changes_nothing() -> None:
    record = Record(START, Event.RENEWED, "work", "kb-x", lease=key().lease)

    assert fold(Slots(), record) == Slots()


# Sessions: one login, whoever asks.


class LoginSource(EngineSource):
    """Logs in where it has no session, as a source that wants one does."""

    def __init__(self, engine: Engine, held: Any, logins: list[float]) -> None:
        super().__init__(engine)
        self._held, self._logins = held, logins

    def issue(self, label: str) -> Credential:
        name = session_of(leased().issuer.vault)
        session = self._held.get(name)
        if session.secret is None:
            if session.not_before is not None:
                raise SourceDenied("vault: refused role_id or secret_id")
            self._logins.append(self._engine.time.true)
            if self._engine.out:
                self._held.put(Session(name, failures=1, not_before=START))
                raise SourceDenied("vault: refused role_id or secret_id")
            self._held.put(Session(name, secret=Secret(f"s.{len(self._logins)}")))
        return super().issue(label)

    def verify(self, secret: Secret) -> Verdict:
        return EngineSource(self._engine).verify(secret)


class LoginWorld(LeaseWorld):
    """A host whose source logs in; each worker begins without a session of its own."""

    def __init__(self, **engine: Any) -> None:
        self.logins: list[float] = []
        super().__init__(leased(), **engine)

    def source(self) -> Any:
        operations = self.workers.operations
        return LoginSource(self.gateway, operations.held, self.logins)

    def forget(self) -> None:
        """Have the next request go to a worker that knows nothing."""
        self.workers.operations.close()
        self.workers.operations.held = type(self.workers.operations.held)()


def test_the_next_worker_goes_on_in_the_session() -> None:
    made = LoginWorld()
    made.ask()
    for _ in range(3):
        made.forget()
        made.broker.hurry("work")
        made.run(HOUR / 4)

    assert len(made.gateway.mints) == 4
    assert len(made.logins) == 1


def test_a_session_is_sealed_and_opened_by_the_next_process() -> None:
    made = LoginWorld()
    made.ask()
    name = session_of(leased().issuer.vault)
    wrap = {"kind": "memory", "profiles": [], "sessions": [name]}
    assert b"s.1" not in b"".join(made.disk.files.values())
    assert any(path.name.startswith("session.") for path in made.disk.files)

    opened = Cache(STATE, WRAP_KEY, made.disk).load_session(name)
    assert opened is not None
    assert opened.secret == Secret("s.1")
    assert made.workers.operations.open(**wrap)["sessions"] == []  # without the key: none


def test_a_login_that_was_refused_is_not_tried_by_everybody() -> None:
    """One refusal stands for all who ask, until a person says that something is better now."""
    made = LoginWorld(out=True)
    for _ in range(10):
        made.ask()
        made.forget()
        made.run(120)
    assert len(made.logins) == 1

    made.gateway.out = False
    made.broker.retry()  # some other file changed
    made.run(5)
    assert len(made.logins) == 1
    made.broker.retry(by_hand=True)
    made.run(5)
    assert made.ask() is not None
    assert len(made.logins) == 2


def test_a_crash_is_no_failure_of_the_world() -> None:
    """The world of these tests has crashes of its own kind; none passes for an error of ours."""
    assert not issubclass(Crash, Exception)


def test_a_person_may_have_a_login_tried_once_more() -> None:
    """How often a password was refused is not forgotten: the next one counts on."""
    issuer = two_kinds()[0].issuer
    refused = ("denied", "vault: refused the name or the password", "")
    failed = Session(session_of(issuer.vault), 3, failures=2, not_before=START, trouble=refused)
    logins = Logins([failed])
    logins.forgive(issuer)

    tried = logins.of(issuer)
    assert tried is not None
    assert (tried.not_before, tried.failures, tried.trouble) == (None, 2, refused)
    assert tried.serial == 4


@pytest.mark.parametrize("anew", [True, False])
def test_a_token_without_the_right_to_read_is_given_up_by_a_person_alone(anew: bool) -> None:
    """The policies of its role may have changed since."""
    issuer = two_kinds()[0].issuer
    logins = Logins([Session(session_of(issuer.vault), 1, Secret("s.1"))])
    logins.forgive(issuer, anew=anew)

    found = logins.of(issuer)
    assert found is not None
    assert (found.secret is None) is anew


def test_a_login_that_is_forgiven_is_sealed() -> None:
    """Who borrows the lock counts on from there: the newer session has the higher serial."""
    workers = Recorder()
    name = session_of(two_kinds()[0].issuer.vault)
    made = broker(workers, [Session(name, 3, failures=2, not_before=START + timedelta(hours=1))])
    made.hurry("a")

    assert workers.sent == [("cache", "keep")]


def test_what_another_process_sealed_is_read_before_anybody_logs_in() -> None:
    """It may have used up what can be had only once; a token that is alive may be an old one."""
    name = session_of(two_kinds()[0].issuer.vault)
    for held in ([], [Session(name, 1, Secret("s.1"))]):
        workers = Recorder()
        made = broker(workers, held)
        made.reread()
        made.turn()
        assert [op for _, op in workers.sent] == ["recall"]

        made.take([Answer(1, {}, None, (), [Session(name, 3, Secret("s.3"))])])
        made.turn()

        ops = sorted(op for _, op in workers.sent[1:])
        assert ops == ["issue", "keep", "poll"]
        session = made.session(two_kinds()[0].issuer)
        assert session is not None
        assert session.secret == Secret("s.3")


def test_a_session_that_cannot_be_read_keeps_nobody_waiting() -> None:
    workers = Recorder()
    made = broker(workers, [])
    made.reread()
    made.turn()
    made.take([Answer(1, None, None, None)])  # its worker died
    made.turn()

    assert len(workers.sent[1:]) == 1, "one logs in, and the other waits for that"


@pytest.mark.parametrize("has", [{"secret": Secret("s.1")}, {"kept": Secret("unwrapped")}])
def test_a_login_that_failed_takes_nothing_away_on_disk(has: dict[str, Any]) -> None:
    """Who failed did not know of the one that worked, and cannot have it again."""
    made = LoginWorld()
    cache = Cache(STATE, WRAP_KEY, made.disk)
    cache.save_session(Session("s", 2, material="0a1b2c3d", **has))
    failed = Session("s", 1, material="0a1b2c3d", failures=1, not_before=START)
    cache.save_session(failed)

    found = cache.load_session("s")
    assert found == rotation.replace(failed, **has)
    other = rotation.replace(failed, material="ffffffff")
    cache.save_session(other)
    assert cache.load_session("s") == other


def test_a_refused_login_is_sealed() -> None:
    """The next process does not begin with the same wrong password."""
    made = LoginWorld(out=True)
    made.ask()
    found = Cache(STATE, WRAP_KEY, made.disk).load_session(session_of(leased().issuer.vault))

    assert found is not None
    assert (found.secret, found.failures, found.not_before) == (None, 1, START)


class Recorder:
    """Workers that answer when they are told to."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []

    def send(
        self, kind: str, op: str, seconds: float, /, *, urgent: bool = False, **values: Any
    ) -> int:
        self.sent.append((kind, op))
        return len(self.sent)


def two_kinds() -> list[Profile]:
    """A source of Vault's, and one whose admin key is there: they log in as one."""
    table = {
        "address": "http://127.0.0.1:1",
        "auth": {"method": "approle", "role_id": "r", "secret_id": {"env": "SECRET_ID"}},
    }
    base = {"base_url": "http://127.0.0.1:2"}
    kept = {"type": "vault", "path": "secret/data/llm/key"}
    admin = {"type": "litellm", "admin": {"vault": "secret/data/llm/admin#key"}}
    profiles = {"a": {**base, "source": kept}, "b": {**base, "source": admin}}
    document = {"vault": table, "profiles": profiles}
    return list(parse(document, Where({}, "test"), (), {}).profiles.values())


def broker(workers: Recorder, held: list[Session]) -> Broker:
    return Broker(
        two_kinds(),
        [],
        {},
        workers,
        instance="0a1b2c3d",
        wrap_key=WRAP_KEY,
        held=held,
        mints={"a", "b"},
        clock=Time(),
        roll=lambda: 0.5,
        reread=list,
    )


def test_two_that_need_the_same_login_do_not_both_try() -> None:
    """Of two kinds of worker one waits for the other: what can be had once is asked for once."""
    workers = Recorder()
    made = broker(workers, [])
    made.turn()
    assert workers.sent == [("vault", "poll")]
    made.turn()
    assert len(workers.sent) == 1

    made.take([Answer(1, None, SourceUnavailable("vault: is sealed"), ())])
    made.turn()

    assert workers.sent == [("vault", "poll"), ("litellm", "issue")]


def test_with_a_session_nobody_waits() -> None:
    workers = Recorder()
    session = Session(session_of(two_kinds()[0].issuer.vault), 1, Secret("s.1"))
    broker(workers, [session]).turn()

    assert sorted(workers.sent) == [("litellm", "issue"), ("vault", "poll")]


def test_a_session_that_has_ended_is_none() -> None:
    workers = Recorder()
    name = session_of(two_kinds()[0].issuer.vault)
    broker(workers, [Session(name, 1, Secret("s.1"), START, START)]).turn()

    assert len(workers.sent) == 1


def renewable(seconds: float, **changes: Any) -> Session:
    """A session of the two that was begun at START and lives so long."""
    name = session_of(two_kinds()[0].issuer.vault)
    ends = START + timedelta(seconds=seconds)
    return Session(name, 1, Secret("s.1"), START, ends, renewable=True, **changes)


def test_a_session_that_nobody_asks_with_is_kept_alive() -> None:
    """Who mints twice a day needs the token all the same: it is renewed before it has ended."""
    workers, time = Recorder(), Time()
    made = Broker(
        two_kinds()[1:],
        [],
        {},
        workers,
        instance="0a1b2c3d",
        wrap_key=WRAP_KEY,
        held=[renewable(3600)],
        mints={"b"},
        clock=time,
        roll=lambda: 0.5,
        reread=list,
    )
    made.turn()
    made.take([Answer(1, None, SourceDenied("litellm: no"), ())])  # it comes back in five minutes
    workers.sent.clear()
    wake = made.turn(8)
    assert wake is not None
    time.true = 0.59 * 3600
    made.turn(8)
    assert ("litellm", "renew_session") not in workers.sent

    time.true = 0.61 * 3600
    made.turn(8)
    made.turn(8)  # its answer is still to come

    assert workers.sent.count(("litellm", "renew_session")) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"renewable": False},
        {"secret": None},
        {"expires_at": None},
        {"expires_at": START},
        {"not_before": START + timedelta(hours=2)},
    ],
)
def test_a_session_that_cannot_be_renewed_is_left_alone(changes: dict[str, Any]) -> None:
    issuer = two_kinds()[0].issuer
    logins = Logins([rotation.replace(renewable(3600), **changes)])
    logins.know([issuer])

    assert logins.due(START + timedelta(minutes=50))[0] == []


def test_a_lost_answer_to_a_renewal_is_asked_for_again_but_not_at_once() -> None:
    issuer, late = two_kinds()[0].issuer, START + timedelta(minutes=50)
    logins = Logins([renewable(3600)])
    logins.know([issuer])
    assert logins.due(late)[0] == [issuer]
    logins.renewing(issuer, late)

    assert logins.due(late) == ([], late + RENEWALS_APART)
    assert logins.due(late + RENEWALS_APART)[0] == [issuer]
