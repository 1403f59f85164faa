"""One HTTP call: proxies, authorities, limits, and what every failure of httpx means."""

from __future__ import annotations

import inspect
import json
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from keybroker.errors import ConfigError, SourceError, SourceInvalid, SourceUnavailable
from keybroker.sources.http import LARGEST_BODY, PROBLEMS, Http, Reply
from tests.servers.faults import refused_url
from tests.servers.web import Handler, LoopbackServer

NOON = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


# Servers.


class Site(LoopbackServer):
    """Answers as a test says, or with what it was asked, as JSON."""

    def __init__(self) -> None:
        super().__init__(_Site)
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.answer: tuple[int, dict[str, str], bytes] = (200, {}, b'{"data":[]}')


class _Site(Handler):
    server: Site

    def do_GET(self) -> None:  # noqa: N802, the standard library's name
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.asked.append((self.command, self.path, headers, self.body()))
        status, more, body = self.server.answer
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


@dataclass
class Raw:
    """A listener that runs a function for each connection."""

    port: int = 0
    errors: list[BaseException] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def raw(serve: Any) -> Iterator[Raw]:
    """Serve each connection with a function, in a thread; all end with the context."""
    made = Raw()
    open_: set[socket.socket] = set()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made.port = listener.getsockname()[1]

        def one(client: socket.socket) -> None:
            with client:
                try:
                    serve(client)
                except (OSError, ssl.SSLError):
                    pass  # the client went away
                except Exception as error:
                    made.errors.append(error)

        def accept() -> None:
            threads = []
            while True:
                client, _ = listener.accept()
                if done.is_set():
                    client.close()
                    break
                open_.add(client)
                threads.append(threading.Thread(target=one, args=(client,)))
                threads[-1].start()
            for connection in open_:
                with suppress(OSError):  # closed on either side
                    connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)

        done = threading.Event()
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield made
        finally:
            done.set()
            socket.create_connection(("127.0.0.1", made.port)).close()
            acceptor.join(10)
    assert made.errors == []


def head_of(client: socket.socket) -> bytes:
    """Read a request's head."""
    head = b""
    while b"\r\n\r\n" not in head and (piece := client.recv(65536)):
        head += piece
    return head


@contextmanager
def proxy(site_port: int, refuse: bool = False) -> Iterator[tuple[str, list[str]]]:
    """A forward and CONNECT proxy; it names the hosts asked for and always goes to the site."""
    hosts: list[str] = []

    def serve(client: socket.socket) -> None:
        head = head_of(client)
        if not head:
            return
        method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
        hosts.append(f"{method} {target}")
        if refuse:
            client.sendall(
                b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
            )
            return
        with socket.create_connection(("127.0.0.1", site_port)) as behind:
            if method == "CONNECT":
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                behind.sendall(head)
            pumps = [
                threading.Thread(target=_pump, args=pair)
                for pair in ((client, behind), (behind, client))
            ]
            for pump in pumps:
                pump.start()
            for pump in pumps:
                pump.join()

    with raw(serve) as server:
        yield server.url, hosts


def _pump(come: socket.socket, go: socket.socket) -> None:
    try:
        while piece := come.recv(65536):
            go.sendall(piece)
        go.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # either side went away


