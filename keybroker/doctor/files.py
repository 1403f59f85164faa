"""What is wrong with what is set: addresses, credentials, helpers, what projects bring along."""

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from keybroker.config import Profile
from keybroker.connect.edit import is_ours
from keybroker.connect.line import helper_line
from keybroker.connect.plan import Place
from keybroker.connect.tokens import tokens
from keybroker.doctor import program, requests
from keybroker.doctor.finding import Command, Finding, Remove, Severity
from keybroker.doctor.origins import TERMINAL, Mention, Origins, shown
from keybroker.doctor.program import Program
from keybroker.doctor.requests import (
    ADDRESS,
    HEADERS,
    KEY,
    LOGIN_TOKEN,
    MODES,
    TOKEN,
    USE,
    Layer,
    Part,
    Route,
)
from keybroker.fields import looks_like_key, read_url
from keybroker.guidance import TTL_VARIABLE

CONNECT = ("connect", "--force")
AUTHORITIES = "NODE_EXTRA_CA_CERTS"
DISCOVERY = "CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY"
_LOOPBACK = re.compile(r"localhost|.*\.localhost|127(?:\.\d+){3}|::1")
_PLAIN = re.compile(r"[0-9]{1,12}")
_LISTED = re.compile(r"(?:claude|anthropic)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Seen:
    """
    What the checks look at.

    Attributes:
        profiles: All that are configured, by name.
        profile: The one that is meant; None: there is none, or no one in particular.
        client: Claude Code, where it is installed.
    """

    origins: Origins
    profiles: Mapping[str, Profile]
    profile: Profile | None
    place: Place
    client: Program | None

    @property
    def addresses(self) -> set[str]:
        return {one.base_url for one in self.profiles.values()}

    def is_gateway(self, url: str) -> bool:
        """Say whether an address is that of a profile, or below it as a format's may be."""
        text = url.strip().rstrip("/")
        return any(text == one or text.startswith(f"{one}/") for one in self.addresses)


def routes(seen: Seen) -> list[Route]:
    """Return where the requests of each surface that is here go."""
    origins = seen.origins
    found = []
    if seen.client is not None or origins.settings:
        found.append(requests.route("claude", origins.layers, login=origins.login))
    found += [
        requests.route("vscode", (*origins.settings, editor), login=origins.login)
        for editor in origins.editors
    ]
    return found


def look(seen: Seen) -> list[Finding]:
    """Return all that is wrong with what is set."""
    found = [*_broken(seen)]
    for route in routes(seen):
        found += _of_route(seen, route)
    found += _credentials_about(seen)
    found += _logins(seen)
    found += _of_layers(seen)
    found += _models(seen)
    found += _of_desktop(seen)
    return list({(one.id, one.what): one for one in found}.values())


def _broken(seen: Seen) -> Iterator[Finding]:
    for layer in (*seen.origins.settings, *seen.origins.editors):
        if layer.problem:
            yield Finding("broken-settings", f"{layer.place}: {layer.problem}", "mend that place")


def _of_route(seen: Seen, route: Route) -> Iterator[Finding]:
    """Yield why the gateway sees no request of a surface, or none with the helper's key."""
    address = MODES.get(route.mode, ADDRESS)
    place = "" if route.url_from is None else route.url_from.place
    if route.mode and not seen.is_gateway(route.url):
        switch = requests.first(_layers(seen, route), USE + route.mode)
        where = "" if switch is None else switch.place
        what = f"{route.surface}: {USE}{route.mode} is set in {where}"
        what += f", and {address} is {shown(route.url)}" if route.url else f", and {address} is not"
        yield Finding("provider", what, _taking_out(switch, USE + route.mode))
    elif seen.profiles and not place and (seen.client or route.surface != "claude"):
        surface = "" if route.surface == "claude" else " vscode"
        yield Finding(
            "not-connected",
            f"{route.surface}: {ADDRESS} is set nowhere that counts for it",
            f"keybroker connect{surface}",
        )
    elif seen.profiles and not seen.is_gateway(route.url):
        yield Finding(
            "elsewhere",
            f"{route.surface}: {address} is {shown(route.url)} in {place}, not "
            f"{' or '.join(sorted(seen.addresses))}",
            _put_right(seen, route),
        )
    elif place == TERMINAL and seen.profiles:
        yield Finding(
            "export-only",
            f"{route.surface}: {address} is set in {TERMINAL} alone{_from(seen, address)}",
            "keybroker connect",
        )
    yield from _addresses(route, address, place)
    yield from _sent_instead(seen, route)
    yield from _helper(seen, route)


def _addresses(route: Route, name: str, place: str) -> Iterator[Finding]:
    if not place or not route.url:
        return
    try:
        url = read_url(route.url.strip())
    except ValueError as error:
        what = f"{route.surface}: {name} in {place} is no address: {error}"
        yield Finding("bad-address", what, "keybroker connect --force")
        return
    parts = urlsplit(url)
    if not route.mode and parts.path.endswith(("/v1", "/v1/messages")):
        yield Finding(
            "bad-address",
            f"{route.surface}: {name} in {place} ends with {parts.path}",
            "take that off: Claude Code adds /v1/messages itself",
            because=f"requests go to {parts.path}/v1/messages, which no gateway has",
        )
    if parts.scheme == "http" and not _LOOPBACK.fullmatch(parts.hostname or ""):
        yield Finding(
            "plain-http",
            f"{route.surface}: {name} in {place} begins with http://",
            "set base_url to the https:// address, then: keybroker connect --force",
        )


def _sent_instead(seen: Seen, route: Route) -> Iterator[Finding]:
    """Yield which credential is sent in place of the helper's key."""
    if route.helper is None and not _ours(seen):
        return
    for header, part in (("authorization", route.authorization), ("x-api-key", route.x_api_key)):
        if not part.what or part.what == "apiKeyHelper" or route.helper is None:
            continue
        if HEADERS in part.what:
            what = f"{route.surface}: {HEADERS} in {part.place} has a header {header}"
            yield Finding("custom-headers", what, f"take {header} out of it")
            continue
        what = f"{route.surface}: {part.what} is set in {_where(seen, part)}{_print(seen, part)}"
        what += f", and goes out in {header}"
        yield Finding("two-sources", what, _rid_of(seen, part))


def _helper(seen: Seen, route: Route) -> Iterator[Finding]:
    """Yield whose helper counts, and where none is that is needed."""
    helper = route.helper
    if helper is not None:
        if helper.scope == "project" and helper.helper not in _lines(seen):
            what = f"{route.surface}: apiKeyHelper is set by {helper.place}"
            yield Finding("project", what, "keybroker connect --scope local --force")
        elif not is_ours(helper.helper) and seen.profiles:
            what = f"{route.surface}: apiKeyHelper in {helper.place} is not keybroker's"
            yield Finding("other-helper", what, _scope(helper))
        needs = seen.origins.is_new and route.surface == "claude"
        early = any(one.helper for one in seen.origins.settings if one.scope in ("user", "managed"))
        if needs and not early and not _env_credential(seen):
            yield Finding(
                "login-screen",
                f"claude: only {helper.place} has a credential, and the first run is still to come",
                "keybroker connect --scope user",
            )
        return
    if route.url_from is None or not route.url_from.env.get(MODES.get(route.mode, ADDRESS)):
        return
    sent = route.authorization.what or route.x_api_key.what
    if not sent:
        yield Finding(
            "login-screen",
            f"{route.surface}: {ADDRESS} is set in {route.url_from.place}, and no credential is",
            "keybroker connect",
        )
    elif sent in ("the saved login", LOGIN_TOKEN):
        yield Finding(
            "saved-login",
            f"{route.surface}: without a helper {sent} goes to {shown(route.url)}",
            "keybroker connect",
            worse=Severity.ERROR,
            because="it is not the gateway's, and whoever runs that can read it",
        )


def _env_credential(seen: Seen) -> bool:
    layers = [one for one in seen.origins.layers if one.scope in ("process", "user", "managed")]
    return any(requests.held(layers, name) for name in (TOKEN, KEY))


def _credentials_about(seen: Seen) -> Iterator[Finding]:
    """Yield keys that are set where they do not count here, but may elsewhere."""
    if not _ours(seen):
        return
    found = tokens(seen.place.environment, seen.place.folder)
    known = {(str(one.path), one.line): one for one in found if not one.is_settings}
    settled = {
        name
        for name in (TOKEN, KEY)
        for one in seen.origins.settings
        if name in one.held and one.held[name] is None and one.scope != "project"
    }
    here = seen.origins.process.held
    for one in seen.origins.mentions:
        if one.variable not in (TOKEN, KEY, LOGIN_TOKEN) or one.variable in settled:
            continue
        if here.get(one.variable) is not None:
            continue  # said with this terminal
        token = known.get((str(one.file), one.line))
        out = token is not None and token.alone
        yield Finding(
            "key-about",
            f"{one.variable} is set in {one.place}, by whatever reads that",
            "keybroker connect --take-out-keys" if out else f"take it out of {one.place}",
        )
    for layer in seen.origins.terminals:
        for name, held in layer.held.items():
            if held is not None and name in (TOKEN, KEY, LOGIN_TOKEN) and name not in settled:
                what = f"{name} is set in {layer.place}, for its terminals ({held.fingerprint})"
                yield Finding("key-about", what, f"take it out of {layer.place}")


def _logins(seen: Seen) -> Iterator[Finding]:
    origins = seen.origins
    if origins.declined:
        for layer in origins.layers:
            held = layer.held.get(KEY)
            if held is not None and held.tail in origins.declined:
                what = f"{KEY} in {layer.place} ({held.fingerprint}) was declined"
                fix = f"in Claude Code: /config, Use custom API key; or {_unset(KEY, layer)}"
                yield Finding("key-declined", what, fix)
    if not _ours(seen):
        return
    if origins.login:
        what = "a login at Anthropic is saved, beside the helper"
        yield Finding("saved-login", what, "claude /logout")
    token = requests.held(origins.layers, LOGIN_TOKEN)
    if token is not None:
        what = f"{LOGIN_TOKEN} is set in {token.place}, beside the helper"
        yield Finding("saved-login", what, _unset(LOGIN_TOKEN, token))
    if origins.gateway:
        what = f"a sign-in at the gateway {origins.gateway} is saved"
        if not any(urlsplit(one).netloc == origins.gateway for one in seen.addresses):
            yield Finding("gateway-session", what, "claude /logout")


def _of_layers(seen: Seen) -> Iterator[Finding]:
    """Yield what is wrong in one place, whatever counts."""
    for layer in seen.origins.settings:
        if layer.problem:
            continue
        forced = [key for key in layer.others if key in ("forceLoginMethod", "forceLoginOrgUUID")]
        if forced and layer.scope == "managed":
            yield Finding(
                "first-party",
                f"{layer.place} has {' and '.join(forced)}{_at(seen)}",
                "ask who manages this machine to take them out, or keybroker disconnect",
                worse=Severity.WARNING if _is_before(seen, program.FORBIDS_BOTH) else None,
            )
        elif forced:
            what = f"{layer.place} has {' and '.join(forced)}"
            yield Finding("login-forced", what, f"take {' and '.join(forced)} out of it")
        if layer.scope == "project":
            yield from _of_project(seen, layer)
    for layer in (*seen.origins.layers, *seen.origins.editors):
        file = layer.env.get(AUTHORITIES, "")
        if file and not os.access(seen.place.folder / file, os.R_OK):
            yield Finding(
                "certificate",
                f"{AUTHORITIES} in {layer.place} names {shown(file)}, which cannot be read",
                'ca = "/path/to/authority.pem" in the profile, then: keybroker connect',
                worse=Severity.WARNING,
                because="Node starts without it, and trusts its own list alone",
            )
        value = layer.env.get(TTL_VARIABLE)
        if value is None or (_PLAIN.fullmatch(value) and int(value) > 0):
            continue
        yield Finding(
            "ttl",
            f"{TTL_VARIABLE} in {layer.place} is {_briefly(value)}",
            _unset(TTL_VARIABLE, layer) if layer.scope == "process" else _scope(layer),
            _reconnect(seen, layer) if _ours(seen) else None,
        )


def _of_project(seen: Seen, layer: Layer) -> Iterator[Finding]:
    """Yield what a repository's own settings would have our key do."""
    names = [
        name
        for name in layer.env
        if name == ADDRESS
        or name in MODES.values()
        or name.upper().endswith("_PROXY")
        or name.startswith(USE)
        or name in ("NODE_TLS_REJECT_UNAUTHORIZED", AUTHORITIES)
    ]
    higher = [one for one in seen.origins.settings if one.scope in ("managed", "local")]
    open_ones = [one for one in names if requests.first(higher, one) is None]
    if open_ones:
        yield Finding(
            "project",
            f"{layer.place} sets {', '.join(open_ones)}",
            "keybroker connect --scope local, here; or do not run Claude Code in this folder",
        )


def _models(seen: Seen) -> Iterator[Finding]:
    layers = seen.origins.layers
    client, profile = seen.client, seen.profile
    asked = requests.first(layers, DISCOVERY)
    is_on = asked is not None and asked.env[DISCOVERY].strip() not in ("", "0", "false")
    route = requests.route("claude", layers)
    cached = seen.origins.models.get("baseUrl")
    if isinstance(cached, str) and cached.rstrip("/") != route.url.strip().rstrip("/"):
        file = seen.origins.models_file
        assert file is not None, "it was read"
        what = f"{file} is of {shown(cached)}"
        if is_on and route.url_from is not None:
            yield Finding("models-of-another", what, f"rm {shlex.quote(str(file))}", Remove(file))
    if is_on:
        least = program.DISCOVERS_WITH_HELPER if route.helper else program.DISCOVERS
        if _is_before(seen, least):
            what = f"discovery is on, and {client} has it from {program.said(least)} on"
            yield Finding("old-discovery", what, "claude update")
        if route.mode:
            what = f"discovery is on, and requests are in the format of {USE}{route.mode}"
            fix = "name models by haiku, sonnet and opus in [profiles.….claude]"
            yield Finding("no-discovery", what, fix)
    if profile is None or not seen.is_gateway(route.url):
        return
    models = [str(one) for one in profile.source.get("models") or () if isinstance(one, str)]
    tiers = [profile.claude.get(tier) for tier in ("haiku", "sonnet", "opus")]
    rest = [one for one in models if one not in tiers and not one.startswith("claude-")]
    listed = [one for one in rest if _LISTED.match(one)]
    if listed and not is_on and not route.mode:
        yield Finding(
            "models-missing",
            f"{profile.name}: {', '.join(listed)} are not among the names that Claude Code knows",
            f"discovery = true in [profiles.{profile.name}.claude], then: keybroker connect; "
            "`claude --debug` says in [gatewayDiscovery] what came of it",
        )
    if (others := [one for one in rest if one not in listed]) and not any(tiers):
        yield Finding(
            "models-unnamed",
            f"{profile.name}: {', '.join(others)} can be chosen in no list",
            f'sonnet = "{others[0]}" in [profiles.{profile.name}.claude], then: keybroker connect',
        )


def _of_desktop(seen: Seen) -> Iterator[Finding]:
    found = seen.origins.desktop
    if found is None or found.values.get("inferenceProvider") != "gateway":
        return
    url = found.values.get("inferenceGatewayBaseUrl", "")
    try:
        read_url(url.strip())
    except ValueError as error:
        what = f"desktop: inferenceGatewayBaseUrl in {found.place} is no address: {error}"
        yield Finding("desktop", what, "keybroker connect desktop --force")
        return
    if seen.profiles and not seen.is_gateway(url):
        what = f"desktop: inferenceGatewayBaseUrl in {found.place} is {shown(url)}"
        yield Finding("desktop", what, "keybroker connect desktop --force")
    helper = found.values.get("inferenceCredentialHelper", "")
    if helper and not (os.path.isabs(helper) and os.access(helper, os.X_OK)):
        yield Finding(
            "desktop",
            f"desktop: inferenceCredentialHelper in {found.place} is no program that can be run",
            "keybroker connect desktop --force",
        )
    if helper and found.has_key:
        what = f"desktop: {found.place} has a fixed key beside its helper"
        yield Finding("desktop", what, f"take inferenceGatewayApiKey out of {found.place}")


def _layers(seen: Seen, route: Route) -> Sequence[Layer]:
    if route.surface == "claude":
        return seen.origins.layers
    return (*seen.origins.settings, *seen.origins.editors)


def _lines(seen: Seen) -> list[str]:
    return [helper_line(name, seen.place.environment) for name in seen.profiles]


def _ours(seen: Seen) -> bool:
    """Say whether a helper of ours is connected to Claude Code."""
    return any(is_ours(one.helper) for one in seen.origins.settings)


def _is_before(seen: Seen, version: program.Version) -> bool:
    known = None if seen.client is None else seen.client.version
    return known is not None and known < version


def _at(seen: Seen) -> str:
    return "" if seen.client is None else f"; Claude Code is {program.said(seen.client.version)}"


def _from(seen: Seen, name: str) -> str:
    """Say which line of a profile may have set what this terminal has."""
    found: list[Mention] = [one for one in seen.origins.mentions if one.variable == name]
    return f" ({found[-1].place})" if found else ""


def _where(seen: Seen, part: Part) -> str:
    return part.place + (_from(seen, part.what) if part.place == TERMINAL else "")


def _print(seen: Seen, part: Part) -> str:
    layers = (*seen.origins.layers, *seen.origins.editors)
    one = next((one for one in layers if one.place == part.place), None)
    held = None if one is None else one.held.get(part.what)
    return "" if held is None else f" ({held.fingerprint})"


def _rid_of(seen: Seen, part: Part) -> str:
    """Say how a credential goes out of its place."""
    layers = (*seen.origins.layers, *seen.origins.editors)
    layer = next((one for one in layers if one.place == part.place), None)
    if layer is None or part.place == TERMINAL:
        lines = _from(seen, part.what)
        return f"unset {part.what}" + ("; keybroker connect --take-out-keys" if lines else "")
    if layer.scope in ("user", "local", "project") and part.what in (TOKEN, KEY):
        return "keybroker connect --take-out-keys"
    if layer.scope == "managed":
        return f"ask who manages this machine to take it out of {part.place}"
    return f"take {part.what} out of {part.place}"


def _unset(name: str, layer: Layer) -> str:
    return f"unset {name}" if layer.place == TERMINAL else f"take {name} out of {layer.place}"


def _taking_out(layer: Layer | None, name: str) -> str:
    if layer is None:
        return f"unset {name}"
    if layer.scope == "managed":
        return f"ask who manages this machine to take {name} out of {layer.place}"
    if layer.scope == "project":
        return "keybroker connect --scope local, which switches it off here"
    return _unset(name, layer)


def _put_right(seen: Seen, route: Route) -> str:
    layer = route.url_from
    assert layer is not None, "it is set somewhere"
    if layer.scope == "managed":
        return "ask who manages this machine; what the organisation has set beats all others"
    if route.surface == "vscode" and layer.scope == "process":
        return "keybroker connect vscode --force"
    return _scope(layer)


def _scope(layer: Layer) -> str:
    """Return the command that writes over what a layer has."""
    if layer.scope in ("local", "project"):
        return "keybroker connect --scope local --force"
    if layer.scope == "managed":
        return "ask who manages this machine, or as root: keybroker connect --scope managed --force"
    return "keybroker connect --force"


def _reconnect(seen: Seen, layer: Layer) -> Command | None:
    named = () if seen.profile is None else ("--profile", seen.profile.name)
    return Command(("connect", *named, "--no-check")) if layer.scope == "user" else None


def _briefly(value: str) -> str:
    plain = len(value) <= 12 and value.isprintable() and not looks_like_key(value)
    return repr(value) if plain else "something else"
