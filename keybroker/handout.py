"""What passes through a broker: what the cache had, what may be printed, what is to be told."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from keybroker.clock import DISAGREEMENT, Instant
from keybroker.credential import Credential, Issuer, Secret
from keybroker.journal import decode_issuer, decode_lease
from keybroker.values import dataclass

_DISAGREEMENT = DISAGREEMENT.total_seconds()


@dataclass(frozen=True, slots=True)
class Handout:
    """
    What may be printed for a profile until `ends`, or until the clocks disagree anew.

    Seconds of the epoch by the wall clock; `offset` is what added to the boot clock gives them as
    they were when the key was published, `drift` how far the clocks were apart when the gateway
    last took the key.
    """

    secret: Secret
    ends: float | None
    offset: float
    drift: float

    def alive(self, wall: float, boot: float) -> bool:
        """Say whether it may be printed now, by both clocks."""
        counted = self.offset + boot
        if abs(wall - counted - self.drift) > _DISAGREEMENT:
            return False
        return self.ends is None or max(wall, counted) < self.ends


@dataclass(frozen=True, slots=True)
class News:
    """Something that happened to a profile, for the log and for those who push."""

    profile: str
    what: str  # published, replaced, trouble, recovered, late
    text: str = ""


@dataclass(frozen=True, slots=True)
class Sealed:
    """What the cache had for a profile: a credential and the clocks when it was published."""

    credential: Credential
    label: str
    issuer: Issuer
    verified: str
    anchor: Instant

    @classmethod
    def read_all(cls, found: Mapping[str, Any]) -> "dict[str, Sealed]":
        """Take what a worker answered to `open`, by profile."""
        return {name: sealed for name, one in found.items() if (sealed := cls.read(one))}

    @classmethod
    def read(cls, found: Mapping[str, Any] | None) -> "Sealed | None":
        """Take a worker's answer to `load`."""
        if found is None:
            return None
        credential = found["credential"]
        return cls(
            Credential(Secret(credential["secret"]), decode_lease(credential["lease"])),
            found["label"],
            decode_issuer(found["issuer"]),
            found["verified"],
            Instant(datetime.fromisoformat(found["wall"]), found["boot"], found["boot_id"]),
        )
