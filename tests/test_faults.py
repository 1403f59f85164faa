"""Each fault does what its name says, in front of the development gateway."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from keybroker.devgateway import DevGateway
from tests.servers.faults import (
    CommitLate,
    CommitThenDrop,
    DropBeforeCommit,
    Fault,
    Faults,
    GarbageJson,
    Hang,
    Html,
    Huge,
    PassThrough,
    PauseResponse,
    Redirect,
    Reset,
    Status,
    Trickle,
    TrickleBody,
    Truncated,
    fingerprint,
    refused_url,
    too_many,
)

MASTER = "sk-master-of-the-tests"
KEY = "sk-canary-0123456789"
MESSAGE = {"model": "claude-sonnet-4-6", "max_tokens": 9, "messages": []}


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway(MASTER) as gateway:
        yield gateway
    assert gateway.failures == ()


@pytest.fixture
def faults(gateway: DevGateway) -> Iterator[Faults]:
    with Faults(gateway.url, admin=MASTER) as faults:
        yield faults
    assert faults.errors == []


class Client:
    """One connection of a client, with a time limit for each read."""

    def __init__(self, faults: Faults, timeout: float = 5) -> None:
        self.http = http.client.HTTPConnection(faults.url.removeprefix("http://"), timeout=timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def send(self, method: str, path: str, body: object = None, key: str = MASTER) -> None:
        content = None if body is None else json.dumps(body)
        self.http.request(method, path, content, {"Authorization": f"Bearer {key}"})

    def receive(self) -> tuple[int, http.client.HTTPMessage, bytes]:
        response = self.http.getresponse()
        return response.status, response.headers, response.read()


def mint(faults: Faults, timeout: float = 5) -> tuple[int, http.client.HTTPMessage, bytes]:
    with Client(faults, timeout) as client:
        client.send("POST", "/key/generate", {"key": KEY, "key_alias": "kb-1"})
        return client.receive()


def aliases(gateway: DevGateway) -> list[str | None]:
    return [key.alias for key in gateway.live_keys()]


def arm(faults: Faults, fault: Fault, **how: Any) -> Any:
    return faults.next(fault, method="POST", path="/key/generate", **how)


# What is not armed.


def test_what_is_not_armed_passes_through(gateway: DevGateway, faults: Faults) -> None:
    status, headers, body = mint(faults)
    assert (status, json.loads(body)["key"]) == (200, KEY)
    assert headers["server"] == "devgateway"
    assert aliases(gateway) == ["kb-1"]


def test_a_stream_passes_through_event_by_event(faults: Faults) -> None:
    with Client(faults) as client:
        client.send("POST", "/v1/messages", {**MESSAGE, "stream": True})
        status, headers, body = client.receive()
    assert (status, headers["transfer-encoding"]) == (200, "chunked")
    assert body.endswith(b'data: {"type": "message_stop"}\n\n')


def test_a_connection_is_kept_alive(faults: Faults) -> None:
    with Client(faults) as client:
        client.send("HEAD", "/")
        client.receive()
        first = client.http.sock.getsockname()
        client.send("GET", "/health/liveliness")
        assert client.receive()[2] == b'"I\'m alive!"'
        assert client.http.sock.getsockname() == first


def test_a_request_in_absolute_form_goes_to_the_gateway(faults: Faults) -> None:
    with Client(faults) as client:
        client.send("GET", "http://llm.example.com/health/liveliness?x=1")
        assert client.receive()[0] == 200
    assert faults.log[0].path == "/health/liveliness"


def test_a_request_with_chunks_passes_through(faults: Faults) -> None:
    with Client(faults) as client:
        headers = {"Authorization": f"Bearer {MASTER}"}
        client.http.request("POST", "/key/generate", iter([b"{", b"}"]), headers)
        assert client.receive()[0] == 411  # the gateway wants a length, and it was asked


def test_a_path_of_the_gateway_is_kept(gateway: DevGateway) -> None:
    with Faults(f"{gateway.url}/llm/") as faults:
        assert faults.url.endswith("/llm")


def test_a_gateway_that_is_down_is_a_dropped_connection() -> None:
    with Faults(refused_url()) as faults, pytest.raises(http.client.RemoteDisconnected):
        mint(faults)
    assert [entry.forwarded for entry in faults.log] == [False]
    assert faults.errors == []


def test_nobody_listens_on_a_refused_url() -> None:
    host, _, port = refused_url().removeprefix("http://").partition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


# Arming.


def test_a_fault_happens_as_often_as_it_was_armed_for(faults: Faults) -> None:
    arm(faults, Html(404), times=2)
    assert [mint(faults)[0] for _ in range(3)] == [404, 404, 200]


def test_a_fault_waits_for_its_method_and_path(faults: Faults) -> None:
    faults.next(Html(404), method="POST", path="/key/*")
    with Client(faults) as client:
        client.send("GET", "/key/list")
        assert client.receive()[0] == 200
        client.send("POST", "/v1/messages", MESSAGE)
        assert client.receive()[0] == 200
        client.send("POST", "/key/generate", {})
        assert client.receive()[0] == 404


def test_the_oldest_fault_goes_first(faults: Faults) -> None:
    arm(faults, Html(404))
    arm(faults, Html(200))
    assert [mint(faults)[0] for _ in range(2)] == [404, 200]


def test_clear_disarms(faults: Faults) -> None:
    arm(faults, Html(404), times=None)
    assert [mint(faults)[0] for _ in range(2)] == [404, 404]
    faults.clear()
    assert mint(faults)[0] == 200


def test_hooks_are_called_before_and_after(gateway: DevGateway, faults: Faults) -> None:
    seen: list[tuple[str, list[str | None]]] = []
    armed = arm(
        faults,
        PassThrough(),
        before=lambda entry: seen.append((f"before {entry.path}", aliases(gateway))),
        after=lambda entry: seen.append((f"after {entry.forwarded}", aliases(gateway))),
    )
    mint(faults)
    assert armed.wait() is faults.log[0]
    assert seen == [("before /key/generate", []), ("after True", ["kb-1"])]


def test_waiting_for_a_fault_that_does_not_happen_ends(faults: Faults) -> None:
    with pytest.raises(TimeoutError, match="no Html"):
        arm(faults, Html()).wait(timeout=0.01)


# The log.


def test_the_log_has_every_request_with_fingerprints(faults: Faults) -> None:
    arm(faults, Html(404))
    mint(faults)
    with Client(faults) as client:
        client.send("GET", f"/key/info?key={KEY}", key=KEY)
        client.receive()
    first, second = faults.log
    assert (first.method, first.path, first.fault) == ("POST", "/key/generate", "Html")
    assert (second.method, second.path, second.fault) == ("GET", "/key/info", None)
    assert (first.forwarded, second.forwarded) == (False, True)
    assert first.headers["authorization"] == f"Bearer {fingerprint(MASTER)}"
    assert second.headers["authorization"] == f"Bearer {fingerprint(KEY)}"
    assert (first.admin_seen, second.admin_seen) == (True, False)
    assert KEY not in repr(faults.log)
    assert MASTER not in repr(faults.log)


def test_the_admin_credential_is_seen_in_a_body_too(faults: Faults) -> None:
    with Client(faults) as client:
        client.send("POST", "/v1/messages", {"note": MASTER}, key=KEY)
        client.receive()
    assert faults.log[0].admin_seen


# The faults.


@pytest.mark.parametrize(
    ("fault", "committed"), [(CommitThenDrop(), True), (DropBeforeCommit(), False)]
)
def test_a_dropped_connection_has_no_byte(
    gateway: DevGateway, faults: Faults, fault: Fault, committed: bool
) -> None:
    arm(faults, fault)
    with pytest.raises(http.client.RemoteDisconnected):
        mint(faults)
    assert aliases(gateway) == (["kb-1"] if committed else [])
    assert faults.log[0].forwarded is committed


def test_a_late_commit_happens_after_the_client_has_gone(
    gateway: DevGateway, faults: Faults
) -> None:
    arm(faults, CommitLate())
    with pytest.raises(TimeoutError):
        mint(faults, timeout=0.05)
    faults.wait_for(lambda log: len(log) == 1)
    assert [entry.path for entry in faults.pending_late] == ["/key/generate"]
    assert aliases(gateway) == []
    faults.commit_late()
    assert faults.pending_late == ()
    assert aliases(gateway) == ["kb-1"]
    assert faults.log[0].forwarded


def test_a_late_commit_can_have_a_time(gateway: DevGateway, faults: Faults) -> None:
    armed = arm(faults, CommitLate(0.05))
    with pytest.raises(TimeoutError):
        mint(faults, timeout=0.02)
    faults.wait_late()
    assert armed.wait().forwarded
    assert aliases(gateway) == ["kb-1"]


def test_a_late_commit_is_abandoned_when_the_proxy_is_closed(gateway: DevGateway) -> None:
    with Faults(gateway.url) as faults:
        arm(faults, CommitLate())
        with pytest.raises(TimeoutError):
            mint(faults, timeout=0.02)
        faults.wait_for(lambda log: len(log) == 1)
    assert aliases(gateway) == []


def test_waiting_for_a_late_commit_that_nobody_asks_for_ends(faults: Faults) -> None:
    arm(faults, CommitLate())
    with pytest.raises(TimeoutError, match="still pending"):
        faults.wait_late(timeout=0.01)
    with pytest.raises(TimeoutError, match="no request"):
        faults.commit_late(timeout=0.01)


@pytest.mark.parametrize("commit", [False, True])
def test_a_reset_is_a_reset(gateway: DevGateway, faults: Faults, commit: bool) -> None:
    arm(faults, Reset(commit))
    with pytest.raises(ConnectionResetError):
        mint(faults)
    assert aliases(gateway) == (["kb-1"] if commit else [])


@pytest.mark.parametrize("commit", [False, True])
def test_a_hang_ends_when_the_client_gives_up(
    gateway: DevGateway, faults: Faults, commit: bool
) -> None:
    armed = arm(faults, Hang(commit))
    with pytest.raises(TimeoutError):
        mint(faults, timeout=0.1)
    assert armed.wait().forwarded is commit
    assert aliases(gateway) == (["kb-1"] if commit else [])


def test_a_trickled_head_comes_in_pieces(faults: Faults) -> None:
    faults.next(Trickle(0.001), path="/health/liveliness")
    with socket.create_connection(("127.0.0.1", port_of(faults)), timeout=5) as client:
        client.sendall(b"GET /health/liveliness HTTP/1.1\r\n\r\n")
        pieces = read_until(client, b'alive!"')
    assert len(pieces) > 10
    assert b"".join(pieces).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_trickled_body_comes_in_pieces_after_a_whole_head(faults: Faults) -> None:
    faults.next(TrickleBody(0.01), path="/health/liveliness")
    with socket.create_connection(("127.0.0.1", port_of(faults)), timeout=5) as client:
        client.sendall(b"GET /health/liveliness HTTP/1.1\r\n\r\n")
        pieces = read_until(client, b'alive!"')
    assert len(pieces) > 2
    assert b"\r\n\r\n" in pieces[0]


def test_a_trickle_ends_when_the_proxy_is_closed(gateway: DevGateway) -> None:
    with Faults(gateway.url) as faults:
        faults.next(Trickle(60), path="/health/liveliness")
        with Client(faults) as client:
            client.send("GET", "/health/liveliness")
            faults.wait_for(lambda log: len(log) == 1 and log[0].forwarded)
            faults.close()
            with pytest.raises((http.client.HTTPException, ConnectionError)):
                client.receive()


def test_a_truncated_answer_promises_more_than_it_holds(
    gateway: DevGateway, faults: Faults
) -> None:
    arm(faults, Truncated())
    with pytest.raises(http.client.IncompleteRead) as caught:
        mint(faults)
    assert caught.value.partial.startswith(b'{"')
    assert caught.value.expected is not None
    assert caught.value.expected > 0
    assert aliases(gateway) == ["kb-1"]


@pytest.mark.parametrize("status", [200, 404, 500, 502, 503])
def test_a_page_for_people_is_html(gateway: DevGateway, faults: Faults, status: int) -> None:
    arm(faults, Html(status))
    answer, headers, body = mint(faults)
    assert (answer, headers["content-type"]) == (status, "text/html; charset=utf-8")
    assert body.startswith(b"<!doctype html>")
    assert aliases(gateway) == []


def test_garbage_calls_itself_json(faults: Faults) -> None:
    arm(faults, GarbageJson())
    status, headers, body = mint(faults)
    assert (status, headers["content-type"]) == (200, "application/json")
    with pytest.raises(ValueError, match="Unterminated string"):
        json.loads(body)


@pytest.mark.parametrize("fault", [Html(502, True), GarbageJson(True), Status(500, commit=True)])
def test_a_useless_answer_can_come_after_the_commit(
    gateway: DevGateway, faults: Faults, fault: Fault
) -> None:
    arm(faults, fault)
    mint(faults)
    assert aliases(gateway) == ["kb-1"]


def test_any_status_can_be_answered(faults: Faults) -> None:
    arm(faults, Status(418, {"x-mood": "tea"}, b"short and stout"))
    status, headers, body = mint(faults)
    assert (status, headers["x-mood"], body) == (418, "tea", b"short and stout")


@pytest.mark.parametrize(
    ("when", "header"),
    [
        (7, "7"),
        (datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC), "Sat, 21 Nov 2026 12:00:00 GMT"),
        (None, None),
    ],
)
def test_too_many_says_when_to_come_back(
    faults: Faults, when: int | datetime | None, header: str | None
) -> None:
    arm(faults, too_many(when))
    status, headers, body = mint(faults)
    assert (status, headers["retry-after"]) == (429, header)
    assert json.loads(body)["error"]["code"] == "429"


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_shows_whether_the_credential_follows(
    gateway: DevGateway, faults: Faults, status: int
) -> None:
    with Faults(gateway.url, admin=MASTER) as elsewhere:
        arm(faults, Redirect(f"{elsewhere.url}/key/generate", status))
        answer, headers, _ = mint(faults)
        assert (answer, headers["location"]) == (status, f"{elsewhere.url}/key/generate")
        mint(elsewhere)  # as a client would that follows with everything it has
        assert [entry.admin_seen for entry in elsewhere.log] == [True]


def test_a_huge_answer_goes_on_for_as_long_as_it_is_read(faults: Faults) -> None:
    armed = arm(faults, Huge())
    with Client(faults) as client:
        client.send("POST", "/key/generate", {})
        response = client.http.getresponse()
        assert response.headers["content-length"] is None
        assert len(response.read(1_000_000)) == 1_000_000
        response.close()
    assert not armed.wait().forwarded


def test_a_huge_answer_has_a_bound(faults: Faults) -> None:
    arm(faults, Huge(at_most=131072))
    assert len(mint(faults)[2]) == 131072 + len('{"key": "sk-')


def test_a_paused_answer_is_delivered_when_released(gateway: DevGateway, faults: Faults) -> None:
    pause = PauseResponse()
    arm(faults, pause)
    with Client(faults) as client:
        client.send("POST", "/key/generate", {"key_alias": "kb-1"})
        assert pause.reached.wait(5)
        assert aliases(gateway) == ["kb-1"]
        pause.release.set()
        assert client.receive()[0] == 200


def test_a_paused_answer_goes_nowhere_when_the_client_was_killed(
    gateway: DevGateway, faults: Faults
) -> None:
    pause = PauseResponse()
    armed = arm(faults, pause)
    with Client(faults) as client:
        client.send("POST", "/key/generate", {"key_alias": "kb-1"})
        assert pause.reached.wait(5)
    pause.release.set()
    assert armed.wait().forwarded
    assert aliases(gateway) == ["kb-1"]


def test_a_paused_answer_does_not_wait_for_ever(faults: Faults) -> None:
    arm(faults, PauseResponse(at_most=0.01))
    assert mint(faults)[0] == 200


# Closing.


def test_no_thread_outlives_the_proxy(gateway: DevGateway) -> None:
    before = set(threading.enumerate())
    clients = []
    with Faults(gateway.url) as faults:
        for fault in (Hang(), CommitLate(), PauseResponse(), Trickle(60), Huge()):
            faults.next(fault)
            clients.append(Client(faults))
            clients[-1].send("POST", "/key/generate", {})
            faults.wait_for(lambda log: len(log) == len(clients))
        clients.append(Client(faults))
        clients[-1].http.connect()
    for client in clients:
        client.http.close()
    served = {thread for thread in threading.enumerate() if "process_request" in thread.name}
    assert set(threading.enumerate()) - before - served == set()
    assert faults.errors == []


def test_a_client_that_speaks_no_http_is_dropped(faults: Faults) -> None:
    with socket.create_connection(("127.0.0.1", port_of(faults)), timeout=5) as client:
        client.sendall(b"\x16\x03\x01\r\n\r\n")
        assert client.recv(1) == b""


def port_of(faults: Faults) -> int:
    return int(faults.url.rpartition(":")[2])


def read_until(client: socket.socket, end: bytes) -> list[bytes]:
    pieces = [b""]
    while not b"".join(pieces).endswith(end):
        pieces.append(client.recv(65536))
        assert pieces[-1]
    return pieces[1:]
