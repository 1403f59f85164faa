"""Claude Desktop: the launcher run for a key, and the configuration in each of its forms."""

from __future__ import annotations

import json
import os
import plistlib
import re
import stat
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker.config import load
from keybroker.connect.desktop import display_name, plan
from keybroker.connect.plan import Place
from keybroker.devgateway import DevGateway
from keybroker.errors import ConfigError
from tests.resident import Home, Resident

HEADERS = 'headers = { "X-Org-Route" = "eng\'s \\"a\\" \\\\ %s $HOME" }\n'
ROUTE = {"X-Org-Route": 'eng\'s "a" \\ %s $HOME'}
MODELS = (
    '[profiles.work.claude]\nhaiku = "anthropic/claude-haiku-4-5"\n'
    'sonnet = "claude-sonnet-4-5-20250929"\n'
)
LISTED = [
    {
        "name": "claude-sonnet-4-5-20250929",
        "labelOverride": "Claude Sonnet 4.5 (20250929)",
        "anthropicFamilyTier": "sonnet",
    },
    {
        "name": "anthropic/claude-haiku-4-5",
        "labelOverride": "Claude Haiku 4.5",
        "anthropicFamilyTier": "haiku",
    },
    {"name": "gpt-5", "labelOverride": "gpt-5"},
]


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


@pytest.fixture
def user(resident: Resident, gateway: DevGateway) -> Resident:
    """Somebody with a profile and a Claude Desktop that was started once."""
    admin = resident.home.path / "admin"
    admin.touch(0o600)
    admin.write_text(gateway.master_key)
    resident.configure(profile(gateway.url))
    (resident.home.path / ".config/Claude").mkdir()
    return resident


def profile(url: str, settings: str = "", claude: str = "", source: str = "") -> str:
    return (
        f'[profiles.work]\nbase_url = "{url}"\n{settings}\n{claude}\n'
        '[profiles.work.source]\ntype = "litellm"\nadmin = { file = "~/admin" }\n'
        f"{source}\n"
    )


def connect(user: Resident, *words: str) -> str:
    status, stdout, stderr = user.cli("connect", "desktop", *words)
    assert status == 0, stderr
    return stdout


def refused(user: Resident, *words: str) -> str:
    status, stdout, stderr = user.cli("connect", "desktop", *words)
    assert (status, stdout) == (78, "")
    assert "Traceback" not in stderr
    return stderr


def launcher(user: Resident) -> Path:
    return user.home.path / ".local/share/keybroker/launchers/work"


def library(user: Resident) -> Path:
    return user.home.path / ".config/Claude-3p/configLibrary"


def run(user: Resident, context: str | None = None) -> tuple[int, str, str]:
    """Run the launcher as the app does: no arguments, few variables, and an input left open."""
    environment = {"HOME": str(user.home.path), "PATH": os.defpath}
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"):
        environment[name] = user.environment[name]
    if context is not None:
        environment["CLAUDE_HELPER_CONTEXT"] = context
    reading, writing = os.pipe()
    try:
        done = subprocess.run(
            [launcher(user)],
            stdin=reading,
            capture_output=True,
            text=True,
            env=environment,
            timeout=30,
        )
    finally:
        os.close(reading)
        os.close(writing)
    return done.returncode, done.stdout, done.stderr


