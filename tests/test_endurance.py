"""A daemon that runs for long: days of rotations in a minute, and nothing that grows."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from keybroker import paths, wire
from keybroker.audit import KEPT, Audit
from keybroker.devgateway import DevGateway
from keybroker.journal import COMPACT_ABOVE, Journal
from keybroker.slots import replay
from tests.patched import daemon_with
from tests.resident import Resident, until

PROFILES = tuple(f"p{number}" for number in range(10))
ROTATIONS = 220
WARM = 60
SECONDS = 90.0
GROWTH = 1.03
AUDIT_FILE = 1 << 16  # in place of 4 MiB, so that a minute fills several
AUDIT_SLACK = 1 << 13  # what is written at once, at the most
SMALL_AUDIT = f"from keybroker import audit; audit.LARGEST = {AUDIT_FILE}"
SHORT_LIVED = "worker.IDLE_SECONDS = 0.05\n"  # hours apart, each rotation has a worker of its own


class Watched:
    """A process as the kernel shows it."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        self._pid = pid

    def memory(self) -> int:
        """Return the resident memory in kB."""
        [line] = [
            one
            for one in (self._folder / "status").read_text().splitlines()
            if one.startswith("VmRSS:")
        ]
        return int(line.split()[1])

    def descriptors(self) -> Counter[str]:
        """Count what is open, by what it is."""
        found: Counter[str] = Counter()
        for one in (self._folder / "fd").iterdir():
            try:
                found[os.readlink(one).partition("[")[0]] += 1
            except FileNotFoundError:  # closed meanwhile
                continue
        return found

    def children(self) -> list[str]:
        """Return the pids of its children."""
        return (self._folder / f"task/{self._pid}/children").read_text().split()


def configuration(gateway: DevGateway, lifetime: str, hold: str) -> str:
    """Ten profiles of one gateway, and an audit log."""
    return "".join(
        f'[profiles.{name}]\nbase_url = "{gateway.url}"\nhelper_ttl = "500ms"\nhold = "{hold}"\n'
        f'[profiles.{name}.source]\ntype = "litellm"\nadmin = {{ env = "ADMIN" }}\n'
        f'lifetime = "{lifetime}"\n'
        for name in PROFILES
    )


class Readers:
    """Clients that ask for keys all the time, and look at once whether the gateway takes them."""

    def __init__(self, resident: Resident, gateway: DevGateway) -> None:
        self._resident, self._gateway = resident, gateway
        self.given: set[str] = set()  # fingerprints
        self.asked = 0
        self.wrong: list[str] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(2)]

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        directory = str(self._resident.home.path / ".claude")
        while not self._over.wait(0.05):
            name = PROFILES[(self.asked + number) % len(PROFILES)]
            reply = self._resident.ask(name, os.getpid(), 500, directory)
            key = reply.removeprefix("ok ")
            token = sha256(key.encode()).hexdigest()
            self.asked += 1
            self.given.add(token[:8])
            if token not in {one.token for one in self._gateway.live_keys()}:
                self.wrong.append(reply.partition(" ")[0] + " " + token[:8])


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


def test_days_of_rotations_leave_nothing_behind(resident: Resident, gateway: DevGateway) -> None:
    """More than 200 rotations: memory and descriptors flat, files bounded, old keys revoked."""
    resident.environment["ADMIN"] = gateway.master_key
    (resident.home.path / ".claude").mkdir()
    (resident.home.path / ".claude/settings.json").write_text("{}\n")
    resident.configure(configuration(gateway, "2h", "1s"))
    patches = SMALL_AUDIT, SHORT_LIVED + SMALL_AUDIT
    command = daemon_with(patches[0], resident.state, resident.socket, worker=patches[1])
    resident.start(command=command)
    assert resident.process is not None
    daemon = Watched(resident.process.pid)
    journal = resident.state / paths.JOURNAL
    lines: list[int] = []
    workers: set[str] = set()

    def rotated(count: int) -> Callable[[], bool]:
        def there() -> bool:
            workers.update(daemon.children())
            lines.append(journal.read_bytes().count(b"\n") if journal.exists() else 0)
            minted = sum((one.path, one.status) == ("/key/generate", 200) for one in gateway.seen())
            time.sleep(0.1)
            return minted - len(PROFILES) >= count

        return there

    assert until(lambda: settled(resident) and not daemon.children())
    opened = daemon.descriptors()
    resident.configure(configuration(gateway, "4s", "1s"))
    wire.control(resident.socket, "reload", 10.0)
    wire.control(resident.socket, "rotate", 30.0, profiles=list(PROFILES))
    with Readers(resident, gateway) as readers:
        until(rotated(WARM), SECONDS / 2)
        warm = daemon.memory()
        until(rotated(ROTATIONS), SECONDS)
        grown = daemon.memory()

    assert not readers.wrong
    assert readers.asked > ROTATIONS
    assert grown <= warm * GROWTH
    assert len(workers) > 5
    assert COMPACT_ABOVE < max(lines) < COMPACT_ABOVE + 15 * len(PROFILES) < 4 * ROTATIONS

    # From here on the keys last, and only those of now are left.
    resident.configure(configuration(gateway, "2h", "1s"))  # it is read by itself
    assert until(lambda: len(gateway.live_keys()) == len(PROFILES) and settled(resident), 30)
    assert {one.token[:8] for one in gateway.live_keys()} == {
        resident.row(name)["fingerprint"] for name in PROFILES
    }
    assert until(lambda: not daemon.children())  # which none is that was not waited for
    assert daemon.descriptors() == opened
    known = replay(Journal(resident.state).read())
    assert sum(len(slots.all) for slots in known.values()) == len(PROFILES)
    audit = Audit(resident.state)
    assert len(audit.files()) == KEPT + 1
    assert max(one.stat().st_size for one in audit.files()) < AUDIT_FILE + AUDIT_SLACK
    assert audit.read()


def settled(resident: Resident) -> bool:
    """Say whether every profile has one key, a long one, and nothing else."""
    return all(
        not row["retired"] and not row["open"] and row["survives_outage_s"] > 600
        for row in resident.status()["profiles"]
    )
