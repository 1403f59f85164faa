"""
run --host, --port: a gateway that checks no key, such as OGX, without any configuration.

It stands in for `ogx connect claude`. There is no key: a placeholder is sent, and no daemon runs.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence

import click

from keybroker import foreign, guidance
from keybroker.cli.base import Before
from keybroker.cli.models import host, listed, mapping
from keybroker.config import Profile, read_profile
from keybroker.connect import inline
from keybroker.connect.plan import Place
from keybroker.credential import Secret
from keybroker.document import Where
from keybroker.errors import ConfigError, SourceDenied, SourceUnavailable
from keybroker.foreground import NoProgramError, Program, find
from keybroker.tiers import is_listed

HOST, PORT = "localhost", "8321"
PORT_VARIABLE = "OGX_PORT"
PLACEHOLDER = "ogx"
TOKEN = "ANTHROPIC_AUTH_TOKEN"  # noqa: S105
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252})")
_SIX = re.compile(r"\[?[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*\]?")
INSTALL = "install Claude Code, as https://code.claude.com/docs/en/setup says; then try again"


def profile_at(name: str | None, port: int | None) -> Profile:
    """
    Return a profile of a gateway that checks no key; no file has it.

    Raises:
        ConfigError: That is no host, or OGX_PORT is no port.
    """
    text = str(port or os.environ.get(PORT_VARIABLE) or PORT)
    if not (text.isascii() and text.isdigit() and 0 < int(text[:6]) < 65_536):
        raise ConfigError(f"{PORT_VARIABLE}: expected a port", hint="--port 8321")
    name = name or HOST
    if _SIX.fullmatch(name):
        name = f"[{name.strip('[]')}]"
    elif not _NAME.fullmatch(name):
        raise ConfigError("--host: expected a host's name or address", hint="--host localhost")
    raw = {
        "base_url": f"http://{name}:{text}",
        "source": {"type": "static", "placeholder": PLACEHOLDER},
    }
    return read_profile("ogx", raw, Where({}, "--host"))


def variables_at(
    profile: Profile, models: Sequence[str], flags: Mapping[str, str | None]
) -> dict[str, str]:
    """
    Ask what is listed there; return what a client needs to use it.

    Raises:
        SourceError: Nobody is there, or nothing is listed.
        ConfigError: A model that was asked for is not.
    """
    try:
        found = listed(profile, Secret(PLACEHOLDER))
    except SourceUnavailable as error:
        raise SourceUnavailable(
            error.message, hint="is it running? ogx run starter; see --host and --port"
        ) from None
    except SourceDenied as error:  # there is no profile, of which status could say anything
        raise SourceDenied(
            error.message, hint=f"it checks keys: keybroker init --base-url {profile.base_url}"
        ) from None
    chosen = mapping(profile, found, models[0] if models else None, flags)
    for one in models[1:]:
        if not is_listed(one, [model.id for model in found]):
            mapping(profile, found, one)  # says so
    return {
        "ANTHROPIC_BASE_URL": profile.base_url,
        TOKEN: PLACEHOLDER,
        **{guidance.VARIABLES[tier]: model for tier, model in chosen.items()},
    }


def find_program(word: str) -> str:
    """
    Return the file of a program; of Claude Code it is said where it comes from.

    Raises:
        NoProgramError, NotRunnableError: As `foreground.find`.
    """
    try:
        return find(word)
    except NoProgramError as error:
        if os.path.basename(word) == inline.NAME:
            raise NoProgramError(error.message, hint=INSTALL) from None
        raise


def launch_at(
    profile: Profile,
    file: str,
    words: Sequence[str],
    variables: Mapping[str, str],
    before: Before,
    *,
    keep: Collection[str] = (),
) -> int:
    """
    Run a program that is to use this gateway; return its status as wait(2) has it.

    Args:
        file: Where the program is.
        words: The program and its arguments.
        variables: As `variables_at` has them.
        keep: Foreign variables that it keeps.
    """
    environment = {**foreign.without(os.environ, keep), **variables}
    arguments = list(words[1:])
    if os.path.basename(words[0]) == inline.NAME:
        ours = inline.without_helper(profile, Place.here(), variables)
        arguments = inline.told(arguments, ours)
    program = Program(
        file, [words[0], *arguments], environment, umask=before.umask, core=before.core
    )
    program.wait()
    assert program.status is not None, "it was waited for"
    return program.status


def refuse_limits(given: Mapping[str, object]) -> None:
    """Refuse options that are for a key, which there is not."""
    for option, value in given.items():
        if value:
            raise click.UsageError(f"{option} is for a profile's key; --host and --port have none")


def note(profile: Profile, variables: Mapping[str, str]) -> str:
    """Say which models were chosen."""
    names = {guidance.VARIABLES[tier]: tier for tier in ("haiku", "sonnet", "opus")}
    text = ", ".join(f"{names[name]} {value}" for name, value in variables.items() if name in names)
    return f"{host(profile)}: {text}"
