"""The words of the socket, both ways, and what a client makes of a daemon that misbehaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keybroker import asking, wire
from keybroker.errors import (
    CLASSES,
    ConfigError,
    KeybrokerError,
    NobodyAnswers,
    NotReady,
    SourceUnavailable,
)
from keybroker.wire import Asked, OtherVersion, read_request, request
from tests.canaries import Canaries
from tests.servers.unix import NOBODY, ScriptedServer, hang, read

CANARIES = Canaries()
KEY = CANARIES.new("key")
NAMES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,31}", fullmatch=True)
NUMBERS = st.integers(0, wire.LARGEST_PID)
TIMES = st.integers(0, wire.LARGEST_TTL_MS)
FOLDERS = (
    st.binary(max_size=300)
    .map(lambda rest: b"/" + rest.replace(b"\n", b"").replace(b"\0", b""))
    .map(lambda raw: raw.decode("utf-8", "surrogateescape"))
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@pytest.fixture
def socket() -> Iterator[Path]:
    """A path for a socket, short enough."""
    with tempfile.TemporaryDirectory(prefix="kb-") as folder:
        yield Path(folder) / "s"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines that a test can wait for."""
    monkeypatch.setattr(asking, "FIRST_SECONDS", 0.3)
    monkeypatch.setattr(asking, "WAIT_SECONDS", 0.6)
    monkeypatch.setattr(wire, "FIRST_SECONDS", 0.3)


# requests


@given(NAMES | st.just(""), NUMBERS, TIMES, FOLDERS | st.just(""))
def test_what_is_asked_is_what_is_read(name: str, pid: int, ttl: int, folder: str) -> None:
    """Every name, number and folder crosses the socket."""
    assert read_request(request(name, pid, ttl, folder)) == Asked(name, pid, ttl, folder)


def test_a_request_is_a_line_that_people_can_read() -> None:
    """The default profile is a dash, and a folder may be missing with its blank."""
    assert request("work", 7, 60_000, "/home/a b") == b"1 get work 7 60000 /home/a b\n"
    assert request("") == request("-") == b"1 get - 0 0\n"


@pytest.mark.parametrize(
    ("pid", "ttl"),
    [(-1, 60_000), (wire.LARGEST_PID + 1, 60_000), (7, -1), (7, wire.LARGEST_TTL_MS + 1)],
)
def test_a_number_that_cannot_be_is_asked_as_unknown(pid: int, ttl: int) -> None:
    """So that a strange environment costs nobody a key."""
    asked = read_request(request("work", pid, ttl))

    assert isinstance(asked, Asked)
    assert 0 in (asked.pid, asked.ttl_ms)


@pytest.mark.parametrize(
    "folder", ["relative", "/two\nlines", "/" + "a" * wire.LONGEST_REQUEST, "C:\\", ""]
)
def test_a_folder_that_would_break_the_line_is_left_out(folder: str) -> None:
    """The key is still asked for."""
    assert request("work", 7, 0, folder) == b"1 get work 7 0\n"


