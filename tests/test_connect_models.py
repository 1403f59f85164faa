"""`connect --models auto` and `--statusline`: what they write, what stays, what is taken back."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest

from keybroker import statusline
from keybroker.cli.table import with_keys
from keybroker.devgateway import DevGateway
from tests.resident import Resident, until
from tests.servers.ogx import Ogx
from tests.test_connect import MINE, Desk

MODELS = ["gpt-4o", "claude-haiku-4-5", "claude-opus-4-5", "text-embedding-3-small"]
TIERS = {
    "ANTHROPIC_DEFAULT_HAIKU_MODEL": "claude-haiku-4-5",
    "ANTHROPIC_DEFAULT_SONNET_MODEL": "gpt-4o",
    "ANTHROPIC_DEFAULT_OPUS_MODEL": "claude-opus-4-5",
}
WRITTEN = {"haiku": "claude-haiku-4-5", "sonnet": "gpt-4o", "opus": "claude-opus-4-5"}


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway(models=MODELS) as server:
        yield server


@pytest.fixture
def desk(resident: Resident, gateway: DevGateway) -> Desk:
    return Desk(resident, gateway)


def tiers(desk: Desk) -> dict[str, str]:
    """The tiers in the settings."""
    env = desk.value()["env"]
    return {name: value for name, value in env.items() if name.startswith("ANTHROPIC_DEFAULT_")}


def claude_table(desk: Desk) -> dict[str, Any]:
    """The table of the configuration."""
    tables = tomllib.loads(desk.resident.file.read_text())
    return dict(tables["profiles"]["work"].get("claude", {}))


# --models auto


def test_the_mapping_is_written_and_stays(desk: Desk) -> None:
    """Into the configuration, and from there into the settings: `connect` alone loses nothing."""
    before = desk.put(MINE)
    text = desk.resident.file.read_text()
    desk.does("connect", "--models", "auto", "--no-check")
    assert tiers(desk) == TIERS
    assert claude_table(desk) == WRITTEN
    assert desk.resident.file.read_text().startswith(text)
    assert desk.resident.file.stat().st_mode & 0o777 == 0o600
    desk.does("connect", "--no-check")
    assert tiers(desk) == TIERS
    assert "not as they should be" not in desk.does("status", "work")
    desk.does("disconnect")
    assert desk.settings.read_bytes() == before
    assert claude_table(desk) == WRITTEN


def test_it_says_what_it_chose(desk: Desk) -> None:
    done = desk.type("connect", "--models", "auto", "--no-check")
    assert f"tiers written into {desk.resident.file}\n" in done.stderr
    assert (
        "  haiku   claude-haiku-4-5\n  sonnet  gpt-4o\n  opus    claude-opus-4-5\n" in done.stderr
    )
    again = desk.type("connect", "--models", "auto", "--no-check")
    assert "tiers written" not in again.stderr


def test_a_dry_run_shows_it_and_writes_nothing(desk: Desk) -> None:
    before = desk.resident.file.read_bytes()
    out = desk.does("connect", "--models", "auto", "--dry-run")
    assert '"ANTHROPIC_DEFAULT_SONNET_MODEL": "gpt-4o"' in out
    assert desk.resident.file.read_bytes() == before
    assert not desk.settings.exists()


def test_what_the_configuration_names_stays_while_it_is_listed(desk: Desk) -> None:
    """One that is gone from the gateway is replaced; comments and other keys stay."""
    more = '# mine\n[profiles.work.claude]  # tiers\nhaiku = "gone"\nopus = "gpt-4o"\n'
    more += "discovery = true\n"
    text = desk.resident.file.read_text() + more
    desk.resident.file.write_text(text)
    desk.does("connect", "--models", "auto", "--no-check")
    assert claude_table(desk) == {
        "haiku": "claude-haiku-4-5",
        "sonnet": "gpt-4o",
        "opus": "gpt-4o",
        "discovery": True,
    }
    now = desk.resident.file.read_text()
    assert "# mine\n[profiles.work.claude]  # tiers\n" in now
    assert now.endswith("discovery = true\n")


@pytest.mark.parametrize("table", ['claude = { haiku = "x" }', 'claude.haiku = "x"'])
def test_a_table_that_is_written_otherwise_is_not_edited(desk: Desk, table: str) -> None:
    """It is said what to write."""
    text = desk.resident.file.read_text().replace(
        "[profiles.work]\n", f"[profiles.work]\n{table}\n"
    )
    desk.resident.file.write_text(text)
    said = desk.refuses("connect", "--models", "auto", "--no-check")
    assert "profiles.work.claude is not written as a table of its own" in said
    assert 'hint: write into it: haiku = "claude-haiku-4-5"; sonnet = "gpt-4o"' in said
    assert desk.resident.file.read_text() == text
    assert not desk.settings.exists()


def test_a_gateway_that_lists_nothing_changes_nothing(resident: Resident) -> None:
    """77, before anything is written."""
    with Ogx({}) as server:
        resident.configure(
            f'[profiles.local]\nbase_url = "{server.url}"\n'
            '[profiles.local.source]\ntype = "static"\nplaceholder = "ogx"\n'
        )
        before = resident.file.read_bytes()
        status, out, err = resident.cli("connect", "--models", "auto")
    assert (status, out) == (77, "")
    assert "lists no model for chat" in err
    assert resident.file.read_bytes() == before
    assert not (resident.home.path / ".claude").exists()


WITH = {"haiku": "a", "opus": 'b"c'}
A, B = 'haiku = "a"\n', 'opus = "b\\"c"\n'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", f"[p.w.c]\n{A}{B}"),
        ("x = 1", f"x = 1\n\n[p.w.c]\n{A}{B}"),
        ("[p.w.c]", f"[p.w.c]\n{A}{B}"),
        ("[p.w.c]\nz = 1\n", f"[p.w.c]\n{A}{B}z = 1\n"),
        ("[p.w.c]\nopus = 'x' # y\n[q]\nhaiku = 1\n", f"[p.w.c]\n{A}{B}[q]\nhaiku = 1\n"),
        (
            '[ p . "w" . c ] # d\r\n"haiku" = 1\r\n',
            f'[ p . "w" . c ] # d\n{B}{A}'.replace("\n", "\r\n"),
        ),
        ("[p.w.cc]\n[p.w]\nc = 1\n", f"[p.w.cc]\n[p.w]\nc = 1\n\n[p.w.c]\n{A}{B}"),
    ],
)
def test_a_table_is_edited_by_its_keys(before: str, after: str) -> None:
    """Whatever stands around them; line ends stay as they are."""
    assert with_keys(before, ("p", "w", "c"), WITH) == after


# --statusline


def shown(desk: Desk) -> str:
    """Run the command of the settings as the client does, and return what it shows."""
    value = desk.value()["statusLine"]
    assert set(value) == {"type", "command"}
    assert value["type"] == "command"
    done = subprocess.run(
        ["/bin/sh", "-c", value["command"]],
        env={"PATH": "/usr/bin:/bin"},
        input='{"session_id": "x", "model": {"id": "m"}}',
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_status_line_is_written_shown_and_taken_back(desk: Desk) -> None:
    """By key; connecting again keeps it, `--no-statusline` and `disconnect` take it out."""
    before = desk.put(MINE)
    desk.does("connect", "--statusline")
    command = desk.value()["statusLine"]["command"]
    program, python, *rest = shlex.split(command)
    assert (program, os.path.realpath(python)) == ("exec", os.path.realpath(sys.executable))
    assert rest == ["-IS", statusline.__file__, str(desk.resident.socket), "work"]
    desk.resident.key()
    assert shown(desk).startswith("work 1")
    desk.does("connect", "--no-check")
    assert "statusLine" in desk.value()
    assert "not as they should be" not in desk.does("status", "work")
    desk.does("connect", "--no-check", "--no-statusline")
    assert "statusLine" not in desk.value()
    desk.does("connect", "--no-check", "--statusline")
    desk.does("disconnect")
    assert desk.settings.read_bytes() == before


def test_another_s_status_line_is_not_replaced(desk: Desk) -> None:
    """Unless told to; then it comes back."""
    theirs = {"type": "command", "command": "~/line.sh", "padding": 0}
    before = desk.put(json.dumps({"statusLine": theirs}, indent=2))
    said = desk.refuses("connect", "--no-check", "--statusline")
    assert "has another statusLine" in said
    assert desk.settings.read_bytes() == before
    desk.does("connect", "--no-check")
    assert desk.value()["statusLine"] == theirs
    out = desk.does("connect", "--no-check", "--statusline", "--force")
    assert "statusLine: replaced; disconnect puts it back" in out
    assert desk.value()["statusLine"]["command"].startswith("exec ")
    desk.does("disconnect")
    assert desk.settings.read_bytes() == before


def test_the_status_line_of_a_project(desk: Desk) -> None:
    desk.does("connect", "--no-check", "--statusline", "--scope", "local")
    assert "statusLine" in desk.value(desk.project / ".claude/settings.local.json")
    until(lambda: "local" in desk.does("status", "work", "--json"))
    assert "not as they should be" not in desk.does("status", "work")


@pytest.mark.parametrize("words", [("--scope", "managed"), ("vscode",), ("claude", "vscode")])
def test_the_status_line_is_for_claude_code_and_its_user(
    desk: Desk, words: tuple[str, ...]
) -> None:
    """A machine's users have sockets of their own, and other surfaces have no such line."""
    done = desk.type("connect", "--statusline", *words)
    assert done.rc == 2
    assert "--statusline is for claude, in the scopes user and local" in done.stderr
