"""`connect` and `disconnect` as they are typed, in a fresh HOME, with a gateway and a daemon.

What Claude Code does with it is in `test_connect_claude`, and what becomes of one file, whatever
it looks like and whoever else writes it, in `test_connect_files`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keybroker import wire
from keybroker.connect import claude, line, surface
from keybroker.connect.plan import Place
from keybroker.devgateway import DevGateway
from keybroker.errors import ConfigError
from tests.canaries import Canaries, Gateway, Watch
from tests.resident import Resident, until
from tests.servers.claude import Result

KEYBROKER = str(Path(sys.executable).parent / "keybroker")
TTL = "CLAUDE_CODE_API_KEY_HELPER_TTL_MS"
MINE = '{\n\t"model": "opus"\n}\n'


class Desk:
    """Somebody with a profile, a project, and the command."""

    def __init__(self, resident: Resident, gateway: DevGateway) -> None:
        self.resident, self.gateway = resident, gateway
        self.home = resident.home.path
        self.project = self.home / "project"
        self.project.mkdir()
        self.settings = self.home / ".claude/settings.json"
        self.environment = resident.environment
        self.environment["ADMIN"] = gateway.master_key
        self.configure()

    def configure(self, *names: str, **settings: str) -> None:
        """Write the configuration, of `work` alone or of several profiles."""
        lines = "\n".join(f"{name} = {value}" for name, value in settings.items())
        self.resident.configure(
            "".join(
                f'[profiles.{name}]\nbase_url = "{self.gateway.url}"\n{lines}\n'
                f'[profiles.{name}.source]\ntype = "litellm"\nadmin = {{ env = "ADMIN" }}\n'
                for name in names or ("work",)
            )
        )

    def type(self, *words: str, **variables: str) -> Result:
        """Type a command in the project."""
        done = subprocess.run(
            [KEYBROKER, *words],
            cwd=self.project,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def does(self, *words: str, **variables: str) -> str:
        """Type a command that must succeed; return what it prints."""
        done = self.type(*words, **variables)
        assert done.rc == 0, done
        return done.stdout

    def refuses(self, *words: str, status: int = 78, **variables: str) -> str:
        """Type a command that must fail, and print nothing on stdout; return what it says."""
        done = self.type(*words, **variables)
        assert (done.rc, done.stdout) == (status, ""), done
        said = [one for one in done.stderr.splitlines() if not one.startswith("note: ")]
        assert said[0].startswith("keybroker: ")
        return "\n".join(said)

    def put(self, text: str, file: Path | None = None) -> bytes:
        """Write a settings file."""
        file = file or self.settings
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
        return text.encode()

    def value(self, file: Path | None = None) -> Any:
        return json.loads((file or self.settings).read_text())

    def files(self) -> dict[str, bytes]:
        """All that is not keybroker's own."""
        own = (".config", ".local", ".cache", "run")
        return {
            str(path.relative_to(self.home)): path.read_bytes() if path.is_file() else b""
            for path in self.home.rglob("*")
            if path.relative_to(self.home).parts[0] not in own
        }

    def record(self) -> Any:
        return json.loads((self.resident.state / "connections.json").read_text())

    def git(self, *words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        name = ("-c", "user.name=kb", "-c", "user.email=kb@example.com")
        return subprocess.run(
            ["git", *name, *words],
            cwd=folder or self.project,
            env={"HOME": str(self.home), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        )


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


@pytest.fixture
def desk(resident: Resident, gateway: DevGateway) -> Desk:
    return Desk(resident, gateway)


def test_the_line_that_was_written_gives_a_key_with_the_daemon_up_and_down(desk: Desk) -> None:
    """
    It ends with a `get` of that very line, twice; what sources take from the environment is there.

    It begins with no daemon and leaves one; the second time it ends that and leaves another. Paths
    are absolute. What was not there before is not there afterwards.
    """
    before = desk.files()
    said = desk.does("connect")
    assert re.search(r"tried: the helper printed the key \w{8}, with the daemon up and down", said)
    assert f"wrote  {desk.settings}\n" in said
    helper = desk.value()["apiKeyHelper"]
    words = shlex.split(helper)
    assert words[0] == "exec"
    assert all(word.startswith("/") for word in words[1:] if word not in ("work", "-IS"))
    assert str(desk.resident.socket) in words
    assert desk.value()["env"] == {"ANTHROPIC_BASE_URL": desk.gateway.url, TTL: "60000"}
    assert stat.S_IMODE(desk.settings.stat().st_mode) == 0o600
    first = desk.resident.owner()
    assert first is not None

    assert f"as it was  {desk.settings}\n" in desk.does("connect")
    second = desk.resident.owner()
    assert second not in (None, first)
    shell = ["/bin/sh", "-c", helper]
    done = subprocess.run(shell, env={"HOME": str(desk.home)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert desk.gateway.live_keys()
    assert done.stdout.strip() == desk.resident.key()

    assert desk.does("disconnect").startswith(f"removed  {desk.settings}, which was not there")
    assert desk.files() == before
    assert desk.does("disconnect") == "nothing is connected\n"


def test_without_a_check_nothing_is_run(desk: Desk) -> None:
    """No daemon is started and no key minted."""
    desk.does("connect", "--no-check")
    assert desk.resident.owner() is None
    assert not desk.gateway.live_keys()


def test_a_helper_that_fails_is_said_and_what_was_written_stays(desk: Desk) -> None:
    """With what it said, a hint, and a status that is no success."""
    said = desk.refuses("connect", status=75, ADMIN="sk-wrong-0123456789")
    assert "connected, but the helper ended with status 77: work: " in said
    assert "hint: " in said
    assert desk.settings.exists()
    desk.does("disconnect")
    assert not desk.settings.exists()


def test_what_was_there_comes_back_byte_for_byte(desk: Desk) -> None:
    """With the words that say so; afterwards nothing is known of it."""
    data = desk.put(MINE)
    desk.does("connect", "--no-check")
    assert desk.value()["model"] == "opus"
    assert desk.does("disconnect") == f"restored  {desk.settings}, byte for byte\n"
    assert desk.settings.read_bytes() == data
    assert desk.record() == {"v": 1, "files": {}, "coming": {}}


def test_keys_of_others_stay_where_a_file_was_changed(desk: Desk) -> None:
    """It is said what was changed since, and it stays."""
    desk.put(MINE)
    desk.does("connect", "--no-check")
    value = desk.value()
    value["env"][TTL], value["added"] = "1000", True
    desk.put(json.dumps(value))
    said = desk.does("disconnect")
    assert said == (
        f"restored  {desk.settings}: it was changed since, so ours alone was taken out\n"
        f"  env.{TTL}: changed since, and stays\n"
    )
    assert desk.value() == {"model": "opus", "env": {TTL: "1000"}, "added": True}


@pytest.mark.parametrize(
    ("text", "place"),
    [('{\n  "a": 1,\n}', "3:1: "), ("[1]", "1:1: "), ('{\n "env": 5}', "2:9: "), ("{", "1:2: ")],
)
def test_what_is_no_valid_file_is_named_with_line_and_column(
    desk: Desk, text: str, place: str
) -> None:
    """And not touched; no traceback, no key."""
    data = desk.put(text)
    said = desk.refuses("connect")
    assert said.startswith(f"keybroker: {desk.settings}:{place}")
    assert "nothing was changed" in said
    assert desk.settings.read_bytes() == data
    assert not desk.gateway.live_keys()


def test_a_foreign_helper_is_kept_without_force_and_put_back_after_it(desk: Desk) -> None:
    """What it is is not shown."""
    data = desk.put('{"apiKeyHelper": "/usr/bin/get-key --password geheim"}\n')
    said = desk.refuses("connect", "--no-check")
    assert f"{desk.settings}: has another apiKeyHelper\nhint: --force replaces it" in said
    assert "geheim" not in said
    assert desk.settings.read_bytes() == data

    said = desk.does("connect", "--no-check", "--force")
    assert "  apiKeyHelper: replaced; disconnect puts it back\n" in said
    assert "keybroker" in desk.value()["apiKeyHelper"]
    desk.does("disconnect")
    assert desk.settings.read_bytes() == data


def test_a_line_that_was_pasted_gives_way(desk: Desk) -> None:
    """It is ours, as `status` had it; no force is needed."""
    data = desk.put(json.dumps({"apiKeyHelper": "exec /old/bin/keybroker-key - work"}))
    desk.does("connect", "--no-check")
    expected = shlex.split(line.helper_line("work", desk.environment))
    written = shlex.split(desk.value()["apiKeyHelper"])
    # the interpreter goes by the name that whoever installed keybroker called it by
    assert list(map(os.path.realpath, written)) == list(map(os.path.realpath, expected))
    desk.does("disconnect")
    assert desk.settings.read_bytes() == data


def test_one_file_has_one_profile_and_another_goes_to_a_project(desk: Desk) -> None:
    """A second profile is refused, with what to type; a project's own file takes it."""
    desk.configure("work", "side")
    desk.does("connect", "--no-check", "--profile", "work")
    said = desk.refuses("connect", "--no-check", "--profile", "side")
    assert f"{desk.settings}: is connected to the profile work" in said
    assert "--scope" in said
    desk.does("connect", "--no-check", "--profile", "side", "--scope", "local")
    local = desk.project / ".claude/settings.local.json"
    assert "'side'" in desk.value(local)["apiKeyHelper"]
    assert "'work'" in desk.value()["apiKeyHelper"]
    assert f"removed  {local}" in desk.does("disconnect", "--profile", "side")
    said = desk.does("disconnect", "--scope", "local")
    assert said == (
        "nothing of that is connected, but:\n"
        "  keybroker disconnect claude --profile work --scope user\n"
    )
    assert "config: no profile 'wrok'" in desk.refuses("disconnect", "--profile", "wrok")
    desk.does("connect", "--no-check", "--profile", "side", "--scope", "local")
    command = desk.does("disconnect", "desktop").splitlines()[-1].strip()
    there = f"cd {desk.project}; keybroker disconnect claude --profile side --scope local"
    assert command == there
    desk.does(*shlex.split(command.partition("; ")[2])[1:])
    assert not local.exists()
    assert f"removed  {desk.settings}" in desk.does("disconnect", "claude", "--scope", "user")


def test_what_the_configuration_says_by_now_is_written_again(desk: Desk) -> None:
    """`status` says what is out of date; the restore stays exact."""
    data = desk.put(MINE)
    desk.configure(helper_ttl='"30s"', headers='{ "X-Team" = "a" }')
    desk.does("connect", "--no-check")
    assert desk.value()["env"]["ANTHROPIC_CUSTOM_HEADERS"] == "X-Team: a"
    desk.configure(helper_ttl='"20s"')
    said = desk.does("status")
    assert f"not as they should be: env.{TTL}, env.ANTHROPIC_CUSTOM_HEADERS; type: " in said
    desk.does("connect", "--no-check")
    assert desk.value()["env"] == {"ANTHROPIC_BASE_URL": desk.gateway.url, TTL: "20000"}
    assert "not as they should be" not in desk.does("status")
    desk.does("disconnect")
    assert desk.settings.read_bytes() == data


@pytest.mark.parametrize("how", ["absolute", "relative"])
def test_the_folder_that_claude_code_is_told_is_used(desk: Desk, how: str) -> None:
    """CLAUDE_CONFIG_DIR moves the user's settings; nothing is made in the usual place."""
    folder = desk.home / "project/conf"
    named = {"CLAUDE_CONFIG_DIR": str(folder) if how == "absolute" else "conf"}
    desk.does("connect", **named)
    assert "keybroker" in desk.value(folder / "settings.json")["apiKeyHelper"]
    assert not desk.settings.parent.exists()
    assert f"removed  {folder / 'settings.json'}" in desk.does("disconnect")
    assert not folder.exists()


def test_a_configuration_that_was_named_is_named_in_the_settings(desk: Desk) -> None:
    """The helper starts a daemon with it, whoever runs it and where."""
    named = desk.home / "other.toml"
    named.write_text(desk.resident.file.read_text())
    named.chmod(0o600)
    desk.resident.file.unlink()
    desk.does("connect", KEYBROKER_CONFIG=str(named))
    assert desk.value()["env"]["KEYBROKER_CONFIG"] == str(named)


# a project


def test_a_projects_own_file_is_ignored_by_git(desk: Desk) -> None:
    """By a line that is in no commit; what the project commits is not touched."""
    desk.git("init", "-q")
    committed = desk.project / ".claude/settings.json"
    data = desk.put('{"model": "opus"}', committed)
    desk.git("add", ".")
    exclude = desk.project / ".git/info/exclude"
    before, files = exclude.read_bytes(), desk.files()
    done = desk.type("connect", "--scope", "local")
    assert done.rc == 0, done
    wizard = "note: what a project's file sets counts only after the first-run wizard"
    assert f"{wizard} and the trust prompt\n" in done.stderr
    local = desk.project / ".claude/settings.local.json"
    assert desk.value(local)["env"]["ANTHROPIC_BASE_URL"] == desk.gateway.url
    assert desk.git("check-ignore", "-q", str(local)).returncode == 0
    assert "settings.local" not in desk.git("status", "--porcelain", "-uall").stdout
    assert committed.read_bytes() == data
    assert not desk.settings.exists()

    desk.does("disconnect")
    assert exclude.read_bytes() == before
    assert desk.files() == files


@pytest.mark.parametrize("name", ["app", "a [b] *c", "ä", "!x", "#y"])
def test_a_project_in_a_folder_of_a_repository_is_ignored_too(desk: Desk, name: str) -> None:
    """Whatever its name; two of them have a line each, and both come back."""
    desk.git("init", "-q")
    exclude = desk.project / ".git/info/exclude"
    before, top = exclude.read_bytes(), desk.project
    for folder in (top / name, top / "other"):
        folder.mkdir()
        desk.project = folder
        desk.does("connect", "--scope", "local", "--no-check")
    for folder in (top / name, top / "other"):
        local = folder / ".claude/settings.local.json"
        assert desk.git("check-ignore", "-q", str(local)).returncode == 0
    desk.does("disconnect")
    assert exclude.read_bytes() == before


def test_a_work_tree_is_ignored_by_its_repository(desk: Desk) -> None:
    desk.git("init", "-q")
    desk.git("commit", "-q", "--allow-empty", "-m", "first")
    desk.git("worktree", "add", "-q", "../tree")
    desk.project = desk.home / "tree"
    desk.does("connect", "--scope", "local", "--no-check")
    assert desk.git("check-ignore", "-q", ".claude/settings.local.json").returncode == 0


def test_where_git_would_take_the_file_it_is_not_written(desk: Desk) -> None:
    """It has it already, or is told by the project to take it; a hook's variables do not count."""
    desk.git("init", "-q")
    (desk.project / ".gitignore").write_text(".claude/*\n!.claude/settings.local.json\n")
    said = desk.refuses("connect", "--scope", "local", GIT_DIR="/nowhere")
    assert "its .gitignore has git take .claude/settings.local.json" in said
    (desk.project / ".gitignore").unlink()
    local = desk.project / ".claude/settings.local.json"
    data = desk.put("{}", local)
    desk.git("add", "-f", str(local))
    assert "git rm --cached" in desk.refuses("connect", "--scope", "local")
    assert local.read_bytes() == data


def test_what_cannot_be_done_to_all_is_done_to_none(desk: Desk) -> None:
    """Its settings are broken: git's list is not touched either, nor is a key taken out."""
    desk.git("init", "-q")
    desk.put('{"env": {"ANTHROPIC_AUTH_TOKEN": "sk-theirs-0123456789abcdef"}}')
    desk.put("{", desk.project / ".claude/settings.local.json")
    before = desk.files()
    desk.refuses("connect", "--scope", "local", "--take-out-keys")
    assert desk.files() == before


def test_one_file_that_cannot_be_taken_back_does_not_keep_the_others(desk: Desk) -> None:
    """It is named, stays recorded, and is taken back when it is mended."""
    desk.configure("work", "side")
    desk.does("connect", "--no-check", "--profile", "work")
    desk.does("connect", "--no-check", "--profile", "side", "--scope", "local")
    local = desk.project / ".claude/settings.local.json"
    written = local.read_bytes()
    local.write_bytes(written[:-4])
    done = desk.type("disconnect")
    assert done.rc == 78
    assert f"removed  {desk.settings}" in done.stdout
    assert f"keybroker: {local}:" in done.stderr
    local.write_bytes(written)
    assert f"removed  {local}" in desk.does("disconnect")


def test_a_project_that_is_gone_is_forgotten(desk: Desk) -> None:
    """Nothing is made of it again."""
    desk.does("connect", "--no-check", "--scope", "local")
    (desk.project / ".claude/settings.local.json").unlink()
    (desk.project / ".claude").rmdir()
    assert "somebody removed it" in desk.does("disconnect")
    assert desk.does("disconnect") == "nothing is connected\n"
    assert list(desk.project.iterdir()) == []


# the machine


MANAGED = {
    "linux": "etc/claude-code/managed-settings.d/50-keybroker.json",
    "macos": "Library/Application Support/ClaudeCode/managed-settings.d/50-keybroker.json",
    "windows": "Program Files/ClaudeCode/managed-settings.d/50-keybroker.json",
}
INSTALLED = {"linux": "/opt/kb", "macos": "/opt/kb", "windows": "C:\\Program Files\\kb"}
LINES = {
    "linux": "exec '/opt/kb/bin/keybroker' 'get' 'work'",
    "macos": "exec '/opt/kb/bin/keybroker' 'get' 'work'",
    "windows": '"C:\\Program Files\\kb\\Scripts\\keybroker.exe" get work',
}


@pytest.mark.parametrize("system", MANAGED)
def test_a_machine_is_written_for_all_its_users(desk: Desk, system: str) -> None:
    """Address and helper together, in a part of its own that everybody can read."""
    out = desk.home / "image"
    words = ("connect", "--for", system, "--output", str(out), "--installed-in", INSTALLED[system])
    desk.does(*words)
    file = out / MANAGED[system]
    value = desk.value(file)
    assert value["apiKeyHelper"] == LINES[system]
    assert value["env"]["ANTHROPIC_BASE_URL"] == desk.gateway.url
    assert "KEYBROKER_CONFIG" not in value["env"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert {stat.S_IMODE(one.stat().st_mode) for one in out.rglob("*/")} == {0o755}
    assert [path.name for path in file.parent.iterdir()] == ["50-keybroker.json"]
    assert desk.resident.owner() is None
    said = desk.does("status")
    assert f"connected    claude, {file}\n" in said
    assert "settings     " not in said
    assert desk.does("disconnect").startswith("nothing of that is connected, but:\n")
    assert file.exists()
    desk.does("disconnect", "--scope", "managed")
    assert not out.exists()


def test_what_is_for_others_names_no_place_of_this_user(desk: Desk) -> None:
    """The socket is a dash, which each helper finds its own for; programs are where they are."""
    place = Place({"HOME": "/home/jo"}, desk.project, "linux", installed_in=sys.prefix)
    found = line.shared_line("work", place)
    words = shlex.split(found)
    assert words[0] == "exec"
    assert words[1].startswith(f"{sys.prefix}/bin/")
    if words[1].endswith("-key"):
        assert words[2:] == ["-", "work", f"{sys.prefix}/bin/python3"]
    assert str(desk.home) not in found


def test_an_interpreter_that_others_cannot_run_is_refused(tmp_path: Path) -> None:
    """Links are followed, and folders above count; what is not there cannot be run either."""
    program = tmp_path / "venv/bin/python"
    program.parent.mkdir(parents=True, mode=0o755)
    program.touch(0o755)
    link = tmp_path / "python"
    link.symlink_to(program)
    tmp_path.chmod(0o700)
    with pytest.raises(ConfigError, match="other users cannot run it"):
        line._check_others_can([str(link)])
    with pytest.raises(ConfigError, match="other users cannot run it"):
        line._check_others_can(["/usr/nowhere/python"])
    line._check_others_can(["/bin/sh"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--scope", "user", "--output", "out"), "--scope managed"),
        (("--for", "windows"), "--installed-in"),
        (("--scope", "managed", "--for", "macos"), "--installed-in"),
        (("--for", "windows", "--installed-in", "/opt/kb"), "expected a path of Windows"),
        (("--for", "windows", "--installed-in", "C:kb"), r"--installed-in 'C:\Program Files"),
        (("--installed-in", "opt/kb", "--output", "out"), "expected a path from the root"),
    ],
)
def test_what_makes_no_sense_for_a_machine_is_refused(
    desk: Desk, words: tuple[str, ...], said: str
) -> None:
    """With what to type; nothing is written."""
    before = desk.files()
    assert said in desk.refuses("connect", *words)
    assert desk.files() == before


def test_what_was_handed_out_is_made_anew_as_it_was_typed(desk: Desk) -> None:
    """The command of `status` has all of it; a folder that went where it was meant to is fine."""
    out = desk.home / "an image"
    words = ("--for", "macos", "--output", str(out), "--installed-in", "/opt/kb")
    desk.does("connect", *words)
    desk.configure(helper_ttl='"30s"')
    typed = f"--scope managed --for macos --output '{out}' --installed-in /opt/kb"
    command = f"keybroker connect claude --profile work {typed}"
    assert f"env.{TTL}; type: {command}\n" in desk.does("status")
    desk.does(*shlex.split(command)[1:])
    assert "type: " not in desk.does("status")
    out.rename(desk.home / "sent")
    assert "settings     " not in desk.does("status")


# keys that would be sent instead


THEIRS = "sk-theirs-0123456789abcdef"
TAKE_OUT = "keybroker connect --profile work --take-out-keys"


def test_a_dry_run_says_what_would_be_taken_out_and_what_is_refused(desk: Desk) -> None:
    """With the command; nothing is changed by it, and no key is shown."""
    desk.put(json.dumps({"env": {"ANTHROPIC_AUTH_TOKEN": THEIRS}}))
    desk.put(f"export ANTHROPIC_API_KEY={THEIRS}\n", desk.home / ".bashrc")
    before = desk.files()
    done = desk.type("connect", "--dry-run")
    assert f"note: connecting is refused without --take-out-keys: {TAKE_OUT}\n" in done.stderr
    assert f"the helper's key; to take it out: {TAKE_OUT}\n" in done.stderr
    done = desk.type("connect", "--dry-run", "--take-out-keys")
    assert done.stderr.count("would take ") == 2
    assert f"would take ANTHROPIC_API_KEY out of {desk.home}/.bashrc, for good\n" in done.stderr
    assert THEIRS not in done.stdout + done.stderr
    assert "refused" not in done.stderr
    assert desk.files() == before


def test_keys_are_taken_out_when_the_helper_was_seen_to_work(desk: Desk) -> None:
    """
    Before that all of them stay, and it is said.

    Shells that are open have theirs still, which is the first thing to do something about. The
    restore is exact, of the file without the key.
    """
    desk.put(json.dumps({"env": {"ANTHROPIC_AUTH_TOKEN": THEIRS}}))
    desk.put(f"# a\nexport ANTHROPIC_AUTH_TOKEN={THEIRS}\n", desk.home / ".bashrc")
    words = ("connect", "--take-out-keys")
    said = desk.refuses(*words, status=75, ADMIN="sk-wrong-0123456789")
    assert "connected, but the helper ended with status 77" in said
    assert said.splitlines()[0].endswith("; no key was taken out")
    assert desk.value()["env"]["ANTHROPIC_AUTH_TOKEN"] == THEIRS
    desk.does("daemon", "--stop")

    done = desk.type(*words)
    assert f"took ANTHROPIC_AUTH_TOKEN out of {desk.settings}\n" in done.stderr
    assert "  1. unset ANTHROPIC_AUTH_TOKEN or open a new shell" in done.stdout
    assert (desk.home / ".bashrc").read_text() == "# a\n"
    assert list(desk.value()["env"]) == ["ANTHROPIC_BASE_URL", TTL]
    assert "byte for byte" in desk.does("disconnect")
    assert desk.value() == {"env": {}}


@pytest.mark.parametrize("scope", ["local", "managed"])
def test_what_is_set_to_nothing_there_is_not_in_the_way(desk: Desk, scope: str) -> None:
    """As the real client was seen to take it; a key of the user's own stays where it is."""
    pasted = desk.put(json.dumps({"env": {"ANTHROPIC_AUTH_TOKEN": THEIRS}}))
    words = ["connect", "--no-check", "--scope", scope]
    out = ["--output", str(desk.home / "out"), "--installed-in", "/opt/kb"]
    done = desk.type(*words, *(out if scope == "managed" else []), ANTHROPIC_API_KEY=THEIRS)
    assert done.rc == 0
    assert "instead of the helper's key" not in done.stderr
    assert desk.settings.read_bytes() == pasted


def test_a_key_in_the_file_that_is_written_is_in_no_record_of_it(desk: Desk) -> None:
    """It gives way to nothing, after it was taken out: it does not come back."""
    local = desk.project / ".claude/settings.local.json"
    desk.put(json.dumps({"env": {"ANTHROPIC_AUTH_TOKEN": THEIRS}}), local)
    words = ("connect", "--no-check", "--scope", "local")
    command = "keybroker connect --profile work --scope local --take-out-keys"
    assert f"hint: take it out, or: {command}" in desk.refuses(*words)
    desk.does(*words, "--take-out-keys")
    assert desk.value(local)["env"]["ANTHROPIC_AUTH_TOKEN"] == ""
    assert THEIRS not in json.dumps(desk.record())
    desk.does("disconnect")
    assert desk.value(local) == {"env": {}}


def test_a_project_s_committed_file_is_never_written_and_stops_nobody(desk: Desk) -> None:
    """What beats it is said: a checkout's token counts in its own folder alone."""
    committed = desk.project / ".claude/settings.json"
    data = desk.put(json.dumps({"env": {"ANTHROPIC_AUTH_TOKEN": THEIRS}}), committed)
    done = desk.type("connect", "--no-check", "--take-out-keys")
    assert done.rc == 0
    said = f"{committed}:1 sets ANTHROPIC_AUTH_TOKEN, and in this folder that is sent instead"
    assert f"note: {said} of the helper's key; keybroker connect --scope local" in done.stderr
    assert THEIRS not in done.stdout + done.stderr
    assert committed.read_bytes() == data
    assert "apiKeyHelper" in desk.value()


def test_a_profile_in_place_of_a_surface_is_known_for_one(desk: Desk) -> None:
    """With what is to be typed."""
    for command in ("connect", "disconnect"):
        done = desk.type(command, "work")
        assert (done.rc, done.stdout) == (2, "")
        assert "work is a profile, and is named by --profile work" in done.stderr
    assert "is not one of" in desk.type("connect", "wrok").stderr
    done = desk.type("run", "work")
    assert (done.rc, done.stdout) == (2, "")
    assert "work is a profile, and is named by --profile work before" in done.stderr
    assert desk.type("run", "wrok").rc == 127


def test_a_command_that_is_near_another_is_named(desk: Desk) -> None:
    """And none where none is near."""
    assert "No such command 'conect'. Did you mean 'connect'?" in desk.type("conect").stderr
    assert "Did you mean" not in desk.type("zzz").stderr


# what is shown


FULL = """\
{{
  "apiKeyHelper": "{0}",
  "env": {{ "ANTHROPIC_BASE_URL": "https://{0}.example.com", "OTHER": "{0}" }},
  "list": ["{0}", ["{0}"], {{ "deep": "{0}" }}],
  "last": "{0}"
}}
"""
PLACES = {
    "lines": FULL,
    "one line": " ".join(FULL.split()),
    "tight": "".join(FULL.split()),
    "escaped": FULL.replace('"{0}"', '"\\u0041{0}\\n"'),
}


@pytest.mark.parametrize("scope", ["user", "local"])
@pytest.mark.parametrize("name", PLACES)
def test_a_dry_run_changes_nothing_and_shows_nothing_of_others(
    desk: Desk, name: str, scope: str
) -> None:
    """Neither of what stays nor of what goes, before it is connected and before it is undone."""
    secret = "geheimgeheimgeheim"
    desk.git("init", "-q")
    exclude = desk.project / ".git/info/exclude"
    exclude.write_text(f"# {secret}\n/{secret}\n")
    local = desk.project / ".claude/settings.local.json"
    desk.put(PLACES[name].format(secret), desk.settings if scope == "user" else local)
    words = ("connect", "--scope", scope, "--force", "--no-check")
    for begin in (words, ("disconnect",)):
        before, own = desk.files(), sorted(desk.home.rglob("*"))
        done = desk.type(*begin, "--dry-run")
        assert done.rc == 0
        assert desk.files() == before
        if begin is words:
            assert sorted(desk.home.rglob("*")) == own
        assert secret not in done.stdout + done.stderr
        assert "keybroker" in done.stdout
        assert desk.gateway.url in done.stdout
        desk.does(*begin)
    assert secret in (desk.settings if scope == "user" else local).read_text()


def test_json_is_all_that_is_printed(desk: Desk) -> None:
    """For a program; what is for people goes to stderr."""
    desk.put('{"env": {"ANTHROPIC_AUTH_TOKEN": "sk-theirs-0123456789abcdef"}}\n')
    found = json.loads(desk.does("connect", "--json", "--take-out-keys"))
    [file] = found["files"]
    assert file["file"] == str(desk.settings)
    assert (file["changed"], file["removed"], file["kept"]) == (True, False, [])
    assert re.fullmatch(r"\w{8}", found["key"])
    [file] = json.loads(desk.does("disconnect", "--json"))["files"]
    assert (file["changed"], file["exact"]) == (True, True)
    assert json.loads(desk.does("disconnect", "--json")) == {"files": []}


def test_what_would_be_sent_instead_stays_out_of_everything(resident: Resident) -> None:
    """
    The admin key, the keys that are minted, and a token that somebody pasted.

    They are not on stdout or stderr, in no file of ours, and on no command line, whether the token
    stays, is taken out, or stands in another's helper that gives way and comes back.
    """
    canaries = Canaries()
    token = canaries.new("token").replace('"', "").replace("\\", "")
    with Gateway(canaries) as gateway, Watch() as watch:
        desk = Desk(resident, gateway)
        state = resident.state
        desk.put(json.dumps({"env": {"ANTHROPIC_AUTH_TOKEN": token}, "x": [token]}))
        said = [desk.type("connect", "--force")]
        assert said[0].rc == 78
        said += [desk.type(*words) for words in (("connect", "--dry-run"), ("status",))]
        said += [desk.type("connect", "--take-out-keys"), desk.type("status", "--json")]
        said += [desk.type("disconnect", "--dry-run"), desk.type("disconnect", "--json")]
        assert [one.rc for one in said[1:]] == [0] * 6
        assert desk.value() == {"env": {}, "x": [token]}
        for one in said:
            assert canaries.seen_in(one.stdout + one.stderr) == []
        assert gateway.minted
        assert canaries.below(state, {}) == []
        assert canaries.below(resident.home.path / "run") == []
        watch.look()
        for process in watch.seen.values():
            assert canaries.seen_in(process.command) == []


# a TTL that is followed


def _follows(desk: Desk, text: str) -> bytes:
    """Connect so that the TTL is followed, with a daemon that runs."""
    desk.configure(helper_ttl='"30s"')
    data = desk.put(text)
    desk.does("connect", "--follow")
    assert desk.value()["env"][TTL] == "30000"
    return data


def _said_of_it(desk: Desk) -> list[str]:
    lines = desk.resident.said().splitlines()
    return [one.partition("info: ")[2] for one in lines if "TTL" in one]


def test_the_daemon_mends_the_ttl_and_the_restore_stays_exact(desk: Desk) -> None:
    """More than once; what else is in the file stays."""
    data = _follows(desk, MINE)
    for times, ttl in enumerate((20, 25), start=1):
        desk.configure(helper_ttl=f'"{ttl}s"')
        said = [f"{desk.settings} has the new TTL"] * times
        until(lambda said=said: _said_of_it(desk) == said)  # type: ignore[misc]
        assert desk.value()["env"][TTL] == f"{ttl}000"
    assert "not as they should be" not in desk.does("status")
    assert "byte for byte" in desk.does("disconnect")
    assert desk.settings.read_bytes() == data


def test_the_ttl_is_mended_when_the_daemon_starts(desk: Desk) -> None:
    """The configuration was changed while none ran; connecting again keeps on following."""
    _follows(desk, MINE)
    desk.does("connect", "--no-check")
    desk.does("daemon", "--stop")
    desk.configure(helper_ttl='"20s"')
    desk.resident.start()
    until(lambda: desk.value()["env"][TTL] == "20000")


def test_a_ttl_of_the_users_own_is_left_alone(desk: Desk) -> None:
    """And stays when it is taken back; what is not to be followed is not mended either."""
    _follows(desk, MINE)
    value = desk.value()
    value["env"][TTL] = "5000"
    desk.put(json.dumps(value))
    before = desk.settings.read_bytes()
    desk.configure(helper_ttl='"20s"')
    until(lambda: desk.resident.said().count("configuration read") == 1)
    desk.does("rotate")  # the daemon has come around
    assert desk.settings.read_bytes() == before
    assert f"env.{TTL}: changed since, and stays" in desk.does("disconnect")


def test_a_file_that_somebody_edited_is_followed_by_key(desk: Desk) -> None:
    """Their keys stay, then and when ours are taken out."""
    _follows(desk, MINE)
    desk.put(json.dumps({**desk.value(), "added": 1}, indent=3))
    desk.configure(helper_ttl='"20s"')
    until(lambda: desk.value()["env"][TTL] == "20000")
    assert desk.value()["added"] == 1
    desk.does("disconnect")
    assert desk.value() == {"model": "opus", "added": 1}


def test_a_file_that_is_broken_or_gone_is_a_warning_and_no_loop(desk: Desk) -> None:
    """The daemon says it once for each time that it tried; others are mended all the same."""
    desk.configure("work", "side", helper_ttl='"30s"')
    desk.does("connect", "--follow", "--no-check", "--profile", "work")
    desk.does("connect", "--follow", "--no-check", "--profile", "side", "--scope", "local")
    local = desk.project / ".claude/settings.local.json"
    desk.put('{"env": ')
    desk.resident.start()
    desk.configure("work", "side", helper_ttl='"20s"')
    until(lambda: desk.value(local)["env"][TTL] == "20000")
    warning = f"{desk.settings}:1:9: "
    until(lambda: warning in desk.resident.said())
    desk.settings.unlink()
    desk.configure("work", "side", helper_ttl='"25s"')
    until(lambda: desk.value(local)["env"][TTL] == "25000")
    assert desk.resident.said().count(warning) == 1
    assert not desk.settings.exists()


def test_what_changes_while_the_lock_is_lent_is_mended_afterwards(desk: Desk) -> None:
    """Nothing is begun for a command that is at work."""
    _follows(desk, MINE)
    lent = wire.watch(desk.resident.socket, "lend")
    assert next(lent) == {}
    desk.configure(helper_ttl='"20s"')
    until(lambda: "configuration read" in desk.resident.said())
    assert desk.value()["env"][TTL] == "30000"
    lent.close()
    until(lambda: desk.value()["env"][TTL] == "20000")


def test_every_surface_says_what_it_is(desk: Desk) -> None:
    """Its scopes are those that `connect` knows, and one that it has not is refused."""
    assert set(surface("claude").SCOPES) == {"user", "local", "managed"} == set(claude.SCOPES)
    assert "has no scope local" in desk.refuses("connect", "vscode", "--scope", "local")


def test_a_local_scope_is_taken_back_in_its_folder_alone(desk: Desk) -> None:
    """Another project stays connected; its line for git too."""
    desk.git("init", "-q")
    desk.does("connect", "--scope", "local", "--no-check")
    own, other = desk.project, desk.home / "other"
    other.mkdir()
    desk.project = other
    desk.git("init", "-q")
    desk.does("connect", "--scope", "local", "--no-check")
    desk.does("disconnect", "--scope", "local")
    assert not (other / ".claude").exists()
    assert ".claude" not in (other / ".git/info/exclude").read_text()
    assert (own / ".claude/settings.local.json").exists()
    assert ".claude" in (own / ".git/info/exclude").read_text()
    desk.does("disconnect")
    assert not (own / ".claude").exists()


def test_one_file_has_one_format(desk: Desk) -> None:
    """Two at once are refused; one that takes the place of another says so."""
    done = desk.type("connect", "claude", "bedrock")
    assert done.rc == 2
    assert "claude, bedrock: they share a file" in done.stderr
    desk.does("connect", "--no-check")
    assert "  in place of claude\n" in desk.does("connect", "bedrock", "--no-check")


def test_a_proxy_with_a_password_is_neither_written_nor_gone_around(desk: Desk) -> None:
    """It is said: what a project's own settings say of a proxy counts then."""
    proxy = "http://me:canary-password@proxy.example.com:8"
    done = desk.type("connect", "--scope", "local", "--no-check", HTTPS_PROXY=proxy)
    assert done.rc == 0
    assert "note: the proxy of here has a password" in done.stderr
    written = desk.value(desk.project / ".claude/settings.local.json")["env"]
    assert not [name for name in written if name.lower().endswith("_proxy")]
    assert "canary-password" not in done.stdout + done.stderr + json.dumps(desk.record())


def test_headers_of_somebody_else_give_way_by_force_only(desk: Desk) -> None:
    """They may hold a secret, and what is replaced is kept until it is put back."""
    before = desk.put('{"env": {"ANTHROPIC_CUSTOM_HEADERS": "x-api-key: canary-0123456789"}}')
    done = desk.type("connect", "--no-check")
    assert done.rc == 0
    assert f"note: {desk.settings} has x-api-key in ANTHROPIC_CUSTOM_HEADERS" in done.stderr
    desk.does("disconnect")
    assert desk.settings.read_bytes() == before
    desk.configure(headers='{ "X-Route" = "eng" }')
    said = desk.refuses("connect", "--no-check")
    assert f"{desk.settings}: has another env.ANTHROPIC_CUSTOM_HEADERS" in said
    assert "canary" not in done.stdout + done.stderr + said + json.dumps(desk.record())
    desk.does("connect", "--no-check", "--force")
    assert desk.value()["env"]["ANTHROPIC_CUSTOM_HEADERS"] == "X-Route: eng"
    desk.does("disconnect")
    assert desk.settings.read_bytes() == before
