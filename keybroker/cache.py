"""How a credential is sealed on disk. May lose what it was given: the price is one more issue."""

import binascii
import json
import os
import stat
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from keybroker.carry import decode_session, encode_session
from keybroker.clock import Instant
from keybroker.credential import Credential, Issuer, Secret, Session, sha256
from keybroker.errors import CacheError, CacheLocked, CacheUnreadable, ConfigError
from keybroker.journal import (
    decode_issuer,
    decode_lease,
    encode_issuer,
    encode_lease,
    read_time,
    write_time,
)
from keybroker.paths import CACHE, WRAP_KEY, Disk, private_directory
from keybroker.values import dataclass

T = TypeVar("T")
MAGIC = b"keybroker cache 1\n"
SESSION = "session."  # before a session's key; no profile's name has a dot
CREDENTIAL = "keybroker-wrap-key"  # the name of the systemd credential


@dataclass(frozen=True, slots=True)
class WrapKey:
    """What seals the cache, and where it came from, for `status`. No key: memory only."""

    key: Secret | None
    origin: str


@dataclass(frozen=True, slots=True)
class Cached:
    """One profile's current credential, as it was when it was published."""

    credential: Credential
    label: str
    issuer: Issuer
    verified: str
    anchor: Instant  # the clocks when it was published


class Cache:
    """The sealed files of one state directory, one a profile."""

    def __init__(self, state: Path, wrap_key: Secret | None, disk: Disk | None = None) -> None:
        self._directory = state / CACHE
        self._key = wrap_key
        self._disk = disk or Disk()

    def save(self, profile: str, cached: Cached) -> None:
        """
        Seal a credential in place of the one before.

        Raises:
            CacheError: It could not be written.
        """
        self._seal(profile, _encode(cached))

    def load(self, profile: str) -> Cached | None:
        """
        Open a profile's file.

        Raises:
            CacheLocked: There is a file, but no key to open it with.
            CacheUnreadable: It was not sealed with this key for this profile, or was damaged.
        """
        return self._open(profile, _decode)

    def save_session(self, session: Session) -> None:
        """
        Seal a session in place of the one before.

        A login that failed takes nothing away from one that worked with the same: who failed may
        not have known of it, and what it was made with may be used up.

        Raises:
            CacheError: It could not be written.
        """
        if self._key is None:
            return
        with suppress(CacheError):
            session = session.over(self.load_session(session.key))
        self._seal(SESSION + session.key, json.dumps(encode_session(session)).encode())

    def load_session(self, key: str) -> Session | None:
        """
        Open a session's file.

        Raises:
            CacheLocked, CacheUnreadable: As of a profile's.
        """
        return self._open(SESSION + key, lambda data: decode_session(json.loads(data)))

    def prune_sessions(self, kept: Container[str]) -> None:
        """Remove the files of all other sessions."""
        for path in self._directory.glob(f"{SESSION}*.sealed"):
            if path.name.removeprefix(SESSION).removesuffix(".sealed") not in kept:
                with suppress(OSError):
                    self._disk.remove(path)

    def _seal(self, name: str, data: bytes) -> None:
        if self._key is None:
            return
        nonce = os.urandom(12)
        sealed = cipher(self._key).encrypt(nonce, data, _bound_to(name))
        try:
            self._disk.directory(self._directory)
            self._disk.replace(self._file(name), MAGIC + nonce + sealed)
        except OSError as error:
            raise CacheError(
                f"cache: {self._file(name)}: cannot be written ({error.strerror})"
            ) from None

    def _open(self, name: str, read: Callable[[bytes], T]) -> T | None:
        try:
            data = self._disk.read(self._file(name))
        except OSError as error:
            raise CacheUnreadable(
                f"cache: {self._file(name)}: cannot be read ({error.strerror})"
            ) from None
        if data is None:
            return None
        if self._key is None:
            raise CacheLocked(f"cache: the key that opens {self._file(name)} is not there")
        nonce, sealed = data[len(MAGIC) : len(MAGIC) + 12], data[len(MAGIC) + 12 :]
        try:
            if not data.startswith(MAGIC):
                raise ValueError
            return read(cipher(self._key).decrypt(nonce, sealed, _bound_to(name)))
        except (not_sealed_so(), ValueError, KeyError, TypeError):
            raise CacheUnreadable(
                f"cache: {self._file(name)}: cannot be opened with this key"
            ) from None

    def forget(self, profile: str) -> None:
        try:
            self._disk.remove(self._file(profile))
        except OSError as error:
            raise CacheError(
                f"cache: {self._file(profile)}: cannot be removed ({error.strerror})"
            ) from None

    def _file(self, profile: str) -> Path:
        return sealed_file(self._directory.parent, profile)


