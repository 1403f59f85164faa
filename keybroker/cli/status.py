"""status: how every key stands, what comes next, and the lines to paste."""

import json
import os
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click

from keybroker import glance, standing, wire
from keybroker.audit import Audit
from keybroker.cli import sign_ins
from keybroker.cli.base import (
    Duration,
    coloured,
    for_profile,
    in_words,
    is_system,
    of_system,
    on_the_clock,
    print_json,
)
from keybroker.cli.sign_ins import endings_of
from keybroker.cli.work import configuration, daemon_socket, desk, state
from keybroker.config import Config
from keybroker.connect.connected import connected
from keybroker.connect.line import helper_line, system_line
from keybroker.connect.plan import Place
from keybroker.credential import Phase
from keybroker.errors import JournalError, NobodyAnswers
from keybroker.label import is_made, made_of
from keybroker.rotation import EXPORTED

SECONDS = 4.0

COLOURS = {
    Phase.FRESH: "green",
    Phase.STALE: "yellow",
    Phase.SUSPECT: "yellow",
    Phase.CONDEMNED: "red",
    Phase.EXPIRED: "red",
    Phase.NONE: "red",
}


LID = timedelta(hours=8)


@click.command("status")
@for_profile
@of_system
@click.option("--watch", is_flag=True, help="Stay, and show every change.")
@click.option(
    "--lid", type=Duration(), default=LID, help="Will the key outlive a lid closed so long? 8h."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status_command(profile: str | None, watch: bool, lid: timedelta, as_json: bool) -> None:
    """Show every profile's key, what comes next, and the settings.json lines to paste.

    The daemon is asked; without one, what is on disk is read. Asks no gateway, changes nothing.
    """
    config = configuration()
    if profile is not None:
        config.profile(profile)
    if not watch:
        found = standing_of(config, profile)
        _show(found, config, profile, lid, as_json=as_json)
        return
    socket = daemon_socket()
    if socket is None:
        raise NobodyAnswers("no daemon runs", hint="the next `keybroker get` starts one")
    for found in wire.watch(socket):
        if sys.stdout.isatty() and not as_json:
            click.clear()
        try:
            _show(found, config, profile, lid, as_json=as_json, briefly=True)
            sys.stdout.flush()
        except BrokenPipeError:
            return
    raise NobodyAnswers("the daemon ended", hint="the next `keybroker get` starts one")


@click.command("statusline")
@for_profile
def statusline_command(profile: str | None) -> None:
    """Print one short line for Claude Code's status line: `work 11h 42m`.

    PROFILE, how long its key lives, and after a ! what needs a person. Only the daemon is asked,
    for half a second at most; stdin is not read. Exit status: 0.
    """
    raise click.exceptions.Exit(glance.show(profile or "", dict(os.environb)))


def standing_of(config: Config, profile: str | None) -> dict[str, Any]:
    """Return how things stand: from the daemon, else from what is on disk."""
    problem = None
    try:
        socket = daemon_socket()
        if socket is not None:
            found = wire.control(socket, "status", SECONDS)
            return {"lost": [], "problem": problem, **found}
    except NobodyAnswers as error:
        if is_system():
            raise
        problem = f"{error.message}; {error.hint}" if error.hint else error.message
    chosen = [config.profile(profile)] if profile else list(config.profiles.values())
    with desk(config, lock=None) as at:
        return {
            "daemon": None,
            "cache": at.wrap_key.origin,
            "problem": problem,
            "lost": at.lost,
            "profiles": standing.rows(at.broker, chosen, endings_of(config, state()).soon),
            "unconfigured": standing.unconfigured(at.broker, config.profiles),
            "push": None,
        }


def _show(
    found: dict[str, Any],
    config: Config,
    profile: str | None,
    lid: timedelta,
    *,
    as_json: bool,
    briefly: bool = False,
) -> None:
    system = is_system()  # what else is told is in files of that daemon's own
    failures = {} if briefly or system else last_failures(state())
    rows = [row for row in found["profiles"] if profile in (None, _of(row["profile"], config))]
    for row in rows:
        over = found["daemon"] is not None and not row["trouble"]  # it works again
        row["last_failure"] = None if over else failures.get(row["profile"])
        row["settings"] = settings(row)
        row["lid"] = _lid(row, lid)
        row["connected"] = [] if briefly or system else _connected(config, row["profile"])
    runs = found.get("runs", ())  # a daemon of before has none
    given = [one for one in _exported(found, runs) if profile in (None, one["of"])]
    names = {one["profile"] for one in given}
    left = [] if profile else [o for o in found["unconfigured"] if o["profile"] not in names]
    for row in rows:
        row["run"] = next((one for one in runs if one["profile"] == row["profile"]), None)
    logins = [] if system else sign_ins.rows(config, state(), profile)
    if as_json:
        shown = {name: found.get(name) for name in ("daemon", "problem", "cache", "push")}
        text = {
            **shown,
            "profiles": rows,
            "logins": logins,
            "exported": given,
            "unconfigured": left,
        }
        print_json(text) if not briefly else print(json.dumps(text))
        return
    if not rows and not left and not given:
        config.profile(None)  # says how to configure one
    _print_daemon(found["daemon"], found.get("problem"))
    _print_table(rows)
    for row in rows:
        _print_details(row, found)
        if len(rows) == 1 and not briefly and not row["connected"]:
            _print_settings(row)
    if len(rows) > 1 and not briefly:
        print("\nkeybroker status PROFILE says more of one of them")
    _print_logins(logins)
    _print_exported(given)
    for one in left:
        text = "keybroker revoke " + one["profile"]
        why = "its program has ended" if is_made(one["profile"]) else "is not configured any more"
        print(f"\n{one['profile']}: {why}, and has {len(one['keys'])} keys")
        _print_keys(one["keys"], [], "")
        print(f"  end them: {text}")


def _of(name: str, config: Config) -> str:
    """Return the profile of the file that one for a program was made of; else the same."""
    if name in config.profiles or not is_made(name):
        return name
    begins = made_of(name)
    return next((one for one in config.profiles if one[: len(begins)] == begins), begins)


def _exported(found: dict[str, Any], runs: Any) -> list[dict[str, Any]]:
    """Return the keys that somebody was given for good, with whose they are if that is known."""
    given = []
    for one in found["unconfigured"]:
        known = next((run for run in runs if run["profile"] == one["profile"]), None)
        given += [
            {**key, "profile": one["profile"], "of": made_of(one["profile"]), **_whose(known)}
            for key in one["keys"]
            if key["why"] == EXPORTED
        ]
    rows = {row["profile"]: row for row in found["profiles"]}
    for run in runs:
        if run["exported"] and run["profile"] == run["of"] and run["of"] in rows:
            row = rows[run["of"]]
            key = {name: row[name] for name in ("fingerprint", "expires_at")}
            given.append(
                {**key, "revoke_at": None, "profile": run["of"], "of": run["of"], **_whose(run)}
            )
    return given


def _whose(run: dict[str, Any] | None) -> dict[str, Any]:
    return {name: None if run is None else run[name] for name in ("program", "pid")}


def _print_logins(logins: list[dict[str, Any]]) -> None:
    """Print how sign-ins stand, and which of them a person has to do."""
    for one in logins:
        print(f"\nlogin {one['login']}: {one['said']}")
        if one["profiles"]:
            print(f"  for          {', '.join(one['profiles'])}")
        if one["command"] is not None:
            what = "ends soon" if one["ending"] else "needed"
            print(f"  {what:<12} type: {one['command']}")


def _print_exported(given: list[dict[str, Any]]) -> None:
    """Print the keys that do not rotate, since whoever has them cannot be given another."""
    for one in given:
        what, end = "is not ours to revoke", ""
        if one["revoke_at"] is not None:
            wait = _time(one["revoke_at"]) - datetime.now().astimezone()
            what = f"ends in {in_words(wait)} ({on_the_clock(_time(one['revoke_at']))})"
            end = f"; keybroker revoke {one['profile']}"
        if one["program"] is not None:
            what, end = f"{what}, or with {one['program']}, process {one['pid']}", ""
        print(f"\nexported  {one['profile']}  {one['fingerprint']}  {what}{end}")


def _connected(config: Config, name: str) -> list[dict[str, Any]]:
    """Return the files that connect has written for a profile, and what is wrong with them now."""
    profile = config.profiles.get(name)
    if profile is None:
        return []
    return [
        {
            "file": str(one.file),
            "surface": one.surface,
            "scope": one.scope,
            "outdated": list(one.outdated),
            "problem": one.problem or None,
            "command": one.command,
        }
        for one in connected(profile, state(), Place.here())
    ]


def _print_daemon(daemon: dict[str, Any] | None, problem: str | None) -> None:
    if problem is not None:
        print(f"{problem}\nwhat follows is what is on disk\n")
        return
    if daemon is None:
        print("no daemon runs; the next `keybroker get` starts one\n")
        return
    up = in_words(datetime.now().astimezone() - datetime.fromisoformat(daemon["since"]))
    print(f"daemon {daemon['version']}, process {daemon['pid']}, up {up}, at {daemon['socket']}\n")


def _lid(row: dict[str, Any], length: timedelta) -> dict[str, Any]:
    """Say what becomes of a session while the machine sleeps that long."""
    if row["fingerprint"] is None or row["phase"] in ("expired", "condemned"):
        return {"for_s": length.total_seconds(), "safe": False, "why": "there is no key"}
    if not row["held"]:
        why = "the key cannot be handed out now"
        return {"for_s": length.total_seconds(), "safe": False, "why": why}
    if row["phase"] == "suspect":
        why = "the gateway refused the key, which is being replaced"
        return {"for_s": length.total_seconds(), "safe": False, "why": why}
    if row["expires_at"] is None:
        return {"for_s": length.total_seconds(), "safe": True, "why": "the key has no end"}
    ends = datetime.fromisoformat(row["expires_at"])
    left = ends - datetime.now().astimezone()
    if left > length:
        why = f"the key lives until {on_the_clock(ends)}"
        return {"for_s": length.total_seconds(), "safe": True, "why": why}
    why = f"the key ends at {on_the_clock(ends)}; after that, the first prompt waits for a new one"
    return {"for_s": length.total_seconds(), "safe": False, "why": why}


def settings(row: dict[str, Any]) -> dict[str, Any]:
    """Return what belongs into Claude Code's settings.json for a profile."""
    line = system_line if is_system() else helper_line
    return {"apiKeyHelper": line(row["profile"]), "env": row["environment"]}


def last_failures(where: Path) -> dict[str, dict[str, Any]]:
    """Return each profile's last failure, unless something worked after it."""
    last: dict[str, dict[str, Any]] = {}
    try:
        lines = Audit(where).read()
    except JournalError as error:
        print(f"keybroker: {error.message}", file=sys.stderr)
        return {}
    for line in lines:
        if line.get("event") == "failed":
            last[line["profile"]] = {"at": line["at"], "message": line.get("message", "")}
        elif line.get("event") in ("minted", "published"):
            last.pop(line["profile"], None)
    return last


def _print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    now = datetime.now().astimezone()
    table = [("PROFILE", "KEY", "PHASE", "VERIFIED", "AGE", "ENDS IN", "NEXT")]
    for row in rows:
        age = in_words(now - _time(row["issued_at"])) if row["issued_at"] else "-"
        ends = in_words(_time(row["expires_at"]) - now) if row["expires_at"] else "-"
        if row["fingerprint"] and not row["expires_at"]:
            ends = "no end"
        when = ""
        if row["next_at"] is not None:
            wait = _time(row["next_at"]) - now
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


def _print_details(row: dict[str, Any], found: dict[str, Any]) -> None:
    print(f"\n{row['profile']}: {row['source']}, {row['kind']}")
    if row["run"] is not None:
        print(f"  made for     {row['run']['program']}, process {row['run']['pid']}")
    print(f"  kept by      {found['cache']}")
    for text in found.get("lost", ()):
        print(f"  cache        {text}")
    if row["published"]:
        print(f"  publishes to {row['published']}")
    if row.get("exported"):  # a daemon of before has none
        print(f"  exported     {row['exported']}")
    if row["survives_outage_s"]:
        length = timedelta(seconds=row["survives_outage_s"])
        ends = on_the_clock(_time(row["expires_at"]))
        print(f"  survives     a gateway outage of {in_words(length)}, until {ends}")
    if row["late"]:
        print("  LATE         the key should have been replaced; see the last failure")
    lid = row["lid"]
    answer = "yes" if lid["safe"] else "no"
    print(f"  lid closed   for {in_words(timedelta(seconds=lid['for_s']))}: {answer}, {lid['why']}")
    if row["trouble"] and row["trouble"] != (row["last_failure"] or {}).get("message"):
        print(f"  trouble      {row['trouble']}")
    if row["last_failure"]:
        moment = _time(row["last_failure"]["at"])
        print(f"  last failure {on_the_clock(moment)}  {row['last_failure']['message']}")
    if row.get("hint"):  # a daemon of before has none
        print(f"  hint         {row['hint']}")
    _print_keys(row["retired"], row["open"], row["source"])
    for one in row["connected"]:
        print(f"  connected    {one['surface']}, {one['file']}")
        if one["problem"]:
            print(f"  settings     {one['problem']}")
        elif one["outdated"]:
            names = ", ".join(one["outdated"])
            print(f"  settings     not as they should be: {names}; type: {one['command']}")
    for text in row["warnings"]:
        print(f"  warning      {text}")
    push = found.get("push") or {"off": {}}
    if push.get("others"):
        print("  not told     sessions of other users; they take a new key at their next refresh")
    for file, reason in push["off"].items():
        print(f"  not touched  {file} {reason}; sessions that watch it take a new key later")


def _print_settings(row: dict[str, Any]) -> None:
    helper, env = row["settings"]["apiKeyHelper"], row["settings"]["env"]
    written = f", which `keybroker connect --profile {row['profile']}` writes"
    print(f"  settings.json{' of each user' if is_system() else written}:")
    print(f'    "apiKeyHelper": {_quoted(helper)},')
    print('    "env": {')
    print(",\n".join(f"      {_quoted(name)}: {_quoted(value)}" for name, value in env.items()))
    print("    }")
    print(f"    ({row['ttl_reason']})")


def _print_keys(keys: list[dict[str, Any]], opened: list[dict[str, Any]], source: str) -> None:
    """Print the keys that are to be revoked, and where, if not at the profile's own source."""
    now = datetime.now().astimezone()
    for key in keys:
        when = "to be revoked"
        if key["revoke_at"] is not None:
            wait = _time(key["revoke_at"]) - now
            when = "revocation due" if wait <= timedelta(0) else f"revoked in {in_words(wait)}"
            when += f" ({on_the_clock(_time(key['revoke_at']))})"
        ends = ""
        if key["expires_at"]:
            ends = f", ends by itself {on_the_clock(_time(key['expires_at']))}"
        why = f", {key['why']}" if key["why"] else ""
        where = "" if key["at"] == source else f"at {key['at']}, "
        print(f"  retired      {key['fingerprint']}  {where}{when}{why}{ends}")
    for one in opened:
        since = f"since {on_the_clock(_time(one['since']))}, {one['looks']} looks"
        ends = f"what it made ends by itself by {on_the_clock(_time(one['ends_at']))}"
        where = "" if one["at"] == source else f"at {one['at']}, "
        print(f"  unfinished   {one['label']}  {where}{since}, {ends}")


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _quoted(text: str) -> str:
    return json.dumps(text)