BAD_NAMES = ["Work", "wörk", "-work", "_work", "a" * 33, "work 0", "work\n", " ", "a/b", "\udcff"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_no_profile_can_have_is_not_asked_for(name: str) -> None:
    """Nothing can be put into the line by a name, and it is not repeated."""
    with pytest.raises(ValueError, match=r"^not a profile's name$"):
        request(name)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"1",
        b"1 get work 7 0",
        b"1 get\n",
        b"1 get \n",
        b"1 get work\n",
        b"1 get work 7\n",
        b"1 get work 7 \n",
        b"1 get work  7 0\n",
        b"1 get  7 0\n",
        b"1 get a b 7 0\n",
        b"1 get work -7 0\n",
        b"1 get work +7 0\n",
        b"1 get work 7.0 0\n",
        b"1 get work 0x7 0\n",
        b"1 get work 1_0 0\n",
        b"1 get work 2147483648 0\n",
        b"1 get work 7 9007199254740993\n",
        b"1 get work 7 \xd9\xa3\n",
        b"1 get work 7 0\n\n",
        b"1 get work 7 0\n1 get work 7 0\n",
        b"1 get work 7 0\r\n",
        b"\n1 get work 7 0\n",
        b"1 get work 7 0 /" + b"a" * 1009 + b"\n",
        b"1 put work 7 0\n",
        b"1 GET work 7 0\n",
        b" 1 get work 7 0\n",
        b"1\tget work 7 0\n",
        b"get work 7 0\n",
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\x00\x01\n",
        *(
            b"1 get %b 7 0\n" % name.encode("utf-8", "replace")
            for name in BAD_NAMES
            if not set(name) & set(" \n")
        ),
        b"{}\n",
        b"[]\n",
        b"{\n",
        b'{"v": 1}\n',
        b'{"op": "status"}\n',
        b'{"v": "1", "op": "status"}\n',
        b'{"v": true, "op": "status"}\n',
        b'{"v": 1.0, "op": "status"}\n',
        b'{"v": 1, "op": 7}\n',
        b'{"v": 1, "op": "status", "x": NaN}\n',
        b'{"v": 1, "op": "status", "x": -Infinity}\n',
        b'{"v": 1, "op": "\\ud800"}\n',
        b'{"v": 1, "op": "status"} {}\n',
        b'{"v": 1, "op": "\xff"}\n',
        '{"v": 1, "op": "status"}\n'.encode("utf-16"),
        b'{"v": 1, "op": ' + b"[" * 900 + b"\n",
        b'{"v": 1, "op": "status", "x": ' + b"[" * 480 + b"]" * 480 + b"}" + b"\n\n",
    ],
)
def test_what_is_no_request_is_refused(line: bytes) -> None:
    """Without a word of what was in it."""
    with pytest.raises(ValueError, match=r"^[a-zA-Z' ]{4,40}$") as error:
        read_request(line)

    assert not isinstance(error.value, OtherVersion)
    assert error.value.__context__ is None or error.value.__suppress_context__


@pytest.mark.parametrize(
    "line",
    [
        b"2 get work 7 0\n",
        b"10 get work\n",
        b"0 x\n",
        b'{"v": 2, "op": "status"}\n',
        b'{"v": 0, "op": "x", "more": [1]}\n',
    ],
)
def test_a_request_of_another_version_is_known_as_one(line: bytes) -> None:
    """So that it can be told which version we speak."""
    with pytest.raises(OtherVersion):
        read_request(line)


@pytest.mark.parametrize("folder", [b"", b"relative", b"~", b"C:\\", b"/a\0b", b" /home"])
def test_a_folder_that_cannot_be_is_none(folder: bytes) -> None:
    """Its owner still gets a key."""
    assert read_request(b"1 get work 7 0 %b\n" % folder) == Asked("work", 7, 0, "")


def test_a_request_for_control_is_what_it_says() -> None:
    """The whole of it; the operation looks at what it needs."""
    line = b'{"v": 1, "op": "rotate", "profiles": ["work"], "extra": null}\n'

    assert read_request(line) == {"v": 1, "op": "rotate", "profiles": ["work"], "extra": None}


@given(st.binary(max_size=1100) | st.binary(max_size=60).map(lambda rest: b"1 get " + rest + b"\n"))
def test_any_bytes_are_a_request_or_refused(line: bytes) -> None:
    """Nothing else is raised, and what is read is within its limits."""
    try:
        found = read_request(line)
    except ValueError:
        return
    if isinstance(found, Asked):
        assert found.profile == "" or asking.is_name(found.profile.encode())
        assert 0 <= found.pid <= wire.LARGEST_PID
        assert 0 <= found.ttl_ms <= wire.LARGEST_TTL_MS
        assert found.directory == "" or found.directory.startswith("/")
    else:
        assert found["v"] == 1


# answers


def test_a_key_is_answered_as_it_is() -> None:
    """And read by the other side."""
    assert wire.ok(KEY) == f"ok {KEY}\n".encode()
    assert asking.read_reply(wire.ok(KEY)[:-1]) == (0, KEY)
    assert len(wire.ok("k" * wire.LONGEST_KEY)) <= wire.LONGEST_REPLY


@pytest.mark.parametrize(
    "key",
    ["", " ", "a b", "a\n", "a\nok b", "ä", "a\x7f", "a\0", "\ud800", "k" * (wire.LONGEST_KEY + 1)],
)
def test_what_is_no_key_is_never_answered(key: str) -> None:
    """It is not in the error either."""
    with pytest.raises(ValueError, match=r"^not a key that can be handed out$"):
        wire.ok(key)


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES.keys())
def test_an_error_is_answered_in_one_line(kind: type[KeybrokerError]) -> None:
    """With the status that the helper ends with, and what to type."""
    line = wire.error_line(kind("litellm: it is so", hint="type: keybroker status"))

    assert line == (
        f"error {kind.exit_status} keybroker: litellm: it is so; type: keybroker status\n".encode()
    )
    assert asking.read_reply(line[:-1]) == (
        kind.exit_status,
        "keybroker: litellm: it is so; type: keybroker status",
    )


