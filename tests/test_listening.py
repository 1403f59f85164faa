"""Who becomes the daemon: one at a time, in a place of its own, until it is told to end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker import listening, paths, starting, wire
from keybroker.devgateway import DevGateway
from keybroker.devgateway.server import Reply, Request
from keybroker.errors import NobodyAnswers
from keybroker.journal import Journal
from keybroker.slots import Event
from tests.patched import daemon_with
from tests.resident import Resident, until

ANOTHER = "keybroker: another keybroker is at work, on the same state directory or at "
UNPRIVILEGED = 65_534


class Slow(DevGateway):
    """A gateway that mints when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()

    def respond(self, request: Request) -> Reply:
        if request.path == "/key/generate":
            self.reached.set()
            self.go.wait(20)
        return super().respond(request)

    def close(self) -> None:
        self.go.set()
        super().close()


def configure(resident: Resident, gateway: DevGateway, *names: str) -> None:
    """Write profiles of one gateway."""
    resident.environment["ADMIN"] = gateway.master_key
    resident.configure(
        "".join(
            f'[profiles.{name}]\nbase_url = "{gateway.url}"\n[profiles.{name}.source]\n'
            'type = "litellm"\nadmin = { env = "ADMIN" }\n'
            for name in names or ("work",)
        )
    )


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


@pytest.fixture
def ready(resident: Resident, gateway: DevGateway) -> Resident:
    """Configured, with its directories, not started."""
    configure(resident, gateway)
    paths.private_directory(resident.socket.parent)
    return resident


@pytest.fixture
def running(ready: Resident) -> Resident:
    ready.start()
    return ready


def command(resident: Resident) -> list[str]:
    return starting.command(resident.state, resident.socket, "text")


def another(resident: Resident) -> tuple[int, str]:
    """Start one more daemon, which is to end by itself; return its status and what it says."""
    done = subprocess.run(
        command(resident), env=resident.environment, capture_output=True, text=True, timeout=20
    )
    return done.returncode, done.stderr


def ended(resident: Resident) -> int:
    """Wait for the daemon's end."""
    assert resident.process is not None
    return resident.process.wait(20)


def inode(path: Path) -> tuple[int, int]:
    """Return what tells a file from the next one at its path: inodes are used again."""
    found = path.lstat()
    return found.st_ino, found.st_ctime_ns


# alone


def test_a_second_daemon_says_so_and_ends(running: Resident) -> None:
    """Status 69; the first goes on at the same socket."""
    key, place = running.key(), inode(running.socket)

    status, said = another(running)
    assert (status, said.startswith(ANOTHER)) == (69, True)
    assert (running.key(), inode(running.socket)) == (key, place)


def test_of_several_that_start_at_once_one_stays(ready: Resident, gateway: DevGateway) -> None:
    """Exactly one: the others end with 69, and one key is minted."""
    many = [
        subprocess.Popen(command(ready), env=ready.environment, stderr=subprocess.DEVNULL)
        for _ in range(4)
    ]
    left = until(lambda: len(left := [one for one in many if one.poll() is None]) == 1 and left)
    [ready.process] = left or [None]

    assert ready.key()
    assert ready.process is not None
    assert ready.owner() == ready.process.pid
    assert sorted(one.returncode for one in many if one is not ready.process) == [69] * 3
    assert len(gateway.live_keys()) == 1


def test_a_socket_that_was_left_behind_is_taken_over(running: Resident) -> None:
    """Its daemon was killed: nobody listens, and nobody has the lock."""
    key, place = running.key(), inode(running.socket)
    running.kill()
    assert inode(running.socket) == place
    running.start()

    assert running.key() == key
    assert inode(running.socket) != place


TRIED = """
hold = listening.hold
def tried(file):
    held = hold(file)
    open({marker!r}, "w").close()
    return held
listening.hold = tried
"""


