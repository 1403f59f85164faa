"""VS Code and its relatives, connected and taken back by the command that people type."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker.config import load
from keybroker.connect.plan import Keys, Place
from keybroker.connect.vscode import FLATPAKS, PRODUCTS, SERVERS, plan
from keybroker.devgateway import DevGateway
from keybroker.errors import ConfigError
from keybroker.settings import Document, Named
from tests.resident import Home, Resident

LIST, NO_LOGIN = "claudeCode.environmentVariables", "claudeCode.disableLoginPrompt"
KEY = "sk-mine-0c6f2f1d8e4b4a7fa5b9d1c3"
CODE = ".config/Code/User/settings.json"


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


@pytest.fixture
def user(resident: Resident, gateway: DevGateway) -> Resident:
    """Somebody with a profile and a VS Code that was started once."""
    admin = put(resident.home, "admin", gateway.master_key)
    admin.chmod(0o600)
    resident.configure(profile(gateway.url))
    (resident.home.path / CODE).parent.mkdir(parents=True)
    return resident


def profile(url: str, settings: str = "", name: str = "work") -> str:
    return (
        f'[profiles.{name}]\nbase_url = "{url}"\n{settings}\n'
        f'[profiles.{name}.source]\ntype = "litellm"\nadmin = {{ file = "~/admin" }}\n'
    )


def put(home: Home, name: str, text: str | bytes) -> Path:
    path = home.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def connect(user: Resident, *words: str) -> tuple[str, str]:
    """Connect, without a try of the helper; return stdout and stderr."""
    status, stdout, stderr = user.cli("connect", "vscode", "--no-check", *words)
    assert status == 0, stderr
    return stdout, stderr


def refused(user: Resident, *words: str) -> str:
    status, stdout, stderr = user.cli(*words)
    assert (status, stdout) == (78, "")
    assert "Traceback" not in stderr
    return stderr


def disconnect(user: Resident, *words: str) -> str:
    status, stdout, stderr = user.cli("disconnect", *words)
    assert (status, stderr) == (0, "")
    return stdout


def variables(path: Path) -> dict[str, str]:
    """Return what the extension would set: of a name that stands twice, the last."""
    value = Document(path.read_bytes().decode()).get((LIST,))
    return {one["name"]: one["value"] for one in value}


FILES = {
    "comments and trailing commas": """{
    // mine, with sk-secret-0123456789 in a comment
    "editor.fontSize": 14, /* px */
    "claudeCode.environmentVariables": [
        { "name": "MINE", "value": "1", }, // stays
    ],
}
""",
    "tabs and CRLF": '{\r\n\t"a": [1, 2],\r\n\t"b": {\r\n\t\t"c": null\r\n\t}\r\n}\r\n',
    "one line": '{"a":1,"claudeCode.environmentVariables":[]}',
    "byte order mark": '\ufeff{\n  "a": 1\n}\n',
    "only a comment": "{\n    // nothing yet\n}",
    "empty": "",
    "blank": "\n\n",
    "ends in a comment": '{\n  "a": true // last\n}\n// the end\n',
    "value first": '{"claudeCode.environmentVariables": [{"value": "x", "name": "MINE"}], }\n',
}


@pytest.mark.parametrize("name", FILES)
def test_every_byte_that_is_not_ours_stays_and_comes_back(user: Resident, name: str) -> None:
    """What is added goes again; a file that VS Code reads with a comma too many is one we read."""
    file = put(user.home, CODE, FILES[name])
    connect(user)
    document = Document(file.read_bytes().decode())
    assert document.get((NO_LOGIN,)) is True
    assert document.get((LIST, Named("ANTHROPIC_BASE_URL"), "value")).startswith("http://127.")
    assert variables(file)["CLAUDE_CODE_API_KEY_HELPER_TTL_MS"] == "60000"
    if "MINE" in FILES[name]:
        assert variables(file)["MINE"] in ("1", "x")
    for kept in ("// mine, with sk-secret-0123456789 in a comment", "/* px */", "// stays"):
        assert (kept in file.read_text()) is (kept in FILES[name])
    if "\r\n" in FILES[name]:
        assert file.read_bytes().count(b"\n") == file.read_bytes().count(b"\r\n")
    assert "byte for byte" in disconnect(user)
    assert file.read_bytes() == FILES[name].encode()


def test_the_users_own_entries_keep_their_place(user: Resident, gateway: DevGateway) -> None:
    """An entry of ours that is there already gets another value, wherever it stands."""
    text = (
        '{"claudeCode.environmentVariables": [\n'
        '  {"value": "http://old.example", "name": "ANTHROPIC_BASE_URL"},\n'
        '  {"name": "MINE", "value": "1"},\n'
        '  {"name": "CLAUDE_CODE_API_KEY_HELPER_TTL_MS", "value": "5"},\n'
        '  {"name": "NEITHER"}\n'
        "]}\n"
    )
    file = put(user.home, CODE, text)
    stdout, _ = connect(user)
    assert f"{LIST}.ANTHROPIC_BASE_URL.value: replaced; disconnect puts it back" in stdout
    value = json.loads(file.read_text())[LIST]
    assert value == [
        {"value": gateway.url, "name": "ANTHROPIC_BASE_URL"},
        {"name": "MINE", "value": "1"},
        {"name": "CLAUDE_CODE_API_KEY_HELPER_TTL_MS", "value": "60000"},
        {"name": "NEITHER"},
    ]
    disconnect(user)
    assert file.read_text() == text


def test_a_key_is_never_written_and_one_that_is_there_is_named(
    user: Resident, gateway: DevGateway
) -> None:
    """It would be sent instead of the helper's; its value is in no message, nor in a dry run."""
    file = put(user.home, CODE, "{}")
    assert user.cli("connect", "vscode")[0] == 0
    minted = user.key()
    assert minted not in file.read_text()
    assert minted not in (user.home.path / ".claude/settings.json").read_text()
    assert user.cli("disconnect")[0] == 0
    file.write_text(f'{{"{LIST}": [{{"name": "ANTHROPIC_AUTH_TOKEN", "value": "{KEY}"}}]}}')
    for words in ((), ("--dry-run",), ("--json",)):
        status, stdout, stderr = user.cli("connect", "vscode", *words)
        assert (status, KEY in stdout + stderr) == (78, False)
        assert f"{file}: {LIST} has ANTHROPIC_AUTH_TOKEN, and that is sent instead" in stderr
    assert variables(file)["ANTHROPIC_AUTH_TOKEN"] == KEY


