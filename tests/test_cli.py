"""The commands, as people and Claude Code run them: real processes, a real gateway."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from keybroker.cli.base import COMMANDS
from keybroker.config import load
from keybroker.devgateway import DevGateway
from keybroker.paths import state_directory, take_owner_lock
from keybroker.schema import schema
from tests.conftest import Home
from tests.servers.faults import Faults, PauseResponse

COMMAND = [sys.executable, "-c", "from keybroker.cli import main; main()"]
KEY = re.compile(r"sk-[A-Za-z0-9_-]{43}\n")
FINGERPRINT = re.compile(r"[0-9a-f]{8}")


class Cli:
    """keybroker on a machine of its own, with a gateway's admin key in the environment."""

    def __init__(self, home: Home, gateway: DevGateway) -> None:
        self.gateway = gateway
        self.environment = {**home.environment, "ADMIN": gateway.master_key}
        self.file = home.path / ".config/keybroker/config.toml"
        self.file.parent.mkdir(mode=0o700)
        self.state = state_directory(self.environment)
        self.configure()

    def profile(self, name: str = "work", settings: str = "", source: str = "") -> str:
        """Return a profile of the gateway, as TOML."""
        return (
            f'[profiles.{name}]\nbase_url = "{self.gateway.url}"\n{settings}\n'
            f'[profiles.{name}.source]\ntype = "litellm"\nadmin = {{ env = "ADMIN" }}\n{source}\n'
        )

    def configure(self, *profiles: str, general: str = "") -> None:
        """Write the file: one plain profile unless others are given."""
        text = f'{general}\n[cache]\nkey = "file"\n' + "".join(profiles or [self.profile()])
        self.file.touch(0o600)
        self.file.write_text(text)

    def start(self, *arguments: str, **more: Any) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        options = {"env": self.environment, "text": True, **pipes, **more}
        if arguments[:1] == ("get",):  # the daemon has tests of its own
            arguments = ("get", "--no-start", *arguments[1:])
        return subprocess.Popen([*COMMAND, *arguments], **options)

    def __call__(
        self, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> tuple[int, str, str]:
        """Run a command; return its exit status, stdout and stderr."""
        with self.start(*arguments, env={**self.environment, **(environment or {})}) as process:
            stdout, stderr = process.communicate(timeout=60)
        assert self.gateway.master_key not in stdout + stderr
        assert "Traceback" not in stderr
        return process.returncode, stdout, stderr

    def json(self, *arguments: str) -> Any:
        """Run a command that succeeds and prints JSON."""
        status, stdout, stderr = self(*arguments, "--json")
        assert (status, stderr) == (0, "")
        return json.loads(stdout)

    def live(self) -> int:
        return len(self.gateway.live_keys())

    def opens(self, key: str) -> int:
        """Return the gateway's answer to a key."""
        request = urllib.request.Request(
            f"{self.gateway.url}/v1/models", headers={"authorization": f"Bearer {key.strip()}"}
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code

    def mint(self, alias: str) -> None:
        """Mint a key at the gateway behind keybroker's back."""
        request = urllib.request.Request(
            f"{self.gateway.url}/key/generate",
            json.dumps({"key_alias": alias, "duration": "1h"}).encode(),
            {
                "authorization": f"Bearer {self.gateway.master_key}",
                "content-type": "application/json",
            },
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request) as answer:
            assert answer.status == 200


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


@pytest.fixture
def cli(home: Home, gateway: DevGateway) -> Cli:
    return Cli(home, gateway)


def one_line(stderr: str) -> str:
    """Return the line that Claude Code shows: there is one, and it is short."""
    assert stderr.count("\n") == 1
    assert stderr.startswith("keybroker: ")
    assert len(stderr) <= 201
    return stderr.removeprefix("keybroker: ").removesuffix("\n")


# get


def test_get_prints_a_key_and_nothing_else(cli: Cli) -> None:
    """One line on stdout, nothing on stderr; and the gateway takes it."""
    status, stdout, stderr = cli("get", "work")

    assert (status, stderr) == (0, "")
    assert KEY.fullmatch(stdout)
    assert cli.opens(stdout) == 200


@pytest.mark.parametrize("arguments", [["get"], ["get", "work"], ["get", "--profile", "work"]])
def test_get_prints_the_same_key_again(cli: Cli, arguments: list[str]) -> None:
    """However the profile is named: one key was minted."""
    first = cli("get")
    second = cli(*arguments)

    assert second == first
    assert cli.live() == 1


def test_get_needs_no_gateway_while_a_key_lives(cli: Cli) -> None:
    """What is sealed is printed at once."""
    first = cli("get")
    cli.gateway.close()

    assert cli("get") == first


def test_get_prints_a_stale_key_while_the_gateway_is_down(cli: Cli) -> None:
    """A key is replaced when it is due, and handed out to its end when it cannot be."""
    short = cli.profile(settings='helper_ttl = "100ms"\nhold = "30s"', source='lifetime = "90s"')
    cli.configure(short)
    first = cli("get")
    shorter = short.replace('"30s"', '"60m"').replace('"90s"', '"3h"')  # its half is over by now
    cli.configure(shorter)
    cli.gateway.close()

    assert cli("get") == first


def test_get_without_gateway_and_key_is_later(cli: Cli) -> None:
    """75: one short line that names the host, and nothing on stdout."""
    cli.gateway.close()

    status, stdout, stderr = cli("get")

    assert (status, stdout) == (75, "")
    host = cli.gateway.url.removeprefix("http://")
    said = f"work: litellm: {host} could not be reached; is it running? see base_url"
    assert one_line(stderr) == said


def test_get_with_a_wrong_admin_key_is_refused(cli: Cli) -> None:
    """77: trying again is no use; where the admin key came from is said, not what it was."""
    wrong = "sk-canary-not-the-admin-key"
    status, stdout, stderr = cli("get", environment={"ADMIN": wrong})

    assert (status, stdout) == (77, "")
    assert re.fullmatch(
        r"work: litellm: 127\.0\.0\.1:\d+ refused the admin key \(401\); "
        r"see source\.admin \(env:ADMIN\)",
        one_line(stderr),
    )
    assert wrong not in stderr
    assert cli.live() == 0


def test_get_without_the_admin_key_is_configuration(cli: Cli) -> None:
    """78: the variable is named."""
    del cli.environment["ADMIN"]

    status, stdout, stderr = cli("get")

    assert (status, stdout) == (78, "")
    said = one_line(stderr)
    assert said.startswith("work: reference env:ADMIN: the variable is not set; set ADMIN; a ")


def test_get_without_configuration_says_where_it_goes(cli: Cli) -> None:
    """78, and the command that tells where."""
    cli.file.unlink()

    assert cli("get") == (
        78,
        "",
        "keybroker: config: no profile is configured; keybroker init\n",
    )


def test_get_with_a_misspelt_key_names_file_and_line(cli: Cli) -> None:
    """78: an editor can jump there."""
    cli.configure(cli.profile(source='lifetme = "1h"'))

    status, stdout, stderr = cli("get")

    number = cli.file.read_text().splitlines().index('lifetme = "1h"') + 1
    said = "profiles.work.source.lifetme: unknown key; did you mean lifetime?"
    assert (status, stdout) == (78, "")
    assert stderr == f"keybroker: {cli.file}:{number}: {said}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["get"],
            (
                "config: several profiles, and none was named; "
                '--profile NAME, or default = "NAME" in the file: home, work'
            ),
        ),
        (["get", "wrok"], "config: no profile 'wrok'; profiles: home, work"),
    ],
)
def test_get_guesses_no_profile(cli: Cli, arguments: list[str], said: str) -> None:
    """78, with the names that there are."""
    cli.configure(cli.profile("work"), cli.profile("home"))

    assert cli(*arguments) == (78, "", f"keybroker: {said}\n")


