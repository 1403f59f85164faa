"""The OS keyring, a real one: it keeps the key of the cache, and never asks anybody anything."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Home
from tests.servers.keyring import Keyring

pytestmark = pytest.mark.servers

ASK = """
import json, os, sys
from pathlib import Path
from keybroker.cache import find_wrap_key
from keybroker.errors import KeybrokerError
try:
    found = find_wrap_key(sys.argv[1], Path(sys.argv[2]), os.environ)
    print(json.dumps({"origin": found.origin, "key": found.key and found.key.reveal()}))
except KeybrokerError as error:
    print(json.dumps({"error": type(error).__name__, "status": error.exit_status,
                      "message": error.message, "hint": error.hint}))
"""
FEW_SECONDS = 8.0


def run(home: Home, keyring: Keyring | None, program: str, *arguments: str) -> str:
    """Run Python as this user, on the keyring's bus; it has no terminal and no time."""
    environment = {**home.environment, **(keyring.environment if keyring else {})}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    took = time.monotonic() - started
    assert (done.returncode, done.stderr) == (0, "")
    assert took < FEW_SECONDS
    return done.stdout


def ask(home: Home, keyring: Keyring | None, kind: str, name: str = "state") -> dict[str, Any]:
    """Ask for what seals the cache."""
    state = home.path / name
    state.mkdir(mode=0o700, exist_ok=True)
    found: dict[str, Any] = json.loads(run(home, keyring, ASK, kind, str(state)))
    return found


def stored(home: Home, keyring: Keyring, name: str) -> str:
    """Return an entry as any other program sees it."""
    program = "import keyring, sys; print(keyring.get_password('keybroker', sys.argv[1]), end='')"
    return run(home, keyring, program, name)


@pytest.fixture(scope="module")
def locked() -> Iterator[Keyring]:
    """A keyring that nobody unlocked."""
    with Keyring(locked=True) as keyring:
        yield keyring


@pytest.mark.parametrize("kind", ["auto", "keyring"])
def test_an_unlocked_keyring_keeps_the_key(keyring_session: Keyring, home: Home, kind: str) -> None:
    """It is made once, stored under the state directory's name, and found by the next process."""
    name = home.path.name  # other tests use the same keyring
    first = ask(home, keyring_session, kind, name)
    second = ask(home, keyring_session, kind, name)

    assert first == second
    assert first["origin"] == "OS keyring"
    assert len(bytes.fromhex(first["key"])) == 32
    assert stored(home, keyring_session, f"wrap-key {name}") == first["key"]
    assert [path for path in (home.path / name).iterdir() if path.suffix != ".lock"] == []


def test_an_entry_that_is_no_key_is_made_anew(keyring_session: Keyring, home: Home) -> None:
    """What cannot seal anything has sealed nothing."""
    name = home.path.name
    store = "import keyring, sys; keyring.set_password('keybroker', sys.argv[1], 'no key')"
    run(home, keyring_session, store, f"wrap-key {name}")

    found = ask(home, keyring_session, "keyring", name)

    assert stored(home, keyring_session, f"wrap-key {name}") == found["key"]
    assert len(bytes.fromhex(found["key"])) == 32


def test_an_entry_that_is_not_there_is_none(keyring_session: Keyring, home: Home) -> None:
    """Missing is not an error; what was written is read."""
    program = (
        "from keybroker import oskeyring as o; import sys; name = sys.argv[1]\n"
        "print(o.read(name)); o.write(name, 'value'); print(o.read(name))"
    )

    assert run(home, keyring_session, program, f"kb-test {home.path.name}") == "None\nvalue\n"


def test_a_locked_keyring_leaves_memory(locked: Keyring, home: Home) -> None:
    """`auto` goes on without, says so, and is not kept waiting."""
    assert ask(home, locked, "auto") == {
        "origin": "memory only: keyring: it is locked",
        "key": None,
    }


def test_a_locked_keyring_that_was_asked_for_by_name_is_an_error(
    locked: Keyring, home: Home
) -> None:
    """Nobody can answer; the hint says what to do."""
    assert ask(home, locked, "keyring") == {
        "error": "CacheLocked",
        "status": 69,
        "message": "keyring: it is locked",
        "hint": "unlock it, or log in to the desktop",
    }


@pytest.mark.parametrize("kind", ["auto", "keyring"])
def test_nobody_is_ever_asked_for_a_password(locked: Keyring, home: Home, kind: str) -> None:
    """With a dialog that could be opened, none is."""
    with locked.nobody_at_the_dialog() as dialog:
        found = ask(home, locked, kind)
        asked = "BeginPrompting" in dialog.tail()

    assert (found.get("key"), asked) == (None, False)


def test_a_bus_without_a_keyring_leaves_memory(home: Home) -> None:
    """A desktop without a Secret Service."""
    with Keyring() as keyring:
        keyring.stop()
        auto, by_name = ask(home, keyring, "auto"), ask(home, keyring, "keyring")

    assert auto["key"] is None
    assert auto["origin"].startswith("memory only: keyring: there is no keyring service here")
    assert (by_name["error"], by_name["status"]) == ("CacheLocked", 69)


def test_no_bus_at_all_leaves_memory(home: Home) -> None:
    """A server, a container, a cron job."""
    auto, by_name = ask(home, None, "auto"), ask(home, None, "keyring")

    assert auto["key"] is None
    assert auto["origin"].startswith("memory only: keyring: there is no keyring service here")
    assert (by_name["error"], by_name["status"]) == ("CacheLocked", 69)


def test_processes_that_ask_at_once_get_one_key(keyring_session: Keyring, home: Home) -> None:
    """Of several first ones: what the loser sealed could not be opened again."""
    state = home.path / f"{home.path.name}-race"
    state.mkdir(mode=0o700)
    askers = [
        subprocess.Popen(
            [sys.executable, "-c", ASK, "keyring", str(state)],
            env={**home.environment, **keyring_session.environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(5)
    ]

    keys = {json.loads(asker.communicate(timeout=60)[0])["key"] for asker in askers}

    assert keys == {stored(home, keyring_session, f"wrap-key {state.name}")}


def test_no_backend_is_searched_for(home: Home) -> None:
    """A keyring that the environment names, such as one that prompts on stdin, is not used."""
    environment = {**home.environment, "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring"}

    found = ask(home._replace(environment=environment), None, "auto")

    assert found["key"] is None
    assert found["origin"].startswith("memory only: keyring: there is no keyring service here")
