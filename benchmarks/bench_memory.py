"""What the daemon costs while nobody asks: memory, and how often it wakes the machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.beside import desk, follow
from benchmarks.measure import Figure, UnmeasurableError, interleaved, ratio
from benchmarks.stage import Server, children, daemon, furnish, mints, resident, wake_ups
from keybroker.devgateway import DevGateway
from tests.servers.aws import Aws
from tests.servers.processes import wait_until

SLEEPS = (sys.executable, "-IS", "-c", "print(flush=True); import signal; signal.pause()")
ROUNDS = 3
EACH_KIND = 4
REFRESHES = 100
MANY = 1000
AWS = """\
[profiles.{name}]
base_url = "{url}"
[profiles.{name}.source]
type = "aws"
secret = "llm/key"
poll = "500ms"
"""
IDLE_SECONDS = 60
PATIENCE_SECONDS = 120.0


def measure(folder: Path, say: Callable[[str], None]) -> Iterator[Figure]:
    """Take the figures of the daemon at rest."""
    del say
    yield from _after_refreshes(folder)
    yield from _at_rest(folder)


def _after_refreshes(folder: Path) -> Iterator[Figure]:
    number = iter(range(ROUNDS))

    def ours() -> float:
        names = [f"vault-{each}" for each in range(EACH_KIND)]
        with desk(names) as at, Aws() as aws:
            gateway = at.gateway
            aws.put("llm/key", gateway.master_key)
            home = furnish(
                folder / f"often{next(number)}",
                gateway.url,
                gateway.master_key,
                minted=EACH_KIND,
                commands=EACH_KIND,
                static=EACH_KIND,
                often=True,
            )
            follow(home.path, at, names, "500ms")
            home.profiles += names
            with (home.path / "config.toml").open("a") as file:
                for each in range(EACH_KIND):
                    home.profiles.append(f"aws-{each}")
                    file.write(AWS.format(name=home.profiles[-1], url=gateway.url))
            home.variables = aws.environment(aws.root)
            with daemon(home) as server:
                if not wait_until(lambda: mints(gateway) >= REFRESHES, PATIENCE_SECONDS):
                    raise UnmeasurableError(f"{mints(gateway)} keys minted, {REFRESHES} wanted")
                return resident(server.pid)

    rounds = interleaved({"daemon": ours, "bare": _bare}, ROUNDS, warm=False)
    about = "memory with every kind of source after 100 refreshes, of a sleeping `python -IS`"
    yield Figure("memory", about, ratio(rounds, "daemon", "bare"), ROUNDS, 1.7)


def _bare() -> float:
    with subprocess.Popen(SLEEPS, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as bare:
        assert bare.stdout is not None
        bare.stdout.readline()  # it is about to sleep
        found = resident(bare.pid)
        bare.send_signal(signal.SIGTERM)
    return found


def _at_rest(folder: Path) -> Iterator[Figure]:
    with (
        DevGateway() as gateway,
        _resting(folder / "few", gateway, EACH_KIND) as few,
        _resting(folder / "many", gateway, MANY // 3) as many,
    ):
        before = [wake_ups(one.pid) for one in (few, many)]
        time.sleep(IDLE_SECONDS)
        after = [wake_ups(one.pid) for one in (few, many)]
        more = resident(many.pid) - resident(few.pid)
    about = f"memory that {MANY:,} profiles add to {3 * EACH_KIND}"
    yield Figure("memory.many", about, more, 1, 8.0, unit="MiB")
    about = f"wake-ups in {IDLE_SECONDS} s with {3 * EACH_KIND} profiles, idle"
    yield Figure("idle", about, after[0] - before[0], 1, 0.0, unit="")
    about = f"wake-ups a second with {MANY:,} profiles"
    each_second = (after[1] - before[1]) / IDLE_SECONDS
    yield Figure("idle.many", about, each_second, 1, 1.0, unit="")


@contextmanager
def _resting(folder: Path, gateway: DevGateway, each: int) -> Iterator[Server]:
    """Run a daemon whose every profile has a key, and whose workers have ended."""
    url, admin = gateway.url, gateway.master_key
    home = furnish(folder, url, admin, minted=each, commands=each, static=each)
    with daemon(home) as server:
        if not wait_until(lambda: not children(server.pid), PATIENCE_SECONDS):
            raise UnmeasurableError("the workers do not end")
        yield server
