"""The words and limits of the daemon's socket: one request a connection.

For a key: `1 get <profile or -> <session's pid> <ttl in ms> <client's folder>`; the answer is
`ok <key>` or `error <exit status> <text for people>`, with `wait` before it, at once, if it needs
the network. All are lines, and one that has no newline is none.

For control: a line `{"v": 1, "op": "status", ...}`; the answer is a length in decimal, a newline
and as many bytes, `{"ok": ...}` or `{"error": {"code": ..., "message": ..., "hint": ...}}`. After
the op `watch` objects follow, one a line, until either side closes; an `error` is the last.

Little is imported before it is needed: a program that asks for a key pays for no more.
"""

from __future__ import annotations

from keybroker import asking
from keybroker.values import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from _socket import socket
    from collections.abc import Generator, Iterator
    from typing import Any

    from keybroker.errors import KeybrokerError, NobodyAnswers

VERSION = asking.VERSION
LONGEST_REQUEST = asking.LONGEST_REQUEST  # bytes, with the newline
LONGEST_REPLY = asking.LONGEST_REPLY
LONGEST_KEY = 16_384  # characters
LONGEST_ANSWER = 1 << 24  # bytes, of one for control or of a line of a watch
LONGEST_TEXT = asking.LONGEST_TEXT  # characters
FIRST_SECONDS = asking.FIRST_SECONDS  # until the first byte of an answer
WAIT_SECONDS = asking.WAIT_SECONDS  # until the end of one, from the beginning
LARGEST_PID = 2**31 - 1
LARGEST_TTL_MS = 2**53
WAIT = b"wait\n"
TELLING = ("watch", "lend", "run")  # operations that are answered by lines, until somebody closes
EVERY = "*"  # in place of profiles' names, for which a request may have no room
STRANGE = "its answer is none of ours"


class OtherVersion(ValueError):  # noqa: N818  # a class says what it is
    """A request in the words of another version."""


@dataclass(slots=True)
class Asked:
    """
    A request for a key.

    Attributes:
        profile: Its name; empty: the only or default one.
        pid: The asker's parent, whose session it is; 0: unknown.
        ttl_ms: How often that session asks; 0: unknown, or it is no client.
        directory: The client's configuration folder, absolute, as the file system has it
            (surrogateescape); empty: unknown.
    """

    profile: str
    pid: int
    ttl_ms: int
    directory: str


def read_request(line: bytes) -> Asked | dict[str, Any]:
    """
    Read a request, with its newline. A dictionary is one for control, of our version, with an `op`.

    Raises:
        OtherVersion: It is one, of another version.
        ValueError: It is none. What was in it is not said.
    """
    if len(line) > LONGEST_REQUEST or line.find(b"\n") != len(line) - 1:
        raise ValueError("not one line")
    if line[:6] != b"1 get ":
        return _read_control(line)
    name, pid, ttl_ms, directory = (*line[6:-1].split(b" ", 3), b"", b"", b"")[:4]
    if name != b"-" and not asking.is_name(name):
        raise ValueError("not a profile's name")
    if not pid.isdigit() or not ttl_ms.isdigit():
        raise ValueError("not a number")
    asked = Asked("" if name == b"-" else name.decode(), int(pid), int(ttl_ms), "")
    if asked.pid > LARGEST_PID or asked.ttl_ms > LARGEST_TTL_MS:
        raise ValueError("too large a number")
    if directory[:1] == b"/" and b"\0" not in directory:
        asked.directory = directory.decode("utf-8", "surrogateescape")
    return asked


