"""From nothing to a working profile: by questions on a terminal, and by flags without one."""

from __future__ import annotations

import json
import os
import pty
import re
import secrets
import select
import stat
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from keybroker.cli.draft import Draft, File
from keybroker.credential import fingerprint
from keybroker.devgateway import DevGateway
from keybroker.errors import ConfigError
from tests.conftest import Home
from tests.resident import Resident
from tests.servers.aws import REGION, Aws, allow
from tests.servers.faults import refused_url
from tests.servers.keyring import Keyring
from tests.servers.litellm import LiteLLM
from tests.servers.vault import OpenBao
from tests.test_recognise import OLLAMA, Site

COMMAND = [sys.executable, "-c", "from keybroker.cli import main; main()"]
# `getpass` wants a terminal of its own, which a session's leader takes; and whoever started the
# tests may have Ctrl-C ignored.
ON_A_TERMINAL = (
    "import fcntl, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from keybroker.cli import main; main()"
)
SECONDS = 30


class User:
    """Somebody without a configuration; `keybroker` is run as they do."""

    def __init__(self, home: Home) -> None:
        self.home = home.path
        self.environment = dict(home.environment)
        self.file = home.path / ".config/keybroker/config.toml"
        self.resident = Resident(home)
        self.file.parent.rmdir()  # of which the one above made the last folder
        self.secrets: list[str] = []

    def run(self, *arguments: str, stdin: str = "", **more: str) -> tuple[int, str, str]:
        """Run a command without a terminal; return its status, stdout and stderr."""
        assert not [one for one in self.secrets if one in " ".join(arguments)]
        done = subprocess.run(
            [*COMMAND, *arguments],
            env={**self.environment, **more},
            cwd=self.home,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        self.check(done.stderr + (done.stdout if arguments[0] != "get" else ""))
        return done.returncode, done.stdout, done.stderr

    def init(self, *arguments: str, stdin: str = "", **more: str) -> tuple[int, str, str]:
        return self.run("init", *arguments, stdin=stdin, **more)

    def check(self, said: str) -> None:
        """Nothing that was said or written has a secret in it, and there was no traceback."""
        assert "Traceback" not in said
        for one in self.secrets:
            assert one not in said
            assert not self.file.exists() or one not in self.file.read_text()

    def config(self) -> dict[str, Any]:
        return tomllib.loads(self.file.read_text())

    def write(self, name: str, text: str, mode: int = 0o600) -> Path:
        path = self.home / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode)
        path.write_text(text)
        return path


class Terminal:
    """A command on a terminal of its own, answered as a person does."""

    def __init__(self, user: User, *arguments: str) -> None:
        ours, theirs = pty.openpty()
        self._ours, self._user, self.said = ours, user, ""
        self._answered = 0  # so much of what was said
        self._process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, *arguments],
            env={**user.environment, "TERM": "dumb", "NO_COLOR": "1"},
            cwd=user.home,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def answer(self, question: str, text: str) -> None:
        """Wait for a question that was not answered yet, and type."""
        self._until(question)
        self._answered = len(self.said)
        os.write(self._ours, f"{text}\n".encode())

    def interrupt(self, question: str) -> int:
        """Press Ctrl-C at a question, again where it came before anybody read; the status."""
        self._until(question)
        for _ in range(SECONDS):
            os.write(self._ours, b"\x03")
            with suppress(subprocess.TimeoutExpired):
                return self._process.wait(2)
        raise AssertionError("Ctrl-C ends nothing")

    def end(self) -> int:
        """Wait for the end; return the status."""
        self._until(None)
        self._user.check(self.said)
        return self._process.wait(SECONDS)

    def _until(self, text: str | None) -> None:
        ends = time.monotonic() + SECONDS
        while text is None or text not in self.said[self._answered :]:
            assert time.monotonic() < ends, self.said
            if not select.select([self._ours], [], [], 1)[0]:
                continue
            try:
                piece = os.read(self._ours, 4096).decode(errors="replace")
            except OSError:  # it ended
                piece = ""
            if not piece:
                assert text is None, f"{text!r} was not asked:\n{self.said}"
                return
            self.said += piece