def test_get_takes_the_default(cli: Cli) -> None:
    """The one that the file names."""
    cli.configure(cli.profile("work"), cli.profile("home"), general='default = "home"')

    first, second = cli("get"), cli("get", "home")
    other = cli("get", "work")

    assert first == second != other
    assert cli.live() == 2


def test_profiles_do_not_take_each_other_s_keys(cli: Cli) -> None:
    """Asking for one in turn with another costs neither its key."""
    cli.configure(cli.profile("work"), cli.profile("home"))
    first = [cli("get", name) for name in ("work", "home")]
    second = [cli("get", name) for name in ("work", "home")]

    assert second == first
    assert cli.live() == 2


def test_get_mints_nothing_that_it_cannot_keep(cli: Cli) -> None:
    """69: a key that nobody seals would be minted again by the next."""
    cli.file.write_text(cli.file.read_text().replace('"file"', '"memory"'))

    status, stdout, stderr = cli("get")

    assert (status, stdout) == (69, "")
    assert "a minted key could not be kept" in one_line(stderr)
    assert cli.live() == 0


def test_get_makes_a_new_key_when_the_sealed_one_is_lost(cli: Cli) -> None:
    """An unreadable cache costs one more issue, and the lost key is revoked after its hold."""
    first = cli("get")[1]
    [sealed] = (cli.state / "cache").iterdir()
    sealed.write_bytes(sealed.read_bytes()[:-1])

    status, second, stderr = cli("get")
    [row] = cli.json("status")["profiles"]

    assert (status, stderr) == (0, "")
    assert KEY.fullmatch(second)
    assert second != first
    assert [key["why"] for key in row["retired"]] == ["its secret was lost"]


def test_get_gives_up_no_key_that_is_only_locked(cli: Cli, tmp_path: Path) -> None:
    """What opens the cache may be away for a while: nothing is handed out, nothing is retired."""
    cli.file.write_text(cli.file.read_text().replace('"file"', '"auto"'))
    (tmp_path / "keybroker-wrap-key").write_text("of systemd")
    there = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    first = cli("get", environment=there)

    status, stdout, stderr = cli("get")
    [row] = cli.json("status")["profiles"]

    assert (status, stdout) == (69, "")
    assert "a minted key could not be kept" in one_line(stderr)
    assert (row["held"], row["retired"]) == (False, [])
    assert (row["lid"]["safe"], row["survives_outage_s"]) == (False, 0.0)
    shown = json.loads(cli("status", "--json", environment=there)[1])
    assert shown["profiles"][0]["lid"]["safe"]
    assert cli("get", environment=there) == first
    assert cli.live() == 1


def test_get_on_a_full_disk_says_so(cli: Cli, tmp_path: Path) -> None:
    """69, and not an internal error: the very first file is already too much."""
    (cli.state / "instance").mkdir(mode=0o700, parents=True)
    cli.state.chmod(0o700)

    status, stdout, stderr = cli("get")

    assert (status, stdout) == (69, "")
    assert "instance: cannot be kept (Is a directory)" in one_line(stderr)


def test_get_prints_the_sealed_key_when_the_journal_is_damaged(cli: Cli) -> None:
    """Nothing may be minted any more; what lives is still good for its reader."""
    first = cli("get")
    journal = cli.state / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"n":2', b'"n":7'))

    assert cli("get") == first
    assert cli("rotate")[0] == 69
    assert cli.live() == 1