def test_nothing_is_taken_over_without_the_lock(running: Resident) -> None:
    """Who is an owner without listening, a command, is waited for."""
    running.kill()
    place, marker = inode(running.socket), running.home.path / "tried"
    lock = until(lambda: paths.take_owner_lock(running.state))  # its worker ends with it
    assert lock is not None
    patch = TRIED.format(marker=str(marker))
    running.start(ready=False, command=daemon_with(patch, running.state, running.socket))
    until(marker.exists)
    assert inode(running.socket) == place
    os.close(lock)

    assert until(running.listens)
    assert inode(running.socket) != place


def test_a_worker_of_a_daemon_that_is_gone_is_waited_for(resident: Resident) -> None:
    """It may still be minting: as long as it runs, nobody else begins."""
    marker = resident.home.path / "tried"
    with Slow() as gateway:
        configure(resident, gateway)
        orphan = "worker.kernel.die_with_parent = lambda: True"
        resident.start(command=daemon_with("", resident.state, resident.socket, worker=orphan))
        assert gateway.reached.wait(10)
        assert resident.process is not None
        pid = resident.process.pid
        [worker] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(worker), signal.SIGSTOP)
        resident.kill()
        place = inode(resident.socket)
        patch = TRIED.format(marker=str(marker))
        resident.start(ready=False, command=daemon_with(patch, resident.state, resident.socket))
        until(marker.exists)
        assert inode(resident.socket) == place
        os.kill(int(worker), signal.SIGKILL)

        assert until(resident.listens)


def test_the_wait_for_a_lock_ends(ready: Resident) -> None:
    """Who has it does not give it back: another daemon is at work, somewhere."""
    lock = paths.take_owner_lock(ready.state)
    assert lock is not None
    patch = "listening.LOCK_SECONDS = 0.2"
    ready.start(ready=False, command=daemon_with(patch, ready.state, ready.socket))

    assert ended(ready) == 69
    assert ready.said().startswith(ANOTHER)
    os.close(lock)


@pytest.mark.parametrize("what", ["a file", "a folder", "a link to nothing", "a link to a file"])
def test_what_is_no_socket_stays(ready: Resident, what: str) -> None:
    """Somebody put it there: it is not removed, and the daemon says where it cannot listen."""
    precious = ready.home.path / "precious"
    if what == "a file":
        ready.socket.write_text("precious")
    elif what == "a folder":
        ready.socket.mkdir()
    else:
        ready.socket.symlink_to(precious)
        if what == "a link to a file":
            precious.write_text("precious")
    before = ready.socket.lstat()

    status, said = another(ready)

    assert (status, said) == (
        69,
        f"keybroker: {ready.socket}: cannot listen (Address already in use)\n",
    )
    assert os.path.samestat(before, ready.socket.lstat())
    assert precious.exists() == (what == "a link to a file")


# what is removed under it


# As on a system without watches, where it looks from time to time.
BLIND = """
linux = kernel._linux
kernel._linux = lambda name, *more: -1 if "inotify" in name else linux(name, *more)
from keybroker import daemon
daemon.TICK_SECONDS = 0.2
"""


@pytest.mark.parametrize("patch", ["", BLIND], ids=["watched", "not watched"])
def test_a_socket_that_is_removed_is_made_again(ready: Resident, patch: str) -> None:
    """Without anybody's help: the next helper finds it."""
    ready.start(command=daemon_with(patch, ready.state, ready.socket))
    key = ready.key()
    ready.socket.unlink()

    assert until(ready.socket.exists)
    assert ready.key() == key
    assert f"{ready.socket} was removed; it was made again" in ready.said()


@pytest.mark.parametrize("how", ["removed", "moved away"])
def test_a_runtime_directory_that_goes_is_made_again(running: Resident, how: str) -> None:
    """Tidying up costs nobody a key; the folder is as private as before."""
    key, folder = running.key(), running.socket.parent
    if how == "removed":
        shutil.rmtree(folder, ignore_errors=True)  # what is made again meanwhile is no error
    else:
        folder.rename(folder.with_name("elsewhere"))

    assert until(lambda: running.socket.exists() and running.listens())
    assert running.key() == key
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / "guidance.json").exists()


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_lock_that_is_removed_makes_room_for_nobody(running: Resident, how: str) -> None:
    """Who answers is the daemon, whatever became of its lock's file."""
    key, lock = running.key(), running.state / paths.OWNER_LOCK
    lock.unlink()
    if how == "replaced":
        lock.touch(0o600)

    status, said = another(running)
    assert (status, said.startswith(ANOTHER)) == (69, True)
    assert running.key() == key
    assert running.listens()


