"""Clients that misbehave, in every way we could think of, while honest ones get their keys.

A real daemon and real sockets. Whatever goes on, who asks as it should gets the whole key within
the time that the helper waits for a first byte, no answer but that one has a secret in it, and the
daemon says nothing that it should not.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keybroker import asking, starting, wire
from keybroker.audit import Audit
from keybroker.daemon import MOST_WATCHERS
from keybroker.devgateway.server import Reply, Request
from keybroker.errors import NotReady
from keybroker.server import LATE_SECONDS, MOST_CLIENTS, OURS
from tests.canaries import Canaries, Gateway
from tests.resident import Resident, until

NOBODY = 65534
FILES = 16_384
MARGIN_SECONDS = 3.0  # of a busy machine
REQUEST = wire.request("work")


class Held(Gateway):
    """A gateway that mints when it is told to."""

    def __init__(self, canaries: Canaries, **options: Any) -> None:
        super().__init__(canaries, **options)
        self.mints = threading.Event()
        self.mints.set()

    def respond(self, request: Request) -> Reply:
        if request.path == "/key/generate":
            assert self.mints.wait(30)
        return super().respond(request)


class Siege:
    """A daemon with one profile, and what may be said of it afterwards."""

    def __init__(self, resident: Resident, gateway: Held, canaries: Canaries) -> None:
        self.resident, self.gateway, self.canaries = resident, gateway, canaries
        self.socket = resident.socket
        resident.environment["ADMIN"] = gateway.master_key

    def configure(self, more: str = "") -> None:
        self.resident.configure(
            f'default = "work"\n[profiles.work]\nbase_url = "{self.gateway.url}"\n'
            f'[profiles.work.source]\ntype = "litellm"\nadmin = {{ env = "ADMIN" }}\n{more}'
        )

    def start(self, command: Sequence[str] = ()) -> str:
        """Start it; return the key."""
        self.configure()
        self.resident.start(command=command)
        return self.resident.key()

    @property
    def pid(self) -> int:
        assert self.resident.process is not None
        return self.resident.process.pid

    def connect(self, line: bytes = b"") -> socket.socket:
        """Connect and say something, as far as it is taken at once."""
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        one.settimeout(asking.FIRST_SECONDS)
        try:
            one.connect(str(self.socket))
            if line:
                one.sendall(line)
        except BaseException:
            one.close()
            raise
        return one

    def say(self, line: bytes, *, more: bool = False) -> bytes:
        """Send anything; return all that comes back until the daemon closes, which it must."""
        with self.connect() as one:
            try:
                one.sendall(line)
                if not more:
                    one.shutdown(socket.SHUT_WR)
            except OSError as error:  # it had enough
                assert error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)
            return rest(one)

    def check(self) -> None:
        """Look at what is left of it: it is alive and well-spoken."""
        assert self.resident.process is not None
        assert self.resident.process.poll() is None, self.resident.said()
        said = self.resident.said()
        assert "Traceback" not in said
        assert "Error" not in said
        assert self.canaries.seen_in(said) == []
        assert self.gateway.failures == ()


def rest(one: socket.socket, seconds: float = LATE_SECONDS + MARGIN_SECONDS) -> bytes:
    """Read to the end, which must come soon."""
    ends = time.monotonic() + seconds
    found = bytearray()
    while True:
        one.settimeout(max(0.001, ends - time.monotonic()))
        try:
            piece = one.recv(1 << 16)
        except ConnectionResetError:  # closed with something of ours unread
            return bytes(found)
        if not piece:
            return bytes(found)
        found += piece


class Reader(threading.Thread):
    """An honest reader that asks again and again."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = os.fsencode(path)
        self._over = threading.Event()
        self.replies: set[bytes] = set()
        self.failures: list[str] = []
        self.count = 0

    def run(self) -> None:
        request = wire.request("work", os.getpid())
        while not self._over.is_set():
            try:
                self.replies.add(asking.ask(self._path, request))
            except OSError as error:  # late, or torn: the helper would have given up
                self.failures.append(repr(error))
            self.count += 1

    def stop(self) -> None:
        self._over.set()
        self.join()


