"""Claude Code: settings.json of the user, of one project, or of the machine.

See: https://code.claude.com/docs/en/settings
"""

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from keybroker import guidance, paths, settings
from keybroker.config import Profile
from keybroker.connect.line import helper_line, shared_line, status_line
from keybroker.connect.plan import Keys, Line, Piece, Place, Plan
from keybroker.connect.record import Entry
from keybroker.errors import ConfigError
from keybroker.foreign import MODES
from keybroker.settings import Document

SCOPES = ("user", "local", "managed")
HELPER = "apiKeyHelper"
STATUS_LINE: settings.Path = ("statusLine",)
DROP_IN = "managed-settings.d/50-keybroker.json"
MANAGED = {
    "linux": "/etc/claude-code",
    "macos": "/Library/Application Support/ClaudeCode",
    "windows": "C:\\Program Files\\ClaudeCode",
}
HEADERS = "ANTHROPIC_CUSTOM_HEADERS"
LOCAL = ".claude/settings.local.json"
# Formats of one client: a settings file has one of them.
FORMATS = ("claude", "bedrock", "vertex", "foundry", "aws")
PROXY = (
    "the proxy of here has a password, which goes into no settings file: what a project's own "
    "settings say of a proxy counts"
)
WIZARD = "what a project's file sets counts only after the first-run wizard and the trust prompt"
STOPS = (
    "with a helper set, Claude Code has no Remote Control and no voice dictation",
    "Claude in Slack and on the web never use a gateway",
)


def plan(profile: Profile, place: Place, scope: str) -> Plan:
    """
    Say what connects Claude Code.

    Raises:
        ConfigError: The scope is not possible here.
    """
    return plan_with(profile, place, scope, guidance.environment(profile))


def plan_with(profile: Profile, place: Place, scope: str, environment: dict[str, str]) -> Plan:
    """Say what connects Claude Code with other variables than the usual ones."""
    after = _after(profile, place, environment)
    if scope != "user":  # a project's own settings come after the user's, and beat them
        environment = {**environment, **pins(profile, place), **environment}
    if scope == "managed":
        return _managed(profile, place, environment, after)
    if place.output is not None or place.system != Place.here().system:
        raise ConfigError(
            "connect: only what is for everybody can be written for other machines",
            hint="--scope managed",
        )
    line = helper_line(profile.name, place.environment)
    if named := paths.named_config(place.environment):  # for who starts a daemon
        environment = {**environment, "KEYBROKER_CONFIG": named}
    file = user_file(place) if scope == "user" else local_file(place)
    pieces: tuple[Piece, ...] = (_keys(file, line, environment),)
    before: tuple[str, ...] = STOPS
    if scope == "local":
        if (ignored := _ignored(place.folder)) is not None:
            pieces = (ignored, *pieces)
        before = (*STOPS, WIZARD, *((PROXY,) if has_secret_proxy(place) else ()))
    return Plan(pieces, before, after, line=line, environment=environment)


def wanted(profile: Profile, key: str) -> str:
    """
    Return what a format cannot do without.

    Raises:
        ConfigError: The profile does not have it.
    """
    found = profile.claude.get(key)
    if found is None:
        raise ConfigError(
            f"profiles.{profile.name}.claude: has no {key}",
            hint=f'write {key} = "…" into [profiles.{profile.name}.claude]',
        )
    return str(found)


def _keys(file: Path, line: str, environment: dict[str, str], mode: int = 0o600) -> Keys:
    values: dict[settings.Path, Any] = {(HELPER,): line}
    values |= {("env", name): value for name, value in environment.items()}
    # what is replaced is recorded, and somebody's headers may hold a secret: by force only
    guarded = tuple(path for path in ((HELPER,), ("env", HEADERS)) if path in values)
    return Keys(file, values, guarded=guarded, mode=mode)


def with_status_line(piece: Keys, profile: str, place: Place) -> Keys:
    """Add to Claude Code's settings what it shows below the prompt; another's is not replaced."""
    value = {"type": "command", "command": status_line(profile, place.environment)}
    values = {**piece.values, STATUS_LINE: value}
    return replace(piece, values=values, guarded=(*piece.guarded, STATUS_LINE))


def has_status_line(entry: Entry | None) -> bool:
    """Say whether that was written, by what is recorded of a file."""
    return entry is not None and any(key.path == STATUS_LINE for key in entry.keys)


def user_file(place: Place) -> Path:
    """Return the user's settings; CLAUDE_CONFIG_DIR moves them."""
    return configuration_folder(place) / "settings.json"


def configuration_folder(place: Place) -> Path:
    named = place.environment.get("CLAUDE_CONFIG_DIR")
    return Path(named).absolute() if named else place.home / ".claude"


def local_file(place: Place) -> Path:
    return place.folder / LOCAL


def committed_file(place: Place) -> Path | None:
    """Return the settings that a project brings along; None: they are the user's own."""
    file = place.folder / ".claude/settings.json"
    return None if file.resolve() == user_file(place).resolve() else file


def sends_another_key(place: Place) -> bool:
    """Say whether headers in the user's own settings carry a key, which replaces the helper's."""
    try:
        env = Document(user_file(place).read_bytes().decode()).get(("env", HEADERS))
    except (OSError, ValueError):  # is said when the file is worked out
        return False
    return isinstance(env, str) and re.search(r"(?im)^\s*x-api-key\s*:", env) is not None