@pytest.mark.parametrize(
    ("message", "hint", "said"),
    [
        ("a", None, "keybroker: a"),
        ("a\nb\r\n  c\td", "e\n", "keybroker: a b c d; e"),
        ("\x1b[2J/\udcff\u200b", None, "keybroker: \ufffd[2J/\ufffd\ufffd"),
        ("ä" * 189, None, "keybroker: " + "ä" * 189),
        ("ä" * 190, None, "keybroker: " + "ä" * 188 + "…"),
        ("a", "b" * 300, "keybroker: a; " + "b" * 185 + "…"),
    ],
)
def test_an_error_is_one_line_for_people(message: str, hint: str | None, said: str) -> None:
    """At most 200 characters; nothing in it steers a terminal, and it can always be encoded."""
    error = ConfigError(message, hint=hint)

    assert wire.one_line(error) == said
    assert len(said) <= wire.LONGEST_TEXT
    assert wire.error_line(error) == f"error 78 {said}\n".encode()


@given(st.text(max_size=300), st.none() | st.text(max_size=300))
def test_every_error_reaches_people(message: str, hint: str | None) -> None:
    """Whatever a path or a name in it holds, the helper takes it for an answer."""
    line = wire.error_line(NotReady(message, hint=hint))
    found = asking.read_reply(line[:-1])

    assert line.count(b"\n") == 1
    assert len(line) <= wire.LONGEST_REPLY
    assert found == (75, wire.one_line(NotReady(message, hint=hint)))


# asking for a key


def test_a_key_is_asked_for(socket: Path) -> None:
    """The answer comes as it is, after whatever had to be waited for."""
    with ScriptedServer(socket, read, wire.WAIT, wire.ok(KEY)) as server:
        assert wire.ask(socket, request("work")) == f"ok {KEY}".encode()
        assert server.request() == request("work")


def test_why_there_is_no_key_is_an_answer(socket: Path) -> None:
    """Not an error of asking."""
    with ScriptedServer(socket, read, wire.error_line(NotReady("a"))):
        assert wire.ask(str(socket), request("work")) == b"error 75 keybroker: a"


def unanswered(socket: Path) -> str:
    """Ask for a key; return why nobody answers."""
    with pytest.raises(NobodyAnswers) as error:
        wire.ask(socket, request("work"))
    assert CANARIES.seen_in(repr(error.value)) == []
    start = f"daemon: nobody answers at {socket} ("
    assert error.value.message.startswith(start)
    return error.value.message.removeprefix(start).removesuffix(")")


def test_nobody_is_there_to_ask(socket: Path) -> None:
    """No socket, no folder, a file, a path that is too long: the reason is said."""
    assert unanswered(socket) == "No such file or directory"
    socket.touch()
    assert unanswered(socket) == "Connection refused"
    assert unanswered(socket / "s") == "Not a directory"
    assert "too long" in unanswered(socket / ("a" * 200))


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ((hang,), "timed out"),
        ((read, hang), "timed out"),
        ((read, wire.WAIT, hang), "timed out"),
        ((read, wire.ok(KEY)[:-1], hang), "timed out"),
        ((read, b""), "the answer breaks off"),
        ((read, wire.WAIT), "the answer breaks off"),
        ((read, wire.ok(KEY)[:-1]), "the answer breaks off"),
        ((read, b"ok " + b"k" * 20_000), "the answer breaks off"),
        ((read, b"ok \n"), wire.STRANGE),
        ((read, b"ok " + KEY.encode() + b" more\n"), wire.STRANGE),
        ((read, b"HTTP/1.1 200 OK\n"), wire.STRANGE),
    ],
)
def test_a_daemon_that_does_not_answer_is_nobody(
    socket: Path, steps: tuple[Any, ...], why: str
) -> None:
    """Silence, half an answer, another language."""
    with ScriptedServer(socket, *steps):
        assert unanswered(socket) == why