def test_get_with_a_damaged_journal_and_no_key_says_so(cli: Cli) -> None:
    """69, and nothing is minted."""
    cli("check")  # makes the state directory
    (cli.state / "journal.jsonl").write_bytes(b"rubbish\n")

    status, stdout, stderr = cli("get")

    assert (status, stdout) == (69, "")
    assert one_line(stderr).startswith(f"journal: {cli.state / 'journal.jsonl'}: line 1 is damaged")
    assert cli.live() == 0


def test_get_prints_the_sealed_key_when_the_lock_cannot_be_taken(cli: Cli) -> None:
    """A state directory that cannot be written."""
    first = cli("get")
    (cli.state / "owner.lock").unlink()
    (cli.state / "owner.lock").mkdir()

    assert cli("get") == first


def test_get_refuses_a_state_directory_that_others_can_enter(cli: Cli) -> None:
    """78, with the command that mends it."""
    cli("get")
    cli.state.chmod(0o755)

    status, stdout, stderr = cli("get")

    assert (status, stdout) == (78, "")
    assert one_line(stderr) == f"{cli.state}: others can enter it; type: chmod 700 {cli.state}"


def test_get_into_a_pipe_that_nobody_reads_ends_quietly(cli: Cli) -> None:
    """As other programs do: no traceback, and the key is kept for the next."""
    read, write = os.pipe()
    os.close(read)
    process = cli.start("get", stdout=write)
    os.close(write)
    _, stderr = process.communicate(timeout=30)

    assert (process.returncode, stderr) == (141, "")
    assert cli("get")[0] == 0
    assert cli.live() == 1


def test_twenty_at_once_mint_one_key(cli: Cli) -> None:
    """From nothing: all of them print the same key, and the gateway has no other."""
    processes = [cli.start("get") for _ in range(20)]
    found = [(*process.communicate(timeout=60), process.returncode) for process in processes]

    assert {(stderr, status) for _, stderr, status in found} == {("", 0)}
    assert len({stdout for stdout, _, _ in found}) == 1
    assert KEY.fullmatch(found[0][0])
    assert cli.live() == 1


def test_get_does_not_wait_for_another_owner(cli: Cli) -> None:
    """Who holds the lock may be waiting for the network; a sealed key is printed all the same."""
    first = cli("get")
    lock = take_owner_lock(cli.state)
    assert lock is not None
    started = time.monotonic()
    try:
        second = cli("get")
    finally:
        os.close(lock)

    assert second == first
    assert time.monotonic() - started < 5


# rotate


def test_rotate_replaces_the_key_and_keeps_the_old_one_for_its_hold(cli: Cli) -> None:
    """The new one is printed from now on; readers of the old one are not cut off."""
    old = cli("get")[1]
    status, stdout, stderr = cli("rotate")
    new = cli("get")[1]

    assert (status, stderr) == (0, "")
    assert re.fullmatch(
        r"work: [0-9a-f]{8} → [0-9a-f]{8}, valid until .* \((12h|11h 59m)\); "
        r"the old key is revoked at .* \(in 1(5|4)m( \d+s)?\)\n",
        stdout,
    )
    assert old != new
    assert (cli.opens(old), cli.opens(new), cli.live()) == (200, 200, 2)


def test_rotate_prints_json(cli: Cli) -> None:
    """Fingerprints and times, never a key."""
    old = cli("get")[1]
    [result] = cli.json("rotate", "work")
    [row] = cli.json("status")["profiles"]
    hold = datetime.fromisoformat(result["revokes_at"]) - datetime.now(UTC)

    assert (result["profile"], result["rotated"]) == ("work", True)
    assert result["fingerprint"] == row["fingerprint"]
    assert result["replaced"] == row["retired"][0]["fingerprint"]
    assert timedelta(minutes=14) < hold <= timedelta(minutes=15)
    assert old.strip() not in json.dumps([result, row])


def test_rotate_all_rotates_every_profile(cli: Cli) -> None:
    """Each once."""
    cli.configure(cli.profile("work"), cli.profile("home"))
    results = cli.json("rotate", "--all")

    assert [(one["profile"], one["rotated"]) for one in results] == [("work", True), ("home", True)]
    assert cli.live() == 2


def test_rotate_dry_run_changes_nothing(cli: Cli) -> None:
    """It says what would be done, and where."""
    cli("get")

    assert cli("rotate", "--dry-run") == (
        0,
        f"work: a new key would be minted at {cli.gateway.url}\n",
        "",
    )
    assert cli.live() == 1


def test_a_rotation_that_fails_keeps_the_key(cli: Cli) -> None:
    """77 with the reason and a hint; the current key is printed as before."""
    first = cli("get")

    status, stdout, stderr = cli("rotate", environment={"ADMIN": "sk-wrong"})

    assert (status, stdout) == (77, "")
    assert re.fullmatch(
        r"keybroker: work: litellm: \S+ refused the admin key \(401\)\n"
        r"hint: see source\.admin \(env:ADMIN\)\n",
        stderr,
    )
    assert cli("get") == first


def test_a_followed_key_is_read_again(cli: Cli) -> None:
    """A key that somebody else keeps: `rotate` says when there is no newer one."""
    cli.configure(
        f'[profiles.work]\nbase_url = "{cli.gateway.url}"\n'
        '[profiles.work.source]\ntype = "static"\nkey = { env = "ADMIN" }\n'
    )
    key = cli.gateway.master_key

    process = cli.start("get")
    stdout, stderr = process.communicate(timeout=30)
    rotated = cli("rotate")

    assert (process.returncode, stdout, stderr) == (0, f"{key}\n", "")
    assert rotated[0] == 0
    said = r"work: [0-9a-f]{8} is what the source has; there is no newer one\n"
    assert re.fullmatch(said, rotated[1])
    dry = cli("rotate", "--dry-run")
    assert dry == (0, "work: the source would be read again\n", "")


