"""What a client waits for: the helper, against a bare interpreter, rivals and `cat`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from benchmarks import rivals
from benchmarks.measure import Figure, UnmeasurableError, interleaved, ratio
from benchmarks.programs import output, seconds, seconds_at_once
from benchmarks.stage import Home, daemon, furnish
from tests.servers.processes import StartError

BARE = (sys.executable, "-IS", "-c", "pass")
ROUNDS = 200
RIVAL_ROUNDS = 20
AT_ONCE, AT_ONCE_ROUNDS = 1000, 5
GOALS = {"bao": 9.0, "aws": 40.0}


def measure(folder: Path, say: Callable[[str], None]) -> Iterator[Figure]:
    """Take the figures of the helper."""
    home = furnish(folder / "helper")
    with daemon(home):
        if output(home.helper, home.environment) != home.key:
            raise UnmeasurableError("the helper prints another key")
        yield from _alone(home)
        yield from _against_rivals(home, folder, say)
        yield from _at_once(home, folder)


def _alone(home: Home) -> Iterator[Figure]:
    shell = ("sh", "-c", f"exec {shlex.join(home.helper)}")
    rounds = interleaved(
        {
            "bare": lambda: seconds(BARE, home.environment),
            "helper": lambda: seconds(home.helper, home.environment),
            "shell": lambda: seconds(shell, home.environment),
        },
        ROUNDS,
    )
    bare = "a bare `python -IS -c pass`"
    value = ratio(rounds, "helper", "bare")
    yield Figure("helper", f"the helper, of {bare}", value, ROUNDS, at_most=1.05)
    value = ratio(rounds, "shell", "bare")
    yield Figure("helper.shell", f"the helper through `sh -c`, of {bare}", value, ROUNDS, 1.15)


def _against_rivals(home: Home, folder: Path, say: Callable[[str], None]) -> Iterator[Figure]:
    calls: dict[str, Callable[[], float]] = {
        "helper": lambda: seconds(home.helper, home.environment)
    }
    found: dict[str, rivals.Rival] = {}
    with ExitStack() as stack:
        for name, start in {"bao": rivals.bao, "aws": rivals.aws}.items():
            try:
                rival = stack.enter_context(start(folder, home.key))
            except (SystemExit, StartError, StopIteration) as error:
                say(f"{name} is left out: {str(error)[:500]}")
                continue
            if output(rival.command, rival.environment) != home.key:
                raise UnmeasurableError(f"{rival.name} prints another key")
            found[name], calls[name] = rival, _timed(rival.command, rival.environment)
        if found:
            rounds = interleaved(calls, RIVAL_ROUNDS)
    for name, rival in found.items():
        about = f"{rival.name} on loopback, of the helper"
        value = ratio(rounds, name, "helper")
        yield Figure(f"helper.{name}", about, value, RIVAL_ROUNDS, at_least=GOALS[name])


def _timed(command: tuple[str, ...], environment: Mapping[str, str]) -> Callable[[], float]:
    return lambda: seconds(command, environment)


def _at_once(home: Home, folder: Path) -> Iterator[Figure]:
    def all_of(*command: str) -> Callable[[], float]:
        printed = folder / "printed"
        return lambda: seconds_at_once(folder, AT_ONCE, command, home.environment, printed)

    kept = home.path / "kept"
    kept.write_text(f"{home.key}\n")
    rounds = interleaved(
        {
            "helper": all_of(*home.helper),
            "cat": all_of("cat", str(kept)),
            "bare": all_of(*BARE[:-1], "print()"),
        },
        AT_ONCE_ROUNDS,
    )
    about = f"{AT_ONCE:,} helpers at once, of as many"
    for to, what, goal in (("cat", "`cat`", 8.0), ("bare", "bare interpreters", None)):
        value = ratio(rounds, "helper", to)
        yield Figure(f"helper.many.{to}", f"{about} {what}", value, AT_ONCE_ROUNDS, goal)
