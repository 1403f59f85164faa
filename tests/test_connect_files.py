"""One file of somebody else's: written by key, taken back, and nothing of theirs lost.

What a file was comes from the test's own copy. Every step of a change is a place to die: a child
is killed at each line of it, one after another.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from keybroker.connect import edit, files
from keybroker.connect.plan import Keys, Line, Piece, Whole
from keybroker.connect.record import Record
from keybroker.errors import CacheError, ConfigError, KeybrokerError, NotReady
from keybroker.paths import CONNECTIONS

NOBODY = 65534
HELPER = "exec '/opt/keybroker/bin/keybroker-key' '/run/s' 'work' '/opt/keybroker/bin/python3'"
TTL = ("env", "CLAUDE_CODE_API_KEY_HELPER_TTL_MS")
VALUES: dict[Any, Any] = {
    ("apiKeyHelper",): HELPER,
    ("env", "ANTHROPIC_BASE_URL"): "https://llm.example.com",
    TTL: "60000",
}


class User:
    """A folder of somebody's, and what was recorded of it."""

    def __init__(self, path: Path) -> None:
        self.home = path / "home"
        self.home.mkdir()
        self.state = path / "state"
        self.file = self.home / ".claude/settings.json"

    def put(self, data: bytes) -> None:
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_bytes(data)

    def piece(self, **changed: str) -> Keys:
        values = {**VALUES, **{("env", name): value for name, value in changed.items()}}
        return Keys(self.file, values, guarded=(("apiKeyHelper",),))

    def connect(self, piece: Piece | None = None, profile: str = "work", **how: Any) -> edit.Change:
        """Do what the command does to one file."""
        with Record.open(self.state) as record:
            for _ in range(edit.TRIES):
                change = edit.to_connect(
                    piece or self.piece(),
                    record,
                    surface="claude",
                    profile=profile,
                    scope="user",
                    **how,
                )
                if edit.commit(change, record):
                    return change
        raise files.changed_too_often(self.file)

    def disconnect(self) -> list[edit.Change]:
        """Take everything back, the last first."""
        done = []
        with Record.open(self.state) as record:
            for name in reversed(list(record.files)):
                for _ in range(edit.TRIES):
                    change = edit.to_disconnect(name, record)
                    if edit.commit(change, record):
                        done.append(change)
                        break
                else:
                    raise files.changed_too_often(self.file)
        return done

    def tree(self) -> dict[str, Any]:
        """All that is in the folder: kinds, modes and bytes."""
        found: dict[str, Any] = {}
        for path in sorted(self.home.rglob("*")):
            what = os.readlink(path) if path.is_symlink() else None
            if what is None:
                what = "" if path.is_dir() else path.read_bytes()
            found[str(path.relative_to(self.home))] = (path.lstat().st_mode, what)
        return found

    def value(self) -> Any:
        return json.loads(self.file.read_bytes().decode("utf-8-sig"))

    def recorded(self) -> bytes:
        return (self.state / CONNECTIONS).read_bytes()


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path)


CORPUS = {
    "empty": b"",
    "space": b" \r\n\t\n",
    "mark": b"\xef\xbb\xbf",
    "object": b"{}",
    "mark, object": b"\xef\xbb\xbf{}\r\n",
    "one line": b'{"model": "opus", "env": {"A": "1"}}',
    "tight": b'{"model":"opus","env":{}}',
    "two": b'{\n  "model": "opus"\n}\n',
    "four": b'{\n    "model": "opus",\n    "permissions": {\n        "allow": []\n    }\n}',
    "tabs": b'{\n\t"env": {\n\t\t"A": "1"\n\t},\n\t"x": [1, 2]\n}\n',
    "crlf": b'{\r\n  "env": {\r\n    "A": "1"\r\n  }\r\n}\r\n',
    "mark, crlf": b'\xef\xbb\xbf{\r\n\t"a": 1\r\n}\r\n',
    "old mac": b'{\r  "a": 1\r}\r',
    "another address": b'{"env": {"ANTHROPIC_BASE_URL": "https://other.example.com"}}\n',
    "ours pasted": json.dumps({"apiKeyHelper": HELPER}, indent=2).encode(),
    "of another place": b'{"apiKeyHelper": "exec python3 -IS /old/keybroker/helper.py - work"}',
    "twice": b'{"env": {"A": "1"}, "env": {"B": "2"}}',
    "numbers": b'{"big": 123456789012345678901234567890, "f": 1.50e+10, "n": -0}',
    "no ascii": '{"sprache": "Deutsch ä€😀", "e": "\\u00e4\\ud83d"}'.encode(),
    "deep": b'{"a": ' + b"[" * 400 + b"]" * 400 + b"}",
    "large": json.dumps({f"key{n}": "x" * 50 for n in range(4_000)}, indent=1).encode(),
}


