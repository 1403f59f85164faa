"""The sockets of the daemon: whoever comes, in whatever way, the others get their answers."""

from __future__ import annotations

import _socket
import errno
import os
import resource
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keybroker import listening, server
from keybroker.server import LATE_SECONDS, LONGEST, MOST_UNSENT, PAUSE_SECONDS, Client, Server

BIG = b"b" * (MOST_UNSENT - 1)
ME = frozenset({os.geteuid()})
TURNS = 10_000


class Hall:
    """A server and the loop around it: `now` is answered at once, `later` when we please."""

    def __init__(self, path: Path, most: int | None = None, uids: frozenset[int] = ME) -> None:
        self.path = str(path)
        self.selector = selectors.DefaultSelector()
        self.heard: list[bytes] = []
        self.waiting: list[Client] = []
        self.strangers: list[int] = []
        self.crowd: list[socket.socket] = []  # who came, to be closed at the end
        self.listener = listening.listen(self.path)
        self.server = Server(
            [self.listener],
            self.selector,
            uids,
            self.at_once,
            self.later,
            self.strangers.append,
            most,
        )

    def at_once(self, line: bytes, uid: int) -> bytes | None:
        self.heard.append(line)
        assert uid == os.geteuid()
        return {b"later\n": None, b"big\n": BIG}.get(line, b"answer\n")

    def later(self, line: bytes, client: Client) -> None:
        assert line == b"later\n"
        self.waiting.append(client)

    def turn(self) -> int:
        """Do what is to be done now; return how much that was."""
        events = self.selector.select(0)
        for key, mask in events:
            key.data(mask)
        return len(events)

    def settle(self) -> None:
        """Turn until nothing is left to be done now."""
        assert any(self.turn() == 0 for _ in range(TURNS)), "it never comes to rest"

    def pass_time(self, seconds: float) -> None:
        self.server.tidy(time.monotonic() + seconds)

    def connect(self, line: bytes = b"") -> socket.socket:
        """Come in and say something, without waiting for anything."""
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.crowd.append(one)
        one.setblocking(False)
        one.connect(self.path)
        if line:
            one.sendall(line)
        return one

    def come(self, line: bytes = b"") -> socket.socket:
        """Come in, say something, and be noticed."""
        one = self.connect(line)
        self.settle()
        return one

    def close(self) -> None:
        self.server.close()
        self.selector.close()
        for one in self.crowd:
            one.close()


@pytest.fixture
def hall(tmp_path: Path) -> Iterator[Hall]:
    with closing(Hall(tmp_path / "s")) as made:
        yield made


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No moment is left to who comes in before it makes room."""
    monkeypatch.setattr(server, "PAUSE_SECONDS", 0.0)


@pytest.fixture
def small(tmp_path: Path, hasty: None) -> Iterator[Hall]:
    """Room for eight."""
    with closing(Hall(tmp_path / "s", 8)) as made:
        yield made


def said(one: socket.socket) -> bytes | None:
    """Return what is there to be read: None for nothing yet, empty for the end."""
    try:
        return one.recv(1 << 20)
    except BlockingIOError:
        return None
    except ConnectionResetError:  # it was closed with something of ours unread
        return b""


def is_over(one: socket.socket) -> bool:
    return said(one) == b""


def whole(hall: Hall, one: socket.socket) -> bytes:
    """Read to the end, with the server's help."""
    found = bytearray()
    for _ in range(TURNS):
        hall.turn()
        piece = said(one)
        if piece == b"":
            return bytes(found)
        found += piece or b""
    raise AssertionError("it has no end")


# answers


def test_a_line_that_is_there_is_answered_inline(hall: Hall) -> None:
    """One event: accepted, answered and closed; nothing is left to wait for."""
    with hall.connect(b"now\n") as one:
        assert hall.turn() == 1

        assert (said(one), said(one)) == (b"answer\n", b"")
    assert hall.server.due is None
    assert hall.turn() == 0


def test_many_that_wait_at_the_door_are_answered_in_one_go(hall: Hall) -> None:
    """All that are in the queue are answered in a few turns; each gets the whole answer."""
    crowd = [hall.connect(b"now\n") for _ in range(300)]
    assert hall.turn() + hall.turn() == 2

    assert {said(one) for one in crowd} == {b"answer\n"}