# revoke


def test_revoke_ends_every_key_at_once(cli: Cli) -> None:
    """Current and retired ones, without a hold; the next `get` mints anew."""
    old = cli("get")[1]
    cli("rotate")

    assert cli("revoke", "work") == (0, "work: 2 revoked\n", "")
    assert (cli.live(), cli.opens(old)) == (0, 401)
    assert cli("get")[0] == 0
    assert cli.live() == 1


def test_revoke_leaves_the_key_of_somebody_else_alone(cli: Cli) -> None:
    """77: it is not ours to end, and goes on being handed out."""
    static = (
        f'[profiles.shared]\nbase_url = "{cli.gateway.url}"\n'
        '[profiles.shared.source]\ntype = "static"\nplaceholder = "ollama"\n'
    )
    cli.configure(static)
    cli("get")

    status, stdout, stderr = cli("revoke", "shared")

    assert (status, stdout) == (77, "")
    assert "somebody else keeps its key, which is not ours to revoke" in stderr
    assert cli("get")[1] == "ollama\n"


def test_revoke_and_its_dry_run_say_the_same_of_a_key_that_is_not_ours(cli: Cli) -> None:
    """77, also where the profile minted once: the journal knows its name, and no key of it."""
    cli("get")
    cli("revoke", "work")
    cli.configure(
        f'[profiles.work]\nbase_url = "{cli.gateway.url}"\n'
        '[profiles.work.source]\ntype = "static"\nplaceholder = "ollama"\n'
    )

    dry, real = cli("revoke", "--dry-run"), cli("revoke")

    assert dry == real
    assert (dry[0], "not ours to revoke" in dry[2]) == (77, True)


def test_revoke_needs_no_configuration(cli: Cli) -> None:
    """The journal knows where the keys were minted and where the admin key is."""
    cli("get")
    cli.file.unlink()

    status, stdout, stderr = cli("revoke", "work")

    assert (status, stdout, stderr) == (0, "work: 1 revoked\n", "")
    assert cli.live() == 0


def test_revoke_works_with_a_broken_configuration(cli: Cli) -> None:
    """What is wrong with it is said, and nothing waits for it to be mended."""
    cli("get")
    cli.file.write_text("rubbish")

    status, stdout, stderr = cli("revoke", "--all")

    assert (status, stdout) == (0, "work: 1 revoked\n")
    assert stderr.endswith("; going by the journal alone\n")
    assert cli.live() == 0


def test_revoke_dry_run_and_json(cli: Cli) -> None:
    """What would be revoked is said by fingerprint; what was is counted."""
    cli("get")
    [row] = cli.json("status")["profiles"]

    dry = cli("revoke", "--dry-run")
    result = cli.json("revoke")

    where = f"litellm {cli.gateway.url}"
    assert dry == (0, f"work: {row['fingerprint']} at {where} would be revoked\n", "")
    assert result == [
        {
            "profile": "work",
            "revoked": 1,
            "left": 0,
            "unsettled": 0,
            "published": None,
            "error": None,
            "code": None,
            "hint": None,
        }
    ]


def test_a_revocation_that_is_not_confirmed_is_not_forgotten(cli: Cli) -> None:
    """77 without insisting, the key stays in `status`, and a later command ends it."""
    cli("get")
    started = time.monotonic()
    status, stdout, stderr = cli("revoke", environment={"ADMIN": "sk-wrong"})
    took = time.monotonic() - started
    [row] = cli.json("status")["profiles"]

    assert (status, stdout) == (77, "work: 0 revoked\n")
    assert "1 not yet confirmed: litellm: " in stderr
    assert took < 10
    assert [key["why"] for key in row["retired"]] == ["revoked by request"]
    assert cli("revoke") == (0, "work: 1 revoked\n", "")
    assert cli.live() == 0


# sweep


@pytest.fixture
def strays(cli: Cli) -> tuple[str, str]:
    """A key of ours that no journal knows, and one of somebody else's."""
    cli("get")
    instance = (cli.state / "instance").read_text()
    ours = f"kb-{instance}-work-01m7zeppq60nxge04zbh7stray"
    theirs = "kb-00000000-work-01m7zeppq60nxge04zbhtheirs"
    cli.mint(ours)
    cli.mint(theirs)
    return ours, theirs


def aliases(cli: Cli) -> set[str]:
    return {key.alias or "" for key in cli.gateway.live_keys()}


@pytest.mark.parametrize(
    ("arguments", "status", "stderr"),
    [
        (["sweep"], 75, "keybroker: sweep: 1 found, none revoked\nhint: add --yes\n"),
        (["sweep", "--dry-run"], 0, ""),
        (["sweep", "--dry-run", "--yes"], 0, ""),
    ],
)
def test_sweep_only_lists_what_it_found(
    cli: Cli, strays: tuple[str, str], arguments: list[str], status: int, stderr: str
) -> None:
    """Without --yes nothing is revoked; the key in use and other prefixes are not listed."""
    before = aliases(cli)
    found = cli(*arguments)

    assert (found[0], found[2]) == (status, stderr)
    assert re.fullmatch(rf"{strays[0]}  at {cli.gateway.url}  ends 20\S+Z\n", found[1])
    assert aliases(cli) == before