@pytest.mark.parametrize("name", CORPUS)
def test_what_is_written_is_taken_back_byte_for_byte(user: User, name: str) -> None:
    """Whatever the file looks like; a second `connect` changes neither it nor the record."""
    user.put(CORPUS[name])
    before = user.tree()
    old = json.loads(CORPUS[name].decode("utf-8-sig").strip() or "{}")

    assert user.connect().is_one
    value = user.value()
    assert value["apiKeyHelper"] == HELPER
    assert value["env"] == {**old.get("env", {}), **{k[1]: v for k, v in VALUES.items() if k[1:]}}
    rest = {key: one for key, one in value.items() if key not in ("apiKeyHelper", "env")}
    assert rest == {key: one for key, one in old.items() if key not in ("apiKeyHelper", "env")}
    written, recorded = user.tree(), user.recorded()
    assert not user.connect().is_one
    assert (user.tree(), user.recorded()) == (written, recorded)

    (change,) = user.disconnect()
    assert change.exact
    assert user.tree() == before
    assert json.loads(user.recorded()) == {"v": 1, "files": {}, "coming": {}}


def test_bytes_outside_of_the_keys_stay(user: User) -> None:
    """Here there are line ends, tabs, a byte order mark and comments, for who takes comments."""
    text = '\ufeff// mine\r\n{\r\n\t/* a */ "a" : 1 , // b\r\n\t"env": {"Z": "1"}, // c\r\n}\r\n'
    user.put(text.encode())
    user.connect(Keys(user.file, VALUES, strict=False))
    after = user.file.read_bytes().decode()
    rest = iter(after)
    assert all(character in rest for character in text)  # in this order, and only more than that
    user.disconnect()
    assert user.file.read_bytes() == text.encode()


def test_what_was_not_there_is_removed_with_its_folders(user: User) -> None:
    """A file and the folders above it, which are private."""
    user.file = user.home / "a/b/.claude/settings.json"
    user.connect()
    assert stat.S_IMODE(user.file.stat().st_mode) == 0o600
    assert {stat.S_IMODE(one.stat().st_mode) for one in (user.home / "a").rglob("*/")} == {0o700}
    user.disconnect()
    assert user.tree() == {}


def test_a_folder_that_somebody_uses_stays(user: User) -> None:
    """Claude Code has put something into it meanwhile."""
    user.connect()
    (user.file.parent / "history").touch()
    user.disconnect()
    assert [path.name for path in user.home.rglob("*")] == [".claude", "history"]