@pytest.fixture
def user(home: Home) -> Iterator[User]:
    made = User(home)
    yield made
    made.resident.stop()


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as one:
        yield one


@pytest.fixture
def admin(user: User, gateway: DevGateway) -> str:
    """The admin key in a file, as `--admin` has it."""
    user.secrets.append(gateway.master_key)
    return f"file:{user.write('admin-key', gateway.master_key)}"


def minted(gateway: DevGateway) -> str:
    """Make a key at the gateway, as its administrator does for somebody."""
    headers = {"authorization": f"Bearer {gateway.master_key}", "content-type": "application/json"}
    request = urllib.request.Request(f"{gateway.url}/key/generate", b"{}", headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(json.load(answer)["key"])


def live(gateway: DevGateway) -> list[str]:
    return [key.token[:8] for key in gateway.live_keys()]


# By flags


def test_flags_make_a_working_profile(user: User, gateway: DevGateway, admin: str) -> None:
    """The address of OpenAI's clients is understood; what is printed is the key's fingerprint."""
    status, stdout, stderr = user.init(
        "--base-url", f"{gateway.url}/v1", "--source", "litellm", "--admin", admin
    )
    assert (status, stderr) == (0, "")
    [key] = live(gateway)
    assert f"key       {key}, verified by models, ends in 1" in stdout
    assert f"address   {gateway.url}, for what was {gateway.url}/v1" in stdout
    assert stdout.endswith("next      keybroker connect --profile work\n")
    assert user.config() == {
        "cache": {"key": "file"},  # there is no keyring here
        "profiles": {
            "work": {
                "base_url": gateway.url,
                "source": {"type": "litellm", "admin": {"file": admin.removeprefix("file:")}},
            }
        },
    }
    assert stat.S_IMODE(user.file.stat().st_mode) == 0o600
    assert stat.S_IMODE(user.file.parent.stat().st_mode) == 0o700
    assert fingerprint(user.run("get", "work")[1].strip()) == key


def test_a_second_profile_leaves_every_byte_of_the_first(
    user: User, gateway: DevGateway, admin: str
) -> None:
    """Comments, odd line ends, a missing last one; the daemon that runs takes it at once."""
    before = f'# mine\r\n[cache]\r\nkey = "file"\r\n[profiles.a]\r\nbase_url = "{gateway.url}"\r\n'
    before += f'source = {{ type = "litellm", admin = {{ file = "{admin[5:]}" }} }} # end'
    user.write(".config/keybroker/config.toml", "").write_bytes(before.encode())
    user.resident.start()
    status, stdout, stderr = user.init(
        *("--base-url", gateway.url, "--source", "litellm", "--admin", admin, "--profile", "b"),
        *("--set", "source.lifetime=8h", "--set", "source.models=claude-a,claude-b"),
        *("--set", "claude.haiku=claude-haiku", "--set", "claude.max_output_tokens=64000"),
        *("--set", "headers.X-Org=eng", "--json"),
    )
    assert (status, stderr) == (0, "")
    data = user.file.read_bytes().decode()
    assert data.startswith(before + "\r\n")
    assert "\n" not in data.replace("\r\n", "")
    profile = user.config()["profiles"]["b"]
    assert profile["source"] == {
        "type": "litellm",
        "admin": {"file": admin[5:]},
        "lifetime": "8h",
        "models": ["claude-a", "claude-b"],
    }
    assert profile["claude"] == {"haiku": "claude-haiku", "max_output_tokens": 64000}
    assert profile["headers"] == {"X-Org": "eng"}
    told = json.loads(stdout)
    assert told["key"]["fingerprint"] in live(gateway)
    assert [step["ok"] for step in told["steps"]] == [True] * 7
    assert told["gateway"]["kind"] == "litellm"


@pytest.mark.servers
def test_a_key_from_stdin_goes_into_the_keyring(
    user: User, litellm: LiteLLM, keyring_session: Keyring
) -> None:
    """A real LiteLLM, a real keyring: the admin key is nowhere else."""
    user.environment.update(keyring_session.environment)
    user.secrets.append(litellm.master_key)
    status, stdout, stderr = user.init(
        *("--base-url", f"{litellm.url}/v1", "--source", "litellm", "--admin", "-"),
        *("--profile", "flags"),
        stdin=f"{litellm.master_key}\n",
    )
    assert (status, stderr) == (0, "")
    profile = user.config()["profiles"]["flags"]
    assert profile["base_url"] == litellm.url
    assert profile["source"]["admin"] == {"keyring": "flags-admin"}
    assert "cache" not in user.config()
    assert "key       " in stdout
    assert litellm.master_key.encode() not in b"".join(
        path.read_bytes() for path in user.home.rglob("*") if path.is_file()
    )
    assert len(user.run("get", "flags")[1]) > 20


def test_a_key_from_stdin_without_a_keyring_goes_into_a_file(
    user: User, gateway: DevGateway
) -> None:
    """Beside the configuration, of mode 0600, and it is said."""
    user.secrets.append(gateway.master_key)
    status, stdout, _ = user.init(
        *("--base-url", gateway.url, "--source", "litellm", "--admin", "-"),
        stdin=gateway.master_key,
    )
    path = user.file.with_name("work-admin")
    assert status == 0
    assert f"as file:{path}" in stdout
    assert "there is no keyring service here" in stdout
    assert user.config()["profiles"]["work"]["source"]["admin"] == {"file": str(path)}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_placeholder_keeps_nothing(user: User) -> None:
    """Where no key is checked nothing has to be sealed."""
    with Site(OLLAMA) as gateway:
        status, stdout, stderr = user.init(
            *("--base-url", gateway.url, "--source", "static", "--placeholder", "ollama")
        )
        user.resident.stop()
    assert (status, stderr) == (0, "")
    assert "gateway   Ollama, which checks no key" in stdout
    assert user.config() == {
        "profiles": {
            "work": {
                "base_url": gateway.url,
                "source": {"type": "static", "placeholder": "ollama"},
            }
        }
    }
    assert f"key       {fingerprint('ollama')}, " in stdout


def test_a_program_prints_the_key(user: User, gateway: DevGateway) -> None:
    """`--command` is split as a shell does, and run by none."""
    path = user.write("a key", minted(gateway))
    user.secrets.append(path.read_text())
    status, _, stderr = user.init(
        *("--base-url", gateway.url, "--source", "command", "--command", f"cat '{path}'")
    )
    assert (status, stderr) == (0, "")
    source = user.config()["profiles"]["work"]["source"]
    assert source == {"type": "command", "command": ["cat", str(path)]}


@pytest.mark.servers
def test_a_key_in_vault(user: User, gateway: DevGateway, openbao: OpenBao) -> None:
    """Where it is, which one, and how to log in: a real OpenBao."""
    key = minted(gateway)
    user.secrets += [key, openbao.token]
    openbao.do("PUT", "sys/mounts/init", {"type": "kv", "options": {"version": "2"}})
    openbao.do("PUT", "init/data/llm", {"data": {"key": key}})
    user.write("token", openbao.token)
    status, stdout, stderr = user.init(
        *("--base-url", gateway.url, "--source", "vault", "--path", "init/data/llm"),
        *("--address", openbao.url, "--auth", "token", "--set", "vault.auth.token=file:token"),
    )
    assert (status, stderr) == (0, "")
    assert user.config()["vault"] == {
        "address": openbao.url,
        "auth": {"method": "token", "token": {"file": str(user.home / "token")}},
    }
    assert f"key       {fingerprint(key)}, verified by models" in stdout


@pytest.mark.servers
def test_a_key_at_aws(user: User, gateway: DevGateway, aws: Aws) -> None:
    """Who asks is found as AWS's own programs do; the region can be said."""
    key = minted(gateway)
    name = f"llm/{secrets.token_hex(4)}"
    aws.put(name, json.dumps({"key": key}))
    keys = aws.user(f"init-{secrets.token_hex(4)}", allow("secretsmanager:*"))
    user.secrets += [key, keys.secret_key]
    user.environment |= {"AWS_ENDPOINT_URL": aws.url, "AWS_EC2_METADATA_DISABLED": "true"}
    text = f"aws_access_key_id = {keys.access_key}\naws_secret_access_key = {keys.secret_key}\n"
    user.write(".aws/credentials", f"[eng]\n{text}")
    status, stdout, stderr = user.init(
        *("--base-url", gateway.url, "--source", "aws", "--secret", name, "--field", "/key"),
        *("--region", REGION, "--aws-profile", "eng"),
    )
    assert (status, stderr) == (0, "")
    source = user.config()["profiles"]["work"]["source"]
    assert source == {
        "type": "aws",
        "secret": name,
        "field": "/key",
        "region": REGION,
        "profile": "eng",
    }
    assert f"key       {fingerprint(key)}, verified by models" in stdout


def test_a_dry_run_prints_and_changes_nothing(user: User, gateway: DevGateway, admin: str) -> None:
    """What is on stdout is what would be added; no key is made."""
    status, stdout, _ = user.init(
        *("--base-url", gateway.url, "--source", "litellm", "--admin", admin, "--dry-run")
    )
    assert status == 0
    assert tomllib.loads(stdout)["profiles"]["work"]["base_url"] == gateway.url
    assert not user.file.exists()
    assert live(gateway) == []


def test_a_dry_run_has_the_reference_of_the_real_run(user: User, gateway: DevGateway) -> None:
    """Without a keyring a file, under a name that is free; nothing is kept yet."""
    user.secrets.append(gateway.master_key)
    user.write(".config/keybroker/work-admin", "another\n")
    arguments = ("--base-url", gateway.url, "--source", "litellm", "--admin", "-")
    status, stdout, _ = user.init(*arguments, "--dry-run", stdin=gateway.master_key)
    assert status == 0
    assert user.init(*arguments, stdin=gateway.master_key)[0] == 0
    admin = tomllib.loads(stdout)["profiles"]["work"]["source"]["admin"]
    assert admin == user.config()["profiles"]["work"]["source"]["admin"]
    assert admin["file"].endswith("/work-admin-2")


def test_without_a_look_nothing_is_asked(user: User) -> None:
    """`--no-check` is for a gateway that is not there yet."""
    status, stdout, stderr = user.init(
        *("--base-url", f"{refused_url()}/v1", "--source", "litellm", "--admin", "env:ADMIN"),
        "--no-check",
    )
    assert (status, stderr) == (0, "")
    assert not user.config()["profiles"]["work"]["base_url"].endswith("/v1")
    assert "next      keybroker connect" in stdout


def test_connect_follows_if_it_is_asked_for(user: User, gateway: DevGateway, admin: str) -> None:
    """`--connect` writes Claude Code's settings, and tries the helper."""
    status, stdout, _ = user.init(
        *("--base-url", gateway.url, "--source", "litellm", "--admin", admin, "--connect", "--json")
    )
    assert status == 0
    assert json.loads(stdout)["connected"] is True
    settings = json.loads((user.home / ".claude/settings.json").read_text())
    assert settings["env"]["ANTHROPIC_BASE_URL"] == gateway.url
    assert "keybroker" in settings["apiKeyHelper"]


# What stands in the way

MISSING = {
    (): "--base-url",
    ("--base-url", "URL"): "--source",
    ("--base-url", "URL", "--source", "litellm"): "--admin",
    ("--base-url", "URL", "--source", "static"): "--key",
    ("--base-url", "URL", "--source", "command"): "--command",
    ("--base-url", "URL", "--source", "vault"): "--path",
    ("--base-url", "URL", "--source", "vault", "--path", "a/b"): "--address",
    ("--base-url", "URL", "--source", "vault", "--path", "a/b", "--address", "URL"): "--auth",
    ("--base-url", "URL", "--source", "aws"): "--secret",
}


@pytest.mark.parametrize("given", MISSING)
def test_without_a_terminal_what_is_missing_is_named(
    user: User, gateway: DevGateway, given: tuple[str, ...]
) -> None:
    """No question is asked, and nothing is written."""
    arguments = [gateway.url if word == "URL" else word for word in given]
    if "vault" in arguments:
        arguments += ["--field", "key"]
    status, _, stderr = user.init(*arguments)
    assert status == 2
    assert f"{MISSING[given]} is missing, and there is no terminal to ask at" in stderr
    assert not user.file.exists()


WRONG = {
    "localhost:8766": (78, "has no http:// before it", "--base-url http://localhost:8766"),
    "http://10.1.2.3:4000": (78, "would send keys in clear", "--allow-http"),
    "sk-geheim": (78, "looks like a key", "--base-url"),
}


@pytest.mark.parametrize("url", WRONG)
def test_an_address_that_would_brick_it_is_refused(user: User, url: str) -> None:
    """Before anything is asked or written."""
    code, message, hint = WRONG[url]
    status, stdout, stderr = user.init("--base-url", url, "--source", "static", "--key", "env:A")
    assert (status, stdout) == (code, "")
    assert message in stderr
    assert hint in stderr
    assert "geheim" not in stderr
    assert not user.file.exists()


def test_nobody_at_the_address(user: User) -> None:
    """Try again: 75."""
    url = refused_url()
    status, _, stderr = user.init("--base-url", url, "--source", "static", "--key", "env:A")
    assert status == 75
    assert "could not be reached" in stderr
    assert not user.file.exists()


def test_a_profile_that_is_there_stays(user: User) -> None:
    """File and line are named, and another name."""
    text = '\n\n[profiles.work]\nbase_url = "https://llm.example.com"\n'
    text += '[profiles.work.source]\ntype = "static"\nplaceholder = "x"\n'
    user.write(".config/keybroker/config.toml", text)
    status, _, stderr = user.init("--base-url", "https://x.example.com", "--source", "static")
    assert status == 78
    assert f"{user.file}:3: profiles.work: is there already" in stderr
    assert "hint: --profile work-2" in stderr
    assert user.file.read_text() == text


def test_a_broken_configuration_is_mended_first(user: User) -> None:
    """It is said where, and not touched."""
    user.write(".config/keybroker/config.toml", "[profiles.a]\nbase_url = geheim\n")
    status, _, stderr = user.init("--base-url", "https://x.example.com", "--source", "static")
    assert status == 78
    assert f"{user.file}:2: " in stderr
    assert "geheim" not in stderr


@pytest.mark.parametrize("key", ["-", "file"])
def test_a_check_that_fails_leaves_nothing(user: User, gateway: DevGateway, key: str) -> None:
    """No configuration, no copy of the key, no key at the gateway; and it is said."""
    wrong = "sk-wrong-c8a1b2f0"
    user.secrets.append(wrong)
    given = "-" if key == "-" else f"file:{user.write('admin-key', wrong)}"
    status, stdout, stderr = user.init(
        *("--base-url", gateway.url, "--source", "litellm", "--admin", given), stdin=wrong
    )
    assert status == 77
    assert "failed  issue" in stdout
    assert "nothing was written" in stderr
    where = "give another key; this one was kept nowhere" if key == "-" else f"({given})"
    assert where in stderr.partition("hint: ")[2]  # no file is named that is gone by now
    assert not user.file.exists()
    assert list(user.home.rglob("work-admin*")) == []
    assert live(gateway) == []


@pytest.mark.servers
def test_a_check_that_fails_leaves_nothing_in_the_keyring(
    user: User, gateway: DevGateway, keyring_session: Keyring
) -> None:
    """What was put there for the check is taken out again."""
    user.environment.update(keyring_session.environment)
    user.secrets.append("sk-wrong-c8a1b2f0")
    arguments = ("--base-url", gateway.url, "--source", "litellm", "--admin", "-")
    arguments += ("--profile", "failing")
    assert user.init(*arguments, stdin="sk-wrong-c8a1b2f0")[0] == 77
    user.secrets.append(gateway.master_key)
    status, stdout, _ = user.init(*arguments, stdin=gateway.master_key)
    assert status == 0
    assert "as keyring:failing-admin\n" in stdout  # the name is free


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("source.lifetime=1m", "profiles.work.source.lifetime: 1m is less than three times"),
        ("source.lifetim=8h", "profiles.work.source.lifetim: unknown key; did you mean lifetime?"),
        ("nonsense", "--set: expected a key and a value"),
        ("claude.haiku.x=1", "haiku: expected text"),
        ("cache.key=drawer", "cache.key: expected one of auto"),
    ],
)
def test_a_setting_that_is_wrong_is_named(
    user: User, gateway: DevGateway, admin: str, setting: str, says: str
) -> None:
    """By its key: there is no line of a file yet."""
    status, _, stderr = user.init(
        *("--base-url", gateway.url, "--source", "litellm", "--admin", admin, "--set", setting)
    )
    assert status == 78
    assert says in stderr
    assert str(user.file) not in stderr
    assert not user.file.exists()


