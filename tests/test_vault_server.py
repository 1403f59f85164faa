"""One Vault: what each of its answers means, and where a token is never sent."""

from __future__ import annotations

import gc
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from keybroker.credential import Secret
from keybroker.errors import ConfigError, SourceError, SourceInvalid, SourceUnavailable
from keybroker.sources.http import Reply
from keybroker.sources.vault.server import Server
from tests.scripted import CANARY, TOKEN, Answer, Script, fails, refused, table
from tests.servers.faults import refused_url
from tests.test_http import Authority, dribble, head_of, nowhere, raw
from tests.test_http import authority as authority
from tests.test_http import no_variables as no_variables

PATH = "secret/data/llm/key"
GOOD = Answer(200, {"request_id": "r", "data": {"key": f"sk-{CANARY}"}})
PAGE = "<html><title>log in</title></html>"


@pytest.fixture
def script() -> Iterator[Script]:
    with Script() as script:
        yield script


@contextmanager
def opened(address: str, seconds: float = 4.0, **more: Any) -> Iterator[Server]:
    """A server that is closed at the end."""
    server = Server(table(address, **more), seconds)
    try:
        yield server
    finally:
        server.close()


def read(server: Server, makes: bool = False) -> Reply:
    """Ask for the path of these tests, with a token."""
    call = (lambda c: c.write_data(PATH, data={})) if makes else (lambda c: c.read(PATH))
    return server.ask(call, Secret(TOKEN), makes=makes)


def failed(address: str, kind: type[SourceError], **more: Any) -> SourceError:
    """Return the error of reading there."""
    with opened(address, **more) as server:
        error = fails(kind, lambda: read(server))
    assert isinstance(error, SourceError)
    assert error.message.startswith("vault: ")
    assert not error.unknown, "reading makes nothing"
    return error


# What is sent.


def test_a_call_has_the_token_the_namespace_and_vaults_own_header(script: Script) -> None:
    """All that hvac would send, and no more."""
    script.says(PATH, GOOD)
    with opened(script.url, namespace="team-a") as server:
        assert read(server).value["data"] == GOOD.body["data"]
    [asked] = script.asked
    assert (asked.method, asked.path) == ("GET", f"/v1/{PATH}")
    assert asked.headers["x-vault-token"] == TOKEN
    assert asked.headers["x-vault-namespace"] == "team-a"
    assert asked.headers["x-vault-request"] == "true"
    assert asked.headers["user-agent"].startswith("keybroker/")