@pytest.mark.parametrize("pieces", [[b"now", b"\n"], [b"n", b"o", b"w", b"\n"], [b"now\n"]])
def test_a_line_may_come_later_and_in_pieces(hall: Hall, pieces: list[bytes]) -> None:
    """It is answered when it is complete, and is one line to whoever answers."""
    with hall.come() as one:
        for piece in pieces:
            assert said(one) is None
            one.sendall(piece)
            hall.settle()

        assert (said(one), said(one)) == (b"answer\n", b"")
    assert hall.heard == [b"now\n"]
    assert hall.server.due is None


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "line", [b"x" * (LONGEST + 1), b"x" * 100_000, b"two\nlines\n", b"one\nand", b"\n"]
)
def test_what_is_no_request_is_answered_too(hall: Hall, line: bytes, late: bool) -> None:
    """As soon as it is too long or has a newline anywhere; never more than the limit is kept."""
    with hall.come() if late else hall.connect() as one:
        one.sendall(line)
        hall.settle()

        assert said(one) == b"answer\n"
        assert is_over(one)
    [heard] = hall.heard
    assert heard == line[: LONGEST + 1]


def test_who_waits_is_answered_later(hall: Hall) -> None:
    """Any number of pieces; the last one ends it."""
    with hall.come(b"later\n") as one:
        [client] = hall.waiting
        client.send(b"wait\n")
        assert said(one) == b"wait\n"
        assert hall.server.due is None  # it may take as long as whoever answers likes
        client.send(b"answer\n", last=True)

        assert (said(one), said(one)) == (b"answer\n", b"")
        assert client.closed
        client.send(b"more\n")  # is heard by nobody
        client.close()


# time


def test_who_says_nothing_is_let_go(hall: Hall) -> None:
    """After two seconds, without a word; not before."""
    began = time.monotonic()
    with hall.come() as one:
        due = hall.server.due
        assert due is not None
        assert began + LATE_SECONDS <= due <= time.monotonic() + LATE_SECONDS

        hall.server.tidy(due - 0.01)
        assert said(one) is None
        hall.server.tidy(due)
        assert is_over(one)
    assert hall.server.due is None


def test_a_byte_at_a_time_buys_no_time(hall: Hall) -> None:
    """The time is for the whole line."""
    with hall.come() as one:
        due = hall.server.due
        for _ in range(50):
            one.sendall(b"x")
            hall.settle()
        assert hall.server.due == due


def test_the_oldest_are_let_go_first(hall: Hall) -> None:
    """Each has its own time, and who wrote a line in time is not among them."""
    first, second, third = hall.come(), hall.come(), hall.come()
    due = hall.server.due
    assert due is not None
    second.sendall(b"now\n")
    hall.settle()
    hall.server.tidy(due)
    assert is_over(first)
    assert said(second) == b"answer\n"
    assert said(third) is None
    hall.pass_time(LATE_SECONDS)
    assert is_over(third)


# those who go


def test_who_came_and_went_is_forgotten(hall: Hall) -> None:
    """Before it was accepted, before its line, within it, and while it waits for the answer."""
    hall.connect().close()
    hall.connect(b"now\n").close()
    hall.settle()
    hall.come().close()
    half = hall.come(b"no")
    half.close()
    waiting = hall.come(b"later\n")
    waiting.close()
    hall.settle()

    [client] = hall.waiting
    assert client.closed
    assert hall.server.due is None
    assert len(hall.selector.get_map()) == 1  # the door


def test_a_half_closed_connection(hall: Hall) -> None:
    """A whole line is answered all the same; half a line has no other half to wait for."""
    with hall.connect(b"now\n") as one, hall.connect(b"no") as two, hall.come() as three:
        for each in (one, two, three):
            each.shutdown(socket.SHUT_WR)
        hall.settle()

        assert (said(one), said(one)) == (b"answer\n", b"")
        assert is_over(two)
        assert is_over(three)
    assert hall.server.due is None


