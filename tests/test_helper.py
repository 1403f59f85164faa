"""
The helper as Claude Code runs it: a process that asks, prints one line or nothing, and ends.

There are two, the one in Python and the one in C, and one contract. What only one of them can be
asked is a test of the fixture `reference`, which is the one in Python, or in `test_native`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keybroker import asking, helper, paths
from native.build import NAME, SOURCE
from tests.canaries import Canaries
from tests.servers.unix import NOBODY, ScriptedServer, drip, hang, read

PACKAGE = Path(helper.__file__).parent
CANARIES = Canaries()
KEY = CANARIES.new("key")
OK = f"ok {KEY}\n".encode()
PRINTED = f"{KEY}\n".encode()
# What stands in for `keybroker get`, and says how it was started.
MARKER = (
    "import os, sys; "
    "print('slow', *sys.argv[1:], sys.stdin.read(), len(os.listdir('/dev/fd')), sep='|')"
)
SLOW = ("-I", "-c", MARKER, "get")


class Run(NamedTuple):
    """What a helper did."""

    status: int
    out: bytes
    err: str


class Helper:
    """
    A copy of the helper in Python, whose slow path is a marker.

    Attributes:
        folder: Short enough for a socket in it.
        socket: Where the tests' servers listen.
        interrupted: Its status after Ctrl-C.
    """

    interrupted = 130

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "keybroker" / "s"
        self.environment = {b"HOME": b"/home/me", b"XDG_RUNTIME_DIR": os.fsencode(folder)}
        self.prepare()

    def prepare(self) -> None:
        """Put the copy into the folder."""
        self.file = self.folder / "helper.py"
        shutil.copy(PACKAGE / "helper.py", self.file)
        shutil.copy(PACKAGE / "asking.py", self.folder / "asking.py")
        self.change(f"SLOW = {asking.SLOW}".replace("'", '"'), f"SLOW = {SLOW!r}")

    def change(self, old: str, new: str) -> None:
        """Change a line of the copy."""
        file = self.folder / "asking.py"
        text = file.read_text()
        assert text.count(old) == 1, old
        file.write_text(text.replace(old, new))

    def look_below(self, folder: Path) -> None:
        """Have it look for `/run/user` and `/tmp/keybroker-<uid>` below a folder."""
        self.change('RUN_USER = b"/run/user"', f"RUN_USER = {os.fsencode(folder / 'user')!r}")
        self.change('b"/tmp/keybroker-%d/s" % uid', f"{os.fsencode(folder / 'tmp' / 's')!r}")

    def be_shared(self, socket: Path) -> None:
        """Have it take a socket for that of a shared host's daemon."""
        self.change('SYSTEM = b"/run/keybroker/s"', f"SYSTEM = {os.fsencode(socket)!r}")

    def be_another(self) -> None:
        """Have it take us for somebody else."""
        self.change("(0, posix.geteuid())", f"(0, {os.geteuid() + 1})")

    def become(self, interpreter: str) -> None:
        """Have it start another interpreter for the slow path."""
        self.change("(sys.executable, [sys.executable,", f"({interpreter!r}, [{interpreter!r},")

    def command(self, *arguments: str | bytes | Path) -> list[str | bytes | Path]:
        return [sys.executable, "-IS", self.file, *arguments]

    def real(self, *arguments: str | Path) -> list[str | Path]:
        """What is installed, and no copy."""
        return [sys.executable, "-IS", PACKAGE / "helper.py", *arguments]

    def start(
        self, *arguments: str | bytes | Path, stdin: int | None = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command(*arguments),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment,
        )

    def run(self, *arguments: str | bytes | Path, stdin: int | None = subprocess.DEVNULL) -> Run:
        """Run it to its end; its arguments are the usual ones if none are given."""
        return ended(self.start(*(arguments or (self.socket, "work")), stdin=stdin))

    def request(self, environment: dict[bytes, bytes], profile: str = "work") -> bytes:
        """Return what it asks with an environment."""
        self.environment = environment
        with ScriptedServer(self.socket, read, OK) as server:
            assert self.run(self.socket, profile) == Run(0, PRINTED, "")
            return server.request()