BROKEN = {
    "broken": (b'{\n  "a": 1,\n  "b": \n}\n', r":4:1: "),
    "array": (b"[]", r":1:1: "),
    "word": (b"true", r":1:1: "),
    "a comma too many": (b'{\n  "a": 1,\n}\n', r":3:1: .*comma"),
    "comment": (b'{\n  "a": 1 // x\n}\n', r":2:10: .*comment"),
    "env is a list": (b'{\n "env": []}', r":2:9: env: expected an object"),
    "env is text": (b'{"env": "A=1"}', r":1:9: env: expected an object"),
    "null in the middle": (b'{"a": \x00}', r":1:7: "),
    "latin": ('{\n"a": "\xe4"}'.encode("latin-1"), r":2: not UTF-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), r":1: not UTF-8"),
    "20 MiB": (b'{"a": "' + b"x" * (20 << 20) + b'"}', "larger than 16 MiB"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_edited_is_named_and_left(user: User, name: str) -> None:
    """With line and column, where there are any."""
    data, said = BROKEN[name]
    user.put(data)
    before = user.tree()
    with pytest.raises(ConfigError, match=said) as caught:
        user.connect()
    assert caught.value.message.startswith(str(user.file))
    assert user.tree() == before
    assert user.disconnect() == []


def _elsewhere(user: User, kind: str) -> Path:
    real = user.home / "dotfiles/claude.json"
    real.parent.mkdir()
    user.file.parent.mkdir()
    if kind != "dangling":
        real.write_bytes(CORPUS["tabs"])
    if kind == "chain":
        middle = user.home / "middle"
        middle.symlink_to(real)
        user.file.symlink_to("../middle")
    elif kind == "folder":
        user.file.parent.rmdir()
        real = real.with_name("settings.json")
        (user.home / "dotfiles/claude.json").replace(real)
        user.file.parent.symlink_to("dotfiles")
    else:
        user.file.symlink_to(real if kind == "absolute" else "../dotfiles/claude.json")
    return real


@pytest.mark.parametrize("kind", ["absolute", "relative", "chain", "folder", "dangling"])
def test_a_link_is_followed_and_stays(user: User, kind: str) -> None:
    """What it leads to is edited, and made if it is not there; the link is what it was."""
    real = _elsewhere(user, kind)
    before = user.tree()
    user.connect()
    assert json.loads(real.read_text())["apiKeyHelper"] == HELPER
    assert not real.is_symlink()
    assert user.file.resolve() == real
    links = {name for name, (mode, _) in before.items() if stat.S_ISLNK(mode)}
    assert links
    assert links == {name for name, (mode, _) in user.tree().items() if stat.S_ISLNK(mode)}
    user.disconnect()
    assert user.tree() == before


def _loop(user: User) -> None:
    user.file.symlink_to("other")
    user.file.with_name("other").symlink_to("settings.json")


def _others(user: User) -> None:
    if os.geteuid() == 0:
        user.put(b"{}")
        os.chown(user.file, NOBODY, NOBODY)
    else:
        user.file.symlink_to("/etc/passwd")


def _hard_link(user: User) -> None:
    user.put(b"{}")
    os.link(user.file, user.home / "second")


def _read_only(user: User) -> None:
    user.put(b"{}")
    user.file.chmod(0o444)


def _in_a_file(user: User) -> None:
    user.file.parent.rmdir()
    user.file.parent.write_text("")


REFUSED: dict[str, tuple[Callable[[User], object], str]] = {
    "loop": (_loop, "cannot be read"),
    "another's": (_others, "belongs to another user"),
    "hard link": (_hard_link, "second name"),
    "read-only": (_read_only, "is read-only; nothing was changed"),
    "pipe": (lambda user: os.mkfifo(user.file), "is not a file"),
    "folder": (lambda user: user.file.mkdir(), "is not a file"),
    "in a file": (_in_a_file, "Not a directory|not a folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_ours_to_replace_is_refused(user: User, name: str) -> None:
    """At once, whoever runs it: a pipe is not waited for, and root heeds a read-only mode."""
    make, said = REFUSED[name]
    user.file.parent.mkdir()
    make(user)
    before = [(path, path.lstat().st_mode) for path in sorted(user.home.rglob("*"))]
    with pytest.raises(ConfigError, match=said):
        user.connect()
    assert [(path, path.lstat().st_mode) for path in sorted(user.home.rglob("*"))] == before


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_may_not_be_written_is_said(there: bool) -> None:
    """As an ordinary user, for whom modes hold."""
    with tempfile.TemporaryDirectory(prefix="kb-") as temporary:
        Path(temporary).chmod(0o755)
        user = User(Path(temporary))
        if there:
            user.put(b"{}")
        folder = user.file.parent if there else user.home
        mine = NOBODY if os.geteuid() == 0 else os.geteuid()
        for path in (Path(temporary), *Path(temporary).rglob("*")):
            os.chown(path, mine, -1)
        folder.chmod(0o555)

        def said() -> int:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            with pytest.raises(ConfigError, match=f"{folder}: may not be written"):
                user.connect()
            return 0

        assert in_child(said) == 0
        folder.chmod(0o755)


def in_child(act: Callable[[], int]) -> int:
    """Do something in a process of its own; return its exit status, as `subprocess` does."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = act()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_mode_owner_and_attributes_stay(user: User) -> None:
    """The file is another one afterwards, and looks like the one that it replaced."""
    user.put(CORPUS["four"])
    user.file.chmod(0o640)
    os.setxattr(user.file, "user.origin", b"dotfiles")
    group = NOBODY if os.geteuid() == 0 else os.getegid()
    os.chown(user.file, -1, group)
    for act in (user.connect, user.disconnect):
        act()
        found = user.file.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o640, group)
        assert os.getxattr(user.file, "user.origin") == b"dotfiles"
    assert user.file.read_bytes() == CORPUS["four"]


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_what_is_for_everybody_can_be_read_by_all(user: User, mask: int) -> None:
    """Whatever the umask; a command of ours has 077."""
    user.file = user.home / "etc/claude-code/managed-settings.d/50-keybroker.json"
    before = os.umask(mask)
    try:
        user.connect(Keys(user.file, VALUES, mode=0o644))
    finally:
        os.umask(before)
    assert stat.S_IMODE(user.file.stat().st_mode) == 0o644
    assert stat.S_IMODE(user.file.parent.stat().st_mode) == 0o755
    assert stat.S_IMODE((user.home / "etc").stat().st_mode) == 0o755


FOREIGN = b'{\n  "apiKeyHelper": "/usr/local/bin/get-key --team a"\n}\n'


def test_a_foreign_helper_is_replaced_by_force_alone(user: User) -> None:
    """And put back; once agreed to, connecting again is not a matter of force."""
    user.put(FOREIGN)
    with pytest.raises(ConfigError, match="has another apiKeyHelper") as caught:
        user.connect()
    assert "get-key" not in str(caught.value) + caught.value.hint
    assert user.file.read_bytes() == FOREIGN

    assert user.connect(force=True).replaced == ("apiKeyHelper",)
    assert user.value()["apiKeyHelper"] == HELPER
    assert user.connect(user.piece(A="1")).is_one
    user.file.write_bytes(user.file.read_bytes().replace(b"{\n", b'{\n  "theirs": 1,\n', 1))
    user.connect()
    user.disconnect()
    assert user.value() == {"theirs": 1, **json.loads(FOREIGN)}


def test_a_helper_that_somebody_put_in_place_of_ours_is_foreign_again(user: User) -> None:
    """It is neither replaced nor taken out."""
    user.connect()
    changed = user.file.read_bytes().replace(HELPER.encode(), b"/usr/bin/other")
    user.file.write_bytes(changed)
    with pytest.raises(ConfigError, match="has another apiKeyHelper"):
        user.connect()
    assert user.file.read_bytes() == changed
    (change,) = user.disconnect()
    assert change.kept == ("apiKeyHelper",)
    assert user.value() == {"apiKeyHelper": "/usr/bin/other"}


def test_a_file_holds_one_profile(user: User) -> None:
    """Another is refused; by force it takes its place, and what was there first comes back."""
    user.put(CORPUS["two"])
    user.connect()
    written = user.tree()
    with pytest.raises(ConfigError, match="is connected to the profile work") as caught:
        user.connect(profile="other")
    assert "--scope" in caught.value.hint
    assert user.tree() == written
    user.connect(user.piece(ANTHROPIC_BASE_URL="https://b.example.com"), "other", force=True)
    assert user.value()["env"]["ANTHROPIC_BASE_URL"] == "https://b.example.com"
    user.disconnect()
    assert user.file.read_bytes() == CORPUS["two"]


def test_connecting_again_is_as_if_it_were_the_first_time(user: User) -> None:
    """What the configuration does not have any more goes, and the restore stays exact."""
    user.put(CORPUS["crlf"])
    user.connect(user.piece(ANTHROPIC_MODEL="opus"))
    user.connect(user.piece(ANTHROPIC_BASE_URL="https://b.example.com"))
    assert "ANTHROPIC_MODEL" not in user.value()["env"]
    (change,) = user.disconnect()
    assert change.exact
    assert user.file.read_bytes() == CORPUS["crlf"]


def test_what_somebody_changed_since_stays(user: User) -> None:
    """Only what is ours goes: other keys stay, also where they are laid out anew."""
    user.put(b'{"env": {"ANTHROPIC_BASE_URL": "https://old.example.com"}}')
    user.connect()
    value = user.value()
    value["model"] = "opus"
    value["env"]["MINE"] = "1"
    value["env"][TTL[1]] = "1000"
    user.file.write_text(json.dumps(value, indent=8, sort_keys=True))
    (change,) = user.disconnect()
    assert (change.exact, change.kept) == (False, (TTL[1].join(("env.", "")),))
    env = {"ANTHROPIC_BASE_URL": "https://old.example.com", TTL[1]: "1000", "MINE": "1"}
    assert user.value() == {"env": env, "model": "opus"}


def test_what_somebody_put_back_by_hand_is_not_called_changed(user: User) -> None:
    """It is what it was before: nothing of ours is left in it."""
    user.put(b'{"env": {"ANTHROPIC_BASE_URL": "https://old.example.com"}}')
    user.connect()
    value = user.value()
    value["env"]["ANTHROPIC_BASE_URL"] = "https://old.example.com"
    user.file.write_text(json.dumps(value))
    (change,) = user.disconnect()
    assert (change.exact, change.kept) == (False, ())
    assert user.value() == {"env": {"ANTHROPIC_BASE_URL": "https://old.example.com"}}


def test_a_reformatted_file_of_ours_alone_is_removed(user: User) -> None:
    """There was none, and nothing is left in it."""
    user.connect()
    user.file.write_text(json.dumps(user.value()))
    user.disconnect()
    assert user.tree() == {}


def test_a_key_that_somebody_took_out_does_not_come_back(user: User) -> None:
    """And what we made for it goes with the rest."""
    user.put(b'{"x": 1}')
    user.connect()
    value = user.value()
    del value["env"]["ANTHROPIC_BASE_URL"]
    user.file.write_text(json.dumps(value))
    user.disconnect()
    assert user.value() == {"x": 1}


@pytest.mark.parametrize("null", ["null", "false", '""', "[1]"])
def test_what_stands_in_place_of_ours_is_somebodys(user: User, null: str) -> None:
    """Be it nothing."""
    user.put(b'{"x": 1}')
    user.connect()
    user.file.write_text(f'{{"x": 1, "env": {null}, "apiKeyHelper": null}}')
    (change,) = user.disconnect()
    assert change.kept == ("apiKeyHelper",)
    assert user.value() == {"x": 1, "env": json.loads(null), "apiKeyHelper": None}


def test_a_file_that_is_gone_is_forgotten(user: User) -> None:
    """It is not made again; folders of ours go, also if one of them is gone."""
    user.file = user.home / "a/b/settings.json"
    user.connect()
    user.file.unlink()
    user.file.parent.rmdir()
    (change,) = user.disconnect()
    assert not change.is_one
    assert user.tree() == {}
    assert user.disconnect() == []


def test_a_file_that_was_removed_is_made_again(user: User) -> None:
    """And removed again: what it was before somebody removed is not known to be wanted."""
    user.put(CORPUS["two"])
    user.connect()
    user.file.unlink()
    user.connect()
    user.disconnect()
    assert [path.name for path in user.home.rglob("*")] == [".claude"]


def test_a_file_that_was_broken_since_is_left_and_stays_recorded(user: User) -> None:
    """Once it is mended, it can be taken back."""
    user.put(CORPUS["two"])
    user.connect()
    written = user.file.read_bytes()
    user.file.write_bytes(written[:-5])
    with pytest.raises(ConfigError, match="nothing was changed"):
        user.disconnect()
    assert user.file.read_bytes() == written[:-5]
    user.file.write_bytes(written)
    user.disconnect()
    assert user.file.read_bytes() == CORPUS["two"]


# files of lines, and files as a whole


@pytest.mark.parametrize("text", ["", "*.log", "*.log\n", "# é\r\n*.log\r\n"])
def test_lines_are_added_and_taken_out(user: User, text: str) -> None:
    """Two projects in one repository have a line each; what was there comes back exactly."""
    user.put(text.encode())
    lines = [Line(user.file, f"/{name}/.claude/settings.local.json") for name in ("a", "b")]
    for line in lines:
        user.connect(line)
    both = user.file.read_bytes()
    for line in lines:
        assert not user.connect(line).is_one
    assert both.decode().splitlines() == [*text.splitlines(), *(one.line for one in lines)]
    user.disconnect()
    assert user.file.read_bytes() == text.encode()


def test_a_line_in_a_file_that_was_changed_is_taken_out_alone(user: User) -> None:
    """And one that was there before us stays."""
    user.put(b"mine\n")
    user.connect(Line(user.file, "mine"))
    user.connect(Line(user.file, "ours"))
    user.file.write_bytes(user.file.read_bytes() + b"later\n")
    user.disconnect()
    assert user.file.read_bytes() == b"mine\nlater\n"


def test_a_file_of_lines_that_is_not_utf_8_is_refused(user: User) -> None:
    user.put(b"a\n\xff\n")
    with pytest.raises(ConfigError, match=r":2: not UTF-8"):
        user.connect(Line(user.file, "ours"))


def test_a_whole_file_of_somebody_else_is_replaced_by_force_and_put_back(user: User) -> None:
    """So is one of ours that somebody changed since."""
    user.put(b"\x00theirs")
    whole = Whole(user.file, b"ours\n")
    with pytest.raises(ConfigError, match="not ours"):
        user.connect(whole)
    user.connect(whole, force=True)
    user.connect(Whole(user.file, b"ours too\n"))
    user.disconnect()
    assert user.file.read_bytes() == b"\x00theirs"

    user.connect(whole, force=True)
    user.file.write_bytes(b"edited\n")
    with pytest.raises(ConfigError, match="was changed since"):
        user.connect(whole)
    (change,) = user.disconnect()
    assert change.kept == ("all of it",)
    assert user.file.read_bytes() == b"edited\n"


# the record


RECORDS = {
    "torn": b'{"v": 1, "files": {"/a": {"ki',
    "no object": b"[]",
    "nothing in it": b"{}",
    "files are a list": b'{"v": 1, "files": []}',
    "an entry is none": b'{"v": 1, "files": {"/a": 5}}',
    "an entry lacks all": b'{"v": 1, "files": {"/a": {"splices": [], "keys": [], "folders": []}}}',
    "a splice is none": b'{"v": 1, "files": {"/a": {"splices": [["a", 1, 2]], "keys": []}}}',
    "bytes": b"\xff\xfe",
    "deep": b'{"v": 1, "files": ' + b"[" * 100_000,
    "newer": b'{"v": 2, "files": {}}',
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_cannot_be_read_stops_both(user: User, name: str) -> None:
    """What to take back is not guessed, and the record is left for somebody to look at."""
    user.put(CORPUS["two"])
    user.connect()
    written = user.tree()
    (user.state / CONNECTIONS).write_bytes(RECORDS[name])
    said = "newer keybroker" if name == "newer" else "cannot be read"
    for act in (user.connect, user.disconnect):
        with pytest.raises(CacheError, match=said):
            act()
    assert user.recorded() == RECORDS[name]
    assert user.tree() == written


# somebody else writes at the same time


WRITER = """
import json, os, signal, sys, time
path, whole = sys.argv[1], sys.argv[2] == "whole"
over = []
signal.signal(signal.SIGTERM, lambda *_: over.append(1))
number, pause = 0, float(sys.argv[3])
def seen():
    try:
        with open(path) as file:
            return json.load(file)["n"]
    except (OSError, ValueError, KeyError):
        return None
print("ready", flush=True)
while not over:
    number += 1
    draft = path + ".new" if whole else path
    with open(draft, "w") as file:
        file.write('{"n": ')
        file.flush()
        file.write(f"{number}}}")
    if whole:
        os.rename(draft, path)
    until = time.monotonic() + 3
    while seen() != number:
        if time.monotonic() > until:
            sys.exit(f"{number} was lost")
    time.sleep(pause)
print(number)
"""


@pytest.mark.parametrize("pause", ["0", "0.004", "0.05"])
@pytest.mark.parametrize("how", ["whole", "in place"])
def test_what_another_program_writes_meanwhile_is_not_lost(
    user: User, how: str, pause: str
) -> None:
    """
    It writes all the time, in place or as a new file, and looks each time if its value is there.

    We come through or say that it is being changed; either within seconds.
    """
    user.put(b'{"n": 0}')
    command = [sys.executable, "-c", WRITER, str(user.file), how, pause]
    outcomes = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        ends = time.monotonic() + 2
        while time.monotonic() < ends:
            for act in (user.connect, user.disconnect):
                begun = time.monotonic()
                try:
                    act()
                    outcomes.append("done")
                except NotReady:
                    outcomes.append("busy")
                except ConfigError as error:  # half of a file, of who writes in place for long
                    assert how == "in place", error
                    outcomes.append("broken")
                assert time.monotonic() - begun < 15
        assert writer.poll() is None, "it has not lost anything"
        writer.terminate()
        last = writer.stdout.read()
    assert writer.returncode == 0
    assert user.value()["n"] == int(last)
    assert "done" in outcomes or (how, pause) == ("in place", "0")
    assert [path.name for path in user.file.parent.iterdir()] == ["settings.json"]


def test_without_an_exchange_the_file_is_looked_at_before(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems cannot do it; nor can some make a second name."""
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)

    def no_link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    user.connect()
    user.disconnect()
    assert user.tree() == {}
    user.put(CORPUS["tabs"])
    user.connect()
    user.disconnect()
    assert user.file.read_bytes() == CORPUS["tabs"]

    read, numbers = files.read, iter(range(100))

    def read_too_early(file: Path) -> files.Target:
        target = read(file)
        file.write_text(f'{{"later": {next(numbers)}}}')
        return target

    monkeypatch.setattr(files, "read", read_too_early)
    with pytest.raises(NotReady, match="is being changed by another program"):
        user.connect()
    assert user.value() == {"later": next(numbers) - 1}


def test_a_write_between_the_exchange_and_its_undoing_is_kept(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever wrote last has its file in place, however often it came in between."""
    user.put(b'{"n": 0}')
    target = files.read(user.file)
    exchange = files._exchange
    writes = iter(b'{"n": %d}' % number for number in range(1, 6))

    def exchange_late(one: Path, other: Path) -> bool:
        for text in writes:
            fresh = other.with_name("new")
            fresh.write_bytes(text)
            fresh.replace(other)
            break
        return exchange(one, other)

    monkeypatch.setattr(files, "_exchange", exchange_late)
    assert not files.replace(target, b'{"ours": 1}')
    assert user.file.read_bytes() == b'{"n": 5}'


def test_two_at_once_leave_one_record(user: User) -> None:
    """Each waits for the other's change of a file, not for the whole command."""
    user.put(CORPUS["two"])
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            try:
                user.connect()
            finally:
                os._exit(0)
        children.append(pid)
    assert {os.waitpid(pid, 0)[1] for pid in children} == {0}
    assert list(json.loads(user.recorded())["files"]) == [str(user.file)]
    user.disconnect()
    assert user.file.read_bytes() == CORPUS["two"]


# somebody is killed in the middle


STEPS = (
    *("commit", "announce", "settle", "replace", "make_folder"),
    *("_make", "_swap", "_remove", "_look_like"),
)


def killed_at(number: int, act: Callable[[], object]) -> bool:
    """Do something in a child that is killed at its n-th step; say whether it came so far."""

    def steps() -> Iterator[None]:
        for _ in range(number):
            yield
        os.kill(os.getpid(), signal.SIGKILL)

    left = steps()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_name not in STEPS or "/keybroker/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            next(left, None)
        return trace

    def traced() -> int:
        sys.settrace(trace)
        try:
            act()
        finally:
            sys.settrace(None)
        return 0

    status = in_child(traced)
    assert status in (0, -signal.SIGKILL)
    return status != 0


def _nothing(user: User) -> None:
    pass


def _connected(user: User) -> None:
    user.connect()


def _edited(user: User) -> None:
    user.put(CORPUS["another address"])
    user.connect(follow=True)
    value = user.value()
    value["env"]["MINE"] = "1"
    user.file.write_text(json.dumps({**value, "mine": 2}))


KILLS: dict[str, tuple[Callable[[User], object], Callable[[User], object], Any]] = {
    # what was before, what is killed, what is there in the end
    "connect, no folder": (_nothing, lambda user: user.connect(), None),
    "connect, a file": (
        lambda user: user.put(CORPUS["tabs"]),
        lambda user: user.connect(),
        json.loads(CORPUS["tabs"]),
    ),
    "connect again": (_connected, lambda user: user.connect(user.piece(A="1")), None),
    "disconnect, no file": (_connected, lambda user: user.disconnect(), None),
    "disconnect, a file": (
        lambda user: (user.put(CORPUS["crlf"]), user.connect()),
        lambda user: user.disconnect(),
        json.loads(CORPUS["crlf"]),
    ),
    "disconnect by key": (
        _edited,
        lambda user: user.disconnect(),
        {"env": {"ANTHROPIC_BASE_URL": "https://other.example.com", "MINE": "1"}, "mine": 2},
    ),
    "follow": (
        lambda user: user.connect(follow=True),
        lambda user: edit.follow(user.state, TTL, {"work": "1000"}),
        None,
    ),
    "follow by key": (
        _edited,
        lambda user: edit.follow(user.state, TTL, {"work": "1000"}),
        {"env": {"ANTHROPIC_BASE_URL": "https://other.example.com", "MINE": "1"}, "mine": 2},
    ),
}


@pytest.mark.parametrize("name", KILLS)
def test_whoever_is_killed_in_the_middle_leaves_what_can_be_taken_back(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    At each step, one after another; afterwards it is taken back, every other time connected first.

    Whatever is there meanwhile is whole: the old file or the new one.
    """
    monkeypatch.setattr(files, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the machine stays up
    before, act, there = KILLS[name]
    number, going = 0, True
    while going:
        place = tmp_path / str(number)
        place.mkdir()
        user = User(place)
        before(user)
        old = user.tree()
        going = killed_at(number, lambda user=user: act(user))  # type: ignore[misc]
        if user.file.exists():
            user.value()
        if number % 2:
            user.connect()
            assert user.value()["apiKeyHelper"] == HELPER
        user.disconnect()
        left = {one for one in user.tree() if one.startswith(".claude/")}
        if there is None:
            assert user.tree() == {}, (number, old)
        else:
            assert left == {".claude/settings.json"}, number
            assert user.value() == there, number
        if (user.state / CONNECTIONS).exists():
            assert json.loads(user.recorded()) == {"v": 1, "files": {}, "coming": {}}
        number += 1
        assert number < 400
    assert number > 20


def test_a_disk_that_is_full_is_said_and_nothing_changes(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is what it was, and no draft is left."""
    user.put(CORPUS["two"])
    before = user.tree()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "_look_like", full)
        with pytest.raises(KeybrokerError, match="No space left on device"):
            user.connect()
    assert user.tree() == before
    user.connect()
    user.disconnect()
    assert user.tree() == before
