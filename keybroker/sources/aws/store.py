"""Publish keys in AWS Secrets Manager, by the four steps of its rotations.

1. *create*: the new value, as a version labelled AWSPENDING whose id is made of our label, so that
   it can be found again after a crash.
2. *set*: nothing is left to do, since the gateway made the key.
3. *test*: the broker tries it at the gateway.
4. *finish*: AWSCURRENT is moved, from the version that stood there when we began: who finds
   another one there was not the first.

See: https://docs.aws.amazon.com/secretsmanager/latest/userguide/rotate-secrets_lambda-functions.html
"""

import json
from typing import Any

from keybroker.config import Publish
from keybroker.credential import Credential, Lease, Secret, sha256
from keybroker.errors import SourceUnavailable
from keybroker.journal import write_time
from keybroker.sources.aws.account import Account
from keybroker.sources.aws.refusals import Problem
from keybroker.sources.aws.secret import CURRENT, MARKED, NOT_THERE, PENDING, Kept, pointed
from keybroker.sources.held import Held

BEHIND = Problem(SourceUnavailable, "answers with an older state", "it is asked again by itself")
NOT_FROM_THERE = "InvalidParameterException"  # of a label that is somewhere else by now
WRITTEN = "ResourceExistsException"  # of a version that is there; its other fields may differ


class AwsStore:
    """One secret, or one field of its JSON; the other fields stay as they are."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    @classmethod
    def of(cls, publish: Publish, held: Held) -> "AwsStore":
        assert publish.account is not None, "it is to be published at AWS"
        account = Account.of(publish.account, held)
        return cls(Kept(account, publish.settings["secret"], publish.settings["field"]))

    def standing(self) -> str:
        return self._kept.describe().current

    def stage(self, label: str, credential: Credential) -> None:
        """Write the version that may become current."""
        put_pending(self._kept, token_of(label), credential)

    def recover(self, label: str) -> Secret | None:
        """Read a version by its id, whether it bears a label or not."""
        kept, version = self._kept, token_of(label)
        answer = kept.account.ask(
            "GetSecretValue", kept.secret, but=(NOT_THERE, MARKED), VersionId=version
        )
        if answer.code == MARKED:  # which says nothing of what is there
            kept.describe()
            raise kept.error("cannot be read as it stands")
        return None if answer.code else kept.take(answer)[0]

    def promote(self, label: str, credential: Credential, base: str) -> bool:
        """Move AWSCURRENT, and say whether it is where it should be."""
        version = token_of(label)
        moved = move_current(self._kept, version, base)
        if not moved:
            take_off_pending(self._kept, version)  # else no rotation of AWS's own could begin
        return moved

    def close(self) -> None:
        """The account is its worker's, and is asked by others too."""


def token_of(label: str) -> str:
    """Return the ClientRequestToken of a label, which becomes the version's id: a UUID's form."""
    digits = sha256(label.encode())
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:32]))


def put_pending(kept: Kept, token: str, credential: Credential) -> bool:
    """
    Write a key as a version of its own, which nobody reads yet. Doing so twice is fine.

    Returns:
        Whether it is there as it should be; if not, the version has another value.
    """
    answer = kept.account.ask(
        "PutSecretValue",
        kept.secret,
        but=(WRITTEN,),
        ClientRequestToken=token,
        SecretString=_value(kept, credential.secret, credential.lease),
        VersionStages=[PENDING],
    )
    return not answer.code


def move_current(kept: Kept, version: str, base: str) -> bool:
    """
    Make a version the one that is read, if the one that stood there before still does.

    The service checks that itself, as it moves the label: of two, one is the first.
    """
    standing = kept.describe()
    if standing.current not in (version, base):
        return False
    if standing.current != version:
        given = {"RemoveFromVersionId": base} if base else {}
        answer = kept.account.ask(
            "UpdateSecretVersionStage",
            kept.secret,
            but=(NOT_FROM_THERE, NOT_THERE),
            VersionStage=CURRENT,
            MoveToVersionId=version,
            **given,
        )
        if answer.code:
            standing = kept.describe()
            if standing.current == base and answer.code == NOT_FROM_THERE:
                raise kept.account.error(kept.secret, BEHIND)
            if standing.current != version:
                return False
    if PENDING in standing.versions.get(version, ()):
        take_off_pending(kept, version)
    return True


def take_off_pending(kept: Kept, version: str) -> None:
    """End a rotation; a label that is gone already is no matter."""
    kept.account.ask(
        "UpdateSecretVersionStage",
        kept.secret,
        but=(NOT_FROM_THERE, NOT_THERE),
        VersionStage=PENDING,
        RemoveFromVersionId=version,
    )


def _value(kept: Kept, secret: Secret, lease: Lease) -> str:
    """Return the new value: the key alone, or what stands there now with its fields changed."""
    if kept.field is None:
        return secret.reveal()
    *above, last = pointed(kept.field)
    answer = kept.account.ask("GetSecretValue", kept.secret, but=(NOT_THERE,), VersionStage=CURRENT)
    whole: Any = {} if answer.code else kept.table(kept.text(answer))
    inner = whole
    for name in above:
        inner = inner.setdefault(name, {}) if isinstance(inner, dict) else None
    if not isinstance(inner, dict):
        raise kept.error(f"has no place for {kept.field}", "it is no JSON object; see field")
    inner[last] = secret.reveal()
    inner.pop("ttl", None)
    inner.pop("expires_at", None)
    if lease.expires_at is not None:
        inner["expires_at"] = write_time(lease.expires_at)
    return json.dumps(whole)
