"""Claude Desktop with inference at the gateway: its own configuration, and a launcher for a key.

Nothing of Claude Code's settings counts there. What it runs for a key takes no arguments, so each
profile has a file of its own, and prints a bare key, or where the profile has headers

    {"token": "…", "headers": {"X-Org-Route": "eng"}}

For one user the configuration is an entry of the app's own library, with JSON's types:

    configLibrary/<id>.json: {"inferenceProvider": "gateway", "inferenceCredentialHelper": "/…", …}
    configLibrary/_meta.json: {"appliedId": "<id>", "entries": [{"name": "keybroker work", …}]}

For all users of many machines it is a property list, a profile for MDM or a file of the registry,
where every value is text; on Linux it is a JSON file.

See: https://claude.com/docs/third-party/claude-desktop/configuration
and https://claude.com/docs/third-party/claude-desktop/credential-helper
"""

import json
import plistlib
import shlex
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from keybroker import guidance, paths
from keybroker.config import Profile
from keybroker.connect.line import helper_line, shared_line
from keybroker.connect.plan import Keys, Piece, Place, Plan, Whole
from keybroker.errors import ConfigError
from keybroker.fields import show_duration
from keybroker.settings import Named

SCOPES = ("user", "managed")
STANDS_ALONE = True

# The shortest of what is sensible: a call costs some milliseconds. From 2 min down newer versions
# do not look before each turn any more, so that only a refusal makes them ask.
TTL = timedelta(minutes=5)
MARGIN = timedelta(minutes=5)  # for a turn that began with a key just before it was due
TIMEOUT_SECONDS = 15  # the helper answers within 10, and a refusal in a turn is given 20
REFUSED_MS = 24 * 60 * 60 * 1000  # an ask within this time after the last says: look at the key

DOMAIN = "com.anthropic.claudefordesktop"
REGISTRY = "HKEY_LOCAL_MACHINE\\SOFTWARE\\Policies\\Claude"
LINUX_FILE = "/etc/claude-desktop/managed-settings.json"
LIBRARY = "Claude-3p/configLibrary"
TIERS = ("sonnet", "opus", "haiku")  # the first model is what a new session has
# Where what is for all users goes; on Windows to where keybroker is.
LAUNCHERS = {
    "linux": "/usr/local/libexec/keybroker",
    "macos": "/Library/Application Support/keybroker/launchers",
}
# A script's process has the name of its file; what is called sh is known for a shell, and who
# started it is the one who asks.
AS_A_SHELL = '[ "${1-}" = again ] || exec /bin/sh "$0" again'
NOTES = (
    "Claude Desktop has a configuration of its own: nothing that is set for Claude Code counts",
    "not tried with Claude Desktop itself: this is what its reference says",
)
LOCAL_NOTE = (
    "its reference has the keys of a credential helper under managed configuration; that they "
    "count in a local one is what others report"
)


def plan(profile: Profile, place: Place, scope: str) -> Plan:
    """
    Say what connects Claude Desktop: of this user, or of all users of such machines.

    Raises:
        ConfigError: It is not here, or it is not said where the files go.
    """
    here = place.output is None and place.system == Place.here().system
    if scope == "managed":
        return _managed(profile, place, here=here)
    if not here:
        raise ConfigError(
            "desktop: what is for other machines is for all of their users",
            hint=f"keybroker connect desktop --scope managed --for {place.system} --output FOLDER",
        )
    return _for_user(profile, place)


def display_name(model: str) -> str:
    """
    Make a name for people of a model's id; one that is not like Anthropic's stays as it is.

        anthropic/claude-sonnet-4-5-20250929: Claude Sonnet 4.5 (20250929)
    """
    words = model.rpartition("/")[2].split("-")
    if words[0] != "claude" or not all(word.isalnum() for word in words):
        return model
    numbers = [word for word in words if word.isdigit() and len(word) < 8]
    dates = "".join(f" ({word})" for word in words if word.isdigit() and len(word) >= 8)
    named = " ".join(word.capitalize() for word in words if not word.isdigit())
    return f"{named} {'.'.join(numbers)}".rstrip() + dates


