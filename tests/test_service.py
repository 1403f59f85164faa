"""The daemon as a service of a user's own systemd, a real one: `keybroker service`."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from keybroker.devgateway import DevGateway
from tests.resident import until
from tests.servers.authority import Authority
from tests.servers.aws import Aws
from tests.servers.plain import Plain
from tests.servers.sso import Sso
from tests.servers.systemd import ROOT, UserManager, build_wheel, user

UNITS = ".config/systemd/user"


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

    def configure(
        self,
        more: str = "",
        *,
        source: str = "",
        url: str = "",
        settings: str = "",
        cache: str = "file",
    ) -> None:
        """Write the configuration: the profile, and whatever else."""
        source = source or f'type = "litellm"\nadmin = {{ file = "{self.machine.home}/admin" }}\n'
        text = f'[profiles.work]\nbase_url = "{url or self.gateway.url}"\n{settings}\n'
        text += f'[profiles.work.source]\n{source}\n[cache]\nkey = "{cache}"\n{more}'
        self.write(".config/keybroker/config.toml", text)

    def keybroker(self, *arguments: str, **variables: str) -> str:
        """Run a command that must succeed; return what it printed."""
        done = self.machine.keybroker(*arguments, **variables)
        assert (done.returncode, done.stderr) == (0, ""), (arguments, done.stdout, done.stderr)
        return done.stdout

    def helper(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """Ask as Claude Code does."""
        folder = self.machine.home / "app/bin"
        command = [str(folder / "keybroker-key"), "-", "work", str(folder / "python")]
        return self.machine.run(command, **variables)

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
    before, keys = person.shell("find .config"), set[str]()
    for _ in range(2):
        said = person.keybroker("service", "install")
        keys.add(person.key())
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
    assert len(keys) == len(person.gateway.live_keys()) == 1


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
    assert ".config/keybroker/config.toml:10: cache.bogus: unknown key" in done.stderr
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


# In its sandbox.


def test_running_sessions_are_told(served: Person) -> None:
    """The settings that a helper named are touched; nothing else of the HOME can be."""
    served.helper(CLAUDE_CODE_API_KEY_HELPER_TTL_MS="60000")
    served.shell("touch -d @1000 .claude/settings.json")
    served.keybroker("rotate", "work")
    until(lambda: served.shell("stat -c %Y .claude/settings.json").strip() != "1000", 10)
    assert _profiles(served) and "not touched" not in served.keybroker("status")


def test_a_folder_that_came_later_is_opened_when_it_is_installed_again(served: Person) -> None:
    """Until then status says that its settings are not touched, and why."""
    served.shell("mkdir other; echo '{}' > other/settings.json; touch -d @1000 other/settings.json")
    other = {"CLAUDE_CONFIG_DIR": f"{served.machine.home}/other"}
    served.helper(CLAUDE_CODE_API_KEY_HELPER_TTL_MS="60000", **other)
    served.keybroker("rotate", "work")
    until(lambda: "on a read-only file system" in served.keybroker("status"), 10)
    assert "has changed since: keybroker service install" in served.keybroker("service", "status")

    served.keybroker("service", "install")
    served.keybroker("rotate", "work")
    until(lambda: served.shell("stat -c %Y other/settings.json").strip() != "1000", 10)
    served.shell("rm -r other")


PROGRAM = """#!{python}
import mmap, pathlib
mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)  # as node does
folder = pathlib.Path.home() / "of-the-program"
(folder / "cache").write_text("seen")
print("sk-of-a-program")
"""


def test_a_program_of_ones_own_may_do_what_it_needs(person: Person) -> None:
    """It makes code at run time; it writes where the configuration lets it, and nowhere else."""
    person.write("program", PROGRAM.format(python=person.machine.python))
    person.shell("chmod 700 program; mkdir -p of-the-program")
    command = f'type = "command"\ncommand = ["{person.machine.home}/program"]'
    person.configure(source=command, settings='verify = "none"')
    done = person.machine.keybroker("service", "install")
    assert done.returncode == 75
    assert "command: program ended with status 1" in done.stderr
    assert person.shell("ls of-the-program") == ""

    person.configure(
        '[service]\nwritable = ["~/of-the-program"]\n', source=command, settings='verify = "none"'
    )
    person.keybroker("service", "install")

    assert person.key() == "sk-of-a-program"
    assert person.shell("cat of-the-program/cache") == "seen"
    person.shell("rm -r program of-the-program")


def test_a_gateway_with_tls(person: Person, tmp_path: Path) -> None:
    """Its authority is one of a file's."""
    authority = Authority(tmp_path)
    person.write("authority.pem", authority.file.read_text())
    with Plain("sk-behind-tls", authority.server()) as gateway:
        person.write("the-key", "sk-behind-tls")
        person.configure(
            source=f'type = "static"\nkey = {{ file = "{person.machine.home}/the-key" }}',
            url=gateway.url,
            settings=f'verify = "message"\nca = "{person.machine.home}/authority.pem"',
        )
        person.keybroker("service", "install")
        assert person.key() == "sk-behind-tls"
        assert [one["verified"] for one in _profiles(person)] == ["message"]


