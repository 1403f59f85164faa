"""Files of other programs: read, and replaced only while they are what was read."""

import ctypes
import errno
import os
import shutil
import stat
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from keybroker.errors import ConfigError, NotReady

LARGEST = 16 << 20
FRESH_SECONDS = 1.0  # what was written so lately may be half written yet
LOOKS, LOOK_SECONDS = 50, 0.03
SWAPS = 100
_BLANK = b"\xef\xbb\xbf \t\r\n"
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_AT_FDCWD = -100
# A system or a file system that has no such thing.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True, slots=True)
class Target:
    """A file as it was read. `real` is where links lead; `data` is None when there is none."""

    file: Path
    real: Path
    data: bytes | None

    @property
    def text(self) -> str | None:
        """
        Its text, a byte order mark included.

        Raises:
            ConfigError: It is not UTF-8.
        """
        if self.data is None:
            return None
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = self.data.count(b"\n", 0, error.start) + 1
            raise ConfigError(f"{self.file}:{line}: not UTF-8; nothing was changed") from None


def read(file: Path) -> Target:
    """
    Read a file that we may replace.

    A program that writes in place empties it first: what it has not finished is waited for.

    Raises:
        ConfigError: It is not a file, another's, read-only, or larger than 16 MiB.
        NotReady: Somebody writes it all the time.
    """
    target, before = _read(file)
    for _ in range(LOOKS):
        if before is None or time.time() - before.st_mtime > FRESH_SECONDS:
            return target
        time.sleep(LOOK_SECONDS)
        again, after = _read(file)
        if after is None or after.st_ino != before.st_ino:
            return again  # of somebody who puts whole files in place
        if again == target and (again.data or b"").strip(_BLANK):
            return again  # nobody writes; but who has emptied it may be slow
        target, before = again, after
    raise changed_too_often(file)


def _read(file: Path) -> tuple[Target, os.stat_result | None]:
    try:
        real = file.resolve(strict=False)
        opened = open(real, "rb", opener=_without_waiting)  # noqa: SIM115  # closed below
    except FileNotFoundError:
        return Target(file, real, None), None
    except IsADirectoryError:
        raise ConfigError(f"{file}: is not a file") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        raise _cannot(file, "read", error) from None
    with opened:
        found = os.fstat(opened.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{file}: is not a file")
        if found.st_uid != os.geteuid():
            raise ConfigError(f"{file}: belongs to another user; nothing was changed")
        if not found.st_mode & stat.S_IWUSR:
            raise ConfigError(
                f"{file}: is read-only; nothing was changed", hint=f"type: chmod u+w {file}"
            )
        if found.st_nlink > 1 + _same(_draft(real), found):
            raise ConfigError(
                f"{file}: has a second name (a hard link), which would keep the old text",
                hint=f"make it a copy or a symbolic link; see: ls -li {file}",
            )
        try:
            data = opened.read(LARGEST + 1)
        except OSError as error:
            raise _cannot(file, "read", error) from None
    if len(data) > LARGEST:
        raise ConfigError(f"{file}: larger than 16 MiB; nothing was changed")
    if not os.access(real.parent, os.W_OK):
        raise ConfigError(f"{real.parent}: may not be written by this user; nothing was changed")
    return Target(file, real, data), found


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def check_folder(target: Target) -> None:
    """
    See that a file that is not there could be made.

    Raises:
        ConfigError: What is above it is not a folder, or not one that we may write.
    """
    above = next(one for one in target.real.parents if one.exists())
    if not above.is_dir():
        raise ConfigError(f"{target.file}: {above} is not a folder")
    if not os.access(above, os.W_OK):
        raise ConfigError(f"{above}: may not be written by this user; nothing was changed")


def changed_too_often(file: Path) -> NotReady:
    return NotReady(f"{file}: is being changed by another program", hint="try again")


def replace(target: Target, data: bytes | None, *, mode: int = 0o600) -> bool:
    """
    Put new contents in place of what was read, at once and synced; None removes the file.

    What another program writes meanwhile is not lost: where the system can exchange two files,
    what was replaced is looked at and, if it is not what was read, put back.

    Args:
        mode: Of a file that is made. One that was there keeps its own.

    Returns:
        False when the file is not any more what was read; nothing is changed then.

    Raises:
        ConfigError: The disk will not have it.
    """
    draft = _draft(target.real)
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            draft.unlink()  # of somebody who was ended in the middle of this
        if data == target.data:
            return True
        if data is None:
            return _remove(target, draft)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(draft, flags, mode), "wb") as file:
            file.write(data)
            file.flush()
            if target.data is None:
                os.fchmod(file.fileno(), mode)  # whatever the umask
            else:
                _look_like(target.real, draft)
            os.fsync(file.fileno())
        done = _make(target, draft) if target.data is None else _swap(target, draft, data)
        _sync_folder(draft.parent)
        return done
    except FileNotFoundError:  # it, or its folder, was taken away meanwhile
        return False
    except OSError as error:
        raise _cannot(target.file, "written", error) from None
    finally:
        with suppress(OSError):
            draft.unlink()


