"""
Clocks that jump under a running daemon: a closed lid, a clock that is set, a reboot.

The wall clock is set by libfaketime in the daemon and its workers; a closed lid is a time namespace
whose boot clock is ahead, entered while the daemon runs. Where that is not permitted, its boot
clock is read through a function that adds as much.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest

from keybroker.devgateway import DevGateway
from tests.patched import daemon_with
from tests.resident import Resident, until

HOUR = 3600
HOLD = 3.0
LIFE = timedelta(hours=2)
LIBRARIES = ("/usr/lib/*/faketime/libfaketime.so.1", "/usr/local/lib/faketime/libfaketime.so.1")
SHARED = Path("/dev/shm")
CLOCKS = """
import time
read = time.clock_gettime
def ahead(clock):
    try:
        with open({file!r}) as file:
            return read(clock) + (float(file.read()) if clock == time.CLOCK_BOOTTIME else 0)
    except FileNotFoundError:
        return read(clock)
time.clock_gettime = ahead
"""
# SIGUSR1: as if the machine had slept. The timer that tells of set clocks is a FIFO of the test's.
DAEMON = """
from keybroker import pool
pool.PASSED_ON |= {{name for name in os.environ if name.startswith(("LD_PRELOAD", "FAKETIME"))}}
def sleep(number, frame):
    seconds = open({lid!r}).read()
    new_time, debuggable = 0x80, 4
    try:
        if kernel._linux("unshare", new_time):
            raise PermissionError
        kernel._linux("prctl", debuggable, 1, 0, 0, 0)
        with open("/proc/self/timens_offsets", "w") as file:
            file.write("boottime " + seconds + " 0")
        kernel._linux("prctl", debuggable, 0, 0, 0, 0)
        entered = os.open("/proc/self/ns/time_for_children", os.O_RDONLY)
        if kernel._linux("setns", entered, new_time):
            raise PermissionError
        os.close(entered)
    except PermissionError:
        with open({file!r}, "w") as file:
            file.write(seconds)
    os.unlink({lid!r})
signal.signal(signal.SIGUSR1, sleep)
kernel.clock_set_timer = lambda: os.open({bell!r}, os.O_RDWR | os.O_NONBLOCK)
"""
WORKER = "worker.IDLE_SECONDS = 0.1\n"
REBOOTED = "from keybroker import clock; clock._boot_id = lambda: 'another boot'\n"


class Laptop:
    """A user's machine, whose clocks can be moved, and the gateway's, which is right."""

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        self.slept = 0
        self.gateway = DevGateway(clock=lambda: datetime.now(UTC) + timedelta(seconds=self.slept))
        self._at = resident.home.path
        self._lid, self._bell = self._at / "lid", self._at / "bell"
        os.mkfifo(self._bell)
        self.ringing = os.open(self._bell, os.O_RDWR | os.O_NONBLOCK)
        self.step(0)
        [library, *_] = [str(one) for at in LIBRARIES for one in Path("/").glob(at[1:])]
        resident.environment.update(
            ADMIN=self.gateway.master_key,
            LD_PRELOAD=library,
            FAKETIME_DONT_FAKE_MONOTONIC="1",
            FAKETIME_NO_CACHE="1",
            FAKETIME_DISABLE_SHM="1",
            FAKETIME_TIMESTAMP_FILE=str(self._at / "wall"),
        )

    def configure(self, **source: str) -> None:
        """Write one profile."""
        settings = {"lifetime": "2h", "hold": "3s", "helper_ttl": "1s", **source}
        self.resident.configure(
            f'[profiles.work]\nbase_url = "{self.gateway.url}"\nhold = "{settings["hold"]}"\n'
            f'helper_ttl = "{settings["helper_ttl"]}"\n[profiles.work.source]\n'
            'type = "litellm"\nadmin = { env = "ADMIN" }\n'
            f'lifetime = "{settings["lifetime"]}"\n'
        )

    def start(self, *patches: str) -> None:
        """Start the daemon, whose clocks are those of this machine."""
        places = {"file": str(self._at / "boot"), "lid": str(self._lid), "bell": str(self._bell)}
        clocks = CLOCKS.format(**places) + "".join(patches)
        daemon = DAEMON.format(**places) + clocks
        command = daemon_with(
            daemon, self.resident.state, self.resident.socket, worker=WORKER + clocks
        )
        self.resident.start(command=command)

    def step(self, seconds: int) -> None:
        """Set the wall clock to so many seconds beside the right time."""
        self._stepped = seconds
        self._write(self._at / "wall", f"{seconds + self.slept:+d}")

    def sleep(self, seconds: int) -> None:
        """Close the lid for so long: all clocks go on but those that stand still in sleep."""
        process = self.resident.process
        assert process is not None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until(lambda: not children.read_text())  # one that runs has its clock already
        self.slept += seconds
        self._write(self._lid, str(self.slept))
        process.send_signal(signal.SIGUSR1)
        until(lambda: not self._lid.exists())
        self.step(self._stepped)

    def ring(self) -> None:
        """Say what the kernel says when the clock was set or the machine woke up."""
        os.write(self.ringing, b"12345678")

    def key(self) -> str:
        """Ask until a key is printed."""
        until(lambda: self.resident.ask().startswith("ok "))
        return self.resident.key()

    def looks(self, key: str, since: int) -> list[str]:
        """Return what the gateway was asked with a key, after so many requests."""
        seen = self.gateway.seen()[since:]
        return [one.path for one in seen if one.fingerprint == fingerprint(key)]

    def asked(self) -> int:
        """Count what the gateway was asked, by anybody."""
        return len(self.gateway.seen())

    def lives(self, key: str) -> bool:
        """Say whether the gateway takes a key."""
        return token(key) in {one.token for one in self.gateway.live_keys()}

    def _write(self, file: Path, text: str) -> None:
        draft = file.with_name(f"{file.name}.draft")
        draft.write_text(text)
        draft.replace(file)


def token(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def fingerprint(key: str) -> str:
    return token(key)[:8]


@pytest.fixture
def silent(resident: Resident) -> Iterator[Laptop]:
    """A laptop without a daemon."""
    before = set(SHARED.glob("*faketime*"))
    made = Laptop(resident)
    with made.gateway:
        yield made
    resident.stop()
    os.close(made.ringing)
    for left in set(SHARED.glob("*faketime*")) - before:  # of processes that were killed
        if not Path(f"/proc/{left.name.rpartition('_')[2]}").exists():
            left.unlink(missing_ok=True)


@pytest.fixture
def laptop(silent: Laptop) -> Laptop:
    """A laptop with a daemon that has a key."""
    silent.configure()
    silent.start()
    return silent


def test_the_clocks_move_as_these_tests_mean(laptop: Laptop) -> None:
    """The daemon's wall clock can be set, and its lid closed."""
    key = laptop.resident.key()
    before = datetime.fromisoformat(laptop.resident.row()["next_at"])
    laptop.sleep(10)
    laptop.step(20)

    assert laptop.resident.row()["survives_outage_s"] == pytest.approx(LIFE.seconds - 30, abs=10)
    assert datetime.fromisoformat(laptop.resident.row()["next_at"]) == before
    assert laptop.resident.key() == key


