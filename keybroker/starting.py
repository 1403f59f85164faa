"""How the daemon is run: its command line, its environment, and in the background."""

import os
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from keybroker import listening, paths, vault
from keybroker.errors import NobodyAnswers
from keybroker.log import LARGEST
from keybroker.pool import PASSED_ON

LOG = "daemon.log"
START_SECONDS = 5.0
# `-S`: site packages are of no use to it, and what they run at every start costs memory for good.
_BOOT = "import sys; sys.path.append(sys.argv.pop(1)); from keybroker.listening import main; main()"
# With the configuration that it would read: one that is bad stays unused until it is mended.
_LOADS = (
    "import os, sys; sys.path.append(sys.argv[1]); import keybroker.listening, keybroker.daemon;"
    "from keybroker import config, paths; config.load(paths.config_files(os.environ))"
)
# Beside what a worker may have: where files are, and what a [vault] table leaves out.
_OURS = ("KEYBROKER_CONFIG", "XDG_CONFIG_HOME", "XDG_STATE_HOME", *vault.VARIABLES)


def command(state: Path, socket: Path, form: str) -> list[str]:
    """Return the command line of a daemon; no secret is in it."""
    package = str(Path(__file__).parent.parent)
    return [sys.executable, "-IS", "-c", _BOOT, package, str(state), str(socket), form]


def try_out(environment: Mapping[str, str]) -> int:
    """
    Start a process that ends with 0 if the version that is installed now can be loaded.

    Returns:
        Its pid.

    Raises:
        OSError: The interpreter cannot be started.
    """
    package = str(Path(__file__).parent.parent)
    arguments = [sys.executable, "-IS", "-c", _LOADS, package]
    nothing = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
    return os.posix_spawn(arguments[0], arguments, dict(environment), file_actions=nothing)


def scrubbed(environment: Mapping[str, str], named: Iterable[str]) -> dict[str, str]:
    """Return the variables that a daemon in the background keeps: those that it has a use for."""
    wanted = {*PASSED_ON, *_OURS, *named}
    kept = {name: value for name, value in environment.items() if name in wanted}
    if "KEYBROKER_CONFIG" in kept:  # it runs in another folder
        kept["KEYBROKER_CONFIG"] = paths.named_config(environment)
    return kept


def start(state: Path, socket: Path, environment: Mapping[str, str]) -> int:
    """
    Start a daemon that outlives us; return its pid. See `wait`.

    Raises:
        OSError: It cannot be started.
    """
    log = _open_log(state)
    arguments = command(state, socket, "text")
    pid = os.fork()
    if pid:
        os.close(log)
        return pid
    try:  # from here on in the child, which never returns
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for number, to in ((nothing, 0), (nothing, 1), (log, 2)):
            os.dup2(number, to)
        os.closerange(3, 256)
        os.chdir("/")
        os.execve(arguments[0], arguments, dict(environment))
    finally:
        os._exit(127)


def wait(pid: int, socket: Path) -> None:
    """
    Wait until a daemon listens.

    Raises:
        NobodyAnswers: It ended, or took too long; its log says why.
    """
    until = time.monotonic() + START_SECONDS
    while not listening.answers(str(socket)):
        with suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] and not listening.answers(str(socket)):
                raise NobodyAnswers("the daemon ended as soon as it was started")
        if time.monotonic() > until:
            raise NobodyAnswers("the daemon was started and does not answer")
        time.sleep(0.005)


def log_file(state: Path) -> Path:
    """Return where a daemon in the background writes what it has to say."""
    return state / LOG


def _open_log(state: Path) -> int:
    file = log_file(paths.private_directory(state))
    with suppress(OSError):
        if file.stat().st_size > LARGEST:
            file.replace(file.with_name(f"{LOG}.1"))
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(file, flags, 0o600)