@contextmanager
def reading(siege: Siege, key: str) -> Iterator[list[Reader]]:
    """Have two readers ask meanwhile; each of their answers must be the whole key."""
    readers = [Reader(siege.socket) for _ in range(2)]
    for one in readers:
        one.start()
    try:
        yield readers
        seen = [one.count for one in readers]
        until(lambda: all(one.count > seen[at] + 5 for at, one in enumerate(readers)))
        assert siege.resident.helper() == (0, f"{key}\n", "")
    finally:
        for one in readers:
            one.stop()
    assert [one.failures for one in readers] == [[], []]
    assert [one.replies for one in readers] == [{b"ok %b" % key.encode()}] * 2


def crowd(path: Path, lines: Sequence[bytes], seconds: float = 20.0) -> list[bytes]:
    """
    Ask many things at the same time: everybody is connected before anybody's answer is read.

    Returns:
        All that each was told, in order. Who finds nobody at the door yet knocks again.
    """
    ends = time.monotonic() + seconds
    replies = [bytearray() for _ in lines]
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        for number, line in enumerate(lines):
            one = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            one.setblocking(False)
            while True:
                try:
                    one.connect(str(path))
                    break
                except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                    assert time.monotonic() < ends, "nobody listens"
                    time.sleep(0.001)
            if line:
                one.sendall(line)
            selector.register(one, selectors.EVENT_READ, number)
        while selector.get_map():
            assert time.monotonic() < ends, f"{len(selector.get_map())} got no answer"
            for key, _ in selector.select(0.5):
                assert isinstance(key.fileobj, socket.socket)
                try:
                    piece = key.fileobj.recv(1 << 16)
                except ConnectionResetError:
                    piece = b""
                replies[key.data] += piece
                if not piece:
                    selector.unregister(key.fileobj)
    return [bytes(reply) for reply in replies]


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    """Let the test have thousands of connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def canaries() -> Canaries:
    return Canaries()


@pytest.fixture
def siege(resident: Resident, canaries: Canaries) -> Iterator[Siege]:
    """A daemon that was not started yet; what it said is looked through at the end."""
    with Held(canaries) as gateway:
        made = Siege(resident, gateway, canaries)
        try:
            yield made
            made.check()
        finally:
            gateway.mints.set()


@pytest.fixture
def key(siege: Siege) -> str:
    """Start the daemon; it is the key that everybody must get."""
    return siege.start()


# a thousand honest ones


def test_a_thousand_at_once_get_the_same_key(siege: Siege, key: str) -> None:
    """None fails, none waits for the network."""
    replies = crowd(siege.socket, [wire.request("work", os.getpid())] * 1000)

    assert replies == [b"ok %b\n" % key.encode()] * 1000
    assert siege.gateway.minted == [key]


def test_a_thousand_that_may_have_been_refused_get_it_too(siege: Siege, key: str) -> None:
    """One session that asks so often looks suspicious; one look is enough for all of them."""
    request = wire.request("work", os.getpid(), 60_000)
    assert siege.say(request) == b"ok %b\n" % key.encode()
    looked = len(siege.gateway.seen())
    replies = crowd(siege.socket, [request] * 1000)

    assert set(replies) <= {b"wait\nok %b\n" % key.encode(), b"ok %b\n" % key.encode()}
    assert len(siege.gateway.seen()) == looked + 1
    assert siege.gateway.minted == [key]


def test_a_thousand_wait_for_the_first_key(siege: Siege) -> None:
    """They come before the daemon listens; one key is minted, and everybody gets it."""
    siege.configure()
    siege.gateway.mints.clear()
    release = threading.Timer(1.0, siege.gateway.mints.set)
    release.start()
    siege.resident.start(ready=False)
    replies = crowd(siege.socket, [REQUEST] * 1000)
    release.join()

    key = siege.resident.key()
    assert set(replies) == {b"wait\nok %b\n" % key.encode()}
    assert siege.gateway.minted == [key]


def test_thousands_that_wait_leave_the_daemon_in_order(siege: Siege, key: str) -> None:
    """Who asks for a key that cannot be had is told so in time; the others are not kept."""
    siege.gateway.mints.clear()
    siege.configure(
        f'[profiles.other]\nbase_url = "{siege.gateway.url}"\n'
        '[profiles.other.source]\ntype = "litellm"\nadmin = { env = "ADMIN" }\n'
    )
    wire.control(siege.socket, "reload", 10.0)
    with reading(siege, key):
        replies = crowd(siege.socket, [wire.request("other")] * 500)
    [reply] = set(replies)
    assert re.fullmatch(rb"wait\nerror 75 keybroker: other: [^\n]+\n", reply)


# those that misbehave

Deed = Callable[[Siege, ExitStack], None]


def silent(siege: Siege, stack: ExitStack) -> None:
    """Say nothing; be let go soon."""
    crowd = [stack.enter_context(siege.connect()) for _ in range(500)]
    assert {rest(one) for one in crowd} == {b""}


def slow(siege: Siege, stack: ExitStack) -> None:
    """Say a byte at a time; be let go before it is a line."""
    crowd = [stack.enter_context(siege.connect(b"1 get ")) for _ in range(50)]
    began = time.monotonic()
    for one in crowd:
        one.setblocking(False)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while time.monotonic() < began + LATE_SECONDS + MARGIN_SECONDS:
            for one in crowd:
                one.sendall(b"w")
            time.sleep(0.05)
    assert {rest(one) for one in crowd} == {b""}


def huge(siege: Siege, stack: ExitStack) -> None:
    """Write megabytes without a newline; be told once that it is not understood."""
    for _ in range(20):
        one = stack.enter_context(siege.connect())
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(256):
                one.sendall(b"1 get " + b"x" * 65_536)
        assert re.fullmatch(rb"(error 69 keybroker: [^\n]+\n)?", rest(one))


def unread(siege: Siege, stack: ExitStack) -> None:
    """Ask for everything there is, and read none of it."""
    for line in (REQUEST, control("status"), control("watch"), control("rotate"), b"\n"):
        for _ in range(100):
            stack.enter_context(siege.connect(line))


def half_closed(siege: Siege, stack: ExitStack) -> None:
    """Close the side that speaks: after the line, within it, before it."""
    for line in (REQUEST, REQUEST[:-1], b"") * 50:
        one = stack.enter_context(siege.connect(line))
        one.shutdown(socket.SHUT_WR)
        reply = rest(one, MARGIN_SECONDS)
        assert reply.startswith(b"ok ") == (line == REQUEST)
        assert reply.endswith(b"\n") or not reply


def vanishing(siege: Siege, stack: ExitStack) -> None:
    """Go before the line, within it, before the answer, within it."""
    lines = (b"", b"1 g", REQUEST, control("status"), control("watch"), control("lend")[:-1])
    for line in lines * 50:
        with siege.connect(line) as one:
            if line == control("status"):
                one.recv(1)


def dying(siege: Siege, stack: ExitStack) -> None:
    """Be killed in the middle of everything."""
    code = (
        "import os, signal, socket, sys\n"
        "for line in sys.argv[2:]:\n"
        "    one = socket.socket(socket.AF_UNIX)\n"
        "    one.connect(sys.argv[1])\n"
        "    os.write(one.detach(), line.encode())\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for _ in range(3):
        lines = [REQUEST.decode(), "1 get", control("watch").decode()]
        done = subprocess.run([sys.executable, "-IS", "-c", code, str(siege.socket), *lines])
        assert done.returncode == -signal.SIGKILL


def flooding(siege: Siege, stack: ExitStack) -> None:
    """Ask for something that lasts, then go on talking for as long as it is taken."""
    for _ in range(10):
        one = stack.enter_context(siege.connect(control("watch")))
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(256):
                one.sendall(b"x" * 65_536)


def control(op: str, **values: Any) -> bytes:
    return json.dumps({"v": 1, "op": op, **values}).encode() + b"\n"


DEEDS = (silent, slow, huge, unread, half_closed, vanishing, dying, flooding)


@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
def test_honest_readers_go_on_while_others_misbehave(siege: Siege, key: str, deed: Deed) -> None:
    """Whatever those do, who asks gets the whole key, and afterwards nothing is left of them."""
    with ExitStack() as stack, reading(siege, key):
        deed(siege, stack)
    assert siege.resident.status()["profiles"][0]["fingerprint"] is not None
    assert siege.gateway.minted == [key]


def test_honest_readers_go_on_while_all_of_them_misbehave(siege: Siege, key: str) -> None:
    """All at the same time."""
    failures: list[BaseException] = []

    def do(deed: Deed, stack: ExitStack) -> None:
        try:
            deed(siege, stack)
        except BaseException as error:
            failures.append(error)

    with ExitStack() as stack, reading(siege, key):
        threads = [threading.Thread(target=do, args=(deed, stack)) for deed in DEEDS]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert failures == []


# too many of them


def limited(resident: Resident, files: int) -> list[str]:
    """Return the command of a daemon that may open so many files."""
    command = starting.command(resident.state, resident.socket, "text")
    return ["/bin/sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *command]


@pytest.mark.parametrize("files", [FILES, 300, 64])
def test_idle_clients_beyond_the_limit_make_room(siege: Siege, files: int) -> None:
    """The oldest silent ones go, as many as are in the way; nobody else notices."""
    key = siege.start(limited(siege.resident, files))
    most = min(MOST_CLIENTS, max(files - OURS, files // 2))
    with ExitStack() as stack, reading(siege, key):
        began = time.monotonic()
        idle = [stack.enter_context(siege.connect()) for _ in range(most + 200)]
        for one in idle:
            one.setblocking(False)
        until(lambda: is_over(idle[199]))
        assert all(is_over(one) for one in idle[:200])
        kept = not is_over(idle[-1])
        assert kept or time.monotonic() > began + LATE_SECONDS
        for _ in range(500):  # and more than ever
            stack.enter_context(siege.connect())
        assert siege.say(REQUEST) == b"ok %b\n" % key.encode()
    assert siege.gateway.minted == [key]


def is_over(one: socket.socket) -> bool:
    try:
        return one.recv(1) == b""
    except BlockingIOError:
        return False


# Has no file left to open on one signal, and has them again on another.
STARVED = """
import resource, signal, sys
sys.path.append(sys.argv.pop(1))
from keybroker import listening
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
def starve(number, frame):
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
def feed(number, frame):
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
signal.signal(signal.SIGUSR1, starve)
signal.signal(signal.SIGUSR2, feed)
listening.main()
"""


def patched(resident: Resident, code: str) -> list[str]:
    """Return the command of a daemon that runs some lines of its own."""
    command = starting.command(resident.state, resident.socket, "text")
    return [*command[:3], code, *command[4:]]


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process took."""
    if sys.platform == "linux":
        after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after[11]) + int(after[12])) / os.sysconf("SC_CLK_TCK")
    said = subprocess.check_output(["ps", "-o", "time=", "-p", str(pid)], text=True)
    minutes, _, seconds = said.strip().rpartition(":")
    return 60 * int(minutes) + float(seconds)