def _read_control(line: bytes) -> dict[str, Any]:
    import json

    if line[:1] != b"{":
        version = line.partition(b" ")[0]
        if version.isdigit() and version != b"%d" % VERSION:
            raise OtherVersion("not our version")
        raise ValueError("not a request")
    try:
        found = json.loads(line.decode(), parse_constant=_refuse)
        json.dumps(found, ensure_ascii=False).encode()  # half a character can be written nowhere
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    version = found.get("v")
    if type(version) is not int or not isinstance(found.get("op"), str):
        raise ValueError("without a version or an operation")
    if version != VERSION:
        raise OtherVersion("not our version")
    return dict(found)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def request(profile: str, pid: int = 0, ttl_ms: int = 0, directory: str = "") -> bytes:
    """
    Write a request for a key; `asking.request` writes that of this process. See `Asked`.

    A number out of range counts as unknown, as does a folder that has no room in the line.

    Raises:
        ValueError: No profile can have this name.
    """
    name = profile.encode("utf-8", "replace") or b"-"
    if name != b"-" and not asking.is_name(name):
        raise ValueError("not a profile's name")
    pid = pid if 0 <= pid <= LARGEST_PID else 0
    ttl_ms = ttl_ms if 0 <= ttl_ms <= LARGEST_TTL_MS else 0
    folder = directory.encode("utf-8", "surrogateescape")
    return asking.line(name, pid, b"%d" % ttl_ms, folder)


def ok(key: str) -> bytes:
    """
    Write the answer that is a key.

    Raises:
        ValueError: It is not one token of visible ASCII, or too long; it is not quoted.
    """
    if not (0 < len(key) <= LONGEST_KEY and key.isascii() and key.isprintable()) or " " in key:
        raise ValueError("not a key that can be handed out")
    return b"ok %b\n" % key.encode()


def error_line(error: KeybrokerError) -> bytes:
    """Write the answer that is the reason why there is no key."""
    return f"error {error.exit_status} {one_line(error)}\n".encode()


def one_line(error: KeybrokerError) -> str:
    """Say an error in one line for people: Claude Code shows it as it is."""
    text = f"keybroker: {error.message}" + (f"; {error.hint}" if error.hint else "")
    text = " ".join(text.split())
    if not text.isprintable():  # a path may hold what steers a terminal, or what is no character
        text = "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)
    return asking.shorten(text)


def answer(value: Any) -> bytes:
    """Write the answer to a request for control; `value` is what JSON can hold."""
    return _sized({"ok": value})


def refusal(error: KeybrokerError, *, telling: bool = False) -> bytes:
    """Write the answer to a request for control that fails; to one who watches, the last line."""
    found = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
    return told(found) if telling else _sized(found)


def told(found: dict[str, Any]) -> bytes:
    """Write a line of what is told to one who watches; `error` is the last one's only member."""
    import json

    return json.dumps(found).encode() + b"\n"


def _sized(found: dict[str, Any]) -> bytes:
    import json

    text = json.dumps(found).encode()
    return b"%d\n%b" % (len(text), text)


# The client's side.


def ask(path: str | os.PathLike[str], request: bytes) -> bytes:
    """
    Ask the daemon for a key.

    Returns:
        The last line of the answer without its newline; `asking.read_reply` reads it.

    Raises:
        NobodyAnswers: Nobody who may answer does so, in time and in full.
    """
    import os

    try:
        reply = asking.ask(os.fsencode(path), request)
    except OSError as error:
        raise _nobody(path, error.strerror or str(error)) from None
    if asking.read_reply(reply) is None:
        raise _nobody(path, STRANGE)
    return reply


def control(path: str | os.PathLike[str], op: str, seconds: float, /, **values: Any) -> Any:
    """
    Have the daemon do something.

    Args:
        seconds: How long it may take in all.
        values: What the operation needs beside its name, of what JSON can hold.

    Returns:
        What it answered.

    Raises:
        KeybrokerError: Of the class that the answer names.
        NobodyAnswers: Nobody who may answer does so, in time and in full.
        ValueError: The request is too long.
    """
    said = bytearray()
    for piece in _pieces(path, op, values, seconds):
        said += piece
        if len(said) > LONGEST_ANSWER:
            raise _nobody(path, "the answer is too long")
    size, _, text = said.partition(b"\n")
    if not size.isdigit():
        raise _refused(path, size)
    if size != b"%d" % len(text):
        raise _nobody(path, "the answer breaks off")
    found = _read_object(path, text)
    if "ok" not in found:
        raise _nobody(path, STRANGE)
    return found["ok"]


