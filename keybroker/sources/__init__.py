"""Where credentials come from: one module a system, one contract for all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from keybroker.config import Profile
from keybroker.credential import Credential, Issuer, Lease, Reference, Secret, Verdict
from keybroker.errors import SourceInvalid
from keybroker.rotation import Kind
from keybroker.sources.held import Held
from keybroker.vault import Vault as Table
from keybroker.vault import read_text

RENEWAL_SECONDS = 8.0  # the longest that a session's renewal takes


@dataclass(frozen=True, slots=True)
class Capabilities:
    """
    What a source can do, for the rule and for the docs.

    Attributes:
        find: A key can be found by its label after a crash.
        revoke: A key can be ended before its time.
        enforces_expiry: The gateway itself ends a key when its lifetime is over.
        verify_info: The key API tells whether a key is alive.
    """

    kind: Kind
    find: bool = False
    revoke: bool = False
    enforces_expiry: bool = False


class Source(Protocol):
    """Where credentials come from. Blocking; runs in a worker process."""

    capabilities: Capabilities

    def issue(self, label: str) -> Credential:
        """
        Mint a key under a label, or fetch the one that somebody else rotates.

        Raises:
            SourceUnavailable: No answer, 5xx, throttled; `unknown` when it may have committed.
            SourceDenied: The admin credential was refused.
            SourceInvalid: An answer that is no usable credential; `unknown` as above.
        """

    def renew(self, lease: Lease) -> Lease:
        """
        Have a lease's end moved; return the lease as it is now.

        Raises:
            SourceUnavailable: It was not confirmed.
            SourceDenied: It may not be renewed; it lives to its end.
            SourceInvalid: It is no more.
        """

    def revoke(self, lease: Lease) -> None:
        """
        End a key; one that the source does not know any more is a success.

        Raises:
            SourceUnavailable, SourceDenied, SourceInvalid: It was not confirmed.
        """

    def find(self, label: str) -> Sequence[Lease]:
        """Return what bears exactly this label and was not revoked."""

    def sweep(self, prefix: str) -> Sequence[tuple[str, Lease]]:
        """Return label and lease of all that was not revoked and whose label begins so."""

    def verify(self, secret: Secret) -> Verdict:
        """Try a key on the data plane, by a method that was seen to refuse a made-up one."""

    def close(self) -> None:
        """Give up what is held open."""


def build(profile: Profile, environment: Mapping[str, str], held: Held | None = None) -> Source:
    """
    Return the source of a profile. Its library is imported here and not before.

    Args:
        held: The sessions that a worker was handed; those begun are put there.
    """
    held = held or Held()
    if profile.type == "vault":
        from keybroker.sources.vault.source import Vault

        return Vault.of(profile, environment, held)
    if profile.type == "command":
        from keybroker.sources.command import Command

        return Command(profile, environment)
    seconds = profile.source["timeout"].total_seconds()
    reader = None if profile.vault is None else _reader(profile.vault, environment, held, seconds)
    if profile.type == "litellm":
        from keybroker.sources.litellm import LiteLLM

        return LiteLLM.of(profile, environment, reader)
    from keybroker.sources.static import Static

    return Static(profile, environment, reader)


def revoker(
    issuer: Issuer,
    environment: Mapping[str, str],
    seconds: float = 8.0,
    held: Held | None = None,
) -> Source:
    """Return a source that can find and revoke what an issuer of the journal minted."""
    held = held or Held()
    if issuer.type == "vault":
        from keybroker.sources.vault.source import Vault

        return Vault.by(issuer, environment, seconds, held)
    if issuer.type == "litellm":
        from keybroker.sources.litellm import LiteLLM

        vault = read_text(issuer.vault) if issuer.vault else None
        reader = None if vault is None else _reader(vault, environment, held, seconds)
        return LiteLLM.by(issuer, environment, seconds, reader)
    raise SourceInvalid(f"{issuer.type}: this keybroker cannot revoke what it issued")


def _reader(
    vault: Table, environment: Mapping[str, str], held: Held, seconds: float
) -> Callable[[Reference], Secret]:
    """Return what reads references that lead to a Vault, in a third of the time of a call."""
    from keybroker.sources.vault.place import read_reference

    return lambda reference: read_reference(reference, vault, environment, held, seconds / 3)


def keep_session(text: str, environment: Mapping[str, str], held: Held) -> None:
    """
    Renew the session of a Vault, given as its table.

    Raises:
        SourceError, ConfigError: It could not be renewed, and no login was to be had.
    """
    from keybroker.sources.vault.place import keep_session
    from keybroker.vault import read_text

    keep_session(read_text(text), environment, held, RENEWAL_SECONDS)


def check_hand_out(secret: Secret, profile: Profile) -> None:
    """
    Refuse to send Anthropic's own key to somebody else's host.

    Raises:
        SourceInvalid: The key begins with sk-ant- and base_url is not Anthropic's.
    """
    from urllib.parse import urlsplit

    host = urlsplit(profile.base_url).hostname or ""
    anthropic = host == "anthropic.com" or host.endswith(".anthropic.com")
    if secret.reveal().startswith("sk-ant-") and not anthropic and not profile.anthropic_key:
        raise SourceInvalid(
            f"{profile.type}: an Anthropic key (sk-ant-…) is not handed out for {host}",
            hint=f"if it is meant to go there, set profiles.{profile.name}.anthropic_key = true",
        )
