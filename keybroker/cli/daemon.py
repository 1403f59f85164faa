"""daemon, reload: the resident process, from the command line."""

import os
import signal
import time
from pathlib import Path

import click

from keybroker import listening, paths, services, starting, wire
from keybroker.cli.base import of_system, print_json
from keybroker.cli.work import configuration, daemon_socket, state
from keybroker.errors import NobodyAnswers

ANSWER_SECONDS = 3.0
STOP_SECONDS = 10.0
RELOAD_SECONDS = 5.0


@click.command("daemon")
@click.option(
    "--log", type=click.Choice(["text", "json"]), default="text", help="The form of its log."
)
@click.option("--stop", is_flag=True, help="End the one that runs.")
def daemon_command(log: str, stop: bool) -> None:
    """Run the daemon: keys are ready before they are asked for, and replaced ahead of their end.

    It stays in the foreground and writes to stderr. `keybroker get` starts one in the background
    when none runs; what that one says is in daemon.log beside the journal.
    """
    if stop:
        print(end_daemon())
        return
    if "LISTEN_FDS" not in os.environ:  # else whoever waits is told so, too
        configuration()  # what is wrong with it is said here, with file and line
    socket = paths.socket_path(os.environ)
    paths.private_directory(socket.parent)
    arguments = starting.command(state(), socket, log)
    os.execv(arguments[0], arguments)


@click.command("reload")
@of_system
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def reload_command(as_json: bool) -> None:
    """Have the daemon read its configuration again, and try again what failed.

    It does so by itself when the file changes. A bad configuration is refused, and the one
    before it stays in use.
    """
    socket = daemon_socket()
    if socket is None:
        raise NobodyAnswers("no daemon runs", hint="the next `keybroker get` starts one")
    found = wire.control(socket, "reload", RELOAD_SECONDS)
    if as_json:
        print_json(found)
    else:
        count = len(found["profiles"])
        print(f"reloaded: {count} profile{'' if count == 1 else 's'}")


def end_daemon() -> str:
    """End the running daemon, whatever its configuration; say what became of it."""
    service = services.installed(os.environ)
    stopped = service is not None and service.stop()
    found = paths.owner(state())
    if found is None or not listening.answers(str(found.socket)):
        return "stopped" if stopped else "no daemon runs"
    try:
        wire.control(found.socket, "stop", ANSWER_SECONDS)
        until = time.monotonic() + STOP_SECONDS
        while not paths.owner_lock_is_free(state()):
            if time.monotonic() > until:
                raise NobodyAnswers(f"the daemon at {found.socket} does not end")
            time.sleep(0.02)
    except NobodyAnswers:
        if not _is_daemon(found.pid):
            raise
        os.kill(found.pid, signal.SIGKILL)  # nothing is lost by it: what was under way is looked up
        return f"killed process {found.pid}, which did not answer"
    return "stopped"


def _is_daemon(pid: int) -> bool:
    """Say whether that process is what we start as a daemon (Linux)."""
    try:
        return b"keybroker.listening" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
