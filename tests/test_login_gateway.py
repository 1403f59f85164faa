"""A gateway's own sign-in: Anthropic's gateway, and what Bifrost does otherwise."""

from __future__ import annotations

import http.client
import json
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from keybroker.errors import KeybrokerError, SourceInvalid, SourceUnavailable
from keybroker.login.provider import Device
from keybroker.signin import file_of
from tests import signing
from tests.resident import Resident, until
from tests.servers.bifrost import DEVICE, LIMIT, PREFIX, Bifrost
from tests.servers.browser import Browser
from tests.servers.claude import NEWEST, run_claude
from tests.servers.claudegateway import ClaudeGateway
from tests.servers.faults import Fault, Faults, Hang, Html, Status, refused_url
from tests.servers.upstream import MODEL
from tests.signing import GatewayContract, problem, provider

MESSAGE = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "ping"}]}
SESSION_SECONDS = 18


@pytest.fixture(scope="module")
def gateway() -> Iterator[ClaudeGateway]:
    """One gateway for the module."""
    with ClaudeGateway(SESSION_SECONDS) as server:
        yield server


@pytest.fixture
def bifrost() -> Iterator[Bifrost]:
    """A stand-in for Bifrost, for one test, in a hurry."""
    with Bifrost(interval=1) as server:
        yield server


class TestClaudeGateway(GatewayContract):
    """The contract at Anthropic's gateway, which says nothing of how a sign-in is ended."""

    told = False

    @pytest.fixture
    def url(self, gateway: ClaudeGateway) -> str:
        self.gateway = gateway
        return gateway.url

    def takes(self, key: str) -> bool:
        return self.gateway.ask("POST", "/v1/messages", key, MESSAGE)[0] == 200


class TestBifrost(GatewayContract):
    """The contract at the stand-in for Bifrost."""

    @pytest.fixture
    def url(self, bifrost: Bifrost) -> str:
        self.port = bifrost.port
        return bifrost.base

    def takes(self, key: str) -> bool:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            headers = {"authorization": f"Bearer {key}"}
            connection.request("POST", "/claude-code/v1/messages", json.dumps(MESSAGE), headers)
            return connection.getresponse().status == 200


def configuration(url: str) -> str:
    """A login at a gateway, and a profile whose key is its session."""
    return f"""
[logins.corp]
type = "gateway"
url = "{url}"
[profiles.work]
base_url = "{url}"
helper_ttl = "2s"
[profiles.work.source]
type = "login"
login = "corp"
"""


# Anthropic's gateway


def test_sessions_of_seconds_and_no_request_fails(
    resident: Resident, gateway: ClaudeGateway
) -> None:
    """
    The daemon's key works whenever it is asked for, over renewals, and for Claude Code.

    Then a refresh token that was used already comes again, as from a backup: the gateway ends the
    sign-in with all that came of it. That is said, and the key that is known serves to its end.
    """
    resident.configure(configuration(gateway.url))
    resident.start()
    done = signing.with_code(resident, Browser("ada"))
    assert done.stdout == "Signed in to corp as ada@example.com. It is renewed by itself.\n"
    sealed = file_of(resident.state, "corp")
    backup = shutil.copy(sealed, resident.home.path / "backup")

    settings = {
        "apiKeyHelper": shlex.join(resident.helper_command()),
        "env": {
            "ANTHROPIC_BASE_URL": gateway.url,
            "CLAUDE_CODE_API_KEY_HELPER_TTL_MS": "2000",
        },
    }
    said = run_claude(NEWEST, resident.home.path, settings, env_extra=resident.environment)
    assert (said.rc, said.stdout) == (0, "pong\n"), said.stderr

    seen: dict[str, None] = {}
    statuses: list[int] = []

    def renewed_twice() -> bool:
        key = resident.key("work")
        seen[key] = None
        statuses.append(gateway.ask("POST", "/v1/messages", key, MESSAGE)[0])
        return len(seen) > 2

    until(renewed_twice, 3 * SESSION_SECONDS, 0.2)
    assert set(statuses) == {200}

    shutil.copy(backup, sealed)
    host = gateway.url.removeprefix("http://")
    ended = f"login corp: {host} has ended the sign-in"
    status, _, stderr = resident.cli("rotate")
    assert (status, ended in stderr) == (77, True)
    last = resident.key("work")
    assert last in seen
    assert gateway.ask("POST", "/v1/messages", last, MESSAGE)[0] == 200
    assert resident.cli("whoami") == (
        77,
        f"corp: ada@example.com; {host} has ended the sign-in\n",
        "keybroker: login corp: nobody is signed in\nhint: run: keybroker login corp\n",
    )

    kept = (backup, sealed, resident.log)
    assert [key for key in seen for file in kept if key in Path(file).read_text()] == []


def test_a_gateway_that_restarts_while_somebody_signs_in(gateway: ClaudeGateway) -> None:
    """It is asked again, less often, and knows the code."""
    with provider(type="gateway", url=gateway.url) as at:
        device = at.device()
        gateway.stop()
        try:
            assert device.poll(device.interval) == 2 * device.interval
        finally:
            gateway.start()
        assert signing.signed_in(device, Browser("ada")).standing.renewable


# what a gateway may answer, at the stand-in for Bifrost


def test_signing_in_and_out(resident: Resident, bifrost: Bifrost) -> None:
    """What was signed in is told to the gateway, and nothing is handed out any more."""
    resident.configure(configuration(bifrost.base))
    resident.start()
    assert signing.with_code(resident, Browser("ada")).status == 0
    key = resident.key("work")
    assert len(bifrost.books.refresh) == 1
    assert resident.cli("logout") == (0, "Signed out of corp.\n", "")
    assert bifrost.books.refresh == set()
    assert not file_of(resident.state, "corp").exists()
    status, stdout, stderr = resident.helper()
    assert (status, stdout) == (77, "")
    assert stderr.endswith("run: keybroker login corp\n")
    assert key not in stderr
    forms = [asked.form for asked in bifrost.asked if asked.form.get("grant_type") == DEVICE]
    assert forms
    assert {"client_id", "scope"} & set(forms[0]) == set()


