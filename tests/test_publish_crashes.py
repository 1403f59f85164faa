"""
Whoever dies while a key is published: it is found again, and its readers have it for their hold.

Real commands at a gateway of ours and a real store, which somebody reads all the time. Each effect
of publishing is a place to die; every history of such deaths is in `tests/test_histories.py`.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256

import pytest

from keybroker.devgateway import DevGateway
from keybroker.slots import Event
from tests.crash.publisher import AwsPlace, Place, Publisher, Readers, VaultPlace, publisher, wrong
from tests.crash.stage import HOLD
from tests.servers.aws import Aws
from tests.servers.awsfaults import Front
from tests.servers.faults import Exchange, Fault, Faults, PauseResponse
from tests.servers.litellm import LiteLLM
from tests.servers.vault import OpenBao
from tests.servers.vaultapi import Kv
from tests.test_crashes import OF_PUBLISHING, SETTLED_SECONDS, kill

pytestmark = pytest.mark.servers

ON_THE_WIRE = {"stage", "promote", "recover"}
Case = tuple[str, str, str]
# Each list is lived by one host, death after death. What leaves an open label is of another's.
AT_AWS: list[list[Case]] = [
    [
        *(("staged", "before", "both"), ("staged", "during", "worker")),
        *(("staged", "after", "command"), ("stage", "before", "worker")),
        *(("stage", "during", "both"), ("stage", "after", "both"), ("verify", "before", "both")),
    ],
    [
        *(("promote", "before", "command"), ("promote", "during", "worker")),
        *(("promote", "during", "both"), ("promote", "after", "both")),
        *(("promote", "after", "worker"), ("recover", "before", "both")),
        *(("recover", "during", "command"), ("recover", "after", "both")),
    ],
    [
        *(("verify", "after", "both"), ("seal", "before", "both"), ("seal", "during", "both")),
        *(("seal", "after", "both"), ("swap", "before", "worker"), ("swap", "during", "both")),
        *(("swap", "after", "command"), ("revoke", "before", "both"), ("gone", "before", "both")),
    ],
]
IN_VAULT: list[list[Case]] = [
    [
        *(("staged", "after", "both"), ("promote", "before", "both")),
        *(("promote", "during", "command"), ("promote", "after", "both")),
        *(("recover", "before", "both"), ("seal", "before", "both"), ("swap", "before", "both")),
    ],
]
OPENING: list[Case] = [
    ("wanted", "after", "both"),
    ("issue", "after", "both"),
    ("have", "before", "both"),
    ("have", "after", "both"),
]


@pytest.fixture(scope="module")
def kv(openbao: OpenBao) -> Kv:
    return openbao.kv()


Open = Callable[[str], Place]


@pytest.fixture
def places(aws: Aws, openbao: OpenBao, kv: Kv) -> Iterator[Open]:
    """Make a secret of its own for a test, with a wire of its own."""
    with ExitStack() as stack:

        def make(kind: str) -> Place:
            if kind == "aws":
                return AwsPlace(aws, stack.enter_context(Front(aws)))
            return VaultPlace(openbao, kv, stack.enter_context(Faults(openbao.url)))

        yield make


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as made:
        yield made


def test_every_effect_of_publishing_has_its_deaths() -> None:
    """Before it, at it, and after it."""
    cases = [case for host in (*AT_AWS, *IN_VAULT) for case in host]
    for effect in OF_PUBLISHING:
        assert {when for one, when, _ in cases if one == effect} == {"before", "during", "after"}


def crash(host: Publisher, effect: str, when: str, who: str) -> None:
    """Have a command reach the effect, and somebody die there; nobody else does."""
    if effect == "recover":
        crash(host, "promote", "before", "both")
    if effect in ("revoke", "gone"):
        time.sleep(HOLD.total_seconds())
    command = "get" if effect in ("revoke", "gone") else "rotate"
    for _ in range(4):  # what was interrupted is ended first, and may be all that there is to do
        if when == "during" and effect in ON_THE_WIRE:
            reached = crash_on_the_wire(host, effect, who)
        else:
            file = host.home / "plan"
            file.write_text(f'{{"effect": "{effect}", "when": "{when}", "who": "{who}"}}\n')
            host.run(command, "work", armed=str(file), who=who)
            reached = not file.read_text()
            file.unlink()
        if reached:
            return
    raise AssertionError(f"{effect} was not reached: {host.said[-4:]}")


def crash_on_the_wire(host: Publisher, effect: str, who: str) -> bool:
    assert host.place is not None
    pause = PauseResponse(at_most=20.0)
    armed = host.place.fault(effect, pause)
    process = host.start("rotate", "work", who=who)
    while not pause.reached.wait(0.02) and process.poll() is None:
        pass
    if pause.reached.is_set():
        kill(process, who)
    pause.release.set()
    host.finish(process)
    armed.left = 0
    return pause.reached.is_set()


def settle(host: Publisher) -> None:
    """Let a host do what is due, until nothing is."""
    for _ in range(4):
        if host.run("get", "work") == 0 and not host.slots.retired and not host.slots.open:
            return
        time.sleep(HOLD.total_seconds() / 2)


def live(gateway: DevGateway, place: Place, cases: list[Case]) -> list[str]:
    """Live through deaths; return what is wrong then."""
    with Readers(gateway, place) as readers, publisher(gateway, place) as host:
        for case in cases:
            crash(host, *case)
        if cases is OPENING:
            host.run("get", "work")
            time.sleep(SETTLED_SECONDS)
        settle(host)
        return [*readers.found, *wrong(gateway, place, host)]


def test_matrix(places: Open) -> None:
    """After a death at any effect one key is current, alive and known, and nobody lost theirs."""
    lives: list[tuple[str, list[Case]]] = [("aws", OPENING)]
    lives += [("aws", cases) for cases in AT_AWS] + [("vault", cases) for cases in IN_VAULT]

    def one(kind: str, cases: list[Case]) -> list[str]:
        with DevGateway() as gateway:
            return live(gateway, places(kind), cases)

    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(one, *life) for life in lives]
        judged = [each.result() for each in done]
    assert judged == [[]] * len(lives)


def test_a_death_after_the_key_is_current_elsewhere_and_not_yet_here(
    litellm: LiteLLM, places: Open
) -> None:
    """With a real LiteLLM: its own books have the one key, which others read and we hand out."""
    place = places("aws")
    with publisher(litellm, place) as host:
        crash(host, "promote", "after", "both")
        between = sha256(place.read()["key"].encode()).hexdigest()
        assert between != host.printed[-1].key_sha256
        assert host.run("rotate", "work") == 0
        settle(host)
        assert host.run("get", "work") == 0
        rows = [row for row in litellm.key_rows() if host.instance in str(row["key_alias"])]
        assert [row["token"] for row in rows] == [host.printed[-1].key_sha256]
        assert rows[0]["token"] == sha256(place.read()["key"].encode()).hexdigest()
        assert between in {row["token"] for row in (*rows, *litellm.deleted_key_rows())}


# Two hosts at one secret, and one that reads it.

ROUNDS = 10


@dataclass(frozen=True)
class Together(Fault):
    """Each of two is answered when the other has asked too, or after a while."""

    barrier: threading.Barrier

    def __call__(self, exchange: Exchange) -> bool:
        response = exchange.commit()
        try:
            self.barrier.wait(3.0)
        except threading.BrokenBarrierError:
            self.barrier.reset()
        exchange.client.sendall(response.raw)
        return response.keeps_alive


def race(place: Place, *hosts: Publisher) -> list[int]:
    """Have hosts rotate at once, from the same version."""
    armed = place.fault("staged", Together(threading.Barrier(len(hosts))), times=len(hosts))
    processes = [host.start("rotate", "work") for host in hosts]
    statuses = [host.finish(process) for host, process in zip(hosts, processes, strict=True)]
    armed.left = 0
    return statuses


@dataclass
class Reader(Publisher):
    """A host that reads what others publish, with a daemon that is asked all the time."""

    def point_at(self, url: str, admin: str | None = None) -> None:
        super().point_at(url, admin)
        file = self.home / ".config/keybroker/config.toml"
        head, _, _ = file.read_text().partition("[profiles.work.source]")
        assert isinstance(self.place, AwsPlace)
        source = f'[profiles.work.source]\ntype = "aws"\npoll = "1s"\n{self.place.place}'
        file.write_text(head.replace("max_live = 12\n", "") + source)


@pytest.mark.parametrize("kind", ["aws", "vault"])
def test_two_hosts_that_race(gateway: DevGateway, places: Open, kind: str) -> None:
    """Of one there are commands alone, the other has a daemon: one key is current, none is left."""
    place = places(kind)
    with ExitStack() as stack:
        readers = stack.enter_context(Readers(gateway, place))
        one = stack.enter_context(publisher(gateway, place))
        other = stack.enter_context(publisher(gateway, place))
        other.spawn()
        for _ in range(ROUNDS):
            statuses = race(place, one, other)
            assert min(statuses) == 0, (one.said, other.said)
        settle(one)
        wait_until_settled(other)
        beaten = sum("another one was published first" in text for text in one.said + other.said)
        found = [*readers.found, *wrong(gateway, place, one, other)]
        minted = [
            record.label
            for host in (one, other)
            for record in host.records()
            if record.event is Event.WANTED
        ]
        gone = one.ended() | other.ended()
        assert found == []
        assert len(set(minted)) == len(minted)
        assert set(minted) - gone == {row.alias for row in gateway.live_keys()}
        print(f"\n{kind}: {len(minted)} keys in {ROUNDS} rounds, {beaten} told so")


def wait_until_settled(host: Publisher) -> None:
    """Wait for a daemon to do what is due."""
    ends = time.monotonic() + 30
    while host.slots.retired or host.slots.next is not None:
        assert time.monotonic() < ends
        time.sleep(0.1)


def test_a_host_that_reads_follows(gateway: DevGateway, places: Open) -> None:
    """It never prints a dead key, and has each new one within its poll."""
    place = places("aws")
    with ExitStack() as stack:
        one = stack.enter_context(publisher(gateway, place, timedelta(seconds=4)))
        reader = stack.enter_context(Reader(gateway.url, gateway.master_key, place=place))
        reader.spawn()
        for _ in range(3):
            assert one.run("rotate", "work") == 0, one.said[-1]
            published, ends = place.read()["key"], time.monotonic() + 10
            while (printed := reader.ask()) != published:
                tokens = {row.token for row in gateway.live_keys()}
                assert printed is None or sha256(printed.encode()).hexdigest() in tokens
                assert time.monotonic() < ends, (reader.home / "log").read_text()
                time.sleep(0.1)


# Each mutant breaks one mechanism; the same judge must see it.


def others_are_not_asked(gateway: DevGateway, place: Place, mutant: str | None) -> list[str]:
    """The key that others read by now was not yet current here when its process died."""
    with Readers(gateway, place) as readers, publisher(gateway, place) as host:
        crash(host, "promote", "after", "both")
        for _ in range(2):
            host.run("get", "work", mutant=mutant)
            time.sleep(HOLD.total_seconds())
        host.run("get", "work", mutant=mutant)
        return [*readers.found, *wrong(gateway, place, host)]


def no_compare_and_swap(gateway: DevGateway, place: Place, mutant: str | None) -> list[str]:
    """Somebody changes another field while the key is on its way."""
    with publisher(gateway, place) as host:
        pause = PauseResponse(at_most=20.0)
        place.fault("stage" if isinstance(place, AwsPlace) else "staged", pause)
        process = host.start("rotate", "work", mutant=mutant)
        assert pause.reached.wait(20.0)
        place.note("two")
        pause.release.set()
        host.finish(process)
        host.run("rotate", "work")
        settle(host)
        note = place.read()["note"]
        found = wrong(gateway, place, host)
        return found if note == "two" else [*found, f"what somebody wrote is {note!r} again"]


MUTANTS = {
    "others are not asked": others_are_not_asked,
    "no compare-and-swap": no_compare_and_swap,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_judge_sees_what_a_mutant_breaks(places: Open, mutant: str) -> None:
    """The scenario is without a finding as it is, and with one when the mechanism is broken."""

    def judge(broken: str | None) -> list[str]:
        with DevGateway() as gateway:
            return MUTANTS[mutant](gateway, places("aws"), broken)

    with ThreadPoolExecutor(2) as pool:
        sound, broken = pool.map(judge, (None, mutant))
    assert sound == []
    assert broken != []
