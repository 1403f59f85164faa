"""`keybroker get` without a daemon, and what the daemon does for each key: rule and journal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from benchmarks.measure import Figure, UnmeasurableError, interleaved, ratio
from benchmarks.programs import output, seconds
from benchmarks.stage import KEYBROKER, furnish
from keybroker import rotation
from keybroker.credential import Issuer, Lease, Reference
from keybroker.journal import Journal
from keybroker.rotation import Kind, Policy
from keybroker.slots import Event, Key, Record, Slots

BARE = (sys.executable, "-IS", "-c", "pass")
ROUNDS = 40
PROFILES = 1000
NOW = datetime.now(UTC)
ISSUER = Issuer("litellm", "https://llm.example.com", Reference("keyring", "litellm-admin"))


def measure(folder: Path, say: Callable[[str], None]) -> Iterator[Figure]:
    """Take the figures of what is slower than the helper."""
    del say
    home = furnish(folder / "get")
    get = (KEYBROKER, "get", "--no-start", "work")
    if output(get, home.environment) != home.key:
        raise UnmeasurableError("keybroker get prints another key")

    def bare() -> float:
        return seconds(BARE, home.environment)

    rounds = interleaved({"get": lambda: seconds(get, home.environment), "bare": bare}, ROUNDS)
    about = "`keybroker get --no-start`, of a bare `python -IS -c pass`"
    yield Figure("get", about, ratio(rounds, "get", "bare"), ROUNDS)
    rounds = interleaved({"rule": _rule(), "bare": bare}, ROUNDS)
    about = f"what to do next for {PROFILES:,} keys, of a bare `python -IS -c pass`"
    yield Figure("rule", about, ratio(rounds, "rule", "bare"), ROUNDS)
    rounds = interleaved(_journal(home.path), ROUNDS)
    about = "a line in the journal, of a write and an fsync"
    yield Figure("journal", about, ratio(rounds, "journal", "fsync"), ROUNDS)


def _rule() -> Callable[[], float]:
    policy = Policy(Kind.MINTED, ISSUER, timedelta(minutes=15))
    profiles = [_slots(number) for number in range(PROFILES)]

    def decide() -> float:
        began = time.perf_counter()
        for slots in profiles:
            rotation.next_step(slots, policy, NOW)
        return time.perf_counter() - began

    return decide


def _slots(number: int) -> Slots:
    label = f"kb-00000000-p{number}-1"
    lease = Lease(label, "litellm", NOW, NOW + timedelta(hours=12), revocable=True)
    key = Key(label, ISSUER, lease, "3f9a1c02", timedelta(hours=12), timedelta(minutes=15))
    return Slots(current=key, wanted_at=NOW)


def _journal(folder: Path) -> dict[str, Callable[[], float]]:
    below = folder / "journal"
    below.mkdir(mode=0o700)
    journal = Journal(below)
    wanted = Record(
        NOW,
        Event.WANTED,
        "work",
        "kb-00000000-work-1",
        issuer=ISSUER,
        lifetime=timedelta(hours=12),
        hold=timedelta(minutes=15),
    )

    def write() -> float:
        began = time.perf_counter()
        with open(folder / "bare", "ab", buffering=0) as file:
            file.write(b"x" * 300)
            os.fsync(file.fileno())
        return time.perf_counter() - began

    def record() -> float:
        began = time.perf_counter()
        journal.write(wanted)
        return time.perf_counter() - began

    return {"fsync": write, "journal": record}