def test_sweep_revokes_what_no_journal_knows(cli: Cli, strays: tuple[str, str]) -> None:
    """With --yes; the key in use still opens, and a second sweep finds nothing."""
    current = cli("get")[1]
    status, stdout, stderr = cli("sweep", "--yes")
    again = cli("sweep", "--yes")

    assert (status, stderr) == (0, "")
    assert stdout.endswith("\n1 revoked\n")
    assert strays[0] not in aliases(cli)
    assert strays[1] in aliases(cli)
    assert cli.opens(current) == 200
    assert again[:2] == (
        0,
        f"no key begins with {strays[0][:12]} that the journal does not know\n",
    )


def test_sweep_prints_json(cli: Cli, strays: tuple[str, str]) -> None:
    """One row a key."""
    [row] = cli.json("sweep", "--dry-run")

    assert (row["label"], row["at"]) == (strays[0], cli.gateway.url)


# status and check


def test_status_shows_the_key_and_what_to_paste(cli: Cli) -> None:
    """Never the key itself; and the settings are those that Claude Code reads."""
    key = cli("get")[1].strip()
    status, stdout, stderr = cli("status")

    assert (status, stderr) == (0, "")
    assert key not in stdout
    assert stdout.startswith("no daemon runs; the next `keybroker get` starts one\n")
    assert re.search(r"^PROFILE +KEY +PHASE ", stdout, re.MULTILINE)
    assert re.search(r"^work +[0-9a-f]{8} +fresh +models ", stdout, re.MULTILINE)
    assert "  kept by      key file\n" in stdout
    assert f'"ANTHROPIC_BASE_URL": "{cli.gateway.url}"' in stdout
    assert '"CLAUDE_CODE_API_KEY_HELPER_TTL_MS": "60000"' in stdout
    assert "\x1b" not in stdout


def test_status_prints_json(cli: Cli) -> None:
    """Everything that the text says, and more."""
    before = datetime.now(UTC)
    cli("get")
    found = cli.json("status")
    [row] = found["profiles"]

    assert (found["cache"], found["unconfigured"]) == ("key file", [])
    assert (row["profile"], row["kind"], row["phase"]) == ("work", "minted", "fresh")
    assert (row["held"], row["late"], row["verified"]) == (True, False, "models")
    assert (found["daemon"], row["lid"]["safe"]) == (None, True)
    assert FINGERPRINT.fullmatch(row["fingerprint"])
    assert before <= datetime.fromisoformat(row["issued_at"]) <= datetime.now(UTC)
    assert row["next"] == "mint a new key"
    assert row["settings"]["env"] == {
        "ANTHROPIC_BASE_URL": cli.gateway.url,
        "CLAUDE_CODE_API_KEY_HELPER_TTL_MS": "60000",
    }


def test_status_asks_no_gateway_and_changes_nothing(cli: Cli) -> None:
    """Before there is a key, and with the gateway away."""
    cli.gateway.close()

    [row] = cli.json("status")["profiles"]

    assert (row["phase"], row["fingerprint"], row["next"]) == ("none", None, "mint a new key")
    assert not (cli.state / "journal.jsonl").exists()


def test_status_shows_the_last_failure_until_something_works(cli: Cli) -> None:
    """What was said then, with its time."""
    cli("get", environment={"ADMIN": "sk-wrong"})
    [failed] = cli.json("status")["profiles"]
    cli("get")
    [worked] = cli.json("status")["profiles"]

    assert "refused the admin key (401)" in failed["last_failure"]["message"]
    assert worked["last_failure"] is None


def test_status_does_not_forget_a_profile_that_was_removed(cli: Cli) -> None:
    """Its keys are still alive; the command that ends them is said."""
    cli("get")
    cli.configure(cli.profile("home"))
    [left] = cli.json("status")["unconfigured"]
    text = cli("status")[1]

    assert (left["profile"], len(left["keys"])) == ("work", 1)
    assert "work: is not configured any more, and has 1 key" in text
    assert "end them: keybroker revoke work" in text


def test_check_says_whether_enough_is_left(cli: Cli) -> None:
    """0, or 75 with the command that makes a new key, if a new one can last that long."""
    none = cli("check")
    cli("get")
    enough, more = cli("check", "--min-remaining", "30m"), cli("check", "--min-remaining", "13h")
    found = cli.json("check")

    assert none == (75, "", "keybroker: work: no key\nhint: keybroker get work\n")
    assert enough[0] == 0
    assert re.fullmatch(r"work: (12h|11h 59m) left\n", enough[1])
    assert (more[0], more[2].count("\n")) == (75, 1)
    almost = cli("check", "--min-remaining", "11.999999h")
    assert (almost[0], almost[2].splitlines()[1]) == (75, "hint: keybroker rotate work")
    assert (found["profile"], found["ok"]) == ("work", True)
    assert 43_000 < found["remaining_s"] <= 43_200


def test_check_wants_a_duration(cli: Cli) -> None:
    """2: a mistake in what was typed."""
    status, stdout, stderr = cli("check", "--min-remaining", "soon")

    assert (status, stdout) == (2, "")
    assert 'expected a duration such as "90s", "15m" or "12h"' in stderr


# config


def test_config_check_says_ok(cli: Cli) -> None:
    """With the file, and a warning for what may surprise."""
    cli.configure(cli.profile(source="max_budget = 5"))

    status, stdout, stderr = cli("config", "check")

    assert (status, stderr) == (0, "")
    assert stdout.splitlines()[-1] == f"ok: 1 profile in {cli.file}"
    assert stdout.startswith("warning: profiles.work.source.max_budget: ")


def test_config_check_refuses_a_pasted_key(cli: Cli) -> None:
    """78 by file and line; the key is not repeated."""
    pasted = "sk-canary-Zx81QpLmWvUt"
    cli.configure(cli.profile().replace('{ env = "ADMIN" }', f'"{pasted}"'))

    status, stdout, stderr = cli("config", "check")

    assert (status, stdout) == (78, "")
    assert re.match(
        rf"keybroker: {re.escape(str(cli.file))}:\d+: profiles.work.source.admin: ", stderr
    )
    assert pasted not in stderr