def delete(gateway: DevGateway, key: str) -> None:
    """Delete a key behind keybroker's back."""
    request = urllib.request.Request(
        f"{gateway.url}/key/delete",
        json.dumps({"keys": [key]}).encode(),
        {"authorization": f"Bearer {gateway.master_key}", "content-type": "application/json"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request) as answer:
        assert answer.status == 200


def test_the_launcher_prints_a_bare_key(user: Resident) -> None:
    """It is its owner's alone, takes no arguments, and was tried before the command said so."""
    assert "tried: the helper printed the key" in connect(user)
    assert stat.S_IMODE(launcher(user).stat().st_mode) == 0o700
    assert stat.S_IMODE(launcher(user).parent.stat().st_mode) == 0o700
    for context in (None, "interactive", "scheduled-task", "setup-test", "background", "other"):
        assert run(user, context) == (0, f"{user.key()}\n", "")


def test_the_launcher_prints_headers_too(user: Resident, gateway: DevGateway) -> None:
    """Quotes, backslashes, dollars and percent signs in them come out as they are configured."""
    user.configure(profile(gateway.url, HEADERS))
    assert "tried: the helper printed the key" in connect(user)
    status, stdout, stderr = run(user, "interactive")
    assert (status, stderr) == (0, "")
    assert stdout.count("\n") == 1
    assert json.loads(stdout) == {"token": user.key(), "headers": ROUTE}


@pytest.mark.parametrize("headers", ["", HEADERS])
def test_a_refused_key_is_replaced_before_it_is_given_again(
    user: Resident, gateway: DevGateway, headers: str
) -> None:
    """In mid-session-refresh; in any other case the same key would be given again for a while."""
    user.configure(profile(gateway.url, headers))
    connect(user, "--no-check")

    def key(context: str) -> str:
        status, stdout, stderr = run(user, context)
        assert (status, stderr) == (0, "")
        return str(json.loads(stdout)["token"]) if headers else stdout.rstrip("\n")

    first = key("interactive")
    assert key("mid-session-refresh") == first  # it was looked at, and is good
    user.stop()
    user.start()
    assert key("interactive") == first
    delete(gateway, first)
    second = key("mid-session-refresh")
    assert second != first
    assert key("background") == second


@pytest.mark.parametrize("headers", ["", HEADERS])
def test_no_key_is_one_line_and_nothing_on_stdout(
    user: Resident, gateway: DevGateway, headers: str
) -> None:
    """The gateway is down and nothing is kept: the helper's own status and words."""
    user.configure(profile(gateway.url, headers))
    gateway.close()
    status, stdout, _ = user.cli("connect", "desktop")
    assert status != 0
    assert launcher(user).exists(), "connected, and said so"
    status, stdout, stderr = run(user, "scheduled-task")
    assert status in (69, 75)
    assert stdout == ""
    assert stderr.startswith("keybroker: ")
    assert stderr.count("\n") == 1


def test_a_key_that_json_cannot_hold_as_it_is_is_refused(user: Resident, tmp_path: Path) -> None:
    """Half a document, or another key than the one that was given, would be worse than none."""
    for character in ('"', "\\"):
        key = tmp_path / "key"
        key.touch(0o600)
        key.write_text(f"abc{character}def-0123456789\n")
        user.configure(
            f'[profiles.work]\nbase_url = "http://127.0.0.1:9"\nverify = "none"\n{HEADERS}\n'
            f'[profiles.work.source]\ntype = "static"\nkey = {{ file = "{key}" }}\n'
        )
        user.stop()
        connect(user, "--no-check", "--force")
        status, stdout, stderr = run(user)
        assert (status, stdout) == (78, "")
        assert stderr == "keybroker: the key has a character that JSON would have to escape\n"


def test_the_key_is_in_nobodys_arguments(user: Resident, gateway: DevGateway) -> None:
    """While the launcher runs again and again, every process's arguments are read."""
    user.configure(profile(gateway.url, HEADERS))
    connect(user)
    key = user.key().encode()
    environment = {"HOME": str(user.home.path), "PATH": os.defpath}
    again = f"for i in $(seq 60); do '{launcher(user)}' >/dev/null; done"
    looks, launched = 0, 0
    with subprocess.Popen(["/bin/sh", "-c", again], env=environment) as process:
        ends = time.monotonic() + 60
        while process.poll() is None:
            assert time.monotonic() < ends
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes()
                except OSError:
                    continue
                looks += 1
                launched += str(launcher(user)).encode() in words.split(b"\0")[1:2]
                assert key not in words
    assert process.returncode == 0
    assert launched > 0, "it was never seen running"
    assert key not in launcher(user).read_bytes()


def test_the_library_has_an_entry_that_is_applied(user: Resident, gateway: DevGateway) -> None:
    """With JSON's types; the app's own entries stay, and what was applied comes back."""
    meta = library(user) / "_meta.json"
    meta.parent.mkdir(parents=True)
    before = '{"appliedId":"aaaa","entries":[{"id":"aaaa","name":"Mine"}]}'
    meta.write_text(before)
    user.configure(
        profile(
            gateway.url,
            claude=MODELS,
            source='models = ["anthropic/claude-haiku-4-5", "gpt-5", "claude-sonnet-4-5-20250929"]',
        )
    )
    stdout = connect(user, "--no-check")
    assert "appliedId: replaced; disconnect puts it back" in stdout
    found = json.loads(meta.read_text())
    [mine, ours] = found["entries"]
    assert mine == {"id": "aaaa", "name": "Mine"}
    assert ours == {"name": "keybroker work", "id": found["appliedId"]}
    entry = library(user) / f"{ours['id']}.json"
    assert json.loads(entry.read_text()) == {
        "inferenceProvider": "gateway",
        "inferenceGatewayBaseUrl": gateway.url,
        "inferenceGatewayAuthScheme": "bearer",
        "inferenceCredentialKind": "helper-script",
        "inferenceCredentialHelper": str(launcher(user)),
        "inferenceCredentialHelperTtlSec": 300,
        "inferenceCredentialHelperTimeoutSec": 15,
        "inferenceCredentialHelperSilentRefreshEnabled": True,
        "inferenceModels": LISTED,
    }
    for step in (
        "Help → Troubleshooting → Enable Developer Mode",
        "Developer → Configure Third-Party Inference → Gateway",
        "Claude Haiku 4.5 = anthropic/claude-haiku-4-5",
        "Apply Changes",
    ):
        assert step in stdout
    assert user.cli("disconnect", "desktop")[0] == 0
    assert meta.read_text() == before
    assert not entry.exists()
    assert not launcher(user).exists()
    assert not (user.home.path / ".claude").exists()


def test_what_was_changed_in_the_app_stays(user: Resident) -> None:
    """It writes its files anew; ours goes by key, also when another entry is applied by then."""
    connect(user, "--no-check")
    meta = library(user) / "_meta.json"
    [entry] = [file for file in library(user).glob("*.json") if file != meta]
    found = json.loads(entry.read_text())
    found |= {"chatTabEnabled": False, "inferenceModels": [{"name": "claude-x"}]}
    entry.write_text(json.dumps(found, indent=4))
    other = json.loads(meta.read_text())
    other["entries"].append({"id": "bbbb", "name": "Other"})
    other["appliedId"] = "bbbb"
    meta.write_text(json.dumps(other))

    connect(user, "--no-check")
    again = json.loads(entry.read_text())
    assert (again["chatTabEnabled"], again["inferenceModels"]) == (False, [{"name": "claude-x"}])
    meta.write_text(json.dumps(other))
    assert user.cli("disconnect")[0] == 0
    assert json.loads(meta.read_text()) == {
        "entries": [{"id": "bbbb", "name": "Other"}],
        "appliedId": "bbbb",
    }
    assert json.loads(entry.read_text()) == {
        "chatTabEnabled": False,
        "inferenceModels": [{"name": "claude-x"}],
    }


def test_connecting_again_brings_the_new_address(user: Resident) -> None:
    """The entry and the launcher keep their names."""
    connect(user, "--no-check")
    files = sorted(library(user).iterdir())
    assert connect(user, "--no-check").count("as it was") == 3
    user.configure(profile("https://new.example.com/llm"))
    connect(user, "--no-check")
    assert sorted(library(user).iterdir()) == files
    assert "https://new.example.com/llm" in "".join(file.read_text() for file in files)
    assert user.cli("disconnect")[0] == 0
    assert not library(user).exists()


def test_nothing_of_claude_codes_is_looked_at(user: Resident) -> None:
    """A key in its settings, which stops others, does not count for this app."""
    settings = user.home.path / ".claude/settings.json"
    settings.parent.mkdir()
    settings.write_text('{"env": {"ANTHROPIC_AUTH_TOKEN": "sk-mine-0123456789abcdef"}}')
    connect(user, "--no-check")
    assert "sk-mine" in settings.read_text()


def test_no_app_is_said_with_what_helps(resident: Resident, gateway: DevGateway) -> None:
    """Nothing is written for an app that is not here, nor where it is not said where to."""
    resident.configure(profile(gateway.url))
    said = refused(resident)
    assert f"there is neither {resident.home.path}/.config/Claude-3p" in said
    assert "--output FOLDER" in said
    assert "--output FOLDER" in refused(resident, "--for", "macos", "--installed-in", "/opt/kb")
    assert "--output FOLDER" in refused(resident, "--for", "windows", "--scope", "user")
    assert "--installed-in" in refused(resident, "--for", "macos", "--output", "out")
    assert "--installed-in" in refused(resident, "--for", "windows", "--output", "out")
    assert not (resident.home.path / ".local/share/keybroker").exists()


def pack(user: Resident, system: str, installed: str, *words: str) -> Path:
    output = user.home.path / "out"
    connect(user, "--for", system, "--output", str(output), "--installed-in", installed, *words)
    return output


def test_macos_gets_preferences_and_a_profile(user: Resident, gateway: DevGateway) -> None:
    """Every value is text; both have the same, and the launcher is where they say."""
    user.configure(profile(gateway.url, HEADERS, MODELS))
    output = pack(user, "macos", "/opt/keybroker")
    plist = plistlib.loads((output / "com.anthropic.claudefordesktop.plist").read_bytes())
    assert all(isinstance(value, str) for value in plist.values())
    assert json.loads(plist["inferenceModels"]) == LISTED[:2]
    assert plist["inferenceCredentialHelperTtlSec"] == "300"
    assert plist["inferenceCredentialHelperTimeoutSec"] == "15"
    assert plist["inferenceCredentialHelperSilentRefreshEnabled"] == "true"
    outer = plistlib.loads((output / "keybroker-work.mobileconfig").read_bytes())
    [inner] = outer["PayloadContent"]
    assert inner["PayloadType"] == "com.apple.ManagedClient.preferences"
    [forced] = inner["PayloadContent"]["com.anthropic.claudefordesktop"]["Forced"]
    assert forced == {"mcx_preference_settings": plist}
    assert outer["PayloadUUID"] != inner["PayloadUUID"]
    script = output / plist["inferenceCredentialHelper"].lstrip("/")
    assert stat.S_IMODE(script.stat().st_mode) == 0o755
    assert "exec '/opt/keybroker/bin/keybroker' 'get' 'work'" in script.read_text()
    assert subprocess.run(["/bin/sh", "-n", script]).returncode == 0
    first = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    pack(user, "macos", "/opt/keybroker")
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == first
    assert user.cli("status")[0] == 0
    assert user.cli("disconnect", "--scope", "managed")[0] == 0
    assert not output.exists()


def registry(data: bytes) -> dict[str, dict[str, str]]:
    """Read a file of the registry: its keys, each with its values, all of them text."""
    assert data.startswith(b"\xff\xfe")
    text = data.decode("utf-16")
    assert text.count("\n") == text.count("\r\n")
    lines = text.split("\r\n")
    assert lines[:2] == ["Windows Registry Editor Version 5.00", ""]
    found: dict[str, dict[str, str]] = {}
    for line in filter(None, lines[2:]):
        if line.startswith("["):
            values = found[line.strip("[]")] = {}
            continue
        match = re.fullmatch(r'"(\w+)"="((?:[^"\\]|\\["\\])*)"', line)
        assert match, line
        values[match[1]] = re.sub(r"\\(.)", r"\1", match[2])
    return found


def test_windows_gets_a_file_of_the_registry(user: Resident, gateway: DevGateway) -> None:
    """Quotes and backslashes come back as they were; headers are in it, not in the batch file."""
    user.configure(profile(gateway.url, HEADERS, MODELS))
    output = pack(user, "windows", "C:\\Program Files\\key%broker")
    found = registry((output / "keybroker-work.reg").read_bytes())
    assert list(found) == ["HKEY_LOCAL_MACHINE\\SOFTWARE\\Policies\\Claude"]
    [values] = found.values()
    helper = "C:\\Program Files\\key%broker\\launchers\\work.cmd"
    assert values["inferenceCredentialHelper"] == helper
    assert values["inferenceGatewayBaseUrl"] == gateway.url
    assert values["inferenceCredentialHelperTtlSec"] == "300"
    assert json.loads(values["inferenceModels"]) == LISTED[:2]
    assert json.loads(values["inferenceCustomHeaders"]) == ROUTE
    batch = (output / "Program Files/key%broker/launchers/work.cmd").read_bytes().decode()
    assert batch.count("\n") == batch.count("\r\n")
    lines = batch.split("\r\n")
    assert lines[0] == "@echo off"
    assert '"C:\\Program Files\\key%%broker\\Scripts\\keybroker.exe" get work' in lines
    shown = connect(
        user,
        *("--for", "windows", "--output", f"{output}2", "--installed-in", "C:\\kb", "--dry-run"),
    )
    assert '+"inferenceProvider"="gateway"' in shown
    assert not Path(f"{output}2").exists()


def test_linux_gets_a_json_file(user: Resident, gateway: DevGateway) -> None:
    """With JSON's types, where the app reads it on those machines."""
    output = pack(user, "linux", "/opt/keybroker")
    found = json.loads((output / "etc/claude-desktop/managed-settings.json").read_text())
    assert found["inferenceCredentialHelperTtlSec"] == 300
    assert found["inferenceCredentialHelper"] == "/usr/local/libexec/keybroker/work"
    assert (output / "usr/local/libexec/keybroker/work").stat().st_mode & 0o777 == 0o755
    meta = json.loads((output / "Claude-3p/configLibrary/_meta.json").read_text())
    entry = output / f"Claude-3p/configLibrary/{meta['appliedId']}.json"
    assert json.loads(entry.read_text()) == found


def test_a_hold_that_is_too_short_is_said(user: Resident, gateway: DevGateway) -> None:
    """A key may be revoked while the app still has it."""
    assert "hold is" not in user.cli("connect", "desktop", "--no-check")[2]
    user.configure(profile(gateway.url, 'helper_ttl = "1s"\nhold = "7m"\n'))
    assert "hold is 7m: a key may be revoked" in user.cli("connect", "desktop", "--no-check")[2]


def test_names_for_people() -> None:
    """An id that is not like Anthropic's stays as it is."""
    names = {
        "claude-sonnet-4-6": "Claude Sonnet 4.6",
        "anthropic/claude-haiku-4-5": "Claude Haiku 4.5",
        "claude-3-5-sonnet-20241022": "Claude Sonnet 3.5 (20241022)",
        "claude-opus-4": "Claude Opus 4",
        "us.anthropic.claude-opus-4": "us.anthropic.claude-opus-4",
        "gpt-5": "gpt-5",
        "claude": "Claude",
        "": "",
    }
    assert {model: display_name(model) for model in names} == names


def test_files_are_where_each_system_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Home
) -> None:
    """On macOS below Application Support; a configuration file that is named stays so."""
    file = home.path / "c.toml"
    file.touch(0o600)
    file.write_text(profile("https://llm.example.com"))
    one = load([file]).profile("work")
    monkeypatch.setattr("sys.platform", "darwin")
    place = Place({"HOME": str(tmp_path), "KEYBROKER_CONFIG": str(file)}, tmp_path, "macos")
    with pytest.raises(ConfigError, match="no Claude Desktop is here"):
        plan(one, place, "user")
    data = tmp_path / "Library/Application Support"
    (data / "Claude-3p").mkdir(parents=True)
    made = plan(one, place, "user")
    assert [piece.file.parent for piece in made.pieces] == [
        data / "keybroker/launchers",
        data / "Claude-3p/configLibrary",
        data / "Claude-3p/configLibrary",
    ]
    [script] = [piece.data.decode() for piece in made.pieces if hasattr(piece, "data")]
    assert f"KEYBROKER_CONFIG={file}\nexport KEYBROKER_CONFIG\n" in script
    with pytest.raises(ConfigError, match="it is not said where they go"):
        plan(one, place, "managed")
