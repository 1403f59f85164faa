"""What only libc can do, done to the real kernel; and nothing where there is no such kernel."""

from __future__ import annotations

import errno
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker import kernel
from keybroker.kernel import Watch

LINUX = sys.platform == "linux"


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Return a watch that is closed at the end."""
    one = Watch()
    yield one
    one.close()


@pytest.fixture
def forget_functions() -> Iterator[None]:
    """What was found in libc is looked up anew, before and after."""
    kernel._function.cache_clear()
    yield
    kernel._function.cache_clear()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that is not Linux."""
    monkeypatch.setattr(sys, "platform", "darwin")


def output(program: str) -> str:
    """Run a program in a process of its own, since what it does cannot be undone."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# debuggers and parents

CLOSED = """
import ctypes, resource, sys
from keybroker import kernel
print(
    kernel.close_to_debuggers(),
    resource.getrlimit(resource.RLIMIT_CORE),
    ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) if sys.platform == "linux" else None,
)
"""


def test_a_process_closes_itself() -> None:
    """No core and, on Linux, not dumpable."""
    expected = f"{LINUX} (0, 0) {0 if LINUX else None}\n"

    assert output(CLOSED) == expected
    assert output("import _ctypes; del _ctypes.call_function" + CLOSED) == expected


def test_nothing_is_loaded_for_it_but_what_is_below_ctypes() -> None:
    """The package ctypes stays out of a process that uses all of it."""
    program = (
        "import sys; from keybroker import kernel\n"
        "kernel.close_to_debuggers(), kernel.die_with_parent(), kernel.clock_set_timer()\n"
        "kernel.Watch(), kernel.trim()\n"
        "print('_ctypes' in sys.modules, 'ctypes' in sys.modules)"
    )

    assert output(program) == "True False\n"


CHILD = """
import sys
from keybroker import kernel
print(kernel.die_with_parent(), flush=True)
sys.stdin.read()
"""
PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]]).wait()
"""


def test_a_child_dies_with_its_parent() -> None:
    """Killed as soon as the parent was, although its own input is still open."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        said = parent.stdout.readline()
        parent.kill()
        if not LINUX:
            parent.stdin.close()
        readable = select.select([parent.stdout], [], [], 10)[0]
        rest = parent.stdout.read() if readable else None
        parent.stdin.close()  # ends a child that is left, whatever we found

    assert said == f"{LINUX}\n".encode()
    assert rest == b""  # nobody holds the other end any more
    assert parent.returncode == -signal.SIGKILL


def test_free_memory_is_given_back() -> None:
    """What was left between two blocks that are in use is, where glibc can."""
    program = (
        "import os\nfrom keybroker import kernel\n"
        "held = [bytes(4000) for _ in range(20000)]\n"
        "del held[:-1]\n"
        "print(kernel.trim(), 'glibc' in (os.confstr('CS_GNU_LIBC_VERSION') or ''))"
    )

    assert output(program) in ("True True\n", "False False\n")


# the clock


def fdinfo(descriptor: int) -> dict[str, str]:
    """Return what the kernel says of a descriptor of ours."""
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def is_armed(timer: int) -> bool:
    """Return whether it waits for a far day and for the clock to be set."""
    says = fdinfo(timer)
    far = int(says["it_value"].strip("()").split(",")[0])
    return (says["clockid"], says["settime flags"]) == ("0", "03") and far > 10**9


def is_readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def test_a_timer_waits_for_the_clock_to_be_set() -> None:
    """On the wall clock, cancelled when that is set, blocking nobody, handed on to nobody."""
    timer = kernel.clock_set_timer()
    if not LINUX:
        assert timer is None
        return
    assert timer is not None
    try:
        assert is_armed(timer)
        assert not is_readable(timer)
        assert not os.get_blocking(timer)
        assert not os.get_inheritable(timer)
    finally:
        os.close(timer)


def test_a_timer_that_spoke_is_armed_anew() -> None:
    """What it said is read away, whether it went off or was never readable at all."""
    timer = kernel.clock_set_timer()
    if timer is None:
        assert not LINUX
        return
    try:
        long_ago = struct.pack("llll", 0, 0, 1, 0)
        assert kernel._linux("timerfd_settime", timer, 1, long_ago, None) == 0
        assert is_readable(timer)
        assert fdinfo(timer)["settime flags"] == "01"

        assert kernel.rearm_clock_set_timer(timer)
        assert not is_readable(timer)
        assert is_armed(timer)
        assert kernel.rearm_clock_set_timer(timer)
        assert is_armed(timer)
    finally:
        os.close(timer)


def test_a_clock_that_is_set_while_a_timer_is_armed_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel says so once, by a failure of the call that arms; then it is armed."""
    answers = [-1, 0]

    def settime(name: str, *arguments: int | bytes | None) -> int:
        return answers.pop(0) if name == "timerfd_settime" else os.dup(0)

    def cancelled(descriptor: int, size: int) -> bytes:
        raise OSError(errno.ECANCELED, "Operation canceled")

    monkeypatch.setattr(kernel, "_linux", settime)
    timer = kernel.clock_set_timer()
    assert timer is not None
    os.close(timer)
    assert answers == []

    answers += [-1, 0]
    monkeypatch.setattr(os, "read", cancelled)
    assert kernel.rearm_clock_set_timer(timer)
    assert answers == []