def let_pass(seconds: float) -> None:
    """Let time pass, which is what is measured here."""
    threading.Event().wait(seconds)


def test_without_a_file_to_open_it_waits_and_recovers(siege: Siege) -> None:
    """Nobody can come in, and it does not spin meanwhile; then everybody at the door is served."""
    key = siege.start(patched(siege.resident, STARVED))
    os.kill(siege.pid, signal.SIGUSR1)
    with ExitStack() as stack:
        door = [stack.enter_context(siege.connect(REQUEST)) for _ in range(20)]
        for one in door:
            one.setblocking(False)
        before = cpu_seconds(siege.pid)
        let_pass(1.5)
        assert cpu_seconds(siege.pid) - before < 0.3
        assert not any(is_over(one) for one in door)

        os.kill(siege.pid, signal.SIGUSR2)
        assert {rest(one) for one in door} == {b"ok %b\n" % key.encode()}
    with reading(siege, key):
        pass
    assert siege.resident.cli("rotate")[0] == 0
    assert len(siege.gateway.minted) == 2


def test_who_does_not_read_a_long_answer_is_let_go(siege: Siege) -> None:
    """Many profiles make an answer that no socket holds; it is kept for a while only."""
    long = f"{siege.gateway.url}/{'x' * 1500}"
    siege.configure(
        "".join(
            f'[profiles.p{number}]\nbase_url = "{long}"\n'
            f'[profiles.p{number}.source]\ntype = "static"\nkey = {{ env = "ADMIN" }}\n'
            for number in range(80)
        )
    )
    siege.resident.start()
    key = siege.resident.key("work")
    whole = siege.say(control("status"), more=True)
    assert len(whole) > 300_000  # more than a socket holds
    with ExitStack() as stack, reading(siege, key):
        lazy = [stack.enter_context(siege.connect(control("status"))) for _ in range(20)]
        assert lazy[-1].recv(1)
        let_pass(LATE_SECONDS + 0.2)
        assert all(0 < len(rest(one)) < len(whole) - 1 for one in lazy)
    assert len(siege.resident.status()["profiles"]) == 81