def test_a_flag_of_another_source_is_refused(user: User, gateway: DevGateway, admin: str) -> None:
    """It would be left out without a word."""
    status, _, stderr = user.init(
        *("--base-url", gateway.url, "--source", "static", "--key", "env:A", "--admin", admin)
    )
    assert status == 2
    assert "--admin is not for --source static" in stderr


def test_what_the_organisation_has_set_stands_in_the_way(
    user: User, gateway: DevGateway, admin: str
) -> None:
    """It is named first; `--force` goes on."""
    arguments = ("--base-url", gateway.url, "--source", "litellm", "--admin", admin)
    settings = {"forceLoginMethod": "claudeai", "env": {"ANTHROPIC_AUTH_TOKEN": "sk-geheim"}}
    path = user.write(".claude/remote-settings.json", json.dumps(settings))
    status, stdout, stderr = user.init(*arguments)
    assert status == 78
    assert "geheim" not in stdout + stderr
    assert f"managed   {path}: forceLoginMethod = claudeai, env.ANTHROPIC_AUTH_TOKEN" in stdout
    assert "your organisation has set forceLoginMethod" in stderr
    assert "--force" in stderr
    assert not user.file.exists()
    assert user.init(*arguments, "--force")[0] == 0


def test_a_daemon_that_cannot_start_is_said_after_all_was_written(
    user: User, gateway: DevGateway, admin: str
) -> None:
    """The profile holds; the error says so, and what to type."""
    folder = user.home / "run/keybroker"
    folder.mkdir()
    folder.chmod(0o755)
    status, _, stderr = user.init(
        *("--base-url", gateway.url, "--source", "litellm", "--admin", admin)
    )
    assert status == 78
    assert "the profile works and is written; there is no key yet" in stderr
    assert "keybroker get work" in stderr
    folder.chmod(0o700)
    assert user.run("get", "work")[0] == 0


