"""The line for Claude Code's status line, and `check` for scripts: short, quick, honest."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from keybroker import glance, standing, statusline
from keybroker.asking import VERSION
from keybroker.devgateway import DevGateway
from keybroker.wire import read_request
from tests.resident import Resident, until
from tests.servers.keyring import Keyring

COMMAND = [sys.executable, "-c", "from keybroker.cli import main; main()", "statusline"]
PROGRAM = [sys.executable, "-IS", statusline.__file__]
TTL = 60_000
MINTED = """
[profiles.work]
base_url = "{url}"
[profiles.work.source]
type = "litellm"
admin = {{ file = "{folder}/admin" }}
"""
FOLLOWED = """
[profiles.team]
base_url = "{url}"
verify = "models"
[profiles.team.source]
type = "static"
key = {{ file = "{folder}/key" }}
"""


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


def write(file: Path, text: str) -> None:
    file.touch(0o600)
    file.write_text(text)


@pytest.fixture
def running(resident: Resident, gateway: DevGateway) -> Resident:
    """A daemon with one profile that mints."""
    folder = resident.home.path
    write(folder / "admin", gateway.master_key)
    resident.configure(MINTED.format(url=gateway.url, folder=folder))
    resident.start()
    return resident


def line(
    resident: Resident, *words: str, command: Sequence[str] = COMMAND, **variables: str
) -> str:
    """Run it as a client does, whose stdin never ends; return what it prints."""
    read, write = os.pipe()
    try:
        done = subprocess.run(
            [*command, *words],
            env={**resident.environment, **variables},
            stdin=read,
            capture_output=True,
            text=True,
            timeout=30,
        )
    finally:
        os.close(read)
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")
    assert done.stdout.count("\n") == 1
    return done.stdout[:-1]


def administer(gateway: DevGateway, path: str, **body: Any) -> dict[str, Any]:
    """Do something at the gateway behind keybroker's back."""
    request = urllib.request.Request(
        gateway.url + path,
        json.dumps(body).encode(),
        {"authorization": f"Bearer {gateway.master_key}", "content-type": "application/json"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request) as answer:
        return dict(json.loads(answer.read()))


# What it says


@pytest.mark.parametrize("words", [(), ("work",), ("--profile", "work")])
def test_it_says_how_long_the_key_lives(running: Resident, words: tuple[str, ...]) -> None:
    """Of the profile that is named, or the only one."""
    running.key()
    assert re.fullmatch(r"work (12h|11h 59m)", line(running, *words))


@pytest.mark.parametrize("words", [("-",), ("-", "work"), ("-", "-"), ()])
def test_the_line_of_the_settings_says_the_same(running: Resident, words: tuple[str, ...]) -> None:
    """By its path, isolated and without a site."""
    running.key()
    assert re.fullmatch(r"work (12h|11h 59m)", line(running, *words, command=PROGRAM))


def test_it_asks_the_socket_that_is_named(running: Resident, tmp_path: Path) -> None:
    """Wherever its own variables point."""
    running.key()
    there = line(running, str(running.socket), "work", command=PROGRAM, XDG_RUNTIME_DIR="/nowhere")
    assert there.startswith("work 1")
    nobody = line(running, str(tmp_path / "s"), "work", command=PROGRAM)
    assert nobody == "work ! no daemon"


def test_a_key_without_an_end_has_none(resident: Resident, gateway: DevGateway) -> None:
    """Of a profile whose key is somebody else's."""
    write(resident.home.path / "key", administer(gateway, "/key/generate")["key"])
    resident.configure(FOLLOWED.format(url=gateway.url, folder=resident.home.path))
    resident.start()
    resident.key("team")
    assert line(resident) == "team no end"


def test_without_a_daemon_it_says_so(resident: Resident) -> None:
    """It starts none."""
    assert line(resident) == "keybroker ! no daemon"
    assert line(resident, "work") == "work ! no daemon"
    assert resident.owner() is None


def test_an_unknown_profile_is_said(running: Resident) -> None:
    """What is no name at all is not repeated."""
    for word in ("other", "Ökonomie", "a b", "", "x" * 40, 'a"b'):
        expected = "keybroker ! no such profile"
        assert (line(running, word) == expected) is (word != "")


def test_another_configuration_is_not_answered_for(running: Resident, tmp_path: Path) -> None:
    """Of two daemons only one listens there."""
    running.key()
    other = tmp_path / "other.toml"
    said = line(running, "work", KEYBROKER_CONFIG=str(other))
    assert said == "keybroker ! the daemon has another configuration"
    assert line(running, str(running.socket), "work", command=PROGRAM, KEYBROKER_CONFIG="/x") == (
        line(running, "work")
    )


def test_a_denied_admin_key_needs_a_person(running: Resident, gateway: DevGateway) -> None:
    """The mark is there as long as the key still lives; `check --json` says what to do."""
    running.key()
    write(running.home.path / "admin", "sk-wrong")
    running.cli("rotate", "work")
    assert re.fullmatch(r"work (12h|11h 59m) ! denied", line(running))
    status, out, err = running.cli("check", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["needs"] == f"denied: see source.admin (file:{running.home.path}/admin)"


def test_no_key_at_all_is_said(resident: Resident, gateway: DevGateway) -> None:
    """With the reason, which is a person's to mend, or the gateway's."""
    folder = resident.home.path
    write(folder / "admin", "sk-wrong")
    resident.configure(MINTED.format(url=gateway.url, folder=folder))
    resident.start()
    until(lambda: resident.ask("work").startswith("error 77 "))
    assert line(resident) == "work no key ! denied"
    gateway.close()
    resident.cli("reload")
    until(lambda: resident.ask("work").startswith("error 75 "))
    assert line(resident) == "work no key ! source unavailable"


def test_a_key_that_the_gateway_refuses_is_marked(resident: Resident, gateway: DevGateway) -> None:
    """As long as its owner has not written another; and `check` counts it as none."""
    folder = resident.home.path
    key = administer(gateway, "/key/generate")["key"]
    write(folder / "key", key)
    resident.configure(FOLLOWED.format(url=gateway.url, folder=folder))
    resident.start()
    assert resident.key("team") == key
    assert resident.cli("check") == (0, "team: no end\n", "")

    administer(gateway, "/key/delete", keys=[key])

    def asked_again() -> bool:  # a look at a gateway that is slow to answer shows nothing
        resident.ask("team", os.getpid(), TTL)
        return bool(resident.row("team")["phase"] == "suspect")

    until(asked_again, 60, every=0.5)
    assert line(resident) == "team no end ! key refused"
    status, out, err = resident.cli("check")
    assert (status, out) == (75, "team: no end\n")
    assert err == (
        "keybroker: team: the gateway refused the key; its owner has to write a new one\n"
        "hint: keybroker status team\n"
    )
    status, out, _ = resident.cli("check", "--json")
    found = json.loads(out)
    assert (status, found["ok"], found["phase"]) == (75, False, "suspect")
    assert found["needs"] == "key refused: write a new one where its owner keeps it"
    assert resident.cli("check", "--quiet") == (75, "", "")

    write(folder / "key", administer(gateway, "/key/generate")["key"])
    until(lambda: line(resident) == "team no end", 60)
    assert resident.cli("check", "--quiet") == (0, "", "")


def test_a_locked_keyring_is_marked(home: Any, gateway: DevGateway) -> None:
    """Keys go on, and are sealed nowhere; unlocked, the mark goes away."""
    write(home.path / "admin", gateway.master_key)
    with Keyring() as keyring:
        resident = Resident(home, **keyring.environment)
        text = MINTED.format(url=gateway.url, folder=home.path)
        resident.configure(f'{text}\n[cache]\nkey = "keyring"\n')
        try:
            keyring.lock()
            resident.start()
            resident.key()
            assert re.fullmatch(r"work (12h|11h 59m) ! keyring locked", line(resident))
            found = json.loads(resident.cli("check", "--json")[1])
            assert (found["ok"], found["needs"]) == (True, "keyring locked: unlock it")
            keyring.unlock()
            assert resident.cli("reload")[0] == 0
            until(lambda: "!" not in line(resident))
        finally:
            resident.stop()


def test_memory_alone_by_choice_needs_nobody(running: Resident, gateway: DevGateway) -> None:
    """`cache.key = "memory"` is no locked keyring."""
    text = MINTED.format(url=gateway.url, folder=running.home.path)
    running.configure(f'{text}\n[cache]\nkey = "memory"\n')
    running.cli("reload")
    running.key()
    assert "!" not in line(running)
    assert json.loads(running.cli("check", "--json")[1])["needs"] is None


ROW: dict[str, Any] = {
    "profile": "work",
    "kind": "minted",
    "phase": "fresh",
    "held": True,
    "late": False,
    "code": None,
    "hint": None,
    "survives_outage_s": 42_120.0,
}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "work 11h 42m"),
        ({"survives_outage_s": 86_400.0 * 2 + 3 * 3600}, "work 2d 3h"),
        ({"survives_outage_s": 86_400.0}, "work 1d"),
        ({"survives_outage_s": 3600.0}, "work 1h"),
        ({"survives_outage_s": 840.0}, "work 14m"),
        ({"survives_outage_s": 8.9}, "work 8s"),
        ({"survives_outage_s": None}, "work no end"),
        ({"late": True}, "work 11h 42m ! late"),
        ({"phase": "suspect"}, "work 11h 42m ! key refused"),
        ({"phase": "condemned", "held": False}, "work no key ! key refused"),
        ({"phase": "none", "held": False}, "work no key"),
        ({"code": "unavailable", "trouble": "x"}, "work 11h 42m"),
        ({"code": "unavailable", "held": False}, "work no key ! source unavailable"),
        ({"code": "not-ready", "held": False}, "work no key ! not-ready"),
        ({"code": "denied", "phase": "suspect"}, "work 11h 42m ! denied"),
        ({"code": "invalid"}, "work 11h 42m ! no usable key"),
        ({"code": "cache-locked"}, "work 11h 42m ! keyring locked"),
        ({"code": "journal"}, "work 11h 42m ! journal"),
        ({"code": "config"}, "work 11h 42m ! configuration"),
    ],
)
def test_each_state_has_its_words(change: dict[str, Any], text: str) -> None:
    """What passes by itself has no mark."""
    assert standing.glance({**ROW, **change}, locked=False) == text


