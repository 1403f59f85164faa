"""Try the very line that was written, as the client runs it."""

import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress

from keybroker.credential import Secret
from keybroker.errors import KeybrokerError, NotReady

SECONDS = 20.0
PASSED_ON = ("HOME", "PATH", "USER", "LOGNAME", "LANG", "TMPDIR", "CLAUDE_CONFIG_DIR")


def prove(line: str, settings: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """
    Run a helper's line through `/bin/sh -c` with the settings' variables; return a fingerprint.

    Its input never ends, as Claude Code's does not.

    Raises:
        NotReady: It printed no key; the message is what it said, one line.
    """
    wanted = {
        name: value
        for name, value in environment.items()
        if name in PASSED_ON or name.startswith(("XDG_", "DBUS_"))
    }
    reading, writing = os.pipe()
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", line],
            stdin=reading,
            capture_output=True,
            timeout=SECONDS,
            env={**wanted, **settings},
        )
    except subprocess.TimeoutExpired:
        raise NotReady(f"the helper did not answer within {SECONDS:.0f} s") from None
    finally:
        os.close(reading)
        os.close(writing)
    said = done.stderr.decode(errors="replace").strip()[:300].removeprefix("keybroker: ")
    if done.returncode != 0:
        raise NotReady(f"the helper ended with status {done.returncode}: {said}")
    text = done.stdout.decode(errors="replace")
    with suppress(KeybrokerError, ValueError):
        if text.endswith("\n") and "\n" not in text[:-1]:
            return Secret(text[:-1]).fingerprint
    raise NotReady("the helper printed something that is no key")
