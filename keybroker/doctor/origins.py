"""What is set where: every place from which Claude Code, or what it is started from, is told.

A credential is a stand-in as soon as it was read: a fingerprint, and one of its last characters.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from keybroker.connect import claude, desktop, vscode
from keybroker.connect.organisation import DROP_INS, FOLDERS, LARGEST_FILE, NAME
from keybroker.connect.plan import Place
from keybroker.connect.tokens import SHELLS
from keybroker.credential import sha256
from keybroker.doctor.requests import ADDRESS, CREDENTIALS, HEADERS, USE, Held, Layer
from keybroker.errors import KeybrokerError
from keybroker.fields import looks_like_key
from keybroker.settings import Document, SettingsInvalid

TERMINAL = "this terminal"
TAIL = 20  # of a key, by which `.claude.json` knows what was declined
# Of a file of settings, beside env and apiKeyHelper.
OTHERS = ("forceLoginMethod", "forceLoginOrgUUID", "forceLoginGatewayUrl")
# Of an environment, beside credentials.
_MATTERS = re.compile(
    r"(?:ANTHROPIC|CLAUDE)_\w+|(?:HTTPS?|ALL|NO)_PROXY|NODE_EXTRA_CA_CERTS"
    r"|NODE_TLS_REJECT_UNAUTHORIZED|SSL_CERT_FILE",
    re.IGNORECASE,
)
_SYSTEMS = {"linux": "linux", "macos": "darwin", "windows": "win32"}
# What a session of a desktop is started with, and what shells read seldom, below HOME.
_SESSION = (
    *(".pam_environment", ".config/environment.d/*.conf"),
    *(".bash_login", ".zlogin", ".config/fish/conf.d/*.fish"),
)
_SETS = re.compile(
    r"^\s*(?:export\s+|set\s+(?:-\w+\s+|--\w+\s+)+|\$env:)?"
    r"(ANTHROPIC_\w+|CLAUDE_CODE_\w+)(?:\s*=\s*|\s+)(?:'([^']*)'|\"([^\"$`]*)\"|([^\s'\"$`;]*))"
)
_TERMINAL_ENV = "terminal.integrated.env."


@dataclass(frozen=True, slots=True)
class Mention:
    """A line of a shell's profile, or of what a session is started with, that sets a variable."""

    file: Path
    line: int
    variable: str
    value: str | None = field(repr=False)  # None: a credential, or worked out by the shell

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Desktop:
    """What Claude Desktop was told; see its reference for the names."""

    place: str
    values: Mapping[str, str] = field(repr=False)
    has_key: bool = False


@dataclass(frozen=True, slots=True)
class Origins:
    """
    All of it.

    Attributes:
        settings: Files of Claude Code's that are there, the higher before the lower.
        process: This terminal.
        editors: VS Code and its like, each with what it starts Claude Code with.
        terminals: Settings of editors that set variables for their terminals.
        mentions: Of shells' profiles, direnv and what a session is started with.
        login: One at Anthropic is saved.
        gateway: The host of a gateway to which somebody signed in; empty: none.
        is_new: The first run is still to come.
        declined: Tails of keys that were declined.
    """

    settings: tuple[Layer, ...]
    process: Layer
    editors: tuple[Layer, ...] = ()
    terminals: tuple[Layer, ...] = ()
    desktop: Desktop | None = None
    mentions: tuple[Mention, ...] = ()
    login: bool = False
    gateway: str = ""
    is_new: bool = False
    declined: frozenset[str] = frozenset()
    models: Mapping[str, Any] = field(default_factory=dict)
    models_file: Path | None = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What counts for the command line, the higher before the lower."""
        return (*self.settings, self.process)


def collect(place: Place, root: Path = Path("/")) -> Origins:
    """
    Look everywhere. Files that are not there, or cannot be read, have nothing.

    Args:
        root: Where the file system begins.
    """
    folder = claude.configuration_folder(place)
    state = _state(place, folder)
    saved = _json(folder / ".credentials.json")
    session = saved.get("enterpriseGateway")
    url = session.get("url") if isinstance(session, dict) else None
    models_file = folder / "cache/gateway-models.json"
    editors, terminals = [], []
    for file in vscode.installed(place):
        starts, terminal = _editor(file)
        if starts is not None:
            editors.append(starts)
        if terminal is not None:
            terminals.append(terminal)
    responses = state.get("customApiKeyResponses")
    rejected = responses.get("rejected") if isinstance(responses, dict) else None
    rejected = rejected if isinstance(rejected, list) else []
    return Origins(
        tuple(_settings(place, root, folder)),
        layer("process", TERMINAL, place.environment),
        tuple(editors),
        tuple(terminals),
        _desktop(place, root),
        tuple(_mentions(place)),
        login=claude.has_login(place),
        gateway=(urlsplit(url).netloc or "?") if isinstance(url, str) else "",
        is_new=state.get("hasCompletedOnboarding") is not True,
        declined=frozenset(_digest(one) for one in rejected if isinstance(one, str)),
        models=_json(models_file),
        models_file=models_file,
    )


def layer(scope: str, place: str, values: Mapping[str, Any], **more: Any) -> Layer:
    """Make a layer of an environment; credentials become stand-ins."""
    env, credentials = {}, {}
    headers: tuple[str, ...] | None = None
    for name, value in values.items():
        if value is None or isinstance(value, dict | list):
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        if name in CREDENTIALS:
            credentials[name] = Held(_digest(text), _digest(text[-TAIL:])) if text.strip() else None
        elif name == HEADERS:
            lines = text.splitlines()
            headers = tuple(one.partition(":")[0].strip().lower() for one in lines if one.strip())
        elif _MATTERS.fullmatch(name):
            env[name] = text
    return Layer(scope, place, env, credentials, headers, **more)


def shown(address: str) -> str:
    """Return an address that may be shown: what may be a key or a password is not."""
    text = address.strip()
    if (
        any(map(looks_like_key, text.split("/")))
        or "@" in text
        or not text.isprintable()
        or len(text) > 200
    ):
        return "…"
    return text.partition("?")[0].partition("#")[0]


def _digest(text: str) -> str:
    return sha256(text.encode(errors="surrogateescape"))[:8]


def _settings(place: Place, root: Path, folder: Path) -> Iterator[Layer]:
    """Yield what each file of settings has, the higher before the lower."""
    managed = []
    for one in FOLDERS[_SYSTEMS[place.system]]:
        managed.append(root / one / NAME)
        with suppress(OSError):
            managed += sorted(
                path
                for path in (root / one / DROP_INS).iterdir()
                if path.suffix == ".json" and not path.name.startswith(".")
            )
    for path in (folder / "remote-settings.json", *reversed(managed)):
        yield from _file("managed", path)
    if place.folder.resolve() != place.home.resolve():
        for scope, name in (("local", "settings.local.json"), ("project", "settings.json")):
            files = dict.fromkeys((place.folder, _project(place.folder)))
            found = [one / ".claude" / name for one in files]
            present = next((one for one in found if one.is_file()), None)
            if present is not None and present.resolve() != (folder / name).resolve():
                yield from _file(scope, present)
    yield from _file("user", folder / "settings.json")


def _project(folder: Path) -> Path:
    """Return the folder of the repository that a folder is in, or the same."""
    return next((one for one in (folder, *folder.parents) if (one / ".git").exists()), folder)


def _file(scope: str, path: Path) -> Iterator[Layer]:
    """Yield what Claude Code makes of a file: strict JSON, or nothing of it."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE)
        value = json.loads(data.decode("utf-8-sig").strip() or "{}")
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        yield Layer(scope, str(path), problem=f"cannot be read ({error.strerror})")
        return
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        yield Layer(scope, str(path), problem=f"is not strict JSON ({where})")
        return
    except (ValueError, RecursionError):
        yield Layer(scope, str(path), problem="is not JSON in UTF-8")
        return
    env = value.get("env", {}) if isinstance(value, dict) else None
    helper = value.get("apiKeyHelper") if isinstance(value, dict) else None
    if not isinstance(env, dict) or not isinstance(helper, str | None):
        yield Layer(scope, str(path), problem="has something else where an object or text belongs")
        return
    others = {key: value[key] for key in OTHERS if value.get(key) not in (None, "", [])}
    yield layer(scope, str(path), env, helper=helper, others=others)


