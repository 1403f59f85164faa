"""status: how every key stands, what comes next, and the lines to paste."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import click

from keybroker import rotation
from keybroker.audit import Audit
from keybroker.broker import Broker
from keybroker.cli.base import coloured, for_profile, in_words, on_the_clock, print_json
from keybroker.cli.work import Desk, configuration, desk
from keybroker.config import Profile
from keybroker.credential import Phase
from keybroker.errors import JournalError
from keybroker.guidance import environment, ttl_reason
from keybroker.slots import Key, Slots

COLOURS = {
    Phase.FRESH: "green",
    Phase.STALE: "yellow",
    Phase.SUSPECT: "yellow",
    Phase.CONDEMNED: "red",
    Phase.EXPIRED: "red",
    Phase.NONE: "red",
}


@click.command("status")
@for_profile
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status_command(profile: str | None, as_json: bool) -> None:
    """Show every profile's key, what comes next, and the settings.json lines to paste.

    Reads what is on disk; asks no gateway and changes nothing.
    """
    config = configuration()
    chosen = [config.profile(profile)] if profile else list(config.profiles.values())
    with desk(config, lock=None) as at:
        failures = _last_failures(at)
        rows = [_row(at, one, failures.get(one.name)) for one in chosen]
        left = [] if profile else list(_unconfigured(at.broker, {p.name for p in chosen}))
        if as_json:
            print_json({"cache": at.wrap_key.origin, "profiles": rows, "unconfigured": left})
            return
        if not rows and not left:
            config.profile(None)  # says how to configure one
        _print_table(rows)
        for row in rows:
            _print_details(row, at)
            if len(rows) == 1:
                _print_settings(row)
        if len(rows) > 1:
            print("\nkeybroker status PROFILE prints the settings.json lines of one of them")
        for one in left:
            text = "keybroker revoke " + one["profile"]
            print(
                f"\n{one['profile']}: is not configured any more, and has {len(one['keys'])} keys"
            )
            _print_keys(one["keys"], [])
            print(f"  end them: {text}")


def settings(profile: Profile) -> dict[str, Any]:
    """Return what belongs into Claude Code's settings.json for a profile."""
    return {
        "apiKeyHelper": f"exec {_this_program()} get {profile.name}",
        "env": environment(profile),
    }


def _this_program() -> str:
    """Return how a shell runs this keybroker from any folder."""
    started = os.path.abspath(sys.argv[0])
    if os.path.basename(started) == "keybroker" and os.access(started, os.X_OK):
        return shlex.quote(started)
    if (found := shutil.which("keybroker")) is not None:
        return shlex.quote(os.path.abspath(found))
    return shlex.join([sys.executable, "-I", "-c", "from keybroker.cli import main; main()"])


def _row(at: Desk, profile: Profile, failure: dict[str, Any] | None) -> dict[str, Any]:
    broker, policy = at.broker, profile.policy
    slots, now = broker.slots(profile.name), broker.now(profile.name)
    current = slots.current
    row: dict[str, Any] = {
        "profile": profile.name,
        "source": str(profile.issuer),
        "base_url": profile.base_url,
        "kind": profile.kind.value,
        "phase": rotation.phase(slots, policy, now).value,
        "readable": current is None or broker.credential(profile.name) is not None,
        "fingerprint": None,
        "verified": None,
        "issued_at": None,
        "expires_at": None,
        "survives_outage_s": 0.0,
        "last_failure": failure,
        "open": [
            {"label": o.label, "since": o.since, "looks": o.looks, "at": str(o.issuer)}
            for o in slots.open
        ],
        "retired": [_key(k) for k in slots.retired],
        "settings": settings(profile),
        "ttl_reason": ttl_reason(profile),
        "warnings": list(profile.warnings),
    }
    if current is not None:
        ends = current.lease.expires_at
        row.update(
            fingerprint=current.fingerprint,
            verified=current.verified,
            issued_at=current.lease.issued_at,
            expires_at=ends,
            survives_outage_s=None if ends is None else max(0.0, (ends - now).total_seconds()),
        )
    step, when = _next(slots, profile, now)
    row["next"], row["next_at"] = step, when
    return row


def _next(slots: Slots, profile: Profile, now: datetime) -> tuple[str, datetime | None]:
    """Say what the rule would do next, and when: at a later command, since no daemon runs."""
    step = rotation.next_step(slots, profile.policy, now)
    if not isinstance(step, rotation.Wait):
        return _WORDS[type(step)], now
    if step.until is None:
        return "none", None
    later = rotation.next_step(slots, profile.policy, step.until)
    return _WORDS.get(type(later), "none"), step.until


