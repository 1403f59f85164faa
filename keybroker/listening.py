"""The first milliseconds of the daemon: closed to others, alone, listening.

Clients may wait in the socket's queue from here on, while the rest of the daemon is loaded. So
this module imports little and nothing that is ours but `kernel`; paths come from who started it,
who has looked at them already.
"""

import _socket
import fcntl
import os
import stat
import sys
import time
import types

from keybroker import kernel

BACKLOG = 4096
LOCK_SECONDS = 45.0  # an old worker ends within its hard timer
FIRST_INHERITED = 3  # sd_listen_fds(3)
OWN, LOCK = "keybroker-own", "keybroker-lock"  # what a daemon hands down to the one that it becomes
NOFILE = 16_384
REFUSE_SECONDS = 1.0

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Begun:
    """What the daemon has when it begins: the owner lock, sockets that listen, and where."""

    __slots__ = ("inherited", "lock", "place", "sockets")

    def __init__(self, lock: int, sockets: list[_socket.socket], *, inherited: bool) -> None:
        self.lock = lock
        self.sockets = sockets
        self.place = str(sockets[0].getsockname())
        self.inherited = inherited


def begin(state: str, path: str) -> Begun | None:
    """
    Become this user's daemon.

    Args:
        state: The state directory, private.
        path: Where to listen, in a private directory, unless a socket was inherited. A daemon that
            became this one has handed down its lock as well; see `become`.

    Returns:
        None when another daemon has the place.

    Raises:
        OSError: The place cannot be taken.
    """
    os.umask(0o077)
    kernel.close_to_debuggers()
    _open_standard_files()
    handed = inherited()
    lock = next((number for number, name in handed if name == LOCK), None)
    given = [(number, name) for number, name in handed if name != LOCK]
    made = all(name == OWN for _, name in given)
    if lock is None:
        lock = _lock(os.path.join(state, "owner.lock"), "" if given else path)
    if lock is None:
        return None
    _raise_limit()
    sockets = [_socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, at) for at, _ in given]
    for one in sockets:
        one.setblocking(False)
    sockets = sockets or [listen(path)]
    begun = Begun(lock, sockets, inherited=not made)
    record_owner(lock, begun.place)
    return begun


def refuse(
    sockets: list[_socket.socket], line: bytes, may: "Callable[[_socket.socket], bool]"
) -> None:
    """
    Tell whoever waits, for a moment, why nobody answers; else they would wait for nothing.

    And the service manager, which sees that somebody waits, would start us again at once.

    Args:
        line: The answer.
        may: Says who may hear it.
    """
    import select

    until = time.monotonic() + REFUSE_SECONDS
    while (left := until - time.monotonic()) > 0:
        for listener in select.select(sockets, [], [], left)[0]:
            try:
                descriptor, _ = listener._accept()  # type: ignore[attr-defined]
            except OSError:
                continue
            one = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, descriptor)
            try:
                one.settimeout(REFUSE_SECONDS)
                if may(one):
                    one.recv(4096)  # or the kernel would reset the connection, and the line with it
                    one.sendall(line)
            except OSError:
                pass
            finally:
                one.close()


def become(sockets: list[_socket.socket], begun: Begun, arguments: list[str]) -> None:
    """
    Run another version in our place: in this process, with its lock and with whoever waits.

    Args:
        sockets: Those that listen now.
        begun: As it began.
        arguments: Its command line.

    Raises:
        OSError: It cannot be run. Descriptors are not what they were; nothing is left but to end.
    """
    name = "" if begun.inherited else OWN
    handed = [(one.fileno(), name) for one in sockets] + [(begun.lock, LOCK)]
    above = FIRST_INHERITED + len(handed)
    copies = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, above) for number, _ in handed]
    for at, copy in enumerate(copies, FIRST_INHERITED):
        os.dup2(copy, at)
    told = {
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": str(len(handed)),
        "LISTEN_FDNAMES": ":".join(name for _, name in handed),
    }
    os.execve(arguments[0], arguments, {**os.environ, **told})


def _open_standard_files() -> None:
    """Whoever was started without stderr must not write its log into a lock."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free


def _lock(file: str, path: str) -> int | None:
    """
    Take the owner lock; wait for a command or an old worker that has it, not for a daemon.

    Whoever listens at the path is one, though its lock's file may have been removed. No path:
    it is we who listen there, by a socket that was handed down.
    """
    until = time.monotonic() + LOCK_SECONDS
    while True:
        lock = hold(file)
        daemon = path != "" and answers(path)
        if lock is not None and not daemon:
            return lock
        if lock is not None:
            os.close(lock)
        if daemon or time.monotonic() > until:
            return None
        time.sleep(0.02)


def hold(file: str) -> int | None:
    """
    Lock a file for as long as the descriptor and its copies are open; None when it is locked.

    Raises:
        OSError: It cannot be opened.
    """
    held = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    if not in_place(held, file):  # it was removed meanwhile, and may be somebody else's now
        os.close(held)
        return None
    return held


def in_place(held: int, file: str) -> bool:
    """Say whether a path still leads to the file that is open."""
    try:
        return os.path.samestat(os.stat(file, follow_symlinks=False), os.fstat(held))
    except OSError:
        return False


def record_owner(lock: int, path: str) -> None:
    """Say in the lock's file who has it and where to ask: for people, and for commands."""
    import json

    text = json.dumps({"pid": os.getpid(), "socket": path}) + "\n"
    os.ftruncate(lock, 0)
    os.pwrite(lock, text.encode(), 0)


