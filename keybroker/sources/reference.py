"""Read a secret from where a reference says it is."""

import os
import stat
from collections.abc import Callable, Mapping

from keybroker.credential import Reference, Secret
from keybroker.errors import ConfigError, KeybrokerError, SourceDenied, SourceUnavailable

LARGEST_FILE = 1 << 16
KEYRING = ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")  # for a program that asks one
Reader = Callable[[Reference], Secret]


def resolve(
    reference: Reference,
    environment: Mapping[str, str],
    elsewhere: Reader | None = None,
    *,
    open_to_others: bool = False,
) -> Secret:
    """
    Return the secret.

    Args:
        elsewhere: Reads what is in a Vault or at AWS, or the token of a login; only what was
            configured with one names such a place.
        open_to_others: A file may be: whoever put it there, such as Kubernetes, wants it so.

    Raises:
        ConfigError: The variable is not set, the file is not there or others can read it.
        SourceDenied: The keyring has no such entry.
        SourceUnavailable: The keyring is locked, the command failed: try again.
        SourceError: Vault or AWS said no, or nothing.
    """
    kind, value = reference.kind, reference.value
    try:
        if kind == "command" and isinstance(value, tuple):
            return Secret(_run(value, environment))
        name = str(value)
        if kind == "env":
            return Secret(_variable(name, environment))
        if kind == "file":
            return Secret(read_file(name, open_to_others=open_to_others))
        if kind == "credential":
            return Secret(_credential(name, environment))
        if kind in ("vault", "aws", "login"):
            assert elsewhere is not None, "what names such a place was configured with one"
            return elsewhere(reference)
        return Secret(_keyring(name))
    except ValueError as error:
        raise ConfigError(f"reference {reference}: what it names is {error}") from None


def _variable(name: str, environment: Mapping[str, str]) -> str:
    if name not in environment:
        hint = f"set {name}; a daemon that runs without it: keybroker daemon --stop"
        raise ConfigError(f"reference env:{name}: the variable is not set", hint=hint)
    return environment[name].strip()


def _credential(name: str, environment: Mapping[str, str]) -> str:
    """Return what systemd gave this service alone. See: systemd.exec(5), Credentials."""
    folder = environment.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise ConfigError(
            f"reference credential:{name}: nobody gave us any",
            hint="a service has them: keybroker service install",
        )
    try:
        with open(os.path.join(folder, name), "rb") as file:
            return file.read(LARGEST_FILE).decode("utf-8", "replace").strip()
    except OSError as error:
        raise ConfigError(
            f"reference credential:{name}: cannot be read ({error.strerror})",
            hint="put it there, then: keybroker service install",
        ) from None


def read_file(name: str, *, open_to_others: bool = False) -> str:
    """
    Return what a file holds that is our owner's alone.

    Raises:
        ConfigError: It is not there, or others can read it.
    """
    path = os.path.expanduser(name) if name.startswith("~/") else name
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(LARGEST_FILE)
    except OSError as error:
        raise ConfigError(
            f"reference file:{name}: cannot be read ({error.strerror})",
            hint=None if open_to_others else "put it there, in a file of mode 0600",
        ) from None
    if stat.S_ISREG(mode) and mode & 0o077 and not open_to_others:
        raise ConfigError(
            f"reference file:{name}: others can read it", hint=f"type: chmod 600 {name}"
        )
    return data.decode("utf-8", "replace").strip()


def _keyring(name: str) -> str:
    from keybroker import oskeyring

    try:
        found = oskeyring.read(name)
    except KeybrokerError as error:
        problem = error.message.removeprefix("keyring: ")
        raise SourceUnavailable(
            f"reference keyring:{name}: {problem}",
            hint=error.hint or "start a keyring, or use { file = … }",
        ) from None
    if found is None:
        raise SourceDenied(
            f"reference keyring:{name}: the keyring has no such entry",
            hint=f"store it: service keybroker, user name {name}; see docs/references.md",
        )
    return found.strip()


def _run(command: tuple[str, ...], environment: Mapping[str, str]) -> str:
    from keybroker.sources.command import ALWAYS_PASSED, run

    passed = (*ALWAYS_PASSED, *KEYRING)  # not the variables that other references name
    mine = {name: environment[name] for name in passed if name in environment}
    return run(command, mine, seconds=8.0).decode("utf-8", "replace").strip()
