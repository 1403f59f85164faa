"""daemon, reload: the resident process, from the command line."""

import os
import time

import click

from keybroker import listening, paths, starting, wire
from keybroker.cli.base import print_json
from keybroker.cli.work import configuration, daemon_socket, state
from keybroker.errors import NobodyAnswers

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
        print("stopped" if _end() else "no daemon runs")
        return
    configuration()  # what is wrong with it is said here, with file and line
    socket = paths.socket_path(os.environ)
    paths.private_directory(socket.parent)
    arguments = starting.command(state(), socket, log)
    os.execv(arguments[0], arguments)


@click.command("reload")
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
        print(f"reloaded: {len(found['profiles'])} profiles")


def _end() -> bool:
    """End the running daemon and wait for it; False if none runs."""
    socket = daemon_socket()
    if socket is None:
        return False
    wire.control(socket, "stop", STOP_SECONDS)
    until = time.monotonic() + STOP_SECONDS
    while listening.answers(str(socket)) or not paths.owner_lock_is_free(state()):
        if time.monotonic() > until:
            raise NobodyAnswers(f"the daemon at {socket} does not end")
        time.sleep(0.02)
    return True
