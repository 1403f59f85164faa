"""Claude Code told on its command line, by `--settings`: nothing is written, no key is in it.

What stands there beats a project's own files (tried with a project that names another address).
See: https://code.claude.com/docs/en/cli-reference
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keybroker import guidance
from keybroker.config import Profile
from keybroker.connect.claude import HELPER, pins
from keybroker.connect.line import helper_line
from keybroker.connect.plan import Place
from keybroker.errors import ConfigError

NAME = "claude"
OPTION = "--settings"


def settings(profile: Profile, place: Place, more: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings: helper and address together, and what keeps a project from both."""
    ours = {**guidance.environment(profile), **more}
    line = helper_line(profile.name, place.environment)
    return {HELPER: line, "env": {**ours, **pins(profile, place), **ours}}


def without_helper(profile: Profile, place: Place, variables: Mapping[str, str]) -> dict[str, Any]:
    """
    Return the settings for a gateway that checks no key, which is in the variables for show.

    A helper of the user's own is put out of work: its key is for another gateway.
    """
    return {HELPER: "", "env": {**variables, **pins(profile, place), **variables}}


def told(words: Sequence[str], ours: Mapping[str, Any]) -> list[str]:
    """
    Return the arguments of Claude Code with settings in them.

    It takes one `--settings` alone: the user's own are taken in, and ours are set over them.

    Raises:
        ConfigError: The user's cannot be read.
    """
    rest = list(words)
    for at, word in enumerate(rest):
        if word == "--":
            break
        name, equals, value = word.partition("=")
        if name != OPTION:
            continue
        if not equals:
            if at + 1 == len(rest):
                break  # it says itself that something is missing
            value = rest[at + 1]
        both = _over(_read(value), ours)
        return [*rest[:at], OPTION, json.dumps(both), *rest[at + (1 if equals else 2) :]]
    return [OPTION, json.dumps(ours), *rest]


def _over(theirs: dict[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    env = theirs.get("env", {})
    if not isinstance(env, dict):
        raise ConfigError(f"run: {OPTION}: env: expected an object")
    return {**theirs, **ours, "env": {**env, **ours["env"]}}


def _read(value: str) -> dict[str, Any]:
    """Read what somebody gave as settings: JSON, or the name of a file with it."""
    where = OPTION
    try:
        text = value
        if not value.lstrip().startswith("{"):
            where = f"{OPTION} {value}"
            text = Path(value).read_text(encoding="utf-8-sig")
        found = json.loads(text)
    except OSError as error:
        raise ConfigError(f"run: {where}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"run: {where}: is not JSON, and Claude Code would ignore it") from None
    if not isinstance(found, dict):
        raise ConfigError(f"run: {where}: expected an object")
    return found