# a closed lid


def test_a_lid_that_was_closed_for_longer_than_a_key_lives(laptop: Laptop) -> None:
    """Who asks first gets a new key at once, and the old is never printed again."""
    old = laptop.resident.key()
    laptop.sleep(3 * HOUR)

    status, printed, said = laptop.resident.helper()

    assert (status, said) == (0, "")
    assert printed.strip() != old
    assert laptop.lives(printed.strip())
    assert not laptop.lives(old)


def test_the_daemon_wakes_up_by_itself(laptop: Laptop) -> None:
    """It mints as soon as the kernel says that time has passed, before anybody asks."""
    old, since = laptop.resident.key(), laptop.asked()
    laptop.sleep(3 * HOUR)
    laptop.ring()

    [minted] = until(laptop.gateway.live_keys)
    new = until(lambda: laptop.resident.ask().removeprefix("ok "))

    assert token(new) == minted.token
    assert new != old
    assert laptop.asked() > since


def test_a_lid_that_was_closed_with_no_gateway_to_come_back_to(laptop: Laptop) -> None:
    """Nothing is printed but why; when the gateway is back, so is a key, which is not the old."""
    old = laptop.resident.key()
    laptop.gateway.close()
    laptop.sleep(3 * HOUR)
    laptop.ring()

    replies = [laptop.resident.helper() for _ in range(2)]
    laptop.gateway.start()
    new = laptop.key()

    assert [(status, printed) for status, printed, _ in replies] == [(75, "")] * 2
    assert all(said.startswith("keybroker: work: ") for _, _, said in replies)
    assert new != old
    assert laptop.lives(new)


def test_a_nap_changes_nothing(laptop: Laptop) -> None:
    """A key that has not aged by much is printed without a question."""
    old, asked = laptop.resident.key(), laptop.asked()
    laptop.sleep(600)
    laptop.ring()

    assert laptop.resident.key() == old
    assert laptop.asked() == asked


# a clock that is set

STEPS = pytest.mark.parametrize("seconds", [HOUR, -HOUR], ids=["forward", "back"])


@STEPS
def test_a_key_is_looked_at_when_the_clocks_disagree(laptop: Laptop, seconds: int) -> None:
    """The gateway has taken it before it is printed; nobody had to be told by a timer."""
    old, asked = laptop.resident.key(), laptop.asked()
    laptop.step(seconds)

    printed = laptop.resident.key()

    assert laptop.looks(printed, asked)[:1] == ["/v1/models"]
    assert laptop.lives(printed)
    assert laptop.looks(old, asked)[:1] == ["/v1/models"]


@STEPS
def test_nothing_is_printed_while_nobody_can_look(laptop: Laptop, seconds: int) -> None:
    """Nobody knows what time it is: status 75, until the gateway answers."""
    laptop.resident.key()
    laptop.gateway.close()
    laptop.step(seconds)

    status, printed, said = laptop.resident.helper()
    laptop.gateway.start()

    assert (status, printed) == (75, "")
    assert said.startswith("keybroker: work: the clock was set")
    assert laptop.lives(laptop.key())