# A key that was pasted


@pytest.fixture
def pasted(user: User, gateway: DevGateway) -> str:
    """A key of the gateway in Claude Code's settings and in a shell's profile."""
    key = minted(gateway)
    user.secrets.append(key)
    settings = {"model": "opus", "env": {"ANTHROPIC_AUTH_TOKEN": key, "OTHER": "1"}}
    user.write(".claude/settings.json", json.dumps(settings, indent=2))
    user.write(".bashrc", f"A=1\nexport ANTHROPIC_AUTH_TOKEN={key}\nB=2\n", 0o644)
    return key


def test_a_pasted_key_is_moved_once_it_works(user: User, gateway: DevGateway, pasted: str) -> None:
    """It is kept and handed out first; then it goes out of both files, and nothing else does."""
    status, stdout, stderr = user.init("--base-url", gateway.url, "--adopt-token")
    assert (status, stderr) == (0, "")
    assert user.file.with_name("work-key").read_text() == f"{pasted}\n"
    settings = json.loads((user.home / ".claude/settings.json").read_text())
    assert settings == {"model": "opus", "env": {"OTHER": "1"}}
    assert (user.home / ".bashrc").read_text() == "A=1\nB=2\n"
    assert stdout.count("moved     ANTHROPIC_AUTH_TOKEN out of") == 2
    assert user.run("get", "work")[1] == f"{pasted}\n"
    for path in user.home.rglob("*"):
        if path.is_file() and path.name not in ("work-key",):
            assert pasted.encode() not in path.read_bytes(), path