_WORDS: dict[type, str] = {
    rotation.Issue: "mint a new key",
    rotation.Poll: "read the source",
    rotation.Verify: "verify",
    rotation.Publish: "publish the new key",
    rotation.Retire: "retire",
    rotation.Revoke: "revoke the old key",
    rotation.Settle: "look up an unfinished call",
}


def _last_failures(at: Desk) -> dict[str, dict[str, Any]]:
    """Return each profile's last failure, unless something worked after it."""
    last: dict[str, dict[str, Any]] = {}
    try:
        lines = Audit(at.state).read()
    except JournalError as error:
        print(f"keybroker: {error.message}", file=sys.stderr)
        return {}
    for line in lines:
        if line.get("event") == "failed":
            last[line["profile"]] = {"at": line["at"], "message": line.get("message", "")}
        elif line.get("event") in ("minted", "published"):
            last.pop(line["profile"], None)
    return last


def _key(key: Key) -> dict[str, Any]:
    return {
        "fingerprint": key.fingerprint,
        "label": key.label,
        "at": str(key.issuer),
        "why": key.why,
        "revoke_at": key.revoke_at,
        "expires_at": key.lease.expires_at,
    }


def _unconfigured(broker: Broker, known: set[str]) -> Iterator[dict[str, Any]]:
    for name in broker.names():
        slots = broker.slots(name)
        if name not in known and (slots.keys or slots.open):
            yield {"profile": name, "keys": [_key(key) for key in slots.keys]}


def _print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    now = datetime.now().astimezone()
    table = [("PROFILE", "KEY", "PHASE", "VERIFIED", "AGE", "ENDS IN", "NEXT")]
    for row in rows:
        age = in_words(now - row["issued_at"]) if row["issued_at"] else "-"
        ends = in_words(row["expires_at"] - now) if row["expires_at"] else "-"
        if row["fingerprint"] and not row["expires_at"]:
            ends = "no end"
        when = ""
        if row["next_at"] is not None:
            wait = row["next_at"] - now
            when = " now" if wait <= timedelta(0) else f" in {in_words(wait)}"
        table.append(
            (
                row["profile"],
                row["fingerprint"] or "-",
                row["phase"],
                row["verified"] or "-",
                age,
                ends,
                f"{row['next']}{when}",
            )
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for number, line in enumerate(table):
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        if number:
            cells[2] = coloured(cells[2], COLOURS[Phase(line[2])])
        print("  ".join(cells).rstrip())


def _print_details(row: dict[str, Any], at: Desk) -> None:
    print(f"\n{row['profile']}: {row['source']}, {row['kind']}")
    print(f"  kept by      {at.wrap_key.origin}")
    for text in at.lost:
        print(f"  cache        {text}")
    if row["survives_outage_s"]:
        length = timedelta(seconds=row["survives_outage_s"])
        ends = on_the_clock(row["expires_at"])
        print(f"  survives     a gateway outage of {in_words(length)}, until {ends}")
    if row["last_failure"]:
        moment = datetime.fromisoformat(row["last_failure"]["at"])
        print(f"  last failure {on_the_clock(moment)}  {row['last_failure']['message']}")
    _print_keys(row["retired"], row["open"])
    for text in row["warnings"]:
        print(f"  warning      {text}")


def _print_settings(row: dict[str, Any]) -> None:
    helper, env = row["settings"]["apiKeyHelper"], row["settings"]["env"]
    print("  settings.json, to paste:")
    print(f'    "apiKeyHelper": {_quoted(helper)},')
    print('    "env": {')
    print(f'      "ANTHROPIC_BASE_URL": {_quoted(env["ANTHROPIC_BASE_URL"])},')
    ttl = env["CLAUDE_CODE_API_KEY_HELPER_TTL_MS"]
    print(f'      "CLAUDE_CODE_API_KEY_HELPER_TTL_MS": "{ttl}"')
    print("    }")
    print(f"    ({row['ttl_reason']})")


def _print_keys(keys: list[dict[str, Any]], opened: list[dict[str, Any]]) -> None:
    now = datetime.now().astimezone()
    for key in keys:
        when = "to be revoked"
        if key["revoke_at"] is not None:
            wait = key["revoke_at"] - now
            when = "revocation due" if wait <= timedelta(0) else f"revoked in {in_words(wait)}"
            when += f" ({on_the_clock(key['revoke_at'])})"
        ends = f", ends by itself {on_the_clock(key['expires_at'])}" if key["expires_at"] else ""
        why = f", {key['why']}" if key["why"] else ""
        print(f"  retired      {key['fingerprint']}  {when}{why}{ends}")
    for one in opened:
        since = f"since {on_the_clock(one['since'])}, {one['looks']} looks"
        print(f"  unfinished   {one['label']}  {since}")


def _quoted(text: str) -> str:
    return json.dumps(text)