def watch(path: str | os.PathLike[str], op: str = "watch") -> Generator[dict[str, Any]]:
    """
    Yield what the daemon tells, until it ends or the caller closes the iterator.

    With the op `lend` it tells once that it lent the owner lock, which lasts as long.

    Raises:
        KeybrokerError: Of the class that the last line names.
        NobodyAnswers: Nobody is there who may answer, or what is said is none of ours.
    """
    rest = bytearray()
    for piece in _pieces(path, op, {}, None):
        rest += piece
        *lines, rest = rest.split(b"\n") if b"\n" in piece else [rest]
        for line in lines:
            yield read_told(path, line)
        if len(rest) > LONGEST_ANSWER:
            raise _nobody(path, "the answer is too long")


def read_told(path: str | os.PathLike[str], line: bytes | bytearray) -> dict[str, Any]:
    """
    Read a line of what is told.

    Raises:
        KeybrokerError: The one that it tells of.
        NobodyAnswers: It is none of ours.
    """
    if line[:1] != b"{":
        raise _refused(path, line)
    return _read_object(path, line)


def hold(path: str | os.PathLike[str], op: str, values: dict[str, Any]) -> socket:
    """
    Ask for something that lasts as long as the connection, which is returned.

    What comes on it are lines, see `read_told`, and then nothing until it is closed.

    Raises:
        NobodyAnswers: Nobody is there who may answer.
        ValueError: The request is too long.
    """
    import os
    import time

    line = control_line(op, values)
    try:
        server = asking.connect(os.fsencode(path), time.monotonic() + FIRST_SECONDS)
        try:
            server.sendall(line)
        except OSError:
            server.close()
            raise
    except OSError as error:
        raise _nobody(path, error.strerror or str(error)) from None
    return server


def control_line(op: str, values: dict[str, Any]) -> bytes:
    """
    Write a request for control.

    Raises:
        ValueError: It is too long.
    """
    import json

    line = json.dumps({"v": VERSION, "op": op, **values}).encode() + b"\n"
    if len(line) > LONGEST_REQUEST:
        raise ValueError("the request is too long")
    return line


def _pieces(
    path: str | os.PathLike[str], op: str, values: dict[str, Any], seconds: float | None
) -> Iterator[bytes]:
    """Send a request for control; yield what comes back, until the daemon closes."""
    import os
    import time

    line = control_line(op, values)
    until = time.monotonic() + (FIRST_SECONDS if seconds is None else seconds)
    try:
        server = asking.connect(os.fsencode(path), until)
        try:
            server.sendall(line)
            server.settimeout(None)
            while True:
                if seconds is not None:
                    server.settimeout(max(0.0, until - time.monotonic()))
                if not (piece := server.recv(1 << 16)):
                    return
                yield piece
        finally:
            server.close()
    except OSError as error:
        raise _nobody(path, error.strerror or str(error)) from None


def _read_object(path: str | os.PathLike[str], text: bytes | bytearray) -> dict[str, Any]:
    """Read an object of an answer; raise the error that it tells of."""
    import json

    from keybroker.errors import CLASSES, KeybrokerError

    try:
        found = json.loads(text)
        problem = found.get("error")
        if problem is None:
            return dict(found)
        kind = CLASSES.get(problem["code"], KeybrokerError)
        error = kind(str(problem["message"]), hint=problem.get("hint"))
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise _nobody(path, STRANGE) from None
    raise error


def _refused(path: str | os.PathLike[str], line: bytes | bytearray) -> NobodyAnswers:
    """Return the error for a line that is no answer, but may say why: it is of another version."""
    said = asking.read_reply(bytes(line))
    if said is None or said[0] == 0:
        return _nobody(path, STRANGE)
    from keybroker.errors import NobodyAnswers

    return NobodyAnswers(said[1].removeprefix("keybroker: "))


def _nobody(path: str | os.PathLike[str], why: str) -> NobodyAnswers:
    from keybroker.errors import NobodyAnswers

    return NobodyAnswers(f"daemon: nobody answers at {path} ({why})")