def test_config_check_without_a_file_is_not_ok(cli: Cli) -> None:
    """78: nothing was checked."""
    cli.file.unlink()

    assert cli("config", "check")[0] == 78


def test_config_path_says_what_is_read(cli: Cli) -> None:
    """Files in their order, those that are missing marked, and the state."""
    status, stdout, stderr = cli("config", "path")

    lines = stdout.splitlines()
    assert (status, stderr) == (0, "")
    assert lines[-2:] == [str(cli.file), f"{cli.state}  (state)"]
    assert lines[0].endswith(("config.toml", "config.toml  (not there)"))


def test_config_path_works_without_a_file(cli: Cli) -> None:
    """It is what other errors tell people to type."""
    cli.file.unlink()

    assert f"{cli.file}  (not there)\n" in cli("config", "path")[1]


def test_config_show_prints_what_can_be_read_again(cli: Cli, tmp_path: Path) -> None:
    """Defaults filled in; as TOML it means the same, as JSON too."""
    cli.configure(
        cli.profile(
            settings='headers = { X-Org-Route = "eng" }\nhelper_ttl = "1.234s"\nhold = "20.5m"',
            source='models = ["a", "b\\" c"]\nmetadata = { "é" = "x", "a b" = "\\u007f" }',
        ),
        general='default = "work"',
    )
    status, stdout, stderr = cli("config", "show")
    copy = tmp_path / "copy.toml"
    copy.touch(0o600)
    copy.write_text(stdout)

    written, shown = load([cli.file]), load([copy])

    assert (status, stderr) == (0, "")
    assert cli.json("config", "show") == tomllib.loads(stdout)
    assert (shown.default, shown.cache_key) == (written.default, written.cache_key)
    assert shown.profile("work").policy == written.profile("work").policy
    assert shown.profile("work").source == written.profile("work").source
    assert shown.profile("work").headers == written.profile("work").headers


def test_config_show_prints_every_kind_of_table(cli: Cli, tmp_path: Path) -> None:
    """What is read again prints the same; a login by its name."""
    tables = """
[aws]
profile = "dev"
[vault]
address = "https://vault.example.com"
[vault.auth]
method = "jwt"
role = "llm"
jwt = { login = "ci" }
[logins.corp]
type = "oidc"
issuer = "https://login.example.com"
client_secret = { env = "S" }
parameters = { prompt = "login" }
[logins.ci]
type = "workload"
jwt = "github-actions"
[logins.sso]
type = "aws-sso"
session = "dev"
"""
    by = '[profiles.{}]\nbase_url = "https://llm.example.com"\n[profiles.{}.source]\n{}\n'
    for name, source in {
        "own": 'type = "login"\nlogin = "corp"',
        "minted": 'type = "litellm"\nlogin = "corp"\n[profiles.minted.publish]\nto = "vault"\n'
        'path = "secret/data/out"',
        "out": 'type = "litellm"\nadmin = { aws = "llm/admin" }\n[profiles.out.publish]\n'
        'to = "aws"\nsecret = "llm/out"',
        "kept": 'type = "vault"\npath = "secret/data/llm"',
        "held": 'type = "aws"\nsecret = "llm/key"\nlogin = "sso"',
    }.items():
        tables += by.format(name, name, source)
    cli.configure(tables, general='default = "own"')
    status, stdout, stderr = cli("config", "show")
    assert (status, stderr) == (0, "")
    assert cli.json("config", "show") == tomllib.loads(stdout)
    assert tomllib.loads(stdout)["profiles"]["own"]["source"]["login"] == "corp"
    assert set(cli.json("config", "show", "minted")["logins"]) == {"corp", "ci"}

    copy = tmp_path / "copy.toml"
    copy.touch(0o600)
    copy.write_text(stdout)
    written, shown = load([cli.file]), load([copy])
    for name, one in written.logins.items():
        assert shown.logins[name].settings == one.settings
    for name, profile in written.profiles.items():
        assert [one.name for one in shown.profiles[name].logins] == [
            one.name for one in profile.logins
        ]
    cli.file.write_text(stdout)
    assert cli("config", "show") == (0, stdout, "")


def test_config_show_shows_references_only(cli: Cli) -> None:
    """Where the admin key is, never what it is."""
    status, stdout, _ = cli("config", "show", "work")

    assert status == 0
    assert 'admin = { env = "ADMIN" }' in stdout


def test_config_schema_prints_the_schema(cli: Cli) -> None:
    """Whatever stands in the file."""
    cli.file.write_text("rubbish")
    status, stdout, stderr = cli("config", "schema")

    assert (status, json.loads(stdout), stderr) == (0, json.loads(json.dumps(schema())), "")


# audit


def test_audit_tells_a_key_s_life(cli: Cli) -> None:
    """Minted, verified, published, given: by fingerprint, and to whom."""
    key = cli("get")[1].strip()
    status, stdout, stderr = cli("audit", "--json")
    lines = [json.loads(line) for line in stdout.splitlines()]
    text = cli("audit", "--profile", "work")[1]

    assert (status, stderr) == (0, "")
    assert [line["event"] for line in lines] == ["minted", "verified", "published", "given"]
    assert len({line["fingerprint"] for line in lines}) == 1
    assert (lines[-1]["uid"], lines[-1]["pid"]) == (os.getuid(), os.getpid())
    assert key not in stdout + text
    assert len(text.splitlines()) == 4
    assert cli("audit", "--profile", "home")[1] == ""
    assert len(cli("audit", "--last", "2")[1].splitlines()) == 2
    for last in ("x", "-1", "1.5"):
        status, _, stderr = cli("audit", f"--last={last}")
        assert (status, "expected a whole number\n" in stderr) == (2, True)