def test_a_lock_that_was_removed_is_taken_anew(running: Resident, gateway: DevGateway) -> None:
    """Before anything is minted again, and by its workers too."""
    running.key()
    (running.state / paths.OWNER_LOCK).unlink()
    assert running.cli("rotate", "work")[0] == 0

    assert running.process is not None
    assert running.owner() == running.process.pid
    assert "owner.lock was removed; it was made again" in running.said()
    assert len(gateway.live_keys()) == 2


def test_nothing_is_minted_while_another_has_the_new_lock(
    running: Resident, gateway: DevGateway
) -> None:
    """Keys are handed out meanwhile; when the other has ended, work goes on."""
    key = running.key()
    (running.state / paths.OWNER_LOCK).unlink()
    other = paths.take_owner_lock(running.state)
    assert other is not None
    rotate = threading.Thread(target=running.cli, args=("rotate", "work"))
    rotate.start()
    until(lambda: "another's now" in running.said())
    assert running.key() == key
    assert len(gateway.live_keys()) == 1
    os.close(other)
    rotate.join()

    assert until(lambda: running.key() != key)


# private


def test_all_that_it_makes_is_its_owner_s(ready: Resident) -> None:
    """Whatever umask it was started with: files 0600, folders 0700, the socket 0600."""
    careless = ["/bin/sh", "-c", 'umask 0; exec "$@"', "sh", *command(ready)]
    ready.start(command=careless)
    ready.key()

    made = [*ready.state.rglob("*"), *ready.socket.parent.rglob("*")]
    wrong = {
        one.name: oct(mode)
        for one in made
        if one != ready.log  # which the test opened
        and (mode := stat.S_IMODE(one.lstat().st_mode)) != (0o700 if one.is_dir() else 0o600)
    }
    assert ready.socket in made
    assert wrong == {}


# Where it would serve, it becomes somebody who is not root, as closed as it was: a change of uid
# would close it anyway.
AS_NOBODY = f"""
from keybroker import daemon
def serve(self):
    get_dumpable, set_dumpable = 3, 4
    was = kernel._linux("prctl", get_dumpable, 0, 0, 0, 0)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(*[{UNPRIVILEGED}] * 3)
        os.setresuid(*[{UNPRIVILEGED}] * 3)
        kernel._linux("prctl", set_dumpable, was, 0, 0, 0)
    self._log.say("info", "serves")
    signal.pause()
daemon.Daemon.serve = serve
"""
OPEN = "kernel.close_to_debuggers = lambda: True\n"
PEEK = """
import os, sys
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(*[int(sys.argv[2])] * 3)
    os.setresuid(*[int(sys.argv[2])] * 3)
for name in ("environ", "mem", "maps", "fd"):
    try:
        at = f"/proc/{sys.argv[1]}/{name}"
        os.listdir(at) if name == "fd" else os.close(os.open(at, os.O_RDONLY))
        print(name)
    except PermissionError:
        pass
"""


