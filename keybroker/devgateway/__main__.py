"""
Run the development gateway until it is told to stop.

    KEYBROKER_DEVGATEWAY_MASTER_KEY=sk-... python -m keybroker.devgateway --port 4000
    python -m keybroker.devgateway --master-key-file ./master-key

The first line on stdout is its URL; stderr has the lines for keybroker's configuration. The master
key is never printed: it is read from the environment, or from the file, which is created with a
new one if it is not there.
"""

from __future__ import annotations

import argparse
import errno
import os
import secrets
import shlex
import signal
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from keybroker.devgateway.gateway import DevGateway

VARIABLE = "KEYBROKER_DEVGATEWAY_MASTER_KEY"


def master_key(path: Path | None) -> str:
    """
    Take the master key from the environment, else from a private file, else make file and key.

    Raises:
        ValueError: There is neither, or the file cannot be used, is empty or others can read it.
    """
    if key := os.environ.pop(VARIABLE, ""):
        return key
    if path is None:
        raise ValueError(f"no master key\nhint: set {VARIABLE} or give --master-key-file")
    try:
        return _from_file(path)
    except FileNotFoundError:
        folder = path.parent
        raise ValueError(f"{folder} does not exist\nhint: mkdir -p {folder}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be used ({error.strerror})") from None


def _from_file(path: Path) -> str:
    try:
        created = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        with path.open() as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ValueError(f"others can read {path}\nhint: chmod 600 {path}") from None
            key = file.readline().strip()
        if not key:
            raise ValueError(f"{path} is empty\nhint: rm {path}") from None
        return key
    key = f"sk-{secrets.token_urlsafe(24)}"
    with open(created, "w") as file:
        file.write(f"{key}\n")
    return key


def configuration(url: str, file: Path | None) -> str:
    """Return what keybroker's configuration says of this gateway: of the profile, of its source."""
    kind, value = ("env", VARIABLE) if file is None else ("file", str(file.absolute()))
    admin = shlex.quote(f"{kind}:{value}")
    return (
        f'base_url = "{url}"\nadmin = {{ {kind} = "{value}" }}\n'
        f"or type: keybroker init --base-url {url} --admin {admin} --source litellm\n"
    )


def _not_listening(port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use\nhint: name another, or leave --port out"
    return f"port {port} cannot be listened at ({error.strerror})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(
        "python -m keybroker.devgateway", description="a small LLM gateway"
    )
    ports = range(1 << 16)
    text = "0 lets the kernel choose"
    parser.add_argument("--port", type=int, default=0, choices=ports, metavar="PORT", help=text)
    parser.add_argument("--master-key-file", type=Path, help="created with mode 0600 if missing")
    given = parser.parse_args(arguments)
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # before any thread, so that all inherit it
    file = given.master_key_file
    if os.environ.get(VARIABLE):
        file = None
    try:
        gateway = DevGateway(master_key(file), given.port)
        gateway.start()
    except (OSError, ValueError) as error:
        text = _not_listening(given.port, error) if isinstance(error, OSError) else str(error)
        sys.stderr.write(f"devgateway: {text}\n")
        return 78
    with gateway:
        sys.stderr.write(configuration(gateway.url, file))
        sys.stdout.write(f"{gateway.url}\n")
        sys.stdout.flush()
        signal.sigwait(ends)
    return 0


if __name__ == "__main__":
    sys.exit(main())
