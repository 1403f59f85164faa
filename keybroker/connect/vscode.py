"""Claude Code in VS Code: the extension's own settings, beside those of Claude Code itself.

    "claudeCode.environmentVariables": [{"name": "ANTHROPIC_BASE_URL", "value": "https://…"}],
    "claudeCode.disableLoginPrompt": true

The helper stays in Claude Code's settings, which the process that the extension starts reads; the
extension's look whether anybody is logged in reads its own alone. Never a token: one here would
be sent instead of the helper's key.

See: https://code.claude.com/docs/en/llm-gateway-connect
and https://code.visualstudio.com/docs/configure/settings
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from keybroker import guidance, settings
from keybroker.config import Profile
from keybroker.connect import claude
from keybroker.connect.plan import Keys, Piece, Place, Plan
from keybroker.connect.tokens import VARIABLES
from keybroker.errors import ConfigError
from keybroker.settings import Document, Named, SettingsInvalid

SCOPES = ("user",)
VARIABLES_KEY = "claudeCode.environmentVariables"
NO_LOGIN_KEY = "claudeCode.disableLoginPrompt"
# The folder that each has below the one for programs' settings; and in a Flatpak, below its own.
PRODUCTS = ("Code", "Code - Insiders", "Code - OSS", "VSCodium", "VSCodium - Insiders", "Cursor")
FLATPAKS = {
    "com.visualstudio.code": "Code",
    "com.visualstudio.code.insiders": "Code - Insiders",
    "com.visualstudio.code-oss": "Code - OSS",
    "com.vscodium.codium": "VSCodium",
    "com.vscodium.codium-insiders": "VSCodium - Insiders",
}
# What runs on the far side of SSH, in WSL or in a container, and for a browser.
SERVERS = (
    *(".vscode-server", ".vscode-server-insiders", ".vscode-server-oss"),
    *(".vscodium-server", ".cursor-server", ".openvscode-server"),
)
BROWSER = "code-server"
NOT_TRIED = (
    "not tried with the extension itself: that its look for a login is content with the address "
    "and with claudeCode.disableLoginPrompt is what its documentation says"
)
ONLY_ITS_OWN = (
    "the extension's look for a login reads VS Code's settings only; the helper is in Claude "
    "Code's, which are connected with it"
)
SANDBOX = "in a Flatpak, Claude Code and the helper run inside its sandbox; that was not tried"


def plan(profile: Profile, place: Place, scope: str) -> Plan:
    """
    Say what connects every editor of this kind that is here, and Claude Code with them.

    Raises:
        ConfigError: There is none, another machine's is meant, or one has a key of its own.
    """
    if place.system != Place.here().system or place.output is not None:
        raise ConfigError(
            "vscode: its settings are each user's own, and are written where they are",
            hint="keybroker connect vscode, on that machine",
        )
    found = list(installed(place))
    if not found:
        places = ", ".join(str(folder) for folder, _ in _places(place))
        raise ConfigError(
            "vscode: no VS Code is here: there is none of "
            + places.replace(f"{place.home}/", "~/"),
            hint="start it once; for what is elsewhere: VSCODE_PORTABLE=FOLDER keybroker connect "
            "vscode",
        )
    for file, name in _tokens(found):
        raise ConfigError(
            f"vscode: {file}: {VARIABLES_KEY} has {name}, and that is sent instead of the "
            "helper's key",
            hint="take it out, then: keybroker connect vscode",
        )
    base = claude.plan(profile, place, scope)
    lent = tuple(
        replace(one, lent_by="claude") if isinstance(one, Keys) else one for one in base.pieces
    )
    values: dict[settings.Path, Any] = {
        (VARIABLES_KEY, Named(name), "value"): value
        for name, value in guidance.environment(profile).items()
    }
    values[(NO_LOGIN_KEY,)] = True
    pieces: tuple[Piece, ...] = tuple(Keys(file, values, strict=False) for file in found)
    sandboxed = any("/.var/app/" in str(file) for file in found)
    return Plan(
        (*lent, *pieces),
        (
            *base.before,
            ONLY_ITS_OWN,
            NOT_TRIED,
            *((SANDBOX,) if sandboxed else ()),
        ),
        (
            "in each window: Developer: Reload Window, from the command palette",
            "open Claude Code there: it should not ask for a login; then try one prompt",
            *base.after,
        ),
        line=base.line,
        environment=base.environment,
    )


def _places(place: Place) -> Iterator[tuple[Path, Path]]:
    """Yield the folder that each product makes at its first start, and where its settings go."""
    home, environment = place.home, place.environment

    def base(name: str, usual: str) -> Path:
        named = environment.get(name, "")
        return Path(named) if named.startswith("/") else home / usual

    if portable := environment.get("VSCODE_PORTABLE", ""):
        folder = Path(portable).absolute() / "user-data"
        yield folder, folder / "User"
    if place.system == "macos":
        programs = home / "Library/Application Support"
    else:
        programs = base("XDG_CONFIG_HOME", ".config")
    for name in PRODUCTS:
        yield programs / name, programs / name / "User"
    if place.system == "linux":
        for program, name in FLATPAKS.items():
            folder = home / ".var/app" / program / "config" / name
            yield folder, folder / "User"
    for name in SERVERS:
        yield home / name, home / name / "data/Machine"
    if agent := environment.get("VSCODE_AGENT_FOLDER", ""):
        folder = Path(agent).absolute()
        yield folder, folder / "data/Machine"
    folder = base("XDG_DATA_HOME", ".local/share") / BROWSER
    yield folder, folder / "User"


def installed(place: Place) -> Iterator[Path]:
    """Yield the settings of each product that is here, and of its profiles that have their own."""
    seen = set()
    for folder, where in _places(place):
        if not folder.is_dir():
            continue
        for file in (where / "settings.json", *sorted(where.glob("profiles/*/settings.json"))):
            if (real := file.resolve()) not in seen:  # one file may be linked to by all
                seen.add(real)
                yield file


def _tokens(found: list[Path]) -> Iterator[tuple[Path, str]]:
    """Yield the files that have a key of their own, and its variable's name."""
    for file in found:
        try:
            document = Document(file.read_bytes().decode())
        except (OSError, ValueError, SettingsInvalid):  # is said when the file is worked out
            continue
        for name in (*VARIABLES, "CLAUDE_CODE_OAUTH_TOKEN"):
            value = document.get((VARIABLES_KEY, Named(name), "value"))
            if isinstance(value, str) and value:
                yield file, name