def test_who_goes_on_talking_is_let_go(hall: Hall) -> None:
    """One request a connection: what else is said there is not ours to read for ever."""
    with hall.come(b"later\n") as one:
        one.sendall(b"x" * 5000)
        hall.settle()

        assert is_over(one)
        assert hall.waiting[0].closed
    assert hall.heard == [b"later\n"]


def test_a_client_that_was_ended_in_the_same_turn_is_left_alone(hall: Hall) -> None:
    """Its event may already be in our hands."""
    with hall.come() as one:
        one.sendall(b"now\n")
        [(key, mask)] = hall.selector.select(0)
        hall.pass_time(LATE_SECONDS)
        key.data(mask)

        assert is_over(one)
    assert hall.heard == []


# those who do not read


@pytest.mark.parametrize("line", [b"big\n", b"later\n"])
def test_a_large_answer_is_sent_as_it_is_read(hall: Hall, line: bytes) -> None:
    """Whole, to a reader who takes its time; nobody else waits for that one."""
    with hall.come(line) as one:
        for client in hall.waiting:
            client.send(BIG, last=True)
        with hall.come(b"now\n") as other:
            assert said(other) == b"answer\n"

        assert whole(hall, one) == BIG
    assert hall.server.due is None


@pytest.mark.parametrize("line", [b"big\n", b"later\n"])
def test_who_does_not_take_its_answer_is_let_go(hall: Hall, line: bytes) -> None:
    """Two seconds after it last took something."""
    with hall.come(line) as one:
        for client in hall.waiting:
            client.send(BIG, last=True)
        first = hall.server.due
        assert first is not None
        assert said(one)
        hall.settle()
        second = hall.server.due
        assert second is not None
        assert second > first
        hall.server.tidy(second)

        left = whole(hall, one)
    assert 0 < len(left) < len(BIG)
    assert hall.server.due is None


def test_who_watches_and_does_not_read_is_let_go(hall: Hall) -> None:
    """Not by time: by what lies about for it, which is bounded."""
    with hall.come(b"later\n") as one:
        [client] = hall.waiting
        client.send(BIG)
        assert not client.closed
        assert hall.server.due is None
        client.send(BIG)
        assert client.closed
        assert set(whole(hall, one)) == {ord("b")}


def test_who_went_while_it_was_being_answered_is_forgotten(hall: Hall) -> None:
    """What was not read is dropped."""
    with hall.come(b"big\n") as one:
        assert said(one)
    hall.settle()

    assert hall.server.due is None
    assert len(hall.selector.get_map()) == 1


# room


def test_the_oldest_silent_client_makes_room(small: Hall) -> None:
    """However many are silent, who speaks is answered."""
    crowd = [small.come() for _ in range(20)]

    assert [is_over(one) for one in crowd] == [True] * 12 + [False] * 8
    with small.come() as one:
        one.sendall(b"now\n")
        small.settle()
        assert said(one) == b"answer\n"


def test_who_has_spoken_is_answered_before_it_makes_room(small: Hall) -> None:
    """Its line may lie there unread while a crowd comes in at the door."""
    honest = [small.come(), small.come(b"no")]
    for _ in range(30):  # at the door before the line is
        small.connect()
    honest[0].sendall(b"now\n")
    honest[1].sendall(b"w\n")
    small.settle()

    assert [said(one) for one in honest] == [b"answer\n"] * 2


