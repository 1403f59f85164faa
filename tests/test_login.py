"""login, logout, whoami: what a person types, sees, and finds afterwards."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from keybroker.cli import login as command
from keybroker.cli.login import _has_browser, _ways
from keybroker.errors import SourceUnavailable
from keybroker.login import flow
from keybroker.login.flow import SigningIn
from keybroker.login.provider import BROWSER, DEVICE
from tests.patched import worker_with
from tests.people import Person, address, children, gone
from tests.resident import Resident, until
from tests.servers import browser
from tests.servers.browser import Browser
from tests.servers.faults import Status
from tests.servers.keyring import Keyring
from tests.servers.oidc import Oidc

NEEDED = "login corp: nobody is signed in; run: keybroker login corp\n"
OURS = "keybroker: "


@pytest.fixture
def ada(resident: Resident, oidc: Oidc) -> Person:
    """Somebody who has not signed in yet."""
    return Person(resident, oidc)


def alive(oidc: Oidc, token: str) -> bool:
    """Say whether the provider takes a token."""
    request = urllib.request.Request(f"{oidc.issuer}/me")
    request.add_header("authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bool(json.load(answer)["sub"])
    except urllib.error.HTTPError as error:
        error.close()
        return False


# A day


def test_a_browser_signs_in_and_keys_are_had(ada: Person) -> None:
    """One page, one line, and from then on keys; after signing out, none."""
    status, said, told = ada.cli("login")
    assert (status, said) == (0, "Signed in to corp as ada@example.com. It is renewed by itself.\n")
    assert re.fullmatch(
        r"Your browser opens to sign in\. If it does not, open this address:\n\nhttp://\S+\n\n",
        told,
    )
    assert ada.cli("whoami") == (0, "corp: ada@example.com; renewed by itself\n", "")

    status, key, told = ada.cli("get", "--no-start")
    assert (status, told) == (0, "")
    assert alive(ada.provider, key.strip())

    assert ada.cli("logout") == (0, "Signed out of corp.\n", "")
    assert not alive(ada.provider, key.strip())
    status, said, told = ada.cli("get", "--no-start")
    assert (status, said, told) == (77, "", f"{OURS}work: {NEEDED}")
    assert ada.cli("whoami") == (
        77,
        "corp: nobody is signed in\n",
        f"{OURS}login corp: nobody is signed in\nhint: run: keybroker login corp\n",
    )
    assert ada.cli("logout") == (0, "Nobody was signed in to corp.\n", "")


@pytest.mark.parametrize("running", [True, False])
def test_a_sign_in_of_another_table_is_forgotten_by_force(ada: Person, running: bool) -> None:
    """Its provider may be another one: what is here alone can be removed, if that is asked."""
    if running:
        ada.here.start()
    assert ada.cli("login")[0] == 0
    file = ada.here.state / "logins/corp.json"
    ada.configure(scopes='["openid"]')
    if running:
        assert ada.cli("reload")[0] == 0

    status, said, told = ada.cli("logout")
    assert (status, said) == (78, "")
    assert "login corp: somebody signed in by another table" in told
    assert "forget it here: keybroker logout --force corp" in told
    assert file.exists()

    status, said, told = ada.cli("logout", "--force")
    assert (status, told) == (0, "")
    assert said.startswith("Signed out of corp.\nThe provider was not told")
    assert not file.exists()
    assert ada.cli("logout") == (0, "Nobody was signed in to corp.\n", "")


@pytest.mark.parametrize("lost", ["key", "place"])
def test_a_sign_in_that_nothing_opens_is_forgotten_by_force(ada: Person, lost: str) -> None:
    """The key that sealed it is gone, or the cache is in memory now."""
    assert ada.cli("login")[0] == 0
    file = ada.here.state / "logins/corp.json"
    if lost == "key":
        (ada.here.state / "wrap.key").unlink()
    else:
        ada.configure(cache="memory")

    assert ada.cli("logout")[0] == 69
    assert file.exists()
    status, said, told = ada.cli("logout", "--force")
    assert (status, told) == (0, "")
    assert said.startswith("Signed out of corp.\n")
    assert not file.exists()
    assert ada.cli("whoami")[0] == 77


def test_a_daemon_that_runs_is_told(ada: Person) -> None:
    """The helper has a key as soon as somebody has signed in, and none as soon as they left."""
    ada.here.start()
    assert ada.here.helper() == (77, "", f"{OURS}work: {NEEDED}")

    assert ada.cli("login", "corp")[0] == 0
    key = until(lambda: ada.here.helper()[1])
    assert alive(ada.provider, key.strip())
    assert ada.cli("revoke", "work")[2].endswith("\nhint: keybroker logout corp\n")

    assert ada.cli("logout", "corp") == (0, "Signed out of corp.\n", "")
    assert ada.here.helper() == (77, "", f"{OURS}work: {NEEDED}")
    assert not alive(ada.provider, key.strip())


def test_rotate_has_a_token_that_nobody_had_before(ada: Person) -> None:
    """Also while the old one is good."""
    ada.arrive(age=20)
    ada.here.start()
    old = until(lambda: ada.here.helper()[1])
    assert ada.cli("rotate")[0] == 0
    new = until(lambda: ada.here.helper()[1])
    assert new != old
    assert alive(ada.provider, new.strip())


def test_json_is_all_that_is_on_stdout(ada: Person) -> None:
    """Whatever a browser prints."""
    noisy = ada.here.home.path / "noisy"
    noisy.write_text(f"#!/bin/sh\necho noise\n{browser.command().replace('%s', '$1')}\n")
    noisy.chmod(0o700)
    ada.here.environment["BROWSER"] = f"{noisy} %s"

    status, said, told = ada.cli("login", "--json")
    found = json.loads(said)
    assert status == 0
    assert "noise" not in told
    since = datetime.fromisoformat(found.pop("since"))
    assert abs(datetime.now(UTC) - since) < timedelta(seconds=30)
    assert found == {
        "login": "corp",
        "unattended": False,
        "type": "oidc",
        "signed_in": True,
        "who": "ada@example.com",
        "until": None,
        "renewable": True,
        "ended": None,
    }
    status, said, _ = ada.cli("whoami", "--json")
    [row] = json.loads(said)
    assert (status, row["who"], row["signed_in"]) == (0, "ada@example.com", True)
    status, said, _ = ada.cli("logout", "--json")
    assert (status, json.loads(said)) == (
        0,
        {"login": "corp", "told": True, "revoked": 0, "left": 0},
    )
    status, said, _ = ada.cli("whoami", "--json")
    assert (status, json.loads(said)[0]["signed_in"]) == (77, False)


def test_a_code_is_typed_on_another_device(ada: Person) -> None:
    with ada.typing("login", "--device") as process:
        assert process.stderr is not None
        first, second = process.stderr.readline(), process.stderr.readline()
        found = re.fullmatch(r"Open   (\S+)   on any device, and type   (\S+)\n", first)
        assert found is not None
        assert second == f"or open {found[1]}?user_code={found[2]}\n"
        Browser("bob", code=found[2]).open(found[1])
        assert process.communicate(timeout=20) == (
            "Signed in to corp as bob@example.com. It is renewed by itself.\n",
            "",
        )
        assert process.returncode == 0


def test_the_address_can_be_opened_elsewhere_and_pasted_back(ada: Person) -> None:
    """What comes from a pipe has to be right; a person may try again."""
    with ada.typing("login", "--no-browser", stdin=subprocess.PIPE) as process:
        assert process.stderr is not None
        url = address(process)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline().endswith("paste that address here.\n")
        back = redirect_of(url)
        ended = Browser(before=back).open(url)
        assert ended.url.startswith(f"{back}?code=")
        said, told = process.communicate(f"{ended.url}\n", timeout=20)
        assert said == "Signed in to corp as ada@example.com. It is renewed by itself.\n"
        assert told == ""

    with ada.typing("login", "--no-browser", stdin=subprocess.PIPE) as process:
        address(process)
        said, told = process.communicate(f"{ended.url}\n", timeout=20)
        assert (process.returncode, said) == (77, "")
        assert told.endswith(
            "login corp: this is not where the sign-in ended\n"
            "hint: copy the whole address that the browser shows in the end\n"
        )


def redirect_of(url: str) -> str:
    from urllib.parse import parse_qs, urlsplit

    return parse_qs(urlsplit(url).query)["redirect_uri"][0]


def test_who_pastes_the_wrong_thing_at_a_terminal_is_asked_again(ada: Person) -> None:
    ours, theirs = pty.openpty()
    try:
        with ada.typing("login", "--no-browser", stdin=theirs) as process:
            assert process.stderr is not None
            url = address(process)
            os.write(ours, b"http://127.0.0.1/callback?code=x&state=y\n")
            for line in process.stderr:
                if line.startswith("login corp: this is not where the sign-in ended; copy"):
                    break
            else:
                pytest.fail("it was not said")
            ended = Browser(before=redirect_of(url)).open(url)
            os.write(ours, f"{ended.url}\n".encode())
            assert process.wait(20) == 0
    finally:
        os.close(ours)
        os.close(theirs)


def test_the_browser_may_come_back_by_itself_where_nobody_pastes(ada: Person) -> None:
    """As with a port that is forwarded, or a browser that was opened by hand."""
    with ada.typing("login", "--no-browser") as process:
        assert "Signed in" in Browser().open(address(process)).text
        assert process.wait(20) == 0


# Which way


ORDINARY = {"DISPLAY": ":0"}


@pytest.mark.parametrize(
    ("environment", "opens"),
    [
        ({}, False),
        ({"DISPLAY": ":0"}, True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, True),
        ({"DISPLAY": ""}, False),
        ({"DISPLAY": ":10", "SSH_CONNECTION": "10.0.0.1 5 10.0.0.2 22"}, False),
        ({"DISPLAY": ":10", "SSH_TTY": "/dev/pts/1"}, False),
        ({"DISPLAY": ":0", "container": "podman"}, False),
        ({"BROWSER": "firefox"}, True),
        ({"BROWSER": "code --openExternal", "SSH_CONNECTION": "a"}, True),
        ({"BROWSER": "", "SSH_CONNECTION": "a"}, False),
    ],
)
def test_a_window_is_opened_where_somebody_would_see_it(
    environment: dict[str, str], opens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Linux, which this is; elsewhere there always is a screen, but over SSH."""
    monkeypatch.setattr(command, "CONTAINERS", ())
    monkeypatch.setattr(sys, "platform", "linux")
    assert _has_browser(environment) == opens
    monkeypatch.setattr(sys, "platform", "darwin")
    remote = {"SSH_CONNECTION", "SSH_TTY", "container"} & environment.keys()
    assert _has_browser(environment) == (bool(environment.get("BROWSER")) or not remote)


