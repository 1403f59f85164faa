"""A key that somebody else keeps: read where it is, followed when it changes.

Or a placeholder, for gateways that check no key: OGX, Ollama, vLLM, LM Studio.
"""

from collections.abc import Mapping
from datetime import UTC, datetime

from keybroker.config import Profile
from keybroker.credential import Credential, Lease, Secret, Verdict
from keybroker.sources import reference
from keybroker.sources.followed import Followed
from keybroker.sources.gateway import Gateway


class Static(Followed):
    """Reads the key of a profile anew each time, so that its owner may rotate it."""

    type = "static"

    def __init__(
        self,
        profile: Profile,
        environment: Mapping[str, str],
        vault: reference.Reader | None = None,
    ) -> None:
        super().__init__(Gateway.of(profile))
        self._profile = profile
        self._environment = environment
        self._vault = vault

    def issue(self, label: str) -> Credential:
        """Return the key as it stands now; its fingerprint is its version."""
        del label  # ours to give where a key is minted; this one has its owner's name
        placeholder = self._profile.source["placeholder"]
        if placeholder is not None:
            secret = Secret(placeholder)
        else:
            secret = reference.resolve(self._profile.source["key"], self._environment, self._vault)
        return Credential(secret, Lease(secret.fingerprint, "static", datetime.now(UTC)))

    def verify(self, secret: Secret) -> Verdict:
        if self._profile.source["placeholder"] is not None:
            return self._gateway.answers(secret)
        return super().verify(secret)