def _state(place: Place, folder: Path) -> dict[str, Any]:
    """Return what Claude Code keeps of its own beside its settings."""
    for file in (folder / ".claude.json", place.home / ".claude.json"):
        if (found := _json(file)) or file.is_file():
            return found
    return {}


def _json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_bytes()[: LARGEST_FILE * 16])
        if isinstance(found, dict):
            return found
    return {}


def _editor(file: Path) -> tuple[Layer | None, Layer | None]:
    """Return what an editor starts Claude Code with, and what its terminals have."""
    try:
        document = Document(file.read_bytes()[:LARGEST_FILE].decode())
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, SettingsInvalid):
        return Layer("process", str(file), problem="cannot be read as JSON with comments"), None
    listed = document.value.get(vscode.VARIABLES_KEY)
    values = {
        str(one["name"]): one.get("value", "")
        for one in (listed if isinstance(listed, list) else [])
        if isinstance(one, dict) and "name" in one
    }
    terminal = {}
    for key, value in document.value.items():
        if key.startswith(_TERMINAL_ENV) and isinstance(value, dict):
            terminal.update(value)
    ours = any(key.startswith("claudeCode.") for key in document.value)
    return (
        layer("process", str(file), values) if ours else None,
        layer("process", str(file), terminal) if terminal else None,
    )


def _desktop(place: Place, root: Path) -> Desktop | None:
    """Return what Claude Desktop is told: by the organisation, else by its own library."""
    managed = root / desktop.LINUX_FILE.lstrip("/")
    found, where = _json(managed), str(managed)
    if place.system != "linux" or not found:
        try:
            library = desktop.own_library(place)
        except KeybrokerError:
            return None
        applied = _json(library / "_meta.json").get("appliedId")
        if not isinstance(applied, str) or "/" in applied:
            return None
        file = library / f"{applied}.json"
        found, where = _json(file), str(file)
    values = {
        key: value
        for key, value in found.items()
        if isinstance(value, str) and key != "inferenceGatewayApiKey"
    }
    return Desktop(where, values, bool(found.get("inferenceGatewayApiKey")))


def _mentions(place: Place) -> Iterator[Mention]:
    """Yield the lines of shells' profiles, of direnv and of a session's variables that matter."""
    zsh = place.environment.get("ZDOTDIR", "")
    files = [
        Path(zsh if name.startswith(".z") and zsh.startswith("/") else place.home) / name
        for name in SHELLS
    ]
    for pattern in _SESSION:
        files += sorted(place.home.glob(pattern))
    files += [one / ".envrc" for one in (place.folder, *place.folder.parents)]
    for file in dict.fromkeys(files):
        try:
            text = file.read_bytes()[:LARGEST_FILE].decode(errors="replace")
        except (OSError, ValueError):
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if (found := _SETS.match(line)) is None:
                continue
            name, value = found[1], found[2] or found[3] or found[4] or None
            if name in CREDENTIALS:
                if value is not None or "$" in line or "`" in line:  # or it is set to nothing
                    yield Mention(file, number, name, None)
            elif name == ADDRESS or name.startswith(USE):
                yield Mention(file, number, name, value)
