"""
Nobody can make keybroker forget a key by killing it.

Every effect of a worker is a place to die: before it, in the middle, after it; the worker, the
command that runs it, or both. The judge is LiteLLM's own database.
"""

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

from keybroker.devgateway import DevGateway
from keybroker.worker import EFFECTS
from tests.crash.resident import PATIENCE_SECONDS, Resident, plan
from tests.crash.stage import HOLD, Stage, violations
from tests.servers.faults import Faults, PauseResponse, Status
from tests.servers.litellm import LiteLLM

pytestmark = pytest.mark.servers

WHO = ("worker", "command", "both")
WHEN = ("before", "during", "after")
ON_THE_WIRE = {
    "issue": "/key/generate",
    "verify": "/v1/models",
    "find": "/key/list",
    "revoke": "/key/delete",
}
COMMANDS = {
    **dict.fromkeys(("wanted", "issue", "have", "verify", "seal", "swap", "answer"), "rotate"),
    "answered": "rotate",
    **dict.fromkeys(("retired", "revoke", "gone", "forget"), "revoke"),
    **dict.fromkeys(("find", "looked"), "get"),
}
OF_LEASES = {"renew", "renewed", "keep"}  # LiteLLM has none: tests/test_leases.py dies at these
OF_PUBLISHING = {"staged", "stage", "recover", "promote"}  # tests/test_publish_crashes.py
OF_EXPORTS = {"export"}  # tests/test_export.py
OF_SIGN_INS = {"sign_in", "sign_out"}  # tests/test_login_crashes.py
OF_HOOKS = {"hook"}  # tests/test_endings.py
ELSEWHERE = OF_LEASES | OF_PUBLISHING | OF_EXPORTS | OF_SIGN_INS | OF_HOOKS
OF_MINTING = [effect for effect in EFFECTS if effect not in ELSEWHERE]
# Each effect has each end, each end each victim; the daemon's matrix has all of them together.
CASES = [
    (effect, when, WHO[(number + turn) % 3])
    for number, effect in enumerate(OF_MINTING)
    for turn, when in enumerate(WHEN)
]
DATABASE_IS_OUT = Status(
    500, {}, b'{"error": {"message": "{\'error\': \'Internal Server Error.\'}", "code": "500"}}'
)
SETTLED_SECONDS = 8.5  # the call's deadline, and the second look-up after it
KILLS = 150
AT_ONCE = 4


def test_every_effect_has_its_command() -> None:
    """The list of effects and the matrix name the same things."""
    assert set(COMMANDS) | ELSEWHERE == set(EFFECTS)


@contextmanager
def stages(count: int, litellm: LiteLLM, wires: Sequence[int] = ()) -> Iterator[list[Stage]]:
    """Make that many users; those of `wires` reach the gateway through a wire of their own."""
    with ExitStack() as stack:
        made = []
        for number in range(count):
            wire = stack.enter_context(Faults(litellm.url)) if number in wires else None
            url = litellm.url if wire is None else wire.url
            made.append(stack.enter_context(Stage(url, litellm.master_key, wire)))
        yield made


