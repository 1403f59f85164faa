"""The daemon of a shared host, on a Debian that was booted for it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker.devgateway import DevGateway
from tests.resident import until
from tests.servers.install import DEBIAN
from tests.servers.systemd import Booted, build_wheel

CONFIG = """
[defaults]
base_url = "{url}"
[profiles.work]
users = ["ada"]
[profiles.work.source]
type = "litellm"
admin = {{ credential = "litellm-admin" }}
[profiles.second]
users = ["ben"]
[profiles.second.source]
type = "litellm"
admin = {{ credential = "litellm-admin" }}
{more}
"""


@pytest.fixture(scope="module")
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


class Host(Booted):
    """A shared host: three users, of whom two have a profile."""

    def __init__(self, suite: str, wheel: Path, gateway: DevGateway) -> None:
        super().__init__(suite)
        self.wheel, self.gateway = wheel, gateway

    def furnish(self) -> None:
        """Make the users, and write the configuration; nothing is installed as a service yet."""
        self.install(self.wheel)
        for user in ("ada", "ben", "eve"):
            self.do(["useradd", "-m", user])
        self.do(["mkdir", "-p", "-m", "755", "/etc/keybroker"])
        self.do(["mkdir", "-m", "700", "/etc/keybroker/credentials"])
        self.configure()

    def configure(self, more: str = "") -> None:
        text = CONFIG.format(url=self.gateway.url, more=more)
        self.do(["sh", "-c", "cat > /etc/keybroker/system.toml"], stdin=text)

    def ask(self, user: str, profile: str = "-") -> tuple[int, str, str]:
        """Ask as Claude Code does, with the line that status shows."""
        program = ["/opt/keybroker/bin/keybroker-key", "/run/keybroker/s", profile, self.python]
        done = self.run(program, user=user)
        return done.returncode, done.stdout.strip(), done.stderr

    def key(self, user: str) -> str:
        status, key, said = self.ask(user)
        assert (status, said) == (0, ""), said
        return key

    def said(self, *arguments: str, user: str = "root") -> str:
        """Run a command that must succeed; return what it printed."""
        done = self.keybroker(*arguments, user=user)
        assert (done.returncode, done.stderr) == (0, ""), (arguments, done.stdout, done.stderr)
        return done.stdout


@pytest.fixture(scope="module", params=DEBIAN)
def host(
    request: pytest.FixtureRequest, gateway: DevGateway, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"))
    with Host(request.param, wheel, gateway) as booted:
        booted.furnish()
        yield booted


@pytest.fixture
def served(host: Host) -> Iterator[Host]:
    """With the service; the admin key is a credential that only this host can read."""
    encrypt = ["systemd-creds", "encrypt", "--name=litellm-admin", "-"]
    sealed = "/etc/keybroker/credentials/litellm-admin.cred"
    host.do([*encrypt, sealed], stdin=host.gateway.master_key)
    host.said("service", "install", "--system")
    yield host
    host.said("service", "uninstall", "--system")
    host.do(["rm", "-f", sealed])


def test_without_its_credential_nothing_is_written(host: Host) -> None:
    """It is said how to put it there."""
    done = host.keybroker("service", "install", "--system")
    assert done.returncode == 78
    assert "systemd-creds encrypt --name=litellm-admin - /etc/keybroker/cred" in done.stderr
    assert host.do(["sh", "-c", "find /etc/systemd/system -name 'keybroker*'"]) == ""


def test_each_user_has_their_own_profiles(served: Host) -> None:
    """By the kernel's word; whoever is not named is turned away."""
    ada, ben = served.key("ada"), served.key("ben")
    assert ada != ben
    assert served.ask("ada", "work") == (0, ada, "")
    status, key, said = served.ask("ada", "second")
    assert (status, key) == (78, "")
    assert "no profile 'second'; profiles: work" in said
    done = served.keybroker("get", "--system", user="eve")
    assert (done.returncode, done.stdout) == (69, "")
    assert "the daemon of this shared host does not answer, or not to you" in done.stderr
    assert served.ask("root", "second") == (0, ben, "")


def test_each_user_sees_their_own_and_changes_nothing(served: Host) -> None:
    """Status says that nobody is told of a new key, and what seals; only root may do more."""
    ada = served.said("status", "--system", user="ada")
    assert "work" in ada and "second" not in ada
    assert "not told     sessions of other users" in ada
    assert "kept by      systemd credential" in ada
    for words in (["rotate", "--all"], ["revoke", "--all"], ["reload"]):
        done = served.keybroker(*words, "--system", user="ada")
        assert done.returncode == 77, done
        assert "only root may ask" in done.stderr
    key = served.key("ada")
    served.said("rotate", "--system", "work")
    assert served.key("ada") != key


def test_its_keys_outlive_it_and_the_socket_waits(served: Host) -> None:
    """Killed, stopped and started: the sealed keys are there, and who asks is answered."""
    ada = served.key("ada")
    pid = served.do(["systemctl", "show", "keybroker", "-P", "MainPID"]).strip()
    served.do(["kill", "-KILL", pid])
    assert served.key("ada") == ada
    served.do(["systemctl", "stop", "keybroker.service"])
    assert served.key("ada") == ada
    again = served.do(["systemctl", "show", "keybroker", "-P", "MainPID"]).strip()
    assert again not in ("0", pid)