# strangers

# A stranger is told by the name of its socket, where the test cannot be another user.
MISTAKEN = """
import sys
sys.path.append(sys.argv.pop(1))
from keybroker import listening, server
real = server.peer_uid
def peer_uid(connection):
    return 65534 if "stranger" in str(connection.getpeername()) else real(connection)
server.peer_uid = peer_uid
listening.main()
"""


# Comes two hundred times as somebody else, if it may, and says how many got an answer.
STRANGER = """
import errno, os, socket, sys
socket_path, folder, *lines = sys.argv[1:]
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
answers = 0
for number in range(200):
    one = socket.socket(socket.AF_UNIX)
    if os.geteuid() != 65534:
        one.bind(f"{folder}/stranger{number}")
    one.connect(socket_path)
    try:
        one.sendall(lines[number % len(lines)].encode())
        answers += one.recv(1) != b""
    except OSError as error:
        assert error.errno in (errno.EPIPE, errno.ECONNRESET)
print(os.geteuid(), answers)
"""


def test_another_user_is_turned_away(siege: Siege) -> None:
    """Without a word, whatever is said; the log has one line of it, and readers go on."""
    key = siege.start(() if os.geteuid() == 0 else patched(siege.resident, MISTAKEN))
    for folder in (siege.resident.home.path, siege.socket.parent.parent, siege.socket.parent):
        folder.chmod(0o711)
    siege.socket.chmod(0o666)
    before = siege.resident.said()
    lines = [b"", REQUEST, control("status"), control("stop"), b"x" * 5000, b"1 get"]
    command = [
        *(os.fsencode(one) for one in (sys.executable, "-c", STRANGER)),
        *(os.fsencode(one) for one in (siege.socket, siege.resident.home.path)),
        *lines,
    ]
    with reading(siege, key):
        said_to = subprocess.check_output(command, text=True).split()
    assert said_to == [str(NOBODY if os.geteuid() == 0 else os.geteuid()), "0"]
    said = siege.resident.said().removeprefix(before)
    assert re.fullmatch(rf"\S+ \S+ warning: user {NOBODY} was turned away\n", said)