def sealed_file(state: Path, profile: str) -> Path:
    return state / CACHE / f"{profile}.sealed"


def sealed_at(state: Path, profile: str) -> int | None:
    """Return when a profile's file was written, by the disk's clock; None when there is none."""
    try:
        return sealed_file(state, profile).stat().st_mtime_ns
    except OSError:
        return None


def find_wrap_key(kind: str, state: Path, environment: Mapping[str, str]) -> WrapKey:
    """
    Return what seals the cache, by the configuration's `cache.key`.

    A new key is made where the keyring or the key file has none yet.

    Raises:
        CacheError: The place that was asked for by name cannot be used.
    """
    if kind == "memory":
        return WrapKey(None, "memory only, as configured")
    if directory := environment.get("CREDENTIALS_DIRECTORY"):
        file = Path(directory) / CREDENTIAL
        try:
            found = Disk().read(file)
        except OSError as error:
            raise CacheError(f"cache: {file}: cannot be read ({error.strerror})") from None
        if found:
            return WrapKey(Secret(sha256(b"keybroker wrap " + found)), "systemd credential")
    if kind == "file":
        return WrapKey(_from_file(private_directory(state) / WRAP_KEY), "key file")
    try:
        return WrapKey(_from_keyring(private_directory(state)), "OS keyring")
    except CacheLocked as error:
        if kind == "keyring":
            raise
        return WrapKey(None, f"memory only: {error.message}")


def _from_keyring(state: Path) -> Secret:
    from keybroker import oskeyring

    name = f"wrap-key {state.name}"
    if (found := oskeyring.read(name)) is not None and _is_key(found):
        return Secret(found)
    try:
        with Disk().lock(state / WRAP_KEY):  # two processes that find none make one
            if (found := oskeyring.read(name)) is None or not _is_key(found):
                found = _new_key()
                oskeyring.write(name, found)
    except OSError as error:
        raise CacheLocked(f"cache: {state}: cannot be locked ({error.strerror})") from None
    return Secret(found)


def _from_file(path: Path) -> Secret:
    disk = Disk()
    try:
        found = disk.read(path)
        if found is None:
            with disk.lock(path):  # two processes that find none make one
                if (found := disk.read(path)) is None:
                    found = _new_key().encode()
                    disk.replace(path, found)
        mode = os.lstat(path).st_mode
    except OSError as error:
        raise CacheError(f"cache: {path}: cannot be used ({error.strerror})") from None
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path}: others can read it", hint=f"type: chmod 600 {path}")
    text = found.decode("ascii", "replace").strip()
    if not _is_key(text):
        raise CacheUnreadable(f"cache: {path} holds no key", hint=f"type: rm {path}")
    return Secret(text)


def _new_key() -> str:
    return os.urandom(32).hex()


def _is_key(text: str) -> bool:
    try:
        return len(binascii.unhexlify(text)) == 32
    except ValueError:
        return False


def not_sealed_so() -> type[Exception]:
    """Return what is raised where something was sealed with another key, or damaged."""
    from cryptography.exceptions import InvalidTag

    return InvalidTag


def cipher(key: Secret):  # type: ignore[no-untyped-def]  # cryptography is imported late
    """Return AES-256-GCM with a key in hex; a nonce of 12 bytes is used once."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(bytes.fromhex(key.reveal()))


def _bound_to(profile: str) -> bytes:
    return MAGIC + profile.encode()


def _encode(cached: Cached) -> bytes:
    return json.dumps(
        {
            "secret": cached.credential.secret.reveal(),
            "lease": encode_lease(cached.credential.lease),
            "label": cached.label,
            "issuer": encode_issuer(cached.issuer),
            "verified": cached.verified,
            "wall": write_time(cached.anchor.wall),
            "boot": cached.anchor.boot,
            "boot_id": cached.anchor.boot_id,
        }
    ).encode()


def _decode(data: bytes) -> Cached:
    found = json.loads(data)
    wall: datetime = read_time(found["wall"])
    return Cached(
        credential=Credential(Secret(found["secret"]), decode_lease(found["lease"])),
        label=str(found["label"]),
        issuer=decode_issuer(found["issuer"]),
        verified=str(found["verified"]),
        anchor=Instant(wall, float(found["boot"]), str(found["boot_id"])),
    )