def test_one_command_connects_claude_code_too(user: Resident, gateway: DevGateway) -> None:
    """The helper is in its settings; it is tried, and all of it goes again."""
    file = user.home.path / CODE
    status, stdout, stderr = user.cli("connect", "vscode")
    assert status == 0
    assert "tried: the helper printed the key" in stdout
    assert "Developer: Reload Window" in stdout
    assert "not tried with the extension itself" in stderr
    claude = json.loads((user.home.path / ".claude/settings.json").read_text())
    assert "keybroker" in claude["apiKeyHelper"]
    assert claude["env"]["ANTHROPIC_BASE_URL"] == gateway.url
    disconnect(user, "vscode")
    assert not file.exists()
    assert not (user.home.path / ".claude").exists()


def test_what_is_connected_for_itself_stays_connected(user: Resident) -> None:
    """In whichever order they were connected, `disconnect vscode` leaves Claude Code alone."""
    claude = user.home.path / ".claude/settings.json"
    for first, second in (("claude", "vscode"), ("vscode", "claude")):
        for one in (first, second):
            assert user.cli("connect", one, "--no-check")[0] == 0
        disconnect(user, "vscode")
        assert "apiKeyHelper" in claude.read_text()
        assert not (user.home.path / CODE).exists()
        disconnect(user)
        assert not claude.exists()


