"""
What a service manager does: it hands down a socket, and is told how things stand.

The manager here is the test itself, which speaks systemd's protocols: sd_listen_fds(3) and
sd_notify(3).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from keybroker import paths, wire
from keybroker.devgateway import DevGateway
from tests.patched import daemon_with
from tests.resident import Resident, until

# Puts the sockets where they are expected, and becomes the daemon: its pid is ours.
HANDS_DOWN = """
import fcntl, os, sys
pid, count = sys.argv[1], int(sys.argv[2])
given = [int(one) for one in sys.argv[3 : 3 + count]]
high = [fcntl.fcntl(one, fcntl.F_DUPFD, 64) for one in given]
os.closerange(3, 64)
for number, one in enumerate(high):
    os.dup2(one, 3 + number)
    os.close(one)
os.environ.update(
    LISTEN_PID=str(os.getpid()) if pid == "ours" else pid,
    LISTEN_FDS=str(count),
    LISTEN_FDNAMES="keybroker",
)
os.execv(sys.argv[3 + count], sys.argv[3 + count :])
"""
TRIED = """
hold = listening.hold
def tried(file):
    held = hold(file)
    open({marker!r}, "w").close()
    return held
listening.hold = tried
"""


class Manager:
    """Holds sockets, and starts the daemon with them."""

    def __init__(self, resident: Resident, *names: str) -> None:
        self.resident = resident
        folder = paths.private_directory(resident.socket.parent)
        self.sockets = []
        for name in names:
            one = socket.socket(socket.AF_UNIX)
            one.bind(str(folder / name))
            (folder / name).chmod(0o600)
            one.listen()
            self.sockets.append(one)

    def start(self, *, ready: bool = True, pid: str = "ours", patch: str = "") -> None:
        """Start the daemon; with `ready`, return when it answers."""
        numbers = [one.fileno() for one in self.sockets]
        daemon = daemon_with(patch, self.resident.state, self.resident.socket)
        given = [pid, str(len(numbers)), *map(str, numbers)]
        with open(self.resident.log, "ab") as log:
            self.resident.process = subprocess.Popen(
                [sys.executable, "-c", HANDS_DOWN, *given, *daemon],
                env=self.resident.environment,
                stdin=subprocess.DEVNULL,
                stderr=log,
                pass_fds=numbers,
            )
        if ready:
            until(self.resident.listens)

    def close(self) -> None:
        for one in self.sockets:
            one.close()


class Notified:
    """A datagram socket, as $NOTIFY_SOCKET names one."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1))
        self._socket.settimeout(10)
        self.said: list[str] = []

    def until(self, what: str) -> list[str]:
        """Receive until something is said; return all from the last time on."""
        begun = len(self.said)
        while what not in self.said[begun:]:
            self.said += self._socket.recv(4096).decode().splitlines()
        return self.said[begun:]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


@pytest.fixture
def ready(resident: Resident, gateway: DevGateway) -> Resident:
    """Configured, not started."""
    resident.environment["ADMIN"] = gateway.master_key
    resident.configure(
        f'[profiles.work]\nbase_url = "{gateway.url}"\n[profiles.work.source]\n'
        'type = "litellm"\nadmin = { env = "ADMIN" }\n'
    )
    return resident


@pytest.fixture
def manager(ready: Resident) -> Iterator[Manager]:
    """A manager of the socket that helpers use."""
    made = Manager(ready, ready.socket.name)
    yield made
    made.close()


@pytest.fixture(params=["/notify", "@keybroker-test-{}"], ids=["path", "abstract"])
def notified(request: pytest.FixtureRequest, ready: Resident) -> Iterator[Notified]:
    """Where the daemon tells how things stand."""
    address = str(request.param).format(os.getpid())
    made = Notified(address if address[0] == "@" else f"{ready.home.path}{address}")
    ready.environment["NOTIFY_SOCKET"] = made.address
    yield made
    made.close()


def asked(resident: Resident) -> tuple[threading.Thread, list[str]]:
    """Ask in the background."""
    replies: list[str] = []
    asks = threading.Thread(target=lambda: replies.append(resident.ask()))
    asks.start()
    return asks, replies


# a socket