# Takes its own user for another when it says who may ask.
ELSEWHERE = """
import sys
sys.path.append(sys.argv.pop(1))
from keybroker import daemon, listening, server
def mistaken(listeners, selector, uids, *rest):
    return server.Server(listeners, selector, frozenset(uid + 1 for uid in uids), *rest)
daemon.Server = mistaken
listening.main()
"""


def test_a_daemon_of_another_user_says_nothing(siege: Siege) -> None:
    """Not even that it is there: the helper finds that nobody answers."""
    siege.configure()
    siege.resident.start(ready=False, command=patched(siege.resident, ELSEWHERE))
    until(lambda: "listens at" in siege.resident.said())
    for line in (b"", REQUEST, control("status"), b"x" * 5000):
        assert siege.say(line, more=True) == b""
    status, stdout, stderr = siege.resident.helper()
    assert (status, stdout) == (69, "")
    assert siege.canaries.seen_in(stderr) == []
    assert siege.resident.said().count("was turned away") == 1


# garbage

DEEP = b'{"v":1,"op":' + b"[" * 900
NASTY = (
    *(b"", b"\n", b" \n", b"\0\n", b"\0" * 1024, b"\xff" * 300 + b"\n", b"1\n", b"1 \n"),
    *(b"1 get\n", b"0 get - 0 0\n", b"2 get - 0 0\n", b"01 get - 0 0\n", b"-1 get - 0 0\n"),
    *(b"1  get - 0 0\n", b" 1 get - 0 0\n", b"1 get - 0\n", b"1 get - - -\n", b"1 get - -1 0\n"),
    *(b"1 get - 1e3 0\n", b"1 get - 0 0x1\n", b"1 get ../home 0 0\n", b"1 get WORK 0 0\n"),
    *(b"1 get work\0 0 0\n", b"1 GET work 0 0\n", b"1 get nobody 0 0\n", b"1 put work 0 0\n"),
    *(b"1 get work " + b"9" * 900 + b" 0\n", b"1 get work 0 " + b"9" * 400 + b"\n"),
    *(b"1 get work 0 0\r\n", b"1 get work 0 0\n1 get work 0 0\n", b"1 get work 0 0\nx"),
    *("1 get wörk 0 0\n".encode(), "1 get work \u0661 0\n".encode(), b"GET / HTTP/1.1\r\n\r\n"),
    *(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\n", b"null\n", b"[]\n", b"[{}]\n", b"1.5\n"),
    *(b'"1"\n', b"{\n", b"{}\n", b"{]\n", b"{}{}\n", b"{'v':1}\n", DEEP, DEEP[:1000] + b"\n"),
    *(b'{"a":' * 200 + b"\n", b'{"v":NaN,"op":"status"}\n', b'{"v":1,"op":NaN}\n'),
    *(b'{"v":1e400,"op":"status"}\n', b'{"v":Infinity,"op":"status"}\n', b'{"v":1}\n'),
    *(b'{"v":"1","op":"status"}\n', b'{"v":1.0,"op":"status"}\n', b'{"v":true,"op":"x"}\n'),
    *(b'{"v":2,"op":"status"}\n', b'{"v":0,"op":"stop"}\n', b'{"op":"status"}\n'),
    *(b'{"v":1,"op":null}\n', b'{"v":1,"op":["status"]}\n', b'{"v":1,"op":{"status":1}}\n'),
    *(b'{"v":1,"op":""}\n', b'{"v":1,"op":"__class__"}\n', b'{"v":1,"op":"\\ud800"}\n'),
    *(b'{"v":1,"op":"\\u0000"}\n', b'{"v":1,"op":"\\u001b[2J"}\n', b'{"v":1,"op":"Status"}\n'),
    *(b'{"v":1,"op":"status","op":"nothing"}\n', control("x" * 900), control("rotate")),
    *(control("rotate", profiles="x"), control("rotate", profiles=None), control("revoke")),
    *(control("rotate", profiles={"work": 1}), control("rotate", profiles=[None])),
    *(control("rotate", profiles=[["work"]]), control("rotate", profiles=["work", 1])),
    *(control("rotate", profiles=["nobody"]), control("rotate", profiles=["\x1b[2J" * 50])),
    *(control("revoke", profiles=["work", "nobody"]), control("revoke", profiles=[""])),
    *(control("revoke", profiles="work"), control("revoke", profiles=["../../etc/passwd"])),
    *(control("revoke", profiles=["\0"]), control("reveal"), control("get", profiles=["work"])),
    *(control("rotate", profiles=[]), control("status", profiles="x"), control("reload", x=[1])),
)


def test_garbage_is_answered_or_closed(siege: Siege, key: str) -> None:
    """Never with a secret, never by a death; what has no end is closed without a word."""
    with reading(siege, key):
        replies = crowd(siege.socket, NASTY, 10.0)
        for line, reply in zip(NASTY, replies, strict=True):
            assert siege.canaries.seen_in(reply) == [], line
            assert is_answer(reply), (line, reply)
            assert (reply == b"") == (b"\n" not in line and len(line) <= 1024), (line, reply)
    assert siege.gateway.minted == [key]


def is_answer(reply: bytes) -> bool:
    """Say whether it is one that the protocol knows, but no key; or none at all."""
    if not reply or re.fullmatch(rb"error (69|78) keybroker: [^\n]{1,600}\n", reply):
        return True
    size, _, text = reply.partition(b"\n")
    return size == b"%d" % len(text) and len(json.loads(text).keys() & {"ok", "error"}) == 1


def test_a_strange_folder_is_no_reason_to_refuse(siege: Siege, key: str) -> None:
    """Two hundred fields are one folder with blanks; of a thousand folders few are kept."""
    folders = [b"/" + b"x " * 200, b"relative", b"/\xff\xfe", b"/nul\0", b"/" + b"../" * 300, b" "]
    folders += [b"/folder/%d" % number for number in range(1000)]
    replies = crowd(siege.socket, [b"1 get work 0 60000 %b\n" % folder for folder in folders])

    assert set(replies) == {b"ok %b\n" % key.encode()}
    assert len(siege.resident.status()["push"]["known"]) <= 64


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
    SCALARS, lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside), max_leaves=4
)
OPS = st.sampled_from(["status", "rotate", "revoke", "reload"]) | st.text()
CONTROL = st.builds(
    lambda values, more: json.dumps({**more, **values}).encode() + b"\n",
    st.fixed_dictionaries(
        {"v": st.just(1) | VALUES, "op": OPS | VALUES}, optional={"profiles": VALUES}
    ),
    st.dictionaries(st.text(), VALUES, max_size=3),
)
WORDS = st.lists(
    st.sampled_from([b"1", b"get", b"work", b"-", b"0", b" ", b"\n", b"\0", b"/", b"{"])
)
GARBAGE = st.binary(max_size=2000) | CONTROL | WORDS.map(b" ".join) | WORDS.map(b"".join)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(GARBAGE)
def test_whatever_is_said_is_answered_or_closed(siege: Siege, garbage: bytes) -> None:
    """The key, a reason why there is none, or the end; and the next one gets the key."""
    if siege.resident.process is None:
        siege.start()
    [key] = siege.gateway.minted
    reply = siege.say(garbage)

    if reply != b"ok %b\n" % key.encode():
        assert siege.canaries.seen_in(reply) == []
        assert is_answer(reply)
    assert siege.resident.ask() == f"ok {key}"


