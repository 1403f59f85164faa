"""The daemon as a service of a user's own systemd, a real one: `keybroker service`."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker.devgateway import DevGateway
from tests.resident import until
from tests.servers.systemd import ROOT, UserManager, build_wheel, user

UNITS = ".config/systemd/user"
KEY = "keybroker-key"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install` installs."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def machine(wheel: Path) -> Iterator[UserManager]:
    """A user's systemd, with keybroker installed for them."""
    with UserManager() as manager:
        manager.install(wheel)
        yield manager


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


class Person:
    """A user who has one profile of a gateway; nothing of theirs was there before."""

    def __init__(self, machine: UserManager, gateway: DevGateway) -> None:
        self.machine = machine
        self.gateway = gateway
        self.shell(
            "rm -rf .config .local .claude .aws admin; mkdir -p -m 700 .config/keybroker .claude"
        )
        self.write("admin", gateway.master_key)
        self.write(".claude/settings.json", "{}\n")
        self.configure()

    def shell(self, text: str, **more: object) -> str:
        """Run what must succeed; return what it printed."""
        return self.machine.do(["sh", "-c", f"umask 077; {text}"], **more)  # type: ignore[arg-type]

    def write(self, name: str, text: str) -> None:
        """Write a file below their HOME."""
        self.shell(f'cat > "{name}.draft"; mv "{name}.draft" "{name}"', stdin=text)

    def configure(self, more: str = "", source: str = "") -> None:
        """Write the configuration: the profile, and whatever else."""
        source = source or f'type = "litellm"\nadmin = {{ file = "{self.machine.home}/admin" }}\n'
        text = f'[profiles.work]\nbase_url = "{self.gateway.url}"\n'
        text += f'[profiles.work.source]\n{source}\n[cache]\nkey = "file"\n{more}'
        self.write(".config/keybroker/config.toml", text)

    def keybroker(self, *arguments: str) -> str:
        """Run a command that must succeed; return what it printed."""
        done = self.machine.keybroker(*arguments)
        assert (done.returncode, done.stderr) == (0, ""), (arguments, done.stdout, done.stderr)
        return done.stdout

    def helper(self, *, program: str = KEY) -> subprocess.CompletedProcess[str]:
        """Ask as Claude Code does."""
        folder = self.machine.home / "app/bin"
        command = [str(folder / program), "-", "work", str(folder / "python")]
        return self.machine.run(command)

    def key(self) -> str:
        """Ask for a key that must come."""
        done = self.helper()
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout.strip()

    def shown(self, *names: str) -> dict[str, str]:
        """Return properties of the service."""
        asked = [f"--property={name}" for name in names]
        found = self.machine.do(["systemctl", "--user", "show", "keybroker.service", *asked])
        return dict(line.split("=", 1) for line in found.splitlines())

    @property
    def pid(self) -> int:
        return int(self.shown("MainPID")["MainPID"])

    def kill(self, signal: str = "KILL") -> None:
        """Send the daemon a signal."""
        self.shell(f"kill -{signal} {self.pid}")

    def systemctl(self, *arguments: str) -> str:
        return self.machine.do(["systemctl", "--user", *arguments])


@pytest.fixture
def person(machine: UserManager, gateway: DevGateway) -> Iterator[Person]:
    one = Person(machine, gateway)
    yield one
    one.keybroker("service", "uninstall")
    one.keybroker("daemon", "--stop")


@pytest.fixture
def served(person: Person) -> Person:
    """One whose daemon is a service."""
    person.keybroker("service", "install")
    return person


def test_it_is_installed_and_proved_and_gone_without_a_trace(person: Person) -> None:
    """The whole of it, twice; all that is left is the state, which holds keys."""
    before = person.shell("find .config")
    for _ in range(2):
        said = person.keybroker("service", "install")
        key = person.key()
        [fingerprint] = [one["fingerprint"] for one in _profiles(person)]
        assert f"tried    work: the helper printed the key {fingerprint}\n" in said
        assert "undo     keybroker service uninstall\n" in said
        state = json.loads(person.keybroker("service", "status", "--json"))
        assert (state["active"], state["enabled"], state["current"]) == ("active", True, True)
        assert state["pid"] == person.pid

        person.keybroker("service", "uninstall")
        assert person.shell("find .config") == before
        assert person.shell("ls $XDG_RUNTIME_DIR").find("keybroker") == -1
        assert "keybroker" not in person.systemctl("list-units", "--all")
        assert person.machine.keybroker("service", "status").returncode == 69
        assert person.gateway.live_keys() == [key]


def _profiles(person: Person) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(person.keybroker("status", "--json"))["profiles"]
    return found


def test_to_install_it_again_changes_nothing(served: Person) -> None:
    pid = served.pid
    assert "wrote" not in served.keybroker("service", "install")
    assert served.pid == pid