def test_a_container_has_no_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "CONTAINERS", (str(tmp_path / "none"),))
    assert _has_browser(ORDINARY)
    monkeypatch.setattr(command, "CONTAINERS", (str(tmp_path / "none"), str(tmp_path)))
    assert not _has_browser(ORDINARY)


def test_the_ways_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says a way gets it or is told; else the second best will do."""
    monkeypatch.setattr(command, "CONTAINERS", ())
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION", "SSH_TTY", "container"):
        monkeypatch.delenv(name, raising=False)
    none = {"device": False, "browser": False, "no_browser": False}
    assert _ways(**none) == ([DEVICE, BROWSER], True)
    assert _ways(**{**none, "device": True}) == ([DEVICE], False)
    assert _ways(**{**none, "browser": True}) == ([BROWSER], False)
    assert _ways(**{**none, "no_browser": True}) == ([BROWSER], True)
    monkeypatch.setenv("DISPLAY", ":0")
    assert _ways(**none) == ([BROWSER, DEVICE], False)


def test_where_no_window_would_be_seen_it_is_a_code(ada: Person) -> None:
    """Without a choice by the person; a provider without codes gets the address opened by hand."""
    del ada.here.environment["BROWSER"]
    with ada.typing("login") as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("Open   http")


def test_one_way_at_a_time(ada: Person) -> None:
    status, _, told = ada.cli("login", "--device", "--browser")
    assert status == 2
    assert "choose one of --device, --browser and --no-browser" in told


# The port


def test_a_port_can_be_chosen_and_may_be_taken(ada: Person) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ada.configure(port=str(port))
        taken_by = f"login corp: cannot listen on 127.0.0.1:{port} (Address already in use)"
        hint = "end what uses the port, or set another one in the login's table"
        assert ada.cli("login") == (69, "", f"{OURS}{taken_by}\nhint: {hint}\n")
    status, _, told = ada.cli("login")
    assert status == 0
    assert f"redirect_uri=http%3A%2F%2F127.0.0.1%3A{port}%2Fcallback&" in told
    ada.configure(port=str(port), redirect='"http://localhost/callback"')
    status, _, told = ada.cli("login")
    assert status == 0
    assert f"redirect_uri=http%3A%2F%2Flocalhost%3A{port}%2Fcallback&" in told


# Not to the end


def test_a_closed_browser_ends_with_the_deadline(
    ada: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten minutes by default; a code may end before."""
    assert timedelta(minutes=5) <= flow.LONGEST_WAIT <= timedelta(minutes=15)
    monkeypatch.setattr(flow, "LONGEST_WAIT", timedelta(seconds=0.2))
    for way in (BROWSER, DEVICE):
        begun = SigningIn(ada.sign_in, {}, [way])
        begun.begin()
        ends = time.monotonic() + 5
        with pytest.raises(SourceUnavailable) as raised:
            while time.monotonic() < ends:
                begun.step(None, 0.05)
        assert raised.value.message == "login corp: nobody signed in, in time"
        assert raised.value.hint == "run: keybroker login corp"
        begun.close()


