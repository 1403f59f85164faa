"""Secret, Lease, Credential: a value that never prints itself beside one that always may."""

from datetime import datetime
from enum import StrEnum
from typing import NoReturn

from keybroker.values import dataclass, replace

LONGEST_SECRET = 16_384  # Claude Code refuses a longer helper output


def sha256(data: bytes) -> str:
    """Return the SHA-256 in hex, without loading OpenSSL where the small C module exists."""
    try:
        from _sha2 import sha256 as digest  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        try:
            from _sha256 import sha256 as digest  # type: ignore[import-not-found,unused-ignore,no-redef]
        except ImportError:
            from hashlib import sha256 as digest  # type: ignore[assignment,unused-ignore]
    return str(digest(data).hexdigest())


class Secret:
    """
    A key that cannot be shown by accident.

    It prints as `<secret 3f9a1c02>`, cannot be pickled, copied or put into JSON, and leaves only
    through `reveal()`: to a worker's pipe, to the cache that seals it, to the one who asked for
    it, to the source that must present it.

    Raises:
        ValueError: Not one token of printable ASCII of at most 16,384 characters; the text is
            not repeated.
    """

    __slots__ = ("_text", "fingerprint")

    def __init__(self, text: str) -> None:
        if not text:
            raise ValueError("empty")
        if len(text) > LONGEST_SECRET:
            raise ValueError(f"longer than {LONGEST_SECRET} characters")
        if not all("!" <= character <= "~" for character in text):
            raise ValueError("not one token of printable ASCII")
        self._text = text
        self.fingerprint = fingerprint(text)

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"<secret {self.fingerprint}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret is not copied or pickled")

    def __getstate__(self) -> NoReturn:  # what serializers other than pickle ask for
        raise TypeError("a secret is not copied or pickled")


def fingerprint(text: str) -> str:
    """Return the printable stand-in of a secret: 8 hex digits of its SHA-256."""
    return sha256(text.encode())[:8]


@dataclass(frozen=True, slots=True)
class Reference:
    """
    Where a secret is, never the secret: `{ keyring = "litellm-admin" }`.

    `kind` is env, file, keyring, command, vault, aws or login; `value` a name, a path, a user name
    in the keyring, a program with its arguments, a place in Vault or at AWS, # and a field, or
    a login's table as JSON.
    """

    kind: str
    value: str | tuple[str, ...]

    def __str__(self) -> str:
        value = self.value if isinstance(self.value, str) else self.value[0]
        if self.kind == "login" and value.startswith("{"):
            import json

            value = json.loads(value)["name"]
        return f"{self.kind}:{value}"


@dataclass(frozen=True, slots=True)
class Issuer:
    """
    Who minted a key, and all that is needed to have it revoked there.

    Two issuers are the same when all fields are: "not found" from another one proves nothing.
    `vault` and `aws` are the tables, as JSON, of the Vault or the account that has to be asked;
    they hold no secret.
    """

    type: str
    url: str
    admin: Reference | None = None
    ca: str | None = None
    vault: str = ""
    aws: str = ""

    def __str__(self) -> str:
        return f"{self.type} {self.url}".strip()


@dataclass(frozen=True, slots=True)
class Lease:
    """
    What the issuer promised. Safe to print. Times are aware, in UTC.

    Attributes:
        id: What renew and revoke take.
        expires_at: None when no end was promised.
        renewable: A renewal may still move the end.
        renewed_at: When the end was last moved.
        session: The fingerprint of the session that it is bound to, where its end is also the
            lease's.
        session_ends: When that session ends, as far as was known.
        own_end: When it would end by itself, should the session be renewed.
        written_at: When a key that somebody else rotates was written; an answer with an earlier
            one is out of date.
        reread_at: When its keeper says that it is worth reading again.
    """

    id: str
    source: str
    issued_at: datetime
    expires_at: datetime | None = None
    renewable: bool = False
    revocable: bool = False
    renewed_at: datetime | None = None
    session: str = ""
    session_ends: datetime | None = None
    own_end: datetime | None = None
    written_at: datetime | None = None
    reread_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Credential:
    """A key and what its issuer promised of it."""

    secret: Secret
    lease: Lease


@dataclass(frozen=True, slots=True)
class Session:
    """
    What a source is asked with: a secret of its own that ends, such as a token of Vault's.

    The broker keeps it, and seals it, for its workers: one login in the life of a token.

    Attributes:
        key: What it opens: one server, one way to log in. Never a secret.
        serial: Counts its changes: of two, the higher is the newer.
        secret: None where the last login failed, or was never tried.
        material: The fingerprint of what was logged in with; another may do better.
        kept: What can be had only once and is needed for each login: an unwrapped secret_id.
        failures: Logins or renewals in a row that were refused or failed.
        refusals: How often its material was refused, whatever came in between.
        not_before: No other login is tried before, unless the material changed.
        trouble: What the last login said: the error's code, message and hint.
    """

    key: str
    serial: int = 0
    secret: Secret | None = None
    issued_at: datetime | None = None
    expires_at: datetime | None = None
    renewable: bool = False
    renewed_at: datetime | None = None
    material: str = ""
    kept: Secret | None = None
    failures: int = 0
    refusals: int = 0
    not_before: datetime | None = None
    trouble: tuple[str, str, str] | None = None

    def over(self, before: "Session | None") -> "Session":
        """Return what is to be kept of two: how a login failed, and what one with the same made."""
        if before is None or before.material != self.material or self.secret or self.kept:
            return self
        return replace(
            before,
            serial=self.serial,
            failures=self.failures,
            refusals=self.refusals,
            not_before=self.not_before,
            trouble=self.trouble,
        )


class Look(StrEnum):
    """What one look at the gateway with a key showed."""

    ALIVE = "alive"
    REFUSED = "refused"
    UNDECIDED = "undecided"  # the answer was about something else than the key
    UNVERIFIED = "unverified"  # no method here tells a good key from a made-up one


@dataclass(frozen=True, slots=True)
class Verdict:
    """One look: by which method, and why that outcome, in words of our own."""

    look: Look
    method: str
    reason: str = ""


class Phase(StrEnum):
    """How a profile's current key stands, for people."""

    NONE = "none"
    FRESH = "fresh"
    STALE = "stale"  # valid, to be replaced
    SUSPECT = "suspect"  # refused once; still handed out while it is being replaced
    CONDEMNED = "condemned"
    EXPIRED = "expired"
