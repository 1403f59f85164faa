"""
The Python API: a key for a program that talks to the gateway itself.

    from keybroker import client

    headers = {"authorization": f"Bearer {client.get('work').reveal()}"}

Ask anew before each request, or at least every minute: an answer takes a fraction of a
millisecond, and a key that was replaced is revoked one hold later. Nothing beyond the standard
library is loaded while a daemon answers; without one `keybroker get` is run, which starts it.
"""

import os
import sys
from contextlib import suppress
from typing import Any

from keybroker import asking
from keybroker.credential import Secret
from keybroker.errors import (
    ConfigError,
    KeybrokerError,
    NobodyAnswers,
    NotReady,
    SourceDenied,
)

GET_SECONDS = 60.0
_BY_STATUS: dict[int, type[KeybrokerError]] = {
    69: NobodyAnswers,
    75: NotReady,
    77: SourceDenied,
    78: ConfigError,
}


def get(profile: str | None = None) -> Secret:
    """
    Return the current key of a profile; `reveal()` gives its text.

    Args:
        profile: Its name; None: the only one, or the default one.

    Raises:
        NotReady: There is no valid key now: try later.
        SourceDenied: The gateway or the source refused, or a login is needed.
        NobodyAnswers: No daemon answers and none could be started.
        ConfigError: There is no such profile, or the configuration is wrong.
        ValueError: No profile can have this name.
    """
    name = (profile or "-").encode()
    if name != b"-" and not asking.is_name(name):
        raise ValueError("not a profile's name")
    request = asking.line(name, os.getpid(), b"0", b"")
    environment, reply = dict(os.environb), None
    if asking.OTHER not in environment:
        with suppress(OSError):
            reply = asking.read_reply(asking.ask(asking.find(environment), request))
    status, text = reply or _by_command(profile)
    if status != 0:
        message = text.removeprefix("keybroker: ")
        raise _BY_STATUS.get(status, KeybrokerError)(message)
    return Secret(text)


def environment(profile: str | None = None) -> dict[str, str]:
    """
    Return the variables that Claude Code should have for a profile: never a key.

    These are `ANTHROPIC_BASE_URL` and `CLAUDE_CODE_API_KEY_HELPER_TTL_MS`, in milliseconds.

    Raises:
        ConfigError: There is no such profile, or the configuration is wrong.
    """
    from keybroker import config, guidance, paths

    loaded = config.load(paths.config_files(os.environ))
    return guidance.environment(loaded.profile(profile or None))


def agent_options(profile: str | None = None) -> dict[str, Any]:
    """
    Return what the Agent SDK wants where it loads no settings of the user's: never a key.

        ClaudeAgentOptions(setting_sources=[], **client.agent_options("work"))

    These are `settings`, with the helper and the address, and `env`, which takes other keys out
    of the way. The SDK adds `env` to the environment in Python; in TypeScript it is all of it.

    Raises:
        ConfigError: There is no such profile, or the configuration is wrong.
    """
    from keybroker import config, paths
    from keybroker.connect.agent_sdk import options_of
    from keybroker.connect.plan import Place

    loaded = config.load(paths.config_files(os.environ))
    return options_of(loaded.profile(profile or None), Place.here())


def _by_command(profile: str | None) -> tuple[int, str]:
    """Run `keybroker get`; return its exit status and what it printed."""
    import subprocess

    try:
        done = subprocess.run(
            [sys.executable, *asking.SLOW, *([profile] if profile else [])],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GET_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return 69, "keybroker get could not be run"
    return done.returncode, (done.stderr if done.returncode else done.stdout).strip()
