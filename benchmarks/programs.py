"""Programs that are timed, and the C parts that time others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import UnmeasurableError

PARTS = Path(__file__).parent / "parts"


def compile_parts(folder: Path) -> None:
    """
    Compile each `parts/<name>.c` to `<folder>/<name>`.

    Raises:
        UnmeasurableError: There is no compiler, or it refuses one.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise UnmeasurableError("no C compiler\nhint: apt-get install gcc libc6-dev")
    for source in sorted(PARTS.glob("*.c")):
        command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror"]
        done = subprocess.run(
            [*command, "-o", str(folder / source.stem), str(source)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UnmeasurableError(f"{source.name}: cc refuses it\n{done.stderr.strip()}")


def seconds(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """
    Return how long a program takes from its start to its end. Its output is dropped.

    Raises:
        UnmeasurableError: It failed.
    """
    program = _found(command[0], environment)
    files = [(os.POSIX_SPAWN_OPEN, to, os.devnull, os.O_RDWR, 0) for to in (0, 1, 2)]
    began = time.perf_counter()
    pid = os.posix_spawn(program, [program, *command[1:]], environment, file_actions=files)
    _, status = os.waitpid(pid, 0)
    taken = time.perf_counter() - began
    if status:
        raise UnmeasurableError(f"{' '.join(command)[:100]}: wait status {status}")
    return taken


def output(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """
    Return what a program prints, without the newline at its end.

    Raises:
        UnmeasurableError: It failed; the message has what it wrote to stderr.
    """
    done = subprocess.run(
        [_found(command[0], environment), *command[1:]],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stderr.strip()[:500]
        raise UnmeasurableError(f"{' '.join(command)[:100]}: status {done.returncode}\n{said}")
    return done.stdout.rstrip("\n")


def _found(program: str, environment: Mapping[str, str]) -> str:
    found = shutil.which(program, path=environment.get("PATH"))
    if found is None:
        raise UnmeasurableError(f"{program}: no such program")
    return found


@dataclass(frozen=True, slots=True)
class Answers:
    """What the load generator saw. Times are in seconds and of whole requests."""

    per_second: float
    p50: float
    p99: float
    longest: float
    answered: int
    failed: int


def ask_often(
    parts: Path, socket: Path, key: str, *, clients: int, requests: int, pause_ms: int = 0
) -> Answers:
    """Ask a server again and again for the profile `work`; any answer but its key is a failure."""
    command = [parts / "load", socket, clients, requests, pause_ms, key]
    return Answers(**json.loads(output([str(one) for one in command], {})))


def seconds_at_once(
    parts: Path, count: int, command: Sequence[str], environment: Mapping[str, str], printed: Path
) -> float:
    """
    Return how long many of one program take that start at once.

    Args:
        printed: A file that gets what all of them print; one that is there is replaced.

    Raises:
        UnmeasurableError: One failed, or printed something else than the first.
    """
    printed.unlink(missing_ok=True)
    program = _found(command[0], environment)
    spawn = [str(parts / "spawn"), str(count), str(printed), program, *command[1:]]
    found = json.loads(output(spawn, environment))
    lines = printed.read_text().splitlines()
    if found["failed"] or len(lines) != count or len(set(lines)) != 1:
        raise UnmeasurableError(
            f"{count} at once: {found['failed']} failed, {len(lines)} answers, "
            f"{len(set(lines))} different ones: {' '.join(command)[:100]}"
        )
    return float(found["seconds"])
