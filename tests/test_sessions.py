"""A session is one run of a client; one that asks again too soon is suspicious."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keybroker import sessions
from keybroker.sessions import EARLY, MOST_SESSIONS, SHELLS, Session, Sessions, identify

LINUX = sys.platform == "linux"
ME = Session(4711, 100, "claude")
OTHER = Session(4712, 100, "claude")
TTL_MS = 60_000


# who asks


@contextmanager
def running(command: Sequence[str | Path]) -> Iterator[tuple[int, int]]:
    """Run what prints a pid and waits for its input to end; yield its own pid and that one."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        printed = int(process.stdout.readline())
        yield process.pid, printed


WAIT = "echo $$; read line; :"  # the colon keeps a shell from becoming its last command


def started(pid: int) -> int:
    """Return when a process began, by another way than the one that is tested."""
    if not LINUX:
        return 0
    line = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    return int(line[line.rindex(")") + 2 :].split(" ")[19])


def test_a_client_is_found_by_its_pid_and_start() -> None:
    """As the system tells them, the same at each ask; another process is another session."""
    program = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
    with (
        running([sys.executable, "-c", program]) as (one, _),
        running([sys.executable, "-c", program]) as (two, _),
    ):
        first, second = identify(one), identify(two)

        assert first is not None
        assert (first.pid, first.started) == (one, started(one))
        assert first == identify(one)
        assert second != first
        assert first.name == (Path(f"/proc/{one}/comm").read_text().strip() if LINUX else "?")


def test_a_shell_is_skipped() -> None:
    """Debian's sh stays between the client and its helper."""
    with running(["sh", "-c", WAIT]) as (shell, _):
        session = identify(shell)

        assert session is not None
        assert session.pid == (os.getpid() if LINUX else shell)
        assert session.started == started(session.pid)


def test_only_one_shell_is_skipped() -> None:
    """A client that was itself started from a shell's script is not skipped with it."""
    with running(["sh", "-c", f"sh -c '{WAIT}'; :"]) as (outer, inner):
        session = identify(inner)

        assert inner != outer
        assert session is not None
        assert session.pid == (outer if LINUX else inner)
        assert session.name == ("sh" if LINUX else "?")


@pytest.mark.parametrize("name", sorted(SHELLS))
def test_every_shell_is_known_by_its_name(tmp_path: Path, name: str) -> None:
    """The name that counts is the one that the program was run by."""
    link = tmp_path / name
    link.symlink_to(shutil.which("dash") or "/bin/sh")
    with running([link, "-c", WAIT]) as (shell, _):
        session = identify(shell)

        assert session is not None
        assert session.pid == (os.getpid() if LINUX else shell)


NAMED = """
import os, sys
from keybroker import kernel
kernel._linux("prctl", 15, bytes.fromhex(sys.argv[1]))  # PR_SET_NAME
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"two words", "two words"),
        (b"a) R 1 (b", "a) R 1 (b"),
        (b")", ")"),
        (b"((", "(("),
        (b"", ""),
        (b"line\nline", "line?line"),
        (b"\x1b[31mred", "?[31mred"),
        ("Schlüssel".encode(), "Schlüssel"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"fifteen letters", "fifteen letters"),
    ],
)
def test_a_program_may_call_itself_anything(name: bytes, shown: str) -> None:
    """Neither the parent nor the start is read from it, and nothing of it moves a cursor."""
    with running([sys.executable, "-c", NAMED, name.hex()]) as (pid, _):
        assert identify(pid) == Session(pid, started(pid), shown if LINUX else "?")


def test_nobody_is_no_session() -> None:
    """An unknown pid, one that never was, and one that is gone."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()

    assert identify(0) is None
    assert identify(-1) is None
    if LINUX:
        assert identify(gone.pid) is None
        assert identify(2**31) is None


def test_a_shell_without_a_parent_is_a_session_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What began a container has the parent 0, which is nobody."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "stat").write_text("1 (sh) S 0 " + "1 " * 17 + "77 " + "1 " * 30)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sessions, "_PROC", str(tmp_path))

    assert identify(1) == Session(1, 77, "sh")


