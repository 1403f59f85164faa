"""How many the daemon answers and how soon, also while it refreshes and after it was started."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from benchmarks.measure import Figure, UnmeasurableError, interleaved, ratio
from benchmarks.programs import Answers, ask_often, seconds
from benchmarks.stage import Home, daemon, floor, furnish, has_key, listens, mints, seconds_to
from keybroker.devgateway import DevGateway

BARE = (sys.executable, "-IS", "-c", "pass")
CLIENTS = (10, 100, 1000)
REQUESTS, ROUNDS = 20_000, 9
EACH_KIND = 4
BUSY_ROUNDS, BUSY_CLIENTS, BUSY_REQUESTS, BUSY_PAUSE_MS = 5, 10, 10_000, 2
STARTS, FIRST_ANSWERS = 30, 10
ALLOWED_SECONDS = 0.015
FIRST_ANSWER_SECONDS = 0.5


def measure(folder: Path, say: Callable[[str], None]) -> Iterator[Figure]:
    """Take the figures of the daemon."""
    del say
    home = furnish(folder / "daemon")
    with floor(folder, home) as other, daemon(home) as ours:
        yield from _answers(folder, home.key, ours.socket, other.socket)
    yield from _starts(folder)
    yield from _while_refreshing(folder)


def _answers(parts: Path, key: str, ours: Path, other: Path) -> Iterator[Figure]:
    failed = 0
    asked = 0
    for clients in CLIENTS:

        def load(socket: Path, clients: int = clients) -> Answers:
            return ask_often(parts, socket, key, clients=clients, requests=REQUESTS)

        rounds = interleaved({"daemon": lambda: load(ours), "c": lambda: load(other)}, ROUNDS)
        if any(one["c"].failed for one in rounds):
            raise UnmeasurableError(f"the server in C failed with {clients} clients")
        failed += sum(one["daemon"].failed for one in rounds)
        asked += REQUESTS * ROUNDS
        about = f"answers a second to {clients:,} clients, of a server in C"
        value = ratio(rounds, "daemon", "c", lambda found: found.per_second)
        yield Figure(f"answers.{clients}", about, value, ROUNDS, at_least=0.5)
        about = f"the longest of 99 % of the answers to {clients:,} clients, of a server in C"
        value = ratio(rounds, "daemon", "c", lambda found: found.p99)
        goal = 2.0 if clients == max(CLIENTS) else None
        yield Figure(f"answers.{clients}.p99", about, value, ROUNDS, goal)
    yield Figure("answers.failed", "of them failed", failed, asked, 0, unit="")


def _starts(folder: Path) -> Iterator[Figure]:
    """The gateway is gone when it counts: what is answered then comes out of the cache."""
    with DevGateway() as gateway:
        home = furnish(folder / "start", gateway.url, gateway.master_key, minted=1)
        with daemon(home):
            pass
    rounds = interleaved(
        {
            "daemon": lambda: seconds_to(home, lambda: listens(home.socket)),
            "bare": lambda: seconds(BARE, home.environment),
        },
        STARTS,
    )
    about = "the daemon from its start to listening, of a bare `python -IS -c pass`"
    yield Figure("start", about, ratio(rounds, "daemon", "bare"), STARTS, 3.5)
    taken = [
        seconds_to(home, lambda: has_key(home.socket, home.profiles[-1]))
        for _ in range(FIRST_ANSWERS)
    ]
    about = "the daemon from its start to the first key out of its cache, of half a second"
    value = median(taken) / FIRST_ANSWER_SECONDS
    yield Figure("start.answer", about, value, FIRST_ANSWERS, 1.0)


def _while_refreshing(folder: Path) -> Iterator[Figure]:
    """One daemon rests; the other is started anew for each round, since it disturbs the first."""
    quiet = furnish(folder / "quiet")
    number = iter(range(BUSY_ROUNDS + 1))

    def load(home: Home) -> Answers:
        found = ask_often(
            folder,
            home.socket,
            home.key,
            clients=BUSY_CLIENTS,
            requests=BUSY_REQUESTS,
            pause_ms=BUSY_PAUSE_MS,
        )
        if found.failed:
            raise UnmeasurableError(f"{found.failed} of {BUSY_REQUESTS} answers failed")
        return found

    def busy() -> Answers:
        with DevGateway() as gateway:
            home = furnish(
                folder / f"busy{next(number)}",
                gateway.url,
                gateway.master_key,
                minted=EACH_KIND,
                commands=EACH_KIND,
                static=EACH_KIND,
                often=True,
            )
            with daemon(home):
                before = mints(gateway)
                found = load(home)
                if mints(gateway) - before < EACH_KIND:
                    raise UnmeasurableError("not every profile was refreshed meanwhile")
        return found

    with daemon(quiet):
        rounds = interleaved({"quiet": lambda: load(quiet), "busy": busy}, BUSY_ROUNDS)
    allowed = "twice the undisturbed 99 %, and of 15 ms at least"
    about = f"the longest answer while every profile is replaced each second, of {allowed}"
    shares = [r["busy"].longest / max(2 * r["quiet"].p99, ALLOWED_SECONDS) for r in rounds]
    yield Figure("refresh.longest", about, median(shares), BUSY_ROUNDS, 1.0)
    about = "the longest of 99 % of those answers, of the undisturbed"
    value = ratio(rounds, "busy", "quiet", lambda found: found.p99)
    yield Figure("refresh.p99", about, value, BUSY_ROUNDS)