class Native(Helper):
    """
    The helper in C, whose interpreter is a script that sees to the marker.

    Args:
        program: Compiled from the source as it is.
    """

    interrupted = -signal.SIGINT  # for a shell that is 130 too

    def __init__(self, folder: Path, program: Path) -> None:
        self.program = self.installed = program
        super().__init__(folder)

    def prepare(self) -> None:
        """Write the script, which takes nothing but the real slow path's arguments."""
        self.python = str(self.folder / "python")
        options = " ".join(asking.SLOW[:3])
        Path(self.python).write_text(
            f"#!/bin/sh\n[ \"$1 $2 $3\" = '{options}' ] && shift 3 || exit 1\n"
            f'exec {sys.executable} -I -c "{MARKER}" "$@"\n'
        )
        Path(self.python).chmod(0o700)

    def change(self, *changes: tuple[str, str]) -> None:  # type: ignore[override]
        """Compile it anew, with some texts changed."""
        text = SOURCE.read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        source = self.folder / "key.c"
        source.write_text(text)
        self.program = self.folder / NAME
        subprocess.run(["cc", "-w", "-o", self.program, source], check=True, timeout=60)

    def look_below(self, folder: Path) -> None:
        self.change(
            ('"/run/user/%u', f'"{folder}/user/%u'), ('"/tmp/keybroker-%u/s"', f'"{folder}/tmp/s"')
        )

    def be_shared(self, socket: Path) -> None:
        self.change(('"/run/keybroker/s"', f'"{socket}"'))

    def be_another(self) -> None:
        self.change(("owner[1] != geteuid()", "owner[1] != geteuid() + 1"))

    def become(self, interpreter: str) -> None:
        self.python = interpreter

    def command(self, *arguments: str | bytes | Path) -> list[str | bytes | Path]:
        after = [self.python] if len(arguments) > 1 else []
        return [self.program, *arguments, *after]

    def real(self, *arguments: str | Path) -> list[str | Path]:
        return [self.installed, *arguments, sys.executable]


def ended(process: subprocess.Popen[bytes]) -> Run:
    """Wait for a helper; no secret is ever on its stderr."""
    out, err = process.communicate(timeout=60)
    assert CANARIES.seen_in(err) == []
    return Run(process.returncode, out, err.decode("utf-8", "replace"))


Make = Callable[[Path], Helper]


@pytest.fixture(scope="session", params=["python", "native"])
def make(request: pytest.FixtureRequest, native_helper: Path) -> Make:
    """What makes a helper in a folder, of the one kind and of the other."""
    return Helper if request.param == "python" else lambda folder: Native(folder, native_helper)


@pytest.fixture
def it(make: Make) -> Iterator[Helper]:
    """A helper of either kind, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="kb-") as folder:
        yield make(Path(folder))


@pytest.fixture
def reference() -> Iterator[Helper]:
    """The helper in Python, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="kb-") as folder:
        yield Helper(Path(folder))


def slow_path(*profile: str) -> Run:
    """
    What a helper did that went the slow way: nothing but becoming that.

    With `--nobody` first, nobody was there to ask; else somebody did not answer, and it says so.
    """
    descriptors = 4  # the three, and the folder's that lists them
    nobody = profile[:1] == ("--nobody",)
    profile = profile[1:] if nobody else ("--unanswered", *profile)
    return Run(0, "|".join(["slow", "get", *profile, "", f"{descriptors}\n"]).encode(), "")


# a key


def test_a_key_is_printed_and_nothing_else(it: Helper) -> None:
    """With a newline, and status 0. The request says who asks."""
    with ScriptedServer(it.socket, read, OK) as server:
        assert it.run() == Run(0, PRINTED, "")
        assert server.request() == b"1 get work %d 0 /home/me/.claude\n" % os.getpid()


@pytest.mark.parametrize("arguments", [[], ["-"]], ids=["none", "dash"])
def test_without_a_profile_the_default_one_is_asked_for(it: Helper, arguments: list[str]) -> None:
    """In the daemon's words it is a dash."""
    with ScriptedServer(it.socket, read, OK) as server:
        assert it.run(it.socket, *arguments) == Run(0, PRINTED, "")
        assert server.request().split()[2] == b"-"


def test_a_dash_is_the_usual_socket(it: Helper) -> None:
    """So that settings can go to a machine where the folder has another name."""
    with ScriptedServer(it.socket, read, OK):
        assert it.run("-", "work") == Run(0, PRINTED, "")


@pytest.mark.parametrize(
    "pieces",
    [
        (b"wait\n", OK),
        (b"w", b"ait", b"\n", OK[:1], OK[1:-1], b"\n"),
        (b"wait\n" + OK[:20], OK[20:]),
        tuple(bytes([one]) for one in OK),
        (b"wait\n" + OK,),
    ],
    ids=["wait", "split", "across", "bytes", "together"],
)
def test_an_answer_may_come_in_pieces(it: Helper, pieces: tuple[bytes, ...]) -> None:
    """However they are cut, and with a wait before them."""
    with ScriptedServer(it.socket, read, *pieces):
        assert it.run() == Run(0, PRINTED, "")


def test_the_longest_key_is_printed_whole(it: Helper) -> None:
    """An answer of 16,400 bytes; one that is longer is none."""
    longest = b"k" * (asking.LONGEST_REPLY - len(b"ok \n"))
    with ScriptedServer(it.socket, read, b"ok " + longest + b"\n"):
        assert it.run() == Run(0, longest + b"\n", "")
    with ScriptedServer(it.socket, read, b"ok " + longest + b"k" * 20 + b"\n"):
        assert it.run() == slow_path("work")