@pytest.mark.servers
def test_a_pasted_key_goes_into_the_keyring(
    user: User, gateway: DevGateway, pasted: str, keyring_session: Keyring
) -> None:
    """And is in no file any more."""
    user.environment.update(keyring_session.environment)
    arguments = ("--base-url", gateway.url, "--adopt-token", "--profile", "pasted")
    assert user.init(*arguments)[0] == 0
    source = user.config()["profiles"]["pasted"]["source"]
    assert source == {"type": "static", "key": {"keyring": "pasted-key"}}
    for path in user.home.rglob("*"):
        assert not path.is_file() or pasted.encode() not in path.read_bytes(), path


def test_a_dry_run_says_which_keys_would_be_moved(
    user: User, gateway: DevGateway, pasted: str
) -> None:
    """And moves none."""
    status, _, stderr = user.init("--base-url", gateway.url, "--adopt-token", "--dry-run")
    assert status == 0
    assert stderr.count("would     take ANTHROPIC_AUTH_TOKEN out of ") == 2
    assert pasted in (user.home / ".bashrc").read_text()


def test_a_wrong_address_is_said_before_anything_else(user: User, pasted: str) -> None:
    """It is what has to be typed anew."""
    status, stdout, stderr = user.init("--base-url", "localhost:8766", "--source", "litellm")
    assert (status, stdout) == (78, "")
    assert "http://localhost:8766" in stderr