def _for_user(profile: Profile, place: Place) -> Plan:
    library = own_library(place)
    launcher = _own_launchers(place) / profile.name
    line = helper_line(profile.name, place.environment)
    script = _script(profile, line, paths.named_config(place.environment))
    name, entry = _entry(profile)
    settings = _settings(profile, str(launcher))
    pieces: tuple[Piece, ...] = (
        Whole(launcher, script.encode(), 0o700),
        Keys(library / f"{entry}.json", {(key,): value for key, value in settings.items()}),
        Keys(
            library / "_meta.json",
            {("entries", Named(name), "id"): str(entry), ("appliedId",): str(entry)},
        ),
    )
    return Plan(
        pieces,
        (*NOTES, LOCAL_NOTE, *_notes(profile)),
        (
            "quit Claude Desktop and start it again: it reads this once, at its start",
            f"Developer → Configure Third-Party Inference shows {name}; then try one prompt",
            *_by_hand(settings),
        ),
        line=shlex.quote(str(launcher)),
    )


def _managed(profile: Profile, place: Place, *, here: bool) -> Plan:
    if place.output is None and not (here and place.system == "linux"):
        raise ConfigError(
            "desktop: what MDM hands out is files, and it is not said where they go",
            hint=f"keybroker connect desktop --scope managed --for {place.system} --output FOLDER",
        )
    line = shared_line(profile.name, place)
    launcher = _launcher_of_all(profile, place)
    windows = place.system == "windows"
    script = _batch(profile, line) if windows else _script(profile, line, "")
    settings = _settings(profile, launcher, with_headers=windows)
    pieces: list[Piece] = [Whole(place.machine(launcher), script.encode(), 0o755)]
    if place.system == "linux":
        pieces.append(Whole(place.machine(LINUX_FILE), _json(settings), 0o644))
        after = f"goes to {LINUX_FILE} on those machines"
    elif windows:
        data = _registry_file(_texts(settings))
        pieces.append(Whole(place.machine(f"keybroker-{profile.name}.reg"), data, 0o644))
        after = f"keybroker-{profile.name}.reg: for a group policy, for Intune, or for reg import"
    else:
        texts = _texts(settings)
        pieces += [
            Whole(place.machine(f"{DOMAIN}.plist"), _plist(texts), 0o644),
            Whole(
                place.machine(f"keybroker-{profile.name}.mobileconfig"),
                _plist(_mobileconfig(profile, texts)),
                0o644,
            ),
        ]
        after = (
            f"keybroker-{profile.name}.mobileconfig: for MDM; {DOMAIN}.plist has the same for MDM "
            "that takes a domain and a property list"
        )
    steps = [f"the launcher goes to {launcher} on those machines, where all can run it", after]
    if place.output is not None:
        pieces += _library_to_copy(profile, place.output, settings)
        steps.append(
            f"{LIBRARY}: the same for one user without MDM, for a folder of that name in "
            f"{_APPLICATION_DATA[place.system]}"
        )
    notes = list(_notes(profile))
    if windows:
        notes.insert(0, "keybroker itself was not tried on Windows")
        if " " in launcher:
            notes.append(f"{launcher}: whether it is run with a blank in its path was not tried")
    return Plan(
        tuple(pieces),
        (*NOTES, *notes),
        (
            *steps,
            "Claude Desktop reads this once, at its start",
            *_by_hand(settings),
        ),
        line=shlex.quote(launcher) if here else None,
    )


_APPLICATION_DATA = {
    "linux": "~/.config",
    "macos": "~/Library/Application Support",
    "windows": "%LOCALAPPDATA%",
}


def own_library(place: Place) -> Path:
    """Return where the app of this user keeps its configurations; it makes a folder of its own."""
    if place.system == "macos":
        data = place.home / "Library/Application Support"
    else:
        named = place.environment.get("XDG_CONFIG_HOME", "")
        data = Path(named) if named.startswith("/") else place.home / ".config"
    folders = [data / "Claude-3p", data / "Claude"]
    if not any(folder.is_dir() for folder in folders):
        raise ConfigError(
            f"desktop: no Claude Desktop is here: there is neither {folders[0]} nor {folders[1]}",
            hint="start it once; for other machines: keybroker connect desktop --for macos "
            "--installed-in /opt/keybroker --output FOLDER",
        )
    return data / LIBRARY


