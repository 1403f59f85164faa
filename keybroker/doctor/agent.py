"""What is wrong with keybroker itself: helper, daemon, folders, keys, and what starts them."""

import os
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from keybroker import paths
from keybroker.connect.connected import Connected
from keybroker.connect.edit import is_ours
from keybroker.connect.proof import prove
from keybroker.doctor.finding import Close, Command, Finding, Severity, typed
from keybroker.doctor.requests import Layer
from keybroker.errors import ConfigError, KeybrokerError
from keybroker.label import is_made

OVERDUE = timedelta(minutes=5)  # after which a revocation that is due is said to be late
OPEN = timedelta(hours=1)
_SOCKETS = (paths.SOCKET, "-")
_MODE = re.compile(r"type: chmod ([0-7]{3}) ")
_PROGRAM = re.compile(r"^\s*ExecStart=[-@:+!|]*(?:\"([^\"]+)\"|'([^']+)'|(\S+))", re.MULTILINE)


def of_error(error: KeybrokerError) -> Finding:
    """Say what a command would have ended with."""
    fix = error.hint or "keybroker config check"
    if isinstance(error, ConfigError):
        match = _MODE.match(error.hint or "")
        if match is not None:
            path = Path((error.hint or "")[match.end() :])
            fix = fix.removeprefix("type: ")
            return Finding("folder", error.message, fix, Close(path, int(match[1], 8)))
        return Finding("configuration", error.message, fix)
    mend = Command(("daemon", "--stop")) if "daemon --stop" in fix else None
    return Finding("daemon", error.message, fix, mend)


def of_helper(
    layers: Sequence[Layer], environment: Mapping[str, str], lines: Collection[str]
) -> list[Finding]:
    """
    Run the line that counts as Claude Code runs it, and say what became of it.

    Args:
        lines: Those of ours. A folder may bring its own, which is not run for a look at it.
    """
    layer = next((one for one in layers if one.helper and not one.problem), None)
    if layer is None or layer.helper is None:
        return []
    again = _again(layer)
    if is_ours(layer.helper) and (gone := _gone(layer.helper)):
        what = f"apiKeyHelper in {layer.place} names {gone}, which is not there"
        return [Finding("moved", what, _typed(again), again)]
    if layer.scope in ("project", "local") and layer.helper not in lines:
        return []
    settings: dict[str, str] = {}
    for one in reversed([one for one in layers if one.scope not in ("process", "project")]):
        settings.update(one.env)
    try:
        prove(layer.helper, settings, environment)
    except KeybrokerError as error:
        said = error.message
        if not is_ours(layer.helper):  # what it says may be its key
            said = said.partition(":")[0]
        fix = "keybroker status" if is_ours(layer.helper) else "run it through sh, and mend it"
        return [Finding("helper-fails", f"apiKeyHelper in {layer.place}: {said}", fix)]
    return []


def of_connections(
    profile: str, connections: Sequence[Connected], layers: Sequence[Layer]
) -> Iterator[Finding]:
    """Yield what connect wrote for a profile and would write differently now."""
    gone = {one.place for one in layers if is_ours(one.helper) and _gone(one.helper or "")}
    for one in connections:
        if one.problem:
            yield Finding("outdated", f"{one.file}: {one.problem}", one.command)
        elif one.outdated and str(one.file) not in gone:
            words = ["connect", one.surface, "--profile", profile, "--no-check"]
            words += [] if one.scope == "user" else ["--scope", one.scope]
            folder = one.file.parent.parent if one.scope == "local" else None
            what = f"{one.file}: {', '.join(one.outdated)} not as they should be"
            safe = one.scope != "managed" or os.geteuid() == 0
            mend = Command(tuple(words), folder) if safe else None
            yield Finding("outdated", what, one.command, mend)


def of_standing(
    found: Mapping[str, Any], version: str, failures: Mapping[str, Any]
) -> Iterator[Finding]:
    """
    Yield what is wrong with how things stand.

    Args:
        found: As the daemon says it, or the disk where no daemon runs.
        version: Ours.
        failures: The last one of each profile.
    """
    now = datetime.now(UTC)
    if found.get("problem"):
        yield Finding(
            "daemon",
            str(found["problem"]).partition(";")[0],
            "keybroker daemon --stop",
            Command(("daemon", "--stop")),
        )
    daemon = found.get("daemon")
    if daemon is not None and daemon["version"] != version:
        what = f"the daemon is {daemon['version']}, and this is {version}"
        yield Finding("versions", what, "keybroker daemon --stop", Command(("daemon", "--stop")))
    kept = str(found.get("cache", ""))
    if kept.startswith("memory"):
        yield Finding("not-kept", f"keys are kept in {kept}", 'cache.key = "file": docs/cache.md')
    for text in found.get("lost") or ():
        yield Finding("not-kept", str(text), "keybroker status", because="a new key is made for it")
    for row in found["profiles"]:
        if is_made(row["profile"]):  # of one program, which says so itself
            continue
        yield from _of_profile(row, failures.get(row["profile"]), now)
    for one in found.get("unconfigured") or ():
        what = f"{one['profile']} is not configured any more, and has {len(one['keys'])} keys"
        yield Finding("unrevoked", what, f"keybroker revoke {one['profile']}")
    for file, reason in ((found.get("push") or {}).get("off") or {}).items():
        yield Finding("not-told", f"{file} {reason}", f"see that you may write {file}")


