"""Words for people; one module a group of commands, imported when it is typed."""

import os
import sys


def main() -> None:
    """The console script: errors become one line on stderr and a documented exit status."""
    arguments = sys.argv[1:]
    if "KEYBROKER_WORKER" in os.environ:  # as `asking` has it; nothing is loaded for this
        sys.exit(_refuse_ourselves())
    if arguments[:1] == ["get"] and not any(word.startswith("-") for word in arguments):
        status = _ask_daemon(arguments[1:])
        if status is not None:
            sys.exit(status)
    if arguments[:1] == ["statusline"] and len(arguments) < 3 and "-" not in arguments[-1][:1]:
        sys.exit(_show_line(arguments[1:]))
    from keybroker.cli.base import run

    sys.exit(run(arguments))


def _refuse_ourselves() -> int:
    """Say that whoever would answer is who waits for us: it is AWS's credential_process."""
    text = "keybroker: was asked by keybroker itself; see credential_process in ~/.aws/config"
    os.write(2, f"{text}\n".encode())
    return 78


def _show_line(profile: list[str]) -> int:
    """Print the line for Claude Code's status line, in as small a fraction of it."""
    from keybroker import glance

    return glance.show(profile[0] if profile else "", dict(os.environb))


def _ask_daemon(profile: list[str]) -> int | None:
    """Print a key that is ready, in a fraction of what the commands take to load."""
    from keybroker import asking

    name = profile[0].encode("utf-8", "replace") if profile else b"-"
    environment = dict(os.environb)
    named = len(profile) < 2 and (name == b"-" or asking.is_name(name))
    if not named or asking.OTHER in environment:
        return None
    try:
        reply = asking.read_reply(
            asking.ask(asking.find(environment), asking.request(name, environment))
        )
    except OSError:
        return None
    if reply is None or reply[0] != 0:
        return None
    return asking.put(f"{reply[1]}\n".encode())