def test_hints_name_what_is_typed(user: User, gateway: DevGateway) -> None:
    """There is no configuration yet that they could be about."""
    user.write("admin-key", "sk-nobody-has-this-0c6f2f1d\n")
    arguments = ("--base-url", gateway.url, "--source", "litellm", "--admin", "file:admin-key")
    status, _, stderr = user.init(*arguments)
    assert status == 77
    assert "hint: see --admin (" in stderr


def test_a_pasted_key_that_does_not_work_stays(user: User, gateway: DevGateway) -> None:
    """Nothing is moved for a profile that was not written."""
    text = "export ANTHROPIC_AUTH_TOKEN=sk-nobody-has-this-0c6f2f1d\n"
    user.write(".bashrc", text)
    user.secrets.append("sk-nobody-has-this-0c6f2f1d")
    status, _, stderr = user.init("--base-url", gateway.url, "--adopt-token")
    assert status == 77
    assert "refused" in stderr
    assert (user.home / ".bashrc").read_text() == text
    assert not user.file.exists()
    assert list(user.home.rglob("work-key*")) == []


def test_a_pasted_key_that_is_not_moved_is_named(
    user: User, gateway: DevGateway, admin: str, pasted: str
) -> None:
    """It would beat the helper."""
    status, stdout, _ = user.init(
        *("--base-url", gateway.url, "--source", "litellm", "--admin", admin)
    )
    assert status == 0
    assert f"{user.home}/.bashrc:2: ANTHROPIC_AUTH_TOKEN" in stdout
    assert "Claude Code prefers it to keybroker's" in stdout
    assert pasted in (user.home / ".bashrc").read_text()


