"""Asking the daemon for a key: where it listens, what is said, how long is waited for which answer.

It is also the whole of the helper, which runs without a site and with nothing else of ours: this
module imports none of it, and little besides.
"""

import posix
import sys
import time

try:
    import _socket as socket
except ImportError:  # what that module is called is CPython's own business
    import socket  # type: ignore[no-redef]

VERSION = 1
LONGEST_REQUEST = 1024  # bytes, with the newline
LONGEST_REPLY = 16_400
LONGEST_TEXT = 200  # characters
FIRST_SECONDS = 2.0  # until the first byte of an answer
WAIT_SECONDS = 8.0  # in all; Claude Code says after ten that a helper is slow

WITHIN = "KEYBROKER_WORKER"  # in the environment of what a worker's libraries start
OTHER = b"KEYBROKER_CONFIG"  # whether the daemon at the usual place has it, `get` knows
CLIENT_TTL_MS = b"300000"  # Claude Code's own, where nobody set another
RUN_USER = b"/run/user"
NAME = b"abcdefghijklmnopqrstuvwxyz0123456789_-"
SYSTEM = b"/run/keybroker/s"  # of the daemon of a shared host
VISIBLE = bytes(range(0x21, 0x7F))
PEER = getattr(socket, "SO_PEERCRED", None)  # Linux has it
SLOW = ("-I", "-c", "from keybroker.cli import main; main()", "get")


def is_name(profile: bytes) -> bool:
    """Say whether a profile can have this name."""
    return 0 < len(profile) <= 32 and profile[0] not in b"_-" and not profile.translate(None, NAME)


def find(environment: dict[bytes, bytes]) -> bytes:
    """Return the path of the daemon's socket, as `paths.socket_path` does."""
    runtime = environment.get(b"XDG_RUNTIME_DIR", b"")
    if runtime[:1] == b"/":
        return runtime + b"/keybroker/s"
    if sys.platform == "darwin":
        return environment.get(b"HOME", b"") + b"/Library/Caches/keybroker/s"
    uid = posix.geteuid()
    users = b"%b/%d" % (RUN_USER, uid)
    try:
        found = posix.lstat(users)
        if found.st_mode & 0o170000 == 0o040000 and found.st_uid == uid:
            return users + b"/keybroker/s"
    except OSError:
        pass
    return b"/tmp/keybroker-%d/s" % uid  # whose it is, is looked at when it answers


def line(profile: bytes, pid: int, ttl_ms: bytes, folder: bytes) -> bytes:
    """Write a request. A folder that does not fit into it is left out."""
    start = b"%d get %b %d %b" % (VERSION, profile, pid, ttl_ms)
    if folder[:1] == b"/" and b"\n" not in folder and len(start + folder) + 2 <= LONGEST_REQUEST:
        start += b" " + folder
    return start + b"\n"


def request(profile: bytes, environment: dict[bytes, bytes]) -> bytes:
    """Write the request of this process: of whom it is a child, how often that one asks."""
    ttl = environment.get(b"CLAUDE_CODE_API_KEY_HELPER_TTL_MS", b"")
    if not ttl.isdigit() or len(ttl) > 15:
        ttl = CLIENT_TTL_MS if b"CLAUDE_CODE_ENTRYPOINT" in environment else b"0"
    home = environment.get(b"HOME")
    folder = environment.get(b"CLAUDE_CONFIG_DIR") or (home + b"/.claude" if home else b"")
    return line(profile, posix.getppid(), ttl, folder)


def connect(path: bytes, until: float) -> socket.socket:
    """
    Return a connection to the daemon.

    Args:
        until: When to give up, of `time.monotonic`.

    Raises:
        OSError: Nobody listens there, or somebody who is neither we nor root.
    """
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.settimeout(max(0.0, until - time.monotonic()))
        while True:
            try:
                server.connect(path)
                break
            except BlockingIOError:  # its queue is full
                if time.monotonic() >= until:
                    raise
                time.sleep(0.01)
        if PEER is not None:
            found = server.getsockopt(socket.SOL_SOCKET, PEER, 12)  # pid, uid, gid
            owner = int.from_bytes(found[4:8], sys.byteorder)
        else:  # who can put a socket there
            folder = posix.lstat(path.rpartition(b"/")[0])
            owner = folder.st_uid if folder.st_mode & 0o022 == 0 else -1
        if owner not in (0, posix.geteuid()):
            raise PermissionError("it belongs to another user")
    except BaseException:
        server.close()
        raise
    return server


