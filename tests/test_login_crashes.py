"""
A sign-in survives kill -9: of a worker, of the daemon or command above it, of both.

The one moment that no program can bridge is after the provider has used up a refresh token and
before the new one is on the disk: then a person signs in again, once, and is told so.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress

import pytest

from keybroker.worker import EFFECTS
from tests.patched import daemon_with, worker_with
from tests.people import Person
from tests.resident import Resident, until
from tests.servers.oidc import Oidc
from tests.test_crashes import OF_SIGN_INS

WHO = ("worker", "parent", "both")
WHEN = ("before", "during", "after")
# A worker dies where a file says so: {"effect": …, "when": …, "who": …}; the file is used up by it.
DIES = """
import json
from pathlib import Path
from keybroker import paths
from keybroker.login import tokens
from keybroker.login.oidc import Oidc
PLAN = Path({plan!r})
parent = os.getppid()
def die(who):
    PLAN.with_name("died").touch()
    if who != "worker":
        os.kill(parent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
def mortal(effect, do):
    try:
        plan = json.loads(PLAN.read_text())
    except FileNotFoundError:
        return do()
    if plan["effect"] != effect:
        return do()
    PLAN.unlink()
    if plan["when"] == "before":
        die(plan["who"])
    if plan["when"] == "during":
        def half(disk, path, data):
            path.with_name(f".{{path.name}}.{{os.getpid()}}").write_bytes(data[: len(data) // 2])
            die(plan["who"])
        paths.Disk.replace = half
        paths.Disk.remove = lambda disk, path: die(plan["who"])
        worker._send = lambda data: (os.write(1, data[: len(data) // 2]), die(plan["who"]))
    done = do()
    die(plan["who"])
perform, refresh, save = worker.perform, Oidc.refresh, tokens.Store.save
worker.perform = lambda effect, call: mortal(effect, lambda: perform(effect, call))
Oidc.refresh = lambda self, old: mortal("refresh", lambda: refresh(self, old))
seen = []
def keep(self, new):
    seen.append(new.refresh)
    if seen[0] == new.refresh:  # the trial, with what is there
        return save(self, new)
    mortal("kept", lambda: save(self, new))
tokens.Store.save = keep
"""


@pytest.fixture(scope="module")
def hourly(oidc: Oidc) -> str:
    return oidc.register(public=True, access_seconds=3600).id


class Mortal(Person):
    """Somebody whose daemon's workers, or whose commands', die as planned."""

    def plan(self, effect: str, when: str, who: str) -> None:
        """Have somebody die at the next such effect."""
        plan = {"effect": effect, "when": when, "who": who}
        (self.here.home.path / "plan").write_text(json.dumps(plan))

    @property
    def patch(self) -> str:
        """What a worker runs before it serves."""
        return DIES.format(plan=str(self.here.home.path / "plan"))

    def died(self) -> bool:
        """Say whether somebody has died."""
        return (self.here.home.path / "died").exists()

    def start(self) -> None:
        """Start the daemon."""
        command = daemon_with("", self.here.state, self.here.socket, worker=self.patch)
        self.here.start(command=command, ready=False)

    def restart(self) -> None:
        """Start a daemon if the one before was killed."""
        process = self.here.process
        assert process is not None
        with suppress(Exception):
            process.wait(0.5)
        if process.poll() is not None:
            self.start()

    def command(self, *arguments: str) -> int:
        """Run a command whose worker may die; return its status."""
        mortal = f"from keybroker import pool; pool.COMMAND = {worker_with(self.patch)!r}\n"
        code = f"{mortal}from keybroker.cli import main; main()"
        with self.typing(*arguments, command=[sys.executable, "-c", code]) as process:
            process.communicate(timeout=30)
            return process.returncode


@pytest.fixture
def ada(resident: Resident, oidc: Oidc, hourly: str) -> Mortal:
    return Mortal(resident, oidc, hourly)


def key_or_word(ada: Mortal) -> str:
    """Ask until there is a key, or the word that a person is needed."""

    def asked() -> str:
        status, key, told = ada.here.helper()
        if status == 77 and told.endswith("; run: keybroker login corp\n"):
            return "needed"
        return key if status == 0 else ""

    return until(asked)


RENEWING: list[tuple[str, str, str]] = [
    ("refresh", "before", "both"),
    ("refresh", "after", "worker"),
    ("kept", "during", "parent"),
    ("kept", "after", "worker"),
    ("seal", "during", "both"),
    ("answer", "during", "worker"),
]


@pytest.mark.parametrize(("effect", "when", "who"), RENEWING)
def test_a_renewal_that_is_cut_off(ada: Mortal, effect: str, when: str, who: str) -> None:
    """What was kept is used; what was lost is asked for once more, and never again."""
    ada.arrive(age=3600)
    first = ada.held
    ada.forget_what_was_asked()
    ada.plan(effect, when, who)
    ada.start()
    until(ada.died)
    ada.restart()

    said = key_or_word(ada)
    lost = (effect, when) in (("refresh", "after"), ("kept", "during"))
    asked = len(ada.asked("/token"))
    if lost:
        assert said == "needed"
        assert asked == 2
        ada.cli("reload")
        assert key_or_word(ada) == "needed"
        assert len(ada.asked("/token")) == 2
        ada.arrive()
        ada.cli("reload")
        assert until(lambda: ada.here.helper()[1]) == f"{ada.held.access.reveal()}\n"
    else:
        assert said == f"{ada.held.access.reveal()}\n"
        assert ada.held.refresh != first.refresh
        assert asked == 1


SIGNING: list[tuple[str, str, str, bool]] = [  # the last: with a daemon, whose worker does it
    (effect, when, WHO[(number + turn) % 3], bool((number + turn) % 2))
    for number, effect in enumerate(sorted(OF_SIGN_INS))
    for turn, when in enumerate(WHEN)
]


def test_the_effects_of_signing_in_and_out_are_all_here() -> None:
    assert {effect for effect in EFFECTS if effect.startswith("sign")} == OF_SIGN_INS
    assert {effect for effect, *_ in SIGNING} == OF_SIGN_INS


@pytest.mark.parametrize(("effect", "when", "who", "resident_too"), SIGNING)
def test_signing_in_or_out_that_is_cut_off(
    ada: Mortal, effect: str, when: str, who: str, resident_too: bool
) -> None:
    """It is done or it is not; either way it can be done again, and then it is."""
    act = "login" if effect == "sign_in" else "logout"
    if resident_too:
        ada.start()
        until(ada.here.listens)
    if act == "logout":
        ada.arrive()
    ada.plan(effect, when, who)
    assert ada.command(act) != 0
    assert ada.died()
    if resident_too:
        ada.restart()
        until(ada.here.listens)

    file = ada.here.state / "logins" / "corp.json"
    assert file.exists() == ((when == "after") == (act == "login"))
    assert ada.command("logout") == 0
    assert not file.exists()
    assert ada.command("login") == 0
    assert file.exists()