def test_nobody_comes_to_its_files_or_its_secrets(served: Host) -> None:
    """State, credentials, environment, memory."""
    pid = served.do(["systemctl", "show", "keybroker", "-P", "MainPID"]).strip()
    for place in (
        "/var/lib/keybroker/",
        "/etc/keybroker/credentials/",
        "/run/keybroker-daemon/",
        f"/proc/{pid}/environ",
        f"/proc/{pid}/fd/",
    ):
        done = served.run(["sh", "-c", f"ls {place}* && cat {place}"], user="ada")
        assert done.returncode != 0 and "denied" in done.stderr, (place, done)
    log = served.do(["journalctl", "-u", "keybroker", "--no-pager"])
    known = [served.gateway.master_key, served.key("ada"), served.key("ben")]
    assert not [one for one in known if one in log]


def test_systemd_finds_nothing_wrong_and_little_exposed(served: Host) -> None:
    """With the drop-in; what it says to stderr counts, for unknown settings end with 0."""
    done = served.run(["systemd-analyze", "verify", "keybroker.service", "keybroker.socket"])
    assert (done.returncode, done.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--threshold=13", "keybroker.service"]
    done = served.run(command)
    assert done.returncode == 0, done.stdout


def test_a_bad_configuration_is_explained_and_mended(served: Host) -> None:
    """Root is told file and line; nothing is started over and over meanwhile."""
    ada = served.key("ada")
    served.configure("[profiles.work.bogus]\n")
    served.do(["systemctl", "restart", "keybroker.socket"])
    served.run(["systemctl", "restart", "keybroker.service"])

    status, key, said = served.ask("root", "work")
    assert (status, key) == (78, "")
    assert "/etc/keybroker/system.toml:" in said and "bogus: unknown key" in said
    before = _restarts(served)
    served.do(["sleep", "3"])
    assert _restarts(served) - before <= 3

    served.configure()
    until(lambda: served.ask("ada")[1] == ada, 20)


def _restarts(host: Host) -> int:
    return int(host.do(["systemctl", "show", "keybroker", "-P", "NRestarts"]))


def test_who_is_named_later_is_answered_then(served: Host) -> None:
    """The configuration is read again by itself."""
    assert served.ask("eve")[0] != 0
    extra = f"""
[profiles.{(name := "e" + secrets.token_hex(2))}]
users = ["eve", "nobody-of-this-name"]
[profiles.{name}.source]
type = "litellm"
admin = {{ credential = "litellm-admin" }}
"""
    served.configure(extra)
    until(lambda: served.ask("eve", name)[0] == 0, 20)
    log = served.do(["journalctl", "-u", "keybroker", "--no-pager"])
    assert f"profiles.{name}.users: nobody is called 'nobody-of-this-name'" in log
    served.configure()
    until(lambda: served.ask("eve", name)[0] != 0, 20)
    state = json.loads(served.said("service", "status", "--system", "--json"))
    assert (state["active"], state["current"], state["restarts"]) == ("active", True, 0)


def test_a_user_s_own_service_runs_before_anybody_logs_in(host: Host) -> None:
    """With linger, by this systemd's own user manager; killed, it is there again."""
    uid = host.do(["id", "-u", "ben"]).strip()
    variables = {"HOME": "/home/ben", "XDG_RUNTIME_DIR": f"/run/user/{uid}"}

    def ben(*command: str, stdin: str = "") -> str:
        return host.do(command, user="ben", variables=variables, stdin=stdin)

    host.do(["loginctl", "enable-linger", "ben"])
    until(lambda: host.run(["test", "-S", f"/run/user/{uid}/bus"]).returncode == 0, 20)
    ben("mkdir", "-p", "-m", "700", "/home/ben/.config/keybroker")
    ben("sh", "-c", "umask 077; cat > /home/ben/admin", stdin=host.gateway.master_key)
    config = (
        f'[profiles.mine]\nbase_url = "{host.gateway.url}"\n[profiles.mine.source]\n'
        'type = "litellm"\nadmin = { file = "~/admin" }\n[cache]\nkey = "file"\n'
    )
    ben("sh", "-c", "cat > /home/ben/.config/keybroker/config.toml", stdin=config)

    said = ben("/opt/keybroker/bin/keybroker", "service", "install")

    assert "from each boot on (linger)" in said
    helper = ["/opt/keybroker/bin/keybroker-key", "-", "mine", host.python]
    key = ben(*helper)
    ben("sh", "-c", "kill -KILL $(systemctl --user show keybroker -P MainPID)")
    assert ben(*helper) == key
    units = [f"/home/ben/.config/systemd/user/keybroker.{kind}" for kind in ("socket", "service")]
    done = host.run(
        ["systemd-analyze", "--user", "verify", *units], user="ben", variables=variables
    )
    assert (done.returncode, done.stderr) == (0, "")
    ben("systemd-analyze", "--user", "security", "--threshold=18", "keybroker.service")
    ben("/opt/keybroker/bin/keybroker", "service", "uninstall")
    host.do(["loginctl", "disable-linger", "ben"])