@pytest.mark.parametrize("way", ["--browser", "--device"])
def test_ctrl_c_ends_it_and_leaves_nothing(ada: Person, way: str) -> None:
    """Status 130, no process, no port, no file; the browser that was opened stays."""
    ada.here.environment["BROWSER"] = f"{sys.executable} -c 'import time;time.sleep(60)' %s"
    with ada.typing("login", way) as process:
        url = address(process)
        started = until(lambda: children(process.pid))
        os.kill(process.pid, signal.SIGINT)
        said, told = process.communicate(timeout=20)
        assert (process.returncode, said) == (130, "")
        assert "Traceback" not in told
        if way == "--browser":
            port = int(re.findall(r"127\.0\.0\.1%3A(\d+)", url)[0])
            with socket.socket() as one:
                assert one.connect_ex(("127.0.0.1", port)) != 0
            opened = [one for one in started if is_python_of(one, "webbrowser")]
            for one in opened:
                os.kill(one, signal.SIGKILL)
        gone([one for one in started if not is_python_of(one, "webbrowser")])
    left = {path.name for path in (ada.here.state / "logins").iterdir()}
    assert left == {"_signing.lock"}


def is_python_of(pid: int, module: str) -> bool:
    try:
        return module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def test_two_at_once_are_one_too_many(ada: Person) -> None:
    """The second is told at once; the first goes on."""
    ada.here.environment["BROWSER"] = "true %s"
    with ada.typing("login") as process:
        url = address(process)
        problem = "login: another `keybroker login` is under way"
        assert ada.cli("login") == (75, "", f"{OURS}{problem}\nhint: try again when it is done\n")
        assert "Signed in" in Browser().open(url).text
        assert process.wait(20) == 0


