"""What an organisation has set for Claude Code on this machine, which beats what its user sets.

    /etc/claude-code/managed-settings.json: apiKeyHelper, env.ANTHROPIC_BASE_URL

Read only. The value of a credential is never taken out of its file.

See: https://code.claude.com/docs/en/managed-settings
"""

import json
import os
import plistlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

from keybroker.connect.edit import is_ours
from keybroker.errors import ConfigError
from keybroker.fields import looks_like_key, read_url
from keybroker.settings import Document, SettingsInvalid

LARGEST_FILE = 1 << 20
NAME = "managed-settings.json"
DROP_INS = "managed-settings.d"
FOLDERS = {
    "linux": ("etc/claude-code",),
    "darwin": ("Library/Application Support/ClaudeCode",),
    # the second is what older versions read
    "win32": ("Program Files/ClaudeCode", "ProgramData/ClaudeCode"),
}
PREFERENCES = "Library/Managed Preferences"
DOMAIN = "com.anthropic.claudecode.plist"
REGISTRY = r"SOFTWARE\Policies\ClaudeCode"
# What decides where requests go and with which key.
_KEYS = (
    *("apiKeyHelper", "forceLoginMethod", "forceLoginOrgUUID", "forceLoginGatewayUrl"),
    *("policyHelper", "awsCredentialExport", "gcpAuthRefresh"),
)
_VARIABLES = (
    *("ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY"),
    *("ANTHROPIC_CUSTOM_HEADERS", "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_API_KEY_HELPER_TTL_MS"),
)
_PROVIDERS = "CLAUDE_CODE_USE_"  # Bedrock, Vertex, Foundry, …
# What is said of a key and does not stand in our way.
_HARMLESS = ("env.CLAUDE_CODE_API_KEY_HELPER_TTL_MS", "policyHelper")
_SHOWN = ("env.ANTHROPIC_BASE_URL", "forceLoginGatewayUrl", "forceLoginMethod")
_LOGINS = ("claudeai", "console", "gateway")


@dataclass(frozen=True, slots=True)
class Finding:
    """
    What one place has set.

    Attributes:
        place: The file, or the key of the registry.
        keys: What it sets, each with its value where that is no secret, else empty.
        problem: Why it could not be read.
        ours: It has our helper: the organisation uses keybroker.
    """

    place: str
    keys: Mapping[str, str]
    problem: str = ""
    ours: bool = False

    @property
    def binding(self) -> tuple[str, ...]:
        """What the user cannot set otherwise, and we would."""
        return () if self.ours else tuple(k for k in self.keys if k not in _HARMLESS)

    def __str__(self) -> str:
        said = [f"{key} = {value}" if value else key for key, value in self.keys.items()]
        ours = " (keybroker)" if self.ours else ""
        return f"{self.place}: {self.problem or ', '.join(said)}{ours}"


def organisation(
    root: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    system: str = sys.platform,
) -> list[Finding]:
    """
    Return what is set, those places first that beat the others.

    Args:
        root: Where the file system begins.
        environment: Has the user's name and Claude Code's folder.
        system: As `sys.platform` has it.
    """
    top = root or Path("C:\\" if system == "win32" else "/")
    found = [*_remote(environment)]
    if system == "darwin":
        found += _preferences(top, environment)
    if system == "win32":
        found += _registry("HKLM")
    for folder in FOLDERS.get(system, FOLDERS["linux"]):
        found += _files(top / folder)
    if system == "win32":
        found += _registry("HKCU")
    return found


def refuse(findings: list[Finding], what: str) -> None:
    """
    Refuse to go on where the organisation has decided already.

    Raises:
        ConfigError: Something binding is set; `--force` goes on all the same.
    """
    for one in findings:
        if one.binding:
            raise ConfigError(
                f"{what}: your organisation has set {', '.join(one.binding)} in {one.place}",
                hint="ask who looks after it, or go on with --force: theirs is what counts",
            )


def _remote(environment: Mapping[str, str]) -> Iterator[Finding]:
    """What Anthropic's servers, or a gateway with a login, delivered last."""
    home = environment.get("CLAUDE_CONFIG_DIR") or os.path.join(
        environment.get("HOME") or os.path.expanduser("~"), ".claude"
    )
    yield from _file(Path(home) / "remote-settings.json")


def _files(folder: Path) -> Iterator[Finding]:
    yield from _file(folder / NAME)
    with suppress(OSError):
        for path in sorted((folder / DROP_INS).iterdir()):
            if path.suffix == ".json" and not path.name.startswith("."):
                yield from _file(path)


def _file(path: Path) -> Iterator[Finding]:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE)
        value = Document(data.decode("utf-8-sig")).value
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        yield Finding(str(path), {}, f"cannot be read ({error.strerror})")
        return
    except (SettingsInvalid, UnicodeDecodeError):
        yield Finding(str(path), {}, "is not JSON")
        return
    yield from _finding(str(path), value)


def _preferences(top: Path, environment: Mapping[str, str]) -> Iterator[Finding]:
    """What a configuration profile has set (macOS); the user's own beats the machine's."""
    folder = top / PREFERENCES
    user = environment.get("USER", "")
    named = [folder / user / DOMAIN] if user and "/" not in user else []
    for path in (*named, folder / DOMAIN):
        try:
            with path.open("rb") as file:
                value = plistlib.loads(file.read(LARGEST_FILE))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            yield Finding(str(path), {}, f"cannot be read ({error.strerror})")
            continue
        except (plistlib.InvalidFileException, ExpatError, ValueError, OverflowError, KeyError):
            yield Finding(str(path), {}, "is not a property list")
            continue
        yield from _finding(str(path), value)


def _registry(hive: str) -> Iterator[Finding]:
    """What a policy has set (Windows): JSON in one value."""
    if sys.platform != "win32":
        return
    import winreg

    top = winreg.HKEY_LOCAL_MACHINE if hive == "HKLM" else winreg.HKEY_CURRENT_USER
    place = rf"{hive}\{REGISTRY}"
    try:
        with winreg.OpenKey(top, REGISTRY) as key:
            text, _ = winreg.QueryValueEx(key, "Settings")
        value = json.loads(text)
    except FileNotFoundError:
        return
    except OSError as error:
        yield Finding(place, {}, f"cannot be read ({error.strerror})")
        return
    except (ValueError, TypeError):
        yield Finding(place, {}, "is not JSON")
        return
    yield from _finding(place, value)


def _finding(place: str, value: Any) -> Iterator[Finding]:
    """Yield what a document sets, if that is anything of concern."""
    if not isinstance(value, Mapping):
        return
    env = value.get("env")
    variables = env if isinstance(env, Mapping) else {}
    set_here = {key: value[key] for key in _KEYS if _is_set(value.get(key))}
    for name, one in variables.items():
        known = name in _VARIABLES or str(name).startswith(_PROVIDERS)
        if known and _is_set(one):
            set_here[f"env.{name}"] = one
    if set_here:
        keys = {key: _plain(key, one) for key, one in set_here.items()}
        yield Finding(place, keys, ours=is_ours(value.get("apiKeyHelper")))


def _is_set(value: object) -> bool:
    return value not in (None, "", [], {}, False)


def _plain(key: str, value: object) -> str:
    """Return a value that may be shown; empty for what could be, or have in it, a secret."""
    if key not in _SHOWN or not isinstance(value, str) or looks_like_key(value):
        return ""
    if key == "forceLoginMethod":
        return value if value in _LOGINS else ""
    try:
        return read_url(value)
    except ValueError:
        return ""