def test_stdin_is_not_read(it: Helper) -> None:
    """The client's never ends. The slow path gets one that does."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with ScriptedServer(it.socket, read, OK):
            assert it.run(stdin=theirs.fileno()) == Run(0, PRINTED, "")
        assert it.run(stdin=theirs.fileno()) == slow_path("--nobody", "work")


def test_a_key_is_in_no_argument_and_no_environment(it: Helper) -> None:
    """Not while it is asked for, and not of what comes when the answer breaks off."""
    with ScriptedServer(it.socket, read, b"wait\n" + OK[:-1], hang) as server:
        process = it.start(it.socket, "work")
        server.hanging.get(timeout=60)
        shown = subprocess.run(
            ["ps", "eww", "-p", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout
        process.kill()
        killed = ended(process)

    assert any(name in shown for name in ("helper.py", NAME))
    assert CANARIES.seen_in(shown) == []
    assert killed == Run(-signal.SIGKILL, b"", "")
    with ScriptedServer(it.socket, read, OK[:-1]):
        assert CANARIES.seen_in(it.run().out) == []


# who asks


@pytest.mark.parametrize("through", ["exec {}", "{}; exit $?"])
def test_the_request_names_the_session(it: Helper, through: str) -> None:
    """The parent: with `exec` the client itself, else the shell that the daemon skips."""
    command = through.format(shlex.join(map(str, it.command(it.socket, "work"))))
    with ScriptedServer(it.socket, read, OK) as server:
        shell = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE)
        out, _ = shell.communicate(timeout=60)
        parent = os.getpid() if through.startswith("exec") else shell.pid

        assert (shell.returncode, out) == (0, PRINTED)
        assert server.request().split()[3] == b"%d" % parent


CLIENT = {b"CLAUDE_CODE_ENTRYPOINT": b"sdk-cli"}
TTL = b"CLAUDE_CODE_API_KEY_HELPER_TTL_MS"


@pytest.mark.parametrize(
    ("environment", "ttl"),
    [
        ({}, b"0"),
        (CLIENT, b"300000"),
        ({TTL: b"60000"}, b"60000"),
        ({TTL: b"60000", **CLIENT}, b"60000"),
        ({TTL: b"0", **CLIENT}, b"0"),
        *(
            ({TTL: strange, **CLIENT}, b"300000")
            for strange in (b"", b"-5", b"1e3", b" 2000 ", b"abc", b"0x3e8", b"9" * 400, b"1 2")
        ),
        ({TTL: "٣".encode()}, b"0"),
        ({TTL: b"1\n2"}, b"0"),
    ],
)
def test_the_request_says_how_often_the_client_asks(
    it: Helper, environment: dict[bytes, bytes], ttl: bytes
) -> None:
    """What it was told, if that is a plain number; else what it does by itself."""
    assert it.request(environment).split()[4] == ttl


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({}, b""),
        ({b"HOME": b""}, b""),
        ({b"HOME": b"home"}, b""),
        ({b"HOME": b"/home/me"}, b" /home/me/.claude"),
        ({b"HOME": b"/h", b"CLAUDE_CONFIG_DIR": b""}, b" /h/.claude"),
        ({b"HOME": b"/h", b"CLAUDE_CONFIG_DIR": b"/else where/"}, b" /else where/"),
        ({b"HOME": b"/h", b"CLAUDE_CONFIG_DIR": b"relative"}, b""),
        ({b"HOME": b"/h", b"CLAUDE_CONFIG_DIR": b"/two\nlines"}, b""),
        ({b"HOME": b"/h\xff\xe4"}, b" /h\xff\xe4/.claude"),
        ({b"HOME": b"/" + b"h" * 2000}, b""),
    ],
)
def test_the_request_names_the_client_s_folder(
    it: Helper, environment: dict[bytes, bytes], folder: bytes
) -> None:
    """As it is in the file system; one that would break the line is left out."""
    assert it.request(environment, "-") == b"1 get - %d 0%b\n" % (os.getpid(), folder)


@pytest.mark.parametrize("named", [b"CLAUDE_CONFIG_DIR", b"HOME"])
def test_a_request_is_filled_to_its_last_byte(it: Helper, named: bytes) -> None:
    """The longest folder that has room in 1,024 bytes is named, the next is not."""
    rest = b"1 get work %d 0" % os.getpid()
    below = b"/.claude" if named == b"HOME" else b""
    longest = b"/" + b"f" * (asking.LONGEST_REQUEST - len(rest) - len(below) - 3)
    filled = it.request({named: longest})

    assert filled == b"%b %b%b\n" % (rest, longest, below)
    assert len(filled) == asking.LONGEST_REQUEST
    assert it.request({named: longest + b"f"}) == rest + b"\n"


def test_bytes_that_are_no_text_go_as_they_are(it: Helper) -> None:
    """In the client's folder, and in the path of the socket in whatever locale."""
    folder = os.fsencode(it.folder) + b"/\xe4\xff"
    path = Path(os.fsdecode(folder)) / "keybroker" / "s"
    it.environment |= {b"XDG_RUNTIME_DIR": folder, b"HOME": b"/\xff", b"LC_ALL": b"C"}
    path.parent.parent.mkdir(mode=0o700)
    with ScriptedServer(path, read, OK) as server:
        assert it.run("-", "work") == Run(0, PRINTED, "")
        assert it.run(os.fsencode(path), "work") == Run(0, PRINTED, "")
        assert server.request().endswith(b" /\xff/.claude\n")


