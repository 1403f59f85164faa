"""Where things live; private directories, atomic and synced files, locks.

Files are created with their mode, 0600 in a 0700 directory, never changed to it afterwards.
"""

import fcntl
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from keybroker import listening
from keybroker.credential import sha256
from keybroker.errors import ConfigError, JournalError
from keybroker.values import dataclass

OWNER_LOCK = "owner.lock"
JOURNAL = "journal.jsonl"
AUDIT = "audit.jsonl"
CACHE = "cache"
WRAP_KEY = "wrap.key"
INSTANCE = "instance"
CONNECTIONS = "connections.json"  # what connect has written into whose files
SOCKET = "s"
KEYS = "keys"  # beside the socket: those of profiles with `export = "file"`
RUN_USER = "/run/user"
# Of the daemon of a shared host, which answers several users (Linux).
SYSTEM_CONFIG = Path("/etc/keybroker/system.toml")
SYSTEM_SOCKET = Path("/run/keybroker/s")
LONGEST_SOCKET_PATH = 103  # bytes; a macOS socket's address has room for these and a zero


def config_files(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """
    Return the files to read, later ones over earlier ones.

    `KEYBROKER_CONFIG` names one file instead of all others.

    Raises:
        ConfigError: There is no home directory to look in.
    """
    if named := named_config(environment):
        return (Path(named),)
    if sys.platform == "darwin":
        user = _home(environment) / "Library/Application Support/keybroker"
        return (Path("/Library/Application Support/keybroker/config.toml"), user / "config.toml")
    user = _base(environment, "XDG_CONFIG_HOME", ".config") / "keybroker"
    return (Path("/etc/keybroker/config.toml"), user / "config.toml")


def named_config(environment: Mapping[str, str]) -> str:
    """Return the file that `KEYBROKER_CONFIG` names, absolute; empty: the usual ones."""
    named = environment.get("KEYBROKER_CONFIG")
    return str(Path(named).absolute()) if named else ""


def state_directory(environment: Mapping[str, str]) -> Path:
    """
    Return this host's own directory for journal, audit and cache.

    The machine's id is in it, so that two hosts with one home directory do not share a journal.
    """
    if sys.platform == "darwin":
        base = _home(environment) / "Library/Application Support"
    else:
        base = _base(environment, "XDG_STATE_HOME", ".local/state")
    return base / "keybroker" / _machine_id()[:16]


def runtime_directory(environment: Mapping[str, str]) -> Path:
    """
    Return the folder of the daemon's socket; it is gone after a reboot, or may be.

    The helper looks in the same place, by itself.

    Raises:
        ConfigError: There is no home directory to look in (macOS).
    """
    named = environment.get("XDG_RUNTIME_DIR", "")
    if named.startswith("/"):
        return Path(named) / "keybroker"
    uid = os.geteuid()
    if sys.platform == "darwin":
        return _home(environment) / "Library/Caches/keybroker"
    users = Path(RUN_USER, str(uid))  # sudo and cron leave the variable out
    with suppress(OSError):
        found = os.lstat(users)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == uid:
            return users / "keybroker"
    return Path(f"/tmp/keybroker-{uid}")  # noqa: S108  # refused there if it is not ours alone


def socket_path(environment: Mapping[str, str]) -> Path:
    """
    Return where the daemon listens.

    Raises:
        ConfigError: The path is too long for a socket's address.
    """
    path = runtime_directory(environment) / SOCKET
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise ConfigError(
            f"{path}: too long for a socket (at most {LONGEST_SOCKET_PATH} bytes)",
            hint="set XDG_RUNTIME_DIR to a shorter folder",
        )
    return path


def instance(state: Path) -> str:
    """
    Return the eight characters by which this installation's keys are known at a gateway.

    They are made from machine, host name, user and directory, so that they come out the same when
    the state directory was lost, and kept, so that a renamed host goes on under its old ones.

    Raises:
        JournalError: They cannot be read or kept, and no label can do without them.
    """
    file = private_directory(state) / INSTANCE
    try:
        return _instance(file, state)
    except OSError as error:
        raise JournalError(f"{file}: cannot be kept ({error.strerror})") from None


def _instance(file: Path, state: Path) -> str:
    disk = Disk()
    found = disk.read(file)
    if found is None or len(found) != 8 or not found.isalnum():
        seed = f"keybroker {_machine_id()} {os.uname().nodename} {os.geteuid()} {state}"
        found = sha256(seed.encode())[:8].encode()
        disk.replace(file, found)
    return found.decode("ascii")


def private_directory(path: Path) -> Path:
    """
    Create a directory that only its owner can enter, or check one that exists.

    Raises:
        ConfigError: It is another's, others can enter it, or it cannot be created.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
            for above in (path.parent, path.parent.parent):  # a synced file needs its folder
                with suppress(OSError):
                    _sync_directory(above)
        found = os.lstat(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be created ({error.strerror})") from None
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{path}: is not a directory")
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{path}: belongs to another user")
    if found.st_mode & 0o077:
        raise ConfigError(f"{path}: others can enter it", hint=f"type: chmod 700 {path}")
    return path


class Disk:
    """Files of ours: what is written is whole or absent, and on the disk once synced."""

    def read(self, path: Path, last: int | None = None) -> bytes | None:
        """Return a file's bytes, or only its `last` ones; None when there is no file."""
        try:
            with open(path, "rb", opener=_no_follow) as file:
                if last is not None:
                    size = file.seek(0, os.SEEK_END)
                    file.seek(max(0, size - last))
                return file.read()
        except FileNotFoundError:
            return None

    def directory(self, path: Path) -> None:
        private_directory(path)

    def append(self, path: Path, data: bytes) -> None:
        """Add to the end; not yet synced."""
        fresh = not path.exists()
        with open(path, "ab", buffering=0, opener=_private) as file:
            written = file.write(data)
            if written != len(data):  # the disk is full: leave no half line behind
                file.truncate(file.tell() - (written or 0))
                raise OSError(28, "No space left on device")
        if fresh:
            _sync_directory(path.parent)

    def sync(self, path: Path) -> None:
        """Return when all that was written to a file is on the disk."""
        with open(path, "rb", opener=_no_follow) as file:
            _sync(file.fileno())

    def truncate(self, path: Path, size: int) -> None:
        with open(path, "r+b", opener=_no_follow) as file:
            file.truncate(size)

    def replace(self, path: Path, data: bytes) -> None:
        """Put a whole file in place at once, synced."""
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        with suppress(FileNotFoundError):
            draft.unlink()
        try:
            with open(draft, "xb", opener=_private) as file:
                file.write(data)
                file.flush()
                _sync(file.fileno())
            draft.replace(path)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise
        _sync_directory(path.parent)

    def remove(self, path: Path) -> None:
        with suppress(FileNotFoundError):
            path.unlink()
            _sync_directory(path.parent)

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """Hold a file's lock for a moment; whoever else wants it waits."""
        held = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield
        finally:
            os.close(held)


def take_owner_lock(state: Path) -> int | None:
    """
    Become the one who may mint and write the journal.

    Returns:
        A file descriptor that holds the lock until it and every copy that a worker inherited
        are closed; None when another process has it.

    Raises:
        JournalError: The file cannot be opened: nobody may write the journal.
    """
    file = private_directory(state) / OWNER_LOCK
    try:
        return listening.hold(str(file))
    except OSError as error:
        raise JournalError(f"{file}: cannot be locked ({error.strerror})") from None


def owner_lock_is_free(state: Path) -> bool:
    """Say whether nobody has the owner lock just now."""
    if (held := take_owner_lock(state)) is not None:
        os.close(held)
    return held is not None


@dataclass(frozen=True, slots=True)
class Owner:
    """The daemon that has the owner lock, by what is written into its file."""

    pid: int
    socket: Path


def owner(state: Path) -> Owner | None:
    """Return the daemon that has the owner lock; None when nobody has it, or only a command."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(Disk().read(state / OWNER_LOCK) or b"")
        if not owner_lock_is_free(state):
            return Owner(int(found["pid"]), Path(found["socket"]))
    return None


def _no_follow(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # fsync leaves data in the drive's cache there
    else:
        os.fsync(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _base(environment: Mapping[str, str], variable: str, below_home: str) -> Path:
    named = environment.get(variable, "")
    if named.startswith("/"):  # the XDG specification has relative ones ignored
        return Path(named)
    return _home(environment) / below_home


def _home(environment: Mapping[str, str]) -> Path:
    home = environment.get("HOME", "")
    if not home.startswith("/"):
        raise ConfigError(
            "paths: HOME is not set", hint="set HOME, or XDG_STATE_HOME and KEYBROKER_CONFIG"
        )
    return Path(home)


def _machine_id() -> str:
    """Return a digest of the machine's id, which systemd asks not to hand on as it is."""
    for file in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with suppress(OSError):
            if text := Path(file).read_text("ascii").strip():
                return sha256(f"keybroker {text}".encode())
    return sha256(f"keybroker {os.uname().nodename}".encode())
