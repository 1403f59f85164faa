"""What is wrong with a gateway, by what it answered to the current key and to a made-up one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from keybroker.config import Profile
from keybroker.doctor import program
from keybroker.doctor.finding import Finding, Severity, typed
from keybroker.doctor.program import Program
from keybroker.doctor.requests import Layer, Route
from keybroker.errors import ConfigError, KeybrokerError
from keybroker.troubles import Trouble

SKEW_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Answered:
    """
    What a look at a gateway came to.

    Attributes:
        rows: Of the table, each with where it was seen and what to write against it.
        line: The end of it in a line.
        todo: What to type next.
        is_well: It works.
        worked: The first, plain message was answered.
        reads: The headers from which it took the key, each alone.
        skew: Seconds by which its clock is ahead of ours.
    """

    rows: Sequence[tuple[Trouble, str, Sequence[str]]]
    line: str
    todo: str
    is_well: bool
    worked: bool
    reads: Sequence[str] = ()
    skew: int = 0


def of_answers(profile: Profile, found: Answered, routes: Sequence[Route]) -> Iterator[Finding]:
    """Yield what the answers to the real key say."""
    name = profile.name
    for trouble, seen, lines in found.rows:
        what = f"{name}: {profile.base_url}: {trouble.title}: {seen}"
        fix, severity = trouble.remedy, None
        if trouble.id in ("nobody-there", "certificate") and not found.worked:
            what, fix = f"{name}: {found.line}", found.todo
        elif trouble.id == "certificate":  # by the system, and not by Node's own list
            severity = Severity.WARNING
        elif trouble.id in ("key-refused", "no-api"):
            fix = found.todo
        if lines:
            fix += f": {', '.join(lines[1:])} in {lines[0]}, then: keybroker connect"
        yield Finding(trouble.id, what, fix, worse=severity)
    rows = [one.id for one, _, _ in found.rows]
    if not found.is_well and (not rows or (rows == ["certificate"] and found.worked)):
        yield Finding("unwell", f"{name}: {found.line}", found.todo)
    if len(found.reads) == 1:
        yield from _one_header(profile, found.reads[0], routes)
    if abs(found.skew) > SKEW_SECONDS:
        side = "ahead of" if found.skew > 0 else "behind"
        what = f"{name}: the gateway's clock is {abs(found.skew)} s {side} this machine's"
        yield Finding("clock", what, "set the clock: timedatectl set-ntp true")


def _one_header(profile: Profile, read: str, routes: Sequence[Route]) -> Iterator[Finding]:
    """Yield the surfaces that send nothing in the header that is read."""
    for route in routes:
        sent = {"authorization": route.authorization, "x-api-key": route.x_api_key}
        other = next(one for one in sent if one != read)
        if route.url.rstrip("/") != profile.base_url or sent[read].what or not sent[other].what:
            continue
        yield Finding(
            "one-header",
            f"{route.surface}: {sent[other]} goes out in {other}; this gateway reads {read} alone",
            "keybroker connect, whose helper's key goes out in both",
        )


def of_made_up_key(status: int | None, client: Program | None, seconds: float) -> Iterator[Finding]:
    """
    Yield what a gateway's answer to a wrong key costs with this client.

    Args:
        status: What it answered; None: nothing.
        seconds: The TTL: how long a session goes on with what it has.
    """
    version = None if client is None else client.version
    old = version is not None and version < program.HEALS_403
    if old:
        cost = "keys that are JWTs are not replaced ahead of their end"
        if status in (400, 403):
            cost = f"a session whose key is refused stays so for {seconds:.0f} s, or the next touch"
        yield Finding(
            "old-client",
            f"{client} is older than {program.said(program.HEALS_403)}; this gateway answers a "
            f"wrong key with {status or 'nothing'}",
            "claude update",
            worse=Severity.WARNING if status in (400, 403) else Severity.NOTE,
            because=cost,
        )
    elif status == 400:
        yield Finding(
            "refusal",
            "this gateway answers a wrong key with 400",
            "push = true and a hold of 10m and more, as they are by default; a newer gateway",
        )


def of_error(profile: Profile, error: KeybrokerError) -> Finding:
    """Say why nobody could be asked."""
    if isinstance(error, ConfigError) and "proxy variable" in error.message:
        what = f"{profile.name}: {error.message}"
        return Finding("proxy", what, error.hint or "", worse=Severity.ERROR)
    what = f"{profile.name}: {error.message.removeprefix(f'{profile.name}: ')}"
    message, _, hint = what.partition("; ")  # of a key that was asked for, the hint is in it
    return Finding("no-key", message, typed(error.hint or hint or "keybroker status"))


def of_proxies(profile: Profile, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Yield a proxy on the way to the gateway that only this terminal knows."""
    host = urlsplit(profile.base_url).hostname or ""
    scheme = urlsplit(profile.base_url).scheme.upper()
    values: dict[str, dict[str, str]] = {}
    for layer in reversed(layers):
        of = "terminal" if layer.scope == "process" else "settings"
        for name, value in layer.env.items():
            values.setdefault(of, {})[name.upper()] = value
    terminal, settings = values.get("terminal", {}), values.get("settings", {})
    around = f"{terminal.get('NO_PROXY', '')},{settings.get('NO_PROXY', '')}"
    if any(_is_around(one.strip(), host) for one in around.split(",")):
        return
    names = [one for one in (f"{scheme}_PROXY", "ALL_PROXY") if terminal.get(one)]
    if names and not _is_address(terminal[names[0]]):
        what = f"{names[0]} in this terminal is no address"
        yield Finding("proxy", what, f"unset {names[0]}, or http://HOST:PORT", worse=Severity.ERROR)
    elif names and not any(settings.get(one) for one in names):
        yield Finding(
            "proxy",
            f"{names[0]} is set in this terminal, and {host} is not in NO_PROXY",
            f"write {names[0]}, or {host} in NO_PROXY, into env of settings.json",
            worse=Severity.NOTE,
        )


def _is_address(proxy: str) -> bool:
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_around(one: str, host: str) -> bool:
    name = one.lstrip(".*").partition(":")[0]
    return bool(one) and (one == "*" or host == name or host.endswith(f".{name}"))
