"""
A sign-in at work: renewed by one process at a time, and never in a loop.

The provider is a real one, behind a proxy that counts what reaches it.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from keybroker import login, paths
from keybroker.cache import find_wrap_key
from keybroker.devgateway import DevGateway
from keybroker.errors import CacheError, CacheLocked, CacheUnreadable, SourceUnavailable
from keybroker.login import tokens as kept
from keybroker.login.tokens import Store
from keybroker.paths import Disk
from tests.patched import daemon_with
from tests.people import Person
from tests.resident import Resident, until
from tests.servers.faults import Status
from tests.servers.keyring import Keyring
from tests.servers.oidc import Oidc
from tests.test_time import LIBRARIES

PROCESSES = 4
RENEW = """
import sys
from pathlib import Path
from keybroker import login, signin
from keybroker.credential import Secret
from keybroker.login.tokens import Store
state, key, table = sys.stdin.readline().split(" ", 2)
import keybroker.login.oidc, keybroker.cache
store, sign_in = Store(Path(state), Secret(key)), signin.read_text(table)
print("ready", flush=True)
sys.stdin.readline()
print(login.current(sign_in, {}, store).access.fingerprint)
"""


@pytest.fixture(scope="module")
def hourly(oidc: Oidc) -> str:
    """A client whose tokens live for an hour."""
    return oidc.register(public=True, access_seconds=3600).id


@pytest.fixture
def ada(resident: Resident, oidc: Oidc, hourly: str) -> Person:
    """Somebody who has not signed in yet."""
    return Person(resident, oidc, hourly)


@pytest.fixture
def opened(ada: Person) -> Iterator[Path]:
    """A file that is there as soon as a window was opened."""
    file = ada.here.home.path / "opened"
    ada.here.environment["BROWSER"] = f"touch {file} %s"
    yield file
    assert not file.exists(), "nobody but `keybroker login` opens a window"


def renewals(ada: Person) -> int:
    """How often the provider was asked for a token."""
    return len(ada.asked("/token"))


# One at a time


def race(ada: Person) -> list[str]:
    """Have processes find at the same moment that the token has ended; return what each has."""
    wrap = (ada.here.state / paths.WRAP_KEY).read_text().strip()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RENEW],
            env=ada.here.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    for one in running:
        assert one.stdin is not None
        assert one.stdout is not None
        one.stdin.write(f"{ada.here.state} {wrap} {ada.sign_in.text}\n")
        one.stdin.flush()
    for one in running:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in running:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    return [one.communicate(timeout=30)[0].strip() for one in running]


def test_of_processes_that_renew_at_once_one_asks_the_provider(ada: Person) -> None:
    """All of them have what that one got."""
    ada.arrive(age=3600)
    ada.forget_what_was_asked()
    assert set(race(ada)) == {ada.held.access.fingerprint}
    assert renewals(ada) == 1


def test_a_process_that_hangs_keeps_others_for_a_while_only(ada: Person) -> None:
    """They say so, in less time than a call takes; one that dies keeps nobody."""
    assert kept.LOCK_SECONDS < 8
    ada.arrive(age=3600)
    second = kept.alone(ada.here.state, "corp.lock", "another is at it", 0.1)
    with ada.store.alone("corp"), pytest.raises(SourceUnavailable) as raised, second:
        raise AssertionError
    assert raised.value.message == "another is at it"
    assert login.current(ada.sign_in, {}, ada.store).left(datetime.now(UTC)) > 0


def test_profiles_of_one_sign_in_have_one_token(ada: Person) -> None:
    """Whoever is first renews it for the others."""
    names = [f"p{number}" for number in range(6)]
    ada.configure(*names)
    ada.arrive(age=3600)
    ada.forget_what_was_asked()
    ada.here.start()
    keys = {until(lambda name=name: ada.here.helper(name)[1]) for name in names}
    assert keys == {f"{ada.held.access.reveal()}\n"}
    assert renewals(ada) == 1


def test_a_daemon_and_commands_have_one_token(ada: Person) -> None:
    ada.arrive(age=3600)
    ada.forget_what_was_asked()
    ada.here.start()
    asking = [
        subprocess.Popen(
            ada.here.helper_command(),
            env=ada.here.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    keys = {one.communicate(timeout=30)[0] for one in asking}
    assert keys == {f"{ada.held.access.reveal()}\n"}
    assert renewals(ada) == 1


# The end


def test_the_current_key_serves_until_it_dies_and_then_a_person_is_needed(
    ada: Person, oidc: Oidc, opened: Path
) -> None:
    """The provider is asked once, one line says what to type, and nothing opens by itself."""
    ada.client = oidc.register(public=True, access_seconds=30).id
    ada.configure()
    ada.arrive(age=16)  # not to be used any more in 8 s
    ada.forget_what_was_asked()
    ada.here.start()
    key = until(lambda: ada.here.helper()[1])
    refresh = ada.held.refresh
    assert refresh is not None
    form = {"token": refresh.reveal(), "client_id": ada.client}
    assert oidc.post("/token/revocation", form)[0] == 200

    assert ada.cli("rotate")[0] == 77
    assert renewals(ada) == 1
    assert ada.here.helper() == (0, key, "")
    host = oidc.issuer.removeprefix("http://")
    why = f"login corp: {host} has ended the sign-in"
    until(lambda: ada.here.helper()[0] != 0)
    line = f"keybroker: work: {why}; run: keybroker login corp\n"
    for _ in range(3):
        assert ada.here.helper() == (77, "", line)
    ada.cli("reload")
    ada.cli("rotate")
    assert ada.cli("get")[0] == ada.cli("get", "--no-start")[0] == 77
    assert ada.cli("whoami")[:2] == (
        77,
        f"corp: ada@example.com; {host} has ended the sign-in\n",
    )
    assert renewals(ada) == 1
    assert ada.here.said().count("has ended the sign-in") == 1
    assert ada.cli("status")[1].count("run: keybroker login corp") == 1

    ada.arrive()  # without the daemon being told
    ada.cli("reload")
    assert until(lambda: ada.here.helper()[1]) != key


def test_a_refresh_token_that_somebody_else_used_ends_it_once(ada: Person, opened: Path) -> None:
    """As when a copy of the state directory lives on another machine."""
    first = ada.arrive(age=3600)
    login.current(ada.sign_in, {}, ada.store)
    ada.keep(first, 3600)  # the copy
    ada.forget_what_was_asked()
    ada.here.start()
    until(lambda: "has ended the sign-in; run: keybroker login corp" in ada.here.helper()[2])
    for _ in range(2):
        ada.cli("reload")
        assert ada.here.helper()[0] == 77
    assert renewals(ada) == 1


def test_a_provider_that_is_down_ends_nothing(ada: Person, opened: Path) -> None:
    """The token that is there is handed out; it is asked again at a pace, and goes on by itself."""
    old = f"{ada.arrive(age=2500).access.reveal()}\n"  # its last third has begun
    down = Status(503)
    ada.provider.front.next(down, times=None)
    try:
        ada.forget_what_was_asked()
        ada.here.start()
        assert until(lambda: ada.here.helper()[1]) == old
        assert ada.cli("rotate")[0] == 75
        assert ada.here.row()["trouble"]
        assert ada.here.helper() == (0, old, "")
        assert 1 <= len(ada.asked("/.well-known/openid-configuration")) <= 4
    finally:
        ada.provider.front.clear()
    ada.cli("reload")
    until(lambda: ada.here.helper()[1] not in ("", old))
    assert renewals(ada) == 1


@pytest.mark.parametrize("left", [90, 50])
def test_the_last_minute_of_a_token_is_not_handed_out(ada: Person, left: int) -> None:
    """When the provider fails; by a command that begins with nothing, too."""
    tokens = ada.arrive(age=3600 - left)
    ada.provider.front.next(Status(503), times=None)
    try:
        status, key, told = ada.cli("get", "--no-start")
    finally:
        ada.provider.front.clear()
    if left > 60:
        assert (status, key, told) == (0, f"{tokens.access.reveal()}\n", "")
    else:
        assert (status, key) == (75, "")
        assert "failed to describe itself (503)" in told


def test_who_has_signed_out_has_no_rest_of_a_token(ada: Person) -> None:
    ada.arrive(age=2500)
    login.leave(ada.sign_in, ada.store)
    assert ada.cli("get", "--no-start")[:2] == (77, "")
    ada.arrive(age=2500)
    ada.store.save(ada.held.ended("HOST has ended the sign-in"))
    assert ada.cli("get", "--no-start")[:2] == (0, f"{ada.held.access.reveal()}\n")


# Where it is kept


def test_the_daemon_s_own_key_seals_what_a_command_signs_in_for(ada: Person) -> None:
    """As with a systemd credential, which the command has not: the daemon keeps and renews it."""
    credentials = paths.private_directory(ada.here.home.path / "credentials")
    (credentials / "keybroker-wrap-key").write_bytes(b"of the service alone")
    ada.configure(cache="auto")
    ada.here.start(CREDENTIALS_DIRECTORY=str(credentials))
    assert ada.cli("login")[0] == 0
    key = until(lambda: ada.here.helper()[1])

    theirs = find_wrap_key("auto", ada.here.state, {"CREDENTIALS_DIRECTORY": str(credentials)})
    tokens = Store(ada.here.state, theirs.key).load(ada.sign_in)
    assert tokens is not None
    assert key == f"{tokens.access.reveal()}\n"
    with pytest.raises(CacheUnreadable, match="cannot be opened with this key") as raised:
        ada.store.load(ada.sign_in)
    assert raised.value.hint == "run: keybroker login corp"
    assert ada.cli("whoami")[1] == "corp: ada@example.com; renewed by itself\n"

    assert ada.cli("logout") == (0, "Signed out of corp.\n", "")
    assert list((ada.here.state / "logins").rglob("*.json")) == []


def test_nothing_is_asked_for_that_could_not_be_kept(
    ada: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk the refresh token is not used up: once there is room it goes on."""
    ada.arrive(age=3600)
    ada.forget_what_was_asked()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Disk, "replace", full)
        with pytest.raises(CacheError) as raised:
            login.current(ada.sign_in, {}, ada.store)
    file = ada.here.state / "logins" / "corp.json"
    assert raised.value.message == (f"login: {file}: cannot be written (No space left on device)")
    assert raised.value.exit_status == 69
    assert renewals(ada) == 0
    assert login.current(ada.sign_in, {}, ada.store).left(datetime.now(UTC)) > 0