def test_a_login_may_have_any_name(ada: Person) -> None:
    """One that is called as a file of ours would be, too."""
    text = ada.here.file.read_text()
    ada.here.file.write_text(text.replace("corp", "signing"))
    status, said, _ = ada.cli("login")
    assert (status, said[:24]) == (0, "Signed in to signing as ")


def test_a_command_that_was_stopped_for_a_while_goes_on(ada: Person) -> None:
    """With Ctrl-Z: the process that waits for the browser does not idle away."""
    ada.here.environment["BROWSER"] = "true %s"
    impatient = worker_with("worker.IDLE_SECONDS = 0.2")
    code = f"from keybroker import pool; pool.COMMAND = {impatient!r}\n"
    hasty = [sys.executable, "-c", f"{code}from keybroker.cli import main; main()"]
    with ada.typing("login", command=hasty) as process:
        url = address(process)
        [worker] = [one for one in children(process.pid) if is_python_of(one, impatient[-1])]
        os.kill(process.pid, signal.SIGSTOP)
        before = time.monotonic()
        until(lambda: time.monotonic() - before > 1.0)
        assert Path(f"/proc/{worker}/cmdline").read_bytes()
        os.kill(process.pid, signal.SIGCONT)
        assert "Signed in" in Browser().open(url).text
        assert process.wait(20) == 0