# where it asks


@pytest.mark.parametrize("made", [None, "folder", "file", "link"])
@pytest.mark.parametrize("runtime", [None, "", "run", "/run/user/7", "/a/", "/with blank/ä"])
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_it_looks_where_the_daemon_listens(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: str | None,
    runtime: str | None,
    platform: str,
) -> None:
    """The reference finds the same place as `paths`, though it shares nothing with it."""
    place = tmp_path / str(os.geteuid())
    if made == "folder":
        place.mkdir()
    elif made == "file":
        place.touch()
    elif made == "link":
        place.symlink_to(tmp_path)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(paths, "RUN_USER", str(tmp_path))
    monkeypatch.setattr(asking, "RUN_USER", os.fsencode(tmp_path))
    environment = {"HOME": "/home/me"} | ({} if runtime is None else {"XDG_RUNTIME_DIR": runtime})

    found = asking.find({os.fsencode(k): os.fsencode(v) for k, v in environment.items()})

    assert Path(os.fsdecode(found)) == paths.runtime_directory(environment) / paths.SOCKET


@pytest.mark.parametrize("runtime", [None, b"", b"run"])
@pytest.mark.parametrize("made", [None, "folder", "file", "link", "another's"])
def test_it_asks_in_a_folder_that_is_ours(
    it: Helper, made: str | None, runtime: bytes | None
) -> None:
    """The user's own of the system, or the one below `/tmp`."""
    it.look_below(it.folder)
    it.environment = {} if runtime is None else {b"XDG_RUNTIME_DIR": runtime}
    place = it.folder / "user" / str(os.geteuid())
    place.parent.mkdir()
    if made in ("folder", "another's"):
        place.mkdir()
    elif made == "file":
        place.touch()
    elif made == "link":
        place.symlink_to(it.folder)
    if made == "another's":
        if os.geteuid() != 0:
            return  # nobody else makes folders there but root
        os.chown(place, NOBODY, -1)
    where = place / "keybroker" / "s" if made == "folder" else it.folder / "tmp" / "s"
    with ScriptedServer(where, read, OK):
        assert it.run("-", "work") == Run(0, PRINTED, "")


def test_the_two_know_the_same_folder() -> None:
    """`asking` repeats it, since it can import nothing of ours."""
    assert os.fsdecode(asking.RUN_USER) == paths.RUN_USER


# why there is none


@pytest.mark.parametrize("status", [64, 69, 70, 74, 75, 77, 78])
def test_an_error_is_said_with_its_status(it: Helper, status: int) -> None:
    """One line on stderr, nothing on stdout."""
    text = "keybroker: litellm: https://llm.example.com could not be reached; type: keybroker ü"
    with ScriptedServer(it.socket, read, f"error {status} {text}\n".encode()):
        assert it.run() == Run(status, b"", f"{text}\n")


def test_a_daemon_of_another_version_says_so(it: Helper) -> None:
    """It answers, and knows better than the slow path what to do."""
    text = "keybroker: the daemon speaks version 2; type: keybroker service install"
    with ScriptedServer(it.socket, read, f"error 69 {text}\n".encode()):
        assert it.run() == Run(69, b"", f"{text}\n")


@pytest.mark.parametrize("strange", ["0", "1", "63", "79", "255", "077", "-75", "x", "7५", "²"])
def test_an_error_with_a_strange_status_is_not_forgotten(it: Helper, strange: str) -> None:
    """Never 0, and never what a shell or a signal would mean."""
    with ScriptedServer(it.socket, read, f"error {strange} keybroker: why\n".encode()):
        assert it.run() == Run(69, b"", "keybroker: why\n")


@pytest.mark.parametrize(("length", "said"), [(200, "ä" * 200), (201, "ä" * 199 + "…")])
def test_an_error_is_cut_to_a_line_that_can_be_shown(it: Helper, length: int, said: str) -> None:
    """Characters, not bytes."""
    with ScriptedServer(it.socket, read, f"error 75 {'ä' * length}\n".encode()):
        assert it.run() == Run(75, b"", f"{said}\n")


# nobody

STRANGE = {
    "nothing": b"",
    "no newline": OK[:-1],
    "half a key": OK[:20],
    "only wait": b"wait\n",
    "wait and half": b"wait\n" + OK[:20],
    "wait twice": b"wait\nwait\n" + OK,
    "no key": b"ok\n",
    "empty key": b"ok \n",
    "blank in it": b"ok a b\n",
    "blank before it": b"ok  a\n",
    "return after it": b"ok a\r\n",
    "control in it": b"ok a\x7fb\n",
    "not ASCII": b"ok \xc3\xa4\n",
    "zero": b"ok a\0b\n",
    "two keys": b"ok a\nok b\n",
    "more after it": b"ok a\nb",
    "another word": b"OK a\n",
    "a longer word": b"okay a\n",
    "an empty line": b"\n" + OK,
    "no status": b"error\n",
    "no text": b"error 75\n",
    "empty text": b"error 75 \n",
    "text that steers": b"error 75 \x1b[2J\n",
    "text in two lines": b"error 75 a\nb\n",
    "HTTP": b"HTTP/1.1 200 OK\r\n\r\n",
    "endless": b"ok " + b"a" * 20_000,
    "endless lines": b"a\n" * 10_000,
}