def test_who_came_just_now_has_a_moment_to_speak(
    small: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are at the door: they wait there, and come in when somebody had its time."""
    monkeypatch.setattr(server, "PAUSE_SECONDS", LATE_SECONDS)
    inside = [small.come() for _ in range(8)]
    door = [small.come(b"now\n") for _ in range(20)]
    assert small.turn() == 0
    assert {said(one) for one in (*inside, *door)} == {None}

    inside[0].sendall(b"now\n")
    small.settle()
    assert said(inside[0]) == b"answer\n"
    small.pass_time(LATE_SECONDS)
    small.settle()
    assert {said(one) for one in door} == {b"answer\n"}


def test_who_does_not_read_makes_room_too(small: Hall) -> None:
    """It is as late as who does not speak."""
    for _ in range(20):
        small.come(b"big\n")
    with small.come() as one:
        one.sendall(b"now\n")
        small.settle()
        assert said(one) == b"answer\n"
    assert len(small.selector.get_map()) <= 9


def test_who_waits_for_us_makes_no_room(small: Hall) -> None:
    """It did nothing wrong. But a quarter of the room stays for who comes to speak."""
    waiting = [small.come(b"later\n") for _ in range(10)]

    assert [is_over(one) for one in waiting] == [False] * 6 + [True] * 4
    assert len(small.waiting) == 6
    silent = [small.come() for _ in range(5)]
    assert [is_over(one) for one in silent] == [True] * 3 + [False] * 2
    with small.come(b"now\n") as one, small.come() as late:
        late.sendall(b"now\n")
        small.settle()
        assert (said(one), said(late)) == (b"answer\n", b"answer\n")
    assert not any(client.closed for client in small.waiting)


def test_there_is_room_for_as_many_as_files_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less what the daemon needs for itself; where there is hardly any, half."""
    found = []
    for limit in (resource.RLIM_INFINITY, 1 << 20, 1024, 256, 100, 32):
        monkeypatch.setattr(resource, "getrlimit", lambda which, limit=limit: (limit, limit))
        found.append(server.room())
    assert found == [4096, 4096, 960, 192, 50, 16]


@contextmanager
def no_more_files() -> Iterator[Callable[[], None]]:
    """Have every file open that may be; what is yielded lets go of one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    with open(os.devnull, "rb") as nothing:
        resource.setrlimit(resource.RLIMIT_NOFILE, (nothing.fileno() + 32, hard))
        try:
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                for _ in range(nothing.fileno() + 33):
                    taken.append(os.dup(nothing.fileno()))
            yield lambda: os.close(taken.pop())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for one in taken:
                os.close(one)


@pytest.mark.usefixtures("hasty")
def test_without_room_for_a_file_a_silent_client_makes_it(hall: Hall) -> None:
    """One for one; those that speak are answered."""
    silent = [hall.come() for _ in range(4)]
    honest = [hall.connect(b"now\n") for _ in range(3)]
    with no_more_files():
        hall.settle()

        assert [said(one) for one in honest] == [b"answer\n"] * 3
    assert [is_over(one) for one in silent] == [True, False, False, False]


def test_without_any_room_nobody_is_accepted_for_a_moment(hall: Hall) -> None:
    """Who waits for us is kept; there is nothing to do meanwhile, and then it goes on."""
    with hall.come(b"later\n") as waiting, hall.connect(b"now\n") as honest:
        with no_more_files() as let_go:
            assert hall.turn() == 1
            assert hall.turn() == 0  # whoever is at the door: the loop does not spin
            due = hall.server.due
            assert due is not None
            assert due <= time.monotonic() + PAUSE_SECONDS
            hall.server.tidy(due - 0.01)
            assert hall.turn() == 0
            assert hall.server.due == due

            hall.server.tidy(due)  # still full
            assert hall.turn() == 1
            assert hall.turn() == 0
            let_go()
            hall.pass_time(PAUSE_SECONDS)
            hall.settle()

            assert said(honest) == b"answer\n"
            assert said(waiting) is None
        assert hall.server.due is None


def test_it_can_be_stopped_while_it_accepts_nobody(hall: Hall) -> None:
    """And listen at another socket then."""
    with hall.come(b"later\n"), hall.connect(b"now\n"):
        with no_more_files():
            hall.settle()
        hall.server.replace(listening.listen(hall.path))
        assert hall.server.due is None
        with hall.come(b"now\n") as one:
            assert said(one) == b"answer\n"


class Aborting(_socket.socket):
    """A listening socket whose first client is gone before it is accepted."""

    aborts = 1

    def _accept(self) -> tuple[int, object]:
        if self.aborts:
            self.aborts -= 1
            raise ConnectionAbortedError(errno.ECONNABORTED, "gone")
        return super()._accept()  # type: ignore[misc,no-any-return]


def test_who_goes_before_it_is_accepted_costs_nobody_anything(hall: Hall) -> None:
    """Some systems say so by an error."""
    listener = listening.listen(hall.path)
    hall.server.replace(Aborting(fileno=listener.detach()))
    with hall.connect() as silent, hall.come(b"now\n") as one:
        assert said(one) == b"answer\n"
        assert said(silent) is None


# who may ask


def test_a_stranger_is_turned_away(tmp_path: Path) -> None:
    """Without a word, whatever it says; nobody reads it."""
    with closing(Hall(tmp_path / "s", uids=frozenset({os.geteuid() + 1}))) as hall:
        for line in (b"", b"now\n", b"later\n", b"x" * 5000):
            with hall.come(line) as one:
                assert is_over(one)
        assert hall.heard == []
        assert hall.strangers == [os.geteuid()] * 4
        assert hall.server.due is None


def test_whom_the_kernel_does_not_name_is_nobody() -> None:
    """A socket that is closed, or of another kind, belongs to no user who may ask."""
    gone = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    gone.close()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as other:
        assert server.peer_uid(other) not in range(2**31)
    assert server.peer_uid(gone) == -1
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        assert server.peer_uid(left) == os.geteuid()


# the end


def test_stopped_it_accepts_nobody_and_answers_who_waits(hall: Hall) -> None:
    """The door is shut; those inside are served."""
    with hall.come(b"later\n") as one, hall.come() as late:
        hall.server.stop()
        with pytest.raises(ConnectionRefusedError):
            hall.connect()
        late.sendall(b"now\n")
        hall.settle()
        hall.waiting[0].send(b"answer\n", last=True)

        assert (said(one), said(late)) == (b"answer\n", b"answer\n")


def test_closed_everybody_is_gone(hall: Hall) -> None:
    """Whatever they were doing."""
    everybody = [hall.come(), hall.come(b"no"), hall.come(b"later\n")]
    hall.server.close()

    assert all(is_over(one) for one in everybody)
    assert len(hall.selector.get_map()) == 0


def test_another_socket_takes_the_place_of_one(hall: Hall) -> None:
    """Who was inside stays."""
    with hall.come() as late:
        hall.server.replace(listening.listen(hall.path))
        late.sendall(b"now\n")
        with hall.come(b"now\n") as one:
            assert (said(late), said(one)) == (b"answer\n", b"answer\n")


# everything at once

DEEDS = st.sampled_from(
    ["silent", "half", "speak", "later", "big", "go", "read", "shut", "answer", "time", "turn"]
)


@pytest.mark.usefixtures("hasty")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(DEEDS, st.integers(0, 30)), max_size=60))
def test_whatever_the_others_do_who_speaks_is_answered(
    tmp_path: Path, deeds: list[tuple[str, int]]
) -> None:
    """After any history there are no more clients than may be, and an honest one is served."""
    with closing(Hall(tmp_path / "s", 8)) as hall:
        for deed, number in deeds:
            _do(hall, deed, number)
            assert len(hall.selector.get_map()) <= 9
        late = hall.come()
        late.sendall(b"now\n")
        assert whole(hall, late) == b"answer\n"
        assert whole(hall, hall.connect(b"now\n")) == b"answer\n"
        hall.pass_time(2 * LATE_SECONDS)
        assert hall.server.due is None
        open_ones = [client for client in hall.waiting if not client.closed]
        assert len(hall.selector.get_map()) == 1 + len(open_ones)


def _do(hall: Hall, deed: str, number: int) -> None:
    """Come in, or do something as one of those inside."""
    lines = {"silent": b"", "half": b"no", "speak": b"now\n", "later": b"later\n", "big": b"big\n"}
    if deed in lines:
        hall.connect(lines[deed])
    elif deed == "turn":
        hall.turn()
    elif deed == "time":
        hall.pass_time(number / 10)
    elif deed == "answer" and hall.waiting:
        hall.waiting[number % len(hall.waiting)].send(BIG[: number * 30_000], last=number % 2 == 0)
    elif hall.crowd:
        one = hall.crowd[number % len(hall.crowd)]
        if deed == "go":
            one.close()
            hall.crowd.remove(one)
        elif deed == "read":
            said(one)
        elif deed == "shut":
            try:
                one.shutdown(socket.SHUT_WR)
            except OSError as error:  # the other side was first
                assert error.errno == errno.ENOTCONN