def test_without_proc_a_session_is_its_pid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS, and on a Linux that does not show its processes."""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert identify(4711) == Session(4711, 0, "?")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sessions, "_PROC", str(tmp_path))
    assert identify(4711) == Session(4711, 0, "?")
    assert identify(0) is None


# who asks too soon


def told(at: float = 1000.0, fingerprint: str = "aaaa0000") -> Sessions:
    """Return what is known after ME was given a key of `work`."""
    known = Sessions()
    known.given(ME, "work", fingerprint, at)
    return known


@pytest.mark.parametrize(
    ("now", "ttl_ms", "changed_at", "suspicious"),
    [
        pytest.param(1001.0, TTL_MS, None, True, id="a second later"),
        pytest.param(1000.0, TTL_MS, None, True, id="at the same moment"),
        pytest.param(1053.9, TTL_MS, None, True, id="clearly before its TTL"),
        pytest.param(1054.0, TTL_MS, None, False, id="almost its TTL"),
        pytest.param(1060.0, TTL_MS, None, False, id="a refresh"),
        pytest.param(1000.0, 0, None, False, id="no TTL"),
        pytest.param(1000.0, -5, None, False, id="a TTL that makes no sense"),
        pytest.param(1000.4, 1000, None, True, id="a short TTL"),
        pytest.param(999.9, TTL_MS, None, False, id="the clock was set back"),
        pytest.param(4600.0, TTL_MS, None, False, id="the clock was set forward"),
        pytest.param(1001.0, TTL_MS, 1000.5, False, id="settings changed since"),
        pytest.param(1001.0, TTL_MS, 1000.0, False, id="settings changed at that moment"),
        pytest.param(1020.0, TTL_MS, 997.0, False, id="a change not yet noticed then"),
        pytest.param(1020.0, TTL_MS, 996.9, True, id="a change that was noticed before"),
        pytest.param(1001.0, TTL_MS, 10.0, True, id="settings changed long ago"),
        pytest.param(1001.0, TTL_MS, 9999.0, False, id="settings changed in the future"),
    ],
)
def test_an_ask_is_judged_by_the_last_giving(
    now: float, ttl_ms: int, changed_at: float | None, suspicious: bool
) -> None:
    """Too soon, with the same key, for no reason that is known."""
    assert told().suspicious(ME, "work", "aaaa0000", ttl_ms, now, changed_at) is suspicious


def test_a_first_ask_is_not_suspicious() -> None:
    """Neither that of a new session, nor of another, nor of one that got the same pid."""
    later = Session(ME.pid, ME.started + 1, ME.name)

    for session, known in ((ME, Sessions()), (OTHER, told()), (later, told())):
        assert not known.suspicious(session, "work", "aaaa0000", TTL_MS, 1001, None)


def test_a_session_may_change_its_name() -> None:
    """It is the same one all the same."""
    renamed = Session(ME.pid, ME.started, "node")

    assert told().suspicious(renamed, "work", "aaaa0000", TTL_MS, 1001, None)


def test_a_new_key_is_not_suspicious() -> None:
    """Whoever has an older one comes for the new one; afterwards that one counts."""
    known = told()

    assert not known.suspicious(ME, "work", "bbbb1111", TTL_MS, 1001, None)
    known.given(ME, "work", "bbbb1111", 1001)
    assert known.suspicious(ME, "work", "bbbb1111", TTL_MS, 1002, None)
    assert not known.suspicious(ME, "work", "aaaa0000", TTL_MS, 1002, None)


def test_two_profiles_of_one_session_do_not_disturb_each_other() -> None:
    """A session that asks for one and then for the other was refused by neither."""
    known = told()

    assert not known.suspicious(ME, "local", "aaaa0000", TTL_MS, 1001, None)
    known.given(ME, "local", "cccc2222", 1001)
    assert not known.suspicious(OTHER, "work", "aaaa0000", TTL_MS, 1002, None)
    assert known.suspicious(ME, "local", "cccc2222", TTL_MS, 1002, None)
    assert known.suspicious(ME, "work", "aaaa0000", TTL_MS, 1002, None)


def test_each_ask_starts_the_count_anew() -> None:
    """A second 401 right after the first is suspicious too; a refresh after it is not."""
    known = told()
    known.given(ME, "work", "aaaa0000", 1060)

    assert known.suspicious(ME, "work", "aaaa0000", TTL_MS, 1061, None)
    assert not known.suspicious(ME, "work", "aaaa0000", TTL_MS, 1120, None)


def test_the_oldest_are_forgotten_first() -> None:
    """Who asks again is not old, however long ago the first time was."""
    known = Sessions()
    for number in range(MOST_SESSIONS):
        known.given(Session(number + 1, 1, "claude"), "work", "aaaa0000", 1000)
    known.given(Session(1, 1, "claude"), "work", "aaaa0000", 1000)
    known.given(Session(MOST_SESSIONS + 1, 1, "claude"), "work", "aaaa0000", 1000)

    remembered = [
        number
        for number in range(1, MOST_SESSIONS + 2)
        if known.suspicious(Session(number, 1, "x"), "work", "aaaa0000", TTL_MS, 1001, None)
    ]
    assert remembered == [1, *range(3, MOST_SESSIONS + 2)]


@given(
    st.floats(-1e9, 1e9),
    st.integers(0, 10**9),
    st.floats(-1e9, 1e9),
    st.none() | st.floats(-1e9, 1e9),
)
def test_suspicion_ends_before_a_ttl_and_with_any_change(
    at: float, ttl_ms: int, passed: float, changed_at: float | None
) -> None:
    """Whatever the clocks do."""
    if told(at).suspicious(ME, "work", "aaaa0000", ttl_ms, at + passed, changed_at):
        assert 0 <= (at + passed) - at < EARLY * ttl_ms / 1000
        assert changed_at is None or changed_at < at
