"""The one place where a key is on disk as it is: for programs that run no helper, when asked for.

    /run/user/1000/keybroker/keys/work-opencode

A file of mode 0600 with the key and nothing else, not even a newline; gone when there is no key.
"""

import os
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

from keybroker.credential import Secret
from keybroker.errors import CacheError, KeybrokerError
from keybroker.paths import Disk


def keep(file: Path, secret: Secret | None, fingerprint: str, disk: Disk) -> bool:
    """
    Have the file hold this key, or remove it.

    Args:
        secret: None: there is no key for it.
        fingerprint: Of the key that may stay there though it cannot be read elsewhere just now.

    Returns:
        Whether it was written.

    Raises:
        CacheError: It could not be written, and was removed: an old key in it would end unseen.
    """
    try:
        _remove_drafts(file)
        found = _read(file, disk)
        if secret is None:
            if found is not None and not _is(found, fingerprint):
                disk.remove(file)
            return False
        if found == secret.reveal().encode():
            return False
        disk.directory(file.parent.parent)
        disk.directory(file.parent)
        disk.replace(file, secret.reveal().encode())
    except (OSError, KeybrokerError) as error:
        with suppress(OSError):
            disk.remove(file)
        why = error.strerror if isinstance(error, OSError) else error.message
        raise CacheError(f"export: {file}: cannot be written ({why})") from None
    return True


def prune(folder: Path, kept: Container[str], disk: Disk) -> None:
    """Remove the files of all other profiles, and what a crash left behind."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if name not in kept:
                disk.remove(folder / name)


def _remove_drafts(file: Path) -> None:
    """A process that was killed while it wrote may have left a key under another name."""
    with suppress(FileNotFoundError):
        for name in os.listdir(file.parent):
            if name.startswith(f".{file.name}."):
                os.unlink(file.parent / name)


def _read(file: Path, disk: Disk) -> bytes | None:
    try:
        return disk.read(file)
    except OSError:  # a link, or a folder: it is replaced, or it is said that it cannot be
        return b""


def _is(found: bytes, fingerprint: str) -> bool:
    with suppress(KeybrokerError, ValueError):
        return Secret(found.decode("ascii")).fingerprint == fingerprint
    return False
