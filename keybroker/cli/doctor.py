"""doctor: what is wrong between Claude Code and the gateway, and what mends it."""

import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from keybroker import __version__, client, paths
from keybroker.cli import sign_ins
from keybroker.cli.base import coloured, for_profile, print_json, progress
from keybroker.cli.look import Look, models, took
from keybroker.cli.status import last_failures, standing_of
from keybroker.cli.work import configuration, state
from keybroker.config import Config, Profile, only_one
from keybroker.connect.connected import connected
from keybroker.connect.line import helper_line
from keybroker.connect.plan import Place
from keybroker.credential import Secret
from keybroker.doctor import agent, files, fixes, gateway, program
from keybroker.doctor.finding import Close, Finding, Remove, Severity
from keybroker.doctor.origins import Desktop, collect, shown
from keybroker.doctor.requests import Route
from keybroker.doctor.together import Check, together
from keybroker.errors import KeybrokerError
from keybroker.pool import Pool, variables

SECONDS = 20.0
DEEP_SECONDS = 60.0
ANSWER = timedelta(seconds=6)  # the longest that one answer of the gateway may take
STATUS = {Severity.ERROR: 78, Severity.WARNING: 75, Severity.NOTE: 0}
COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}


@click.command("doctor")
@for_profile
@click.option("--fix", is_flag=True, help="Mend what can be mended without asking.")
@click.option("--deep", is_flag=True, help="Send the gateway what a session sends, some 90 KB.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor_command(profile: str | None, fix: bool, deep: bool, as_json: bool) -> None:
    """Say where Claude Code's requests go, and what is wrong on the way.

    One line for each finding: what, why it matters, and the command that mends it. The gateway is
    asked for a token with the current key, and with a made-up one. Exit status: 0 nothing, or
    notes; 75 something will go wrong; 78 something does.
    """
    with progress("looking"):
        found = _Checks(profile, deep=deep)
        findings = found.all()
    done: list[tuple[Finding, str]] = []
    if fix:
        with progress("mending"):
            done = [(one, fixes.mend(one.mend)) for one in _mendable(findings) if one.mend]
            if done:
                found = _Checks(profile, deep=deep)
                findings = found.all()
    if as_json:
        print_json(_document(found, findings, done))
    else:
        _print(found, findings, done)
    worst = max((STATUS[one.severity] for one in findings), default=0)
    raise click.exceptions.Exit(worst)


class _Checks:
    """One look at everything."""

    def __init__(self, profile: str | None, *, deep: bool) -> None:
        self.deep = deep
        self.gateway: dict[str, Any] = {}  # what was learnt of it
        self.place = Place.here()
        self.problem: KeybrokerError | None = None
        self.config: Config | None = None
        self.profile: Profile | None = None
        try:
            self.config = configuration()
            known = self.config.profiles.values()
            if profile is not None or only_one(known) is not None or self.config.default:
                self.profile = self.config.profile(profile)
        except KeybrokerError as error:
            if profile is not None and self.config is not None:
                raise  # there is no such profile
            self.problem = error
        profiles = {} if self.config is None else dict(self.config.profiles)
        self.seen = files.Seen(
            collect(self.place),
            profiles,
            self.profile,
            self.place,
            program.find(self.place.environment),
        )
        self.routes = files.routes(self.seen)

    def all(self) -> list[Finding]:
        """Return all findings, the worst first."""
        checks: dict[str, Check] = {
            "settings": lambda: files.look(self.seen),
            "the helper": self._helper,
            "keybroker": self._keybroker,
            "units": lambda: agent.of_units(self.place.environment),
        }
        if (profile := self.profile) is not None:
            checks["the gateway"] = lambda: self._gateway(profile)
            checks["a made-up key"] = lambda: self._made_up_key(profile)
            checks["proxies"] = lambda: gateway.of_proxies(profile, self.seen.origins.layers)
        found = together(checks, DEEP_SECONDS if self.deep else SECONDS)
        order = list(Severity)
        return sorted(_once(found), key=lambda one: order.index(one.severity))

    def _helper(self) -> Iterable[Finding]:
        environment = self.place.environment
        lines = [helper_line(name, environment) for name in self.seen.profiles]
        return agent.of_helper(self.seen.origins.layers, environment, lines)

    def _gateway(self, profile: Profile) -> Iterator[Finding]:
        """Ask as `verify` does, with the current key."""
        assert self.config is not None, "a profile is of it"
        pool = Pool(state(), os.environ, None, variables(self.config))
        try:
            secret = client.get(profile.name)
            look = Look(profile, secret, models(profile), pool, ANSWER, lambda *_: None)
            look.plain()
            if self.deep and look.works:
                look.deep()
            end = look.end(deep=self.deep)
        except KeybrokerError as error:
            yield gateway.of_error(profile, error)
            return
        finally:
            pool.close(at_once=True)
        self.gateway |= {"url": profile.base_url, **look.facts}
        skews = [int(one.get("skew_s") or 0) for one in look.seen.values()]
        answered = gateway.Answered(
            [(one.trouble, one.seen, one.lines) for one in look.found],
            end.line,
            end.todo,
            end.problem is None,
            took(look.seen["message"]),
            look.reads,
            max(skews, key=abs, default=0),
        )
        yield from gateway.of_answers(profile, answered, self.routes)

    def _made_up_key(self, profile: Profile) -> Iterator[Finding]:
        """Learn what the gateway answers to a key that nobody has."""
        assert self.config is not None, "a profile is of it"
        pool = Pool(state(), os.environ, None, variables(self.config))
        try:
            seen = pool.call(
                profile.type,
                "try_form",
                ANSWER.total_seconds() + 2,
                profile=profile,
                secret=Secret(f"sk-{secrets.token_hex(24)}"),
                form="message",
                model=models(profile)[0],
                timeout=ANSWER,
            )
        except KeybrokerError:
            return  # is said with the real key
        finally:
            pool.close(at_once=True)
        self.gateway["wrong_key"] = seen["status"]
        ttl = profile.helper_ttl.total_seconds()
        yield from gateway.of_made_up_key(seen["status"], self.seen.client, ttl)

    def _keybroker(self) -> Iterator[Finding]:
        try:
            where = state()
            runtime = paths.runtime_directory(os.environ)
            if runtime.exists():
                paths.private_directory(runtime)
            if self.problem is not None:
                raise self.problem
            assert self.config is not None, "or there is a problem"
            if not self.config.profiles:
                yield Finding("no-profile", "no profile is configured", "keybroker init")
                return
            for one in self.config.profiles.values():
                yield from agent.of_connections(
                    one.name, connected(one, where, self.place), self.seen.origins.settings
                )
            chosen = None if self.profile is None else self.profile.name
            found = standing_of(self.config, chosen)
            yield from agent.of_standing(found, __version__, _failures(found, where))
            yield from agent.of_sign_ins(sign_ins.rows(self.config, where, chosen), found)
        except KeybrokerError as error:
            yield agent.of_error(error)


def _failures(found: Mapping[str, Any], where: Path) -> dict[str, dict[str, Any]]:
    """Return the last failure of each profile, where no daemon knows better."""
    return last_failures(where) if found.get("daemon") is None else {}


def _once(found: Iterable[Finding]) -> list[Finding]:
    """Leave out what was found twice, and what follows from a sign-in that is needed."""
    known = {(one.id, one.what): one for one in found}.values()
    logins = {one.fix for one in known if one.id == "login-needed"}
    return [one for one in known if one.id not in ("no-key", "failing") or one.fix not in logins]


def _mendable(findings: Iterable[Finding]) -> list[Finding]:
    """Return what can be mended, each way once: what concerns a folder comes first."""
    ways = {one.mend: one for one in findings if one.mend is not None}
    return sorted(ways.values(), key=lambda one: not isinstance(one.mend, Close | Remove))


def _print(found: _Checks, findings: list[Finding], done: list[tuple[Finding, str]]) -> None:
    for one, problem in done:
        text = f"not mended: {one.what}: {problem}" if problem else f"mended: {one.what}"
        print(coloured(text, "red" if problem else "green"))
    lines = [*(_line(route) for route in found.routes), *_desktop(found.seen.origins.desktop)]
    if text := _learnt(found.gateway):
        lines.append(("gateway", text))
    if lines:
        print("requests go")
    width = max((len(name) for name, _ in lines), default=0)
    for name, text in lines:
        print(f"  {name.ljust(width)}  {text}")
    for route in found.routes:
        for text in route.passed_over:
            print(f"  {''.ljust(width)}  {text}")
    if lines and findings:
        print()
    for one in findings:
        row = f" (row {one.row})" if one.row else ""
        severity = coloured(one.severity, COLOURS[one.severity])
        print(f"{severity}: {one.what}; {one.why}{row}; fix: {one.fix}")
    if not findings:
        print(coloured("nothing is wrong", "green"))
        if not found.deep and found.profile is not None:
            print("next: keybroker doctor --deep, which sends the gateway what a session sends")


def _line(route: Route) -> tuple[str, str]:
    """Return a surface, and where its requests go, with which key."""
    where = "by default" if route.url_from is None else f"set in {route.url_from.place}"
    mode = f", in the format of {route.mode}" if route.mode else ""
    url = shown(route.url) if route.url else "that provider"
    if route.is_helped:
        key = str(route.authorization if route.authorization.what else route.x_api_key)
    else:
        parts = {"authorization": route.authorization, "x-api-key": route.x_api_key}
        key = ", ".join(f"{name}: {part}" for name, part in parts.items() if part.what) or "nothing"
    return route.surface, f"to {url} ({where}{mode}), with {key}"


def _learnt(gateway: Mapping[str, Any]) -> str:
    """Say what a gateway does with keys; empty where it did not answer."""
    said = [f"to a wrong key {gateway['wrong_key']}"] if gateway.get("wrong_key") else []
    said += [str(gateway["key"])] if gateway.get("key") else []
    return f"{gateway['url']}: {'; '.join(said)}" if said and "url" in gateway else ""


def _desktop(found: Desktop | None) -> Iterator[tuple[str, str]]:
    if found is None:
        return
    url = found.values.get("inferenceGatewayBaseUrl", "")
    if found.values.get("inferenceProvider") != "gateway" or not url:
        yield "desktop", f"not to a gateway ({found.place})"
        return
    helper = "a fixed key" if found.has_key else "inferenceCredentialHelper"
    yield "desktop", f"to {shown(url)} (set in {found.place}), with {helper}"


def _document(
    found: _Checks, findings: list[Finding], done: list[tuple[Finding, str]]
) -> dict[str, Any]:
    return {
        "requests": [
            {
                "surface": route.surface,
                "url": shown(route.url),
                "set_in": None if route.url_from is None else route.url_from.place,
                "format": route.mode or None,
                "authorization": str(route.authorization) if route.authorization.what else None,
                "x_api_key": str(route.x_api_key) if route.x_api_key.what else None,
                "passed_over": list(route.passed_over),
            }
            for route in found.routes
        ],
        "gateway": found.gateway,
        "findings": [_described(one) for one in findings],
        "mended": [{"id": one.id, "what": one.what, "problem": why or None} for one, why in done],
    }


def _described(one: Finding) -> dict[str, Any]:
    return {
        "id": one.id,
        "severity": one.severity,
        "what": one.what,
        "why": one.why,
        "fix": one.fix,
        "safe": one.mend is not None,
        "row": one.row,
    }