def _own_launchers(place: Place) -> Path:
    if place.system == "macos":
        return place.home / "Library/Application Support/keybroker/launchers"
    named = place.environment.get("XDG_DATA_HOME", "")
    data = Path(named) if named.startswith("/") else place.home / ".local/share"
    return data / "keybroker/launchers"


def _launcher_of_all(profile: Profile, place: Place) -> str:
    if place.system == "windows":
        return f"{place.installed_in}\\launchers\\{profile.name}.cmd"
    return f"{LAUNCHERS[place.system]}/{profile.name}"


def _entry(profile: Profile) -> tuple[str, UUID]:
    """Return the name and the id of a profile's entry: the same each time."""
    return f"keybroker {profile.name}", uuid5(NAMESPACE_URL, f"keybroker:{profile.name}")


def _settings(profile: Profile, launcher: str, *, with_headers: bool = False) -> dict[str, Any]:
    """Return the configuration, with JSON's types."""
    found: dict[str, Any] = {
        "inferenceProvider": "gateway",
        "inferenceGatewayBaseUrl": profile.base_url,
        "inferenceGatewayAuthScheme": "bearer",
        "inferenceCredentialKind": "helper-script",
        "inferenceCredentialHelper": launcher,
        "inferenceCredentialHelperTtlSec": int(TTL.total_seconds()),
        "inferenceCredentialHelperTimeoutSec": TIMEOUT_SECONDS,
        "inferenceCredentialHelperSilentRefreshEnabled": True,
    }
    if models := list(_models(profile)):  # without any it asks the gateway which there are
        found["inferenceModels"] = models
    if with_headers and profile.headers:
        found["inferenceCustomHeaders"] = dict(profile.headers)
    return found


def _models(profile: Profile) -> Iterator[dict[str, str]]:
    """Yield what can be chosen: the models of the tiers, then the others that a key may use."""
    seen = set()
    for tier in TIERS:
        if (model := profile.claude.get(tier)) is not None and model not in seen:
            seen.add(model)
            yield {
                "name": model,
                "labelOverride": display_name(model),
                "anthropicFamilyTier": tier,
            }
    for model in profile.source.get("models", ()):
        if model not in seen:
            seen.add(model)
            yield {"name": model, "labelOverride": display_name(model)}


def _notes(profile: Profile) -> Iterator[str]:
    every = show_duration(TTL)
    yield (
        f"it keeps a key for {every}, and newer versions look before each turn whether it is due; "
        "older ones ask again when a session starts, or when the gateway refuses the key"
    )
    if profile.hold < TTL + MARGIN:
        yield (
            f"hold is {show_duration(profile.hold)}: a key may be revoked while Claude Desktop has "
            f"it, which costs a turn one refusal; {show_duration(TTL + MARGIN)} is enough"
        )
    for model in _models(profile):
        name = model["name"]
        if "claude" not in name and "anthropic" not in name:
            yield f"{name}: models without claude or anthropic in their id may be left out by it"


def _by_hand(settings: dict[str, Any]) -> Iterator[str]:
    """Yield how a person types the same into the app."""
    models = [
        f"{one['labelOverride']} = {one['name']}" for one in settings.get("inferenceModels", ())
    ]
    yield (
        "or by hand: Help → Troubleshooting → Enable Developer Mode; Developer → Configure "
        "Third-Party Inference → Gateway: Gateway base URL "
        f"{settings['inferenceGatewayBaseUrl']}, Gateway auth scheme bearer, credential helper "
        f"script {settings['inferenceCredentialHelper']}"
        + (f", models {', '.join(models)}" if models else "")
        + "; Apply Changes"
    )


