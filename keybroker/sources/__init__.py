"""Where credentials come from: one module a system, one contract for all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from keybroker import aws as accounts  # `aws` is also a package below this one
from keybroker.config import Profile
from keybroker.credential import Credential, Issuer, Lease, Reference, Secret, Verdict
from keybroker.errors import SourceInvalid
from keybroker.rotation import Kind
from keybroker.sources.held import Held
from keybroker.vault import read_text

TOGETHER = frozenset({"aws"})  # kinds of which several can be read with one call
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

    def look(self, known: Lease) -> Lease | None:
        """
        Return the lease as it is now if the key that is known still counts; None: read it.

        Raises:
            As `issue`.
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


class Store(Protocol):
    """Where new keys are published: one secret that others read. Blocking; runs in a worker."""

    def standing(self) -> str:
        """
        Return which version stands there now; empty where there is none.

        Raises:
            SourceError, ConfigError: It could not be asked, or there is no such secret.
        """

    def stage(self, label: str, credential: Credential) -> None:
        """Put a key beside what is read, under its label; doing so twice is fine."""

    def recover(self, label: str) -> Secret | None:
        """Read back what was put there under a label; None when there is nothing."""

    def promote(self, label: str, credential: Credential, base: str) -> bool:
        """
        Make a key the one that is read, if `base` still stands there; doing so twice is fine.

        Returns:
            Whether it is. If not, somebody else was first, and nothing was changed.
        """

    def close(self) -> None:
        """Give up what is held open."""


def store(profile: Profile, environment: Mapping[str, str], held: Held) -> Store:
    """Return where a profile's keys are published."""
    publish = profile.publish
    assert publish is not None, "only who publishes has one"
    if publish.vault is not None:
        from keybroker.sources.vault.store import VaultStore

        seconds = profile.source["timeout"].total_seconds()
        return VaultStore.of(publish, publish.vault, environment, held, seconds)
    from keybroker.sources.aws.store import AwsStore

    return AwsStore.of(publish, held)


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
    if profile.type == "aws":
        from keybroker.sources.aws.source import Aws

        return Aws.of(profile, held)
    if profile.type == "command":
        from keybroker.sources.command import Command

        return Command(profile, environment)
    seconds = profile.source["timeout"].total_seconds()
    reader = _reader(profile.issuer, environment, held, seconds)
    if profile.type == "login":
        from keybroker.sources.signed_in import SignedIn

        return SignedIn(profile, environment, held)
    if profile.type == "litellm":
        from keybroker.sources.litellm import LiteLLM

        return LiteLLM.of(profile, environment, reader, _renewer(profile.issuer, environment, held))
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

        reader = _reader(issuer, environment, held, seconds, ends=True)
        return LiteLLM.by(issuer, environment, seconds, reader, _renewer(issuer, environment, held))
    raise SourceInvalid(f"{issuer.type}: this keybroker cannot revoke what it issued")


def _reader(
    issuer: Issuer,
    environment: Mapping[str, str],
    held: Held,
    seconds: float,
    *,
    ends: bool = False,
) -> Callable[[Reference], Secret] | None:
    """
    Return what reads references that lead elsewhere, in a third of the time of a call.

    Args:
        ends: What is read is to end what was made with it.
    """
    if issuer.admin is not None and issuer.admin.kind == "login":
        from keybroker.sources.signed_in import read_reference as token

        return lambda reference: token(reference, environment, held, ends=ends)
    if issuer.vault:
        from keybroker.sources.vault.place import read_reference

        vault = read_text(issuer.vault)
        return lambda reference: read_reference(
            reference, vault, environment, held, seconds / 3, ends=ends
        )
    if issuer.aws:
        from keybroker.sources.aws.source import read_reference as read_aws_reference

        account = accounts.read_text(issuer.aws)
        return lambda reference: read_aws_reference(reference, account, held)
    return None


def _renewer(
    issuer: Issuer, environment: Mapping[str, str], held: Held
) -> Callable[[], Secret] | None:
    """Return what has a login's token renewed that was refused; None where none is presented."""
    admin = issuer.admin
    if admin is None or admin.kind != "login":
        return None
    from keybroker.sources.signed_in import read_reference

    return lambda: read_reference(admin, environment, held, fresh=True)


def read_together(profiles: Sequence[Profile], held: Held) -> None:
    """Read with few calls what is about to be asked for, where there is a call for that."""
    places: dict[accounts.Account, list[str]] = {}
    for profile in profiles:
        if profile.type == "aws" and profile.account is not None:
            places.setdefault(profile.account, []).append(profile.source["secret"])
    for place, secrets in places.items():
        if len(secrets) > 1:
            from keybroker.sources.aws.account import Account

            Account.of(place, held).foresee(secrets)


def keep_session(text: str, environment: Mapping[str, str], held: Held) -> None:
    """
    Renew the session of a Vault, given as its table.

    Raises:
        SourceError, ConfigError: It could not be renewed, and no login was to be had.
    """
    from keybroker.sources.vault.place import keep_session
    from keybroker.vault import read_text

    keep_session(read_text(text), environment, held, RENEWAL_SECONDS)


def end_session(text: str, environment: Mapping[str, str], held: Held) -> None:
    """
    End the session of a Vault, given as its table.

    Raises:
        SourceError: Vault did not confirm it.
    """
    from keybroker.sources.vault.place import end_session
    from keybroker.vault import read_text

    end_session(read_text(text), environment, held, RENEWAL_SECONDS)


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
