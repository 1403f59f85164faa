"""How every profile stands, as plain values: what `status` shows, with a daemon or without."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from keybroker import rotation
from keybroker.broker import Broker
from keybroker.config import Profile
from keybroker.credential import Phase
from keybroker.guidance import environment, ttl_reason
from keybroker.journal import write_time
from keybroker.rotation import Kind, Policy
from keybroker.slots import Key, Open, Slots

TYPE_CHECKING = False
if TYPE_CHECKING:  # most daemons have no use for it
    from keybroker.endings import Ending

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


# What only a person can mend, by the code of the error that it shows as.
_PEOPLE = {
    "denied": "denied",
    "login": "login needed",
    "invalid": "no usable key",
    "config": "configuration",
    "cache": "cache",
    "cache-locked": "keyring locked",
    "cache-unreadable": "cache",
    "journal": "journal",
}


def rows(
    broker: Broker, profiles: Iterable[Profile], soon: Mapping[str, "Ending"] | None = None
) -> list[dict[str, Any]]:
    """
    Return one row a profile; times are ISO 8601 in UTC, lengths in seconds.

    Args:
        soon: The sign-ins that end, by login.
    """
    return [{**_row(broker, one), "sign_in": _sign_in(one, soon or {})} for one in profiles]


def unconfigured(broker: Broker, known: Iterable[str]) -> list[dict[str, Any]]:
    """Return the profiles that still have keys and that no configuration names."""
    others = [(name, broker.slots(name)) for name in broker.names() if name not in set(known)]
    return [
        {"profile": name, "keys": [_key(key) for key in slots.keys]}
        for name, slots in others
        if slots.keys or slots.open
    ]


def needs(row: Mapping[str, Any], *, locked: bool) -> tuple[str, str] | None:
    """
    Say what a person must do for a profile, in a few words and in what to type; None: nothing.

    Args:
        row: One of `rows`.
        locked: A keyring could not be opened, so that new keys are sealed nowhere.
    """
    code, look = row["code"], f"keybroker status {row['profile']}"
    ours = row["kind"] != Kind.FOLLOWED.value
    if code in _PEOPLE:
        return _PEOPLE[code], (row["hint"] or look).removeprefix("run: ")
    if row["phase"] in (Phase.SUSPECT.value, Phase.CONDEMNED.value):
        return "key refused", look if ours else "write a new one where its owner keeps it"
    if locked and ours:
        return "keyring locked", "unlock it"
    sign_in = row.get("sign_in")  # a daemon of before says none
    if sign_in is not None and sign_in["ended"]:
        return _PEOPLE["login"], sign_in["command"]
    if row["late"]:
        return "late", look
    if not row["held"] and code is not None:
        return "source unavailable" if code == "unavailable" else code, row["hint"] or look
    if sign_in is not None:
        return f"sign-in ends in {_length(sign_in['ends_in_s'])}", sign_in["command"]
    return None


def glance(row: Mapping[str, Any], *, locked: bool) -> str:
    """Say it in one short line, in ASCII: the profile, the time that is left, what is needed."""
    seconds, needed = row["survives_outage_s"], needs(row, locked=locked)
    left = "no end" if seconds is None else _length(int(seconds))
    mark = "" if needed is None else f" ! {needed[0]}"
    return f"{row['profile']} {left if row['held'] else 'no key'}{mark}"


def _length(seconds: int) -> str:
    for size, unit, smaller, small in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m")):
        if seconds >= size:
            rest = seconds % size // smaller
            return f"{seconds // size}{unit} {rest}{small}" if rest else f"{seconds // size}{unit}"
    return f"{seconds // 60}m" if seconds >= 120 else f"{seconds}s"


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
        "exported": broker.exported_to(profile.name),
        "trouble": None if trouble is None else trouble.message,
        "hint": None if trouble is None else trouble.hint or None,
        "code": None if trouble is None else trouble.code,
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


def _sign_in(profile: Profile, soon: Mapping[str, "Ending"]) -> dict[str, Any] | None:
    """Return the first of a profile's sign-ins that ends, if one does."""
    if not soon:
        return None
    found = [soon[one.name] for one in profile.logins if one.name in soon]
    if not found:
        return None
    first = min(found, key=lambda one: (not one.over, one.until or one.standing.since))
    left = first.until - datetime.now(UTC) if first.until and not first.over else timedelta(0)
    return {
        "login": first.login,
        "ended": first.over,
        "ends_at": None if first.until is None else write_time(first.until),
        "ends_in_s": max(0, int(left.total_seconds())),
        "command": first.command,
    }


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