def test_a_daemon_in_the_background_makes_room(person: Person) -> None:
    """Its key is handed out by the service."""
    key = person.key()
    assert person.pid == 0

    person.keybroker("service", "install")

    assert person.key() == key
    assert person.pid != 0


def test_systemd_finds_nothing_wrong_and_little_exposed(served: Person) -> None:
    """With the drop-in; what it says to stderr counts, for unknown settings end with 0."""
    units = [f"{UNITS}/keybroker.{kind}" for kind in ("socket", "service")]
    done = served.machine.run(["systemd-analyze", "--user", "verify", *units])
    assert (done.returncode, done.stderr) == (0, "")
    done = served.machine.run(
        ["systemd-analyze", "--user", "security", "--threshold=18", "keybroker.service"]
    )
    assert done.returncode == 0, done.stdout


def test_who_asks_starts_it(served: Person) -> None:
    """Its socket is the system's, and outlives it."""
    key = served.key()
    served.systemctl("stop", "keybroker.service")
    assert served.pid == 0
    assert served.key() == key
    assert served.pid != 0


def test_who_asks_while_it_is_killed_is_answered(served: Person) -> None:
    """Five times, with helpers in flight all the while."""
    key, answers, over = served.key(), list[str](), threading.Event()

    def ask() -> None:
        while not over.is_set():
            done = served.helper()
            answers.append(done.stdout.strip() or done.stderr)

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for one in asking:
        one.start()
    for _ in range(5):
        pid = served.pid
        served.kill()
        until(lambda pid=pid: served.pid not in (0, pid), 20)  # type: ignore[misc]
    over.set()
    for one in asking:
        one.join()

    assert set(answers) == {key}
    assert int(served.shown("NRestarts")["NRestarts"]) == 5


def test_a_daemon_whose_loop_is_stuck_dies_of_it(served: Person) -> None:
    """Its own deadline does what a watchdog would; who asks then is answered."""
    file = served.shell("ls app/lib/python3*/site-packages/keybroker/daemon.py").strip()
    whole = served.shell(f"cat {file}")
    stuck = whole.replace("TURN_SECONDS = 20.0", "TURN_SECONDS = 1.0")
    method = "    def _glance(self, asked: Mapping[str, Any], client: Client) -> Job | None:\n"
    stuck = stuck.replace(method, f"{method}        while True: pass\n")
    assert stuck.count("while True: pass") == stuck.count("TURN_SECONDS = 1.0") == 1
    key = served.key()
    try:
        served.write(file, stuck)
        served.systemctl("restart", "keybroker.service")
        pid = served.pid
        served.machine.keybroker("statusline")
        until(lambda: served.pid not in (0, pid), 20)
        assert served.shown("NRestarts")["NRestarts"] == "1"
        assert served.key() == key
    finally:
        served.write(file, whole)


def test_a_daemon_that_cannot_start_is_explained_and_heals(served: Person) -> None:
    """The helper says why, in time; when it is mended nobody has to do anything."""
    key = served.key()
    served.configure("bogus = 1\n")
    served.kill()
    until(lambda: int(served.shown("NRestarts")["NRestarts"]) >= 2, 20)

    began = time.monotonic()
    done = served.helper()

    assert done.returncode == 78
    assert ".config/keybroker/config.toml:9: cache.bogus: unknown key" in done.stderr
    assert time.monotonic() - began < 10
    served.configure()
    until(lambda: served.shown("ActiveState")["ActiveState"] == "active", 20)
    assert served.key() == key


def test_stop_stops_the_socket_too(served: Person) -> None:
    """Or the next helper would start it; whoever asks for a key starts both again."""
    key = served.key()
    assert served.keybroker("daemon", "--stop") == "stopped\n"
    assert served.pid == 0
    assert served.machine.run(["systemctl", "--user", "is-active", "keybroker.socket"]).stdout == (
        "inactive\n"
    )
    assert served.keybroker("get") == f"{key}\n"
    assert served.pid != 0  # and not one in the background


def test_nobody_else_is_answered(served: Person) -> None:
    """Root comes to the socket, and is turned away; another user does not come so far."""
    place = f"/run/user/{user()[0]}/keybroker/s"
    connect = (
        "import socket, sys\n"
        "one = socket.socket(socket.AF_UNIX)\n"
        "one.settimeout(5)\n"
        f"one.connect({place!r})\n"
        "one.sendall(b'1 get work 0 0\\n')\n"
        "print(one.recv(99))\n"
    )
    inside = [*ROOT, "nsenter", "-t", str(served.machine.pid), "-m", "-p"]
    done = subprocess.run([*inside, sys.executable, "-c", connect], capture_output=True, text=True)
    assert done.stdout in ("b''\n", "") and "ok" not in done.stdout, done
    another = [*inside, "setpriv", "--reuid=65534", "--clear-groups"]
    done = subprocess.run([*another, sys.executable, "-c", connect], capture_output=True, text=True)
    assert "Permission denied" in done.stderr
    assert served.key()