@pytest.mark.parametrize("reply", STRANGE.values(), ids=STRANGE.keys())
def test_a_strange_answer_is_none(it: Helper, reply: bytes) -> None:
    """It becomes the slow path, and nothing of the answer is seen."""
    with ScriptedServer(it.socket, read, reply):
        assert it.run() == slow_path("work")


def test_a_server_that_does_not_listen_to_us_is_none(it: Helper) -> None:
    """It closes before it has read anything, as the daemon does with strangers."""
    with ScriptedServer(it.socket, lambda *_: None):
        assert it.run() == slow_path("work")


@pytest.mark.parametrize("what", ["no folder", "no socket", "a file", "a folder", "a dead socket"])
def test_nobody_is_there(it: Helper, what: str) -> None:
    """Whatever is in the socket's place. The default profile stays the default one."""
    if what != "no folder":
        it.socket.parent.mkdir()
    if what == "a file":
        it.socket.touch()
    elif what == "a folder":
        it.socket.mkdir()
    elif what == "a dead socket":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(it.socket))

    assert it.run() == slow_path("--nobody", "work")
    assert it.run(it.socket, "-") == slow_path("--nobody")


def test_the_socket_of_a_shared_host_is_asked_about_by_its_name(it: Helper) -> None:
    """Then `get` asks the daemon of the system too, and starts none; under `-` it is one's own."""
    it.be_shared(it.socket)
    assert it.run() == slow_path("--nobody", "--system", "work")
    assert it.run(it.socket, "-") == slow_path("--nobody", "--system")
    assert it.run("-", "work") == slow_path("--nobody", "work")
    with ScriptedServer(it.socket, read, b"what\n"):
        assert it.run() == slow_path("--nobody", "--system", "work")
        assert it.run("-", "work") == slow_path("work")


def test_a_path_that_no_socket_can_have_is_nobody(it: Helper) -> None:
    """Named, or found in the environment."""
    long = os.fsencode(it.folder) + b"/" + b"a" * 200
    it.environment[b"XDG_RUNTIME_DIR"] = long

    assert it.run(long + b"/s", "work") == slow_path("work")
    assert it.run("-", "work") == slow_path("work")


@pytest.mark.parametrize("environment", [{}, {b"XDG_RUNTIME_DIR": b"run"}])
def test_an_empty_environment_is_enough(it: Helper, environment: dict[bytes, bytes]) -> None:
    """Without a home, and without the folder of a session."""
    it.environment = environment
    it.look_below(it.folder)
    with ScriptedServer(it.folder / "tmp" / "s", read, OK) as server:
        assert it.run("-", "work") == Run(0, PRINTED, "")
        assert server.request() == b"1 get work %d 0\n" % os.getpid()


def test_a_stranger_s_answer_is_none(it: Helper) -> None:
    """Somebody else listens where we look; the request is not even sent."""
    if os.geteuid() == 0:
        server = ScriptedServer(it.socket, read, OK, uid=NOBODY)
    else:  # who listens is we: then it is the helper that has to be somebody else
        server = ScriptedServer(it.socket, read, OK)
        it.be_another()
    with server:
        assert it.run() == slow_path("work")
        assert server.request() == b""