def test_a_stranger_is_nobody(socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask, to control and to watch: who listens is neither we nor root."""
    root = os.geteuid() == 0
    if not root:
        us = os.geteuid()
        monkeypatch.setattr("posix.geteuid", lambda: us + 1)
    with ScriptedServer(socket, read, wire.ok(KEY), uid=NOBODY if root else None) as server:
        assert unanswered(socket) == "it belongs to another user"
        with pytest.raises(NobodyAnswers, match="belongs to another user"):
            wire.control(socket, "status", 1)
        with pytest.raises(NobodyAnswers, match="belongs to another user"):
            next(wire.watch(socket))
        assert [server.request() for _ in range(3)] == [b""] * 3


# control


@given(value=JSON)
def test_an_answer_to_control_is_what_was_answered(value: Any) -> None:
    """Of whatever JSON can hold."""
    size, _, text = wire.answer(value).partition(b"\n")

    assert int(size) == len(text)
    assert json.loads(text) == {"ok": value}


def test_the_daemon_is_made_to_do_something(socket: Path) -> None:
    """The request says what, the answer how it went; however it is cut."""
    answer = wire.answer({"work": [1, None, "ü"]})
    with ScriptedServer(socket, read, answer[:1], answer[1:7], answer[7:]) as server:
        found = wire.control(socket, "rotate", 10, profiles=["work"])

        assert found == {"work": [1, None, "ü"]}
        assert read_request(server.request()) == {"v": 1, "op": "rotate", "profiles": ["work"]}


def test_a_long_answer_comes_whole(socket: Path) -> None:
    """The status of many profiles is longer than a socket's buffer."""
    value = [{"profile": f"p{number}", "text": "x" * 100} for number in range(10_000)]
    with ScriptedServer(socket, read, wire.answer(value)):
        assert wire.control(socket, "status", 10) == value


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES.keys())
def test_an_error_of_the_daemon_is_raised_as_what_it_was(
    socket: Path, kind: type[KeybrokerError]
) -> None:
    """Class, message and hint."""
    with (
        ScriptedServer(socket, read, wire.refusal(kind("a", hint="b"))),
        pytest.raises(KeybrokerError) as error,
    ):
        wire.control(socket, "rotate", 10)

    assert type(error.value) is kind
    assert (error.value.message, error.value.hint) == ("a", "b")


def test_an_error_that_we_do_not_know_is_one_all_the_same(socket: Path) -> None:
    """The daemon may be newer."""
    text = b'{"error": {"code": "from-the-future", "message": "a"}}'
    with (
        ScriptedServer(socket, read, b"%d\n%b" % (len(text), text)),
        pytest.raises(KeybrokerError) as error,
    ):
        wire.control(socket, "rotate", 10)

    assert (type(error.value), error.value.message, error.value.hint) == (KeybrokerError, "a", None)


OTHER = b"error 69 keybroker: the daemon speaks version 2; type: keybroker service install\n"


def test_a_daemon_of_another_version_says_so(socket: Path) -> None:
    """In the words that every version has; to who controls and to who watches."""
    said = "the daemon speaks version 2; type: keybroker service install"
    with ScriptedServer(socket, read, OTHER):
        for act in (lambda: wire.control(socket, "status", 10), lambda: next(wire.watch(socket))):
            with pytest.raises(NobodyAnswers) as error:
                act()
            assert error.value.message == said


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", wire.STRANGE),
        (b"\n", wire.STRANGE),
        (b"ok k\n", wire.STRANGE),
        (b'{"ok": 1}\n', wire.STRANGE),
        (b'-9\n{"ok": 1}', wire.STRANGE),
        (b"9", "the answer breaks off"),
        (b'9\n{"ok": 1', "the answer breaks off"),
        (b'9\n{"ok": 1}\n', "the answer breaks off"),
        (b'09\n{"ok": 1}', "the answer breaks off"),
        (b"9" * 5000 + b'\n{"ok": 1}', "the answer breaks off"),
        (b"2\n[]", wire.STRANGE),
        (b"2\n{}", wire.STRANGE),
        (b'9\n{"ok": 1 ', wire.STRANGE),
        (b'9\n{"ok":"\xff"', wire.STRANGE),
        (b'12\n{"error": 1}', wire.STRANGE),
        (b'13\n{"error": {}}', wire.STRANGE),
        (b"5000\n" + b"[" * 5000, wire.STRANGE),
    ],
)
def test_an_answer_that_is_none_is_nobody_s(socket: Path, answer: bytes, why: str) -> None:
    """Torn, of another length, not what it should be: nothing is made of it."""
    with (
        ScriptedServer(socket, read, answer),
        pytest.raises(NobodyAnswers) as error,
    ):
        wire.control(socket, "status", 10)

    assert error.value.message == f"daemon: nobody answers at {socket} ({why})"