def test_audit_verify_names_a_line_that_was_changed(cli: Cli) -> None:
    """0 while all follow from each other, else 69 with the file and the line after."""
    cli("get")
    cli("get")
    fine = cli("audit", "verify")
    file = cli.state / "audit.jsonl"
    lines = file.read_text().splitlines()
    lines[2] = lines[2].replace('"event":"verified"', '"event":"minted"')
    file.write_text("\n".join(lines) + "\n")
    status, stdout, stderr = cli("audit", "verify")

    assert fine == (0, "ok: 5 lines in 1 file\n", "")
    assert (status, stdout) == (69, "")
    assert stderr.startswith(
        f"keybroker: audit: {file}: line 4 does not follow the one before it\n"
    )
    assert cli("get")[0] == 0


def test_audit_of_nothing_is_empty(cli: Cli) -> None:
    """Nobody was given anything yet."""
    assert cli("audit") == (0, "", "")
    assert cli("audit", "verify") == (0, "ok: 0 lines in 0 files\n", "")


# source test


def test_source_test_shows_a_whole_life(cli: Cli) -> None:
    """Each step, and nothing is left at the gateway; the key in use is not touched."""
    first = cli("get")
    rows = cli.json("source", "test")
    status, stdout, stderr = cli("source", "test", "work")

    steps = ["keep", "issue", "verify", "find", "revoke", "refused", "gone"]
    assert [(row["step"], row["ok"]) for row in rows] == [(step, True) for step in steps]
    assert (status, stderr) == (0, "")
    assert [line.split()[:2] for line in stdout.splitlines()] == [["ok", step] for step in steps]
    assert cli("get") == first
    assert cli.live() == 1


def test_source_test_says_which_step_failed(cli: Cli) -> None:
    """77: with what was seen."""
    status, stdout, stderr = cli("source", "test", environment={"ADMIN": "sk-wrong"})

    assert status == 77
    assert stdout.splitlines()[1].startswith("failed  issue    litellm: ")
    assert "hint: see source.admin (env:ADMIN)\n" in stderr


def test_source_test_says_whether_the_key_or_the_gateway_may_be_wrong(cli: Cli) -> None:
    """A refused key is another's; where nothing can be told, /v1/models may be missing."""
    kept = f'[profiles.work]\nbase_url = "{cli.gateway.url}"\n[profiles.work.source]\n'
    kept += 'type = "static"\nkey = { env = "KEY" }\n'
    variables = {"KEY": "sk-of-another-gateway"}
    cli.configure(kept)
    status, _, stderr = cli("source", "test", environment=variables)
    cli.configure(kept.replace(cli.gateway.url, "http://127.0.0.1:1"))
    undecided = cli("source", "test", environment=variables)[2]

    said = "hint: the gateway does not know this key: is it the right one, and for "
    assert (status, f"{said}{cli.gateway.url}?\n" in stderr) == (77, True)
    assert "hint: does http://127.0.0.1:1 serve /v1/models?\n" in undecided


# the frame


@pytest.mark.parametrize(
    "command",
    [
        *([name] for name in COMMANDS),
        *(["config", name] for name in ("check", "show", "path", "schema")),
        ["audit", "verify"],
        ["source", "test"],
        [],
    ],
    ids=" ".join,
)
def test_every_command_explains_itself(cli: Cli, command: list[str]) -> None:
    """--help, whatever stands in the configuration."""
    cli.file.write_text("rubbish")
    status, stdout, stderr = cli(*command, "--help")

    assert (status, stderr) == (0, "")
    assert stdout.startswith(" ".join(["Usage: keybroker", *command]))


@pytest.mark.parametrize(
    "command", [["gte"], ["config", "chekc"], ["rotate", "--now"], ["rotate", "a", "b"]]
)
def test_what_is_misspelt_is_2(cli: Cli, command: list[str]) -> None:
    """Usage on stderr, nothing on stdout."""
    status, stdout, stderr = cli(*command)

    assert (status, stdout) == (2, "")
    assert stderr.startswith("Usage: keybroker ")


def test_get_says_what_is_misspelt_in_one_line(cli: Cli) -> None:
    """Claude Code shows what the helper says."""
    status, stdout, stderr = cli("get", "--now")

    assert (status, stdout) == (2, "")
    assert stderr == "keybroker: get: No such option '--now'; keybroker get --help\n"


def test_the_version_is_printed(cli: Cli) -> None:
    """Of this package."""
    from keybroker import __version__

    assert cli("--version") == (0, f"keybroker, version {__version__}\n", "")


@pytest.mark.parametrize(
    "command", [["get"], ["status"], ["rotate"], ["config", "show"], ["check"]], ids=" ".join
)
def test_a_home_that_is_not_there_is_said(cli: Cli, command: list[str]) -> None:
    """78: not a traceback."""
    with cli.start(*command, env={"PATH": os.defpath}) as process:
        stdout, stderr = process.communicate(timeout=30)

    assert (process.returncode, stdout) == (78, "")
    assert stderr.startswith("keybroker: paths: HOME is not set")


