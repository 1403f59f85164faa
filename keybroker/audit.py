"""Who was given what, and what became of it: chained JSON lines, on by default.

{"n":12,"at":"2026-11-21T15:45:51.123456Z","event":"given","profile":"work",
 "fingerprint":"3f9a1c02","uid":1000,"pid":4711,"program":"claude","prev":"9f1c…"}
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from keybroker.chain import Chain
from keybroker.errors import JournalError
from keybroker.journal import write_time
from keybroker.paths import AUDIT, Disk

LARGEST = 4 << 20
KEPT = 3


class Audit:
    """The audit log of one state directory. A line that cannot be written costs nobody a key."""

    def __init__(self, state: Path, disk: Disk | None = None) -> None:
        self.path = state / AUDIT
        self._disk = disk or Disk()
        self._chain = Chain(self.path, "audit", self._disk)

    def write(self, at: datetime, event: str, profile: str, **facts: str | int) -> None:
        """Add a line: what happened to which fingerprint, and who asked."""
        self.add({"at": write_time(at), "event": event, "profile": profile, **facts})

    def add(self, *lines: Mapping[str, str | int]) -> None:
        """Add lines at once."""
        with suppress(JournalError, OSError):
            self._rotate()
            self._chain.append(*lines, sync=False)

    def files(self) -> list[Path]:
        """Return the files that exist, oldest first."""
        older = [self.path.with_name(f"{AUDIT}.{n}") for n in range(KEPT, 0, -1)]
        return [path for path in (*older, self.path) if path.exists()]

    def read(self) -> list[dict[str, Any]]:
        """
        Return all lines, each file's chain checked.

        Raises:
            JournalError: A line was changed, removed or added by another hand.
        """
        return [line for path in self.files() for line in Chain(path, "audit", self._disk).read()]

    def _rotate(self) -> None:
        if not self._is_full():
            return
        with self._disk.lock(self.path):  # else another process might be about to add a line
            if self._is_full():
                self._begin_another()

    def _is_full(self) -> bool:
        return self.path.exists() and self.path.stat().st_size >= LARGEST

    def _begin_another(self) -> None:
        for number in range(KEPT, 1, -1):
            newer = self.path.with_name(f"{AUDIT}.{number - 1}")
            if newer.exists():
                newer.replace(self.path.with_name(f"{AUDIT}.{number}"))
        self.path.replace(self.path.with_name(f"{AUDIT}.1"))


def asker() -> dict[str, str | int]:
    """Return who runs this command: the parent that waits for its answer."""
    pid = os.getppid()
    program = "?"
    with suppress(OSError):
        program = Path(f"/proc/{pid}/comm").read_text("utf-8", "replace").strip()[:32]
    return {"uid": os.getuid(), "pid": pid, "program": program}