def test_what_we_and_what_root_say_counts(
    reference: Helper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon of the system answers for root; our own answers for us."""
    it = reference
    ours = NOBODY if os.geteuid() == 0 else os.geteuid()
    with ScriptedServer(it.socket, read, OK, uid=NOBODY if os.geteuid() == 0 else None):
        monkeypatch.setattr("posix.geteuid", lambda: ours)
        assert asking.ask(os.fsencode(it.socket), b"1 get - 0 0\n") == OK[:-1]
        monkeypatch.setattr("posix.geteuid", lambda: ours + 1)
        with pytest.raises(PermissionError):
            asking.ask(os.fsencode(it.socket), b"1 get - 0 0\n")
    monkeypatch.undo()
    if os.geteuid() == 0:
        monkeypatch.setattr("posix.geteuid", lambda: NOBODY)
        with ScriptedServer(it.socket, read, OK):
            assert asking.ask(os.fsencode(it.socket), b"1 get - 0 0\n") == OK[:-1]


def test_where_the_kernel_does_not_say_who_listens_the_folder_does(
    reference: Helper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ours, and nobody else can put a socket there."""
    it = reference
    monkeypatch.setattr(asking, "PEER", None)
    path, us = os.fsencode(it.socket), os.geteuid()
    with ScriptedServer(it.socket, read, OK):
        assert asking.ask(path, b"1 get - 0 0\n") == OK[:-1]
        for mode in (0o770, 0o702, 0o777, 0o1777):
            it.socket.parent.chmod(mode)
            with pytest.raises(PermissionError):
                asking.ask(path, b"1 get - 0 0\n")
        it.socket.parent.chmod(0o700)
        if us == 0:
            os.chown(it.socket.parent, NOBODY, -1)
        else:
            monkeypatch.setattr("posix.geteuid", lambda: us + 1)
        with pytest.raises(PermissionError):
            asking.ask(path, b"1 get - 0 0\n")


# time


def test_a_silent_daemon_is_waited_for_and_then_left(it: Helper) -> None:
    """
    Two seconds until it says anything, eight in all; however it is silent.

    One answer comes later than any of that and is not printed.
    """
    silent = {
        "never lets in": (),
        "full queue": (),
        "lets in": (hang,),
        "reads": (read, hang),
        "half a wait": (read, b"wai", hang),
        "wait": (read, b"wait\n", hang),
        "half a key": (read, OK[:10], hang),
        "drips": (read, drip),
    }
    with ExitStack() as stack, ThreadPoolExecutor(len(silent)) as threads:
        servers = {
            name: stack.enter_context(ScriptedServer(it.folder / f"{at}", *steps))
            for at, (name, steps) in enumerate(silent.items())
        }
        servers["full queue"].fill(stack)

        def timed(name: str) -> tuple[Run, float]:
            start = time.monotonic()
            return it.run(servers[name].path, "work"), time.monotonic() - start

        found = dict(zip(silent, threads.map(timed, silent), strict=True))

    assert {name: run for name, (run, _) in found.items()} == dict.fromkeys(
        silent, slow_path("work")
    )
    short = {"never lets in", "full queue", "lets in", "reads"}
    assert {name for name, (_, seconds) in found.items() if 2 <= seconds < 8} == short
    assert {
        name for name, (_, seconds) in found.items() if 8 <= seconds < 14
    } == silent.keys() - short


def test_a_full_queue_is_tried_again(reference: Helper, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many ask at once that the daemon's queue has no room for a moment."""
    with ScriptedServer(reference.socket) as server, ExitStack() as stack:
        server.fill(stack)
        waits: list[float] = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 3:
                server.accept()

        clock = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
        monkeypatch.setattr(asking, "time", clock)
        asking.connect(os.fsencode(reference.socket), time.monotonic() + 2).close()

    assert len(waits) == 3


def test_who_finds_a_full_queue_gets_a_key_when_it_has_room(it: Helper) -> None:
    """It is let in last, after all who were there before."""
    with ScriptedServer(it.socket) as server, ExitStack() as stack:
        server.fill(stack)
        process = it.start(it.socket, "work")
        server.over.wait(0.5)
        assert process.poll() is None
        server.serve(read, OK)

        assert ended(process) == Run(0, PRINTED, "")


def test_a_key_after_a_long_wait_is_printed(it: Helper) -> None:
    """The daemon said that it needs the network: more than the two seconds are due to it."""

    def mint(server: ScriptedServer, _client: socket.socket) -> None:
        server.over.wait(3)

    with ScriptedServer(it.socket, read, b"wait\n", mint, OK):
        assert it.run() == Run(0, PRINTED, "")


def test_an_interrupt_ends_it_without_a_word(it: Helper) -> None:
    """Ctrl-C goes to the whole group; a traceback would be shown to people."""
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs behind & ignores it
    try:
        with ScriptedServer(it.socket, read, b"wait\n", hang) as server:
            process = it.start(it.socket, "work")
            server.hanging.get(timeout=60)
            process.send_signal(signal.SIGINT)

            assert ended(process) == Run(it.interrupted, b"", "")
    finally:
        signal.signal(signal.SIGINT, ours)


def test_a_daemon_that_dies_in_the_middle_is_none(it: Helper) -> None:
    """Killed after `wait`, after half a key: its socket is closed by the system."""
    program = (
        "import os, signal, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(flush=True)\n"
        "c = s.accept()[0]; c.recv(1024); c.sendall(os.fsencode(sys.argv[2]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    for at, said in enumerate(("wait\n", f"wait\nok {KEY[:20]}", "ok ")):
        path = it.folder / f"{at}"
        with subprocess.Popen(
            [sys.executable, "-c", program, path, said], stdout=subprocess.PIPE
        ) as daemon:
            assert daemon.stdout is not None
            daemon.stdout.readline()
            run = it.run(path, "work")

        assert (daemon.returncode, run) == (-signal.SIGKILL, slow_path("work"))


# output


def test_a_reader_that_went_away_is_said(it: Helper) -> None:
    """Status 74 and a line; SIGPIPE ends nobody."""
    reading, writing = os.pipe()
    os.close(reading)
    with ScriptedServer(it.socket, read, OK), os.fdopen(writing, "wb") as gone:
        done = subprocess.run(
            it.command(it.socket, "work"),
            stdout=gone,
            stderr=subprocess.PIPE,
            env=it.environment,
            timeout=60,
        )

    assert done.returncode == 74
    assert done.stderr == b"keybroker: output: the key cannot be written\n"


def shell(it: Helper, redirection: str) -> Run:
    """Run the helper with some of its descriptors elsewhere."""
    command = f"{shlex.join(map(str, it.command(it.socket, 'work')))} {redirection}"
    return ended(
        subprocess.Popen(
            ["sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={os.fsdecode(k): os.fsdecode(v) for k, v in it.environment.items()},
        )
    )


def test_a_closed_stdout_is_not_taken_for_the_daemon(it: Helper) -> None:
    """The connection would be given its number, and the key be written back to the daemon."""
    with ScriptedServer(it.socket, read, OK) as server:
        assert shell(it, ">&-") == Run(74, b"", "keybroker: output: stdout is closed\n")
        assert server.requests.empty()


def test_a_closed_stdin_or_stderr_is_no_obstacle(it: Helper) -> None:
    """The key is printed; an error has its status all the same."""
    with ScriptedServer(it.socket, read, OK):
        assert shell(it, "<&-") == Run(0, PRINTED, "")
        assert shell(it, "2>&-") == Run(0, PRINTED, "")
    with ScriptedServer(it.socket, read, b"error 75 keybroker: why\n"):
        assert shell(it, "2>&-") == Run(75, b"", "")
        assert shell(it, "<&- 2>&-") == Run(75, b"", "")
    assert shell(it, "<&-") == slow_path("--nobody", "work")


def test_a_full_disk_is_said(it: Helper) -> None:
    """Nothing of the key is left for anybody to take for one."""
    with ScriptedServer(it.socket, read, OK):
        assert shell(it, ">/dev/full") == Run(74, b"", WRITTEN_NOT)


@pytest.mark.parametrize("drained", [True, False])
def test_a_reader_that_is_slow_gets_the_whole_key(it: Helper, drained: bool) -> None:
    """Its pipe is full and takes pieces; for two seconds it is tried again."""
    key = b"k" * 16_000
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    filled = 0
    try:
        while True:
            filled += os.write(writing, b"x" * 1024)
    except BlockingIOError:
        pass
    with ScriptedServer(it.socket, read, b"ok " + key + b"\n") as server:
        process = subprocess.Popen(
            it.command(it.socket, "work"),
            stdout=writing,
            stderr=subprocess.PIPE,
            env=it.environment,
        )
        server.request()
        with os.fdopen(reading, "rb") as reader:
            if drained:
                os.close(writing)
                found = reader.read()
            assert ended(process).err == ("" if drained else WRITTEN_NOT)
            if not drained:
                os.close(writing)
                found = reader.read()

    assert process.returncode == (0 if drained else 74)
    assert found == b"x" * filled + (key + b"\n" if drained else b"")


WRITTEN_NOT = "keybroker: output: the key cannot be written\n"


# what it is given


BAD: dict[str, Sequence[str | bytes]] = {
    "nothing": [],
    "no socket": [""],
    "relative": ["s", "work"],
    "an option": ["--help"],
    "too many": ["-", "work", "more", "more"],
    "no name": ["-", ""],
    "capitals": ["-", "Work"],
    "a blank": ["-", "work 0 0"],
    "a newline": ["-", "work 0 0\n1 get other"],
    "a dash before": ["-", "-work"],
    "a line before": ["-", "_work"],
    "an option's name": ["-", "--help"],
    "long": ["-", "a" * 33],
    "not ASCII": ["-", "wörk"],
    "no text": ["-", b"\xff"],
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD.keys())
def test_bad_usage_is_said_and_nobody_is_asked(
    it: Helper, arguments: Sequence[str | bytes]
) -> None:
    """Status 2 and one line that does not repeat what may be a secret in the wrong place."""
    with ScriptedServer(it.socket, read, OK) as server:
        run = ended(it.start(*arguments))
        assert server.requests.empty()

    assert run == Run(
        2, b"", "keybroker: helper: needs a socket's path or -, and a profile's name\n"
    )


@pytest.mark.parametrize("name", ["a", "0", "a" * 32, "work-2_b"])
def test_every_name_of_a_profile_is_one(it: Helper, name: str) -> None:
    """As the configuration has them."""
    with ScriptedServer(it.socket, read, OK) as server:
        assert it.run(it.socket, name) == Run(0, PRINTED, "")
        assert server.request().split()[2] == name.encode()


# how it runs


def test_a_folder_or_an_environment_cannot_change_what_it_does(reference: Helper) -> None:
    """The client runs it in a project's folder, with all that a project's settings set."""
    it = reference
    trap = it.folder / "trap"
    trap.mkdir()
    for name in ("asking", "helper", "posix", "sys", "time", "_socket", "socket", "sitecustomize"):
        (trap / f"{name}.py").write_text("raise SystemExit('trapped')")
    with ScriptedServer(it.socket, read, OK):
        done = subprocess.run(
            it.command(it.socket, "work"),
            cwd=trap,
            env={
                **it.environment,
                **dict.fromkeys((b"PYTHONPATH", b"PYTHONHOME"), os.fsencode(trap)),
                b"PYTHONINSPECT": b"1",
                b"PYTHONVERBOSE": b"1",
                b"PYTHONSTARTUP": os.fsencode(trap / "asking.py"),
            },
            capture_output=True,
            timeout=60,
        )

    assert (done.returncode, done.stdout, done.stderr) == (0, PRINTED, b"")


def test_it_loads_next_to_nothing(reference: Helper) -> None:
    """What the bare interpreter has not loaded by itself is `_socket`, and its own second file."""
    it = reference

    def imported(*arguments: str | Path) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-IS", "-X", "importtime", *arguments],
            capture_output=True,
            text=True,
            env=it.environment,
            timeout=60,
        )
        lines = done.stderr.splitlines()[1:]
        return {line.rpartition("|")[2].strip() for line in lines}

    with ScriptedServer(it.socket, read, OK):
        found = imported(it.file, it.socket, "work")

    assert found - imported("-c", "pass") == {"_socket"}


def test_it_is_compiled_once(reference: Helper) -> None:
    """The second file is; where nothing can be kept it works all the same."""
    it = reference
    with ScriptedServer(it.socket, read, OK):
        it.run()
        kept = sorted((it.folder / "__pycache__").iterdir())
        first = [(path.name, path.stat().st_mtime_ns) for path in kept]
        it.run()
        again = [(path.name, path.stat().st_mtime_ns) for path in kept]
        shutil.rmtree(it.folder / "__pycache__")
        (it.folder / "__pycache__").touch()
        run = it.run()

    assert [name for name, _ in first] == [f"asking.{sys.implementation.cache_tag}.pyc"]
    assert again == first
    assert run == Run(0, PRINTED, "")


def test_it_runs_by_a_relative_path_too(reference: Helper) -> None:
    """The second file is beside the first, wherever that is."""
    it = reference
    with ScriptedServer(it.socket, read, OK):
        for folder, file in (
            (it.folder, "helper.py"),
            (it.folder.parent, f"{it.folder.name}/helper.py"),
        ):
            done = subprocess.run(
                [sys.executable, "-IS", file, it.socket, "work"],
                cwd=folder,
                env=it.environment,
                capture_output=True,
                timeout=60,
            )
            assert (done.returncode, done.stdout, done.stderr) == (0, PRINTED, b"")


def test_an_interpreter_that_moved_is_the_shell_s_to_say(it: Helper) -> None:
    """127 and its line; nothing of ours runs."""
    command = shlex.join(["/nowhere/bin/it", *map(str, it.command(it.socket, "work")[1:])])
    done = subprocess.run(["sh", "-c", f"exec {command}"], capture_output=True, timeout=60)

    assert (done.returncode, done.stdout) == (127, b"")
    assert b"/nowhere/bin/it" in done.stderr


# the slow path


@pytest.mark.parametrize("executable", ["/nowhere/bin/python", ""])
def test_a_slow_path_that_cannot_be_taken_is_said(it: Helper, executable: str) -> None:
    """The interpreter is being replaced, or does not know where it is."""
    it.become(executable)

    assert it.run() == Run(
        69, b"", "keybroker: helper: nobody answers, and keybroker get cannot be started\n"
    )


def test_the_slow_path_is_keybroker_get(it: Helper) -> None:
    """The real one: without a configuration it says so, in one line and with its status."""
    done = subprocess.run(
        it.real(it.socket, "work"),
        env={"HOME": str(it.folder), "PATH": os.defpath},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (78, "", 1)
    assert done.stderr.startswith("keybroker: ")


# anything


@settings(max_examples=60)
@given(
    reply=st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda word, rest, end: word + rest + end,
            st.sampled_from([b"ok ", b"error ", b"error 75 ", b"wait\n", b"wait\nok ", b""]),
            st.one_of(st.binary(max_size=40), st.text("ab \r\n\0é", max_size=9).map(str.encode)),
            st.sampled_from([b"", b"\n", b"\n\n"]),
        ),
    )
)
def test_whatever_is_answered_at_most_one_good_line_is_printed(make: Make, reply: bytes) -> None:
    """One visible token with status 0; or nothing, with one line of at most 200 characters."""
    with tempfile.TemporaryDirectory(prefix="kb-") as folder:
        it = make(Path(folder))
        with ScriptedServer(it.socket, read, reply):
            run = it.run()
    if run == slow_path("work"):
        return
    if run.status == 0:
        key = run.out.decode("ascii")
        assert reply.removeprefix(b"wait\n") == f"ok {key}".encode()
        assert key.endswith("\n")
        assert len(key.split()) == 1
        assert key[:-1].isprintable()
        assert run.err == ""
    else:
        assert 64 <= run.status <= 78
        assert run.out == b""
        assert run.err.endswith("\n")
        if isinstance(it, Native):  # it has no table of what can be seen
            assert "Cc" not in map(unicodedata.category, run.err[:-1])
        else:
            assert run.err[:-1].isprintable()
        assert 0 < len(run.err[:-1]) <= 200