def of_sign_ins(
    sign_ins: Sequence[Mapping[str, Any]], found: Mapping[str, Any]
) -> Iterator[Finding]:
    """
    Yield the sign-ins that somebody has to do, and those that end soon.

    Args:
        sign_ins: Those that are configured, as `status` has them.
        found: How profiles stand.
    """
    keyless = {row["profile"] for row in found["profiles"] if not row["held"]}
    for one in sign_ins:
        if one["command"] is None:
            continue
        what = f"login {one['login']}, for {', '.join(one['profiles']) or 'no profile'}"
        if one["ending"]:
            yield Finding("login-ending", f"{what}: {one['said']}", one["command"])
        else:
            worse = Severity.ERROR if keyless.intersection(one["profiles"]) else None
            because = "there is nothing to hand out" if worse else ""
            yield Finding(
                "login-needed",
                f"{what}: {one['said']}",
                one["command"],
                worse=worse,
                because=because,
            )


def of_units(environment: Mapping[str, str], root: Path = Path("/")) -> Iterator[Finding]:
    """Yield the units that start a daemon and name a program that is not there."""
    home = Path(environment.get("HOME", "/"))
    config = Path(environment.get("XDG_CONFIG_HOME") or home / ".config")
    for folder in (config / "systemd/user", root / "etc/systemd/user", root / "etc/systemd/system"):
        for file in sorted(folder.glob("keybroker*.service")):
            try:
                text = file.read_text(errors="replace")
            except OSError:
                continue
            for match in _PROGRAM.finditer(text):
                program = (match[1] or match[2] or match[3]).replace("%h", str(home))
                if program.startswith("/") and not os.path.exists(program):
                    what = f"{file} starts {program}, which is not there"
                    fix = f"write the path of keybroker into it: {sys.prefix}/bin/keybroker"
                    yield Finding("unit", what, fix)


def _of_profile(
    row: Mapping[str, Any], failure: Mapping[str, Any] | None, now: datetime
) -> Iterator[Finding]:
    name = row["profile"]
    trouble = row["trouble"] or (failure or {}).get("message")
    if row["fingerprint"] is None or row["phase"] in ("expired", "condemned") or not row["held"]:
        if trouble:
            fix = typed(row.get("hint") or f"keybroker source test {name}")
            yield Finding("no-key", f"{name}: {trouble}", fix)
    elif trouble:
        fix = typed(row.get("hint") or f"keybroker source test {name}")
        severity = Severity.ERROR if row["late"] else None
        yield Finding("failing", f"{name}: {trouble}", fix, worse=severity)
    elif row["late"]:
        what = f"{name}: the key should have been replaced"
        yield Finding("failing", what, f"keybroker rotate {name}")
    for key in row["retired"]:
        due = key["revoke_at"]
        if due is not None and now > datetime.fromisoformat(due) + OVERDUE:
            what = f"{name}: key {key['fingerprint']} should have been revoked"
            yield Finding("unrevoked", what, "keybroker reload")
    for one in row["open"]:
        if now > datetime.fromisoformat(one["since"]) + OPEN:
            what = f"{name}: what became of {one['label']} is not known"
            yield Finding("unrevoked", what, f"keybroker sweep --profile {name}")


def _gone(line: str) -> str:
    """Return the file that a line of ours names and that is not there; empty: all are."""
    try:
        words = shlex.split(line)
    except ValueError:
        return ""
    files = [one for one in words if one.startswith("/") and os.path.basename(one) not in _SOCKETS]
    return next((one for one in files if not os.path.exists(one)), "")


def _again(layer: Layer) -> Command | None:
    """Return what writes a layer's line anew."""
    if layer.scope == "managed" and os.geteuid() != 0:
        return None
    name = _profile_of(layer.helper or "")
    if layer.scope not in ("user", "local", "managed") or not name:
        return None
    scope = () if layer.scope == "user" else ("--scope", layer.scope)
    folder = Path(layer.place).parent.parent if layer.scope == "local" else None
    return Command(("connect", "--profile", name, "--no-check", *scope), folder)


def _profile_of(line: str) -> str:
    """Return the profile that a line of ours names: it comes after the socket."""
    try:
        words = shlex.split(line)
    except ValueError:
        return ""
    at = next((n for n, one in enumerate(words) if os.path.basename(one) in _SOCKETS), -1)
    return words[at + 1] if 0 < at < len(words) - 1 and words[0] == "exec" else ""


def _typed(mend: Command | None) -> str:
    if mend is None:
        return "keybroker connect"
    words = " ".join(word for word in mend.words if word != "--no-check")
    place = "" if mend.folder is None else f"cd {shlex.quote(str(mend.folder))}; "
    return f"{place}keybroker {words}"
