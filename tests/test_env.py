"""env: what it prints is what a shell then has; no key unless somebody asked for one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker import foreign
from keybroker.cli.shells import SHELLS
from keybroker.devgateway import DevGateway
from tests.resident import Resident, until
from tests.test_run import FOREIGN, configure, key_info, own

TRICKY = [
    "plain",
    "it's",
    "a\\'b\\\\c\\",
    '$HOME ${HOME} $(touch owned) `touch owned` "x" ; touch owned #',
    "two\nlines",
    "\N{LEFT SINGLE QUOTATION MARK}x\N{RIGHT SINGLE QUOTATION MARK}; touch owned",
    "100% !! ~ * ? [a] {b,c} <d> |& (e)",
    "",
]
PROGRAMS = {"sh": ("sh", "bash", "dash", "zsh"), "fish": ("fish",)}
HERE = [
    (language, found)
    for language, names in PROGRAMS.items()
    for name in names
    if (found := shutil.which(name))
]


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


@pytest.fixture
def user(resident: Resident, gateway: DevGateway) -> Resident:
    resident.environment["ADMIN"] = gateway.master_key
    configure(resident, gateway.url)
    return resident


def environment_of(shell: str, text: str, folder: Path, before: dict[str, str]) -> dict[str, str]:
    """Return what a shell exports after it was told something, in an empty folder."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [shell, "-c", f"{text}\nenv -0"],
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **before},
        cwd=folder,
        capture_output=True,
        check=True,
    )
    assert done.stderr == b""
    assert not (folder / "owned").exists()
    return dict(one.split("=", 1) for one in done.stdout.decode().split("\0") if one)


def test_the_shells_are_there() -> None:
    """sh, bash and fish are what the documentation says it was tried in."""
    assert {Path(found).name for _, found in HERE} >= {"sh", "bash", "fish"}


@pytest.mark.parametrize(("language", "shell"), HERE)
@pytest.mark.parametrize("value", TRICKY)
def test_a_shell_takes_a_value_as_it_is(
    tmp_path: Path, language: str, shell: str, value: str
) -> None:
    """Whatever is in it; and what is unset is gone, whether it was there or not."""
    export, unset = SHELLS[language]
    text = "\n".join([unset("ABSENT"), unset("THERE"), export("NAME", value)])
    seen = environment_of(shell, text, tmp_path / "cwd", {"THERE": "1"})
    assert (seen["NAME"], "THERE" in seen) == (value, False)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("plain", "'plain'"),
        ("it's", "'it''s'"),
        ('$env:HOME `$x "y"', "'$env:HOME `$x \"y\"'"),
        ("\u2018a\u2019b\u201ac\u201b", "'\u2018\u2018a\u2019\u2019b\u201a\u201ac\u201b\u201b'"),
        ("two\nlines", "'two\nlines'"),
    ],
)
def test_powershell_is_quoted_by_its_rules(value: str, written: str) -> None:
    """Between single quotes only those mean something, all five of them, and are doubled."""
    export, unset = SHELLS["powershell"]
    assert export("NAME", value) == f"$env:NAME = {written}"
    assert unset("NAME") == "Remove-Item Env:NAME -ErrorAction SilentlyContinue"


@pytest.mark.parametrize(("language", "shell"), HERE)
def test_a_shell_that_evaluates_it_is_connected(
    user: Resident, gateway: DevGateway, tmp_path: Path, language: str, shell: str
) -> None:
    """The address and the TTL are set, what leads elsewhere is gone, and there is no key."""
    user.environment |= FOREIGN
    status, text, stderr = user.cli("env", "--shell", language, "--model", "claude-a")
    assert (status, stderr) == (0, "")
    seen = environment_of(shell, text, tmp_path / "cwd", FOREIGN)

    assert [name for name in FOREIGN if name in seen] == ["ANTHROPIC_BASE_URL"]
    assert seen["ANTHROPIC_BASE_URL"] == gateway.url
    assert seen["CLAUDE_CODE_API_KEY_HELPER_TTL_MS"] == "60000"
    assert seen["ANTHROPIC_DEFAULT_OPUS_MODEL"] == seen["ANTHROPIC_MODEL"] == "claude-a"
    assert gateway.requests == 0


def test_it_unsets_what_run_takes_out(user: Resident) -> None:
    """One list; what is there by pattern alone is unset where it is there."""
    named = [line.removeprefix("unset ") for line in user.cli("env")[1].splitlines()]
    assert set(foreign.NAMES) <= set(named)
    user.environment |= FOREIGN
    lines = user.cli("env", "--keep", "AWS_PROFILE")[1].splitlines()
    assert "unset CLAUDE_CODE_USE_WHAT_COMES_NEXT" in lines
    assert "unset AWS_PROFILE" not in lines


@pytest.mark.parametrize(
    ("shell", "line"),
    [("/usr/bin/fish", "set -e"), ("/bin/zsh", "unset"), ("", "unset"), ("/opt/pwsh", "Remove")],
)
def test_the_language_is_that_of_the_users_shell(user: Resident, shell: str, line: str) -> None:
    """As SHELL has it; --shell says otherwise."""
    user.environment["SHELL"] = shell
    assert user.cli("env")[1].startswith(line)
    assert user.cli("env", "--shell", "sh")[1].startswith("unset")


def test_a_printed_key_is_short_small_and_listed(user: Resident, gateway: DevGateway) -> None:
    """It is nobody's that could be given another: `status` has it, also from another daemon."""
    status, text, stderr = user.cli("env", "--print-key", "--ttl", "1h")
    assert status == 0
    [found] = re.findall(r"export ANTHROPIC_AUTH_TOKEN='(.+)'", text)
    key = str(found)
    said = re.fullmatch(
        r"keybroker: key ([0-9a-f]{8}) until [-0-9: ]+, with a budget of 2; it cannot rotate; "
        r"keybroker revoke (work-env-[0-9a-f]{6}) ends it\n",
        stderr,
    )
    assert said is not None
    assert key_info(gateway, key)["max_budget"] == 2
    pid = user.owner()
    assert pid is not None
    for _ in range(2):
        [given] = json.loads(user.cli("status", "--json")[1])["exported"]
        assert (given["fingerprint"], given["profile"], given["program"]) == (*said.groups(), None)
        if user.owner() == pid:
            os.kill(pid, 9)
            until(lambda: user.owner() is None)
            assert user.cli("get", "work")[0] == 0
    assert user.cli("revoke", said[2]) == (0, f"{said[2]}: 1 revoked\n", "")
    assert own(gateway) == []


def test_a_printed_key_is_revoked_at_its_end(user: Resident, gateway: DevGateway) -> None:
    """Though the command is long over, and nothing follows it."""
    assert user.cli("env", "--print-key", "--ttl", "10s")[0] == 0
    assert len(own(gateway)) == 1
    until(lambda: user.status()["unconfigured"] == [], 20)
    assert sum("-env-" in line for line in user.said().splitlines()) == 1


def test_a_ttl_without_a_key_is_a_mistake(user: Resident) -> None:
    """What has no key cannot end."""
    status, stdout, stderr = user.cli("env", "--ttl", "1h")
    assert (status, stdout) == (2, "")
    assert "--ttl and --budget are for --print-key" in stderr
