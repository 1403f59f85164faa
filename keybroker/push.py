"""Tell running clients of a new key: touch the settings files that they watch.

Claude Code forgets its key when its settings file changes, even if only in its times, and asks
for it anew before its next request. Contents are never written and files never created.
"""

import errno
import json
import os
import stat
from contextlib import suppress
from pathlib import Path

from keybroker.paths import Disk

RECORD = "settings-files.json"
SETTINGS = "settings.json"
MOST_DIRECTORIES = 64
APART_SECONDS = 2.0  # a client that was just told takes this long to forget and ask
ABSENT = "does not exist"
_REASONS = {
    errno.ENOENT: ABSENT,
    errno.ENOTDIR: ABSENT,
    errno.EACCES: "may not be read by this user",
    errno.EPERM: "may not be touched by this user",
    errno.EROFS: "is on a read-only file system",
    errno.ELOOP: "is a link that leads nowhere",
}


class SettingsFiles:
    """
    The user's `settings.json` in every configuration directory that a helper named.

        {"v": 1, "directories": ["/home/you/.claude"]}

    At most 64 directories are kept, in the state directory's `settings-files.json`; the least
    recently named go first. `off` says of which files what is wrong with them, in words: these
    are not touched any more. One that is absent is tried again when its directory is named
    again, the others when `off` is cleared, as a restart does.
    """

    def __init__(self, state: Path, disk: Disk | None = None) -> None:
        self.off: dict[str, str] = {}
        self._record = state / RECORD
        self._disk = disk or Disk()
        self._files: dict[str, str] = {}  # by directory, the least recently named first

    def known(self) -> list[str]:
        """Return the files' paths, the least recently named first; not all of them exist."""
        return list(self._files.values())

    def name(self, directory: str) -> bool:
        """
        Take down a configuration directory that a helper named; True when it is a new one.

        What is not an absolute path is ignored.
        """
        file = self._files.pop(directory, None)
        if file is not None:
            self._files[directory] = file
            if self.off.get(file) == ABSENT:
                del self.off[file]
            return False
        if not directory.startswith("/") or "\0" in directory:
            return False
        self._files[directory] = os.path.join(directory, SETTINGS)
        while len(self._files) > MOST_DIRECTORIES:
            oldest = next(iter(self._files))
            self.off.pop(self._files.pop(oldest), None)
        return True

    def load(self) -> None:
        """Read what was saved. A record that is lost or damaged is made anew by the helpers."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            for directory in json.loads(self._disk.read(self._record) or b"{}")["directories"]:
                if isinstance(directory, str):
                    self.name(directory)

    def save(self) -> bool:
        """Keep the directories for the next start; False when the disk will not have it."""
        text = json.dumps({"v": 1, "directories": list(self._files)}) + "\n"
        try:
            self._disk.replace(self._record, text.encode())
        except OSError:
            return False
        return True

    def changed_at(self) -> float | None:
        """
        Return when one of the files was last changed or touched, by anybody.

        Seconds of the wall clock; None when none of them exists.
        """
        times: list[float] = []
        for file in self._files.values():
            with suppress(OSError):
                found = os.lstat(file)
                times.append(found.st_ctime)
                if stat.S_ISLNK(found.st_mode):  # either the link changes, or what it leads to
                    times.append(os.stat(file).st_ctime)
        return max(times, default=None)

    def touch(self) -> list[tuple[str, str]]:
        """
        Give every file the present time, and change nothing else of it.

        Returns:
            The files that were switched off by this, each with the reason in words.
        """
        failed = []
        for file in self._files.values():
            if file not in self.off and (reason := _touch(file)) is not None:
                self.off[file] = reason
                failed.append((file, reason))
        return failed


class Push:
    """Touches the files when a key was replaced: at once, and never twice within 2 s."""

    def __init__(self, files: SettingsFiles) -> None:
        self._files = files
        self._asked: float | None = None
        self._earliest = float("-inf")

    def replaced(self, now: float) -> None:
        """Note that clients hold a key that was replaced. Times are monotonic seconds."""
        if self._asked is None:
            self._asked = now

    def due(self) -> float | None:
        """Return when to `run`; None when there is nothing to do."""
        return None if self._asked is None else max(self._asked, self._earliest)

    def run(self, now: float) -> list[tuple[str, str]]:
        """Touch the files if it is due; return those that were switched off, with the reason."""
        due = self.due()
        if due is None or now < due:
            return []
        self._asked, self._earliest = None, now + APART_SECONDS
        return self._files.touch()


def _touch(file: str) -> str | None:
    """Touch a file of ours; say what is wrong with it, if anything is."""
    try:
        # What is opened is what is looked at and touched, whatever the path means a moment later.
        # A pipe or a terminal in its place neither holds us up nor becomes ours.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(file, flags)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                return "is not a regular file"
            if found.st_uid != os.geteuid():
                return "belongs to another user"
            os.utime(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        return _REASONS.get(error.errno or 0, f"cannot be touched ({error.strerror})")
    return None