def test_a_followed_key_does_not_mind_a_locked_keyring() -> None:
    """It is read again where its owner keeps it."""
    followed = {**ROW, "kind": "followed"}
    assert standing.needs(followed, locked=True) is None
    assert standing.needs(ROW, locked=True) == ("keyring locked", "unlock it")


# How quick


def test_it_never_waits_for_longer_than_half_a_second(running: Resident) -> None:
    """A daemon that hangs is said to; the client's screen is not kept waiting."""
    running.key()
    assert running.process is not None
    running.process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        said = line(running, str(running.socket), "work", command=PROGRAM)
        took = time.monotonic() - began
    finally:
        running.process.send_signal(signal.SIGCONT)
    assert said == "work ! the daemon does not answer"
    assert took < 5  # with the interpreter's own start, on a busy machine
    assert glance.SECONDS == 0.5


def test_it_loads_little() -> None:
    """Nothing beyond what the helper loads; no click, no JSON."""
    code = "import sys; from keybroker import glance; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    bare = subprocess.run(
        [sys.executable, "-I", "-c", "import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split()) - set(bare.stdout.split())
    ours = {"keybroker", "keybroker.glance", "keybroker.asking"}
    assert loaded - ours <= {"_socket"}


def test_typed_without_options_it_loads_no_click(running: Resident) -> None:
    """The whole command line would take longer than the client's screen may wait."""
    code = """if True:
        import sys
        from keybroker.cli import main
        sys.argv[1:] = ["statusline", "work"]
        try:
            main()
        finally:
            print(*sys.modules)
        """
    running.key()
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        env=running.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("work 1")
    assert {"click", "json", "socket", "re"} & set(second.split()) <= set(bare_modules())


def bare_modules() -> set[str]:
    """What any Python of this environment has loaded: an editable install may load things."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", "import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


# The wire


@pytest.mark.parametrize(
    "config", [b"", b"/etc/kb.toml", b"relative", b'/with"quote', b"/with\\", b"/a b", b"/\xff"]
)
def test_the_request_is_one_that_the_daemon_reads(config: bytes) -> None:
    """Written without JSON's module; a configuration that would need it is not named."""
    found = read_request(glance.request(b"work", config))
    assert isinstance(found, dict)
    assert (found["v"], found["op"], found["profile"]) == (VERSION, "glance", "work")
    assert found.get("config") == ("/etc/kb.toml" if config == b"/etc/kb.toml" else None)


def sized(body: bytes) -> bytes:
    return b"%d\n%b" % (len(body), body)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (sized(b'{"ok": "work 1h"}'), "work 1h"),
        (sized(b'{"ok": "work 1h"}')[:-1], None),
        (sized(b'{"ok": ""}'), None),
        (sized(b'{"ok": "a\\n"}'), None),
        (sized(b'{"ok": "a", "b": "c"}'), None),
        (sized(b'{"ok": "\x1b[2J"}'), None),
        (sized('{"ok": "ö"}'.encode()), None),
        (sized(b'{"error": {"code": "nobody"}}'), None),
        (b"error 69 keybroker: x\n", None),
        (b"", None),
        (b"7", None),
    ],
)
def test_only_a_plain_line_is_shown(answer: bytes, text: str | None) -> None:
    """Half an answer, an error or what would steer a terminal is none."""
    assert glance.read(answer) == text