def test_a_lock_that_cannot_be_had_is_said_before_anything_is_asked(ada: Person) -> None:
    """As where the state directory is read-only. A link is not followed."""
    ada.arrive(age=3600)
    ada.forget_what_was_asked()
    lock = ada.here.state / "logins" / "corp.lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(ada.here.home.path / "elsewhere")
    with pytest.raises(CacheError) as raised:
        login.current(ada.sign_in, {}, ada.store)
    assert raised.value.message.startswith(f"login: {lock.parent}: cannot be used (")
    assert ada.asked("/token") == []


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"half"])
def test_a_damaged_file_is_no_sign_in_and_a_new_one_mends_it(ada: Person, damage: bytes) -> None:
    ada.arrive()
    file = ada.here.state / "logins" / "corp.json"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == b"half" else damage)
    with pytest.raises(CacheUnreadable) as raised:
        ada.store.load(ada.sign_in)
    assert raised.value.hint == "run: keybroker login corp"
    ada.arrive()
    assert ada.held.left(datetime.now(UTC)) > 0


def test_who_and_until_when_cannot_be_changed(ada: Person) -> None:
    """The header is bound to what is sealed; and another's file is none of this login."""
    ada.arrive()
    file = ada.here.state / "logins" / "corp.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, "standing": {**whole["standing"], "who": "eve"}}))
    with pytest.raises(CacheUnreadable):
        ada.store.load(ada.sign_in)