def test_a_sign_in_that_is_refused(resident: Resident, bifrost: Bifrost) -> None:
    """Whoever presses the other button reads so where they began."""
    resident.configure(configuration(bifrost.base))
    done = signing.with_code(resident, Browser("ada", refuses=bifrost.url))
    assert (done.status, done.stdout) == (77, "")
    assert done.stderr.endswith(
        "keybroker: login corp: the sign-in was refused: about access_denied\n"
        "hint: run: keybroker login corp\n"
    )
    assert not file_of(resident.state, "corp").exists()


def test_a_code_that_ends(bifrost: Bifrost) -> None:
    """Nobody typed it: that is said, in our words."""
    bifrost.code_seconds = 1
    with provider(type="gateway", url=bifrost.base) as at:
        device = at.device()
        assert device.lasts == 1.0
        error = until(lambda: _problem_of(device), 5.0, 0.2)
    assert error.message == (
        "login corp: the sign-in took longer than its code: about expired_token"
    )


def _problem_of(device: Device) -> KeybrokerError | None:
    try:
        device.poll(1.0)
    except KeybrokerError as error:
        return error
    return None


def test_too_many_who_sign_in(bifrost: Bifrost) -> None:
    """A gateway that takes thirty a minute from one network is asked again by a person."""
    bifrost.books.starts = [time.monotonic()] * LIMIT
    with provider(type="gateway", url=bifrost.base) as at:
        error = problem(at.device)
    assert isinstance(error, SourceUnavailable)
    assert error.message.endswith(" asks to wait")
    assert (error.hint, error.retry_after) == ("try again in a minute", timedelta(minutes=1))


def test_a_gateway_that_is_asked_too_often_renews_later(bifrost: Bifrost) -> None:
    """When it says; the sign-in has not ended."""
    with (
        Faults(bifrost.url) as faults,
        provider(type="gateway", url=f"{faults.url}{PREFIX}") as at,
    ):
        tokens = signing.signed_in(at.device(), Browser("ada"))
        slow = Status(429, {"retry-after": "7"}, b'{"error": "slow_down"}')
        faults.next(slow, path=f"{PREFIX}/oauth/token")
        error = problem(lambda: at.refresh(tokens))
        assert isinstance(error, SourceUnavailable)
        assert error.retry_after == timedelta(seconds=7)
        assert at.refresh(tokens).refresh is not None


def test_an_address_without_a_sign_in(bifrost: Bifrost) -> None:
    """A gateway that has it switched off, or another page, is named with what there may be."""
    bifrost.enabled = False
    for url in (bifrost.base, bifrost.url):
        with provider(type="gateway", url=url) as at:
            error = problem(at.device)
        assert isinstance(error, SourceInvalid)
        assert "no sign-in for Claude Code at this address (404)" in error.message
        assert "/claude_code_gateway at LiteLLM" in (error.hint or "")


def test_endpoints_of_another_host_are_not_asked(bifrost: Bifrost) -> None:
    """As Claude Code does it: what leads elsewhere is looked for below the address instead."""
    bifrost.elsewhere = refused_url()
    with provider(type="gateway", url=bifrost.base) as at:
        tokens = signing.signed_in(at.device(), Browser("ada"))
        renewed = at.refresh(tokens)
        assert at.revoke(renewed) is False
        assert at.refresh(renewed).refresh is not None


@pytest.mark.parametrize(
    ("fault", "pace"),
    [
        (Hang(), 2.0),
        (Status(503), 2.0),
        (Html(502), 2.0),
        (Status(429, {}, b'{"error": "slow_down"}'), 6.0),
        (Status(400, {}, b'{"error": "slow_down"}'), 6.0),
    ],
)
def test_how_often_a_gateway_in_trouble_is_asked(
    bifrost: Bifrost, fault: Fault, pace: float
) -> None:
    """One that does not answer half as often, one that says so after five seconds more."""
    with (
        Faults(bifrost.url) as faults,
        provider(type="gateway", url=f"{faults.url}{PREFIX}", timeout="300ms") as at,
    ):
        device = at.device()
        faults.next(fault, path=f"{PREFIX}/oauth/token")
        assert device.poll(1.0) == pace
        assert device.poll(pace) == pace


@pytest.mark.parametrize("renews", [True, False])
def test_a_sign_in_that_has_ended_is_not_asked_for_again(
    resident: Resident, bifrost: Bifrost, renews: bool
) -> None:
    """The last token serves to its end; then the gateway hears no more of us."""
    bifrost.seconds, bifrost.renews = 5, renews
    resident.configure(configuration(bifrost.base))
    resident.start()
    assert signing.with_code(resident, Browser("ada")).status == 0
    assert resident.helper()[0] == 0
    bifrost.books.refresh.clear()
    until(lambda: resident.helper()[0] == 77, 10.0, 0.2)
    before = len([one for one in bifrost.asked if one.path.endswith("/token")])
    for _ in range(3):
        status, stdout, stderr = resident.helper()
        assert (status, stdout) == (77, "")
        assert stderr.endswith(
            "ended the sign-in; run: keybroker login corp\n"
            if renews
            else "the sign-in has ended; run: keybroker login corp\n"
        )
    assert resident.cli("rotate")[0] == 77
    assert len([one for one in bifrost.asked if one.path.endswith("/token")]) == before