def test_what_cannot_be_armed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried a few times, not for ever, and its descriptor is closed."""
    opened, tries = os.dup(0), []

    def settime(name: str, *arguments: int | bytes | None) -> int:
        if name == "timerfd_create":
            return opened
        tries.append(arguments)
        return -1

    monkeypatch.setattr(kernel, "_linux", settime)

    assert kernel.clock_set_timer() is None
    assert len(tries) == 3
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened)


# files


def seen(watch: Watch) -> set[Path]:
    """Return what changed; nobody has to wait for it, since the kernel says it at once."""
    return watch.read()


def watches(watch: Watch) -> int:
    """Return how many directories the kernel still watches for it."""
    return Path(f"/proc/self/fdinfo/{watch.fd}").read_text().count("inotify wd:")


def test_a_write_a_replacement_and_a_removal_are_seen(watch: Watch, tmp_path: Path) -> None:
    """As editors and people do them; a look at a file is none."""
    assert watch.directories([tmp_path]) == ({tmp_path} if LINUX else set())
    file, draft = tmp_path / "config.toml", tmp_path / ".config.toml.swp"

    file.write_text("one")
    assert seen(watch) == ({file} if LINUX else set())
    if not LINUX:
        return
    file.read_text()
    assert seen(watch) == set()
    with file.open("a") as appended:
        appended.write("two")
    assert seen(watch) == {file}
    draft.write_text("three")
    draft.replace(file)
    assert seen(watch) == {draft, file}
    file.chmod(0o644)
    assert seen(watch) == {file}
    os.utime(file)
    assert seen(watch) == {file}
    file.unlink()
    assert seen(watch) == {file}
    file.symlink_to("elsewhere")
    assert seen(watch) == {file}
    (tmp_path / "directory").mkdir()
    assert seen(watch) == {tmp_path / "directory"}
    assert seen(watch) == set()


@pytest.mark.parametrize("name", ["a" * 255, "é", "with blank\nand line", "x", "sixteen-is-even-"])
def test_a_name_is_read_whole(watch: Watch, tmp_path: Path, name: str) -> None:
    """Whatever its length, beside others in one read."""
    watch.directories([tmp_path])
    (tmp_path / "before").touch()
    (tmp_path / name).touch()
    (tmp_path / "after").touch()

    expected = {tmp_path / "before", tmp_path / name, tmp_path / "after"}
    assert seen(watch) == (expected if LINUX else set())


def test_the_removal_of_a_socket_is_seen(watch: Watch, tmp_path: Path) -> None:
    """What the daemon listens on may be taken away by a cleaner of temporary files."""
    import socket

    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(tmp_path)  # a path below it may be too long for a socket
        try:
            listening.bind("s")
        finally:
            os.chdir(here)
        watch.directories([tmp_path])
        (tmp_path / "s").unlink()

    assert seen(watch) == ({tmp_path / "s"} if LINUX else set())


def test_only_the_directories_set_last_are_watched(watch: Watch, tmp_path: Path) -> None:
    """One that stays loses nothing, one that goes says nothing more, one that is absent waits."""
    old, kept, new = tmp_path / "old", tmp_path / "kept", tmp_path / "new"
    old.mkdir()
    kept.mkdir()
    first = watch.directories([old, kept, new])
    (old / "a").touch()
    (kept / "b").touch()
    new.mkdir()
    second = watch.directories([kept, new])
    (old / "c").touch()
    (new / "d").touch()

    changed = seen(watch)

    if LINUX:
        assert (first, second) == ({old, kept}, {kept, new})
        assert changed == {kept / "b", new / "d"}
        assert watches(watch) == 2
        watch.directories([])
        assert watches(watch) == 0
        (kept / "e").touch()
    assert seen(watch) == set()


def test_a_directory_that_is_removed_or_moved_is_seen(watch: Watch, tmp_path: Path) -> None:
    """By its own path; afterwards it is watched only when it is set again."""
    removed, moved, gone = tmp_path / "removed", tmp_path / "moved", tmp_path / "gone"
    removed.mkdir()
    moved.mkdir()
    watch.directories([removed, moved])
    removed.rmdir()
    moved.rename(gone)
    first = seen(watch)
    removed.mkdir()
    (removed / "a").touch()
    (gone / "b").touch()
    second = seen(watch)
    third = watch.directories([removed, moved])
    (removed / "c").touch()

    assert second == set()
    if LINUX:
        assert first == {removed, moved}
        assert watches(watch) == 1
        assert third == {removed}
        assert seen(watch) == {removed / "c"}


def test_a_change_of_a_directory_s_mode_is_seen(watch: Watch, tmp_path: Path) -> None:
    """By its own path."""
    watch.directories([tmp_path])
    tmp_path.chmod(0o750)

    assert seen(watch) == ({tmp_path} if LINUX else set())


def test_two_ways_to_one_directory_are_both_told(watch: Watch, tmp_path: Path) -> None:
    """A link to a directory is followed, and what changes is known by either name."""
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    watch.directories([real, link])
    (real / "a").touch()

    assert seen(watch) == ({real / "a", link / "a"} if LINUX else set())


def test_a_file_is_no_directory(watch: Watch, tmp_path: Path) -> None:
    """Nor is what does not exist."""
    (tmp_path / "file").touch()

    assert watch.directories([tmp_path / "file", tmp_path / "absent"]) == set()


def test_more_than_the_kernel_keeps_may_be_anything(watch: Watch, tmp_path: Path) -> None:
    """When changes were dropped, every directory counts as changed."""
    watch.directories([tmp_path])
    if not LINUX:
        assert seen(watch) == set()
        return
    room = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    names = [tmp_path / "a", tmp_path / "b"]  # two, since equal neighbours are merged
    for name in names:
        name.touch()
    for count in range(room):
        os.utime(names[count % 2])
    changed: set[Path] = set()
    for _ in range(room):
        if not (more := seen(watch)):
            break
        changed |= more

    assert changed == {tmp_path, *names}
    assert seen(watch) == set()


def test_a_watch_that_was_closed_says_nothing(tmp_path: Path) -> None:
    """And closing it twice does no harm."""
    watch = Watch()
    descriptor = watch.fd
    watch.directories([tmp_path])
    watch.close()
    watch.close()

    assert (descriptor is not None) is LINUX
    assert watch.fd is None
    assert watch.directories([tmp_path]) == set()
    assert watch.read() == set()


def test_a_watch_blocks_nobody_and_is_not_handed_on(watch: Watch) -> None:
    """It is read when it is readable, by this process alone."""
    if watch.fd is not None:
        assert not os.get_blocking(watch.fd)
        assert not os.get_inheritable(watch.fd)
    assert (watch.fd is not None) is LINUX


# where there is nothing


@pytest.mark.usefixtures("elsewhere")
def test_another_system_has_none_of_it(tmp_path: Path) -> None:
    """Nothing is called that has another meaning there."""
    watch = Watch()

    assert kernel.die_with_parent() is False
    assert kernel.clock_set_timer() is None
    assert watch.fd is None
    assert watch.directories([tmp_path]) == set()
    assert watch.read() == set()


@pytest.mark.usefixtures("forget_functions")
def test_a_libc_without_a_function_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """By either way of looking."""
    assert kernel._libc("no_such_function_anywhere", 0) == -1
    assert kernel._by_ctypes("no_such_function_anywhere") is None


@pytest.mark.usefixtures("forget_functions")
@pytest.mark.parametrize("missing", ["call_function", "dlopen", "dlsym"])
def test_a_python_without_the_private_functions_uses_the_package(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """The same calls with the same answers."""
    monkeypatch.delattr(f"_ctypes.{missing}")

    assert kernel._libc("getppid") == os.getppid()
    assert kernel._libc("access", b"/", os.F_OK) == 0
    assert kernel._libc("access", b"/no/such/path", os.F_OK) == -1


@pytest.mark.usefixtures("forget_functions")
def test_a_python_without_either_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built without libffi, it has neither module."""
    monkeypatch.setitem(sys.modules, "_ctypes", None)
    monkeypatch.setitem(sys.modules, "ctypes", None)

    assert kernel.trim() is False
    assert kernel.clock_set_timer() is None
    assert Watch().fd is None
