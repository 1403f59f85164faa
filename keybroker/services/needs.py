"""What a service needs to do what the daemon does in a terminal: files to write, variables.

A service has none of a shell's environment, and as hardened as its unit is, it writes nowhere but
where it is let.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from keybroker import starting
from keybroker.config import Config
from keybroker.connect.record import Record, file_of
from keybroker.credential import Issuer, Reference
from keybroker.errors import ConfigError
from keybroker.paths import CONNECTIONS, state_directory
from keybroker.pool import variables
from keybroker.push import SettingsFiles
from keybroker.values import dataclass

# The service manager has them itself, or gives the service others.
_ITS_OWN = frozenset(
    {
        *("HOME", "USER", "LOGNAME", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"),
        *("CREDENTIALS_DIRECTORY", "TMPDIR"),
    }
)
_SECRET = re.compile(r"(SECRET|TOKEN|PASSW|API_?KEY|ACCESS_?KEY)(?!.*_FILE$)")  # in a name
_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")  # a proxy's


@dataclass(frozen=True, slots=True)
class Needs:
    """
    What one user's profiles need of a service.

    Attributes:
        writable: Folders; one that is absent is none of it.
        environment: Variables that are no secrets.
        programs: It runs programs that somebody else wrote.
    """

    writable: tuple[Path, ...]
    environment: Mapping[str, str]
    programs: bool


def needs(config: Config, environment: Mapping[str, str]) -> Needs:
    """
    Find out what the configured profiles need.

    Raises:
        ConfigError: A secret is in a variable, which no service sees.
    """
    secret = sorted(_secret_variables(config, environment))
    if secret:
        raise ConfigError(
            f"{', '.join(secret)}: a service does not see what a shell exports, and no unit may "
            "hold a secret",
            hint="keep it in the keyring or a file instead: docs/references.md",
        )
    named = {name for names in variables(config).values() for name in names}
    kept = starting.scrubbed(environment, named)
    return Needs(
        tuple(dict.fromkeys(_folders(config, environment))),
        {name: value for name, value in sorted(kept.items()) if name not in _ITS_OWN},
        any(_runs_programs(config)),
    )


def _secret_variables(config: Config, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the variables with a secret that a profile needs."""
    references = {str(one.value) for one in _references(config) if one.kind == "env"}
    named = references.union(*variables(config).values())
    for name, value in starting.scrubbed(environment, named).items():
        if name in references or _SECRET.search(name) or _PASSWORD.search(value):
            yield name


def _references(config: Config) -> Iterable[Reference]:
    for issuer in _asked(config):
        if issuer.admin is not None:
            yield issuer.admin


def _asked(config: Config) -> Iterator[Issuer]:
    for profile in config.profiles.values():
        yield from profile.asked


def _folders(config: Config, environment: Mapping[str, str]) -> Iterator[Path]:
    """Yield the folders that the daemon writes into, or sets the times of files in."""
    state = state_directory(environment)
    yield state
    files = SettingsFiles(state)
    files.load()
    home = Path(environment.get("HOME", "~")).expanduser()
    if any(profile.push for profile in config.profiles.values()):
        yield Path(environment.get("CLAUDE_CONFIG_DIR") or home / ".claude").absolute()
        yield from (Path(os.path.realpath(file)).parent for file in files.known())
    yield from (Path(os.path.realpath(file)).parent for file in followed(state))
    if any(one.aws for one in _asked(config)):
        yield from (home / ".aws" / name for name in ("sso/cache", "cli/cache", "login/cache"))
    yield from (Path(one).expanduser() for one in config.writable)


def followed(state: Path) -> list[str]:
    """Return the settings files whose TTL the daemon mends."""
    record = Record.read(state / CONNECTIONS)
    return [str(file_of(name)) for name, entry in record.files.items() if entry.follow]


def _runs_programs(config: Config) -> Iterator[bool]:
    yield bool(config.hooks)
    for profile in config.profiles.values():
        yield profile.type == "command"
    for reference in _references(config):
        yield reference.kind == "command"
    for sign_in in config.logins.values():
        yield "command" in sign_in.text