# On a terminal


@pytest.mark.servers
def test_questions_lead_to_a_working_profile(
    user: User, litellm: LiteLLM, keyring_session: Keyring
) -> None:
    """A wrong address is explained and asked for again; the key is not shown."""
    user.environment.update(keyring_session.environment)
    user.secrets.append(litellm.master_key)
    with Terminal(user, "init", "--profile", "asked") as terminal:
        terminal.answer("Address of the gateway", litellm.url.removeprefix("http://"))
        terminal.answer("Address of the gateway", f"{litellm.url}/v1")
        terminal.answer("Source [litellm]", "")
        terminal.answer("Admin key of the gateway (not shown", litellm.master_key)
        terminal.answer("Connect Claude Code to it", "n")
        assert terminal.end() == 0
    assert "has no http:// before it" in terminal.said
    assert "Source [litellm]: " in terminal.said
    assert re.search(r"key       [0-9a-f]{8}, verified by models", terminal.said)
    assert user.config()["profiles"]["asked"]["source"]["admin"] == {"keyring": "asked-admin"}


def test_a_pasted_key_is_offered_first(user: User, gateway: DevGateway, pasted: str) -> None:
    """With it, one question is left; without a keyring a file is offered."""
    with Terminal(user, "init") as terminal:
        terminal.answer("Move it out of there", "y")
        terminal.answer("Address of the gateway", gateway.url)
        terminal.answer("May a file that only you can read", "y")
        terminal.answer("Connect Claude Code to it", "n")
        assert terminal.end() == 0
    assert (user.home / ".bashrc").read_text() == "A=1\nB=2\n"
    assert user.config()["cache"] == {"key": "file"}