def test_nothing_of_ours_can_be_read_by_others(cli: Cli) -> None:
    """Whatever was written where: 0600 in 0700, and no file holds the key."""
    key = cli("get")[1].strip()
    cli("rotate")
    cli("source", "test")
    cli("audit")
    old = [path for path in cli.state.rglob("*") if path.stat().st_mode & 0o077]
    files = [path for path in cli.state.parent.rglob("*") if path.is_file()]

    assert old == []
    assert len(files) > 5
    assert [path for path in files if key.encode() in path.read_bytes()] == []
    assert [p for p in files if cli.gateway.master_key.encode() in p.read_bytes()] == []


WAIT = """
from keybroker.cli.work import owner
from keybroker.errors import NobodyAnswers
try:
    with owner(0.1):
        print("taken")
except NobodyAnswers as error:
    print(error.exit_status, error.message, error.hint, sep="; ")
"""


def test_who_waits_for_the_owner_in_vain_is_told(cli: Cli) -> None:
    """69 after a while: two owners would mint twice."""
    lock = take_owner_lock(cli.state)
    assert lock is not None
    command = [sys.executable, "-c", WAIT]
    refused = subprocess.check_output(command, env=cli.environment, text=True)
    os.close(lock)
    taken = subprocess.check_output(command, env=cli.environment, text=True)

    said = "another keybroker is at work on the same state directory; try again when it is done"
    assert (refused, taken) == (f"69; {said}\n", "taken\n")


def test_a_mistyped_admin_reference_costs_no_key(cli: Cli) -> None:
    """It is for the same gateway: handed out on, and so it is when the line is mended."""
    first = cli("get")
    cli.configure(cli.profile().replace('env = "ADMIN"', 'env = "ADNIM"'))
    mistyped = cli("get")
    cli.configure()

    assert (mistyped, cli("get")) == (first, first)
    assert cli.live() == 1


def test_an_output_that_is_full_is_74(cli: Cli) -> None:
    """It is said in a line, and Python says nothing after it."""
    with (
        open("/dev/full", "w") as full,
        cli.start("config", "path", stdout=full) as process,
    ):
        _, stderr = process.communicate(timeout=60)

    assert process.returncode == 74
    assert stderr == "keybroker: output: cannot be written (No space left on device)\n"


@pytest.mark.parametrize("command", ["rotate", "revoke"])
def test_a_profile_and_all_are_not_given_together(cli: Cli, command: str) -> None:
    """Whoever names one does not mean every one."""
    cli("get")
    status, _, stderr = cli(command, "--all", "work")

    assert (status, cli.live()) == (2, 1)
    assert "not both" in stderr


def test_sweep_without_a_gateway_to_ask_says_so(cli: Cli) -> None:
    """No all-clear from nobody."""
    cli.configure(
        '[profiles.local]\nbase_url = "http://localhost:1"\n[profiles.local.source]\n'
        'type = "static"\nplaceholder = "ollama"\n'
    )
    status, stdout, stderr = cli("sweep")

    assert (status, stdout) == (78, "")
    assert stderr.startswith("keybroker: sweep: no configured profile mints keys")


def test_a_key_that_somebody_else_keeps_may_move(cli: Cli) -> None:
    """Its old value is of the old place: the new place is read at once."""
    moved = (
        '[profiles.own]\nbase_url = "http://127.0.0.1:1"\nverify = "none"\n[profiles.own.source]\n'
    )
    environment = {"K1": "sk-first-of-the-two", "K2": "sk-second-of-the-two"}
    for name, key in environment.items():
        cli.configure(f'{moved}type = "static"\nkey = {{ env = "{name}" }}\n')
        assert cli("get", environment=environment) == (0, f"{key}\n", "")


def test_minted_keys_of_a_profile_that_turned_static_are_ended(cli: Cli) -> None:
    """Where they were minted, one hold later; until then they are listed."""
    short = cli.profile(settings='helper_ttl = "1s"\nhold = "1s"', source='lifetime = "10m"')
    cli.configure(short)
    cli("get")
    cli("rotate")
    cli.configure(
        f'[profiles.work]\nbase_url = "{cli.gateway.url}"\nhelper_ttl = "1s"\nhold = "1s"\n'
        '[profiles.work.source]\ntype = "static"\nplaceholder = "ollama"\n'
    )
    assert cli("get") == (0, "ollama\n", "")
    until = time.monotonic() + 20
    while cli.live() and time.monotonic() < until:
        assert cli("get")[1] == "ollama\n"
    assert cli.live() == 0


def test_revoke_all_ends_the_keys_of_every_profile(cli: Cli) -> None:
    """Also while one of them is at work already, and without waiting for nothing."""
    short = 'helper_ttl = "1s"\nhold = "1s"'
    cli.configure(*(cli.profile(name, short, 'lifetime = "10m"') for name in ("a", "b")))
    for arguments in (["get", "a"], ["get", "b"], ["rotate", "b"]):
        assert cli(*arguments)[0] == 0
    until = time.monotonic() + 1.2  # a revocation of b falls due
    while time.monotonic() < until:
        cli("status")
    started = time.monotonic()
    status, stdout, stderr = cli("revoke", "--all")

    assert (status, stderr) == (0, "")
    assert stdout.startswith("a: 1 revoked\nb: ")
    assert cli.live() == 0
    assert time.monotonic() - started < 10


def test_a_key_of_a_slow_gateway_is_not_thrown_away(cli: Cli) -> None:
    """Three calls of three seconds are more than an answer may take; the key is printed."""
    with Faults(cli.gateway.url) as faults:
        cli.configure(cli.profile().replace(cli.gateway.url, faults.url))
        for path in ("/key/generate", "/v1/models"):
            faults.next(PauseResponse(at_most=3.0), path=path, times=None)
        status, stdout, stderr = cli("get")

    assert (status, stderr) == (0, "")
    assert KEY.fullmatch(stdout)
    assert cli.live() == 1
