"""Sign in as a person does, at a page, in a browser that is a program; and what gateways share."""

from __future__ import annotations

import re
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from keybroker.document import Where
from keybroker.errors import KeybrokerError, LoginNeeded
from keybroker.login import provider_of
from keybroker.login.provider import Device, Provider, now
from keybroker.login.tokens import Tokens
from keybroker.signin import read_login
from tests.resident import Resident, until
from tests.servers import browser
from tests.servers.browser import Browser, Page

TOLD = re.compile(r"^Open   (\S+)   on any device, and type   (\S+)$", re.M)


class Signed(NamedTuple):
    """How the command ended; `page` is the last that the browser saw, None when it opened none."""

    status: int
    stdout: str
    stderr: str
    page: Page | None = None


def with_code(
    user: Resident, by: Browser, *words: str, meanwhile: Callable[[], None] | None = None
) -> Signed:
    """
    Run `keybroker login --device`, and type the code that it shows where it says so.

    Args:
        meanwhile: What happens before it is typed.
    """
    command = "from keybroker.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "login", "--device", *words],
        env=user.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    page, said = None, ""
    try:
        for line in process.stderr:
            said += line
            if told := TOLD.search(line):
                if meanwhile is not None:
                    meanwhile()
                by.code = told[2]
                page = by.open(told[1])
                break
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return Signed(process.returncode, stdout, said + stderr, page)


def with_browser(user: Resident, name: str, *words: str, refuses: str = "") -> Signed:
    """Run `keybroker login` where a browser opens, which walks the pages as somebody."""
    before = dict(user.environment)
    user.environment["BROWSER"] = browser.command(name, refuses=refuses)
    try:
        return Signed(*user.cli("login", "--browser", *words))
    finally:
        user.environment.clear()
        user.environment.update(before)


@contextmanager
def provider(**table: Any) -> Iterator[Provider]:
    """Open what signs in by a table."""
    opened = provider_of(read_login("corp", table, Where({}, "test")), {})
    try:
        yield opened
    finally:
        opened.close()


def signed_in(device: Device, by: Browser) -> Tokens:
    """Type a code, and ask as often as one may until there is a token for it."""
    by.code = device.code
    assert by.open(device.whole or device.url).status == 200
    pace, asked = device.interval, []

    def token() -> Tokens | None:
        found = device.poll(pace)
        asked.append(found)
        return found if isinstance(found, Tokens) else None

    found = until(token, 2 * device.interval + 10, device.interval / 2)
    assert isinstance(found, Tokens)
    return found


def problem(call: Callable[[], object], *never: str) -> KeybrokerError:
    """Return the error that a call ends with; it shows none of the texts given."""
    with pytest.raises(KeybrokerError) as caught:
        call()
    shown = f"{caught.value!r} {caught.value.message} {caught.value.hint}"
    assert [one for one in never if one in shown] == []
    return caught.value


class GatewayContract(ABC):
    """
    What a login of type `gateway` relies on, at whichever server.

    Attributes:
        slow: What the second of two asks in a row is answered with: seconds to wait from then on.
        told: It knows how a sign-in is ended.
    """

    slow = 10.0
    told = True

    @pytest.fixture
    @abstractmethod
    def url(self) -> str:
        """Where Claude Code is pointed at."""

    @abstractmethod
    def takes(self, key: str) -> bool:
        """Say whether a message is answered with a key."""

    def test_the_life_of_a_session(self, url: str) -> None:
        """A code, a token for it, another for its refresh token, and its end; each once."""
        with provider(type="gateway", url=url) as gateway:
            assert gateway.flows == ("device",)
            device = gateway.device()
            assert device.code not in repr(device).replace(f"code={device.code!r}", "")
            assert (device.poll(5.0), device.poll(5.0)) == (5.0, self.slow)

            typed = now()
            first = signed_in(device, Browser("ada"))

            assert first.standing.renewable
            assert first.standing.access_ends is not None
            assert first.standing.since < typed  # some count from then on
            assert self.takes(first.access.reveal())
            used_up = problem(lambda: device.poll(5.0), first.access.reveal())
            assert used_up.message.startswith("login corp: the sign-in took longer than its code")

            second = gateway.refresh(first)

            assert second.refresh is not None
            assert second.refresh.fingerprint != getattr(first.refresh, "fingerprint", "")
            assert self.takes(second.access.reveal())
            assert second.standing.refreshed_at > first.standing.refreshed_at
            assert second.standing.since == first.standing.since
            ended = problem(lambda: gateway.refresh(first), first.access.reveal())
            assert isinstance(ended, LoginNeeded)
            assert ended.message.endswith(" has ended the sign-in")
            assert ended.hint == "run: keybroker login corp"

            assert gateway.revoke(second) is self.told
            assert gateway.revoke(second) is self.told
            over = problem(lambda: gateway.refresh(second))
            assert isinstance(over, LoginNeeded)
