"""What a service needs to do what the daemon does in a terminal: files to write, variables.

A service has none of a shell's environment, and as hardened as its unit is, it writes nowhere but
where it is let.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keybroker import aws, starting, vault
from keybroker.cache import CREDENTIAL
from keybroker.config import Config
from keybroker.connect.record import Record, file_of
from keybroker.errors import ConfigError
from keybroker.fields import LOCAL
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
_OF_ITS_UNIT = frozenset({"KEYBROKER_CONFIG", "XDG_CONFIG_HOME", "XDG_STATE_HOME"})
_SECRET = re.compile(r"(SECRET|TOKEN|PASSW|API_?KEY|ACCESS_?KEY)(?!.*_FILE$)")  # in a name
_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")  # a proxy's


@dataclass(frozen=True, slots=True)
class Needs:
    """
    What the configured profiles need of a service.

    Attributes:
        writable: Folders; one that is absent is none of it.
        environment: Variables that are no secrets.
        programs: It runs programs that somebody else wrote.
        credentials: Names of what the service manager is to hand over.
        seals: It needs something to seal its cache with.
    """

    writable: tuple[Path, ...]
    environment: Mapping[str, str]
    programs: bool
    credentials: tuple[str, ...]
    seals: bool


def needs(config: Config, environment: Mapping[str, str], *, system: bool = False) -> Needs:
    """
    Find out what the configured profiles need.

    Args:
        system: Of a service of the whole system, which is no user's.

    Raises:
        ConfigError: They need what a service does not have.
    """
    found = list(_references(config))
    _check_variables(config, environment, {value for kind, value in found if kind == "env"})
    for kind, value in found:
        if system and kind == "keyring":
            raise ConfigError(
                f"reference keyring:{value}: a shared host's daemon has no keyring",
                hint=f'{{ credential = "{value}" }}: docs/service.md',
            )
        if system and value.startswith("~/"):
            raise ConfigError(
                f"reference {kind}:{value}: a shared host's daemon has no HOME",
                hint="{ credential = ... }: docs/service.md",
            )
    without = _ITS_OWN | _OF_ITS_UNIT if system else _ITS_OWN
    named = {name for names in variables(config).values() for name in names}
    kept = starting.scrubbed(environment, named).items()
    folders = [Path(one).expanduser() for one in config.writable]
    if not system:
        folders = [*_folders(config, environment), *folders]
    return Needs(
        tuple(dict.fromkeys(folders)),
        {name: value for name, value in sorted(kept) if name not in without},
        bool(config.hooks)
        or any(profile.type == "command" for profile in config.profiles.values())
        or any(kind == "command" for kind, _ in found),
        tuple(sorted({value for kind, value in found if kind == "credential"} - {CREDENTIAL})),
        config.cache_key == "auto",
    )


def _check_variables(config: Config, environment: Mapping[str, str], references: set[str]) -> None:
    """See that no secret is in a variable; what we do not know may be one."""
    named = references.union(*variables(config).values())
    known = {*starting.scrubbed(environment, ()), *aws.VARIABLES, *vault.VARIABLES}
    secret = [
        name
        for name, value in sorted(starting.scrubbed(environment, named).items())
        if name not in known - references or _SECRET.search(name) or _PASSWORD.search(value)
    ]
    if secret:
        raise ConfigError(
            f"{', '.join(secret)}: a service does not see what a shell exports, and no unit may "
            "hold a secret",
            hint="keep it in the keyring or a file; what is no secret: a drop-in of your own",
        )


def _references(config: Config) -> Iterator[tuple[str, str]]:
    """Yield what secrets on this machine are referred to, wherever in the configuration."""
    for profile in config.profiles.values():
        yield from _below(profile.raw)
    for sign_in in config.logins.values():
        yield from _below(json.loads(sign_in.text))


def _below(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        if len(value) == 1 and (kind := next(iter(value))) in LOCAL:
            named = value[kind]
            yield kind, named if isinstance(named, str) else ""
        for one in value.values():
            yield from _below(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _below(one)


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
    if any(one.aws for profile in config.profiles.values() for one in profile.asked):
        yield from (home / ".aws" / name for name in ("sso/cache", "cli/cache", "login/cache"))


def followed(state: Path) -> list[str]:
    """Return the settings files whose TTL the daemon mends."""
    record = Record.read(state / CONNECTIONS)
    return [str(file_of(name)) for name, entry in record.files.items() if entry.follow]
