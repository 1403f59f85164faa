"""Another version is installed under a daemon that runs: it takes over, and nobody notices."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from keybroker import paths, starting, wire
from keybroker.devgateway import DevGateway
from tests.resident import Home, Resident, until
from tests.servers.faults import Faults, PauseResponse

ROOT = Path(__file__).parent.parent
SECONDS = 20.0


class Installed(Resident):
    """A daemon that runs from a copy of the package, as an installation has it."""

    def __init__(self, home: Home, gateway: DevGateway | Faults, admin: str) -> None:
        super().__init__(home, ADMIN=admin)
        self.package = home.path / "site/keybroker"
        shutil.copytree(ROOT / "keybroker", self.package)
        self.configure(
            f'[profiles.work]\nbase_url = "{gateway.url}"\n'
            '[profiles.work.source]\ntype = "litellm"\nadmin = { env = "ADMIN" }\n'
        )
        written = starting.command(self.state, self.socket, "text")
        self.command = [str(self.package.parent) if one == str(ROOT) else one for one in written]

    def install(self, version: str, *, loads: bool = True) -> None:
        """Put another version in its place, file by file."""
        shutil.copy(ROOT / "keybroker/daemon.py", self.package / "daemon.py")
        if not loads:
            (self.package / "daemon.py").write_text("raise SystemExit(3)\n")
        draft = self.package / "draft"
        draft.write_text(f'"""."""\n\n__version__ = "{version}"\n')
        draft.replace(self.package / "__init__.py")

    @property
    def version(self) -> str:
        """What the daemon says that it is."""
        return str(wire.control(self.socket, "about", 5.0)["version"])


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


@pytest.fixture
def installed(home: Home, gateway: DevGateway) -> Iterator[Installed]:
    one = Installed(home, gateway, gateway.master_key)
    yield one
    one.stop()


@contextmanager
def readers(resident: Resident) -> Iterator[list[str]]:
    """Ask all the time; tell what was answered."""
    answers: list[str] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            try:
                answers.append(resident.ask("work"))
            except OSError as error:
                answers.append(f"nobody: {error}")

    threads = [threading.Thread(target=read) for _ in range(3)]
    for one in threads:
        one.start()
    try:
        yield answers
    finally:
        over.set()
        for one in threads:
            one.join()


def test_another_version_takes_over_and_no_reader_notices(
    installed: Installed, gateway: DevGateway
) -> None:
    """It is the same process at the same socket with the same key; its lock was never free."""
    installed.start(command=installed.command)
    until(lambda: installed.row()["fingerprint"])
    key, before = installed.key(), wire.control(installed.socket, "about", 5.0)
    place = installed.socket.stat().st_ino

    with readers(installed) as answers:
        installed.install("9.9.9")
        free = 0
        ends = time.monotonic() + SECONDS
        while installed.version != "9.9.9" and time.monotonic() < ends:
            free += paths.owner_lock_is_free(installed.state)
        said = len(answers)
        until(lambda: len(answers) > said + 30)

    after = wire.control(installed.socket, "about", 5.0)
    assert (after["version"], after["pid"]) == ("9.9.9", before["pid"])
    assert set(answers) == {f"ok {key}"}
    assert free == 0
    assert installed.socket.stat().st_ino == place
    assert len(gateway.live_keys()) == 1
    assert "what is installed now takes over" in installed.said()

    installed.kill(signal.SIGTERM)
    assert not installed.socket.exists()  # it is its own still, and gone with it


def test_it_is_done_as_often_as_there_is_another(installed: Installed) -> None:
    """Each has the lock once, and the socket once; nothing is left open of the one before."""
    installed.start(command=installed.command)
    until(lambda: installed.row()["fingerprint"])
    for version in ("9.1", "9.2"):
        installed.install(version)
        until(lambda wanted=version: installed.version == wanted, SECONDS)  # type: ignore[misc]

        assert installed.process is not None
        held = _open_files(installed.process.pid)
        assert held.count(str(installed.state / paths.OWNER_LOCK)) == 1
        sockets = [one for one in held if one.startswith("socket:")]
        assert len(sockets) == len(set(sockets))
        assert held.count("anon_inode:inotify") == 1


def _open_files(pid: int) -> list[str]:
    """Return what a process has open."""
    found = []
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was of a moment
            found.append(os.readlink(one))
    return found


def test_what_cannot_be_loaded_does_not_take_over(installed: Installed) -> None:
    """The one that runs goes on, and says so; the next installation is looked at again."""
    installed.start(command=installed.command)
    until(lambda: installed.row()["fingerprint"])
    before, key = installed.version, installed.key()

    installed.install("9.9.8", loads=False)
    until(lambda: "what cannot be loaded; this one goes on" in installed.said(), SECONDS)
    assert (installed.version, installed.key()) == (before, key)

    installed.install("9.9.9")
    until(lambda: installed.version == "9.9.9", SECONDS)
    assert installed.key() == key


def test_a_bad_configuration_is_mended_first(installed: Installed) -> None:
    """The one before it is in use, and the other version would not have it."""
    installed.start(command=installed.command)
    until(lambda: installed.row()["fingerprint"])
    before, key, good = installed.version, installed.key(), installed.file.read_text()
    installed.configure(good + "bogus = 1\n")
    installed.install("9.9.9")
    until(lambda: "what cannot be loaded; this one goes on" in installed.said(), SECONDS)
    assert (installed.version, installed.key()) == (before, key)

    installed.configure(good)
    until(lambda: installed.version == "9.9.9", SECONDS)
    assert installed.key() == key


def test_what_is_under_way_is_finished_first(home: Home, gateway: DevGateway) -> None:
    """Whoever waits for a key that is being minted gets it, and it is the only one."""
    pause = PauseResponse(at_most=5.0)
    with Faults(gateway.url) as faults:
        faults.next(pause, path="/key/generate")
        installed = Installed(home, faults, gateway.master_key)
        try:
            installed.start(command=installed.command, ready=False)
            assert pause.reached.wait(SECONDS)
            answers: list[str] = []
            asked = threading.Thread(target=lambda: answers.append(installed.ask("work")))
            asked.start()
            installed.install("9.9.9")
            until(lambda: "takes over" in installed.said(), SECONDS)
            assert not answers
            until(lambda: installed.version == "9.9.9", SECONDS)
            asked.join()

            assert answers == [f"ok {installed.key()}"]
            assert len(gateway.live_keys()) == 1
        finally:
            installed.stop()


def test_who_has_borrowed_the_lock_has_it_to_the_end(installed: Installed) -> None:
    """A command that is the owner meanwhile is not disturbed."""
    installed.start(command=installed.command)
    until(lambda: installed.row()["fingerprint"])
    before = installed.version
    with closing(wire.watch(installed.socket, "lend")) as lent:
        next(lent)
        installed.install("9.9.9")
        until(lambda: "takes over" in installed.said(), SECONDS)
        time.sleep(1.0)
        assert installed.version == before
        assert paths.owner_lock_is_free(installed.state)

    until(lambda: installed.version == "9.9.9", SECONDS)
    assert installed.key()


def test_a_socket_of_a_service_manager_stays_its_own(installed: Installed) -> None:
    """It was handed down to the first version, and is handed on; nobody removes it."""
    paths.private_directory(installed.socket.parent)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(installed.socket))
        listener.listen(16)
        start = (
            "import os, sys\n"
            f"os.dup2({listener.fileno()}, 3)\n"
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')\n"
            "os.execv(sys.argv[1], sys.argv[1:])\n"
        )
        with open(installed.log, "ab") as log:
            installed.process = subprocess.Popen(
                [sys.executable, "-c", start, *installed.command],
                env=installed.environment,
                stderr=log,
                pass_fds=[listener.fileno()],
            )
    until(lambda: installed.row()["fingerprint"])
    key = installed.key()

    with readers(installed) as answers:
        installed.install("9.9.9")
        until(lambda: installed.version == "9.9.9", SECONDS)
    assert set(answers) == {f"ok {key}"}

    installed.kill(signal.SIGTERM)
    assert installed.socket.exists()
