"""What came of a rotation or a revocation that somebody asked for, as plain values."""

from typing import Any

from keybroker.broker import Broker
from keybroker.config import Profile
from keybroker.errors import KeybrokerError, SourceInvalid, SourceUnavailable
from keybroker.journal import write_time
from keybroker.slots import Key, Slots

TRIES = 2  # to reach a gateway, until who waits for it is told


def rotated_or_failed(broker: Broker, name: str) -> bool:
    """Say whether a profile that was hurried has its new key, or did not get one."""
    slots = broker.slots(name)
    stuck = slots.next is not None and slots.next.failures > 0
    return not slots.rotate or slots.failures > 0 or stuck or broker.full(name)


def rotated(broker: Broker, name: str, old: Key | None) -> dict[str, Any]:
    """
    Return what a rotation did.

    Args:
        old: The key that was current before.
    """
    slots = broker.slots(name)
    new = slots.current
    if slots.rotate or new is None:
        return {"profile": name, "rotated": False, **_error(broker.why_not(name))}
    changed = old is None or old.label != new.label
    ends = new.lease.expires_at
    revokes = next((k.revoke_at for k in slots.retired if old and k.label == old.label), None)
    return {
        "profile": name,
        "rotated": changed,
        "fingerprint": new.fingerprint,
        "replaced": old.fingerprint if old is not None and changed else None,
        "expires_at": None if ends is None else write_time(ends),
        "revokes_at": None if revokes is None else write_time(revokes),
        "published": broker.published_at(name),
        "refused": new.refused_at is not None,
    }


def ours(broker: Broker, name: str) -> frozenset[str]:
    """Return the labels of a profile's keys that are not gone and ours to revoke."""
    return frozenset(key.label for key in broker.slots(name).keys if key.lease.revocable)


def has_ours(slots: Slots) -> bool:
    """Say whether anything may be alive that is ours to revoke."""
    return any(key.lease.revocable for key in slots.keys) or bool(slots.open)


def not_ours(profile: Profile) -> KeybrokerError:
    """Return what to say to somebody who wants such a key revoked."""
    signed_in = profile.logins if profile.type == "login" else ()
    ends = [f"keybroker logout {one.name}" for one in signed_in]
    return SourceInvalid(
        f"{profile.name}: somebody else keeps its key, which is not ours to revoke",
        hint=ends[0] if ends else "end it where it was made",
    )


def revoked_or_denied(broker: Broker, name: str, labels: frozenset[str]) -> bool:
    """
    Say whether trying again now would be no use: it is written down, and done later.

    Args:
        labels: Of the keys that there were before; others may have been minted since.
    """
    slots = broker.slots(name)
    denied = slots.trouble is not None and slots.trouble.code != SourceUnavailable.code
    keys = [key for key in slots.keys if key.label in labels]
    looked = all(one.looks or one.failures for one in slots.open)
    tried = all(key.failures >= (1 if denied else TRIES) for key in keys)
    return looked and (not keys or tried)


def revoked(broker: Broker, name: str, labels: frozenset[str]) -> dict[str, Any]:
    """
    Return what a revocation did.

    Args:
        labels: Of the keys that there were before.
    """
    left, trouble = len(ours(broker, name) & labels), broker.slots(name).trouble
    return {
        "profile": name,
        "revoked": len(labels) - left,
        "left": left,
        "unsettled": broker.unsettled(name),
        "published": broker.published_at(name),
        "error": trouble.message if trouble else None,
        "code": trouble.code if trouble else None,
        "hint": trouble.hint if trouble else None,
    }


def _error(error: KeybrokerError) -> dict[str, str | None]:
    return {"error": error.message, "code": error.code, "hint": error.hint}