# who watches

WATCHER = """
import sys
from keybroker import wire
for _ in wire.watch(sys.argv[1]):
    print("told", flush=True)
"""


def test_a_few_may_watch_and_no_more(siege: Siege, key: str) -> None:
    """Who is one too many is told so; the place of one that was killed is free again."""
    with ExitStack() as stack, reading(siege, key):
        command = [sys.executable, "-c", WATCHER, str(siege.socket)]
        doomed = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        stack.callback(doomed.kill)
        assert doomed.stdout is not None
        assert doomed.stdout.readline() == b"told\n"
        watchers = [wire.watch(siege.socket) for _ in range(MOST_WATCHERS - 1)]
        for one in watchers:
            stack.callback(one.close)
            assert next(one)["profiles"][0]["profile"] == "work"
        for _ in range(20):
            with pytest.raises(NotReady, match="watch already"):
                next(wire.watch(siege.socket))
        doomed.kill()
        doomed.wait()
        watchers[0].close()
        for _ in range(2):
            another = wire.watch(siege.socket)
            stack.callback(another.close)
            assert "profiles" in next(another)
        with pytest.raises(NotReady, match="watch already"):
            next(wire.watch(siege.socket))


def test_watchers_come_and_go(siege: Siege, key: str) -> None:
    """All sixteen go and sixteen others come at once, again and again; none is one too many."""
    with reading(siege, key):
        for _ in range(20):
            watchers = [siege.connect(control("watch")) for _ in range(MOST_WATCHERS)]
            heard = [one.recv(1 << 16) for one in watchers]
            for one in watchers:
                one.close()
            assert [line for line in heard if b'"error"' in line] == []


