"""What a sign-in gave, and the sealed file that it is kept in: whole, synced, one writer at a time.

    {"version":1,"standing":{"name":"corp","who":"ada@example.com",…},"sealed":"base64"}

The header is bound to what is sealed: neither can be exchanged alone.
"""

import base64
import binascii
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from keybroker.cache import cipher, not_sealed_so
from keybroker.credential import Secret
from keybroker.errors import (
    CANNOT_KEEP,
    CacheError,
    CacheLocked,
    CacheUnreadable,
    SourceUnavailable,
)
from keybroker.paths import Disk, private_directory
from keybroker.signin import (
    FOLDER,
    LOCK_SECONDS,
    VERSION,
    SignIn,
    Standing,
    decode_standing,
    encode_standing,
    file_of,
)
from keybroker.values import dataclass, field, replace

AGAIN_SECONDS = 0.02  # a lock is asked for so often


@dataclass(frozen=True, slots=True)
class Tokens:
    """
    What a sign-in gave.

    Attributes:
        standing: What may be said of it.
        access: What is used: the token, or the key.
        refresh: What a new one is had with; a provider may let it be used only once.
        extra: What else the provider wants to see again, such as the id of a client that it
            registered; some of it is secret.
    """

    standing: Standing
    access: Secret
    refresh: Secret | None = None
    extra: Mapping[str, str] = field(default_factory=dict, repr=False)

    def ended(self, why: str) -> "Tokens":
        """Return the same, as one whose sign-in is over."""
        return replace(self, standing=replace(self.standing, ended=why))

    def left(self, now: datetime) -> float:
        """Return for how many seconds its token can be used; for ever is infinite."""
        ends = self.standing.access_ends
        return float("inf") if ends is None else (ends - now).total_seconds()


def incoming(state: Path, key: Secret, disk: Disk | None = None) -> "Store":
    """Return where a sign-in is that was just done, for the one who may keep it to take over."""
    return Store(private_directory(state / FOLDER) / "incoming", key, disk)


class Store:
    """
    The sign-ins of one state directory, one file each.

    Args:
        key: What seals them; None: none can be opened or kept.
    """

    def __init__(self, state: Path, key: Secret | None, disk: Disk | None = None) -> None:
        self._state = state
        self._key = key
        self._disk = disk or Disk()

    def load(self, sign_in: SignIn) -> Tokens | None:
        """
        Open a sign-in's file; None where there is none, or it was made by another table.

        Raises:
            CacheLocked: There is a file, but nothing to open it with.
            CacheUnreadable: It was sealed with another key, or damaged.
        """
        file = file_of(self._state, sign_in.name)
        try:
            data = self._disk.read(file)
        except OSError as error:
            raise CacheUnreadable(f"login: {file}: cannot be read ({error.strerror})") from None
        if data is None:
            return None
        if self._key is None:
            raise CacheLocked(f"login {sign_in.name}: nothing opens its file", hint=CANNOT_KEEP)
        try:
            found = json.loads(data)
            sealed = base64.b64decode(found["sealed"], validate=True)
            header = found["standing"]
            opened = cipher(self._key).decrypt(sealed[:12], sealed[12:], _bound(header))
            tokens = decode_tokens({"standing": header, **json.loads(opened)})
        except (not_sealed_so(), binascii.Error, ValueError, KeyError, TypeError, AttributeError):
            raise CacheUnreadable(
                f"login {sign_in.name}: its file cannot be opened with this key",
                hint=f"run: keybroker login {sign_in.name}",
            ) from None
        return tokens if tokens.standing.mark == sign_in.mark else None

    def save(self, tokens: Tokens) -> None:
        """
        Seal what a sign-in gave in place of what was there; it is on the disk when this returns.

        Raises:
            CacheLocked: There is nothing to seal it with.
            CacheError: It could not be written.
        """
        name = tokens.standing.name
        if self._key is None:
            raise CacheLocked(f"login {name}: a sign-in can be kept nowhere", hint=CANNOT_KEEP)
        values, nonce = encode_tokens(tokens), os.urandom(12)
        header = values.pop("standing")
        sealed = nonce + cipher(self._key).encrypt(
            nonce, json.dumps(values).encode(), _bound(header)
        )
        whole = {
            "version": VERSION,
            "standing": header,
            "sealed": base64.b64encode(sealed).decode("ascii"),
        }
        file = file_of(self._state, name)
        try:
            self._disk.directory(file.parent)
            self._disk.replace(file, json.dumps(whole).encode())
        except OSError as error:
            raise CacheError(f"login: {file}: cannot be written ({error.strerror})") from None

    def forget(self, name: str) -> None:
        """
        Remove a sign-in's file; one that is not there is a success.

        Raises:
            CacheError: It could not be removed.
        """
        file = file_of(self._state, name)
        try:
            self._disk.remove(file)
        except OSError as error:
            raise CacheError(f"login: {file}: cannot be removed ({error.strerror})") from None

    def alone(self, name: str) -> AbstractContextManager[None]:
        """Be the only process that changes a sign-in; as the function `alone`."""
        return alone(self._state, f"{name}.lock", f"login {name}: another process is at it")


@contextmanager
def alone(state: Path, name: str, problem: str, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """
    Be the only process that has a lock, which is let go of when a process dies.

    Raises:
        SourceUnavailable: Another has it, and was not done in time: the `problem`.
        CacheError: The lock's file cannot be opened.
    """
    folder = private_directory(state / FOLDER)
    try:
        held = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise CacheError(f"login: {folder}: cannot be used ({error.strerror})") from None
    try:
        until = time.monotonic() + seconds
        while not _locked(held):
            if time.monotonic() > until:
                raise SourceUnavailable(problem, hint="try again when it is done")
            time.sleep(AGAIN_SECONDS)
        yield
    finally:
        os.close(held)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _bound(header: Mapping[str, Any]) -> bytes:
    return b"keybroker login 1\n" + json.dumps(header, sort_keys=True).encode()


def encode_tokens(tokens: Tokens) -> dict[str, Any]:
    """Return what a sign-in gave as plain values, to be sealed: secrets leave here."""
    return {
        "standing": encode_standing(tokens.standing),
        "access": tokens.access.reveal(),
        "refresh": None if tokens.refresh is None else tokens.refresh.reveal(),
        "extra": dict(tokens.extra),
    }


def decode_tokens(found: Mapping[str, Any]) -> Tokens:
    """Read it back; ValueError, KeyError or TypeError when it is none."""
    return Tokens(
        decode_standing(found["standing"]),
        Secret(found["access"]),
        None if found["refresh"] is None else Secret(found["refresh"]),
        dict(found["extra"]),
    )
