"""
What a sign-in is about stays between the provider, a worker and a sealed file.

The canaries are all that passes between us and the provider: codes, verifiers, tokens of every
kind, client secrets. A proxy overhears them. The places are what commands print, every file below
HOME, pages, and the command line and environment of every process while it runs.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from tests.canaries import Canaries, Watch
from tests.people import Person, address
from tests.resident import Resident, until
from tests.servers.browser import Browser
from tests.servers.faults import Exchange, Fault, Response, Status
from tests.servers.oidc import Oidc

SECRET = (
    *("code", "code_verifier", "device_code", "client_secret"),
    *("access_token", "refresh_token", "id_token", "token", "registration_access_token"),
)


LINES = (
    *("whoami --json", "status", "status --json", "config show", "rotate --json", "audit"),
    *("get", "login --json", "source test work"),
)


@dataclass(frozen=True, slots=True)
class Overhear(Fault):
    """Pass everything on, and know its secrets before the client has them."""

    canaries: Canaries
    heard: set[str] = field(default_factory=set)

    def __call__(self, exchange: Exchange) -> bool:
        self._know(dict(parse_qsl(exchange.request.body.decode("utf-8", "replace"))))
        response = exchange.commit()
        self._know(said(response))
        exchange.client.sendall(response.raw)
        return response.keeps_alive

    def _know(self, values: Mapping[str, Any]) -> None:
        for name in SECRET:
            value = values.get(name)
            if isinstance(value, str) and len(value) > 20:
                self.canaries.know(name, value)
                self.heard.add(name)


def said(response: Response) -> dict[str, Any]:
    """Return what an answer has in its JSON, and in the address that it redirects to."""
    where = re.search(rb"(?i)\r\nlocation: (\S+)", response.head)
    found = dict(parse_qsl(urlsplit(where[1].decode()).query)) if where else {}
    try:
        body = json.loads(response.payload)
    except ValueError:
        return found
    return {**found, **body} if isinstance(body, dict) else found


class Careful(Person):
    """Somebody who looks for secrets in all that they are shown."""

    canaries: Canaries
    watch: Watch

    def cli(self, *arguments: str) -> tuple[int, str, str]:
        """Run a command; `get` may print a key."""
        status, out, told = super().cli(*arguments)
        self.look(told)
        if arguments[0] != "get":
            self.look(out)
        return status, out, told

    def look(self, text: str) -> None:
        """See that a text has no secret."""
        assert self.canaries.seen_in(text) == []

    def check(self) -> None:
        """See that no file and no process has shown one."""
        assert self.canaries.below(self.here.home.path) == []
        for one in self.watch.seen.values():
            assert self.canaries.seen_in(one.command) == []
            assert self.canaries.seen_in(one.environment or b"") == []


@pytest.fixture
def heard(oidc: Oidc) -> Iterator[Overhear]:
    overhear = Overhear(Canaries())
    oidc.front.next(overhear, times=None)
    yield overhear
    oidc.front.clear()


@pytest.fixture
def ada(resident: Resident, oidc: Oidc, heard: Overhear) -> Iterator[Careful]:
    one = Careful(resident, oidc, oidc.register(public=True, access_seconds=3600).id)
    one.canaries = heard.canaries
    with Watch() as one.watch:
        yield one


def test_what_is_overheard_is_found(ada: Careful, heard: Overhear) -> None:
    """The detector knows each kind of secret, and finds one in a file and a command line."""
    tokens = ada.arrive()
    assert heard.heard >= {"code", "code_verifier", "access_token", "refresh_token", "id_token"}
    with pytest.raises(AssertionError):
        ada.look(f"x{tokens.access.reveal()}x")
    leak = ada.here.home.path / "leak"
    leak.write_text(tokens.access.reveal()[3:])
    assert ada.canaries.below(ada.here.home.path) == ["access_token in leak"]
    leak.unlink()
    ada.check()
    subprocess.run(["sh", "-c", "sleep 0.5", tokens.access.reveal()], check=True)
    with pytest.raises(AssertionError):
        ada.check()


def test_a_day_of_a_person_shows_nothing(ada: Careful, heard: Overhear) -> None:
    """Signing in by each way, keys, renewals, a rotation, and signing out."""
    assert ada.cli("login")[0] == 0
    assert ada.cli("get", "--no-start")[0] == 0
    ada.here.start()
    until(lambda: ada.here.helper()[1])
    for line in LINES:
        ada.cli(*line.split())
    ada.keep(ada.held, 3600)
    ada.cli("reload")
    until(lambda: ada.here.helper()[1])

    with ada.typing("login", "--device") as process:
        url = address(process)
        assert process.stderr is not None
        code = process.stderr.readline().split("user_code=")[1].strip()
        ada.look(Browser("bob", code=code).open(url).text)
        for text in process.communicate(timeout=20):
            ada.look(text)
        assert process.returncode == 0

    with ada.typing("login", "--no-browser", stdin=subprocess.PIPE) as process:
        browser = Browser("bob")
        page = browser.open(address(process))
        assert "You are signed in to" in page.text
        ada.look(page.text + page.url)  # what remains in the browser's address
        for text in process.communicate(timeout=20):
            ada.look(text)
        assert process.returncode == 0
    assert heard.heard >= {*SECRET} - {"client_secret", "registration_access_token", "token"}

    assert ada.cli("logout", "--json")[0] == 0
    assert "token" in heard.heard
    ada.look(ada.here.said())
    ada.check()


def test_a_client_s_secret_goes_to_the_provider_alone(ada: Careful, oidc: Oidc) -> None:
    """It is where its reference says, and with the worker that sends it."""
    known = oidc.register(application_type="native")
    file = ada.here.home.path / "client-secret"
    file.touch(0o600)
    file.write_text(known.secret)
    ada.canaries.know("client", known.secret)
    ada.client = known.id
    ada.configure(client_secret=f'{{ file = "{file}" }}')
    assert ada.cli("login")[0] == 0
    assert ada.cli("config", "show")[0] == 0
    assert ada.cli("logout")[0] == 0
    file.unlink()
    ada.check()


@pytest.mark.parametrize("status", [400, 500])
def test_a_provider_that_repeats_secrets_is_not_repeated(
    ada: Careful, oidc: Oidc, status: int
) -> None:
    """Neither on the page, nor in a message, a log or the journal."""
    ada.arrive()
    told = ada.canaries.new("told")
    body = {"error": told, "error_description": f"the token {told} is not known", "hint": told}
    oidc.front.clear()
    oidc.front.next(
        Status(status, {"content-type": "application/json"}, json.dumps(body).encode()),
        path="/token",
        times=None,
    )
    ada.keep(ada.held, 3600)
    assert ada.cli("get", "--no-start")[0] in (75, 77)
    ada.here.start()
    until(lambda: ada.here.helper()[2])
    ada.look(ada.here.helper()[2])
    ada.cli("status")
    ada.cli("status", "--json")
    with ada.typing("login", "--no-browser", stdin=subprocess.PIPE) as process:
        page = Browser().open(address(process))
        assert "Not signed in" in page.text
        ada.look(page.text + page.url)
        for text in process.communicate(timeout=20):
            ada.look(text)
        assert process.returncode in (75, 77)
    ada.cli("logout")
    ada.check()