@contextmanager
def answering(path: Path, pieces: list[bytes], *, pause: float = 0.0) -> Iterator[None]:
    """A daemon that answers one client with these pieces."""

    def serve() -> None:
        with listener:
            client, _ = listener.accept()
            with client:
                client.recv(1024)
                for piece in pieces:
                    try:
                        client.sendall(piece)
                    except OSError:
                        return
                    time.sleep(pause)

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    thread = Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_an_answer_may_come_in_pieces(resident: Resident) -> None:
    path = resident.home.path / "s"
    with answering(path, [b"17\n", b'{"ok": "wor', b'k 1h"}']):
        assert line(resident, str(path), "work", command=PROGRAM) == "work 1h"


def test_a_daemon_that_drips_is_given_up(resident: Resident) -> None:
    """A byte now and then does not keep the client waiting."""
    path = resident.home.path / "s"
    with answering(path, [b"1"] * 30, pause=0.05):
        said = line(resident, str(path), "work", command=PROGRAM)
    assert said == "work ! the daemon does not answer"


def test_a_daemon_of_another_version_is_said(resident: Resident) -> None:
    """It does not know the question."""
    path = resident.home.path / "s"
    body = b'{"error": {"code": "nobody", "message": "does not know", "hint": null}}'
    with answering(path, [sized(body)]):
        said = line(resident, str(path), "work", command=PROGRAM)
    assert said == "work ! the daemon is of another version"


