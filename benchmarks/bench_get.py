"""How long `keybroker get` takes with a key in the cache, and what its parts cost.

    .venv/bin/python benchmarks/bench_get.py [--rounds 40]

Programs are compared within one interleaved run, as the median of paired ratios: absolute times
vary by machine and by minute. Nothing here is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from keybroker import rotation
from keybroker.credential import Issuer, Lease, Reference
from keybroker.devgateway import DevGateway
from keybroker.journal import Journal
from keybroker.rotation import Kind, Policy
from keybroker.slots import Event, Key, Record, Slots

PROFILES = 10_000
NOW = datetime.now(UTC)
ISSUER = Issuer("litellm", "https://llm.example.com", Reference("keyring", "litellm-admin"))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="benchmarks of keybroker")
    parser.add_argument("--rounds", type=int, default=40, help="how often each thing is timed")
    rounds = parser.parse_args().rounds
    _programs(rounds)
    _rule(min(rounds, 10))
    _journal(rounds)


def _programs(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="keybroker-bench-") as name, DevGateway() as gateway:
        folder = Path(name)
        environment = _home(folder, gateway)
        keybroker = str(Path(sys.executable).parent / "keybroker")
        key = subprocess.run(
            [keybroker, "get"], env=environment, capture_output=True, check=True
        ).stdout
        kept = folder / "key"
        kept.write_bytes(key)
        bare = [sys.executable, "-IS", "-c", "pass"]
        calls: dict[str, Callable[[], None]] = {
            "python -IS -c pass": lambda: _run(bare, environment),
            "cat file": lambda: _run(["cat", str(kept)], environment),
            "keybroker get": lambda: _run([keybroker, "get"], environment),
            "keybroker --version": lambda: _run([keybroker, "--version"], environment),
        }
        times = _interleaved(calls, rounds)
    print(f"{'':<22}{'median':>10}{'/ python':>10}{'/ cat':>10}    n = {rounds}")
    for what, taken in times.items():
        ratios = [_ratio(taken, times[to]) for to in ("python -IS -c pass", "cat file")]
        print(f"{what:<22}{statistics.median(taken) * 1e3:>7.1f} ms", end="")
        print("".join(f"{ratio:>10.2f}" for ratio in ratios))


def _home(folder: Path, gateway: DevGateway) -> dict[str, str]:
    config = folder / "config.toml"
    for path, text in (
        (folder / "admin", gateway.master_key),
        (
            config,
            (
                f'[cache]\nkey = "file"\n[profiles.work]\nbase_url = "{gateway.url}"\n'
                f'[profiles.work.source]\ntype = "litellm"\nadmin = {{ file = "{folder}/admin" }}\n'
            ),
        ),
    ):
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(folder),
        "KEYBROKER_CONFIG": str(config),
    }


def _run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    subprocess.run(command, env=dict(environment), stdout=subprocess.DEVNULL, check=True)


def _interleaved(calls: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Time each call once a round, so that a busy minute slows all of them."""
    times: dict[str, list[float]] = {what: [] for what in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for what, call in calls.items():
            started = time.perf_counter()
            call()
            times[what].append(time.perf_counter() - started)
    return times


def _ratio(taken: Sequence[float], to: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(taken, to, strict=True))


def _rule(rounds: int) -> None:
    policy = Policy(Kind.MINTED, ISSUER, timedelta(minutes=15))
    profiles = [_slots(number) for number in range(PROFILES)]
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        for slots in profiles:
            rotation.next_step(slots, policy, NOW)
        taken.append((time.perf_counter() - started) / PROFILES)
    each = statistics.median(taken)
    print(f"\nrotation.next_step    {each * 1e6:>7.1f} µs a call, {PROFILES} profiles")


def _slots(number: int) -> Slots:
    label = f"kb-00000000-p{number}-1"
    lease = Lease(label, "litellm", NOW, NOW + timedelta(hours=12), revocable=True)
    key = Key(label, ISSUER, lease, "3f9a1c02", timedelta(hours=12), timedelta(minutes=15))
    return Slots(current=key, wanted_at=NOW)


def _journal(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="keybroker-bench-", dir=Path.home()) as name:
        folder = Path(name)
        journal, bare = Journal(folder), folder / "bare"
        wanted = Record(
            NOW,
            Event.WANTED,
            "work",
            "kb-00000000-work-1",
            issuer=ISSUER,
            lifetime=timedelta(hours=12),
            hold=timedelta(minutes=15),
        )

        def write() -> None:
            with open(bare, "ab", buffering=0) as file:
                file.write(b"x" * 300)
                os.fsync(file.fileno())

        times = _interleaved(
            {"write + fsync": write, "journal.write": lambda: journal.write(wanted)}, rounds
        )
    ratio = _ratio(times["journal.write"], times["write + fsync"])
    each = statistics.median(times["journal.write"])
    print(f"journal.write         {each * 1e3:>7.2f} ms, {ratio:.2f} of a bare write + fsync")


if __name__ == "__main__":
    main()