def kill(process: "subprocess.Popen[str]", who: str) -> bool:
    """Kill -9 a command, its worker, or both; say whether somebody was there to be killed."""
    victims = []
    if who in ("worker", "both"):
        with suppress(OSError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            victims += [int(pid) for pid in children.split()]
    if who in ("command", "both") and process.poll() is None:
        victims.append(process.pid)
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(victims)


def crash(stage: Stage, effect: str, when: str, who: str) -> None:
    """Run the effect's command and have it die there."""
    if effect == "find":
        stage.run("rotate", "work", effect="issue", when="after", who="both")
    if effect == "looked":
        stage.run("rotate", "work", effect="issue", when="before", who="both")
    command = COMMANDS[effect]
    if effect == "answered":
        assert stage.wire is not None
        stage.wire.next(DATABASE_IS_OUT, path="/key/generate")
    if stage.wire is None or effect not in ON_THE_WIRE:
        stage.run(command, "work", effect=effect, when=when, who=who)
        return
    pause = PauseResponse(at_most=20.0)
    stage.wire.next(pause, path=ON_THE_WIRE[effect])
    process = stage.start(command, "work", who=who)
    reached = pause.reached.wait(20.0)
    kill(process, who)
    pause.release.set()
    stage.finish(process)
    assert reached, f"{effect} was never on the wire"


def recover(stage: Stage) -> None:
    assert stage.run("get", "work") == 0, stage.said[-1]


def wait_for_a_key(stage: Stage) -> None:
    """Four calls that were cut off count as keys, until they were looked up a minute later."""
    until = time.monotonic() + 90
    while stage.run("get", "work") != 0:
        assert stage.said[-1].endswith("they are looked up for a minute; then try again\n")
        assert time.monotonic() < until
        time.sleep(1)


def together(stages: list[Stage], act: Callable[[Stage], object]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for done in [pool.submit(act, stage) for stage in stages]:
            done.result()


def settle(stages: list[Stage]) -> None:
    """Let every stage get a key again, look its open labels up, and revoke what is due."""
    together(stages, recover)
    time.sleep(SETTLED_SECONDS)  # the look-up is due by then
    together(stages, recover)
    time.sleep(HOLD.total_seconds() + 0.2)  # so are the revocations
    together(stages, recover)


def needs_wire(effect: str, when: str, who: str) -> bool:
    del who
    return effect == "answered" or (when == "during" and effect in ON_THE_WIRE)


def test_matrix(litellm: LiteLLM) -> None:
    """After a death at any effect a key is handed out again, and no key is forgotten."""
    wires = [number for number, case in enumerate(CASES) if needs_wire(*case)]
    with stages(len(CASES), litellm, wires) as made:
        together(made, recover)
        cases = dict(zip(map(id, made), CASES, strict=True))
        together(made, lambda stage: crash(stage, *cases[id(stage)]))
        settle(made)
        judged = {case: violations(stage, litellm) for case, stage in zip(CASES, made, strict=True)}
    wrong = {case: found for case, found in judged.items() if found}
    assert wrong == {}, "\n\n".join(f"{case}: {found}" for case, found in wrong.items())


def test_kills_at_random_times(litellm: LiteLLM) -> None:
    """150 kills at any moment of any command: no key is forgotten, no dead key printed."""
    count = 6
    hits = []

    def live(stage: Stage) -> None:
        chance = random.Random(stage.home.name)
        own = 0
        for _ in range(4 * KILLS // count):
            if own >= KILLS // count:
                return
            command = chance.choice(("get", "rotate", "rotate", "revoke"))
            process = stage.start(command, "work")
            with suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0.05, 0.9))
            if kill(process, chance.choice(WHO)):
                own += 1
            with suppress(subprocess.TimeoutExpired):
                process.wait(2.0)  # whose worker died may try again for a while
            kill(process, "command")
            stage.finish(process)
        hits.append(own)

    with stages(count, litellm) as made:
        with ThreadPoolExecutor(count) as pool:
            for done in [pool.submit(live, stage) for stage in made]:
                done.result()
        for stage in made:
            wait_for_a_key(stage)
        settle(made)
        judged = [violations(stage, litellm) for stage in made]
    assert judged == [[]] * count
    assert hits == [], "too few of the commands were still there to be killed"


# The same with the daemon, whose reader goes on asking while it dies and is started again.

AT_HOME = ("worker", "daemon", "both")
DOES = {
    **dict.fromkeys(("wanted", "issue", "have", "answered", "verify", "seal", "swap"), "rotate"),
    **dict.fromkeys(("find", "looked", "answer"), "rotate"),
    **dict.fromkeys(("retired", "revoke", "gone", "forget"), "revoke"),
}
# What leaves an open label to be looked up: the key came to be, or it did not.
INTERRUPTED = {"find": plan("issue", "after", "both"), "looked": plan("issue", "before", "both")}
RESTART_SECONDS = 10.0  # from a death to the first words of the next daemon; it waits for a worker
MINT_SECONDS = 10.0  # from there to a key, if none was left
AGAIN_SECONDS = 4.0
RESIDENTS = 14  # at once
RANDOM_KILLS = 100
SEED = 20_261_121


def test_every_effect_has_its_request() -> None:
    """The list of effects and the daemon's matrix name the same things."""
    assert set(DOES) | ELSEWHERE == set(EFFECTS)


def crash_at_home(home: Resident, effect: str, when: str, who: str) -> None:
    """Have the daemon do what leads to the effect, and somebody die there."""
    first = [INTERRUPTED[effect]] if effect in INTERRUPTED else []
    planned, deaths = home.died() + len(first), len(home.deaths) + len(first) + (who != "worker")
    if effect == "answered":
        assert home.wire is not None
        home.wire.next(DATABASE_IS_OUT, path="/key/generate")
    if not (when == "during" and effect in ON_THE_WIRE):
        home.plan(*first, plan(effect, when, who))
        asked = insist(home, DOES[effect], lambda: home.died() == planned + 1)
    else:
        assert home.wire is not None
        pause = PauseResponse(at_most=20.0)
        home.wire.next(pause, path=ON_THE_WIRE[effect])
        home.plan(*first, plan("none", when, who))  # by which a worker knows who is to die
        asked = insist(home, DOES[effect], pause.reached.is_set)
        assert home.kill(who)
        home.plan()
        pause.release.set()
    until(lambda: len(home.deaths) == deaths, home)
    asked.join(PATIENCE_SECONDS)
    home.until_read()
    until(lambda: all(one.looks for one in home.slots.open), home)


def insist(home: Resident, op: str, done: Callable[[], bool]) -> threading.Thread:
    """Ask until it is done; a rotation that is asked for amid another is one with it."""
    ends = time.monotonic() + PATIENCE_SECONDS
    while True:
        asked = home.say(op)
        again = time.monotonic() + (AGAIN_SECONDS if op == "rotate" else PATIENCE_SECONDS)
        while time.monotonic() < again:
            if done():
                return asked
            time.sleep(0.02)
        assert again < ends, home.log()


def until(done: Callable[[], bool], home: Resident) -> None:
    ends = time.monotonic() + PATIENCE_SECONDS
    while not done():
        assert time.monotonic() < ends, home.log()
        time.sleep(0.02)


def settled_at_home(home: Resident, litellm: LiteLLM) -> list[str]:
    """Judge once all is looked up and revoked, which the daemon does by itself."""
    time.sleep(SETTLED_SECONDS + home.hold.total_seconds())
    home.until_read()
    for _ in range(3):
        if not (found := violations(home, litellm)):
            break
        time.sleep(home.hold.total_seconds())
    return found


def lacking(home: Resident) -> list[str]:
    """Say when the reader was without a key for longer than a restart, and a mint, take."""
    found = []
    gaps = home.gaps()
    if len(gaps) != len(home.deaths):
        found.append("the reader never got a key again")
    for gap in gaps:
        if gap.heard - gap.died > RESTART_SECONDS:
            found.append(f"nobody answered for {gap.heard - gap.died:.1f} s")
        if gap.got - gap.heard > MINT_SECONDS:
            found.append(f"there was no key for {gap.got - gap.heard:.1f} s after a restart")
    if home.longest() > RESTART_SECONDS + MINT_SECONDS:
        found.append(f"the reader had no key for {home.longest():.1f} s")
    return found


def test_matrix_of_the_daemon(litellm: LiteLLM) -> None:
    """A worker, the daemon or both die at every effect: no key is forgotten, none is missed."""
    figures: list[Resident] = []

    def live(case: tuple[str, str]) -> list[str]:
        effect, when = case
        who = "nobody"
        with ExitStack() as stack:
            wire = None
            if needs_wire(effect, when, ""):
                wire = stack.enter_context(Faults(litellm.url))
            url = litellm.url if wire is None else wire.url
            home = stack.enter_context(Resident(url, litellm.master_key, wire))
            try:
                home.until_read()
                for who in AT_HOME:
                    crash_at_home(home, effect, when, who)
            except AssertionError as error:
                return [f"{who}: {error}"]
            found = settled_at_home(home, litellm) + lacking(home)
            expected = 2 + 3 * (effect in INTERRUPTED)
            if len(home.deaths) != expected:  # one that was not planned
                found.append(f"the daemon died {len(home.deaths)} times, not {expected}")
            figures.append(home)
            return found

    cases = [(effect, when) for effect in OF_MINTING for when in WHEN]
    with ThreadPoolExecutor(RESIDENTS) as pool:
        judged = dict(zip(cases, pool.map(live, cases), strict=True))
    tell(figures)
    wrong = {case: found for case, found in judged.items() if found}
    assert wrong == {}, "\n\n".join(f"{case}: {found}" for case, found in wrong.items())


def tell(homes: list[Resident]) -> None:
    """Print what was measured."""
    gaps = [gap for home in homes for gap in home.gaps()]
    silent = sorted(gap.heard - gap.died for gap in gaps)
    without = sorted(gap.got - gap.died for gap in gaps)
    print(
        f"\n{len(gaps)} deaths of the daemon; until the next one answered: median "
        f"{silent[len(silent) // 2]:.2f} s, longest {silent[-1]:.2f} s; until the reader had a "
        f"key: median {without[len(without) // 2]:.2f} s, longest {without[-1]:.2f} s; "
        f"the longest between two keys: {max(home.longest() for home in homes):.2f} s; "
        f"{sum(len(home.asked) for home in homes)} questions"
    )


def test_kills_of_the_daemon_at_random_times(litellm: LiteLLM) -> None:
    """A hundred kills; the helper starts the next daemon, and what it prints is alive."""
    count = 5
    hits: list[int] = []
    print(f"\nseed {SEED}")

    def live(number: int, home: Resident) -> None:
        chance = random.Random(SEED + number)
        done = home.helper()
        assert done.returncode == 0, done.stderr
        own = 0
        for _ in range(6 * RANDOM_KILLS // count):
            if own >= RANDOM_KILLS // count:
                break
            for _ in range(chance.randrange(3)):
                home.helper()
            if chance.random() < 0.7:
                home.say("rotate", 5.0)
            time.sleep(chance.uniform(0.0, 0.9))
            if home.kill(who := chance.choice(AT_HOME)):
                own += 1
                if who != "worker":
                    home.deaths.append(time.monotonic())
            home.helper()
        hits.append(own)
        since = time.monotonic()
        while home.helper().returncode != 0:
            assert time.monotonic() < since + 90
        while time.monotonic() < since + SETTLED_SECONDS + HOLD.total_seconds():
            home.helper()
            time.sleep(0.5)

    with ExitStack() as stack:
        homes = [
            stack.enter_context(
                Resident(litellm.url, litellm.master_key, revive=False, reads=False)
            )
            for _ in range(count)
        ]
        with ThreadPoolExecutor(count) as pool:
            for done in [pool.submit(live, *one) for one in enumerate(homes)]:
                done.result()
        judged = [violations(home, litellm) for home in homes]
        failed = sum(one.got is None for home in homes for one in home.asked)
        longest = max(home.longest() for home in homes)
    tell(homes)
    print(f"{sum(hits)} kills, {failed} helpers without a key")
    assert judged == [[]] * count
    assert hits == [RANDOM_KILLS // count] * count
    assert longest <= RESTART_SECONDS + MINT_SECONDS


# Each mutant breaks one mechanism; the same judge must see it.


def label_after_the_call(litellm: LiteLLM, mutant: str | None) -> list[str]:
    """Die between the call and what follows it."""
    with stages(1, litellm) as [stage]:
        recover(stage)
        stage.run("rotate", "work", effect="issue", when="after", who="both", mutant=mutant)
        settle([stage])
        return violations(stage, litellm)


def no_lock(litellm: LiteLLM, mutant: str | None) -> list[str]:
    """Many ask at once for a key that is not there yet."""
    with stages(1, litellm) as [stage]:
        stage.run("status")  # makes the folders
        processes = [stage.start("get", "work", mutant=mutant) for _ in range(6)]
        for process in processes:
            stage.finish(process)
        prefix = f"kb-{stage.instance}-"
        rows = [*litellm.key_rows(), *litellm.deleted_key_rows()]
        minted = sum(str(row["key_alias"]).startswith(prefix) for row in rows)
        return [] if minted == 1 else [f"{minted} keys were minted, not one"]


def no_drain(litellm: LiteLLM, mutant: str | None) -> list[str]:
    """Rotate while a reader holds the old key."""
    with stages(1, litellm) as [stage]:
        recover(stage)
        stage.run("rotate", "work", mutant=mutant)
        stage.run("get", "work", mutant=mutant)
        return violations(stage, litellm, settled=False)


def no_look_up(litellm: LiteLLM, mutant: str | None) -> list[str]:
    """A key was minted, and its process died before it knew."""
    with stages(1, litellm) as [stage]:
        recover(stage)
        stage.run("rotate", "work", effect="issue", when="after", who="both")
        for seconds in (0.0, SETTLED_SECONDS, HOLD.total_seconds() + 0.2):
            time.sleep(seconds)
            stage.run("get", "work", mutant=mutant)
        return violations(stage, litellm)


def from_any_issuer(litellm: LiteLLM, mutant: str | None) -> list[str]:
    """The profile moves to another gateway, which never knew the old key."""
    with DevGateway() as other, stages(1, litellm) as [stage]:
        recover(stage)
        stage.point_at(other.url, other.master_key)
        stage.run("get", "work", mutant=mutant)
        time.sleep(HOLD.total_seconds() + 0.2)
        stage.run("get", "work", mutant=mutant)
        left = [found for found in violations(stage, litellm) if "should not" in found]
        stage.run("revoke", "--all")
        return left


def verify_skipped(litellm: LiteLLM, mutant: str | None) -> list[str]:
    """The gateway mints a key that it then refuses."""
    with stages(1, litellm, wires=[0]) as [stage]:
        assert stage.wire is not None
        pause = PauseResponse(at_most=20.0)
        stage.wire.next(pause, path="/key/generate")
        process = stage.start("get", "work", mutant=mutant)
        assert pause.reached.wait(20.0)
        [row] = [r for r in litellm.key_rows() if str(r["key_alias"]).startswith(_prefix(stage))]
        done = httpx.post(
            f"{litellm.url}/key/block",
            json={"key": row["token"]},
            headers={"authorization": f"Bearer {litellm.master_key}"},
        )
        assert done.status_code == 200
        pause.release.set()
        stage.finish(process)
        found = [one for one in violations(stage, litellm) if "refuses" in one]
        stage.run("revoke", "work")
        return found


def adopt_without_check(litellm: LiteLLM, mutant: str | None) -> list[str]:
    """A revocation dies when the key is gone and its sealed copy is not."""
    with stages(1, litellm) as [stage]:
        recover(stage)
        stage.run("revoke", "work", effect="gone", when="after", who="both")
        time.sleep(1)  # dead for longer than the judge's slack
        stage.run("get", "work", mutant=mutant)
        return [one for one in violations(stage, litellm) if "dead key" in one]


def _prefix(stage: Stage) -> str:
    return f"kb-{stage.instance}-"


def mints(home: Stage, litellm: LiteLLM) -> int:
    """Count the keys that were ever minted for a stage."""
    rows = [*litellm.key_rows(), *litellm.deleted_key_rows()]
    return sum(str(row["key_alias"]).startswith(_prefix(home)) for row in rows)


def listening(home: Resident) -> int:
    """Count the daemons that said that they listen."""
    return home.log().count("listens at")


def two_daemons(litellm: LiteLLM, mutant: str | None) -> list[str]:
    """Others are started beside a daemon, as by helpers that found it slow."""
    with Resident(
        litellm.url, litellm.master_key, mutant=mutant, revive=False, reads=False
    ) as home:
        daemons = [home.spawn()]
        try:
            until(lambda: home.ask() is not None, home)
            for _ in range(5):  # one may lose a race for the path
                other = home.spawn()
                daemons.append(other)
                until(lambda: other.poll() is not None or listening(home) > 1, home)  # noqa: B023
            count = listening(home)
            return [] if count == 1 else [f"{count} daemons are at work"]
        finally:
            for one in daemons:
                one.kill()
                one.wait()


def locked_key_is_lost(litellm: LiteLLM, mutant: str | None) -> list[str]:
    """The daemon starts before the keyring is opened, and nobody asks until it is."""
    with Resident(litellm.url, litellm.master_key, mutant=mutant, reads=False) as home:
        until(lambda: home.ask() is not None, home)
        home.locked.touch()
        home.kill("both")
        until(lambda: len(home.deaths) == 1, home)
        until(lambda: "the keyring is locked" in home.log(), home)
        time.sleep(2 * HOLD.total_seconds())
        home.locked.unlink()
        until(lambda: "keys are sealed with the key file" in home.log(), home)
        until(lambda: home.ask() is not None, home)
        found = violations(home, litellm)
        return found + ([] if mints(home, litellm) == 1 else ["the sealed key was replaced"])


def workers_without_the_lock(litellm: LiteLLM, mutant: str | None) -> list[str]:
    """The daemon dies while its worker, which lives on, waits for a key that is minted already."""
    with Faults(litellm.url) as wire, ExitStack() as stack:
        pause = PauseResponse(at_most=2 * PATIENCE_SECONDS)
        wire.next(pause, path="/key/generate")
        home = Resident(wire.url, litellm.master_key, wire, mutant=mutant, reads=False)
        home.plan(plan("none", "during", "daemon"))
        stack.enter_context(home)
        assert pause.reached.wait(PATIENCE_SECONDS)
        home.kill("daemon")
        until(lambda: len(home.deaths) == 1, home)
        time.sleep(1.5)  # what the next one would do at once; the worker's call ends after three
        count = mints(home, litellm)
        pause.release.set()
        until(lambda: home.ask() is not None, home)
        return [] if count == 1 else ["another key was minted while a worker still ran"]


def answer_before_the_seal(litellm: LiteLLM, mutant: str | None) -> list[str]:
    """Daemon and worker die with a new key that is verified and not yet sealed."""
    long = timedelta(seconds=10)  # within which another daemon has begun and revokes it
    with (
        Faults(litellm.url) as wire,
        Resident(wire.url, litellm.master_key, wire, long, mutant=mutant) as home,
    ):
        home.until_read()
        pause = PauseResponse(at_most=PATIENCE_SECONDS)
        home.wire = wire
        home.plan(plan("seal", "before", "both"))
        wire.next(pause, path="/v1/models")
        home.say("rotate")
        assert pause.reached.wait(PATIENCE_SECONDS)
        home.until_read()
        pause.release.set()
        until(lambda: len(home.deaths) == 1, home)
        home.until_read()
        return settled_at_home(home, litellm)


MUTANTS = {
    "label after the call": label_after_the_call,
    "no lock": no_lock,
    "no drain": no_drain,
    "no look-up": no_look_up,
    "404 from any issuer": from_any_issuer,
    "verify skipped": verify_skipped,
    "adopt without check": adopt_without_check,
    "two daemons": two_daemons,
    "a locked key is lost": locked_key_is_lost,
    "workers without the lock": workers_without_the_lock,
    "answer before the seal": answer_before_the_seal,
}  # and "no sync", which no kill can show, in test_sync.py


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_judge_sees_what_a_mutant_breaks(litellm: LiteLLM, mutant: str) -> None:
    """
    The scenario is without a finding as it is, and with one when the mechanism is broken.

    On a machine so busy that a hold is over before anybody looks, it may take a second try to see.
    """
    scenario = MUTANTS[mutant]
    assert scenario(litellm, None) == []
    assert any(scenario(litellm, mutant) for _ in range(3))
