"""
Nobody can make keybroker forget a key by killing it.

Every effect of a worker is a place to die: before it, in the middle, after it; the worker, the
command that runs it, or both. The judge is LiteLLM's own database.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from keybroker.devgateway import DevGateway
from keybroker.worker import EFFECTS
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
CASES = [(effect, when, who) for effect in EFFECTS for when in WHEN for who in WHO]
DATABASE_IS_OUT = Status(
    500, {}, b'{"error": {"message": "{\'error\': \'Internal Server Error.\'}", "code": "500"}}'
)
SETTLED_SECONDS = 8.5  # the call's deadline, and the second look-up after it
KILLS = 300
AT_ONCE = 4


def test_every_effect_has_its_command() -> None:
    """The list of effects and the matrix name the same things."""
    assert set(COMMANDS) == set(EFFECTS)


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
    assert {case: found for case, found in judged.items() if found} == {}


def test_kills_at_random_times(litellm: LiteLLM) -> None:
    """Three hundred kills at any moment of any command: no key forgotten, no dead key printed."""
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


MUTANTS = {
    "label after the call": label_after_the_call,
    "no lock": no_lock,
    "no drain": no_drain,
    "no look-up": no_look_up,
    "404 from any issuer": from_any_issuer,
    "verify skipped": verify_skipped,
    "adopt without check": adopt_without_check,
}  # and "no sync", which no kill can show, in test_sync.py


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_judge_sees_what_a_mutant_breaks(litellm: LiteLLM, mutant: str) -> None:
    """The scenario is without a finding as it is, and with one when the mechanism is broken."""
    scenario = MUTANTS[mutant]
    assert scenario(litellm, None) == []
    assert scenario(litellm, mutant) != []