def test_all_that_are_here_are_written_and_no_other(user: Resident) -> None:
    """Also a profile with settings of its own, a server for SSH, a Flatpak; others get nothing."""
    here = [
        CODE,
        ".config/Code/User/profiles/-5c1a/settings.json",
        ".config/Cursor/User/settings.json",
        ".config/VSCodium/User/settings.json",
        ".config/Code - Insiders/User/settings.json",
        ".var/app/com.visualstudio.code/config/Code/User/settings.json",
        ".vscode-server/data/Machine/settings.json",
        ".cursor-server/data/Machine/settings.json",
        ".local/share/code-server/User/settings.json",
    ]
    put(user.home, here[1], "{}")
    (user.home.path / ".config/Code/User/profiles/shared").mkdir()
    for name in here[2:]:
        folder = user.home.path / name
        folder = folder.parent.parent if "-server/data" not in name else folder.parents[2]
        folder.mkdir(parents=True)
    _, stderr = connect(user)
    assert "in a Flatpak" in stderr
    found = sorted(user.home.path.rglob("settings.json"))
    assert found == sorted(user.home.path / name for name in (*here, ".claude/settings.json"))
    for name in here:
        assert variables(user.home.path / name)["ANTHROPIC_BASE_URL"]
    disconnect(user)
    assert sorted(user.home.path.rglob("settings.json")) == [user.home.path / here[1]]
    assert (user.home.path / here[1]).read_text() == "{}"


def test_one_broken_file_and_nothing_is_written(user: Resident) -> None:
    """It is named with line and column; those beside it are as they were, Claude Code's too."""
    (user.home.path / ".config/Cursor").mkdir()
    good = put(user.home, CODE, "{}\n")
    for text, place in {
        '{\n  "a": 1,\n  "b" 2\n}\n': "3:7: expected a colon",
        f'{{"{LIST}": {{"A": "1"}}}}': f"1:37: {LIST}: expected a list",
        '{"a": 1': "1:8: ends too early",
        "[1]": "1:1: expected an object",
    }.items():
        broken = put(user.home, ".config/Cursor/User/settings.json", text)
        assert f"{broken}:{place}" in refused(user, "connect", "vscode")
        assert broken.read_text() == text
        assert good.read_text() == "{}\n"
        assert not (user.home.path / ".claude").exists()
    assert "nothing is connected" in disconnect(user)


def test_a_link_into_a_folder_of_dotfiles_stays_one(user: Resident) -> None:
    """A file that two editors share by links is written once."""
    shared = put(user.home, "dotfiles/settings.json", '{\n  "a": 1\n}\n')
    shared.chmod(0o640)
    (user.home.path / CODE).symlink_to(shared)
    other = user.home.path / ".config/Cursor/User"
    other.mkdir(parents=True)
    (other / "settings.json").symlink_to("../../../dotfiles/settings.json")
    connect(user)
    assert variables(shared)["ANTHROPIC_BASE_URL"]
    assert (user.home.path / CODE).is_symlink()
    assert shared.stat().st_mode & 0o777 == 0o640
    disconnect(user)
    assert shared.read_text() == '{\n  "a": 1\n}\n'
    assert (user.home.path / CODE).is_symlink()


def test_connecting_again_brings_the_new_address(user: Resident) -> None:
    """`status` says that it is out of date; what was before us is what comes back."""
    file = put(user.home, CODE, '{"a": 1}\n')
    connect(user)
    first = file.read_bytes()
    assert "wrote" not in connect(user)[0]
    assert file.read_bytes() == first
    user.configure(profile("https://new.example.com/llm", 'headers = { "X-Org" = "eng" }'))
    connect(user)
    assert variables(file)["ANTHROPIC_BASE_URL"] == "https://new.example.com/llm"
    assert variables(file)["ANTHROPIC_CUSTOM_HEADERS"] == "X-Org: eng"
    claude = json.loads((user.home.path / ".claude/settings.json").read_text())
    assert claude["env"]["ANTHROPIC_BASE_URL"] == "https://new.example.com/llm"
    user.configure(profile("https://new.example.com"))
    connect(user)
    assert "ANTHROPIC_CUSTOM_HEADERS" not in variables(file)
    disconnect(user)
    assert file.read_text() == '{"a": 1}\n'


