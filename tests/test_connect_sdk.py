"""The Agent SDK, for Python and for TypeScript, as published: what is printed is what is run."""

from __future__ import annotations

import json
import os
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest

from keybroker import client
from keybroker.connect import agent_sdk
from tests.resident import Resident
from tests.servers import claude
from tests.servers.install import (
    agent_sdk_folder,
    agent_sdk_ts_folder,
    claude_program,
    installed,
)
from tests.servers.litellm import LiteLLM

pytestmark = pytest.mark.servers
ROOT = Path(__file__).parent.parent
OF_SOMEBODY = {"ANTHROPIC_API_KEY": "sk-of-somebody", "ANTHROPIC_AUTH_TOKEN": "sk-of-another"}


class Program:
    """A program of somebody's, with the SDK; the client that it starts is the tests' own."""

    def __init__(self, resident: Resident, litellm: LiteLLM) -> None:
        self.resident, self.litellm = resident, litellm
        self.folder = resident.home.path / "program"
        self.folder.mkdir()
        resident.environment["ADMIN"] = litellm.master_key
        resident.configure(
            f'[profiles.work]\nbase_url = "{litellm.url}"\nheaders = {{ "X-Route" = "eng" }}\n'
            '[profiles.work.source]\ntype = "litellm"\nadmin = { env = "ADMIN" }\n'
        )
        resident.start()
        self.digest = sha256(resident.key("work").encode()).hexdigest()
        self.seen = len(litellm.request_log())
        status, self.text, _ = resident.cli("connect", "agent-sdk")
        assert status == 0

    @property
    def printed(self) -> tuple[str, str]:
        """What is printed for Python and for TypeScript."""
        python, script = self.text.removeprefix("# Python\n\n").split("\n// TypeScript\n\n")
        return python, script

    def environment(self, **more: str) -> dict[str, str]:
        found = claude.environment(self.resident.home.path, self.resident.home.environment)
        variables = {"CLAUDE_AGENT_SDK_SKIP_VERSION_CHECK": "1", "PATH": os.environ["PATH"]}
        return {**found, **variables, **more}

    def python(self, text: str, **more: str) -> str:
        """Run a program in the SDK's environment, with our package beside it."""
        program = str(claude_program(claude.NEWEST))
        text = text.replace("ClaudeAgentOptions(", f"ClaudeAgentOptions(cli_path={program!r}, ")
        python = installed(agent_sdk_folder()) / "bin/python"
        return self.run([str(python), "-c", text], PYTHONPATH=str(ROOT), **more)

    def typescript(self, text: str, **more: str) -> str:
        """Run a script; it has no types beyond what Node reads by itself."""
        program = json.dumps(str(claude_program(claude.NEWEST)))
        text = text.replace(
            "const options = {", f"const options = {{ pathToClaudeCodeExecutable: {program},"
        )
        modules = self.folder / "node_modules"
        if not modules.exists():
            modules.symlink_to(installed(agent_sdk_ts_folder()) / "node_modules")
        file = self.folder / "program.mjs"
        file.write_text(text)
        return self.run(["node", str(file)], **more)

    def run(self, command: list[str], **more: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(**more),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
        )
        return done.stdout.strip() if done.returncode == 0 else f"{done.stdout}{done.stderr}"

    def keys(self) -> set[str | None]:
        """The keys of all prompts until now, as the gateway saw them."""
        log = self.litellm.request_log()[self.seen :]
        return {r.key_sha256 for r in log if r.path.startswith("/v1/messages")}


@pytest.fixture
def program(resident: Resident, litellm: LiteLLM) -> Program:
    return Program(resident, litellm)


def test_python_as_it_is_printed(program: Program) -> None:
    """No settings are loaded, somebody's own keys are set, and the helper's is what is sent."""
    assert program.python(program.printed[0], **OF_SOMEBODY) == "pong"
    assert program.keys() == {program.digest}


def test_typescript_as_it_is_printed(program: Program) -> None:
    """There `env` is all of the environment: what is printed hands ours on."""
    assert program.typescript(program.printed[1], **OF_SOMEBODY) == "pong"
    assert program.keys() == {program.digest}


def test_without_its_settings_nobody_is_logged_in(program: Program) -> None:
    """The programs that are printed do not work by chance."""
    python = program.printed[0].replace('**client.agent_options("work")', "")
    script = program.printed[1].replace("settings: JSON.stringify(settings), ", "")

    assert "Not logged in" in program.python(python)
    assert "Not logged in" in program.typescript(script)
    assert program.keys() == set()


def test_by_default_a_connected_user_is_enough(program: Program) -> None:
    """The user's settings are loaded; nothing is passed."""
    assert program.resident.cli("connect")[0] == 0
    program.seen = len(program.litellm.request_log())
    digest = sha256(program.resident.key("work").encode()).hexdigest()
    python = program.printed[0].replace('setting_sources=[], **client.agent_options("work")', "")
    script = program.printed[1].replace(
        "settingSources: [], settings: JSON.stringify(settings), env", ""
    )

    assert program.python(python) == "pong"
    assert program.typescript(script) == "pong"
    assert program.keys() == {digest}


def test_settings_may_be_a_file(program: Program) -> None:
    """As `settings=` takes a path too."""
    file = program.folder / "settings.json"
    python = program.printed[0].replace(
        '**client.agent_options("work")',
        f'settings={str(file)!r}, env=client.agent_options("work")["env"]',
    )
    file.write_text(client_options(program)["settings"])

    assert program.python(python, **OF_SOMEBODY) == "pong"
    assert program.keys() == {program.digest}


def client_options(program: Program) -> dict[str, str]:
    text = "import json; from keybroker import client; print(json.dumps(client.agent_options()))"
    found: dict[str, str] = json.loads(program.python(text))
    return found


def test_what_is_passed_has_no_key(program: Program) -> None:
    """It is the line of the helper and the variables, and two keys of others out of the way."""
    found = client_options(program)
    settings = json.loads(found["settings"])

    assert settings["apiKeyHelper"].startswith("exec '")
    assert settings["env"] == {
        "ANTHROPIC_BASE_URL": program.litellm.url,
        "CLAUDE_CODE_API_KEY_HELPER_TTL_MS": "60000",
        "ANTHROPIC_CUSTOM_HEADERS": "X-Route: eng",
    }
    assert found["env"] == dict.fromkeys(agent_sdk.INSTEAD, "")
    assert program.resident.key("work") not in json.dumps(found) + program.text


def test_a_profile_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is said as by any other call."""
    from keybroker.errors import ConfigError

    monkeypatch.setenv("KEYBROKER_CONFIG", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no profile"):
        client.agent_options("work")
