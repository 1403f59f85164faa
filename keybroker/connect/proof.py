"""Try the very line that was written, as the client runs it."""

import json
import os
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from keybroker.credential import Secret
from keybroker.errors import KeybrokerError, NotReady

SECONDS = 20.0
FILE_SECONDS = 10.0


def prove(line: str, settings: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """
    Run a helper's line through `/bin/sh -c` with the settings' variables; return a fingerprint.

    As with Claude Code it has the whole environment, and its input never ends. A daemon that it
    starts stays, so it must have what sources take from there.

    Raises:
        NotReady: It printed no key; the message is what it said, one line.
    """
    reading, writing = os.pipe()
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", line],
            stdin=reading,
            capture_output=True,
            timeout=SECONDS,
            env={**environment, **settings},
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
    with suppress(KeybrokerError, ValueError, TypeError, KeyError):
        if text.endswith("\n") and "\n" not in text[:-1]:
            token = json.loads(text)["token"] if text.startswith("{") else text[:-1]
            return Secret(token).fingerprint
    raise NotReady("the helper printed something that is no key")


def prove_file(file: Path, fingerprint: str) -> None:
    """
    Wait until a file has the key that the helper printed.

    Raises:
        NotReady: It does not come to have it.
    """
    until = time.monotonic() + FILE_SECONDS
    while time.monotonic() < until:
        with suppress(OSError, KeybrokerError, ValueError):
            if Secret(file.read_text("ascii")).fingerprint == fingerprint:
                return
        time.sleep(0.05)
    raise NotReady(f"{file}: does not have the key", hint="keybroker status")