def test_a_person_who_refuses_is_told_so(ada: Person) -> None:
    """On the page, and here; nothing is kept."""
    ada.here.environment["BROWSER"] = browser.command(refuses="http")
    status, said, told = ada.cli("login")
    assert (status, said) == (77, "")
    assert told.endswith(
        "login corp: the sign-in was refused: End-User aborted interaction\n"
        "hint: run: keybroker login corp\n"
    )
    assert ada.cli("whoami")[0] == 77


def test_nobody_signs_in_for_what_cannot_be_kept(ada: Person) -> None:
    """A keyring that is locked is said before the page is opened."""
    opened = ada.here.home.path / "opened"
    ada.configure(cache="keyring")
    with Keyring(locked=True) as keyring:
        ada.here.environment |= keyring.environment | {"BROWSER": f"touch {opened} %s"}
        status, said, told = ada.cli("login")
        assert (status, said) == (69, "")
        assert told.startswith(f"{OURS}keyring: it is locked\nhint: unlock it")
        assert not opened.exists()
        keyring.unlock()
        ada.here.environment["BROWSER"] = browser.command()
        assert ada.cli("login")[0] == 0
        assert ada.cli("get", "--no-start")[0] == 0
        keyring.lock()
        assert ada.cli("whoami")[0] == 0  # which opens nothing
        status, said, told = ada.cli("get", "--no-start")
        assert (status, said) == (69, "")


def test_a_provider_that_is_down_is_said(ada: Person) -> None:
    """Signing in, and signing out: that is done here alone if the person wants it so."""
    ada.arrive()
    front = ada.provider.front
    front.next(Status(503), times=None)
    try:
        host = ada.provider.issuer.removeprefix("http://")
        problem = f"{OURS}login corp: {host} failed to describe itself (503)\n"
        assert ada.cli("login") == (75, "", problem)
        hint = "sign out all the same: keybroker logout --force corp"
        assert ada.cli("logout") == (75, "", f"{problem}hint: {hint}\n")
        assert ada.cli("whoami")[1] == "corp: ada@example.com; it was signed out\n"
        assert ada.cli("get", "--no-start")[0] == 77
        assert ada.cli("logout", "--force") == (
            0,
            "Signed out of corp.\nThe provider was not told: what it gave ends by itself.\n",
            "",
        )
        assert list((ada.here.state / "logins").glob("*.json")) == []
    finally:
        front.clear()


def test_which_login_is_meant(ada: Person) -> None:
    """With one table it need not be named."""
    text = ada.here.file.read_text()
    corp = text[text.index("[logins.corp]") : text.index("[profiles")]
    ada.here.file.write_text(text + corp.replace("corp", "other"))
    for words in (["login"], ["logout"]):
        assert ada.cli(*words) == (
            78,
            "",
            f"{OURS}config: several logins, and none was named\nhint: name one: corp, other\n",
        )
    status, _, told = ada.cli("login", "cor")
    assert (status, told) == (78, f"{OURS}config: no login 'cor'; did you mean corp?\n")
    status, said, _ = ada.cli("whoami")
    assert (status, said) == (77, "corp: nobody is signed in\nother: nobody is signed in\n")
    assert ada.cli("login", "other")[0] == 0
    status, said, _ = ada.cli("whoami")
    assert status == 0
    assert said == "corp: nobody is signed in\nother: ada@example.com; renewed by itself\n"

    ada.here.file.write_text(text.replace(corp, "").replace('login = "corp"', 'login = "x"'))
    assert ada.cli("login")[0] == 78
    ada.here.file.write_text('[cache]\nkey = "file"\n')
    problem = f"{OURS}config: there is no [logins.NAME] table\n"
    problem += "hint: see docs/login.md for what to write\n"
    assert ada.cli("logout", "corp") == (78, "", problem)
