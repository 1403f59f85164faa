"""
A profile in one short line: how long its key lives, and what needs a person.

    work 11h 42m
    work 3m ! denied

It is printed for Claude Code's status line, again and again: little is loaded for it, what the
client writes to our stdin is not read, and nobody waits for longer than half a second.
"""

import posix
import time

from keybroker import asking

SECONDS = 0.5  # in all
LONGEST = 4096  # bytes of an answer
BEGIN, END = b'{"ok": "', b'"}'
NOBODY = "no daemon"
HANGS = "the daemon does not answer"
STRANGE = "the daemon is of another version"
UNKNOWN = "no such profile"


def run(words: list[str]) -> None:
    """Be the program of the settings line; it ends here."""
    path, name = [*words, "-", "-"][:2]
    place = b"" if path == "-" else path.encode("utf-8", "surrogateescape")
    try:
        posix._exit(show("" if name == "-" else name, posix.environ, place))
    except KeyboardInterrupt:
        posix._exit(130)


def show(name: str, environment: dict[bytes, bytes], path: bytes = b"") -> int:
    """
    Print the line; return the exit status, which is 0 if it could be written.

    Args:
        name: A profile's; empty: the only or default one.
        path: The daemon's socket; empty: the usual one.
    """
    profile = name.encode("utf-8", "replace")
    if profile and not asking.is_name(profile):
        return asking.put(f"keybroker ! {UNKNOWN}\n".encode())
    said = request(profile, b"" if path else environment.get(asking.OTHER, b""))
    problem = STRANGE
    try:
        text = read(_ask(path or asking.find(environment), said))
    except (FileNotFoundError, ConnectionRefusedError):
        text, problem = None, NOBODY
    except OSError:
        text, problem = None, HANGS
    if text is None:
        text = f"{name or 'keybroker'} ! {problem}"
    return asking.put(f"{text}\n".encode())


def request(profile: bytes, config: bytes = b"") -> bytes:
    """
    Write the request; JSON's own module would take longer to load than all of the rest.

    Args:
        config: The configuration that has to be the daemon's; empty: any.
    """
    plain = config[:1] == b"/" and not config.translate(None, asking.VISIBLE)
    if not plain or b'"' in config or b"\\" in config:
        return b'{"v": %d, "op": "glance", "profile": "%b"}\n' % (asking.VERSION, profile)
    form = b'{"v": %d, "op": "glance", "profile": "%b", "config": "%b"}\n'
    return form % (asking.VERSION, profile, config)


def read(answer: bytes) -> str | None:
    """Return the line of an answer; None where it is none of ours."""
    size, _, body = answer.partition(b"\n")
    text = body[len(BEGIN) : -len(END)]
    if size != b"%d" % len(body) or body != BEGIN + text + END or not text:
        return None
    if b"\\" in text or b'"' in text or not text.isascii():
        return None
    line = text.decode()
    return line if line.isprintable() else None


def _ask(path: bytes, request: bytes) -> bytes:
    until = time.monotonic() + SECONDS
    server = asking.connect(path, until)
    try:
        server.sendall(request)
        answer = b""
        while len(answer) < LONGEST:
            server.settimeout(max(0.001, until - time.monotonic()))
            piece = server.recv(LONGEST)
            if not piece:
                break
            answer += piece
            if time.monotonic() >= until:
                raise TimeoutError
    finally:
        server.close()
    return answer