@STEPS
def test_a_set_clock_is_noticed_before_anybody_asks(laptop: Laptop, seconds: int) -> None:
    """The kernel says so, the key is looked at, and the next one's times are by the new clock."""
    old, asked = laptop.resident.key(), laptop.asked()
    laptop.step(seconds)
    laptop.ring()

    until(lambda: len(laptop.gateway.live_keys()) == 2)

    assert laptop.looks(old, asked)[:1] == ["/v1/models"]
    assert until(lambda: laptop.resident.key() != old)


@pytest.mark.parametrize("seconds", [30, -30])
def test_a_small_step_is_none(laptop: Laptop, seconds: int) -> None:
    """A clock that is put right by half a minute costs no request."""
    old, asked = laptop.resident.key(), laptop.asked()
    laptop.step(seconds)
    laptop.ring()

    assert [laptop.resident.key() for _ in range(3)] == [old] * 3
    assert laptop.asked() == asked


def test_a_key_dies_by_the_wall_clock_too(laptop: Laptop) -> None:
    """Set forward past the end of a key: it is not printed, though the gateway would take it."""
    old = laptop.resident.key()
    laptop.gateway.close()
    laptop.step(3 * HOUR)

    assert laptop.resident.ask().startswith("error 75 ")
    laptop.gateway.start()
    assert laptop.lives(old)


# a reboot


def test_a_reboot_with_the_right_time_answers_at_once(laptop: Laptop) -> None:
    """What was sealed is printed though the gateway is out."""
    old = laptop.resident.key()
    laptop.resident.kill()
    laptop.gateway.close()
    laptop.start(REBOOTED)

    assert laptop.resident.helper() == (0, f"{old}\n", "")


def test_a_reboot_into_the_past_looks_first(laptop: Laptop) -> None:
    """A clock before our last record is not believed: the gateway takes the key, or nobody does."""
    old, asked = laptop.resident.key(), laptop.asked()
    laptop.resident.kill()
    laptop.step(-HOUR)
    laptop.start(REBOOTED)

    printed = laptop.resident.key()

    assert laptop.looks(printed, asked)[:1] == ["/v1/models"]
    assert laptop.looks(old, asked)[:1] == ["/v1/models"]


def test_a_reboot_into_the_past_without_a_gateway(laptop: Laptop) -> None:
    """Nothing is printed while the key's age is not known."""
    laptop.resident.key()
    laptop.resident.kill()
    laptop.gateway.close()
    laptop.step(-HOUR)
    laptop.start(REBOOTED)

    status, printed, _ = laptop.resident.helper()
    laptop.gateway.start()

    assert (status, printed) == (75, "")
    assert laptop.lives(laptop.key())


# readers' holds


def rotated_at(laptop: Laptop) -> tuple[str, float]:
    """Replace the key; return the old one, and a moment no later than the swap."""
    old, moment = laptop.resident.key(), time.monotonic()
    assert laptop.resident.cli("rotate", "work")[0] == 0
    return old, moment


@pytest.mark.parametrize("steps", [(HOUR,), (-HOUR, 0)], ids=str)
def test_a_set_clock_uses_up_nobody_s_hold(laptop: Laptop, steps: tuple[int, ...]) -> None:
    """A replaced key is revoked when its hold is over by the time that really passed."""
    del laptop.resident.environment["LD_PRELOAD"]  # of commands
    old, moment = rotated_at(laptop)
    for seconds in steps:
        laptop.step(seconds)
        laptop.ring()
        laptop.resident.key()

    until(lambda: not laptop.lives(old))

    assert time.monotonic() - moment >= HOLD
    assert laptop.lives(laptop.resident.key())


def test_a_hold_passes_in_sleep(laptop: Laptop) -> None:
    """Who slept has had its time: the old key is revoked as soon as the machine wakes up."""
    del laptop.resident.environment["LD_PRELOAD"]
    old, _ = rotated_at(laptop)
    laptop.sleep(600)
    assert laptop.lives(old)
    laptop.ring()

    until(lambda: not laptop.lives(old), HOLD - 1)


# anything


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_the_clocks_do_what_is_printed_is_alive(silent: Laptop, seed: int) -> None:
    """Keys that live for seconds, naps, sleeps, steps and outages in any order."""
    chance = random.Random(seed)
    silent.configure(lifetime="6s", hold="2s")
    silent.start()
    printed = [silent.resident.key()]
    for _ in range(45):
        move = chance.choice(("nap", "sleep", "step", "outage", "ring"))
        if move == "nap":
            silent.sleep(1)
        elif move == "sleep":
            silent.sleep(7)
        elif move == "step":
            silent.step(chance.choice((0, 30, -30, HOUR, -HOUR)))
        elif move == "outage":
            silent.gateway.close()
        else:
            silent.ring()
        reply = silent.resident.ask()
        if reply.startswith("ok "):
            printed.append(reply.removeprefix("ok "))
            assert silent.lives(printed[-1]), (seed, move, printed)
        else:
            assert reply.startswith("error 75 "), reply
        silent.gateway.start()

    assert len(set(printed)) > 5
