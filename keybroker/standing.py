"""How every profile stands, as plain values: what `status` shows, with a daemon or without."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from keybroker import rotation
from keybroker.broker import Broker
from keybroker.config import Profile
from keybroker.guidance import environment, ttl_reason
from keybroker.journal import write_time
from keybroker.rotation import Policy
from keybroker.slots import Key, Open, Slots

_WORDS: dict[type, str] = {
    rotation.Issue: "mint a new key",
    rotation.Poll: "read the source",
    rotation.Renew: "renew the lease",
    rotation.Stage: "write the new key where it is published",
    rotation.Recover: "read a key back from where it is published",
    rotation.Verify: "verify",
    rotation.Publish: "publish the new key",
    rotation.Retire: "retire",
    rotation.Revoke: "revoke the old key",
    rotation.Settle: "look up an unfinished call",
}


def rows(broker: Broker, profiles: Iterable[Profile]) -> list[dict[str, Any]]:
    """Return one row a profile; times are ISO 8601 in UTC, lengths in seconds."""
    return [_row(broker, profile) for profile in profiles]


def unconfigured(broker: Broker, known: Iterable[str]) -> list[dict[str, Any]]:
    """Return the profiles that still have keys and that no configuration names."""
    others = [(name, broker.slots(name)) for name in broker.names() if name not in set(known)]
    return [
        {"profile": name, "keys": [_key(key) for key in slots.keys]}
        for name, slots in others
        if slots.keys or slots.open
    ]


def _row(broker: Broker, profile: Profile) -> dict[str, Any]:
    policy, slots, now = profile.policy, broker.slots(profile.name), broker.now(profile.name)
    current, trouble = slots.current, slots.trouble
    step, when = _next(slots, profile, now)
    if broker.rests(profile.name) and current is None:
        step, when = "mint when somebody asks", None
    held = broker.credential(profile.name) is not None
    row: dict[str, Any] = {
        "profile": profile.name,
        "source": str(profile.issuer),
        "base_url": profile.base_url,
        "kind": profile.kind.value,
        "phase": rotation.phase(slots, policy, now).value,
        "held": held,
        "late": False,
        "fingerprint": None,
        "verified": None,
        "issued_at": None,
        "expires_at": None,
        "survives_outage_s": 0.0,
        "published": broker.published_at(profile.name),
        "trouble": None if trouble is None else trouble.message,
        "hint": None if trouble is None else trouble.hint or None,
        "open": [_open(one, policy) for one in slots.open],
        "retired": [_key(k) for k in slots.retired],
        "environment": environment(profile),
        "ttl_reason": ttl_reason(profile),
        "warnings": list(profile.warnings),
        "next": step,
        "next_at": None if when is None else write_time(when),
    }
    if current is not None:
        ends = current.lease.expires_at
        row.update(
            fingerprint=current.fingerprint,
            verified=current.verified,
            issued_at=write_time(current.lease.issued_at),
            expires_at=None if ends is None else write_time(ends),
            late=ends is not None
            and policy.kind.ours
            and now > ends - rotation.hold_of(current, policy),
        )
    if current is not None and held:  # or nobody has it to go on with
        ends = current.lease.expires_at
        left = None if ends is None else max(0.0, (ends - now).total_seconds())
        row["survives_outage_s"] = left
    return row


def _next(slots: Slots, profile: Profile, now: datetime) -> tuple[str, datetime | None]:
    """Say what the rule does next, and when."""
    step = rotation.next_step(slots, profile.policy, now)
    if not isinstance(step, rotation.Wait):
        return _WORDS[type(step)], now
    if step.until is None:
        return "none", None
    later = rotation.next_step(slots, profile.policy, step.until)
    return _WORDS.get(type(later), "none"), step.until


def _open(one: Open, policy: Policy) -> dict[str, Any]:
    """Return a call without an outcome: what it made is looked up, or else ends by itself."""
    ends = one.since + policy.timeout + one.lifetime
    return {
        "label": one.label,
        "since": write_time(one.since),
        "looks": one.looks,
        "at": str(one.issuer),
        "ends_at": write_time(ends),
    }


def _key(key: Key) -> dict[str, Any]:
    ends = key.lease.expires_at
    return {
        "fingerprint": key.fingerprint,
        "label": key.label,
        "at": str(key.issuer),
        "why": key.why,
        "revoke_at": None if key.revoke_at is None else write_time(key.revoke_at),
        "expires_at": None if ends is None else write_time(ends),
    }