def test_no_token_is_taken_from_the_environment(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither VAULT_TOKEN nor ~/.vault-token, which hvac reads unasked."""
    monkeypatch.setenv("VAULT_TOKEN", TOKEN)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".vault-token").write_text(TOKEN)
    script.says(PATH, GOOD)
    with opened(script.url) as server:
        server.ask(lambda client: client.read(PATH))
    assert [one.token for one in script.asked] == [None]


def test_a_token_is_for_one_call(script: Script) -> None:
    """The next call without one has none."""
    script.says(PATH, GOOD)
    with opened(script.url) as server:
        read(server)
        server.ask(lambda client: client.read(PATH))
    assert [one.token for one in script.asked] == [TOKEN, None]


def test_what_is_empty_is_not_sent(script: Script) -> None:
    """A login without a role leaves the choice to the server."""
    script.says("auth/jwt/login", GOOD)
    with opened(script.url) as server:
        server.ask(lambda c: c.auth.jwt.jwt_login(None, "j", use_token=False, path="jwt"))
    assert script.asked[0].body == {"jwt": "j"}


# What a status means.

# By name: the answer, the words, a part of the hint, and what may have been made by a call that
# makes something: (unknown, over).
ROWS: dict[str, tuple[Answer, str, str | None, tuple[bool, bool]]] = {
    "sealed": (refused(503, "Vault is sealed"), "is sealed", "unseal it", (False, False)),
    "not initialised": (refused(501), "is not initialised (501)", "by itself", (False, False)),
    "behind": (
        refused(412, "required index state not present"),
        "has not caught up with its leader (412)",
        None,
        (False, False),
    ),
    "disaster recovery": (
        refused(472, "x"),
        "is a standby for disaster recovery (472)",
        "nodes",
        (False, False),
    ),
    "performance standby": (
        refused(473, "x"),
        "is a standby that answers nothing (473)",
        "nodes",
        (False, False),
    ),
    "upgrading": (
        refused(
            400,
            "Upgrading from non-versioned to versioned data. This backend will be unavailable "
            "for a brief period and will resume service shortly.",
        ),
        "is upgrading what is mounted there",
        None,
        (False, False),
    ),
    "no leader": (
        refused(500, "local node not active but active cluster node not found"),
        "has no leader (500)",
        None,
        (False, False),
    ),
    "500": (refused(500, "internal error"), "failed (500)", None, (True, True)),
    "503": (refused(503, "x"), "failed (503)", None, (True, True)),
    "502 of a proxy": (Answer(502, PAGE), "failed (502)", None, (True, False)),
    "504 of a proxy": (Answer(504, PAGE), "failed (504)", None, (True, False)),
    "501 of a proxy": (Answer(501, PAGE), "failed (501)", None, (True, False)),
    "captive portal": (
        Answer(200, PAGE),
        "answers 200, but not as Vault does",
        "login page",
        (True, False),
    ),
    "JSON of another": (
        Answer(200, {"status": "ok"}),
        "answers 200, but not as Vault does",
        "login page",
        (True, False),
    ),
    "a list": (Answer(200, []), "answers 200, but not as Vault does", None, (True, False)),
    "403 of a proxy": (
        Answer(403, PAGE),
        "answers 403, but not as Vault does",
        "address of a Vault",
        (False, False),
    ),
    "404 of a web server": (
        Answer(404, PAGE),
        "answers 404, but not as Vault does",
        "address of a Vault",
        (False, False),
    ),
    "TLS port": (
        Answer(400, "Client sent an HTTP request to an HTTPS server.\n"),
        "answers 400, but not as Vault does",
        "https://",
        (False, False),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_an_answer_that_may_be_another_next_time_is_unavailable(script: Script, name: str) -> None:
    """In words of ours, with what to do about it."""
    answer, words, hint, _ = ROWS[name]
    script.says(PATH, answer)
    error = failed(script.url, SourceUnavailable)
    assert error.message == f"vault: 127.0.0.1:{script.port}: {words}"
    assert (hint or "") in (error.hint or "")


@pytest.mark.parametrize("name", ROWS)
def test_a_call_that_makes_something_says_whether_it_may_have(script: Script, name: str) -> None:
    """Vault's own error says that the call is over; a proxy's does not."""
    answer, _, _, expected = ROWS[name]
    script.says(PATH, answer)
    with opened(script.url) as server:
        error = fails(SourceUnavailable, lambda: read(server, makes=True))
    assert isinstance(error, SourceError)
    assert (error.unknown, error.over) == expected
    assert len(script.asked) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({}, 5), ({"Retry-After": "0"}, 5), ({"Retry-After": "7"}, 7), ({"Retry-After": "x"}, 5)],
)
def test_a_quota_says_how_long_to_wait(
    script: Script, headers: dict[str, str], seconds: int
) -> None:
    """By Retry-After, which hvac drops; without one, or with 0, a while."""
    answer = Answer(429, {"errors": ["request path: rate limit quota exceeded"]}, headers)
    script.says(PATH, answer)
    error = failed(script.url, SourceUnavailable)
    assert error.message.endswith("asks to wait (429)")
    assert error.retry_after is not None
    assert error.retry_after.total_seconds() == seconds


@pytest.mark.parametrize("status", [400, 403, 404, 405])
def test_what_is_vaults_own_refusal_is_the_callers_to_read(script: Script, status: int) -> None:
    """Only the caller knows what it asked for."""
    script.says(PATH, refused(status, "no"))
    with opened(script.url) as server:
        assert read(server).status == status


@pytest.mark.parametrize(
    "text", ["past the max TTL, cannot renew", 'failed to find entry for connection with name: "x"']
)
def test_a_500_that_is_final_is_the_callers_too(script: Script, text: str) -> None:
    """It would stay one for ever."""
    script.says(PATH, refused(500, f"1 error occurred:\n\t* {text}\n\n"))
    with opened(script.url) as server:
        assert read(server).status == 500


# Redirects.


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_elsewhere_is_not_followed(script: Script, status: int) -> None:
    """The token goes to nobody who is not configured, whatever the server says."""
    with Script() as thief:
        script.says(PATH, Answer(status, "", {"Location": f"{thief.url}/v1/{PATH}?k={CANARY}"}))
        error = failed(script.url, SourceInvalid)
        assert thief.asked == []
    assert f"redirects to an address that is not configured ({status})" in error.message
    assert "nodes" in str(error.hint)


@pytest.mark.parametrize(
    ("status", "makes", "followed"),
    [
        *[(307, True, True), (308, True, True), (307, False, True), (308, False, True)],
        *[(301, False, True), (302, False, True), (303, False, False)],
        *[(301, True, False), (302, True, False), (303, True, False)],
    ],
)
def test_a_redirect_to_a_node_is_followed(
    script: Script, status: int, makes: bool, followed: bool
) -> None:
    """With its method and its body, or not at all."""
    with Script() as leader:
        leader.says(PATH, GOOD)
        script.says(PATH, Answer(status, "", {"Location": f"{leader.url}/v1/{PATH}"}))
        with opened(script.url, nodes=[leader.url]) as server:
            if not followed:
                fails(SourceInvalid, lambda: read(server, makes))
                assert leader.asked == []
                return
            read(server, makes)
            read(server, makes)
        assert [(a.method, a.token) for a in leader.asked] == [
            ("POST" if makes else "GET", TOKEN)
        ] * 2
        assert len(script.asked) == 1, "the next call goes to who answered"


@pytest.mark.parametrize(
    "location",
    [
        *["", "http://[", "http://127.0.0.1:99999999/", "/v1/elsewhere", "//thief.example.com/"],
        *["https://127.0.0.1:{port}/", "http://x@localhost:{port}/", "http://127.0.0.1:1{port}/"],
    ],
)
def test_what_is_nearly_the_same_address_is_another(script: Script, location: str) -> None:
    """Another scheme, host or port, or no address at all."""
    at = location.format(port=script.port)
    script.says(PATH, Answer(307, "", {"Location": at}))
    failed(script.url, SourceInvalid)
    assert len(script.asked) == 1


def test_a_port_that_is_the_usual_one_may_be_named(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """https://host and https://host:443 are one server."""
    monkeypatch.setenv("HTTP_PROXY", script.url)
    location = {"Location": f"http://V.example.com:80/v1/{PATH}"}
    script.says(PATH, Answer(307, "", location), GOOD)
    with opened("http://v.example.com") as server:
        assert read(server).status == 200


@pytest.mark.parametrize("makes", [True, False])
def test_what_makes_something_is_not_made_twice(script: Script, makes: bool) -> None:
    """A server that failed may have made it all the same; a read may be tried elsewhere."""
    script.says(PATH, refused(500, "internal error"))
    with Script() as other:
        other.says(PATH, GOOD)
        with opened(script.url, nodes=[other.url]) as server:
            if makes:
                error = fails(SourceUnavailable, lambda: read(server, makes=True))
                assert getattr(error, "unknown", False)
            else:
                assert read(server).status == 200
        assert other.paths() == ([] if makes else [PATH])


def test_nodes_that_send_each_other_are_left(script: Script) -> None:
    """A few hops, and no more."""
    with Script() as other:
        other.says(PATH, Answer(307, "", {"Location": f"{script.url}/v1/{PATH}"}))
        script.says(PATH, Answer(307, "", {"Location": f"{other.url}/v1/{PATH}"}))
        error = failed(script.url, SourceUnavailable, nodes=[other.url])
        assert "redirects without end" in error.message
        assert len(script.asked) + len(other.asked) <= 6


def test_a_leader_that_is_gone_is_said_by_its_own_address(script: Script) -> None:
    """In the first seconds after a fail-over the standby still names it."""
    gone = refused_url()
    script.says(PATH, Answer(307, "", {"Location": f"{gone}/v1/{PATH}"}))
    error = failed(script.url, SourceUnavailable, nodes=[gone])
    assert "could not be reached" in error.message


# Nodes.


@pytest.mark.parametrize("name", ["sealed", "no leader", "not initialised", "behind", "500"])
def test_another_node_is_asked_where_one_cannot_answer(script: Script, name: str) -> None:
    """And stays the first one from then on."""
    script.says(PATH, ROWS[name][0])
    with Script() as other:
        other.says(PATH, GOOD)
        with opened(script.url, nodes=[other.url]) as server:
            read(server)
            read(server)
        assert (len(script.asked), len(other.asked)) == (1, 2)


def test_another_node_is_asked_where_one_is_gone() -> None:
    """What was never sent may be sent elsewhere, whatever it makes."""
    with Script() as other:
        other.says(PATH, GOOD)
        with opened(refused_url(), nodes=[other.url]) as server:
            read(server, makes=True)
        assert len(other.asked) == 1


def test_what_may_have_been_made_is_not_made_again_elsewhere() -> None:
    """An answer that got lost leaves it unknown, and the other node alone."""
    with Script() as other, raw(head_of) as silent:
        other.says(PATH, GOOD)
        with opened(silent.url, nodes=[other.url]) as server:
            error = fails(SourceUnavailable, lambda: read(server, makes=True))
            assert isinstance(error, SourceError)
            assert error.unknown
            assert other.asked == []
            read(server)
        assert len(other.asked) == 1


def test_a_silent_node_leaves_time_for_the_next() -> None:
    """All of them together take no longer than one call."""
    with (
        Script() as other,
        raw(lambda client: head_of(client) and client.recv(1)) as silent,
    ):
        other.says(PATH, GOOD)
        began = time.monotonic()
        with opened(silent.url, seconds=4.0, nodes=[other.url]) as server:
            read(server)
        assert time.monotonic() - began < 3.5


def test_calls_share_a_deadline_until_the_next_begins() -> None:
    """A login and what follows it take no longer than one call."""
    with (
        raw(lambda client: head_of(client) and client.recv(1)) as silent,
        opened(silent.url, seconds=0.4) as server,
    ):
        server.begin()
        began = time.monotonic()
        for _ in range(4):
            fails(SourceUnavailable, lambda: read(server))
        assert time.monotonic() - began < 1.5


# The wire.


def test_who_is_not_there_is_said() -> None:
    """A refused connection."""
    assert failed(refused_url(), SourceUnavailable).message.endswith(": could not be reached")


def test_a_name_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS."""
    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    error = failed("https://v.example.com:8200", SourceUnavailable)
    assert error.message == "vault: v.example.com:8200: cannot be found by its name"


BROKEN = {
    "hangs up": b"",
    "truncated": b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{",
    "another protocol": b"220 mail ESMTP\r\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_half_an_answer_is_none(name: str) -> None:
    """Whether it made something is not known."""

    def serve(client: socket.socket) -> None:
        head_of(client)
        client.sendall(BROKEN[name])

    with raw(serve) as server:
        assert "broke off" in failed(server.url, SourceUnavailable).message
        with opened(server.url) as one:
            error = fails(SourceUnavailable, lambda: read(one, makes=True))
    assert isinstance(error, SourceError)
    assert error.unknown


def test_a_reset_is_said() -> None:
    """RST instead of an answer."""

    def serve(client: socket.socket) -> None:
        head_of(client)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with raw(serve) as server:
        assert "ended the connection" in failed(server.url, SourceUnavailable).message


def test_a_trickle_ends_at_the_deadline() -> None:
    """Each byte is in time, the whole is not: a time-out a read would wait for ever."""
    with dribble(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n") as server:
        began = time.monotonic()
        error = failed(server.url, SourceUnavailable, seconds=0.4)
        assert time.monotonic() - began < 2
    assert error.message.endswith(": did not answer in time")


@contextmanager
def tls(context: ssl.SSLContext) -> Iterator[str]:
    """A Vault behind TLS, that answers one request a connection."""
    body = b'{"request_id":"r","data":{"key":"x"}}'

    def serve(client: socket.socket) -> None:
        with context.wrap_socket(client, server_side=True) as inside:
            head_of(inside)
            inside.sendall(
                b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            )
            inside.sendall(body)

    with raw(serve) as server:
        yield f"https://localhost:{server.port}"


def test_a_private_authority_is_named_by_ca(authority: Authority) -> None:
    """Without it nothing is sent, and the hint names the key."""
    with tls(authority.server) as url:
        with opened(url, ca=str(authority.pem)) as server:
            assert read(server).status == 200
        error = failed(url, SourceUnavailable)
    assert "certificate" in error.message
    assert "ca = " in str(error.hint)


def test_https_to_a_plain_port_is_said(script: Script) -> None:
    """With what is wrong in the address."""
    error = failed(script.url.replace("http://", "https://"), SourceUnavailable)
    assert "speaks no TLS" in error.message


def test_a_client_certificate_is_shown(
    authority: Authority,
    tmp_path: Path,
) -> None:
    """A server that wants one takes ours, and says what is missing without."""
    strict = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    strict.load_cert_chain(authority.pem.with_name("chain.pem"))
    strict.load_verify_locations(authority.pem)
    strict.verify_mode = ssl.CERT_REQUIRED
    chain = authority.pem.with_name("chain.pem")
    mine = {"client_cert": str(chain), "client_key": str(chain)}
    with tls(strict) as url:
        with opened(url, ca=str(authority.pem), **mine) as server:
            assert read(server).status == 200
        error = failed(url, SourceUnavailable, ca=str(authority.pem))
        assert "wants a certificate of ours" in error.message
    broken = tmp_path / "broken.pem"
    broken.write_text("none")
    with opened(url, client_cert=str(broken), client_key=str(broken)) as server:
        wrong = fails(ConfigError, lambda: read(server))
    assert str(broken) in wrong.message


# Sockets.


@contextmanager
def listening(path: Path, script: Script) -> Iterator[None]:
    """Pass a Unix socket on to a script, as an agent does."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client, socket.create_connection(("127.0.0.1", script.port)) as behind:
                        behind.sendall(head_of(client).replace(b"keep-alive", b"close"))
                        while piece := behind.recv(65536):
                            client.sendall(piece)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_an_agents_socket_is_an_address(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No proxy leads there, whatever the environment says."""
    monkeypatch.setenv("ALL_PROXY", refused_url())
    script.says(PATH, Answer(200, GOOD.body, {"connection": "close"}))
    path = tmp_path / "agent.sock"
    with listening(path, script), opened(f"unix:{path}") as server:
        assert read(server).status == 200
    assert script.asked[0].headers["host"] == "localhost"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_socket_that_is_not_there_is_said(tmp_path: Path) -> None:
    """By its path. (httpcore leaves the socket of its vain attempt to be collected.)"""
    error = failed(f"unix:{tmp_path}/none.sock", SourceUnavailable)
    gc.collect()
    assert error.message == f"vault: unix:{tmp_path}/none.sock: could not be reached"
    assert error.hint == "is it running? see address in [vault]"


def test_proxies_are_honoured(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for any other call."""
    script.says(PATH, GOOD)
    monkeypatch.setenv("HTTP_PROXY", script.url)
    with opened("http://v.example.com:8200") as server:
        read(server)
    assert script.asked[0].headers["host"] == "v.example.com:8200"
    assert os.environ["HTTP_PROXY"] == script.url
