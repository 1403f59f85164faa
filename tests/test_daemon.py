"""The daemon as a process: it answers, rotates, reloads and ends; commands go through it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from keybroker import client, paths, wire
from keybroker.audit import Audit
from keybroker.connect.line import helper_line
from keybroker.devgateway import DevGateway
from keybroker.errors import ConfigError, NotReady
from keybroker.journal import Journal
from keybroker.slots import Event, Record, replay
from tests.patched import daemon_with
from tests.resident import Home, Resident, until
from tests.servers.faults import Faults, Hang, Status
from tests.servers.keyring import Keyring

TTL = 60_000


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


@pytest.fixture
def running(resident: Resident, gateway: DevGateway) -> Resident:
    """A daemon with one profile of the gateway."""
    resident.environment["ADMIN"] = gateway.master_key
    resident.configure(profile(gateway))
    resident.start()
    return resident


def profile(
    gateway: DevGateway | Faults, name: str = "work", settings: str = "", source: str = ""
) -> str:
    """Return a profile of a gateway, as TOML."""
    return (
        f'[profiles.{name}]\nbase_url = "{gateway.url}"\n{settings}\n'
        f'[profiles.{name}.source]\ntype = "litellm"\nadmin = {{ env = "ADMIN" }}\n{source}\n'
    )


def delete(gateway: DevGateway, key: str) -> None:
    """Delete a key behind keybroker's back."""
    request = urllib.request.Request(
        f"{gateway.url}/key/delete",
        json.dumps({"keys": [key]}).encode(),
        {"authorization": f"Bearer {gateway.master_key}", "content-type": "application/json"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request) as answer:
        assert answer.status == 200


def verifications(gateway: DevGateway) -> int:
    """Count the looks at the data plane."""
    return sum(seen.path.startswith("/v1/") for seen in gateway.seen())


def mine(resident: Resident) -> dict[str, str]:
    """Return the directory of a session's settings, with settings in it."""
    folder = resident.home.path / ".claude"
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text("{}\n")
    long_ago = time.time() - 3600
    os.utime(folder / "settings.json", (long_ago, long_ago))
    return {"directory": str(folder)}


@pytest.fixture(params=["python", "native"])
def either(request: pytest.FixtureRequest, resident: Resident, native_helper: Path) -> None:
    """Do a test with the helper in Python, and with the one in C."""
    resident.native = native_helper if request.param == "native" else None


# answering


@pytest.mark.usefixtures("either")
def test_a_key_is_ready_before_it_is_asked_for(running: Resident, gateway: DevGateway) -> None:
    """It is minted at the start; every way to ask gives the same one."""
    until(lambda: running.row()["fingerprint"])
    key = running.key()

    assert running.helper() == (0, f"{key}\n", "")
    assert running.cli("get", "work") == (0, f"{key}\n", "")
    assert running.cli("get") == (0, f"{key}\n", "")
    assert len(gateway.live_keys()) == 1


def test_a_restart_answers_from_the_cache(running: Resident, gateway: DevGateway) -> None:
    """Killed, it comes back with the key that it had, though the gateway is gone."""
    key = running.key()
    running.kill()
    gateway.close()
    running.start()
    assert running.key() == key


@pytest.mark.parametrize(
    ("profile_name", "expected"),
    [
        ("other", "error 78 keybroker: config: no profile 'other'; profiles: work"),
        ("", "error 78 keybroker: config: several profiles, and none was named; --profile NAME,"),
    ],
)
def test_a_profile_that_is_not_there(
    running: Resident, gateway: DevGateway, profile_name: str, expected: str
) -> None:
    """Or that nobody named though there are two: what there is, and the status."""
    if not profile_name:
        running.configure(profile(gateway) + profile(gateway, "home"))
        assert running.cli("reload")[0] == 0
    reply = running.ask(profile_name)
    assert reply.startswith(expected)
    status, stdout, stderr = running.helper(profile_name or "-")
    assert (status, stdout) == (78, "")
    assert f"error 78 {stderr.strip()}" == reply


def test_the_default_profile_is_answered(running: Resident, gateway: DevGateway) -> None:
    """The one that the configuration names."""
    running.configure('default = "home"\n' + profile(gateway) + profile(gateway, "home"))
    assert running.cli("reload")[0] == 0
    assert until(lambda: running.key()) == running.key("home") != running.key("work")


def test_another_version_is_told_what_to_do(running: Resident) -> None:
    """A helper of a later keybroker gets a line that says how to mend it."""
    reply = wire.ask(running.socket, b"2 get work 1 1\n").decode()
    assert reply == (
        "error 69 keybroker: this daemon speaks version 1 of its protocol; keybroker daemon --stop"
    )


@pytest.mark.parametrize("about", ["{}", "[]", "null", '{"state": 1}'])
def test_a_daemon_that_says_something_else_of_itself_is_none(
    resident: Resident, about: str
) -> None:
    """One of another version: the command says what to do."""
    resident.configure("")
    version = "from keybroker import daemon, wire\n"
    version += f"daemon.Daemon._who = lambda self: __import__('json').loads({about!r})"
    resident.start(command=daemon_with(version, resident.state, resident.socket))
    status, stdout, stderr = resident.cli("reload")
    assert (status, stdout) == (69, "")
    assert stderr.endswith("does not answer\nhint: keybroker daemon --stop\n")


def test_without_a_key_there_is_a_reason(resident: Resident) -> None:
    """Nobody listens at the gateway: status 75, what happened, what to type, in time."""
    resident.environment["ADMIN"] = "sk-admin"
    resident.configure(
        '[profiles.work]\nbase_url = "http://127.0.0.1:1"\n[profiles.work.source]\n'
        'type = "litellm"\nadmin = { env = "ADMIN" }\n'
    )
    resident.start()
    status, stdout, stderr = resident.helper()
    assert (status, stdout) == (75, "")
    assert stderr == (
        "keybroker: work: litellm: 127.0.0.1:1 could not be reached; is it running? see base_url\n"
    )


def test_who_asks_in_vain_is_not_put_off_for_minutes(
    resident: Resident, gateway: DevGateway
) -> None:
    """A gateway that comes back is tried at the latest 5 s after the last failure."""
    with Faults(gateway.url) as wire_:
        resident.environment["ADMIN"] = gateway.master_key
        resident.configure(profile(wire_))
        wire_.next(Status(503), times=6)
        resident.start()
        answered = until(lambda: resident.ask("work").startswith("ok "), 40)
        assert answered


# commands through the daemon


def test_rotate_replaces_the_key(running: Resident, gateway: DevGateway) -> None:
    """The old one stays for its hold; the next answer is the new one."""
    first = running.key()
    status, stdout, stderr = running.cli("rotate", "--json")
    assert (status, stderr) == (0, "")
    [result] = json.loads(stdout)
    assert result["rotated"] is True
    assert result["replaced"] != result["fingerprint"]
    assert running.key() != first
    assert len(gateway.live_keys()) == 2
    assert running.row()["retired"][0]["fingerprint"] == result["replaced"]


def test_too_many_rotations_are_refused_at_once(running: Resident) -> None:
    """Four unrevoked keys are the most; the message says how long, and what to type."""
    running.key()
    for _ in range(3):
        assert running.cli("rotate")[0] == 0
    started = time.monotonic()
    status, stdout, stderr = running.cli("rotate")
    assert (status, stdout) == (75, "")
    assert re.search(r"4 keys are unrevoked at \S+, the most allowed for 15 min more", stderr)
    assert "keybroker revoke work" in stderr
    assert time.monotonic() - started < 10


def test_revoke_ends_all_and_rests_until_asked(running: Resident, gateway: DevGateway) -> None:
    """Nothing is minted in its place before somebody wants a key."""
    first = running.key()
    running.cli("rotate")
    status, stdout, _ = running.cli("revoke", "work")
    assert (status, stdout) == (0, "work: 2 revoked\n")
    assert gateway.live_keys() == ()
    until(lambda: list((running.state / paths.CACHE).glob("*.sealed")) == [])
    running.cli("status")
    assert gateway.live_keys() == ()
    assert running.key() != first
    assert len(gateway.live_keys()) == 1


def test_all_of_many_profiles_have_room_in_a_request(
    resident: Resident, gateway: DevGateway
) -> None:
    """Their names alone would be longer than any request."""
    names = [f"a-long-name-of-a-profile-{number}" for number in range(45)]
    resident.environment["ADMIN"] = gateway.master_key
    resident.configure("".join(profile(gateway, name, 'verify = "none"') for name in names))
    resident.start()
    until(lambda: all(row["held"] for row in resident.status()["profiles"]))
    first = {row["profile"]: row["fingerprint"] for row in resident.status()["profiles"]}
    status, stdout, stderr = resident.cli("rotate", "--all", "--json")
    assert (status, stderr) == (0, "")
    assert {row["profile"]: row["replaced"] for row in json.loads(stdout)} == first
    status, stdout, stderr = resident.cli("revoke", "--all", "--json")
    assert (status, stderr) == (0, "")
    assert sorted(row["profile"] for row in json.loads(stdout)) == sorted(names)
    assert gateway.live_keys() == ()


def test_a_command_that_must_be_the_owner_borrows_the_lock(
    running: Resident, gateway: DevGateway
) -> None:
    """`source test` and `sweep` work beside the daemon, which goes on afterwards."""
    key = running.key()
    status, stdout, stderr = running.cli("source", "test", "work")
    assert (status, stderr) == (0, ""), stdout
    assert running.cli("sweep")[0] == 0
    assert running.key() == key
    assert running.cli("rotate")[0] == 0
    assert running.key() != key
    assert len(gateway.live_keys()) == 2


def test_what_a_borrower_of_the_lock_wrote_is_known_at_once(
    running: Resident, gateway: DevGateway
) -> None:
    """It gave up the current key: that one is not handed out any more."""
    key, [current] = running.key(), replay(Journal(running.state).read()).values()
    assert current.current is not None
    lent = wire.watch(running.socket, "lend")
    assert next(lent) == {}
    lock = paths.take_owner_lock(running.state)
    assert lock is not None
    now = datetime.now(UTC)
    record = Record(now, Event.RETIRED, "work", current.current.label, revoke_at=now, why="test")
    Journal(running.state).write(record)
    os.close(lock)
    assert running.key() == key  # it is not known before the lock is back
    lent.close()
    until(lambda: running.ask("work") != f"ok {key}")
    until(lambda: len(gateway.live_keys()) == 1)  # the one given up is revoked
    assert running.key() != key


def test_a_source_that_was_seen_to_work_is_tried_again_at_once(
    resident: Resident, gateway: DevGateway
) -> None:
    """A denial is remembered for minutes; what was mended meanwhile need not be seen by us."""
    admin = resident.home.path / "admin"
    admin.write_text("sk-wrong-0123456789\n")
    command = f'admin = {{ command = ["cat", "{admin}"] }}'
    resident.configure(profile(gateway).replace('admin = { env = "ADMIN" }', command))
    resident.start()
    assert resident.ask().startswith("error 77 ")
    admin.write_text(f"{gateway.master_key}\n")
    assert resident.ask().startswith("error 77 ")

    assert resident.cli("source", "test", "work")[0] == 0

    assert resident.ask().startswith("ok ")


def test_status_is_the_daemons(running: Resident) -> None:
    """It says who runs, and that the key outlives a closed lid of 8 hours but not of 13."""
    running.key()
    status, stdout, stderr = running.cli("status")
    assert (status, stderr) == (0, "")
    assert running.process is not None
    assert stdout.startswith(f"daemon 0.1.0, process {running.process.pid}, up ")
    assert "lid closed   for 8h: yes, the key lives until" in stdout
    assert f'"apiKeyHelper": {json.dumps(helper_line("work", running.environment))}' in stdout
    assert "for 13h: no, the key ends at" in running.cli("status", "--lid", "13h")[1]


def test_watch_shows_changes(running: Resident) -> None:
    """One JSON line for each, until the watcher ends it."""
    running.key()
    command = [sys.executable, "-c", "from keybroker.cli import main; main()"]
    with subprocess.Popen(
        [*command, "status", "--watch", "--json"],
        env=running.environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        running.cli("rotate")
        while True:
            after = json.loads(process.stdout.readline())
            if after["profiles"][0]["fingerprint"] != first["profiles"][0]["fingerprint"]:
                break
        process.terminate()
        assert process.wait(10) == -signal.SIGTERM


def test_watch_says_that_the_daemon_ended(running: Resident) -> None:
    """69, and what starts another: a terminal that shows nothing new is no news."""
    running.key()
    command = [sys.executable, "-c", "from keybroker.cli import main; main()"]
    with subprocess.Popen(
        [*command, "status", "--watch", "--json"],
        env=running.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        json.loads(process.stdout.readline())
        running.cli("daemon", "--stop")

        assert process.wait(10) == 69
        said = process.stderr.read()
    assert said == "keybroker: the daemon ended\nhint: the next `keybroker get` starts one\n"


# starting and ending


def test_get_starts_a_daemon(resident: Resident, gateway: DevGateway) -> None:
    """It outlives the command, is detached, and has only the variables it needs."""
    resident.environment.update(ADMIN=gateway.master_key, OTHER_SECRET="sk-not-for-the-daemon")
    resident.configure(profile(gateway))
    status, stdout, stderr = resident.cli("get", "work")
    assert (status, stderr) == (0, "")
    pid = until(resident.owner)
    assert os.getsid(pid) == pid
    variables = {
        one.split("=")[0] for one in Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    }
    assert "OTHER_SECRET" not in variables
    assert resident.helper() == (0, stdout, "")
    assert resident.cli("daemon", "--stop") == (0, "stopped\n", "")
    assert resident.owner() is None
    assert not resident.socket.exists()
    assert resident.cli("daemon", "--stop") == (0, "no daemon runs\n", "")


def remove(folder: Path) -> None:
    """Remove a folder at once: the daemon makes its files again while it is emptied."""
    away = folder.rename(folder.with_name("away"))
    shutil.rmtree(away)


def test_a_socket_that_is_gone_is_made_again(running: Resident) -> None:
    """At once; where the folder cannot be made, as between a logout and a login, when it can."""
    key, folder = running.key(), running.socket.parent
    remove(folder)
    until(running.listens)

    assert running.process is not None
    running.process.send_signal(signal.SIGSTOP)
    shutil.rmtree(folder)
    folder.touch()
    running.process.send_signal(signal.SIGCONT)
    until(lambda: "cannot listen" in running.said())
    folder.unlink()
    until(running.listens)
    assert running.key() == key
    remove(folder)  # it is watched again
    until(running.listens)


@pytest.mark.usefixtures("either")
def test_the_helper_starts_one(resident: Resident, gateway: DevGateway) -> None:
    """Nobody listens: the slow path does it."""
    resident.environment["ADMIN"] = gateway.master_key
    resident.configure(profile(gateway))
    status, stdout, stderr = resident.helper()
    assert (status, stderr) == (0, "")
    assert resident.key() == stdout.strip()


@pytest.mark.usefixtures("either")
def test_ten_helpers_start_one_daemon(resident: Resident, gateway: DevGateway) -> None:
    """All get the one key that was minted."""
    resident.environment["ADMIN"] = gateway.master_key
    resident.configure(profile(gateway))
    helpers = [
        subprocess.Popen(
            resident.helper_command(),
            env=resident.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(10)
    ]
    results = [(*one.communicate(timeout=60), one.returncode) for one in helpers]
    assert {status for _, _, status in results} == {0}, results
    assert len({key for key, _, _ in results}) == 1
    assert len(gateway.live_keys()) == 1


def test_no_start_starts_none(resident: Resident, gateway: DevGateway) -> None:
    """What is due is done here and now."""
    resident.environment["ADMIN"] = gateway.master_key
    resident.configure(profile(gateway))
    assert resident.cli("get", "--no-start")[0] == 0
    assert resident.owner() is None


@pytest.mark.usefixtures("either")
def test_a_daemon_that_hangs_costs_no_key(running: Resident) -> None:
    """Stopped in the middle: the sealed key is printed all the same, within seconds."""
    key = running.key()
    assert running.process is not None
    running.process.send_signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert running.helper() == (0, f"{key}\n", "")
        assert time.monotonic() - started < 6  # it is asked once
        (running.state / "cache" / "work.sealed").unlink()
        status, stdout, stderr = running.helper()
        assert (status, stdout) == (69, "")
        assert stderr == "keybroker: the daemon does not answer; keybroker daemon --stop\n"
    finally:
        running.process.send_signal(signal.SIGCONT)
    assert running.key() == key


def test_a_damaged_journal_still_gives_the_sealed_key(running: Resident) -> None:
    """No daemon can run; what it sealed is alive."""
    key = running.key()
    running.kill()
    journal = running.state / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"have"', b'"hove"'))
    assert running.helper() == (0, f"{key}\n", "")
    assert running.owner() is None


def test_a_configuration_that_is_wrong_is_said(resident: Resident) -> None:
    """By the command that starts it, with file and line."""
    resident.configure("[profiles.work]\nbase_url = 5\n")
    for arguments in (("daemon",), ("get",)):
        status, stdout, stderr = resident.cli(*arguments)
        assert (status, stdout) == (78, "")
        assert f"{resident.file}:2: " in stderr
    assert resident.owner() is None


def test_a_daemon_that_hangs_is_ended_all_the_same(running: Resident) -> None:
    """By its process, which the owner lock names; status reads the disk meanwhile."""
    key = running.key()
    assert running.process is not None
    running.process.send_signal(signal.SIGSTOP)
    status, stdout, stderr = running.cli("status")
    assert (status, stderr) == (0, "")
    assert stdout.startswith(f"the daemon at {running.socket} does not answer; keybroker daemon")
    for arguments in (["rotate"], ["reload"], ["source", "test"]):
        started = time.monotonic()
        assert running.cli(*arguments)[0] == 69
        assert time.monotonic() - started < 6
    assert running.cli("check")[0] == 0
    expected = f"killed process {running.process.pid}, which did not answer\n"
    assert running.cli("daemon", "--stop") == (0, expected, "")
    running.process.wait(10)
    assert running.cli("get")[1] == f"{key}\n"


@pytest.mark.usefixtures("either")
def test_another_configuration_is_not_answered_with_this_ones_key(
    running: Resident, gateway: DevGateway
) -> None:
    """Neither by a command nor by the helper: the one that runs has to be ended first."""
    running.key()
    other = running.home.path / "other.toml"
    other.touch(0o600)
    other.write_text('[cache]\nkey = "file"\n' + profile(gateway, "other"))
    running.environment["KEYBROKER_CONFIG"] = str(other)
    for status, stdout, stderr in (running.cli("get", "other"), running.helper("other")):
        assert (status, stdout) == (69, "")
        assert stderr == (
            "keybroker: the daemon that runs reads the usual configuration; "
            "keybroker daemon --stop\n"
        )
    assert running.cli("daemon", "--stop")[0] == 0
    status, stdout, _ = running.cli("get", "other")
    assert (status, stdout[:3]) == (0, "sk-")
    assert running.helper("other") == (0, stdout, "")
    settings = running.cli("status")[1]
    assert f" '{running.socket}' 'other'" in settings


def test_a_socket_of_another_state_directory_is_not_taken(
    running: Resident, gateway: DevGateway
) -> None:
    """Two state directories and one runtime directory: the second daemon does not begin."""
    key = running.key()
    running.environment["XDG_STATE_HOME"] = str(running.home.path / "elsewhere")
    status, stdout, stderr = running.cli("get", "--no-start")
    assert (status, stdout) == (69, "")
    assert "has another state directory" in stderr
    status, _, stderr = running.cli("daemon")
    assert status == 69
    assert running.key() == key


def test_a_fault_of_ours_costs_nobody_a_key(resident: Resident, gateway: DevGateway) -> None:
    """A turn that fails is said once, by its type and place; the daemon goes on."""
    resident.environment["ADMIN"] = gateway.master_key
    resident.configure(profile(gateway))
    fault = (
        "from keybroker import push\n"
        "def fail(self, now):\n"
        "    raise RuntimeError('sk-secret-in-an-exception')\n"
        "push.Push.run = fail\n"
    )
    resident.start(ready=False, command=daemon_with(fault, resident.state, resident.socket))
    key = until(lambda: resident.socket.exists() and resident.key())
    assert resident.ask("work") == f"ok {key}"
    said = until(lambda: "internal error" in resident.said() and resident.said())
    assert "internal error: RuntimeError at <string>:" in said
    assert "sk-secret" not in said
    assert resident.ask("work") == f"ok {key}"
    assert resident.said().count("internal error") == 1
    assert resident.process is not None
    assert resident.process.poll() is None


# the configuration, while it runs


def test_a_changed_file_is_read_at_once(running: Resident, gateway: DevGateway) -> None:
    """A new profile is there without a word from anybody; one that is gone is revoked later."""
    running.key()
    running.configure(profile(gateway, "home", 'helper_ttl = "1s"\nhold = "1s"'))
    key = until(lambda: running.ask("home").startswith("ok ") and running.key("home"))
    assert key
    assert running.ask("work").startswith("error 78 ")
    [gone] = running.status()["unconfigured"]
    assert gone["profile"] == "work"
    guidance = json.loads((running.socket.parent / "guidance.json").read_text())
    assert list(guidance["profiles"]) == ["home"]


def test_a_bad_configuration_changes_nothing(running: Resident, gateway: DevGateway) -> None:
    """It is refused by `reload`, said once in the log, and the one before it stays in use."""
    key = running.key()
    running.configure("[profiles.work]\nbase_url = 5\n")
    until(lambda: "stays in use" in running.said())
    status, stdout, stderr = running.cli("reload")
    assert (status, stdout) == (78, "")
    assert f"{running.file}:2: " in stderr
    assert running.ask("work") == f"ok {key}"
    running.configure(profile(gateway))
    until(lambda: "good again" in running.said())
    assert running.said().count("stays in use") == 1
    assert running.key() == key


def test_a_denied_admin_key_is_tried_again_when_its_file_changes(
    resident: Resident, gateway: DevGateway
) -> None:
    """Not before, however often somebody asks."""
    admin = resident.home.path / "admin"  # which the configuration names as people do
    admin.touch(0o600)
    admin.write_text("sk-wrong")
    resident.configure(profile(gateway).replace('{ env = "ADMIN" }', '{ file = "~/admin" }'))
    resident.start()
    reply = until(lambda: resident.ask("work"))
    assert reply.startswith("error 77 ")
    calls = gateway.requests
    for _ in range(5):
        assert resident.ask("work").startswith("error 77 ")
    assert gateway.requests == calls
    admin.write_text(gateway.master_key)
    until(lambda: resident.ask("work").startswith("ok "))


def test_what_was_denied_is_tried_again_at_a_reload(
    resident: Resident, gateway: DevGateway
) -> None:
    """A denial waits for minutes; somebody who mended it at the gateway does not."""
    master, gateway.master_key = gateway.master_key, "sk-another"
    resident.environment["ADMIN"] = master
    resident.configure(profile(gateway))
    resident.start()
    until(lambda: resident.row()["trouble"])
    gateway.master_key = master
    assert resident.ask("work").startswith("error 77 ")
    assert resident.cli("reload")[0] == 0
    assert resident.key("work").startswith("sk-")


def test_a_linked_configuration_is_followed(running: Resident, gateway: DevGateway) -> None:
    """As with dotfiles that are kept elsewhere: what the link leads to is what counts."""
    running.key()
    kept = running.home.path / "dotfiles"
    kept.mkdir(mode=0o700)
    running.file.rename(kept / "config.toml")
    running.file.symlink_to(kept / "config.toml")
    until(lambda: running.ask("work").startswith("ok "))
    text = (kept / "config.toml").read_text()
    (kept / "config.toml").write_text(profile(gateway, "home") + text)
    until(lambda: running.ask("home").startswith("ok "))


def test_a_key_file_that_leads_nowhere_costs_no_other_profile(
    resident: Resident, gateway: DevGateway
) -> None:
    """A link to itself, from the start and in a configuration that is read later."""
    file = resident.home.path / "key"
    file.symlink_to(file)
    lost = profile(gateway, "lost").replace('{ env = "ADMIN" }', f'{{ file = "{file}" }}')
    resident.environment["ADMIN"] = gateway.master_key
    for first, second in ((lost + profile(gateway), ""), (profile(gateway), lost)):
        resident.configure(first)
        resident.start()
        resident.key("work")
        resident.configure(first + second)
        assert resident.cli("reload")[0] == 0
        until(lambda: "cannot be read" in resident.ask("lost"))
        assert resident.kill(signal.SIGTERM) == 0
    assert "Traceback" not in resident.said()
    assert "internal error" not in resident.said()


def test_a_fault_of_ours_at_the_start_is_one_line(resident: Resident, gateway: DevGateway) -> None:
    """No traceback, whose text may hold a secret, and no socket that nobody listens at."""
    resident.configure(profile(gateway))
    broken = "from keybroker import guidance\ndef write(*_):\n    raise ValueError('sk-secret')\n"
    broken += "guidance.write = write"
    command = daemon_with(broken, resident.state, resident.socket)
    resident.start(command=command, ready=False)
    assert resident.process is not None
    assert resident.process.wait(15) == 70
    [line] = resident.said().splitlines()
    assert "internal error: ValueError at " in line
    assert "sk-secret" not in line
    assert not resident.socket.exists()


def test_a_key_file_of_somebody_elses_is_read_when_it_changes(resident: Resident) -> None:
    """Not at the next poll."""
    file = resident.home.path / "key"
    file.touch(0o600)
    file.write_text("sk-first")
    resident.configure(
        '[profiles.own]\nbase_url = "http://127.0.0.1:1"\nverify = "none"\n'
        f'[profiles.own.source]\ntype = "static"\nkey = {{ file = "{file}" }}\n'
    )
    resident.start()
    assert resident.key() == "sk-first"
    file.write_text("sk-second")
    until(lambda: resident.key() == "sk-second")


def test_a_file_that_is_gone_for_a_moment_costs_no_key(
    running: Resident, gateway: DevGateway
) -> None:
    """As when an editor renames it: the configuration before it stays in use."""
    key = running.key()
    away = running.file.with_name("config.toml~")
    running.file.rename(away)
    until(lambda: "is gone" in running.said())
    gateway.close()
    assert running.ask("work") == f"ok {key}"
    away.rename(running.file)
    until(lambda: "good again" in running.said())
    assert running.ask("work") == f"ok {key}"


@pytest.mark.parametrize("how", ["moved", "removed", "removed with the one above"])
def test_a_folder_that_is_made_again_is_watched(
    running: Resident, gateway: DevGateway, how: str
) -> None:
    """Dotfiles are put in place by moving a folder away, or removing it, and making another."""
    key, folder = running.key(), running.file.parent
    if how == "moved":
        folder.rename(folder.with_name("before"))
    else:
        shutil.rmtree(folder if how == "removed" else folder.parent)
    until(lambda: "is gone" in running.said())
    assert running.key() == key
    folder.mkdir(mode=0o700, parents=True)
    running.configure(profile(gateway, "other"))
    until(lambda: running.ask("other").startswith("ok "))


def test_guidance_that_somebody_changed_is_mended(running: Resident, gateway: DevGateway) -> None:
    """What cleans folders of the moment takes it away, or a person edits it."""
    folder = running.socket.parent
    files = [folder / name for name in ("guidance.env", "guidance-work.env", "guidance.json")]
    before = [file.read_bytes() for file in files]
    files[0].unlink()
    files[1].unlink()
    files[2].write_text("{}")
    until(lambda: [file.exists() and file.read_bytes() for file in files] == before)
    running.configure(profile(gateway, settings='helper_ttl = "30s"'))
    until(lambda: "'30000'" in files[0].read_text())


def test_a_named_configuration_may_be_relative(running: Resident, gateway: DevGateway) -> None:
    """The daemon in the background runs in another folder, and still reads that file."""
    key = running.key()
    running.stop()
    running.file.rename(running.home.path / "kb.toml")
    running.environment["KEYBROKER_CONFIG"] = os.path.relpath(running.home.path / "kb.toml")
    assert running.cli("get", "work") == (0, f"{key}\n", "")
    assert running.cli("status")[0] == 0
    running.environment["KEYBROKER_CONFIG"] = "nowhere.toml"
    status, _, stderr = running.cli("get", "work")
    assert status == 78
    assert "nowhere.toml: does not exist" in stderr


def test_a_storm_of_hangups_is_one_reload(running: Resident) -> None:
    """However many come, readers go on, and it can be told to end."""
    key = running.key()
    assert running.process is not None
    for _ in range(2000):
        running.process.send_signal(signal.SIGHUP)
    assert running.ask("work") == f"ok {key}"
    assert running.kill(signal.SIGTERM) == 0


def children(pid: int) -> list[int]:
    """Return a daemon's workers."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(one) for one in found.stdout.split()]


def test_a_reload_names_other_variables_and_keeps_those_of_the_journal(
    resident: Resident, gateway: DevGateway
) -> None:
    """A new worker has the admin key of the new profile, and that of the keys that are given up."""
    resident.environment.update(ADMIN=gateway.master_key, OTHER=gateway.master_key)
    short = 'helper_ttl = "1s"\nhold = "3s"'
    resident.configure(profile(gateway, "work", short))
    resident.start()
    resident.key()
    [first] = gateway.live_keys()
    resident.configure(profile(gateway, "other").replace("ADMIN", "OTHER"))
    until(lambda: resident.ask("work").startswith("error 78 "))
    assert resident.process is not None
    for worker in children(resident.process.pid):  # which has what was named before
        os.kill(worker, signal.SIGKILL)
    until(lambda: resident.ask("other").startswith("ok "))
    until(lambda: first not in gateway.live_keys())


def test_profiles_come_and_go_while_others_wait(resident: Resident, gateway: DevGateway) -> None:
    """A key file that changes, a rotation and a reader that wait: nobody's profile is missed."""
    file = resident.home.path / "key"
    file.touch(0o600)
    file.write_text("sk-one")
    own = (
        '[profiles.{}]\nbase_url = "http://127.0.0.1:1"\nverify = "none"\n'
        f'[profiles.{{}}.source]\ntype = "static"\nkey = {{{{ file = "{file}" }}}}\n'
    )
    gone = profile(gateway, "gone").replace(gateway.url, "http://127.0.0.1:1")
    resident.environment["ADMIN"] = gateway.master_key
    both = own.format("a", "a") + own.format("b", "b")
    resident.configure(both + gone)
    resident.start()
    assert (resident.key("a"), resident.key("b")) == ("sk-one", "sk-one")
    command = [sys.executable, "-c", "from keybroker.cli import main; main()", "rotate", "gone"]
    with subprocess.Popen(command, env=resident.environment, stderr=subprocess.PIPE) as rotation:
        resident.configure(own.format("b", "b"))
        until(lambda: resident.ask("a").startswith("error 78 "))
        assert rotation.wait(30) != 0
    file.write_text("sk-two")
    until(lambda: resident.ask("b") == "ok sk-two")
    assert "internal error" not in resident.said()


def test_a_journal_that_is_damaged_meanwhile_ends_nobody(running: Resident) -> None:
    """A running daemon goes on with what it knows."""
    key = running.key()
    journal = running.state / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"have"', b'"hove"'))
    assert running.cli("reload")[0] == 0
    assert running.ask("work") == f"ok {key}"


# suspicion and push


def test_a_key_deleted_behind_our_back_costs_one_retry(
    running: Resident, gateway: DevGateway
) -> None:
    """The session that asks again too soon gets another key, with the same question."""
    key = running.key()
    assert running.ask("work", os.getpid(), TTL) == f"ok {key}"
    delete(gateway, key)
    assert running.ask("work") == f"ok {key}"  # nobody knows yet
    fresh = running.ask("work", os.getpid(), TTL)
    assert fresh.startswith("ok ")
    assert fresh != f"ok {key}"
    assert [live.token[:8] for live in gateway.live_keys()] == [running.row()["fingerprint"]]


def test_a_good_key_survives_suspicion(running: Resident, gateway: DevGateway) -> None:
    """It is looked at once in ten seconds, and stays."""
    key = running.key()
    before = verifications(gateway)
    for _ in range(5):
        assert running.ask("work", os.getpid(), TTL) == f"ok {key}"
    assert verifications(gateway) == before + 1


def test_an_edit_of_settings_is_no_suspicion(running: Resident, gateway: DevGateway) -> None:
    """The client forgets its key then, and asks again."""
    settings = mine(running)
    key = running.key()
    assert running.ask("work", os.getpid(), TTL, **settings) == f"ok {key}"
    before = verifications(gateway)
    Path(settings["directory"], "settings.json").write_text('{"model": "x"}\n')
    assert running.ask("work", os.getpid(), TTL, **settings) == f"ok {key}"
    assert verifications(gateway) == before


def test_suspicion_without_an_answer_gives_the_key(resident: Resident, gateway: DevGateway) -> None:
    """The gateway is down when it is asked: undecided, within 5 s, the key stays."""
    resident.environment["ADMIN"] = gateway.master_key
    with Faults(gateway.url) as faults:
        resident.configure(profile(faults))
        resident.start()
        key = resident.key()
        resident.ask("work", os.getpid(), TTL)
        faults.next(Status(503), times=20)
        started = time.monotonic()
        assert resident.ask("work", os.getpid(), TTL) == f"ok {key}"
        assert time.monotonic() - started < 6


def test_suspicion_of_a_gateway_that_hangs_ends_in_time(
    resident: Resident, gateway: DevGateway
) -> None:
    """Nobody waits for its answer for longer than 5 s."""
    resident.environment["ADMIN"] = gateway.master_key
    with Faults(gateway.url) as faults:
        resident.configure(profile(faults))
        resident.start()
        key = resident.key()
        resident.ask("work", os.getpid(), TTL)
        faults.next(Hang(), times=20)
        started = time.monotonic()
        assert resident.ask("work", os.getpid(), TTL) == f"ok {key}"
        assert 4 < time.monotonic() - started < 6


def test_settings_are_touched_only_when_a_key_was_replaced(
    running: Resident, gateway: DevGateway
) -> None:
    """Not for the first key, not for an answer; contents and inode stay."""
    settings = mine(running)
    file = Path(settings["directory"], "settings.json")
    before = file.stat()
    running.ask("work", os.getpid(), TTL, **settings)
    running.cli("status")
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    running.cli("rotate")
    until(lambda: file.stat().st_mtime_ns > before.st_mtime_ns)
    assert file.read_text() == "{}\n"
    assert file.stat().st_ino == before.st_ino
    touched = file.stat().st_mtime_ns
    running.kill()
    running.start()  # it remembers which file
    running.key()
    assert file.stat().st_mtime_ns == touched
    running.cli("rotate")
    until(lambda: file.stat().st_mtime_ns > touched)


def test_a_key_that_was_replaced_without_a_touch_has_it_made_up_for(running: Resident) -> None:
    """A command replaced it, or a daemon that ended just then; once, and not for anything else."""
    settings = mine(running)
    file = Path(settings["directory"], "settings.json")
    before = file.stat().st_mtime_ns
    running.ask("work", os.getpid(), TTL, **settings)
    running.kill()
    running.start()
    running.key()
    running.kill()
    assert running.cli("rotate")[0] == 0
    assert file.stat().st_mtime_ns == before
    running.start()
    touched = until(lambda: file.stat().st_mtime_ns != before and file.stat().st_mtime_ns)
    running.kill()
    running.start()
    running.key()
    time.sleep(0.5)
    assert file.stat().st_mtime_ns == touched


def test_a_file_that_is_mended_is_touched_after_a_reload(running: Resident) -> None:
    """What was switched off is tried again when a person says so."""
    settings = mine(running)
    file = Path(settings["directory"], "settings.json")
    file.unlink()
    file.mkdir()
    running.ask("work", os.getpid(), TTL, **settings)
    running.cli("rotate")
    until(lambda: running.status()["push"]["off"] == {str(file): "is not a regular file"})
    file.rmdir()
    mine(running)
    before = file.stat().st_mtime_ns
    assert running.cli("reload")[0] == 0
    assert running.status()["push"]["off"] == {}
    running.cli("rotate")
    until(lambda: file.stat().st_mtime_ns != before)


def test_push_can_be_switched_off(running: Resident, gateway: DevGateway) -> None:
    """A profile that says `push = false` touches nothing."""
    settings = mine(running)
    running.configure(profile(gateway, settings="push = false"))
    assert running.cli("reload")[0] == 0
    running.ask("work", os.getpid(), TTL, **settings)
    before = Path(settings["directory"], "settings.json").stat().st_mtime_ns
    running.cli("rotate")
    running.cli("rotate")
    assert Path(settings["directory"], "settings.json").stat().st_mtime_ns == before


# what is kept


def test_the_audit_says_who_was_given_what(running: Resident) -> None:
    """The session's program and process, and the key's fingerprint."""
    running.ask("work", os.getpid(), 0)
    lines = until(lambda: [one for one in Audit(running.state).read() if one["event"] == "given"])
    assert lines[-1]["pid"] == os.getpid()
    assert lines[-1]["uid"] == os.getuid()
    assert lines[-1]["fingerprint"] == running.row()["fingerprint"]
    assert running.cli("audit", "verify")[0] == 0


def test_what_was_given_just_before_the_end_is_in_the_audit(running: Resident) -> None:
    """It is written a moment later, or as the daemon ends."""
    running.key()
    until(lambda: Audit(running.state).read()[-1]["event"] == "given")
    before = len(Audit(running.state).read())
    running.ask("work", os.getpid(), 0)
    assert running.kill(signal.SIGTERM) == 0
    [line] = Audit(running.state).read()[before:]
    assert (line["event"], line["pid"]) == ("given", os.getpid())


def test_who_waits_when_it_is_told_to_end_is_told_so(
    resident: Resident, gateway: DevGateway
) -> None:
    """Not left with a connection that breaks off."""
    resident.environment["ADMIN"] = gateway.master_key
    with Faults(gateway.url) as faults, ThreadPoolExecutor() as others:
        faults.next(Hang(), times=None)
        resident.configure(profile(faults))
        resident.start()
        waiting = others.submit(resident.ask, "work")
        time.sleep(0.5)
        assert resident.kill(signal.SIGTERM) == 0
        assert waiting.result(15).startswith("error 75 keybroker: the daemon was stopped")


def test_a_locked_keyring_costs_no_key(home: Home, gateway: DevGateway) -> None:
    """Keys live in memory meanwhile; the sealed one is not given up, and comes back."""
    with Keyring() as keyring:
        resident = Resident(home, **keyring.environment, ADMIN=gateway.master_key)
        resident.configure(profile(gateway) + '[cache]\nkey = "keyring"\n')
        try:
            resident.start()
            first = resident.key()
            resident.stop()
            keyring.lock()
            resident.start()
            reply = resident.ask("work")
            assert reply.startswith("ok sk-")
            assert replay(Journal(resident.state).read())["work"].current is not None
            assert len(gateway.live_keys()) == 2
            assert resident.row()["retired"][0]["why"] == "replaced"
            assert first not in reply
            keyring.unlock()
            assert resident.cli("reload")[0] == 0
            until(lambda: resident.status()["cache"] == "OS keyring")
            until(lambda: "sealed with the OS keyring" in resident.said())
            kept = resident.key()
            time.sleep(0.5)  # it is sealed by now, and nobody is told of a new key
            assert resident.said().count("is handed out") == 2
            resident.kill()
            gateway.close()
            resident.start()
            assert resident.key() == kept
        finally:
            resident.stop()


# the Python API


def test_a_program_gets_the_key(running: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a secret that does not print itself, and the environment without a key."""
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    key = running.key()
    assert client.get("work").reveal() == key
    assert client.get().reveal() == key
    assert key not in repr(client.get())
    assert set(client.environment()) == {
        "ANTHROPIC_BASE_URL",
        "CLAUDE_CODE_API_KEY_HELPER_TTL_MS",
    }
    with pytest.raises(ConfigError, match="no profile 'other'"):
        client.get("other")
    with pytest.raises(ConfigError, match="no profile 'other'"):
        client.environment("other")
    with pytest.raises(ValueError, match="name"):
        client.get("a b")


def test_a_program_starts_the_daemon(
    resident: Resident, gateway: DevGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `keybroker get`, whose error it raises when there is no key."""
    resident.environment["ADMIN"] = gateway.master_key
    resident.configure(profile(gateway))
    for name, value in resident.environment.items():
        monkeypatch.setenv(name, value)
    assert client.get("work").reveal() == resident.key()
    assert resident.cli("daemon", "--stop")[0] == 0
    resident.configure(
        '[profiles.gone]\nbase_url = "http://127.0.0.1:1"\n[profiles.gone.source]\n'
        'type = "litellm"\nadmin = { env = "ADMIN" }\n'
    )
    with pytest.raises(NotReady, match="could not be reached"):
        client.get("gone")


def test_the_hit_path_loads_nothing_but_the_standard_library(running: Resident) -> None:
    """A program that asks pays for a socket and a secret."""
    running.key()
    code = "import sys; from keybroker import client; client.get('work'); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=running.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"click", "httpx", "cryptography", "keyring", "ssl", "subprocess"}
    assert "keybroker.config" not in loaded