def test_without_a_key_nothing_is_opened(ada: Person) -> None:
    ada.arrive()
    locked = Store(ada.here.state, None)
    with pytest.raises(CacheLocked) as raised:
        locked.load(ada.sign_in)
    assert raised.value.message == "login corp: nothing opens its file"
    with pytest.raises(CacheLocked, match="can be kept nowhere"):
        locked.save(ada.held)


def test_a_daemon_whose_keyring_is_locked_goes_on_when_it_is_not(ada: Person) -> None:
    """It has no key until then; no dialog opens, and the sign-in is still there."""
    with Keyring() as keyring:
        ada.here.environment |= keyring.environment
        ada.configure(cache="keyring")
        assert ada.cli("login")[0] == 0
        keyring.lock()
        with keyring.nobody_at_the_dialog() as dialog:
            ada.here.start()
            assert until(lambda: ada.here.row()["code"]) == "cache-locked"
            assert "BeginPrompting" not in dialog.tail()
        keyring.unlock()
        ada.cli("reload")
        assert until(lambda: ada.here.helper()[1])


# Clocks


def wrong_clock(seconds: int) -> dict[str, str]:
    """Return the variables of a process whose clock is so far ahead."""
    [library, *_] = [str(one) for at in LIBRARIES for one in Path("/").glob(at[1:])]
    return {
        "LD_PRELOAD": library,
        "FAKETIME": f"{seconds:+d}",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DISABLE_SHM": "1",
    }