def tidy(file: Path) -> None:
    """Remove the draft that somebody has left who was ended in the middle."""
    with suppress(OSError, RuntimeError):
        _draft(file.resolve()).unlink()


def _draft(real: Path) -> Path:
    """Hidden, and with an ending of its own: nobody takes it for a file of settings."""
    return real.with_name(f".{real.name}.keybroker")


def _same(file: Path, found: os.stat_result) -> bool:
    with suppress(OSError):
        return os.path.samestat(file.lstat(), found)
    return False


def missing(folder: Path) -> list[Path]:
    """Return the folders that would have to be made for this one, the deepest first."""
    return [one for one in (folder, *folder.parents) if not one.exists()]


def make_folder(folder: Path, mode: int = 0o700) -> None:
    """
    Make a folder and those above it.

    Raises:
        ConfigError: It cannot be made.
    """
    try:
        for one in reversed(missing(folder)):
            one.mkdir(mode=0o700, exist_ok=True)
            one.chmod(mode)  # whatever the umask
    except OSError as error:
        raise _cannot(folder, "made", error) from None


def _make(target: Target, draft: Path) -> bool:
    try:
        os.link(draft, target.real)  # fails if somebody made one meanwhile
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _CANNOT or target.real.exists():
            raise
        draft.replace(target.real)  # a file system without hard links
    return True


def _swap(target: Target, draft: Path, data: bytes | None) -> bool:
    """
    Put a draft in place of a file that is what was read.

    What comes out is looked at. If it is something else, it goes back in; and if what comes out
    then is not what went in, somebody wrote it meanwhile, and that is what goes back in.
    """
    put, expected = data, target.data
    for _ in range(SWAPS):
        if not _exchange(draft, target.real):
            break
        found = content(draft)
        if found == expected:
            _sync_folder(draft.parent)  # meanwhile who had opened the old one writes it, if ever
            found = content(draft)
        if found == expected:
            return put == data
        put, expected = found, put
    else:
        return False
    if content(target.real) != target.data:
        return False
    draft.replace(target.real)
    return True


def _remove(target: Target, draft: Path) -> bool:
    try:
        target.real.rename(draft)
    except FileNotFoundError:
        return target.data is None
    if content(draft) == target.data:
        _sync_folder(target.real.parent)
        return True
    _make(target, draft)
    return False


def _exchange(one: Path, other: Path) -> bool:
    """Let two files change places in one step; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    a, b = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            result = libc.renamex_np(a, b, ctypes.c_uint(_EXCHANGE))
        else:
            here = ctypes.c_int(_AT_FDCWD)
            result = libc.renameat2(here, a, here, b, ctypes.c_uint(_EXCHANGE))
    except AttributeError:  # a libc from before 2018
        return False
    if result == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number))


def _look_like(old: Path, new: Path) -> None:
    """Give a draft the mode, owner and attributes of what it replaces, and the present time."""
    found = old.stat()
    if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
        with suppress(PermissionError):
            os.chown(new, found.st_uid, found.st_gid)
    shutil.copystat(old, new)
    os.utime(new)


def content(file: Path) -> bytes | None:
    """Return what is in a file, whoever has it; None when it is not there."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot(file: Path, what: str, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or "the link leads to itself"
    return ConfigError(f"{file}: cannot be {what} ({reason})")