def managed_file(place: Place) -> Path:
    return place.machine(f"{MANAGED[place.system]}/{DROP_IN}")


def _managed(
    profile: Profile, place: Place, environment: dict[str, str], after: tuple[str, ...]
) -> Plan:
    """Set helper and address for the whole machine, in one file: only together do they hold."""
    line = shared_line(profile.name, place)
    here = place.output is None and place.system == Place.here().system
    return Plan(
        (_keys(managed_file(place), line, environment, mode=0o644),),
        STOPS,
        after if here else (f"goes to {MANAGED[place.system]} on those machines",),
        line=line if here else None,
        environment=environment,
    )


def pins(profile: Profile, place: Place) -> dict[str, str]:
    """
    Return what keeps a repository's own settings from leading the key elsewhere.

    Each was tried with the real client: without it a project's `.claude/settings.json` sends the
    helper's key to a host of its choice, whatever ANTHROPIC_BASE_URL is here.
    """
    names = ("ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY", HEADERS)
    return {
        **{f"CLAUDE_CODE_USE_{mode}": "0" for mode in MODES},
        **dict.fromkeys(names, ""),
        **_way(profile, place),
        "NODE_TLS_REJECT_UNAUTHORIZED": "1",
    }


def _way(profile: Profile, place: Place) -> dict[str, str]:
    """
    Return the proxies of here, or that there is none on the way.

    In both spellings: the client takes the one in small letters if they differ. It takes the
    proxy for http where there is none for https. A proxy with a password is left as it is.
    """
    here = {
        name: place.environment.get(name) or place.environment.get(name.upper(), "")
        for name in ("https_proxy", "http_proxy", "no_proxy")
    }
    around = [*filter(None, here.pop("no_proxy").split(",")), urlsplit(profile.base_url).hostname]
    if has_secret_proxy(place):
        return {}  # neither written down nor gone around
    found = {name: value for name, value in here.items() if value}
    if "http_proxy" in found:
        found = {"https_proxy": found["http_proxy"], **found}
    found = found or {"no_proxy": ",".join(dict.fromkeys(host or "" for host in around))}
    return {**found, **{name.upper(): value for name, value in found.items()}}


def has_secret_proxy(place: Place) -> bool:
    """Say whether the proxy of here has a password, which no settings file may hold."""
    names = ("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY")
    return any("@" in place.environment.get(name, "") for name in names)


def ignoring(folder: Path) -> Line | None:
    """Return the line with which git ignores a project's local settings; None: no repository."""
    status, found = _git(folder, "rev-parse", "--git-path", "info/exclude")
    _, prefix = _git(folder, "rev-parse", "--show-prefix")
    pattern = re.sub(r"([\\*?\[\]])", r"\\\1", prefix)
    return None if status else Line((folder / found).absolute(), f"/{pattern}{LOCAL}")


def _ignored(folder: Path) -> Line | None:
    """
    Return the line that has git ignore a project's local settings; None: not needed.

    Raises:
        ConfigError: Git has them, or is told by the project to take them.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is not a folder")
    if _git(folder, "ls-files", "--error-unmatch", LOCAL)[0] == 0:
        raise ConfigError(f"{folder / LOCAL}: git has it", hint=f"git rm --cached {LOCAL}")
    ignored, _ = _git(folder, "check-ignore", "-q", LOCAL)
    if ignored != 1:
        return None
    told, _ = _git(folder, "check-ignore", "-v", LOCAL)
    if told == 0:  # by a pattern with an exclamation mark, which comes before what we may write
        raise ConfigError(
            f"{folder}: its .gitignore has git take {LOCAL}",
            hint=f"add {LOCAL} to it, at its end",
        )
    return ignoring(folder)


def _git(folder: Path, *words: str) -> tuple[int, str]:
    unnamed = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # a hook's, of another repository
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            env={name: value for name, value in os.environ.items() if name not in unnamed},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return 127, ""
    return done.returncode, done.stdout.decode(errors="surrogateescape").strip("\n")


def _after(profile: Profile, place: Place, environment: dict[str, str]) -> tuple[str, ...]:
    steps = ["restart Claude Code where it runs"]
    if has_login(place):
        steps.insert(0, "claude /logout, since a login is saved here")
    addresses = [value for name, value in environment.items() if name.endswith("_BASE_URL")]
    status = f"/status names the address {' '.join(addresses)}"
    if "ANTHROPIC_BASE_URL" in environment:
        lines = f"`Anthropic base URL: {profile.base_url}` and `API key: apiKeyHelper`"
        status = f"/status has the lines {lines}"
    return (
        *steps,
        f"{status}; a line `Login method` means that it did not take",
        "/model lists what you can choose; then try one prompt",
    )


def has_login(place: Place) -> bool:
    """Say whether a login at Anthropic is saved for this user, where that can be seen."""
    folder = configuration_folder(place)
    if (folder / ".credentials.json").is_file():
        return True
    for file in (folder / ".claude.json", place.home / ".claude.json"):
        try:
            if "oauthAccount" in json.loads(file.read_bytes()):
                return True
        except (OSError, ValueError, TypeError, RecursionError):
            continue
    return False
