"""What only libc can do: closed to debuggers, told of clock steps and of changed files.

The `ctypes` package costs a resident process 0.7 MB, so libc is called through the module below
it. Everything here is harmless on a system that lacks it: it returns False or None.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache

TYPE_CHECKING = False
if TYPE_CHECKING:  # the daemon listens before it has loaded what it goes on with
    from pathlib import Path

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4

# sys/timerfd.h
_CLOCK_REALTIME = 0
_ABSTIME_CANCEL_ON_SET = 1 | 2
_LONG = (sys.maxsize.bit_length() + 1) // 8  # bytes
_FAR = min(1 << 33, sys.maxsize)  # seconds; the year 2242

# sys/inotify.h
_IN_ATTRIB = 0x4
_IN_CLOSE_WRITE = 0x8
_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100  # a link or a directory: neither is closed after writing
_IN_DELETE = 0x200
_IN_DELETE_SELF = 0x400
_IN_MOVE_SELF = 0x800
_IN_Q_OVERFLOW = 0x4000
_IN_IGNORED = 0x8000
_IN_ONLYDIR = 0x1000000
_CHANGES = (
    (_IN_ATTRIB | _IN_CLOSE_WRITE | _IN_CREATE)
    | (_IN_MOVED_FROM | _IN_MOVED_TO | _IN_MOVE_SELF)
    | (_IN_DELETE | _IN_DELETE_SELF)
)
_EVENT = 4  # words of 32 bits: watch, mask, cookie, length of the name that follows


def close_to_debuggers(*, for_good: bool = True) -> bool:
    """
    Leave no core and let nobody of this uid read our memory (Linux). An exec undoes it.

    Args:
        for_good: What we start leaves no core either.
    """
    import resource

    now = resource.getrlimit(resource.RLIMIT_CORE)
    wanted = (0, 0 if for_good else now[1])
    if now != wanted:  # a service has its limits from its unit, and may set none
        resource.setrlimit(resource.RLIMIT_CORE, wanted)
    return _linux("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0) == 0


def die_with_parent() -> bool:
    """Be killed when the parent ends (Linux). Ask afterwards whether it is still the parent."""
    return _linux("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0


def signal_descriptor(numbers: Iterable[int]) -> int | None:
    """
    Open what becomes readable when one of these signals, which are blocked, came (Linux).

    Returns:
        A file descriptor that does not block, for `read_signals`; None where there is none.
    """
    mask = sum(1 << (number - 1) for number in numbers).to_bytes(128, sys.byteorder)
    opened = _linux("signalfd", -1, mask, os.O_NONBLOCK | os.O_CLOEXEC)
    return opened if opened >= 0 else None


def read_signals(descriptor: int) -> list[tuple[int, bool]]:
    """Return the signals that came, and of each whether a process sent it, not the terminal."""
    try:
        data = os.read(descriptor, 128 * 16)  # signalfd_siginfo: number, errno, code, pid, …
    except BlockingIOError:
        return []
    words = memoryview(data).cast("i")
    return [(words[at], words[at + 2] <= 0) for at in range(0, len(words), 128 // words.itemsize)]


def trim() -> bool:
    """Give memory that is free back to the system (glibc); True when there was some."""
    return _libc("malloc_trim", 0) == 1


def clock_set_timer() -> int | None:
    """
    Open what becomes readable when the wall clock is set or the machine resumes (Linux).

    Returns:
        A file descriptor that does not block, to hand to `rearm_clock_set_timer` when it is
        readable; None where there is none.
    """
    timer = _linux("timerfd_create", _CLOCK_REALTIME, os.O_NONBLOCK | os.O_CLOEXEC)
    if timer < 0:
        return None
    if not _arm(timer):
        os.close(timer)
        return None
    return timer


def rearm_clock_set_timer(timer: int) -> bool:
    """Read away what the timer said and arm it anew; False when it cannot be."""
    with suppress(OSError):  # ECANCELED, as hoped; EAGAIN, when nothing happened
        os.read(timer, 8)
    return _arm(timer)


def _arm(timer: int) -> bool:
    far = b"".join(number.to_bytes(_LONG, sys.byteorder) for number in (0, 0, _FAR, 0))
    # It fails when the clock was set since the last look; the next call begins from there.
    return any(
        _linux("timerfd_settime", timer, _ABSTIME_CANCEL_ON_SET, far, None) == 0 for _ in range(3)
    )


class Watch:
    """
    Directories, and what changes in them (inotify).

    Seen are files that were written, replaced, created, removed, renamed, or whose mode, owner
    or time changed. What goes on below a subdirectory is not, and neither is what happens to
    the file that a link points to.
    """

    def __init__(self) -> None:
        """Open it; `fd` is readable when there is something to read, or None on other systems."""
        opened = _linux("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)
        self.fd: int | None = opened if opened >= 0 else None
        self._watched: dict[int, set[Path]] = {}  # several paths may lead to one directory

    def directories(self, paths: Iterable[Path]) -> set[Path]:
        """
        Set the directories to watch, in place of those before; look at their files afterwards.

        Returns:
            Those that are watched; the others do not exist, or the system has no room. Set them
            again to try again.
        """
        if self.fd is None:
            return set()
        watched: dict[int, set[Path]] = {}
        for path in paths:
            mask = _CHANGES | _IN_ONLYDIR
            watch = _linux("inotify_add_watch", self.fd, os.fsencode(path), mask)
            if watch >= 0:
                watched.setdefault(watch, set()).add(path)
        for watch in self._watched.keys() - watched.keys():
            _linux("inotify_rm_watch", self.fd, watch)
        self._watched = watched
        return set().union(*watched.values())

    def read(self) -> set[Path]:
        """
        Return the paths that changed since the last time, without waiting.

        A directory's own path is among them when it changed, went away or was moved (it is not
        watched any more then), or when so much happened at once that anything may have changed.
        """
        changed: set[Path] = set()
        if self.fd is None:
            return changed
        for _ in range(16):  # what is left keeps the descriptor readable
            try:
                events = os.read(self.fd, 1 << 16)
            except BlockingIOError:
                break
            words, at = memoryview(events).cast("I"), 0  # names are filled up to whole events
            while at < len(words):
                watch, mask, _, length = words[at : at + _EVENT]
                at += _EVENT
                name = bytes(words[at : at + length // words.itemsize]).rstrip(b"\0")
                at += length // words.itemsize
                changed |= self._event(watch, mask, os.fsdecode(name))
        return changed

    def close(self) -> None:
        """Watch nothing any more."""
        if self.fd is not None:
            os.close(self.fd)
        self.fd = None
        self._watched = {}

    def _event(self, watch: int, mask: int, name: str) -> set[Path]:
        if mask & _IN_Q_OVERFLOW:
            return set().union(*self._watched.values())
        directories = self._watched.get(watch, set())  # of a watch that was taken away, nothing
        if mask & (_IN_IGNORED | _IN_MOVE_SELF):
            self._watched.pop(watch, None)
        if mask & _IN_MOVE_SELF and self.fd is not None:  # it would go on under another name
            _linux("inotify_rm_watch", self.fd, watch)
        return {directory / name if name else directory for directory in directories}


def _linux(name: str, *arguments: int | bytes | None) -> int:
    """Call what has this meaning on Linux only."""
    return _libc(name, *arguments) if sys.platform == "linux" else -1


def _libc(name: str, *arguments: int | bytes | None) -> int:
    """Call a function that returns an int, with ints and pointers; -1 where there is none."""
    called = _function(name)
    return -1 if called is None else called(arguments)


@cache
def _function(name: str) -> Callable[[tuple[int | bytes | None, ...]], int] | None:
    try:
        import _ctypes

        call, address = _ctypes.call_function, _ctypes.dlsym(_ctypes.dlopen(None, 0), name)  # type: ignore[arg-type]
        return lambda arguments: int(call(address, arguments))
    except OSError:  # this libc has no such function
        return None
    except (ImportError, AttributeError):  # another Python, without these private functions
        return _by_ctypes(name)


def _by_ctypes(name: str) -> Callable[[tuple[int | bytes | None, ...]], int] | None:
    try:
        import ctypes

        found = ctypes.CDLL(None)[name]
    except (ImportError, OSError, AttributeError):
        return None
    return lambda arguments: int(found(*arguments))