# who borrows

BORROWER = """
from keybroker.cli.work import owner
import signal
with owner():
    print("have it", flush=True)
    signal.pause()
"""


@contextmanager
def borrower(siege: Siege) -> Iterator[subprocess.Popen[bytes]]:
    """Have a command hold the owner lock, which the daemon lent it."""
    with subprocess.Popen(
        [sys.executable, "-c", BORROWER],
        env=siege.resident.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"have it\n"
            yield process
        finally:
            process.kill()


def test_a_borrower_that_is_killed_gives_the_lock_back(siege: Siege, key: str) -> None:
    """Keys are handed out all the while; then the daemon is the owner again and rotates."""
    with reading(siege, key), borrower(siege) as process:
        with pytest.raises(NotReady, match="another command is at work"):
            wire.control(siege.socket, "rotate", 10.0, profiles=["work"])
        for _ in range(3):  # nobody else is lent it meanwhile
            with pytest.raises(NotReady, match="another command is at work"):
                next(wire.watch(siege.socket, "lend"))
        assert siege.resident.key() == key
        process.kill()
        process.wait()
        until(lambda: siege.resident.owner() == siege.pid)
    status, said, _ = siege.resident.cli("rotate")
    assert (status, len(siege.gateway.minted)) == (0, 2), said
    assert siege.resident.key() == siege.gateway.minted[-1]


def test_who_asks_for_the_lock_and_goes_leaves_it_there(siege: Siege, key: str) -> None:
    """Before it is lent, as soon as it is, and twice on one connection."""
    for line in (control("lend"), control("lend") * 2):
        for _ in range(20):
            siege.connect(line).close()
    until(lambda: b'"ok"' in siege.say(control("rotate", profiles=[])))  # the lock is back
    with siege.connect(control("lend")) as one:
        assert one.recv(100) == b"{}\n"
        one.sendall(control("lend"))
        assert rest(one) == b""
    until(lambda: siege.resident.owner() == siege.pid)
    assert siege.resident.cli("rotate")[0] == 0
    assert len(siege.gateway.minted) == 2


# what is said and written


def test_no_secret_is_said_where_it_is_not_asked_for(siege: Siege, key: str) -> None:
    """Not in an answer other than `ok`, not in the log, not where processes are listed."""
    assert siege.canaries.seen_in(key) == ["minted"]
    assert siege.resident.cli("rotate")[0] == 0
    lines = [line for line in NASTY if line.endswith(b"\n")]
    lines += [control("status"), control("reload"), control("rotate", profiles=["work"])]
    replies = crowd(siege.socket, lines)
    for op in ("watch", "lend"):
        with siege.connect(control(op)) as one:
            replies.append(one.recv(1 << 16))
    until(lambda: b'"ok"' in siege.say(control("rotate", profiles=[])))  # the lock is back
    siege.gateway.master_key = siege.canaries.new("next master")  # ours is refused from now on
    replies += crowd(siege.socket, [control("rotate", profiles=["work"])])
    assert b"refused" in replies[-1]

    assert [line for line in replies if siege.canaries.seen_in(line)] == []
    assert siege.canaries.seen_in(siege.resident.said()) == []
    listed = subprocess.check_output(["ps", "-A", "-ww", "-o", "args="])
    assert str(siege.socket).encode() in listed
    assert siege.canaries.seen_in(listed) == []


COMMAND = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from keybroker.audit import Audit
for _ in range(300):
    Audit(Path(sys.argv[1])).write(datetime.now(UTC), "given", "work", fingerprint="command")
"""


def test_every_answer_is_in_the_audit_log(siege: Siege, key: str) -> None:
    """Each counted once, while a command writes too; the chain holds whenever it is looked at."""
    with reading(siege, key) as readers:
        command = [sys.executable, "-c", COMMAND, str(siege.resident.state)]
        with subprocess.Popen(command) as writer:
            replies = crowd(siege.socket, [REQUEST] * 1000)
            looks = [siege.resident.cli("audit", "verify") for _ in range(3)]
            assert writer.wait() == 0
    looks.append(siege.resident.cli("audit", "verify"))

    assert {status for status, _, _ in looks} == {0}, looks
    first, helper = 1, 1
    asked = first + helper + len(replies) + sum(one.count for one in readers)
    until(lambda: given_out(siege)["daemon"] == asked)
    assert given_out(siege) == {"daemon": asked, "command": 300}


def given_out(siege: Siege) -> dict[str, int]:
    """Count the keys that were given out, by who says so."""
    times = {"daemon": 0, "command": 0}
    for line in Audit(siege.resident.state).read():
        if line["event"] == "given":
            who = "command" if line["fingerprint"] == "command" else "daemon"
            times[who] += line.get("times", 1)
    return times
