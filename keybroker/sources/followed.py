"""What all sources have in common whose keys somebody else keeps."""

from collections.abc import Sequence

from keybroker.credential import Lease, Secret, Verdict
from keybroker.errors import SourceDenied, SourceInvalid
from keybroker.rotation import Kind
from keybroker.sources import Capabilities
from keybroker.sources.gateway import Gateway


class Followed:
    """Verifies what it reads; finds nothing, ends nothing. `type` begins its messages."""

    type: str
    capabilities = Capabilities(Kind.FOLLOWED)

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def verify(self, secret: Secret) -> Verdict:
        return self._gateway.verify(secret)

    def look(self, known: Lease) -> Lease | None:
        return None  # it is as cheap to read it

    def renew(self, lease: Lease) -> Lease:
        raise SourceDenied(f"{self.type}: its keys are not renewed")

    def revoke(self, lease: Lease) -> None:
        raise SourceInvalid(f"{self.type}: a key that somebody else keeps is not ours to revoke")

    def find(self, label: str) -> Sequence[Lease]:
        return ()

    def sweep(self, prefix: str) -> Sequence[tuple[str, Lease]]:
        return ()

    def close(self) -> None:
        self._gateway.close()