@pytest.mark.parametrize(
    ("patch", "readable"),
    [("", []), (OPEN, ["environ", "mem", "maps", "fd"])],
    ids=["closed", "had it not closed itself"],
)
def test_its_memory_is_closed_to_its_own_user(
    ready: Resident, patch: str, readable: list[str]
) -> None:
    """Another program of the same user reads neither environment nor memory."""
    command = daemon_with(AS_NOBODY + patch, ready.state, ready.socket)
    ready.start(ready=False, command=command)
    until(lambda: "serves" in ready.said())
    assert ready.process is not None
    done = subprocess.run(
        [sys.executable, "-c", PEEK, str(ready.process.pid), str(UNPRIVILEGED)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )

    ready.kill()
    assert done.stdout.split() == readable


# the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_ends(running: Resident, number: signal.Signals) -> None:
    """Status 0, no socket, no lock, no worker; the key stays alive and sealed."""
    key = running.key()
    assert running.kill(number) == 0
    running.process = None

    assert not running.socket.exists()
    assert running.owner() is None
    running.start()
    assert running.key() == key


def waiting(resident: Resident) -> tuple[threading.Thread, list[str]]:
    """Ask in the background."""
    replies: list[str] = []
    asks = threading.Thread(target=lambda: replies.append(resident.ask()))
    asks.start()
    return asks, replies


def events(resident: Resident) -> list[Event]:
    return [record.event for record in Journal(resident.state).read()]


def test_what_is_under_way_is_finished(resident: Resident) -> None:
    """A key that the gateway is minting is journalled, verified, sealed, and given to who waits."""
    with Slow() as gateway:
        configure(resident, gateway)
        resident.start()
        assert gateway.reached.wait(10)
        asks, replies = waiting(resident)
        assert resident.process is not None
        resident.process.send_signal(signal.SIGTERM)
        gateway.go.set()

        assert ended(resident) == 0
        asks.join()
        assert events(resident) == [Event.WANTED, Event.HAVE, Event.SWAP]
        [reply] = replies
        assert reply.startswith("ok ")
        resident.start()
        assert resident.ask() == reply
        assert len(gateway.live_keys()) == 1


def test_what_takes_too_long_is_left(resident: Resident) -> None:
    """Who waits is told so, with status 75; the call is looked up by the next daemon."""
    with Slow() as gateway:
        configure(resident, gateway)
        patch = "from keybroker import daemon; daemon.STOP_SECONDS = 0.3"
        resident.start(command=daemon_with(patch, resident.state, resident.socket))
        assert gateway.reached.wait(10)
        asks, replies = waiting(resident)
        until(lambda: connections(resident) > 1)
        assert resident.kill(signal.SIGTERM) == 0
        asks.join()

        assert replies == ["error 75 keybroker: the daemon was stopped; try again"]
        assert events(resident) == [Event.WANTED]
        gateway.go.set()
        resident.start()
        assert resident.key()
        until(lambda: len(gateway.live_keys()) == 1)


def test_nothing_new_is_begun_at_the_end(resident: Resident) -> None:
    """While something is finished, no other key is asked for, though a profile has none."""
    with Slow() as gateway, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(resident.home.path / "notify"))
        told.settimeout(10)
        configure(resident, gateway)
        resident.start(NOTIFY_SOCKET=str(resident.home.path / "notify"))
        assert gateway.reached.wait(10)
        assert resident.process is not None
        resident.process.send_signal(signal.SIGTERM)
        while told.recv(100) != b"STOPPING=1":
            pass
        configure(resident, gateway, "work", "play")
        until(lambda: len(resident.status()["profiles"]) == 2)
        gateway.go.set()

        assert ended(resident) == 0
        assert {record.profile for record in Journal(resident.state).read()} == {"work"}


def connections(resident: Resident) -> int:
    """Count the daemon's ends of its socket: one that listens, and its clients."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return sum(line.endswith(str(resident.socket)) for line in lines)


def test_sighup_has_the_configuration_read(ready: Resident, gateway: DevGateway) -> None:
    """Also what no watch told of, as on a network's disk."""
    blind = "kernel.Watch.directories = lambda self, paths: set()"
    ready.start(command=daemon_with(blind, ready.state, ready.socket))
    key = ready.key("work")
    configure(ready, gateway, "work", "play")
    assert len(ready.status()["profiles"]) == 1
    assert ready.process is not None
    ready.process.send_signal(signal.SIGHUP)

    until(lambda: len(ready.status()["profiles"]) == 2)
    assert ready.key("play") not in ("", key)
    assert ready.key("work") == key