def test_an_endless_answer_has_an_end(socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To control and to watch."""
    monkeypatch.setattr(wire, "LONGEST_ANSWER", 1000)
    with ScriptedServer(socket, read, b"9" * 2000, hang):
        with pytest.raises(NobodyAnswers, match="too long"):
            wire.control(socket, "status", 10)
        with pytest.raises(NobodyAnswers, match="too long"):
            next(wire.watch(socket))


@pytest.mark.parametrize("steps", [(), (hang,), (read, hang), (read, b"9\n{", hang)])
def test_control_takes_no_longer_than_it_may(socket: Path, steps: tuple[Any, ...]) -> None:
    """In all, wherever the daemon hangs."""
    with ScriptedServer(socket, *steps), pytest.raises(NobodyAnswers, match="timed out"):
        wire.control(socket, "status", 0.2)


def test_a_request_that_is_too_long_is_not_sent(socket: Path) -> None:
    """The daemon would not read it."""
    with pytest.raises(ValueError, match="too long"):
        wire.control(socket, "rotate", 1, profiles=["a" * 32] * 40)


# watching


def test_what_the_daemon_tells_is_seen_as_it_happens(socket: Path) -> None:
    """Each object when its line is whole; the end is the end, and half a line nothing."""
    lines = (b'{"a": 1}\n{"b"', b': 2}\n{"c": 3}', b"\n", b'{"d": 4')
    with ScriptedServer(socket, read, *lines) as server:
        assert list(wire.watch(socket)) == [{"a": 1}, {"b": 2}, {"c": 3}]
        assert read_request(server.request()) == {"v": 1, "op": "watch"}


def test_a_watch_that_is_closed_lets_the_daemon_go(socket: Path) -> None:
    """Its connection is closed with it."""
    closed: list[bytes] = []

    def until_closed(_: ScriptedServer, client: Any) -> None:
        client.settimeout(30)
        closed.append(client.recv(1))

    with ScriptedServer(socket, read, wire.told({"a": 1}), until_closed):
        told = wire.watch(socket)
        first = next(told)
        told.close()

    assert (first, closed) == ({"a": 1}, [b""])


def test_a_watch_ends_with_the_daemon_s_error(socket: Path) -> None:
    """What was told before it was told."""
    refusal = wire.refusal(SourceUnavailable("a", hint="b"), telling=True)
    with ScriptedServer(socket, read, wire.told({"a": 1}), refusal):
        told = wire.watch(socket)
        first = next(told)
        with pytest.raises(SourceUnavailable) as error:
            next(told)

    assert (first, error.value.message, error.value.hint) == ({"a": 1}, "a", "b")


@pytest.mark.parametrize("line", [b"\n", b"[1]\n", b"17\n", b"{\n", b"ok key\n", b"\xff\n"])
def test_what_is_told_in_other_words_is_nobody_s(socket: Path, line: bytes) -> None:
    """Objects only, one a line."""
    with ScriptedServer(socket, read, line), pytest.raises(NobodyAnswers) as error:
        next(wire.watch(socket))

    assert error.value.message == f"daemon: nobody answers at {socket} ({wire.STRANGE})"


# what it costs


def test_asking_for_a_key_loads_next_to_nothing(socket: Path) -> None:
    """A program that asks pays for a socket; errors and JSON come when they are needed."""
    program = (
        "import sys; before = set(sys.modules)\n"
        "from keybroker import wire\n"
        "print(wire.ask(sys.argv[1], wire.request('work'))[:2].decode())\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    with ScriptedServer(socket, read, wire.ok(KEY)):
        done = subprocess.run(
            [sys.executable, "-I", "-c", program, str(socket)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )

    said, loaded = done.stdout.splitlines()
    assert said == "ok"
    assert set(loaded.split()) <= {
        *("__future__", "_socket", "keybroker", "keybroker.asking"),
        *("keybroker.values", "keybroker.wire"),
    }