def _script(profile: Profile, line: str, configuration: str) -> str:
    """Write a launcher in the language of `/bin/sh`. The key is in no program's arguments."""
    lines = [
        "#!/bin/sh",
        f"# What Claude Desktop runs for a key of keybroker's profile {profile.name}; made by",
        "# `keybroker connect desktop`. It asks nobody and opens no browser, whatever",
        "# CLAUDE_HELPER_CONTEXT says; in mid-session-refresh the key was refused or is due, and",
        "# keybroker looks at it before it gives the same one again.",
        f"{guidance.TTL_VARIABLE}={int(TTL.total_seconds()) * 1000}",
        'if [ "${CLAUDE_HELPER_CONTEXT-}" = mid-session-refresh ]; then',
        f"  {guidance.TTL_VARIABLE}={REFUSED_MS}",
        "fi",
        f"export {guidance.TTL_VARIABLE}",
    ]
    if configuration:
        lines += [f"KEYBROKER_CONFIG={shlex.quote(configuration)}", "export KEYBROKER_CONFIG"]
    if not profile.headers:
        return "\n".join([*lines, line]) + "\n"
    headers = shlex.quote(json.dumps(dict(profile.headers)))
    lines += [
        AS_A_SHELL,
        f"key=$({line}) || exit",
        'case $key in *[\\"\\\\]*)',
        "  echo 'keybroker: the key has a character that JSON would have to escape' >&2",
        "  exit 78 ;;",
        "esac",
        f'printf \'{{"token": "%s", "headers": %s}}\\n\' "$key" {headers}',
    ]
    return "\n".join(lines) + "\n"


def _batch(profile: Profile, line: str) -> str:
    """Write a launcher for Windows. Headers are in the configuration: a batch file quotes badly."""
    lines = [
        "@echo off",
        f"rem What Claude Desktop runs for a key of keybroker's profile {profile.name}.",
        "rem It asks nobody and opens no browser, whatever CLAUDE_HELPER_CONTEXT says.",
        line.replace("%", "%%"),
        "exit /b %errorlevel%",
    ]
    return "\r\n".join(lines) + "\r\n"


def _texts(settings: dict[str, Any]) -> dict[str, str]:
    """Return a configuration as preferences and the registry have it: every value is text."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in settings.items()
    }


def _mobileconfig(profile: Profile, texts: dict[str, str]) -> dict[str, Any]:
    """
    Wrap preferences as MDM hands them out.

    See: https://developer.apple.com/documentation/devicemanagement/managedpreferences
    """
    name = f"Claude Desktop: keybroker {profile.name}"
    identifier = f"keybroker.{profile.name}.desktop"
    inner = {
        "PayloadType": "com.apple.ManagedClient.preferences",
        "PayloadIdentifier": f"{identifier}.preferences",
        "PayloadUUID": str(uuid5(NAMESPACE_URL, f"{identifier}.preferences")).upper(),
        "PayloadVersion": 1,
        "PayloadDisplayName": name,
        "PayloadContent": {DOMAIN: {"Forced": [{"mcx_preference_settings": texts}]}},
    }
    return {
        "PayloadType": "Configuration",
        "PayloadIdentifier": identifier,
        "PayloadUUID": str(uuid5(NAMESPACE_URL, identifier)).upper(),
        "PayloadVersion": 1,
        "PayloadDisplayName": name,
        "PayloadScope": "System",
        "PayloadContent": [inner],
    }


def _plist(document: dict[str, Any]) -> bytes:
    return plistlib.dumps(document, sort_keys=False)


def _registry_file(texts: dict[str, str]) -> bytes:
    """
    Write what regedit imports: UTF-16 with a mark of order, and its own ends of lines.

    See: https://support.microsoft.com/help/310516
    """
    lines = ["Windows Registry Editor Version 5.00", "", f"[{REGISTRY}]"]
    for key, value in texts.items():
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'"{key}"="{escaped}"')
    return ("\ufeff" + "\r\n".join([*lines, "", ""])).encode("utf-16-le")


def _library_to_copy(profile: Profile, output: Path, settings: dict[str, Any]) -> list[Piece]:
    name, entry = _entry(profile)
    meta = {"appliedId": str(entry), "entries": [{"id": str(entry), "name": name}]}
    folder = output / LIBRARY
    return [
        Whole(folder / f"{entry}.json", _json(settings), 0o644),
        Whole(folder / "_meta.json", _json(meta), 0o644),
    ]


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
