"""
Claude Code itself after `keybroker connect`, with a real LiteLLM, and after `disconnect`.

Which keys prompts were answered with is read from the recorder in front of LiteLLM.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.resident import Resident, fresh_home, until
from tests.servers.claude import Result, run_claude, start_stream
from tests.servers.litellm import LiteLLM

pytestmark = pytest.mark.servers

KEYBROKER = str(Path(sys.executable).parent / "keybroker")
PONG = Result(0, "pong\n", "")
# Somebody's own: tabs, line ends of two kinds, no end of the last line.
MINE = b'{\r\n\t"cleanupPeriodDays": 30,\n\t"env": { "MY_OWN": "1" }\r\n}'


class User:
    """Somebody in a fresh HOME with a project, whom a version of the client works for."""

    def __init__(self, resident: Resident, litellm: LiteLLM, version: str) -> None:
        self.resident, self.litellm, self.version = resident, litellm, version
        self.home = resident.home.path
        self.project = self.home / "project"
        self.project.mkdir()
        self.settings = self.home / ".claude/settings.json"
        self.more = {
            "XDG_RUNTIME_DIR": resident.environment["XDG_RUNTIME_DIR"],
            "ANTHROPIC_CUSTOM_HEADERS": f"x-session: {self.home.name}",
        }
        admin = self.home / "admin-key"
        admin.touch(0o600)
        admin.write_text(f"{litellm.master_key}\n")
        resident.configure(
            f"""
            [profiles.work]
            base_url = "{litellm.url}"
            helper_ttl = "3s"
            hold = "5s"

            [profiles.work.source]
            type = "litellm"
            admin = {{ file = "{admin}" }}
            lifetime = "15s"
            """
        )

    def type(self, *words: str, **variables: str) -> str:
        """Type a command in the project; it must succeed."""
        done = subprocess.run(
            [KEYBROKER, *words],
            cwd=self.project,
            env={**self.resident.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done
        return done.stdout

    def prompt(self, **variables: str) -> Result:
        """Ask one question in a new client."""
        return run_claude(self.version, self.home, None, env_extra={**self.more, **variables})

    def kill_daemon(self) -> int:
        """Kill it; return who it was."""
        daemon = self.resident.owner()
        assert daemon is not None
        self.resident.stop()
        until(lambda: self.resident.owner() != daemon)
        return daemon

    def keys(self) -> list[str]:
        """The keys with which this user's prompts were answered, in order."""
        found = [
            str(one.key_sha256)
            for one in self.litellm.request_log()
            if (one.method, one.path.split("?")[0]) == ("POST", "/v1/messages")
            and one.status == 200
            and one.session == self.home.name
        ]
        return list(dict.fromkeys(found))

    def is_not_connected(self, **variables: str) -> None:
        """The client has nothing that it could send."""
        answer = self.prompt(**variables)
        assert answer.rc == 1
        assert "Not logged in" in answer.stdout


@pytest.fixture
def user(litellm: LiteLLM, claude_version: str) -> Iterator[User]:
    with fresh_home() as home:
        resident = Resident(home)
        try:
            yield User(resident, litellm, claude_version)
        finally:
            resident.stop()


def test_it_works_survives_rotations_and_leaves_nothing(user: User) -> None:
    """
    One session goes on while keys are replaced under it and while the daemon is killed.

    Another begins with no daemon. Afterwards the file is what it was, and nothing is sent.
    """
    user.settings.parent.mkdir()
    user.settings.write_bytes(MINE)
    user.is_not_connected()

    assert "with the daemon up and down" in user.type("connect")
    with start_stream(user.version, user.home, None, user.more) as session:
        assert not session.ask()["is_error"]
        before = len(user.keys())
        until(lambda: not session.ask()["is_error"] and len(user.keys()) >= before + 2, 40, 0.3)
        killed, asked = user.kill_daemon(), len(user.keys())
        until(lambda: not session.ask()["is_error"] and len(user.keys()) > asked, 40, 0.3)
        assert user.resident.owner() not in (None, killed)
    user.kill_daemon()
    assert user.prompt() == PONG

    assert user.type("disconnect") == f"restored  {user.settings}, byte for byte\n"
    assert user.settings.read_bytes() == MINE
    user.is_not_connected()


def test_a_project_is_connected_and_git_does_not_see_it(user: User) -> None:
    """What it commits stays as it is; another folder is not connected."""
    git = ["git", "-C", str(user.project)]
    subprocess.run([*git, "init", "-q"], check=True, env={"HOME": str(user.home)})
    committed = user.project / ".claude/settings.json"
    committed.parent.mkdir()
    committed.write_bytes(MINE)
    user.type("connect", "--scope", "local")
    local = user.project / ".claude/settings.local.json"
    assert json.loads(local.read_text())["apiKeyHelper"].startswith("exec '")
    status = subprocess.check_output([*git, "status", "--porcelain", "-uall"], text=True)
    assert status == "?? .claude/settings.json\n"
    assert not user.settings.exists()

    assert user.prompt() == PONG
    user.kill_daemon()
    assert user.prompt() == PONG

    user.type("disconnect")
    assert committed.read_bytes() == MINE
    assert [path.name for path in committed.parent.iterdir()] == ["settings.json"]
    user.is_not_connected()


def test_the_folder_that_the_client_is_told_is_connected(user: User) -> None:
    """With CLAUDE_CONFIG_DIR, and only with it."""
    folder = {"CLAUDE_CONFIG_DIR": str(user.home / "conf")}
    user.type("connect", **folder)
    assert user.prompt(**folder) == PONG
    user.is_not_connected()
    user.type("disconnect")
    assert not (user.home / "conf/settings.json").exists()
    user.is_not_connected(**folder)