def test_a_stdout_that_is_closed_is_no_traceback(resident: Resident) -> None:
    """74, as for a key."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "-", *COMMAND],
        env=resident.environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 74
    assert "Traceback" not in done.stderr


# check, for scripts


def test_check_says_all_of_it_as_json(running: Resident) -> None:
    """With a daemon and without one, in the same words."""
    running.key()
    status, out, err = running.cli("check", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    row = running.row()
    assert 43_000 < found.pop("remaining_s") <= 43_200
    assert found == {
        "profile": "work",
        "ok": True,
        "phase": "fresh",
        "fingerprint": row["fingerprint"],
        "expires_at": row["expires_at"],
        "needs": None,
    }
    running.stop()
    again = json.loads(running.cli("check", "--json")[1])
    assert 43_000 < again.pop("remaining_s") <= 43_200
    assert again == found


@pytest.mark.parametrize("option", ["--quiet", "-q"])
def test_check_can_be_silent(running: Resident, option: str) -> None:
    """The exit status alone: for a key, too little time, another profile, no configuration."""
    running.key()
    assert running.cli("check", option) == (0, "", "")
    assert running.cli("check", option, "--min-remaining", "13h") == (75, "", "")
    assert running.cli("check", option, "other") == (78, "", "")
    running.file.write_text("[profiles.work]\nbase = 1\n")
    assert running.cli("check", option) == (78, "", "")


def test_check_cannot_be_silent_and_speak(running: Resident) -> None:
    status, out, err = running.cli("check", "--quiet", "--json")
    assert (status, out) == (2, "")
    assert "--quiet prints nothing" in err


def test_check_with_too_little_left_says_so_in_json(running: Resident) -> None:
    """`ok` is what the status says."""
    running.key()
    status, out, err = running.cli("check", "--json", "--min-remaining", "13h")
    found = json.loads(out)
    assert (status, found["ok"], found["needs"]) == (75, False, None)
    assert err.startswith("keybroker: work: only ")


def test_check_before_there_is_a_key(resident: Resident, gateway: DevGateway) -> None:
    """Nothing is minted for it."""
    write(resident.home.path / "admin", gateway.master_key)
    resident.configure(MINTED.format(url=gateway.url, folder=resident.home.path))
    status, out, err = resident.cli("check", "--json")
    assert (status, json.loads(out)) == (
        75,
        {
            "profile": "work",
            "ok": False,
            "remaining_s": None,
            "phase": "none",
            "fingerprint": None,
            "expires_at": None,
            "needs": None,
        },
    )
    assert err == "keybroker: work: no key\nhint: keybroker get work\n"
    assert gateway.live_keys() == ()