def test_a_reference_can_be_typed_in_place_of_a_key(
    user: User, gateway: DevGateway, admin: str
) -> None:
    """And no to a file of ours ends it, with nothing written."""
    arguments = ("init", "--base-url", gateway.url, "--source", "litellm")
    with Terminal(user, *arguments) as terminal:
        terminal.answer("Admin key of the gateway", admin)
        terminal.answer("May a file that only you can read", "n")
        assert terminal.end() == 78
    assert "nothing here could keep a key" in terminal.said
    assert not user.file.exists()
    with Terminal(user, *arguments, "--yes", "--no-connect") as terminal:
        terminal.answer("Admin key of the gateway", admin)
        assert terminal.end() == 0


def test_ctrl_c_at_a_question_ends_it(user: User) -> None:
    """As in every command: 130, and nothing was written."""
    with Terminal(user, "init") as terminal:
        assert terminal.interrupt("Address of the gateway") == 130
    assert not user.file.exists()


# The draft and the file


def environment(home: Path, **more: str) -> Mapping[str, str]:
    return {"HOME": str(home), "XDG_CONFIG_HOME": str(home), **more}


def test_a_file_that_changed_meanwhile_is_left(tmp_path: Path) -> None:
    """Somebody edits it while questions are answered."""
    path = tmp_path / "keybroker/config.toml"
    path.parent.mkdir(mode=0o700)
    path.touch(0o600)
    path.write_text("# one\n")
    file = File.find(environment(tmp_path))
    path.write_text("# two\n")
    with pytest.raises(ConfigError, match="was changed meanwhile; nothing was written"):
        file.write("[cache]\n")
    assert path.read_text() == "# two\n"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """A configuration in a folder of dotfiles."""
    (tmp_path / "keybroker").mkdir(mode=0o700)
    (tmp_path / "dotfiles").mkdir(mode=0o700)
    target = tmp_path / "dotfiles/kb.toml"
    target.touch(0o600)
    (tmp_path / "keybroker/config.toml").symlink_to(target)
    File.find(environment(tmp_path)).write("[cache]\n")
    assert (tmp_path / "keybroker/config.toml").is_symlink()
    assert target.read_text() == "[cache]\n"


def test_a_table_that_is_there_is_not_written_twice(tmp_path: Path) -> None:
    """TOML allows it once; line and key are named."""
    path = tmp_path / "keybroker/config.toml"
    path.parent.mkdir(mode=0o700)
    path.touch(0o600)
    path.write_text('\n[cache]\nkey = "file"\n')
    draft = Draft("work")
    draft.assign("cache.key=keyring")
    with pytest.raises(ConfigError, match=r"config\.toml:2: cache: is there already"):
        File.find(environment(tmp_path)).refuse_tables(draft)


VALUES = {
    "source.lifetime=8h": ("source", "lifetime", "8h"),
    "source.team_id=12": ("source", "team_id", "12"),
    "source.rpm_limit=12": ("source", "rpm_limit", 12),
    "source.max_budget=2.5": ("source", "max_budget", 2.5),
    "source.models=a": ("source", "models", ["a"]),
    "source.models=a,b": ("source", "models", ["a", "b"]),
    'source.models=["a"]': ("source", "models", ["a"]),
    "source.admin=keyring:x": ("source", "admin", {"keyring": "x"}),
    'source.admin={ env = "X" }': ("source", "admin", {"env": "X"}),
    "source.admin=command:pass show x": ("source", "admin", {"command": ["pass", "show", "x"]}),
    "claude.discovery=true": ("claude", "discovery", True),
    "claude.opus=claude=opus": ("claude", "opus", "claude=opus"),
}


@pytest.mark.parametrize("text", VALUES)
def test_a_setting_is_read_as_its_key_wants_it(text: str) -> None:
    """Text, numbers, lists and references; what is unclear stays text."""
    table, key, value = VALUES[text]
    draft = Draft("work")
    draft.source("type", "litellm")
    draft.assign(text)
    assert draft.get(("profiles", "work", table, key)) == value
    assert tomllib.loads(draft.text())["profiles"]["work"][table][key] == value