@dataclass(frozen=True)
class Authority:
    """A private authority, and a server context that it vouches for."""

    pem: Path
    server: ssl.SSLContext


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    folder = tmp_path_factory.mktemp("authority")
    top, top_key = _certificate("test authority", None, None)
    leaf, leaf_key = _certificate("llm.example.com", top, top_key)
    pem = folder / "authority.pem"
    pem.write_bytes(top.public_bytes(serialization.Encoding.PEM))
    chain = folder / "chain.pem"
    chain.write_bytes(
        leaf.public_bytes(serialization.Encoding.PEM)
        + leaf_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    return Authority(pem, context)


def _certificate(
    name: str, issuer: x509.Certificate | None, issuer_key: ec.EllipticCurvePrivateKey | None
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer is not None:
        names = [x509.DNSName("localhost"), x509.DNSName(name)]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer_key or key, hashes.SHA256()), key


@contextmanager
def secure(authority: Authority, site: Site) -> Iterator[int]:
    """TLS in front of the site; yields the port."""

    def serve(client: socket.socket) -> None:
        with (
            authority.server.wrap_socket(client, server_side=True) as inside,
            socket.create_connection(("127.0.0.1", site.port)) as behind,
        ):
            behind.sendall(head_of(inside))
            while piece := behind.recv(65536):
                inside.sendall(piece)

    site.answer = (200, {"connection": "close"}, b'{"data":[]}')
    with raw(serve) as server:
        yield server.port


@contextmanager
def http(url: str, **how: Any) -> Iterator[Http]:
    """An Http that is closed at the end."""
    opened = Http("gateway", url, **how)
    try:
        yield opened
    finally:
        opened.close()


def nowhere(*_: object, **__: object) -> None:
    """Find no host."""
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def fails(url: str, **how: Any) -> SourceError:
    """Return the error that a GET ends with."""
    with http(url, **how) as opened, pytest.raises(SourceError) as caught:
        opened.call("GET", "/v1/models", headers={"x-api-key": "sk-canary-0123456789"})
    assert "sk-canary" not in f"{caught.value} {caught.value.hint}"
    return caught.value


# What every failure means.


def exceptions() -> list[type[Exception]]:
    """Every exception class that httpx has, exported or not."""
    found = [
        value
        for value in {**vars(httpx), **vars(httpx._exceptions)}.values()
        if inspect.isclass(value) and issubclass(value, Exception)
    ]
    return sorted({kind for kind in found if kind.__module__ == "httpx"}, key=lambda k: k.__name__)


@pytest.mark.parametrize("kind", exceptions(), ids=lambda kind: kind.__name__)
def test_every_exception_of_httpx_is_in_the_table(kind: type[Exception]) -> None:
    """None falls through, and what happens on the wire is more than "failed"."""
    known = next((one for one in kind.__mro__ if one in PROBLEMS), None)
    assert known is not None
    on_the_wire = issubclass(kind, httpx.TransportError)
    bases = (httpx.TransportError, httpx.TimeoutException, httpx.NetworkError, httpx.ProtocolError)
    if on_the_wire and kind not in bases:
        assert known is kind


def test_the_enumeration_sees_httpx_s_exceptions() -> None:
    """The test above would notice a new one: it sees those that are known to exist."""
    names = {kind.__name__ for kind in exceptions()}
    assert {"ConnectError", "ReadTimeout", "InvalidURL", "ResponseNotRead"} <= names
    assert len(names) >= 25


@pytest.mark.parametrize("kind", PROBLEMS, ids=lambda kind: kind.__name__)
def test_only_what_was_never_sent_is_known_not_to_have_happened(kind: type[Exception]) -> None:
    """Anything that may come after the request was sent leaves its effect unknown."""
    before = {
        *("ConnectTimeout", "ConnectError", "PoolTimeout", "UnsupportedProtocol", "ProxyError"),
        *("InvalidURL", "LocalProtocolError"),
    }
    words, unknown = PROBLEMS[kind]
    assert unknown is (kind.__name__ not in before)
    assert words == words.strip()
    assert words


def test_what_the_call_raises_is_ours_for_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of httpx's request errors comes, a SourceUnavailable without its text goes."""
    kinds = [k for k in exceptions() if issubclass(k, httpx.RequestError | httpx.InvalidURL)]
    assert len(kinds) > 15
    for kind in kinds:

        def broken(*_: object, kind: type[Exception] = kind, **__: object) -> None:
            raise kind("sk-canary-0123456789")

        monkeypatch.setattr(httpx.Client, "stream", broken)
        error = fails("http://127.0.0.1:9")
        assert type(error) is SourceUnavailable
        assert error.message.startswith("gateway: 127.0.0.1:9 ")
        assert error.__suppress_context__


# Where a call goes.


def test_a_call_is_sent_once_with_its_parts(site: Site) -> None:
    """Path of the address, query, headers and body arrive; the answer's JSON comes back."""
    site.answer = (201, {"x-answer": "yes"}, b'{"a":[1]}')
    with http(f"{site.url}/llm", headers={"x-org": "eng"}) as opened:
        reply = opened.call(
            "POST", "/v1/messages", query={"beta": "true"}, headers={"x-b": "2"}, body={"m": "ü"}
        )
    [(method, path, headers, body)] = site.asked
    assert (method, path) == ("POST", "/llm/v1/messages?beta=true")
    assert (headers["x-org"], headers["x-b"]) == ("eng", "2")
    assert headers["user-agent"].startswith("keybroker/")
    assert json.loads(body) == {"m": "ü"}
    assert (reply.status, reply.headers["x-answer"], reply.value) == (201, "yes", {"a": [1]})


@pytest.mark.parametrize("body", [b"", b"<html>", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_no_json_has_no_value(site: Site, body: bytes) -> None:
    """A page, half an answer or nothing is an answer without a value, not a failure."""
    site.answer = (200, {}, body)
    with http(site.url) as opened:
        assert opened.call("GET", "/").value is None


def test_a_redirect_is_not_followed(site: Site) -> None:
    """It is an error that says who answered what, and not where to."""
    site.answer = (302, {"location": "http://127.0.0.1:9/x?key=sk-1"}, b"")
    error = fails(site.url)
    assert type(error) is SourceInvalid
    assert not error.unknown
    assert f"127.0.0.1:{site.port} answers 302" in error.message
    assert "sk-1" not in error.message
    assert len(site.asked) == 1


def test_nobody_there_is_known(site: Site) -> None:
    """A refused connection is unavailable, and nothing happened."""
    error = fails(refused_url())
    assert (type(error), error.unknown) == (SourceUnavailable, False)
    assert error.message.endswith("could not be reached")
    assert error.hint == "is it running? see base_url"


def test_a_name_that_is_not_there_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that cannot be found is unavailable, and nothing happened."""
    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    error = fails("http://llm.example.com")
    assert (type(error), error.unknown) == (SourceUnavailable, False)


# Proxies.


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_a_plain_call_goes_through_its_proxy(
    site: Site, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """The proxy is given the whole address, and nobody else is asked for the host."""
    site.answer = (200, {"connection": "close"}, b'{"data":[]}')
    with proxy(site.port) as (url, hosts):
        monkeypatch.setenv(variable, url)
        with http("http://llm.example.com") as opened:
            assert opened.call("GET", "/v1/models").status == 200
    assert hosts == ["GET http://llm.example.com/v1/models"]


def test_a_secure_call_is_tunnelled(
    site: Site, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTPS_PROXY sees a host and never the key."""
    with secure(authority, site) as port, proxy(port) as (url, hosts):
        monkeypatch.setenv("HTTPS_PROXY", url)
        with http("https://llm.example.com", ca=str(authority.pem)) as opened:
            reply = opened.call("GET", "/v1/models", headers={"x-api-key": "sk-canary"})
    assert reply.status == 200
    assert hosts == ["CONNECT llm.example.com:443"]
    assert site.asked[0][2]["x-api-key"] == "sk-canary"


@pytest.mark.parametrize(
    "value", ["127.0.0.1", "example.com,127.0.0.1", "*", "localhost,127.0.0.1"]
)
def test_no_proxy_is_honoured(site: Site, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """A host named there is asked directly."""
    with proxy(site.port) as (url, hosts):
        monkeypatch.setenv("HTTP_PROXY", url)
        monkeypatch.setenv("NO_PROXY", value)
        with http(site.url) as opened:
            assert opened.call("GET", "/").status == 200
    assert hosts == []


def test_a_proxy_that_refuses_is_said_and_nothing_was_sent(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CONNECT that is refused ends before there is a request."""
    with proxy(site.port, refuse=True) as (url, _):
        monkeypatch.setenv("HTTPS_PROXY", url)
        error = fails("https://llm.example.com")
    assert (type(error), error.unknown) == (SourceUnavailable, False)
    assert "proxy" in error.message
    assert site.asked == []


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_socks_is_understood(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """ALL_PROXY may name a SOCKS proxy; one that is away could not be reached."""
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://{refused_url().removeprefix('http://')}")
    error = fails("http://llm.example.com")
    assert (type(error), error.unknown) == (SourceUnavailable, False)
    assert error.message == "gateway: llm.example.com could not be reached"


def test_a_socks_proxy_is_asked_for_the_host(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy, not this machine, finds the host, and the call goes through it."""
    site.answer = (200, {"connection": "close"}, b'{"data":[]}')
    asked: list[bytes] = []

    def serve(client: socket.socket) -> None:
        client.recv(64)  # which ways to log in
        client.sendall(b"\x05\x00")
        asked.append(client.recv(64))
        client.sendall(b"\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x00")
        with socket.create_connection(("127.0.0.1", site.port)) as behind:
            behind.sendall(head_of(client))
            while piece := behind.recv(65536):
                client.sendall(piece)

    with raw(serve) as server:
        monkeypatch.setenv("ALL_PROXY", server.url.replace("http", "socks5h"))
        with http("http://llm.example.com") as opened:
            assert opened.call("GET", "/v1/models").status == 200
    assert [b"llm.example.com" in request for request in asked] == [True]


@pytest.mark.parametrize(
    ("variable", "value"),
    [("ALL_PROXY", "ftp://user:canary@127.0.0.1:9"), ("NO_PROXY", "localhost,[::1]")],
)
def test_a_variable_that_cannot_be_used_is_the_configuration_s_fault(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """Nobody looks for the fault at the gateway, and a proxy's password is not shown."""
    monkeypatch.setenv(variable, value)
    with http(refused_url()) as opened, pytest.raises(ConfigError) as caught:
        opened.call("GET", "/")
    assert "canary" not in f"{caught.value} {caught.value.hint}"
    assert variable in str(caught.value.hint)


# Authorities.


def test_an_authority_named_by_ca_is_trusted(site: Site, authority: Authority) -> None:
    """`ca` adds a private authority."""
    with (
        secure(authority, site) as port,
        http(f"https://localhost:{port}", ca=str(authority.pem)) as opened,
    ):
        assert opened.call("GET", "/v1/models").value == {"data": []}


def test_an_authority_that_nobody_knows_is_refused_with_what_to_do(
    site: Site, authority: Authority
) -> None:
    """Without `ca` nothing is sent, and the hint names it."""
    with secure(authority, site) as port:
        error = fails(f"https://localhost:{port}")
    assert (type(error), error.unknown) == (SourceUnavailable, False)
    assert "certificate" in error.message
    assert "ca = " in str(error.hint)
    assert site.asked == []


def test_a_certificate_of_another_host_is_refused(site: Site, authority: Authority) -> None:
    """A known authority does not make any host the right one."""
    with secure(authority, site) as port:
        error = fails(f"https://127.0.0.1:{port}", ca=str(authority.pem))
    assert "certificate" in error.message
    assert site.asked == []


def test_ssl_cert_file_is_honoured(
    site: Site, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual variable works as well as `ca`."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.pem))
    with secure(authority, site) as port, http(f"https://localhost:{port}") as opened:
        assert opened.call("GET", "/v1/models").status == 200


def test_ca_and_ssl_cert_file_work_together(
    site: Site, authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`ca` adds; it does not replace what the system trusts."""
    other, _ = _certificate("another authority", None, None)
    pem = tmp_path / "other.pem"
    pem.write_bytes(other.public_bytes(serialization.Encoding.PEM))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.pem))
    with (
        secure(authority, site) as port,
        http(f"https://localhost:{port}", ca=str(pem)) as opened,
    ):
        assert opened.call("GET", "/v1/models").status == 200


@pytest.mark.parametrize("content", [None, b"", b"not a certificate"])
def test_a_ca_that_cannot_be_used_is_the_configuration_s_fault(
    tmp_path: Path, content: bytes | None
) -> None:
    """A missing or empty file is named, and nothing is sent without it."""
    pem = tmp_path / "corp.pem"
    if content is not None:
        pem.write_bytes(content)
    with http("https://localhost:9", ca=str(pem)) as opened, pytest.raises(ConfigError) as caught:
        opened.call("GET", "/")
    assert str(pem) in caught.value.message


def test_plain_http_at_a_secure_port_is_unavailable(site: Site, authority: Authority) -> None:
    """Speaking the wrong protocol is an error of ours, either way round."""
    assert type(fails(site.url.replace("http", "https"))) is SourceUnavailable
    with secure(authority, site) as port:
        assert type(fails(f"http://localhost:{port}")) is SourceUnavailable


# Times.


def reply(headers: Mapping[str, str], asked_at: datetime = NOON) -> Reply:
    raw_headers = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return Reply(429, httpx.Headers(raw_headers), None, asked_at)


def stamp(seconds: float) -> str:
    return format_datetime(NOON + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "1.5"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "²"}, None),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "7"}, 7),
        ({"retry-after": " 7 "}, 7),
        ({"retry-after": "3600"}, 3600),
        ({"retry-after": "86400"}, 3600),
        ({"retry-after": "9" * 400}, 3600),
        ({"retry-after": stamp(90)}, 90),
        ({"retry-after": stamp(-90)}, 0),
        ({"retry-after": stamp(90_000)}, 3600),
        ({"retry-after": "Sat, 21 Nov 2026 12:01:30 -0000"}, None),
        ({"retry-after": "Sat, 99 Nov 2026 12:01:30 GMT"}, None),
        ({"retry-after": stamp(690), "date": stamp(600)}, 90),
        ({"retry-after": stamp(-510), "date": stamp(-600)}, 90),
        ({"retry-after": "7", "date": stamp(600)}, 7),
    ],
)
def test_retry_after_is_read(headers: dict[str, str], seconds: float | None) -> None:
    """Seconds and dates by the server's own clock, never more than an hour, never negative."""
    wish = reply(headers).retry_after
    assert wish == (None if seconds is None else timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("date", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("yesterday", 0),
        (stamp(0), 0),
        (stamp(29), 0),
        (stamp(-30), 0),
        (stamp(31), 31),
        (stamp(-31), -31),
        (stamp(86_400), 86_400),
        ("Sat, 21 Nov 2026 13:00:00 -0000", 0),
    ],
)
def test_skew_is_read_from_the_date(date: str | None, seconds: float) -> None:
    """A clock that is off by more than half a minute is off; less is the call's own time."""
    headers = {} if date is None else {"date": date}
    assert reply(headers).skew == timedelta(seconds=seconds)


# Limits.


@pytest.mark.parametrize(("size", "fits"), [(LARGEST_BODY, True), (LARGEST_BODY + 1, False)])
def test_a_body_has_a_largest_size(site: Site, size: int, fits: bool) -> None:
    """4 MiB are read, one byte more is refused, and what it did is unknown."""
    site.answer = (200, {}, b'"' + b"a" * (size - 2) + b'"')
    with http(site.url) as opened:
        if fits:
            assert len(opened.call("GET", "/").value) == size - 2
            return
    error = fails(site.url)
    assert (type(error), error.unknown) == (SourceInvalid, True)
    assert "4 MiB" in error.message


def test_a_body_that_unpacks_to_too_much_is_refused(site: Site) -> None:
    """A small compressed body counts as what it becomes."""
    import gzip

    site.answer = (200, {"content-encoding": "gzip"}, gzip.compress(b"a" * (LARGEST_BODY * 2)))
    assert type(fails(site.url)) is SourceInvalid


def test_a_body_that_cannot_be_unpacked_is_unknown(site: Site) -> None:
    """It says gzip and is not."""
    site.answer = (200, {"content-encoding": "gzip"}, b"not gzip")
    error = fails(site.url)
    assert (type(error), error.unknown) == (SourceUnavailable, True)


@contextmanager
def dribble(head: bytes) -> Iterator[Raw]:
    """Send a head and then a byte now and then, for as long as somebody listens."""
    stop = threading.Event()

    def serve(client: socket.socket) -> None:
        head_of(client)
        client.sendall(head)
        while not stop.wait(0.02):
            client.sendall(b" ")

    with raw(serve) as server:
        try:
            yield server
        finally:
            stop.set()


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"],
    ids=["with a length", "until it closes"],
)
def test_a_slow_body_ends_at_the_deadline(head: bytes) -> None:
    """A body of which each byte is in time is given up when the whole is late."""
    with dribble(head) as server:
        asked = datetime.now(UTC)
        error = fails(server.url, seconds=0.3)
        took = datetime.now(UTC) - asked
    assert (type(error), error.unknown) == (SourceUnavailable, True)
    assert "in time" in error.message
    assert timedelta(seconds=0.3) <= took < timedelta(seconds=5)


def test_a_silent_server_ends_at_the_deadline() -> None:
    """Nothing at all for the whole time is unknown."""
    with raw(lambda client: client.recv(1) and head_of(client) and client.recv(1)) as server:
        error = fails(server.url, seconds=0.2)
    assert (type(error), error.unknown) == (SourceUnavailable, True)
    assert "did not answer in time" in error.message


@pytest.mark.parametrize(
    "answer", [b"", b"220 mail ESMTP\r\n", b"HTTP/1.1 200 OK\r\n", b"\x00" * 9]
)
def test_what_is_no_whole_answer_is_unknown(answer: bytes) -> None:
    """A dropped connection and another protocol are unavailable, in words that fit both."""

    def serve(client: socket.socket) -> None:
        head_of(client)
        client.sendall(answer)

    with raw(serve) as server:
        error = fails(server.url)
    assert (type(error), error.unknown) == (SourceUnavailable, True)


def test_fresh_opens_another_connection(site: Site) -> None:
    """A second look at a key does not go where the first one went."""
    ports: list[int] = []

    def serve(client: socket.socket) -> None:
        ports.append(client.getpeername()[1])
        while head_of(client):
            client.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    with raw(serve) as server, http(server.url) as opened:
        opened.call("GET", "/")
        opened.call("GET", "/")
        opened.fresh()
        opened.call("GET", "/")
    assert len(ports) == 2


def test_fresh_bounds_the_calls_that_follow() -> None:
    """All calls of one look share its time: the second gets what the first left."""
    with (
        raw(lambda client: head_of(client) and client.recv(1)) as server,
        http(server.url, seconds=0.4) as opened,
    ):
        opened.fresh()
        began = datetime.now(UTC)
        for _ in range(4):
            with pytest.raises(SourceUnavailable):
                opened.call("GET", "/")
        took = datetime.now(UTC) - began
        assert opened.is_late
    assert took < timedelta(seconds=1.5)