def answers(path: str) -> bool:
    """Say whether somebody listens there."""
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        probe.settimeout(1.0)
        probe.connect(path)
    except OSError:
        return False
    finally:
        probe.close()
    return True


def listen(path: str) -> _socket.socket:
    """
    Listen at a path in place of whoever did; the owner lock says that nobody does any more.

    Raises:
        OSError: It cannot be done; the path is something else than a socket, or too long.
    """
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    except FileNotFoundError:
        pass
    made = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        made.bind(path)
    except OSError:
        made.close()
        raise
    finally:
        os.umask(old)
    made.setblocking(False)
    made.listen(BACKLOG)
    return made


def inherited() -> list[tuple[int, str]]:
    """
    Return the descriptors that a service manager handed down, if it means us, and their names.

    See: sd_listen_fds(3). The variables are taken out of the environment.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    names += [""] * int(count)
    found = list(enumerate(names[: int(count)], FIRST_INHERITED))
    for number, _ in found:
        os.set_inheritable(number, False)
    return found


def notify(text: str) -> None:
    """Tell the service manager, if one asked for it. See: sd_notify(3)."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if where[:1] in ("/", "@"):
        address = "\0" + where[1:] if where[0] == "@" else where
        told = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
        try:
            told.sendto(text.encode(), getattr(_socket, "MSG_DONTWAIT", 0), address)
        except OSError:  # it does not listen any more
            pass
        finally:
            told.close()


def _raise_limit() -> None:
    """Have room for many clients at once."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = NOFILE if hard == resource.RLIM_INFINITY else min(NOFILE, hard)
    if soft != resource.RLIM_INFINITY and soft < room:
        resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))


class _Later(types.ModuleType):
    """
    A module that is loaded when it is used.

    `urllib.parse`, which `pathlib` loads, wants `ipaddress` for IPv6 addresses in brackets alone;
    the daemon would keep a quarter of a megabyte for it.
    """

    def __getattr__(self, name: str) -> object:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(__import__(self.__name__), name)


class _Rounding(types.ModuleType):
    """
    `math`, of which `selectors` wants to round up alone.

    The library would stay mapped, which counts as memory of ours. Who wants more of it has it.
    """

    @staticmethod
    def ceil(number: float) -> int:
        return -int(-number // 1)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # of the import itself
            raise AttributeError(name)
        sys.modules.pop(self.__name__, None)
        return getattr(__import__(self.__name__), name)


class _Words(types.ModuleType):
    """
    `typing`, of which all but annotations can be done without: half a megabyte.

    Who wants more of it, as the reader of TOML does, has the real one until it is forgotten.
    """

    TYPE_CHECKING = False
    Any = NoReturn = Protocol = object

    @staticmethod
    def TypeVar(name: str) -> object:  # noqa: N802, it stands in for a class
        del name
        return object

    def forget(self) -> None:
        """Let go of the real one."""
        if self.__dict__.pop("real", None) is not None:
            for name in [one for one in sys.modules if one.startswith(f"{self.__name__}.")]:
                del sys.modules[name]

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # of the import itself
            raise AttributeError(name)
        if "real" not in self.__dict__:
            del sys.modules[self.__name__]
            try:
                self.__dict__["real"] = __import__(self.__name__)
            finally:
                sys.modules[self.__name__] = self
        return getattr(self.__dict__["real"], name)


def main() -> None:
    """Run as the daemon: STATE SOCKET FORMAT, as `starting.command` writes it."""
    state, path, log = sys.argv[1:]
    try:
        begun = begin(state, path)
    except OSError as error:
        sys.stderr.write(f"keybroker: {path}: cannot listen ({error.strerror})\n")
        sys.exit(69)
    if begun is None:
        sys.stderr.write(
            f"keybroker: another keybroker is at work, on the same state directory or at {path}\n"
            "hint: one that runs as a daemon is ended by: keybroker daemon --stop\n"
        )
        sys.exit(69)
    sys.modules["ipaddress"] = _Later("ipaddress")
    sys.modules["math"] = _Rounding("math")
    sys.modules["typing"] = _Words("typing")
    from contextlib import suppress

    from keybroker import document, paths
    from keybroker.errors import ConfigError

    with suppress(ConfigError):  # it is said when they are read once more
        document.read_ahead(paths.config_files(os.environ))
    from keybroker.daemon import run

    sys.exit(run(begun, state, path, log))
