"""Put a secret where a reference finds it, and take it back: what `init` was given by a person."""

import os
from contextlib import suppress
from pathlib import Path

from keybroker import oskeyring
from keybroker.credential import Reference, Secret
from keybroker.errors import CacheLocked, ConfigError

MOST_NAMES = 10  # that are tried: nothing that is there already is written over


def entrust(name: str, secret: Secret, folder: str | None) -> tuple[Reference, bool]:
    """
    Keep a secret under a name, or under the next one that is free.

    Args:
        folder: Where a file of its own is made, of mode 0600; None: in the OS keyring.

    Returns:
        The reference, and whether it was put there now.

    Raises:
        CacheLocked: The keyring does not work, or all names are taken.
        ConfigError: The file cannot be written.
    """
    if folder is not None:
        with suppress(OSError):  # as the attempt to write there says
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in range(1, MOST_NAMES):
        free = name if number == 1 else f"{name}-{number}"
        if folder is not None:
            if _create(Path(folder) / free, secret):
                return Reference("file", str(Path(folder) / free)), True
            continue
        found = oskeyring.read(free)
        if found is None:
            oskeyring.write(free, secret.reveal())  # and read back
            return Reference("keyring", free), True
        if found == secret.reveal():
            return Reference("keyring", free), False
    if folder is not None:
        raise ConfigError(f"{folder}/{name}: it and all names like it are taken")
    raise CacheLocked(f"keyring: {name} and all names like it are taken")


def problem() -> str | None:
    """Say why the OS keyring does not work; None where it does. Nothing is written."""
    try:
        oskeyring.read("init")
    except CacheLocked as error:
        return error.message
    return None


def withdraw(reference: Reference) -> None:
    """
    Take back what was entrusted and is not needed.

    Raises:
        CacheLocked: The keyring does not work.
    """
    if reference.kind == "keyring":
        oskeyring.remove(str(reference.value))
    else:
        with suppress(OSError):
            os.unlink(str(reference.value))


def _create(path: Path, secret: Secret) -> bool:
    """Write a new file, synced; False where one is there already."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        opened = os.open(path, flags, 0o600)
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        with open(opened, "wb") as file:
            file.write(f"{secret.reveal()}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            os.unlink(path)  # half a secret is none
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
    return True