STUCK = """
from keybroker import daemon
daemon.TURN_SECONDS = 0.3
def spin(self, asked, client):
    while True:
        pass
daemon.Daemon._reload = spin
"""


def test_a_turn_that_sticks_is_its_end(ready: Resident) -> None:
    """A timer kills it, a helper's connection is over, and the next daemon takes its place."""
    ready.start(command=daemon_with(STUCK, ready.state, ready.socket))
    key = ready.key()
    with pytest.raises(NobodyAnswers):
        wire.control(ready.socket, "reload", 10.0)

    assert ended(ready) == -signal.SIGALRM
    ready.start()
    assert ready.key() == key


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows it")
def test_what_it_makes_is_closed_to_others(ready: Resident) -> None:
    """Whatever the umask of who started it."""
    old = os.umask(0)
    try:
        ready.start()
    finally:
        os.umask(old)
    assert ready.process is not None
    assert "Umask:\t0077\n" in Path(f"/proc/{ready.process.pid}/status").read_text()


def test_a_daemon_that_sleeps_is_not_stuck(ready: Resident) -> None:
    """The timer is put away before each sleep, however long that is."""
    short = "from keybroker import daemon\ndaemon.TURN_SECONDS = 1.0"
    ready.start(command=daemon_with(short, ready.state, ready.socket))
    key = ready.key()
    for _ in range(2):
        time.sleep(2.5)
        assert ready.key() == key


# its parts


def test_a_path_that_is_too_long_is_said() -> None:
    """The kernel has room for 107 bytes."""
    with pytest.raises(OSError, match="too long"):
        listening.listen(f"/tmp/{'x' * 120}/s")


def test_a_lock_whose_file_is_replaced_while_it_is_taken_is_none(tmp_path: Path) -> None:
    """Somebody else may have the one that is there now."""
    file = tmp_path / "lock"
    held = listening.hold(str(file))
    assert held is not None
    assert listening.in_place(held, str(file))
    assert listening.hold(str(file)) is None
    file.unlink()
    assert not listening.in_place(held, str(file))
    file.touch()
    assert not listening.in_place(held, str(file))
    os.close(held)


def test_nobody_answers_where_nobody_listens(tmp_path: Path) -> None:
    """No file, a file, and a socket whose owner is gone."""
    path = tmp_path / "s"
    assert not listening.answers(str(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert not listening.answers(str(path))
        listener.listen()
        assert listening.answers(str(path))
    assert not listening.answers(str(path))


def test_a_daemon_does_without_what_only_annotations_want() -> None:
    """`typing` is half a megabyte; who needs more of it has the real one until it is forgotten."""
    program = """
import sys
from keybroker import listening
sys.modules["typing"] = words = listening._Words("typing")
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar
assert "real" not in vars(words), "nobody needed it"
from typing import NamedTuple
assert NamedTuple("Pair", [("one", int)])(1).one == 1
assert vars(words)["real"] is not words
words.forget()
assert "real" not in vars(words)
assert [name for name in sys.modules if name.startswith("typing")] == ["typing"]
assert sys.modules["typing"] is words
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == 0


def test_a_daemon_rounds_up_without_a_library() -> None:
    """As `math` does, which who needs more of it has; `selectors` needs no more."""
    program = """
import math, sys
del sys.modules["math"]
from keybroker import listening
sys.modules["math"] = ours = listening._Rounding("math")
import os, selectors
for number in (0, 0.0, 0.1, 1, 1.5, -0.1, -1.5, 999.999, 1e6, 86400000.0000001):
    assert ours.ceil(number) == math.ceil(number), number
    assert type(ours.ceil(number)) is int
read, write = os.pipe()
with selectors.DefaultSelector() as selector:
    selector.register(read, selectors.EVENT_READ)
    assert selector.select(0.001) == []
    os.write(write, b"x")
    assert len(selector.select(5.5)) == 1
assert sys.modules["math"] is ours
from math import floor
assert floor(1.5) == 1
assert sys.modules["math"] is not ours
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == 0