def test_what_the_user_changed_since_stays(user: Resident) -> None:
    """Their own keys, and those of ours to which they gave another value."""
    file = put(user.home, CODE, "{\n}\n")
    connect(user)
    document = Document(file.read_text())
    document.put(("editor.tabSize",), "2")
    document.put((LIST, Named("ANTHROPIC_BASE_URL"), "value"), "https://other.example.com")
    document.put((LIST, Named("MINE"), "value"), "1")
    file.write_text(document.text)
    stdout = disconnect(user)
    assert f"{LIST}.ANTHROPIC_BASE_URL.value: changed since, and stays" in stdout
    assert json.loads(file.read_text()) == {
        "editor.tabSize": "2",
        LIST: [
            {"name": "ANTHROPIC_BASE_URL", "value": "https://other.example.com"},
            {"name": "MINE", "value": "1"},
        ],
    }


def test_nothing_to_connect_is_said_with_what_was_looked_for(
    resident: Resident, gateway: DevGateway
) -> None:
    """No folder is made for an editor that is not here."""
    admin = put(resident.home, "admin", gateway.master_key)
    admin.chmod(0o600)
    resident.configure(profile(gateway.url))
    said = refused(resident, "connect", "vscode")
    for name in (*PRODUCTS, *SERVERS, *FLATPAKS, "code-server"):
        assert name in said
    assert not (resident.home.path / ".claude").exists()
    assert "has no scope local" in refused(resident, "connect", "vscode", "--scope", "local")
    assert "has no scope managed" in refused(resident, "connect", "vscode", "--for", "windows")


def test_a_dry_run_shows_it_and_changes_nothing(user: Resident) -> None:
    """What is ours is shown; what others wrote is not."""
    file = put(user.home, CODE, f'{{\n  "mine": "{KEY}"\n}}\n')
    stdout, _ = connect(user, "--dry-run")
    assert '+      "name": "ANTHROPIC_BASE_URL",' in stdout
    assert "127.0.0.1" in stdout
    assert KEY not in stdout
    assert file.read_text() == f'{{\n  "mine": "{KEY}"\n}}\n'
    assert not (user.home.path / ".claude").exists()


def place(path: Path, system: str, **environment: str) -> Place:
    return Place({"HOME": str(path), **environment}, path, system)


def test_files_are_where_each_system_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Home
) -> None:
    """XDG_CONFIG_HOME moves them on Linux; macOS has its folder; portable ones are named."""
    file = put(home, "c.toml", profile("https://llm.example.com"))
    file.chmod(0o600)
    one = load([file]).profile("work")

    def files(system: str, **environment: str) -> list[Path]:
        monkeypatch.setattr("sys.platform", {"linux": "linux", "macos": "darwin"}[system])
        found = plan(one, place(tmp_path, system, **environment), "user")
        return [piece.file for piece in found.pieces if isinstance(piece, Keys)][1:]

    mac = tmp_path / "Library/Application Support/Cursor"
    mac.mkdir(parents=True)
    assert files("macos") == [mac / "User/settings.json"]
    (tmp_path / "xdg/Code").mkdir(parents=True)
    expected = [tmp_path / "xdg/Code/User/settings.json"]
    assert files("linux", XDG_CONFIG_HOME=str(tmp_path / "xdg")) == expected
    (tmp_path / "data/user-data").mkdir(parents=True)
    expected = [tmp_path / "data/user-data/User/settings.json"]
    assert files("linux", VSCODE_PORTABLE=str(tmp_path / "data")) == expected
    (tmp_path / "agent").mkdir()
    expected = [tmp_path / "agent/data/Machine/settings.json"]
    assert files("linux", VSCODE_AGENT_FOLDER=str(tmp_path / "agent")) == expected
    with pytest.raises(ConfigError, match="each user's own"):
        plan(one, place(tmp_path, "windows"), "user")
