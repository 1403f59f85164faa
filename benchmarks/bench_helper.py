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
from benchmarks.stage import KEYBROKER, Home, daemon, furnish
from tests.servers.processes import StartError

BARE = (sys.executable, "-IS", "-c", "pass")
ROUNDS = 200
RIVAL_ROUNDS = 20
AT_ONCE, AT_ONCE_ROUNDS = 1000, 5
GOALS = {"bao": 9.0, "aws": 40.0}
ALONE = {  # what is said of each, under which name, and the goal
    "native": ("the native helper", "helper.native", 0.1),
    "native.shell": ("the native helper through `sh -c`", "helper.native.shell", None),
    "python": ("the helper in Python", "helper", 1.05),
    "python.shell": ("the helper in Python through `sh -c`", "helper.shell", 1.15),
    "line": ("the line for Claude Code's status line", "helper.line", 1.3),
    "line.typed": ("`keybroker statusline`", "helper.line.typed", 2.5),
}


def measure(folder: Path, say: Callable[[str], None]) -> Iterator[Figure]:
    """Take the figures of the helpers."""
    home = furnish(folder / "helper")
    if home.native is None:
        say("the native helper is left out: it is not installed; touch native/key.c; make bench")
    with daemon(home):
        for helper in _helpers(home).values():
            if output(helper, home.environment) != home.key:
                raise UnmeasurableError("the helper prints another key")
        yield from _alone(home)
        yield from _against_rivals(home, folder, say)
        yield from _at_once(home, folder)


def _helpers(home: Home) -> dict[str, tuple[str, ...]]:
    """Return those that there are."""
    return ({} if home.native is None else {"native": home.native}) | {"python": home.helper}


def _alone(home: Home) -> Iterator[Figure]:
    calls = {"bare": _timed(BARE, home.environment)}
    for kind, helper in _helpers(home).items():
        calls[kind] = _timed(helper, home.environment)
        shell = ("sh", "-c", f"exec {shlex.join(helper)}")
        calls[f"{kind}.shell"] = _timed(shell, home.environment)
    for kind, command in {
        "line": home.line,
        "line.typed": (KEYBROKER, "statusline", "work"),
    }.items():
        if not output(command, home.environment).startswith("work "):
            raise UnmeasurableError("the status line says something else")
        calls[kind] = _timed(command, home.environment)
    rounds = interleaved(calls, ROUNDS)
    for kind, (words, name, most) in ALONE.items():
        if kind in calls:
            about = f"{words}, of a bare `python -IS -c pass`"
            yield Figure(name, about, ratio(rounds, kind, "bare"), ROUNDS, most)


def _against_rivals(home: Home, folder: Path, say: Callable[[str], None]) -> Iterator[Figure]:
    calls: dict[str, Callable[[], float]] = {"helper": _timed(home.helper, home.environment)}
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
        about = f"{rival.name} on loopback, of the helper in Python"
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
    helpers = _helpers(home)
    rounds = interleaved(
        {
            **{kind: all_of(*helper) for kind, helper in helpers.items()},
            "cat": all_of("cat", str(kept)),
            "bare": all_of(*BARE[:-1], "print()"),
        },
        AT_ONCE_ROUNDS,
    )
    for kind in helpers:
        first = kind == next(iter(helpers))  # what `status` prints
        about = f"{AT_ONCE:,} helpers" if first else f"{AT_ONCE:,} helpers in Python"
        for to, what, goal in (("cat", "`cat`", 8.0), ("bare", "bare interpreters", None)):
            yield Figure(
                f"helper.many.{to}" if first else f"helper.many.{kind}.{to}",
                f"{about} at once, of as many {what}",
                ratio(rounds, kind, to),
                AT_ONCE_ROUNDS,
                goal if first else None,
            )