PASS_ON = """
import os
from keybroker import pool
pool.PASSED_ON |= {name for name in os.environ if name.startswith(("LD_PRELOAD", "FAKETIME"))}
"""


@pytest.mark.parametrize("skew", [-7200, -45, 45, 7200])
def test_a_clock_that_is_wrong_is_found_out_when_somebody_signs_in(ada: Person, skew: int) -> None:
    """A little does not matter. With more, the message says where to look."""
    there = ada.here.environment
    there.update(wrong_clock(skew))
    there["BROWSER"] = f"env -u LD_PRELOAD {there['BROWSER']}"
    command = [sys.executable, "-c", f"{PASS_ON}\nfrom keybroker.cli import main; main()"]
    with ada.typing("login", command=command) as process:
        said, told = process.communicate(timeout=30)
    if abs(skew) < 60:
        assert (process.returncode, said[:18]) == (0, "Signed in to corp ")
        return
    claim = "exp" if skew > 0 else "iat"
    assert (process.returncode, said) == (77, "")
    assert told.endswith(
        f"login corp: the ID token is not what it should be ({claim})\n"
        "hint: see issuer and client_id; is this machine's clock right?\n"
    )


@pytest.mark.parametrize("skew", [-7200, 7200])
def test_a_clock_that_is_wrong_keeps_nobody_from_keys(ada: Person, skew: int) -> None:
    """Who has signed in gets them all the same: lives are counted, not compared."""
    ada.arrive()
    command = daemon_with(PASS_ON, ada.here.state, ada.here.socket)
    ada.here.start(command=command, **wrong_clock(skew))
    key = until(lambda: ada.here.helper()[1])
    assert key == f"{ada.held.access.reveal()}\n"
    assert ada.here.row()["phase"] == "fresh"


def test_a_journal_that_names_a_login_of_another_version_keeps_nobody_from_keys(
    ada: Person,
) -> None:
    """Its key cannot be ended by this one: that is said, with the day on which it ends itself."""
    with DevGateway(ada.arrive().access.reveal()) as gateway:
        text = ada.here.file.read_text()
        source = f'base_url = "{gateway.url}"\nhold = "1s"\n[profiles.work.source]\n'
        mints = f'{source}type = "litellm"\nlogin = "corp"\nlifetime = "10m"\n'
        head = text[: text.index("[profiles")]
        ada.here.configure(f'{head}[profiles.work]\nhelper_ttl = "1s"\n{mints}')
        ada.here.start()
        assert ada.here.key()
        ada.here.stop()

        local = '[profiles.work.source]\ntype = "static"\nplaceholder = "local"\n'
        url = 'base_url = "http://127.0.0.1:9"\nverify = "none"\nhold = "1s"\n'
        ada.here.configure(f"[profiles.work]\n{url}{local}")
        older = "from keybroker import login_types\nlogin_types.LOGINS.pop('oidc')\n"
        places = ada.here.state, ada.here.socket
        ada.here.start(command=daemon_with(older, *places, worker=older))
        until(lambda: ada.here.helper()[1] == "local\n")
        [retired] = until(lambda: ada.here.row()["retired"])
        assert retired["expires_at"] is not None
        until(lambda: "logins.corp.type: expected one of" in str(ada.here.row()["trouble"]))
        assert len(gateway.live_keys()) == 1
