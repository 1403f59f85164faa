"""The OS keyring, without ever a prompt. Imported in workers only: a keyring can block."""

import sys
from typing import TYPE_CHECKING

from keybroker.errors import CacheLocked

if TYPE_CHECKING:
    from keyring.backend import KeyringBackend

SERVICE = "keybroker"


def read(name: str) -> str | None:
    """
    Return an entry of the service `keybroker`; None when there is none.

    Raises:
        CacheLocked: The keyring is locked, absent, or of a kind that is not trusted.
    """
    backend = _backend()
    try:
        return backend.get_password(SERVICE, name)
    except Exception as error:  # keyring's backends raise what their libraries raise
        raise CacheLocked(f"keyring: cannot be read ({type(error).__name__})") from None


def write(name: str, value: str) -> None:
    """
    Store an entry and read it back; some backends keep nothing and say nothing.

    Raises:
        CacheLocked: It was not stored.
    """
    backend = _backend()
    try:
        backend.set_password(SERVICE, name, value)
        kept = backend.get_password(SERVICE, name)
    except Exception as error:
        raise CacheLocked(f"keyring: cannot be written ({type(error).__name__})") from None
    if kept != value:
        raise CacheLocked("keyring: what was written could not be read back")


def remove(name: str) -> None:
    """
    Remove an entry; one that is not there is a success.

    Raises:
        CacheLocked: It could not be removed.
    """
    backend = _backend()
    try:
        if backend.get_password(SERVICE, name) is not None:
            backend.delete_password(SERVICE, name)
    except Exception as error:
        raise CacheLocked(f"keyring: cannot be written ({type(error).__name__})") from None


def _backend() -> "KeyringBackend":
    """
    Return the one backend that this system may use.

    Backends are named here and not searched for: a search picks up file backends that ask for a
    password on stdin. A locked Secret Service is seen before it is asked, since asking prompts.
    """
    try:
        if sys.platform == "darwin":
            from keyring.backends.macOS import Keyring

            return Keyring()  # type: ignore[no-untyped-call,unused-ignore]
        if sys.platform == "win32":
            from keyring.backends.Windows import WinVaultKeyring

            return WinVaultKeyring()  # type: ignore[no-untyped-call,unused-ignore]
        _check_unlocked()
        from keyring.backends.SecretService import Keyring as SecretService

        return SecretService()  # type: ignore[no-untyped-call,unused-ignore]
    except CacheLocked:
        raise
    except Exception:
        raise CacheLocked("keyring: there is no keyring service here") from None


def _check_unlocked() -> None:
    from contextlib import closing

    import secretstorage

    with closing(secretstorage.dbus_init()) as connection:
        # by its alias, since get_default_collection creates one that is missing, with a prompt
        alias = "/org/freedesktop/secrets/aliases/default"
        if secretstorage.Collection(connection, alias).is_locked():
            raise CacheLocked("keyring: it is locked", hint="unlock it, or log in to the desktop")
