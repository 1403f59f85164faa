"""A key that somebody else keeps: read where it is, followed when it changes.

Or a placeholder, for gateways that check no key: OGX, Ollama, vLLM, LM Studio.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from keybroker.config import Profile
from keybroker.credential import Credential, Lease, Secret, Verdict
from keybroker.errors import SourceInvalid
from keybroker.rotation import Kind
from keybroker.sources import Capabilities, gateway, reference


class Static:
    """Reads the key of a profile anew each time, so that its owner may rotate it."""

    capabilities = Capabilities(Kind.FOLLOWED)

    def __init__(self, profile: Profile, environment: Mapping[str, str]) -> None:
        self._profile = profile
        self._environment = environment
        self._gateway = gateway.Gateway.of(profile)

    def issue(self, label: str) -> Credential:
        """Return the key as it stands now; its fingerprint is its version."""
        del label  # ours to give where a key is minted; this one has its owner's name
        placeholder = self._profile.source["placeholder"]
        if placeholder is not None:
            secret = Secret(placeholder)
        else:
            secret = reference.resolve(self._profile.source["key"], self._environment)
        return Credential(secret, Lease(secret.fingerprint, "static", datetime.now(UTC)))

    def verify(self, secret: Secret) -> Verdict:
        if self._profile.source["placeholder"] is not None:
            return self._gateway.answers(secret)
        return self._gateway.verify(secret)

    def revoke(self, lease: Lease) -> None:
        raise SourceInvalid("static: a key that somebody else keeps is not ours to revoke")

    def find(self, label: str) -> Sequence[Lease]:
        return ()

    def sweep(self, prefix: str) -> Sequence[tuple[str, Lease]]:
        return ()

    def close(self) -> None:
        self._gateway.close()
