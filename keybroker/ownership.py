"""The owner lock in the daemon's hands: lent to a command, taken anew if its file is removed."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from keybroker import listening, paths
from keybroker.errors import ConfigError
from keybroker.log import Log
from keybroker.server import Client


class Ownership:
    """
    Who may write the journal: the daemon, or a command that it lent the lock to.

    Args:
        lock: The owner lock's descriptor, which workers inherit copies of.
        state: The state directory.
        path: The socket's path, which the lock's file names.
    """

    def __init__(self, lock: int, state: Path, path: str, log: Log) -> None:
        self._lock, self._state, self._path, self._log = lock, state, path, log
        self._file = str(state / paths.OWNER_LOCK)
        self._borrower: Client | None = None
        self._lent = False

    @property
    def promised(self) -> bool:
        """Say whether a command has the lock, or is to have it: nothing new may be begun."""
        return self._borrower is not None

    def promise(self, client: Client) -> None:
        """Begin nothing more: this client is to have the lock, as long as it is connected."""
        self._borrower = client

    def keep(self) -> None:
        """Take the promise back."""
        self._borrower = None

    def lend(self) -> None:
        """Let go of the lock. No worker may be running, or have a copy of it."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._lent = True

    def check(self, reread: Callable[[], None]) -> bool:
        """
        Say whether we may write the journal, having taken the lock back or anew if need be.

        Args:
            reread: Called when another may have written it.
        """
        if not self._take_back(reread):
            return False
        if listening.in_place(self._lock, self._file):
            return True
        try:
            paths.private_directory(self._state)
            fresh = listening.hold(self._file)
        except (OSError, ConfigError) as error:
            self._log.once("error", f"{self._file}: cannot be locked ({error})", about="lock")
            return False
        if fresh is None:
            text = f"{self._file} was removed, and is another's now; nothing is begun meanwhile"
            self._log.once("error", text, about="lock")
            return False
        os.dup2(fresh, self._lock, inheritable=False)
        os.close(fresh)
        listening.record_owner(self._lock, self._path)
        self._log.say("warning", f"{self._file} was removed; it was made again")
        if (self._state / paths.JOURNAL).exists():
            reread()
        return True

    def _take_back(self, reread: Callable[[], None]) -> bool:
        """Be the owner again, once the borrower is gone; what it wrote is in the journal."""
        if self._borrower is None or not self._borrower.closed:
            return self._borrower is None
        if self._lent:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            listening.record_owner(self._lock, self._path)
            self._lent = False
            reread()
        self._borrower = None
        return True
