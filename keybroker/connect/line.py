"""The line that a client runs for a key."""

import os
import re
import shlex
import stat
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from keybroker import paths
from keybroker.connect.plan import Place
from keybroker.errors import ConfigError

NATIVE = "keybroker-key"  # the helper in C, which native/build.py has installed or not
_OF_WINDOWS = re.compile(r'(?:[A-Za-z]:\\|\\\\)[^"/\r\n]*\Z')
USUAL = "-"  # the usual place of the socket, whoever asks


def helper_line(profile: str, environment: Mapping[str, str] = os.environ) -> str:
    """
    Return the line for this user on this machine: all paths are absolute.

    `exec`, so that the shell that runs it is gone and the client is the helper's parent.
    """
    return _line(helper_command(str(paths.socket_path(environment)), profile))


def system_line(profile: str) -> str:
    """Return the line for every user whom the daemon of this shared host answers."""
    return _line(helper_command(str(paths.SYSTEM_SOCKET), profile))


def shared_line(profile: str, place: Place) -> str:
    """
    Return the one line for all users of a machine, who have sockets of their own.

    Raises:
        ConfigError: Others cannot run keybroker where it is installed here.
    """
    folder = place.installed_in
    if place.system == "windows":
        if folder is None:
            raise ConfigError(
                "connect: where keybroker is installed on those machines is not known",
                hint=r"--installed-in 'C:\Program Files\keybroker'",
            )
        if not _OF_WINDOWS.match(folder):
            raise ConfigError(
                "connect: --installed-in: expected a path of Windows, with a drive",
                hint=r"--installed-in 'C:\Program Files\keybroker'",
            )
        return f'"{folder}\\Scripts\\keybroker.exe" get {profile}'
    if folder is None:
        if place.system != Place.here().system:
            raise ConfigError(
                "connect: where keybroker is installed on those machines is not known",
                hint="--installed-in /opt/keybroker",
            )
        words = helper_command(USUAL, profile)
        _check_others_can(word for word in words if word.startswith("/"))
        return _line(words)
    folder = folder.rstrip("/")
    if not folder.startswith("/"):
        raise ConfigError("connect: --installed-in: expected a path from the root")
    if os.access(f"{folder}/bin/{NATIVE}", os.X_OK):
        return _line([f"{folder}/bin/{NATIVE}", USUAL, profile, f"{folder}/bin/python3"])
    return _line([f"{folder}/bin/keybroker", "get", profile])


def helper_command(socket: str, profile: str) -> list[str]:
    """
    Return the helper with its arguments: the native one if this installation has it.

    Args:
        socket: Where to ask; -: the usual place.
    """
    native = os.path.join(sysconfig.get_path("scripts"), NATIVE)
    if os.path.isfile(native) and os.access(native, os.X_OK):
        return [native, socket, profile, sys.executable]
    place = os.path.join(os.path.dirname(os.path.dirname(__file__)), "helper.py")
    return [sys.executable, "-IS", place, socket, profile]


def status_line(profile: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the line that prints a client's status line, for this user on this machine."""
    place = os.path.join(os.path.dirname(os.path.dirname(__file__)), "statusline.py")
    socket = str(paths.socket_path(environment))
    return _line([sys.executable, "-IS", place, socket, profile])


def _line(words: Sequence[str]) -> str:
    quoted = (
        word if word[0] == "-" else f"'{word}'" if "'" not in word else shlex.quote(word)
        for word in words
    )
    return f"exec {' '.join(quoted)}"


def _check_others_can(files: Iterable[str]) -> None:
    """See that every user can read and run what the line names, links followed."""
    for file in files:
        for path in {Path(file), Path(file).resolve()}:
            for one in (path, *path.parents):
                wanted = stat.S_IXOTH if one != path else stat.S_IROTH
                mode = 0
                with suppress(OSError):
                    mode = one.stat().st_mode
                if not mode & wanted:
                    raise ConfigError(
                        f"connect: keybroker is installed in {sys.prefix}, where other users "
                        f"cannot run it ({one})",
                        hint="install it for all, as in /opt/keybroker; or --installed-in FOLDER",
                    )