def ask(path: bytes, request: bytes) -> bytes:
    """
    Send a request; return the last line of the answer, without its newline.

    Raises:
        OSError: Nobody answers, or not in time, or the answer is too long or breaks off.
    """
    start = time.monotonic()
    until = start + FIRST_SECONDS
    server = connect(path, until)
    try:
        server.sendall(request)
        reply = b""
        while reply[-1:] != b"\n" or reply == b"wait\n":
            server.settimeout(max(0.0, until - time.monotonic()))
            piece = server.recv(LONGEST_REPLY + 6 - len(reply))
            if not piece:
                raise ConnectionError("the answer breaks off")
            reply += piece
            until = start + WAIT_SECONDS
    finally:
        server.close()
    return reply[:-1].removeprefix(b"wait\n")


def read_reply(reply: bytes) -> tuple[int, str] | None:
    """Return 0 and the key, or an exit status and the line for people; None of any other reply."""
    word, _, rest = reply.partition(b" ")
    if word == b"ok" and rest and not rest.translate(None, VISIBLE):
        return 0, rest.decode()
    status, _, said = rest.partition(b" ")
    text = said.decode("utf-8", "replace")
    if word != b"error" or not text or not text.isprintable():
        return None
    known = status.isdigit() and len(status) == 2 and 64 <= int(status) <= 78
    return int(status) if known else 69, shorten(text)


def shorten(text: str) -> str:
    """Cut a line for people to the length that Claude Code shows well."""
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def main(arguments: list[str], environment: dict[bytes, bytes]) -> int:
    """Be the helper: print the key, or say why there is none; return the exit status."""
    path, profile = [*arguments, "-", "-"][:2]
    name = profile.encode("utf-8", "replace")
    place = b"" if path == "-" else path.encode(sys.getfilesystemencoding(), "surrogateescape")
    known = (name == b"-" or is_name(name)) and (path == "-" or place[:1] == b"/")
    if not known or len(arguments) not in (1, 2):
        return _say("keybroker: helper: needs a socket's path or -, and a profile's name", 2)
    try:
        posix.fstat(1)
    except OSError:  # and the connection would take its place
        return _say("keybroker: output: stdout is closed", 74)
    try:
        if not place and OTHER in environment:
            raise FileNotFoundError
        found = ask(place or find(environment), request(name, environment))
    except (FileNotFoundError, ConnectionRefusedError):  # nobody is there
        return _become_get(["--system"] if place == SYSTEM else [], profile)
    except OSError:
        found = b""
    reply = read_reply(found)
    if reply is None:  # somebody is, and hangs, or speaks in tongues
        return _become_get(["--system" if place == SYSTEM else "--unanswered"], profile)
    return _say(reply[1], reply[0]) if reply[0] else put(found[3:] + b"\n")


def put(key: bytes) -> int:
    """Print a key's line, whole; return the exit status."""
    until = time.monotonic() + FIRST_SECONDS
    while key:
        try:
            key = key[posix.write(1, key) :]
        except OSError as error:
            if not isinstance(error, BlockingIOError) or time.monotonic() >= until:
                return _say("keybroker: output: the key cannot be written", 74)
            time.sleep(0.01)
    return 0


def _say(text: str, status: int) -> int:
    try:
        posix.write(2, text.encode() + b"\n")
    except OSError:  # nobody reads it
        return status
    return status


def _become_get(arguments: list[str], profile: str) -> int:
    arguments += [] if profile == "-" else [profile]
    try:
        posix.dup2(posix.open("/dev/null", posix.O_RDWR), 0)  # the client's stdin never ends
        posix.set_inheritable(0, True)
        posix.execv(sys.executable, [sys.executable, *SLOW, *arguments])
    except (OSError, ValueError):
        pass
    return _say("keybroker: helper: nobody answers, and keybroker get cannot be started", 69)


if __name__ == "__main__":  # of helper.py
    try:
        posix._exit(main(sys.argv[1:], posix.environ))
    except KeyboardInterrupt:
        posix._exit(130)
