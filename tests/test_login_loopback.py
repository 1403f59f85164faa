"""Where the browser comes back to, and the page that it then shows."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPResponse

import pytest

from keybroker.credential import Secret
from keybroker.errors import KeybrokerError, NobodyAnswers, SourceInvalid
from keybroker.login import loopback, page
from keybroker.login.loopback import STRANGER, Loopback, read_answer
from keybroker.login.tokens import Tokens
from keybroker.signin import Standing
from tests.resident import until

NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
STATE = "the-state-that-was-sent"
GOOD = f"/callback?state={STATE}&code=the-code"


def tokens(who: str = "ada@example.com") -> Tokens:
    standing = Standing("corp", "oidc", "mark", who, NOON, NOON)
    return Tokens(standing, Secret("the-token"))


class Redeemer:
    """Gives tokens, or an error; knows what it was given."""

    def __init__(self) -> None:
        self.given: list[Mapping[str, str]] = []
        self.error: Exception | None = None
        self.who = "ada@example.com"
        self.go = threading.Event()
        self.go.set()

    def __call__(self, answer: Mapping[str, str]) -> Tokens:
        self.given.append(answer)
        self.go.wait(10)
        if self.error is not None:
            raise self.error
        return tokens(self.who)


@pytest.fixture
def redeem() -> Redeemer:
    return Redeemer()


@pytest.fixture
def at(redeem: Redeemer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    monkeypatch.setattr(loopback, "SHOWN_SECONDS", 0.2)
    listening = Loopback("corp", "127.0.0.1", 0, "/callback")
    listening.expect(STATE, redeem)
    yield listening
    listening.close()


def ask(at: Loopback, target: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, str]:
    """Send one request; a redirect is not followed."""
    connection = HTTPConnection("127.0.0.1", at.port, timeout=5)
    try:
        connection.request(method, target, headers=headers)
        answer = connection.getresponse()
        return answer, answer.read().decode()
    finally:
        connection.close()


def test_the_answer_is_taken_and_its_code_leaves_the_address(
    at: Loopback, redeem: Redeemer
) -> None:
    """The page that is shown is another one, without a parameter."""
    assert at.address == f"http://127.0.0.1:{at.port}/callback"
    answer, text = ask(at, GOOD)
    assert (answer.status, answer.headers["location"], text) == (303, "/callback/signed-in", "")
    assert redeem.given == [{"state": STATE, "code": "the-code"}]

    answer, text = ask(at, "/callback/signed-in")
    assert answer.status == 200
    assert "You are signed in to <strong>corp</strong> as <strong>ada@example.com</strong>." in text
    found = at.wait(0)
    assert found is not None
    assert found.access == Secret("the-token")


def test_a_state_may_be_in_the_path(at: Loopback, redeem: Redeemer) -> None:
    """For a provider that repeats none; any other is not even an address here."""
    assert ask(at, f"/callback/{STATE[:-1]}?code=c")[0].status == 404
    assert ask(at, f"/callback/{STATE}x?code=c")[0].status == 404
    assert ask(at, f"/callback/{STATE}?code=c&state=another")[0].status == 400
    assert redeem.given == []
    assert ask(at, f"/callback/{STATE}?code=c")[0].headers["location"] == "/callback/signed-in"
    assert redeem.given == [{"state": STATE, "code": "c"}]


def test_an_answer_that_comes_twice_is_redeemed_once(at: Loopback, redeem: Redeemer) -> None:
    """As when the page is loaded again, or a browser looks ahead; at the same time, too."""
    redeem.go.clear()
    asking = [threading.Thread(target=ask, args=(at, GOOD)) for _ in range(4)]
    for one in asking:
        one.start()
    until(lambda: redeem.given)
    redeem.go.set()
    for one in asking:
        one.join()
    assert ask(at, GOOD)[0].status == 303
    assert len(redeem.given) == 1


@pytest.mark.parametrize(
    "target",
    [
        "/callback?state=another&code=c",
        "/callback?code=c",
        "/callback",
        f"/callback?state={STATE}&state={STATE}&code=c",
        "/callback?state=&code=c",
        f"/callback?state={STATE[:-1]}&code=c",
        "/callback?state=%E2%82%AC&code=c",
    ],
)
def test_who_has_not_the_state_is_a_stranger(at: Loopback, redeem: Redeemer, target: str) -> None:
    """They change nothing: the right answer is taken after them."""
    answer, text = ask(at, target)
    assert answer.status == 400
    assert STRANGER in text
    assert at.wait(0) is None
    assert redeem.given == []
    assert ask(at, "/callback/signed-in")[0].status == 404

    ask(at, GOOD)
    assert at.wait(0) is not None


@pytest.mark.parametrize(
    "target", ["/favicon.ico", "/", "/callback/", "/callback/x", "/robots.txt?a=b"]
)
def test_whoever_asks_for_something_else_is_told_nothing(at: Loopback, target: str) -> None:
    answer, text = ask(at, target)
    assert (answer.status, text) == (404, "Not found")
    assert "corp" not in str(answer.headers)
    assert at.wait(0) is None


def test_an_address_that_is_opened_before_the_page_is_a_stranger_s(redeem: Redeemer) -> None:
    """Nobody is expected yet."""
    listening = Loopback("corp", "127.0.0.1", 0, "/callback")
    try:
        assert ask(listening, "/callback?state=&code=c")[0].status == 400
        listening.expect(STATE, redeem)
        assert ask(listening, GOOD)[0].status == 303
    finally:
        listening.close()


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost", "[::1]:PORT", ""]
)
def test_a_name_that_is_not_ours_gets_nothing(at: Loopback, redeem: Redeemer, host: str) -> None:
    """As when a page elsewhere has its own name lead here (DNS rebinding)."""
    answer, text = ask(at, GOOD, Host=host.replace("PORT", str(at.port)))
    assert (answer.status, text) == (404, "Not found")
    assert redeem.given == []

    assert ask(at, GOOD, Host=f"localhost:{at.port}")[0].status == 303


@pytest.mark.parametrize("method", ["POST", "HEAD", "PUT", "OPTIONS", "CONNECT", "X"])
def test_nothing_but_get_is_answered(at: Loopback, redeem: Redeemer, method: str) -> None:
    answer, text = ask(at, GOOD, method)
    assert answer.status == 501
    assert STATE not in text
    assert redeem.given == []


def test_what_is_no_http_harms_nobody(
    at: Loopback, redeem: Redeemer, capfd: pytest.CaptureFixture[str]
) -> None:
    """Who says nothing, half a line, rubbish or too much, or hangs up; nothing is printed."""
    left = [socket.create_connection(("127.0.0.1", at.port), 5) for _ in range(5)]
    left[1].sendall(b"GET /callb")
    left[2].sendall(b"\x16\x03\x01\x02\x00" + bytes(200))
    left[3].sendall(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n")
    left[4].sendall(f"GET {GOOD.replace(STATE, 'x')} HTTP/1.1\r\n".encode())
    left[4].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    left[4].close()
    assert ask(at, GOOD)[0].status == 303
    assert at.wait(0) is not None
    for one in left:
        one.close()
    at.close()
    assert capfd.readouterr() == ("", "")


def test_it_waits_until_the_page_was_seen(at: Loopback) -> None:
    """For a while: else the command would end before the browser has it."""
    began = time.monotonic()
    ask(at, GOOD)
    assert at.wait(0) is not None
    assert time.monotonic() - began >= 0.2

    ask(at, "/callback/signed-in")
    began = time.monotonic()
    assert at.wait(0) is not None
    assert time.monotonic() - began < 0.1


def test_nobody_waits_for_a_page_of_what_was_pasted(at: Loopback) -> None:
    assert not at.take({"state": "another", "code": "c"}, pasted=True)
    assert at.take(read_answer(f" http://127.0.0.1:1{GOOD}\n"), pasted=True)
    began = time.monotonic()
    assert at.wait(0) is not None
    assert time.monotonic() - began < 0.1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("http://127.0.0.1:8400/callback?state=s&code=c%20d", {"state": "s", "code": "c d"}),
        ("  state=s&code=c\n", {"state": "s", "code": "c"}),
        ("?state=s&code=c", {"state": "s", "code": "c"}),
        ("http://127.0.0.1:8400/callback?state=s&code=c#frag", {"state": "s", "code": "c"}),
        ("http://127.0.0.1/callback?code=a&code=b&state=s", {"state": "s"}),
        ("http://127.0.0.1/callback?state=a&state=b", {}),
        ("http://127.0.0.1:8400/callback/s?code=c", {"state": "s", "code": "c"}),
        ("code=c", {"code": "c"}),
        ("the-code-alone", {}),
        ("", {}),
    ],
)
def test_an_address_is_read_as_it_was_pasted(text: str, found: dict[str, str]) -> None:
    assert read_answer(text) == found


def test_a_refusal_is_shown_with_its_reason_and_raised(at: Loopback, redeem: Redeemer) -> None:
    redeem.error = SourceInvalid("login corp: the provider <b>says</b> no", hint="h")
    ask(at, GOOD)
    answer, text = ask(at, "/callback/signed-in")
    assert answer.status == 400
    assert "<p>The provider &lt;b&gt;says&lt;/b&gt; no.</p>" in text
    assert "<code>keybroker login corp</code>" in text
    with pytest.raises(SourceInvalid, match="says</b> no"):
        at.wait(0)


def test_an_error_of_ours_names_its_place_and_no_value(at: Loopback, redeem: Redeemer) -> None:
    redeem.error = ValueError("the-token")
    ask(at, GOOD)
    assert "the-token" not in ask(at, "/callback/signed-in")[1]
    with pytest.raises(KeybrokerError) as raised:
        at.wait(0)
    assert re.fullmatch(
        r"login corp: ValueError at test_login_loopback\.py:\d+", raised.value.message
    )


def test_a_port_that_is_taken_is_said_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(NobodyAnswers) as raised:
            Loopback("corp", "127.0.0.1", port, "/callback")
    assert raised.value.message == (
        f"login corp: cannot listen on 127.0.0.1:{port} (Address already in use)"
    )
    assert raised.value.hint == "end what uses the port, or set another one in the login's table"
    listening = Loopback("corp", "127.0.0.1", port, "/callback")  # free again
    assert listening.port == port
    listening.close()


def test_it_listens_on_loopback_alone(at: Loopback) -> None:
    addresses = {
        found[4][0]
        for found in socket.getaddrinfo(socket.gethostname(), at.port, proto=socket.IPPROTO_TCP)
    } - {"127.0.0.1"}
    for address in ("::1", *addresses):
        family = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
        with socket.socket(family) as one:
            assert one.connect_ex((str(address), at.port)) != 0


@pytest.mark.parametrize(
    ("host", "path", "address", "over"),
    [
        ("localhost", "", "http://localhost:PORT", "/signed-in"),
        ("127.0.0.1", "/", "http://127.0.0.1:PORT/", "/signed-in"),
        ("127.0.0.1", "/signed-in", "http://127.0.0.1:PORT/signed-in", "/signed-in/signed-in"),
    ],
)
def test_the_address_is_exactly_as_it_is_registered(
    redeem: Redeemer, host: str, path: str, address: str, over: str
) -> None:
    listening = Loopback("corp", host, 0, path)
    try:
        listening.expect(STATE, redeem)
        assert listening.address == address.replace("PORT", str(listening.port))
        answer, _ = ask(listening, f"{path or '/'}?state={STATE}&code=c")
        assert (answer.status, answer.headers["location"]) == (303, over)
    finally:
        listening.close()


# The page


def test_the_page_takes_nothing_from_elsewhere_and_keeps_nothing(at: Loopback) -> None:
    """Its headers say so to the browser; a test with a real one sees that it asks nobody."""
    ask(at, GOOD)
    answer, text = ask(at, "/callback/signed-in")
    said = {name.lower(): value for name, value in answer.headers.items()}
    assert said["content-security-policy"] == (
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    assert said["cache-control"] == "no-store"
    assert said["referrer-policy"] == "no-referrer"
    assert said["x-content-type-options"] == "nosniff"
    assert said["content-type"] == "text/html; charset=utf-8"
    assert "python" not in str(said).lower()
    assert re.findall(r"https?:|//|url\(|@import|<script|<link|<img|<iframe", text) == []
    assert "the-code" not in text
    assert STATE not in text
    assert "the-token" not in text


def test_names_are_text_on_the_page() -> None:
    """A provider, or a person's own name, writes nothing into it."""
    text = page.success("corp", "<script>alert(1)</script>")
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_who_has_no_name_is_signed_in_all_the_same() -> None:
    assert "You are signed in to <strong>corp</strong>.</p>" in page.success("corp", "")
