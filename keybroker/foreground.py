"""A program in the foreground in our place: its signals, its exit status, its terminal.

It is in our process group, so that a shell's job control works on both of us as on one. What the
terminal sends, it gets by itself, and we keep out of the way; what another process sends to us is
passed on. On systems that do not tell the two apart, what a terminal can send is not passed on
while we are in its foreground.
"""

import errno
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from keybroker import kernel
from keybroker.errors import KeybrokerError

PASSED_ON = tuple(
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
)
BY_TERMINAL = (signal.SIGINT, signal.SIGQUIT)


class NoProgramError(KeybrokerError):
    """There is no such program."""

    code = "program"
    exit_status = 127


class NotRunnableError(KeybrokerError):
    """It is there, and cannot be run."""

    code = "not-a-program"
    exit_status = 126


def find(word: str, environment: Mapping[str, str] = os.environ) -> str:
    """
    Return the file of a program, as a shell finds it.

    Raises:
        NoProgramError: There is none.
        NotRunnableError: What there is cannot be run.
    """
    folders = [""] if "/" in word else os.get_exec_path(dict(environment))
    places = [os.path.join(folder, word) if folder else word for folder in folders]
    seen = [place for place in places if os.path.isfile(place)]
    for place in seen:
        if os.access(place, os.X_OK):
            return place
    if seen or ("/" in word and os.path.exists(word)):
        raise NotRunnableError(f"run: {seen[0] if seen else word}: cannot be run")
    where = "does not exist" if "/" in word else "is not in PATH"
    raise NoProgramError(
        f"run: {word}: {where}", hint="a path, or the name of a program in PATH; see --help"
    )


class Program:
    """
    A program that was started, and the signals meanwhile.

    Args:
        file: What is run.
        words: Its name, as it was typed, and its arguments.
        environment: All that it gets.
        umask: It gets this one back,
        core: and this limit of a core's size.

    Raises:
        NotRunnableError: It could not be run.
    """

    def __init__(
        self,
        file: str,
        words: Sequence[str],
        environment: Mapping[str, str],
        *,
        umask: int,
        core: int,
    ) -> None:
        numbers = {*PASSED_ON, signal.SIGCHLD}
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever started us may not care for ours
        before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        self._signals = kernel.signal_descriptor(numbers)
        self._woken = -1
        if self._signals is None:
            self._woken = _wake_up(numbers)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.status: int | None = None  # as wait(2) has it
        ours, (_, hard) = os.umask(umask), resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (core, hard))
        try:
            self.pid = os.posix_spawn(
                file,
                list(words),
                dict(environment),
                setsigmask=before,
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores
            )
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            lacks = error.errno == errno.ENOEXEC
            hint = "it may lack its first line, such as #!/bin/sh" if lacks else None
            raise NotRunnableError(
                f"run: {file}: cannot be run ({error.strerror})", hint=hint
            ) from None
        finally:
            os.umask(ours)
            resource.setrlimit(resource.RLIMIT_CORE, (0, hard))

    def wait(self, seconds: float | None = None, other: int | None = None) -> bool:
        """
        Pass signals on until the program ended, the time is over or a descriptor is readable.

        Returns:
            Whether the descriptor is readable.
        """
        until = None if seconds is None else time.monotonic() + seconds
        poll = select.poll()
        mine = self._woken if self._signals is None else self._signals
        for one in (mine, other):
            if one is not None:
                poll.register(one, select.POLLIN)
        while self.status is None:
            left = None if until is None else max(0.0, until - time.monotonic())
            ready = [one for one, _ in poll.poll(None if left is None else left * 1000)]
            if mine in ready:
                self._take_signals()
            if self.status is None and other in ready:
                return True
            if until is not None and time.monotonic() >= until:
                return False
        return False

    def _take_signals(self) -> None:
        if self._signals is not None:
            came = kernel.read_signals(self._signals)
        else:
            came = [(number, not _in_foreground()) for number in os.read(self._woken, 256)]
        for number, by_process in came:
            if number == signal.SIGCHLD:
                self._look()
            elif self.status is None and (by_process or number not in BY_TERMINAL):
                with suppress(ProcessLookupError):
                    os.kill(self.pid, number)

    def _look(self) -> None:
        """See what became of the program; stop with it where a shell would wait for both."""
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            if pid == 0:
                return
            if not os.WIFSTOPPED(status):
                self.status = status
            elif _in_foreground():
                os.kill(os.getpid(), signal.SIGSTOP)
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGCONT)


def end_as(status: int) -> int:
    """Die of the signal that a program died of, as a shell expects; or return its exit status."""
    if not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status)
    number = os.WTERMSIG(status)
    sys.stdout.flush()
    with suppress(OSError, ValueError):  # of SIGKILL there is nothing to set
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    return 128 + number


def _in_foreground() -> bool:
    """Say whether a terminal would send us what is typed at it."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _wake_up(numbers: set[signal.Signals]) -> int:
    """Have the numbers of signals written to a pipe; return where they are read."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def nothing(number: int, frame: object) -> None:
        del number, frame

    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:  # as of a job in the background
            signal.signal(number, nothing)
    return read