def test_a_sign_in_at_aws_is_renewed_in_its_cache(
    person: Person, aws: Aws, sso: Sso, tmp_path: Path
) -> None:
    """What AWS's own programs read afterwards."""
    name = f"llm/{secrets.token_hex(4)}"
    aws.put(name, "sk-at-aws")
    file = sso.write(tmp_path, lifetime=timedelta(minutes=5))
    place = str(file.relative_to(tmp_path))
    person.shell(f"mkdir -p {Path(place).parent}")
    for one in (".aws/config", place):
        person.write(one, (tmp_path / one).read_text())
    person.configure(
        '[aws]\nprofile = "corp"\n',
        source=f'type = "aws"\nsecret = "{name}"',
        settings='verify = "none"',
    )
    named = {k: v for k, v in sso.environment(tmp_path).items() if k.startswith("AWS_END")}

    person.keybroker("service", "install", AWS_ENDPOINT_URL=aws.url, **named)

    assert person.key() == "sk-at-aws"
    renewed = json.loads(person.shell(f"cat {place}"))
    assert renewed["accessToken"] != json.loads(file.read_text())["accessToken"]


def test_the_keyring_seals_and_is_noticed_when_it_is_unlocked(person: Person) -> None:
    """
    A daemon that began before anybody logged in has a key in memory; no window opens.

    When the keyring is unlocked, it is what seals.
    """
    person.configure(cache="auto")
    with keyring(person.machine) as ring:
        person.keybroker("service", "install")
        assert "kept by      OS keyring" in person.keybroker("status")
        key = person.key()

        ring(locked=True)
        person.systemctl("restart", "keybroker.service")
        assert "keyring: it is locked" in person.keybroker("status")
        fresh = person.key()
        assert fresh != key

        ring(locked=False)
        person.keybroker("reload")
        until(lambda: "kept by      OS keyring" in person.keybroker("status"), 20)


@contextmanager
def keyring(machine: UserManager) -> Iterator[Callable[..., None]]:
    """A real keyring on the user's bus; call what is given to lock or unlock it."""

    def begin(*, locked: bool) -> None:
        machine.run(["systemctl", "--user", "stop", "secrets.service"])
        how = "--start" if locked else "--unlock"
        command = ["systemd-run", "--user", "--collect", "--unit=secrets", "-q"]
        command += [f"-pStandardInput=file:{machine.home}/password", "gnome-keyring-daemon", how]
        machine.do([*command, "--foreground", "--components=secrets"])
        until(owned, 10)

    def owned() -> bool:
        ask = "org.freedesktop.DBus.NameHasOwner"
        asked = ["dbus-send", "--session", "--print-reply", "--dest=org.freedesktop.DBus", "/", ask]
        return "true" in machine.run([*asked, "string:org.freedesktop.secrets"]).stdout

    machine.do(["sh", "-c", "printf a-password > password"])
    begin(locked=False)
    try:
        yield begin
    finally:
        machine.run(["systemctl", "--user", "stop", "secrets.service"])
        machine.do(["sh", "-c", "rm -rf password .local/share/keyrings"])


def test_a_secret_in_a_variable_is_refused(person: Person) -> None:
    """A service would not see it, and no unit may hold it; nothing is written."""
    person.configure(source='type = "litellm"\nadmin = { env = "ADMIN" }')
    done = person.machine.keybroker("service", "install", ADMIN="sk-canary-admin")
    assert done.returncode == 78
    assert "ADMIN: a service does not see" in done.stderr
    assert "canary" not in done.stdout + done.stderr
    assert person.machine.keybroker("service", "status").returncode == 69


def test_another_version_takes_over(served: Person, wheel: Path, tmp_path: Path) -> None:
    """`pip install -U` under a running service: it is the same process, and nobody notices."""
    key, pid, answers, over = served.key(), served.pid, list[str](), threading.Event()

    def ask() -> None:
        while not over.is_set():
            done = served.helper()
            if "bin/keybroker-key': " not in done.stderr:  # while pip replaces it
                answers.append(done.stdout.strip() or done.stderr)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        served.machine.install(newer(wheel, tmp_path))
        until(lambda: "daemon 9.9.9, " in served.keybroker("status"), 20)
    finally:
        over.set()
        asking.join()
        served.machine.install(wheel)

    assert (set(answers), served.pid) == ({key}, pid)
    until(lambda: "daemon 9.9.9, " not in served.keybroker("status"), 20)
    assert (served.key(), served.pid) == (key, pid)


def newer(wheel: Path, folder: Path) -> Path:
    """Make the same wheel of another version."""
    name = f"keybroker-9.9.9-{wheel.name.split('-', 2)[2]}"
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(folder / name, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename == "keybroker/__init__.py":
                data = b'"""."""\n\n__version__ = "9.9.9"\n'
            if info.filename.endswith("/METADATA"):
                data = re.sub(rb"(?m)^Version: .*", b"Version: 9.9.9", data)
            if info.filename.endswith("/RECORD"):
                data = re.sub(rb"(?m)^([^,\n]+),[^\n]*", rb"\1,,", data)
                data = re.sub(rb"keybroker-[0-9.]+\.dist-info", b"keybroker-9.9.9.dist-info", data)
            info.filename = re.sub(
                r"keybroker-[0-9.]+\.(dist-info|data)", r"keybroker-9.9.9.\1", info.filename
            )
            new.writestr(info, data)
    return folder / name
