"""Sign-ins that end: who is told, when, and what serves until then."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from keybroker import asking, hooks, wire
from keybroker.cache import find_wrap_key
from keybroker.config import Config, parse
from keybroker.credential import Secret
from keybroker.document import Where
from keybroker.endings import EVENT, NEVER, Endings, file_of_told
from keybroker.errors import ConfigError, KeybrokerError, LoginNeeded
from keybroker.login.tokens import Store, Tokens
from keybroker.signin import SIGNED_OUT, SignIn, Standing
from keybroker.sources.held import Held
from keybroker.sources.signed_in import SignedIn
from keybroker.values import replace
from tests.resident import Resident, until

SINCE = datetime(2026, 11, 22, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)


def configured(**logins: Mapping[str, Any]) -> Config:
    """Return a configuration with some logins, and a profile for each."""
    common = {"type": "oidc", "issuer": "https://login.example.com"}
    source = {"type": "login"}
    url = "https://llm.example.com"
    return parse(
        {
            "logins": {name: {**common, **one} for name, one in logins.items()},
            "profiles": {
                f"for-{name}": {"base_url": url, "source": {**source, "login": name}}
                for name in logins
            },
        },
        Where({}, "config"),
    )


def kept(state: Path, sign_in: SignIn, key: Secret, **standing: Any) -> Standing:
    """Keep a sign-in as one that was done."""
    made = Standing(
        sign_in.name,
        sign_in.type,
        sign_in.mark,
        "ada@example.com",
        **{"since": SINCE, "refreshed_at": SINCE, **standing},
    )
    Store(state, key).save(Tokens(made, Secret(f"token-{secrets.token_hex(8)}")))
    return made


class Desk:
    """One state directory, and what is kept in it."""

    def __init__(self, state: Path, config: Config) -> None:
        self.state, self.config = state, config
        self.key = Secret(secrets.token_hex(32))
        self.endings = Endings(state, config)

    def keep(self, name: str = "corp", **standing: Any) -> Standing:
        self.endings.hurry()
        return kept(self.state, self.config.logins[name], self.key, **standing)

    def told(self, now: datetime) -> list[tuple[str, bool]]:
        return [(one.login, one.over) for one in self.endings.look(now)]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir(mode=0o700)
    return tmp_path / "state"


def test_an_end_is_told_ahead_and_when_it_is_there(state: Path) -> None:
    """Once each, and nothing is read in between."""
    desk = Desk(state, configured(corp={}))
    ends = SINCE + 8 * HOUR
    desk.keep(renewable=True, ends_at=ends, access_ends=SINCE + HOUR)

    assert desk.told(SINCE) == []
    assert desk.endings.due == ends - HOUR
    assert desk.endings.soon == {}
    assert desk.told(ends - HOUR) == [("corp", False)]
    assert desk.endings.due == ends
    desk.endings.hurry()
    assert desk.told(ends - HOUR / 2) == []
    [ending] = desk.endings.soon.values()
    assert ending.text == "login corp: the sign-in ends at 2026-11-22T16:00:00Z"
    assert ending.facts == {
        "event": "login_ending",
        "login": "corp",
        "who": "ada@example.com",
        "ends_at": "2026-11-22T16:00:00Z",
        "ended": False,
        "reason": None,
        "profiles": ["for-corp"],
        "command": "keybroker login corp",
    }
    assert desk.told(ends) == [("corp", True)]
    assert desk.endings.due == NEVER
    desk.endings.hurry()
    assert desk.told(ends + HOUR) == []
    assert [one.text for one in desk.endings.soon.values()] == ["login corp: the sign-in has ended"]


def test_another_sign_in_is_told_of_again(state: Path) -> None:
    """Also one that was lengthened, and is about to end a second time."""
    desk = Desk(state, configured(corp={}))
    ends = SINCE + 8 * HOUR
    desk.keep(renewable=True, ends_at=ends)
    assert desk.told(ends) == [("corp", True)]
    desk.keep(renewable=True, since=ends, refreshed_at=ends, ends_at=ends + 8 * HOUR)
    assert desk.told(ends + HOUR) == []
    assert desk.told(ends + 7 * HOUR) == [("corp", False)]
    desk.keep(renewable=True, since=ends, refreshed_at=ends, ends_at=ends + 12 * HOUR)
    assert desk.told(ends + 7 * HOUR) == []
    assert desk.told(ends + 11 * HOUR) == [("corp", False)]


def test_a_short_one_is_not_about_to_end_from_its_beginning(state: Path) -> None:
    """A quarter of it is soon enough; as long as `warn` says, where that is less."""
    desk = Desk(state, configured(corp={}, brief={"warn": "1m"}))
    for name in ("corp", "brief"):
        desk.keep(name, access_ends=SINCE + HOUR)
    assert desk.told(SINCE + HOUR / 4) == []
    assert desk.endings.due == SINCE + HOUR * 3 / 4
    assert desk.told(SINCE + HOUR * 3 / 4) == [("corp", False)]
    assert desk.endings.due == SINCE + HOUR - timedelta(minutes=1)
    assert desk.told(SINCE + HOUR) == [("corp", True), ("brief", True)]


def test_an_end_that_nobody_foresaw_is_told_when_it_is_there(state: Path) -> None:
    """The provider ended it; before, nobody could say when that would be."""
    desk = Desk(state, configured(corp={}))
    standing = desk.keep(renewable=True)
    assert desk.told(SINCE + 100 * HOUR) == []
    assert desk.endings.due == NEVER
    desk.keep(renewable=True, ended="login.example.com has ended the sign-in")
    [ending] = desk.endings.look(SINCE + 101 * HOUR)
    assert (ending.over, ending.until, ending.standing.since) == (True, None, standing.since)
    assert ending.text == "login corp: login.example.com has ended the sign-in"
    assert ending.facts["reason"] == "login.example.com has ended the sign-in"


def test_nobody_is_told_of_what_they_did_themselves(state: Path) -> None:
    """To sign out, or never to have signed in, is no end; a machine has none."""
    config = configured(corp={})
    machine = {"type": "workload", "jwt": {"file": "/t"}}
    tables = {"logins": {"ci": machine}, "profiles": {}}
    desk = Desk(state, config)
    assert desk.told(SINCE) == []
    desk.keep(renewable=True, ends_at=SINCE + HOUR, ended=SIGNED_OUT)
    assert desk.told(SINCE + 2 * HOUR) == []
    ci = Desk(state, parse(tables, Where({}, "config")))
    ci.keep("ci", access_ends=SINCE + HOUR)
    assert ci.told(SINCE + 2 * HOUR) == []


def test_the_next_process_tells_it_no_second_time(state: Path) -> None:
    """What was told of is in a file; another end than that is told."""
    desk = Desk(state, configured(corp={}))
    ends = SINCE + 8 * HOUR
    desk.keep(renewable=True, ends_at=ends)
    [ending] = desk.endings.look(ends - HOUR)
    file_of_told(state, "corp").write_text(ending.mark)

    after = Endings(state, desk.config)
    assert after.look(ends - HOUR / 2) == []
    assert list(after.soon) == ["corp"]
    [over] = Endings(state, desk.config).look(ends)
    assert over.over


def test_a_token_in_its_last_minute_is_no_key(state: Path) -> None:
    """Who could not renew it is needed; one that can be renewed is no reason to call them."""
    desk = Desk(state, configured(corp={}))
    held = Held()
    held.store = Store(state, desk.key)
    source = SignedIn(desk.config.profiles["for-corp"], {}, held)
    now = datetime.now(UTC)
    for left, works in ((70, True), (50, False)):
        desk.keep(refreshed_at=now - HOUR, access_ends=now + timedelta(seconds=left))
        if works:
            lease = source.issue("").lease
            assert lease.expires_at == lease.reread_at == now + timedelta(seconds=left - 60)
            continue
        with pytest.raises(LoginNeeded, match="login corp: the sign-in has ended"):
            source.issue("")
    source.close()


# programs that are told


def test_a_program_gets_the_facts_and_little_else(tmp_path: Path) -> None:
    """On stdin, as JSON in a line; of the environment what a window is made with."""
    seen = tmp_path / "seen"
    command = ["sh", "-c", f"cat > {seen}; env >> {seen}; echo said; echo more >&2"]
    environment = {"PATH": os.defpath, "DBUS_SESSION_BUS_ADDRESS": "unix:x", "SECRET": "x"}
    hooks.run(command, {"event": EVENT, "who": "ädä"}, environment)
    first, *rest = seen.read_text().splitlines()
    assert json.loads(first) == {"event": EVENT, "who": "ädä"}
    assert {line.partition("=")[0] for line in rest} <= {*environment, "PWD", "SHLVL", "_"}
    assert "SECRET=x" not in rest
    assert "DBUS_SESSION_BUS_ADDRESS=unix:x" in rest


def test_a_program_that_fails_is_named(tmp_path: Path) -> None:
    """One that hangs is killed, with all that it started; one that reads nothing is fine."""
    facts, environment = {"event": EVENT}, {"PATH": os.defpath}
    hooks.run(["true"], facts, environment)
    with pytest.raises(ConfigError, match=r"hook login_ending: prog cannot be run \(No such"):
        hooks.run(["/nowhere/prog"], facts, environment)
    with pytest.raises(KeybrokerError, match="hook login_ending: sh ended with status 3"):
        hooks.run(["sh", "-c", "exit 3"], facts, environment)
    child = tmp_path / "child"
    begun = time.monotonic()
    with pytest.raises(KeybrokerError, match=r"hook login_ending: sh took longer than 0\.5 s"):
        hooks.run(["sh", "-c", f"sleep 60 & echo $! > {child}; wait"], facts, environment, 0.5)
    assert time.monotonic() - begun < 10
    until(
        lambda: not Path(f"/proc/{child.read_text().strip()}/cmdline").is_file() or _is_over(child)
    )


def _is_over(child: Path) -> bool:
    """A process that nobody waits for is a zombie: it has no command line any more."""
    try:
        return Path(f"/proc/{child.read_text().strip()}/cmdline").read_bytes() == b""
    except FileNotFoundError:
        return True


# a daemon

CONFIG = """
[profiles.work]
base_url = "http://127.0.0.1:9"
verify = "none"
[profiles.work.source]
type = "login"
login = "corp"
[logins.corp]
type = "oidc"
issuer = "http://127.0.0.1:9"
{more}
[hooks]
login_ending = {hook}
"""


class Signed:
    """A daemon whose person has signed in for a few seconds, and the programs that it tells."""

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        self.facts = resident.home.path / "facts"
        self.opened = resident.home.path / "opened"
        browser = resident.home.path / "browser"
        browser.write_text(f"#!/bin/sh\necho $1 >> {self.opened}\n")
        browser.chmod(0o700)
        resident.environment.update(BROWSER=str(browser), DISPLAY=":0")

    def start(
        self,
        seconds: float,
        hook: list[str] | None = None,
        more: str = "",
        lasts: float | None = None,
    ) -> Standing:
        hook = hook or ["sh", "-c", f"cat >> {self.facts}"]
        self.resident.configure(CONFIG.format(hook=json.dumps(hook), more=more))
        standing = self.sign_in(seconds, lasts)
        self.resident.start()
        return standing

    def sign_in(self, seconds: float, lasts: float | None = None) -> Standing:
        """Have a token that lives so long, and is renewed for so long."""
        key = find_wrap_key("file", self.resident.state, self.resident.environment).key
        assert key is not None
        now = datetime.now(UTC)
        sign_in = parse(_tables(self.resident.file), Where({}, "config")).logins["corp"]
        return kept(
            self.resident.state,
            sign_in,
            key,
            since=now,
            refreshed_at=now,
            access_ends=now + timedelta(seconds=seconds),
            renewable=lasts is not None,
            ends_at=None if lasts is None else now + timedelta(seconds=lasts),
        )

    def told(self) -> list[dict[str, Any]]:
        if not self.facts.exists():
            return []
        return [json.loads(line) for line in self.facts.read_text().splitlines()]


def _tables(file: Path) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(file.read_text())


@pytest.fixture
def signed(resident: Resident) -> Iterator[Signed]:
    """One who has signed in."""
    one = Signed(resident)
    yield one
    assert not one.opened.exists(), "a window was opened"


def test_an_end_is_seen_everywhere_and_told_twice(signed: Signed) -> None:
    """Ahead and at the end, once each, also by a daemon that is started anew; the key serves on."""
    resident = signed.resident
    standing = signed.start(600, more='warn = "3s"', lasts=12)
    status, key, _ = resident.helper()
    assert (status, key[:6]) == (0, "token-")

    [ahead] = until(signed.told, 30)
    assert (ahead["ended"], ahead["login"], ahead["profiles"]) == (False, "corp", ["work"])
    assert standing.ends_at is not None
    assert ahead["ends_at"] == standing.ends_at.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert key.strip() not in json.dumps(ahead)
    needed = resident.row()["sign_in"]
    assert (needed["login"], needed["command"]) == ("corp", "keybroker login corp")

    until(lambda: len(signed.told()) == 2, 30)
    assert [one["ended"] for one in signed.told()] == [False, True]
    assert resident.row()["sign_in"]["ended"] is True
    assert resident.cli("statusline", "work")[1].endswith(" ! login needed\n")
    checked = json.loads(resident.cli("check", "--json", "work")[1])
    assert checked["needs"] == "login needed: keybroker login corp"
    assert resident.helper() == (0, key, "")

    until(lambda: file_of_told(resident.state, "corp").read_text().startswith("over "))
    resident.kill(15)
    resident.start()
    until(lambda: resident.row()["sign_in"])
    assert resident.helper() == (0, key, "")
    assert len(signed.told()) == 2
    assert resident.said().count("login corp: the sign-in ends at ") == 1


def test_a_sign_in_that_has_ended_says_what_to_type(signed: Signed, native_helper: Path) -> None:
    """By either helper and by `get`: 77, one line; until then the key serves."""
    resident = signed.resident
    signed.start(15)
    status, key, stderr = resident.helper()
    assert (status, key[:6], stderr) == (0, "token-", "")
    said = "keybroker: work: login corp: the sign-in has ended; run: keybroker login corp\n"
    until(lambda: resident.helper()[0] == 77, 30)
    assert resident.helper() == (77, "", said)
    resident.native = native_helper
    assert resident.helper() == (77, "", said)
    resident.native = None
    assert resident.cli("get", "work") == (77, "", said)
    needed = said.replace("keybroker: work: ", "keybroker: ").replace("; run:", "\nhint: run:")
    assert resident.cli("check", "work") == (77, "", needed)
    resident.kill(15)
    assert resident.cli("get", "--no-start", "work") == (77, "", said)


def test_signing_out_does_not_depend_on_who_waits_for_it(signed: Signed) -> None:
    """A command that is gone has said what it wants: the token is not handed out any more."""
    resident = signed.resident
    signed.start(600)
    assert resident.helper()[0] == 0
    line = wire.control_line("sign", {"login": "corp", "stage": "leave", "key": None})
    with closing(asking.connect(os.fsencode(resident.socket), time.monotonic() + 5)) as server:
        server.sendall(line)
    until(lambda: resident.helper()[0] == 77, 30)
    assert resident.row()["held"] is False


@pytest.mark.parametrize("words", [{"stage": "keep", "key": None}, {"stage": "stop"}, {}])
def test_words_that_nobody_knows_end_no_sign_in(signed: Signed, words: dict[str, Any]) -> None:
    """Of whoever asks the daemon to change one."""
    resident = signed.resident
    signed.start(600)
    key = resident.helper()[1]
    with pytest.raises(KeybrokerError, match="words that are not known"):
        wire.control(resident.socket, "sign", 30, login="corp", **words)
    assert resident.helper() == (0, key, "")
    assert resident.cli("whoami")[0] == 0


def test_without_a_keyring_it_is_said_what_would_do(resident: Resident) -> None:
    """Nobody can sign in then, so that is not what is to be typed."""
    resident.configure('[cache]\nkey = "memory"\n' + CONFIG.format(hook='["true"]', more=""))
    resident.start()
    status, key, said = resident.helper()
    assert (status, key) == (69, "")
    assert said == (
        "keybroker: work: login corp: nothing opens the sign-ins here; "
        'unlock the keyring, or set key = "file" in a table [cache]; see docs/cache.md\n'
    )


def test_status_and_doctor_say_what_to_type(signed: Signed) -> None:
    """With a daemon and without: how long it lasts, for whom, and what to type."""
    resident = signed.resident
    signed.start(3600, more='warn = "1m"')
    said = resident.cli("status")[1]
    assert "\nlogin corp: ada@example.com; until " in said
    assert said.endswith("\n  for          work\n")
    [row] = json.loads(resident.cli("status", "--json")[1])["logins"]
    assert (row["profiles"], row["ending"], row["command"]) == (["work"], False, None)
    assert not {one["id"] for one in _findings(resident)} & {"login-needed", "login-ending"}

    signed.sign_in(40)
    config = resident.file.read_text()
    resident.configure(config.replace('warn = "1m"', 'warn = "2m"'))
    sign_in = parse(_tables(resident.file), Where({}, "config")).logins["corp"]
    key = find_wrap_key("file", resident.state, resident.environment).key
    assert key is not None
    now = datetime.now(UTC)
    long_ago, soon = now - timedelta(hours=8), now + timedelta(seconds=90)
    kept(resident.state, sign_in, key, since=long_ago, refreshed_at=long_ago, access_ends=soon)
    resident.kill(15)
    for runs in (False, True):
        if runs:
            resident.start()
            until(lambda: resident.row()["sign_in"])
        said = resident.cli("status")[1]
        assert said.endswith("\n  for          work\n  ends soon    type: keybroker login corp\n")
        [found] = [one for one in _findings(resident) if one["id"] == "login-ending"]
        assert found["what"].startswith("login corp, for work: ada@example.com; until ")
        assert (found["severity"], found["fix"]) == ("warning", "keybroker login corp")
        checked = json.loads(resident.cli("check", "--json", "work")[1])
        words, _, command = checked["needs"].partition(": ")
        assert (words[:16], command) == ("sign-in ends in ", "keybroker login corp")

    assert resident.cli("logout", "--force")[0] == 0
    said = resident.cli("status")[1]
    assert said.endswith(
        "\nlogin corp: nobody is signed in\n  for          work\n"
        "  needed       type: keybroker login corp\n"
    )
    [found] = [one for one in _findings(resident) if one["id"] == "login-needed"]
    assert (found["severity"], found["fix"]) == ("error", "keybroker login corp")
    assert "no-key" not in {one["id"] for one in _findings(resident)}


def _findings(resident: Resident) -> list[dict[str, Any]]:
    found: dict[str, Any] = json.loads(resident.cli("doctor", "--json")[1])
    return list(found["findings"])


def test_a_program_that_hangs_or_fails_costs_nobody_a_key(signed: Signed) -> None:
    """It is said in the log; keys are handed out and the daemon ends as it should."""
    resident = signed.resident
    signed.start(4, hook=["sh", "-c", "exit 7"], more='warn = "3s"')
    assert resident.helper()[0] == 0
    until(lambda: "hook login_ending: sh ended with status 7" in resident.said())
    resident.configure(CONFIG.format(hook='["sleep", "60"]', more='warn = "3s"'))
    signed.sign_in(20)
    resident.cli("reload")
    until(lambda: resident.helper()[0] == 0)
    begun = time.monotonic()
    assert resident.kill(15) == 0
    assert time.monotonic() - begun < 10


def test_a_table_says_which_events_there_are() -> None:
    """A program and its arguments; another event is none."""
    tables: dict[str, Any] = {"hooks": {"login_ending": ["notify", "-u", "critical"]}}
    assert parse(tables, Where({}, "config")).hooks == {
        "login_ending": ("notify", "-u", "critical")
    }
    with pytest.raises(ConfigError, match="did you mean login_ending"):
        parse({"hooks": {"login_endings": ["x"]}}, Where({}, "config"))
    with pytest.raises(ConfigError, match="expected a program and its arguments"):
        parse({"hooks": {"login_ending": "notify"}}, Where({}, "config"))
    assert replace(parse({}, Where({}, "config"))).hooks == {}
