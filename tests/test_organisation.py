"""What an organisation has set for Claude Code, wherever it may have done so."""

from __future__ import annotations

import json
import plistlib
from pathlib import Path
from typing import Any

import pytest

from keybroker.connect.organisation import Finding, organisation, refuse
from keybroker.errors import ConfigError

FILE = "etc/claude-code/managed-settings.json"
DROP_IN = "etc/claude-code/managed-settings.d"
PLIST = "Library/Managed Preferences/com.anthropic.claudecode.plist"
OURS = "exec '/opt/keybroker/bin/keybroker-key' - 'work'"


def write(root: Path, name: str, value: Any) -> Path:
    """Write a file below a root, as JSON or as a property list."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    plist = name.endswith(".plist")
    path.write_bytes(plistlib.dumps(value) if plist else json.dumps(value).encode())
    return path


def at(root: Path, system: str = "linux") -> list[Finding]:
    environment = {"HOME": str(root / "home"), "USER": "jo"}
    return organisation(root, environment, system)


def test_where_nothing_is_set_nothing_is_found(tmp_path: Path) -> None:
    """Most machines are like that."""
    assert at(tmp_path) == []


@pytest.mark.parametrize(
    ("system", "name"),
    [
        ("linux", FILE),
        ("linux", f"{DROP_IN}/10-gateway.json"),
        ("darwin", "Library/Application Support/ClaudeCode/managed-settings.json"),
        ("darwin", "Library/Application Support/ClaudeCode/managed-settings.d/10.json"),
        ("darwin", "Library/Managed Preferences/com.anthropic.claudecode.plist"),
        ("darwin", "Library/Managed Preferences/jo/com.anthropic.claudecode.plist"),
        ("win32", "Program Files/ClaudeCode/managed-settings.json"),
        ("win32", "Program Files/ClaudeCode/managed-settings.d/10.json"),
        ("win32", "ProgramData/ClaudeCode/managed-settings.json"),
        ("linux", "home/.claude/remote-settings.json"),
    ],
)
def test_every_place_is_looked_at(tmp_path: Path, system: str, name: str) -> None:
    """Files, parts of files, configuration profiles, and what a server delivered."""
    path = write(tmp_path, name, {"env": {"ANTHROPIC_BASE_URL": "https://llm.example.com"}})
    shown = {"env.ANTHROPIC_BASE_URL": "https://llm.example.com"}
    assert at(tmp_path, system) == [Finding(str(path), shown)]


KEYS: dict[str, tuple[Any, str, bool]] = {
    # what is set, how it is shown, whether it stands in the way
    "apiKeyHelper": ("/usr/bin/get-key --token geheim", "", True),
    "forceLoginMethod": ("claudeai", "claudeai", True),
    "forceLoginOrgUUID": ("0000-geheim", "", True),
    "forceLoginGatewayUrl": ("https://gw.example.com", "https://gw.example.com", True),
    "policyHelper": ({"command": "geheim"}, "", False),
    "env.ANTHROPIC_BASE_URL": ("https://jo:geheim@llm.example.com", "", True),
    "env.ANTHROPIC_AUTH_TOKEN": ("sk-geheim", "", True),
    "env.ANTHROPIC_API_KEY": ("sk-geheim", "", True),
    "env.ANTHROPIC_CUSTOM_HEADERS": ("x-api-key: geheim", "", True),
    "env.CLAUDE_CODE_USE_BEDROCK": ("1", "", True),
    "env.CLAUDE_CODE_USE_VERTEX": ("1", "", True),
    "env.CLAUDE_CODE_API_KEY_HELPER_TTL_MS": ("60000", "", False),
}


@pytest.mark.parametrize("key", KEYS)
def test_what_decides_about_keys_is_named_and_no_secret_shown(tmp_path: Path, key: str) -> None:
    """A value is shown only if it is an address without a password, or a way to log in."""
    value, shown, binding = KEYS[key]
    name = key.removeprefix("env.")
    path = write(tmp_path, FILE, {"env": {name: value}} if name != key else {key: value})
    found = at(tmp_path)
    assert found == [Finding(str(path), {key: shown})]
    assert found[0].binding == ((key,) if binding else ())
    assert "geheim" not in str(found[0])
    if not binding:
        refuse(found, "init")
        return
    with pytest.raises(ConfigError, match=f"init: your organisation has set {key} in {path}") as no:
        refuse(found, "init")
    assert no.value.exit_status == 78
    assert "--force" in str(no.value.hint)


def test_what_does_not_concern_keys_is_not_named(tmp_path: Path) -> None:
    """Permissions, models, empty values."""
    write(
        tmp_path,
        FILE,
        {
            "permissions": {"deny": ["Read(./.env)"]},
            "model": "opus",
            "apiKeyHelper": "",
            "env": {"ANTHROPIC_AUTH_TOKEN": "", "DISABLE_TELEMETRY": "1"},
        },
    )
    assert at(tmp_path) == []


def test_parts_come_in_order_and_hidden_ones_not_at_all(tmp_path: Path) -> None:
    """As Claude Code reads them: the file, then `*.json` by name."""
    for name in ("20-b.json", "10-a.json", ".hidden.json", "30-c.json.bak"):
        write(tmp_path, f"{DROP_IN}/{name}", {"apiKeyHelper": "x"})
    write(tmp_path, FILE, {"apiKeyHelper": "x"})
    names = [Path(one.place).name for one in at(tmp_path)]
    assert names == ["managed-settings.json", "10-a.json", "20-b.json"]


def test_a_part_with_our_helper_does_not_stand_in_the_way(tmp_path: Path) -> None:
    """The organisation uses keybroker, and says so in one of its parts."""
    settings = {"apiKeyHelper": OURS, "env": {"ANTHROPIC_BASE_URL": "https://llm.example.com"}}
    write(tmp_path, f"{DROP_IN}/50-keybroker.json", settings)
    found = at(tmp_path)
    assert found[0].ours
    assert str(found[0]).endswith("(keybroker)")
    refuse(found, "init")
    write(tmp_path, FILE, {"forceLoginMethod": "claudeai"})
    with pytest.raises(ConfigError, match="forceLoginMethod"):
        refuse(at(tmp_path), "init")


@pytest.mark.parametrize(
    "name", [FILE, "Library/Managed Preferences/com.anthropic.claudecode.plist"]
)
def test_what_cannot_be_understood_is_said(tmp_path: Path, name: str) -> None:
    """It is the organisation's to mend; what it says is not repeated."""
    system = "linux" if name == FILE else "darwin"
    for data in (b"geheim {", b"\xff\xfe\x00", b"[]" if system == "linux" else b"<plist>"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        (found,) = at(tmp_path, system)
        assert found.problem in ("is not JSON", "is not a property list")
        assert "geheim" not in str(found)
        refuse([found], "init")


def test_a_folder_in_place_of_a_file_is_said(tmp_path: Path) -> None:
    """It cannot be read."""
    (tmp_path / FILE).mkdir(parents=True)
    assert at(tmp_path)[0].problem == "cannot be read (Is a directory)"