def test_who_asked_before_it_began_is_answered(manager: Manager) -> None:
    """The request waits in the socket's queue while the daemon is started."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(manager.resident.socket))
        client.sendall(wire.request("work", 0, 0, ""))
        manager.start(ready=False)
        client.settimeout(20)
        with client.makefile() as replies:
            [*_, reply] = replies

    assert reply == f"ok {manager.resident.key()}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_socket_outlives_the_daemon(manager: Manager, number: signal.Signals) -> None:
    """It is its manager's: it stays at its path, and who asks meanwhile waits for the next one."""
    resident = manager.resident
    manager.start()
    key, place = resident.key(), resident.socket.lstat()
    resident.kill(number)
    assert os.path.samestat(place, resident.socket.lstat())
    asks, replies = asked(resident)
    manager.start()
    asks.join()

    assert replies == [f"ok {key}"]
    assert os.path.samestat(place, resident.socket.lstat())


def test_sockets_for_another_process_are_not_ours(ready: Resident) -> None:
    """Its parent was meant: it listens at a path of its own, which is removed at the end."""
    manager = Manager(ready, "other")
    manager.start(pid="1")
    ready.key()
    assert ready.kill(signal.SIGTERM) == 0

    assert not ready.socket.exists()
    assert ready.socket.with_name("other").exists()
    manager.close()


def test_each_of_several_sockets_is_answered(ready: Resident) -> None:
    """One of them may be for another user's folder, or another namespace."""
    manager = Manager(ready, ready.socket.name, "other")
    manager.start()
    other = ready.socket.with_name("other")

    assert wire.ask(other, wire.request("work")).decode() == f"ok {ready.key()}"
    manager.close()


def test_a_handed_down_socket_is_not_made_again(ready: Resident) -> None:
    """Who removed it asked the manager for that, or will."""
    manager = Manager(ready, ready.socket.name, "other")
    manager.start()
    key, other = ready.key(), ready.socket.with_name("other")
    ready.socket.unlink()
    assert ready.process is not None
    ready.process.send_signal(signal.SIGHUP)

    assert wire.ask(other, wire.request("work")).decode() == f"ok {key}"
    assert not ready.socket.exists()
    manager.close()


def test_an_old_worker_is_waited_for_behind_a_socket_that_answers(manager: Manager) -> None:
    """That somebody listens there means nothing here: it is the manager."""
    resident = manager.resident
    lock, marker = paths.take_owner_lock(resident.state), resident.home.path / "tried"
    assert lock is not None
    manager.start(ready=False, patch=TRIED.format(marker=str(marker)))
    until(marker.exists)
    asks, replies = asked(resident)
    assert resident.process is not None
    assert resident.process.poll() is None
    os.close(lock)
    asks.join()

    assert replies[0].startswith("ok ")


# how things stand


def test_its_manager_is_told_when_it_is_ready_and_when_it_ends(
    ready: Resident, notified: Notified
) -> None:
    """READY once it listens, STATUS when there is news, STOPPING at the end."""
    ready.start(ready=False)
    notified.until("READY=1")
    assert ready.ask().startswith("ok ")
    notified.until("STATUS=1 of 1 profiles have a key")
    ready.kill(signal.SIGTERM)
    notified.until("STOPPING=1")

    assert notified.said == ["READY=1", "STATUS=1 of 1 profiles have a key", "STOPPING=1"]


@pytest.mark.parametrize("good", [True, False], ids=["good", "bad"])
def test_its_manager_is_told_of_a_reload(ready: Resident, notified: Notified, good: bool) -> None:
    """RELOADING with the monotonic time, then READY, also if the configuration is bad."""
    ready.start()
    notified.until("STATUS=1 of 1 profiles have a key")
    if not good:
        ready.file.write_text("rubbish")  # which may be noticed before the signal comes
        notified.until("READY=1")
    assert ready.process is not None
    ready.process.send_signal(signal.SIGHUP)

    before = time.monotonic_ns() // 1000
    reloading, at, done = notified.until("READY=1")
    assert (reloading, done) == ("RELOADING=1", "READY=1")
    assert abs(int(at.removeprefix("MONOTONIC_USEC=")) - before) < 10_000_000
    assert ready.key()


def test_a_manager_that_does_not_listen_is_no_matter(ready: Resident) -> None:
    """A full or missing socket holds nobody up."""
    ready.environment["NOTIFY_SOCKET"] = str(ready.home.path / "missing")
    ready.start()

    assert ready.key()
    assert ready.kill(signal.SIGTERM) == 0
